"""Private training: the obvious DP-SGD loop agrees with it, and no patient moves a sum further than the clip norm."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import client.private_trainer as private_trainer
from client.data import Item, load_cohort
from client.features import FeatureCache
from client.private_trainer import PrivateTrainResult, Unit, _clipped_sum, checked_engine, train_privately, units_of
from client.site import site_of_partition
from client.trainer import augment_intensity
from medfed.errors import PrivacyError
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.clipping import PatientSum
from privacy.noise import add_gaussian, hardened_normal
from privacy.per_sample.engine import Batch, Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from privacy.sampling import draw_images, draw_patients
from strategies.subspace import Subspace, Whole

# Legend: B samples, P adapter parameters.

MakeStudy = Callable[..., StudyConfig]

DECLARED = 3
SIZES = (1, 4, 2)
"""Images of each patient: some fewer and some more than the limit of two, or than a micro-batch."""

in_one_process = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class World:
    """A study, its model, and eight images that may be given to any patients."""

    study: StudyConfig
    model: AdaptedModel
    items: tuple[Item, ...]

    @property
    def plan(self) -> PrivacyPlan:
        assert self.study.privacy is not None
        return PrivacyPlan.of_study(self.study)

    def patients(self, *sizes: int) -> tuple[Unit, ...]:
        """Units of so many images each, from the first image on."""
        units, start = [], 0
        for number, size in enumerate(sizes):
            images = self.items[start : start + size]
            units.append(tuple(dataclass_replace(item, patient_id=f"p{number}") for item in images))
            start += size
        return tuple(units)

    def engine(self, trains: Callable[[str], bool] = lambda _: True) -> Engine:
        """For the tensors whose names ``trains`` accepts."""
        return checked_engine(
            self.model,
            task_of(self.study.task),
            self.study,
            trainable=self.whole(trains),
            example=self.items[0],
            features=FeatureCache(),
        )

    def whole(self, trains: Callable[[str], bool]) -> Subspace:
        """The tensors whose names ``trains`` accepts, whole."""
        return Subspace.of(self.model.manifest, lambda spec: Whole() if trains(spec.name) else None)

    def start(self) -> Tensor:
        """An adapter at which no gradient is zero."""
        generator = torch.Generator().manual_seed(3)
        return self.model.initial_P + 0.05 * torch.randn(self.model.initial_P.shape, generator=generator)

    def train(self, units: Sequence[Unit], *, seed: int = 0, **options: Any) -> PrivateTrainResult:
        engine = options.pop("engine", None) or self.engine()
        given: dict[str, Any] = {
            "engine": engine,
            "trainable": self.whole(engine.parameters.__contains__),
            "start_P": self.start(),
            "declared_units": DECLARED,
            "features": FeatureCache(),
            "stream": RandomStream.for_simulation(seed),
            **options,
        }
        return train_privately(self.model, task_of(self.study.task), units, self.study.training, self.plan, **given)

    def sum(self, units: Sequence[Unit], *, batch_size: int, seed: int = 0, engine: Engine | None = None) -> PatientSum:
        """The clipped sum of one step, before noise."""
        config = self.study.training.model_copy(update={"batch_size": batch_size})
        stream = RandomStream.for_simulation(seed)
        drawn = private_trainer._drawn(units, self.plan, stream)
        self.model.load(self.start())
        self.model.train()
        engine = engine or self.engine()
        task = task_of(self.study.task)
        trainable = self.whole(engine.parameters.__contains__)
        return _clipped_sum(drawn, self.model, task, config, self.plan, engine, trainable, FeatureCache(), stream)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(make_private_study: MakeStudy, make_cohort: Callable[..., Path]) -> MakeWorld:
    """Keyword arguments replace keys of ``[privacy]``, ``training`` those of ``[training]``."""

    def make(*, training: dict[str, Any] | None = None, views: int = 1, **privacy: Any) -> World:
        study = make_private_study(("north",), **privacy)
        assert study.privacy is not None
        usual = {"batch_size": 3, "learning_rate": 0.05, "optimizer": "sgd"}
        study = study.replace(
            training={**usual, **(training or {})}, privacy=study.privacy.model_copy(update={"views": views})
        )
        model = adapted_model(study, torch.device("cpu"))
        manifest = make_cohort("many", train=8, test=1)
        items = load_cohort("north", [manifest], study.task, model.pixels).train
        return World(study, model, items)

    return make


class Altered(Engine):
    """An engine whose gradients are changed by a function of inputs and gradients."""

    name = "altered"

    def __init__(self, inner: Engine, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(inner.module, inner.parameters, inner.losses)
        self._inner, self._change = inner, change

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        gradients_BP, losses_B = self._inner.gradients(batch)
        return self._change(batch[0], gradients_BP), losses_B


def obvious_dp_sgd(world: World, units: Sequence[Unit], *, seed: int, trainable: Callable[[str], bool]) -> Tensor:
    """One image at a time through the task's ordinary loss, torch's own optimiser, no engine and no buffers."""
    model, plan, config = world.model, world.plan, world.study.training
    task, stream = task_of(world.study.task), RandomStream.for_simulation(seed)
    moves_P = torch.cat([torch.full((spec.num_elements,), trainable(spec.name)) for spec in model.manifest.tensors])
    start_P = world.start()
    adapter_P = torch.nn.Parameter(start_P.clone())
    make = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    optimizer = make([adapter_P], lr=config.learning_rate, weight_decay=config.weight_decay)

    def gradient_of(item: Item, generator: torch.Generator) -> Tensor:
        image = item.image_CHW.expand(3, -1, -1)
        if config.augmentation == "intensity":
            image = augment_intensity(image, generator)
        model.load(adapter_P.detach())
        model.flat.grad.zero_()
        target = task.collate([item.annotation], model.device)
        task.losses(model, model.encode(image[None]), target).sum().backward()
        return model.flat.grad.clone().double()[moves_P]

    for _ in range(plan.steps_per_round):
        chosen = [
            [units[index][image] for image in draw_images(len(units[index]), plan.images_per_patient or 1, stream)]
            for index in draw_patients(len(units), plan.sampling_rate, stream)
        ]
        generator = torch.Generator().manual_seed(int(stream.below(2**62, 1)[0]))
        total = torch.zeros(int(moves_P.sum()), dtype=torch.float64)
        for images in chosen:
            mean = torch.stack([gradient_of(image, generator) for image in images for _ in range(plan.views)]).mean(
                dim=0
            )
            total += mean * min(1.0, plan.clip_norm / float(mean.norm()))
        if plan.trust == "site":
            total += plan.noise_multiplier * plan.clip_norm * torch.from_numpy(hardened_normal(len(total), stream))
        adapter_P.grad = torch.zeros_like(adapter_P)
        adapter_P.grad[moves_P] = (total / (plan.sampling_rate * DECLARED)).float()
        optimizer.step()
        with torch.no_grad():
            adapter_P[~moves_P] = start_P[~moves_P]
    return adapter_P.detach()


@pytest.mark.parametrize(
    ("privacy", "training", "only"),
    [
        ({}, {}, ""),
        ({}, {"optimizer": "adamw", "weight_decay": 0.1, "batch_size": 2}, ""),
        ({"views": 2}, {"augmentation": "intensity", "batch_size": 3}, ""),
        ({"clip_norm": 0.05}, {}, "lora_B"),
        ({"unit": "record", "images_per_patient": None}, {}, ""),
        ({"unit": "record", "images_per_patient": None}, {"optimizer": "adamw"}, "lora_A"),
        ({"trust": "none", "noise_multiplier": None}, {"learning_rate": 1.0}, ""),
    ],
)
def test_training_agrees_with_the_obvious_loop(
    make_world: MakeWorld, privacy: dict[str, Any], training: dict[str, Any], only: str
) -> None:
    world = make_world(steps_per_round=4, sampling_rate=0.7, training=training, **privacy)
    units = world.patients(*SIZES) if world.plan.unit == "patient" else units_of(world.items, "record")

    def trainable(name: str) -> bool:
        return only in name

    fast = world.train(units, seed=1, engine=world.engine(trainable))
    slow_P = obvious_dp_sgd(world, units, seed=1, trainable=trainable)
    torch.testing.assert_close(fast.adapter_P, slow_P, rtol=0, atol=1e-5)
    assert float((fast.adapter_P - world.start()).norm()) > 0.01


def test_units_are_patients_with_all_their_images_or_single_images(make_world: MakeWorld) -> None:
    world = make_world()
    owners = ["b", "a", "b", "c", "a", "b"]
    items = [dataclass_replace(item, patient_id=owner) for item, owner in zip(world.items, owners, strict=False)]
    digests = [[item.image_digest for item in unit] for unit in units_of(items, "patient")]
    assert digests == [[items[i].image_digest for i in of] for of in ([1, 4], [0, 2, 5], [3])]
    assert units_of(items, "record") == tuple((item,) for item in items)


@in_one_process
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) <= 8),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_clipped_sum_does_not_depend_on_the_micro_batch(
    world: World, sizes: list[int], batch_size: int, seed: int
) -> None:
    units = world.patients(*sizes)
    expected = world.sum(units, batch_size=1, seed=seed)
    got = world.sum(units, batch_size=batch_size, seed=seed)
    clip_norm = world.plan.clip_norm
    assert float((got.sum_P - expected.sum_P).norm()) <= 1e-5 * clip_norm * max(1, got.num_patients)
    assert (got.num_patients, got.num_clipped) == (expected.num_patients, expected.num_clipped)


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """Everyone takes part, with up to five images; everyone is clipped."""
    return make_world(sampling_rate=1.0, images_per_patient=5, clip_norm=0.01)


@pytest.mark.parametrize("batch_size", range(1, 8))
def test_patient_cut_over_micro_batches_is_clipped_once(world: World, batch_size: int) -> None:
    total = world.sum(world.patients(5), batch_size=batch_size)
    assert (total.num_patients, total.num_clipped) == (1, 1)
    assert total.norm == pytest.approx(world.plan.clip_norm, rel=1e-9)


def test_micro_batch_changes_neither_augmented_views_nor_noise(make_world: MakeWorld) -> None:
    world = make_world(views=2, training={"augmentation": "intensity"})
    adapters = []
    for batch_size in (1, 2, 7):
        training = world.study.training.model_copy(update={"batch_size": batch_size})
        cut = dataclass_replace(world, study=world.study.replace(training=training))
        adapters.append(cut.train(cut.patients(*SIZES)).adapter_P)
    for other in adapters[1:]:
        torch.testing.assert_close(other, adapters[0], rtol=0, atol=1e-5)


@in_one_process
@given(
    place=st.integers(0, 3),
    images=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    magnitude=st.sampled_from([0.0, 1e-12, 1.0, 1e12, 1e30]),
)
def test_patient_who_is_added_anywhere_moves_the_sum_by_at_most_the_clip_norm(
    world: World, place: int, images: int, batch_size: int, magnitude: float
) -> None:
    """The newcomer may have many images, of gradients as large or small as an adversary likes."""
    others = list(world.patients(1, 1, 1))
    newcomer = tuple(dataclass_replace(item, patient_id="new") for item in world.items[3 : 3 + images])
    marked = FeatureCache().batch(newcomer, world.model)

    def change(inputs: Tensor, gradients_BP: Tensor) -> Tensor:
        is_new_B = torch.tensor([any(torch.equal(one, other) for other in marked) for one in inputs])
        # Beyond float32's range an engine gives infinity, which is refused elsewhere.
        scaled_BP = (gradients_BP.double() * magnitude).clamp(-1e37, 1e37).float()
        return torch.where(is_new_B[:, None], scaled_BP, gradients_BP)

    engine = Altered(world.engine(), change)
    without = world.sum(others, batch_size=batch_size, engine=engine)
    together = world.sum([*others[:place], newcomer, *others[place:]], batch_size=batch_size, engine=engine)
    moved = float((together.sum_P - without.sum_P).norm())
    # Other micro-batches round the others' gradients otherwise; of one image each, they are the same.
    rounding = 1e-12 if batch_size == 1 else 1e-5
    assert moved <= world.plan.clip_norm * (1 + rounding)
    if magnitude >= 1.0:
        assert moved == pytest.approx(world.plan.clip_norm, rel=1e-4), "the test would not see a larger one"


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_patient_who_leaves_moves_the_step_by_at_most_the_clip_norm_over_the_public_size(
    make_world: MakeWorld, leaves: int
) -> None:
    """Divided by the true number of patients, or by those drawn, it could move further, as all others would."""
    world = make_world(
        trust="none", noise_multiplier=None, sampling_rate=1.0, steps_per_round=1, clip_norm=0.01,
        training={"learning_rate": 1.0},
    )  # fmt: skip
    units = world.patients(*SIZES)
    kept = [unit for number, unit in enumerate(units) if number != leaves]
    moved = float((world.train(units).adapter_P - world.train(kept).adapter_P).norm())
    assert moved == pytest.approx(world.plan.clip_norm / DECLARED, rel=1e-3)


def recorded_noise(monkeypatch: pytest.MonkeyPatch, *, scale: float = 1.0) -> list[Tensor]:
    """The sums that noise was added to; the noise itself is scaled."""
    sums: list[Tensor] = []

    def add(sum_P: Tensor, *, noise_std: float, stream: RandomStream) -> Tensor:
        sums.append(sum_P.clone())
        return add_gaussian(sum_P, noise_std=noise_std * scale, stream=stream)

    monkeypatch.setattr(private_trainer, "add_gaussian", add)
    return sums


def test_steps_that_draw_nobody_are_noised_and_taken_like_any_other(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(sampling_rate=1e-9, steps_per_round=5, clip_norm=1e-9, training={"learning_rate": 1.0})
    sums = recorded_noise(monkeypatch)
    result = world.train(world.patients(*SIZES))
    assert len(sums) == 5
    assert not any(bool(total.any()) for total in sums)
    assert result.facts == {"signal_to_noise": 0.0}
    moved_P = result.adapter_P - world.start()
    expected = 5**0.5 * world.plan.noise_std / (world.plan.sampling_rate * DECLARED)
    assert float(moved_P.std()) == pytest.approx(expected, rel=0.2)


def test_cohort_without_any_patient_left_is_hidden_by_the_noise_alone(make_world: MakeWorld) -> None:
    """What a site sends when its last patient was removed: the neighbour of a cohort of one."""
    world = make_world(steps_per_round=1)
    stream = RandomStream.for_simulation(4)
    stream.below(2**62, 1)  # for the views of nobody
    noise_P = world.plan.noise_std * torch.from_numpy(hardened_normal(len(world.start()), stream))
    step_P = 0.05 * noise_P / (world.plan.sampling_rate * DECLARED)
    torch.testing.assert_close(world.train((), seed=4).adapter_P, (world.start() - step_P).float())


@pytest.mark.parametrize(("limit", "views"), [(1, 1), (2, 1), (2, 3), (5, 1)])
def test_at_most_k_images_of_a_patient_each_in_every_view(make_world: MakeWorld, limit: int, views: int) -> None:
    training = {"augmentation": "intensity"} if views > 1 else {}
    world = make_world(images_per_patient=limit, views=views, sampling_rate=1.0, training=training)
    units = world.patients(1, 4)
    seen: set[str] = set()
    for seed in range(40):
        drawn = private_trainer._drawn(units, world.plan, RandomStream.for_simulation(seed))
        for number, unit in enumerate(units):
            of_unit = [sample for sample in drawn if sample.unit == number]
            digests = [sample.item.image_digest for sample in of_unit]
            assert len(set(digests)) == min(limit, len(unit))
            assert all(digests.count(digest) == views for digest in digests)
            assert sum(sample.weight for sample in of_unit) == pytest.approx(1.0)
            assert {sample.item.patient_id for sample in of_unit} == {f"p{number}"}
            seen.update(digests)
        assert [sample.unit for sample in drawn] == sorted(sample.unit for sample in drawn)
    assert seen == {item.image_digest for unit in units for item in unit}


def test_views_of_an_image_differ_and_are_computed_one_by_one(make_world: MakeWorld) -> None:
    world = make_world(
        images_per_patient=1, views=3, sampling_rate=1.0, steps_per_round=1,
        training={"augmentation": "intensity", "batch_size": 7},
    )  # fmt: skip
    batches: list[Tensor] = []
    world.train(world.patients(1), engine=Altered(world.engine(), lambda x, g: batches.append(x) or g))  # type: ignore[func-returns-value]
    (inputs,) = batches
    assert len(inputs) == 3
    assert len({one.numpy().tobytes() for one in inputs}) == 3


@pytest.mark.parametrize("held", ["lora_A", "lora_B"])
def test_tensors_that_the_phase_holds_stay_bit_for_bit(make_world: MakeWorld, held: str) -> None:
    world = make_world(steps_per_round=3, training={"optimizer": "adamw", "weight_decay": 0.5, "learning_rate": 0.1})
    result = world.train(world.patients(*SIZES), engine=world.engine(lambda name: held not in name))
    before, after = (world.model.manifest.unflatten(vector) for vector in (world.start(), result.adapter_P))
    assert len(before) > 2
    for name in before:
        assert torch.equal(before[name], after[name]) == (held in name)


def test_without_trust_nothing_but_the_noise_is_missing(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    noised = make_world(sampling_rate=0.7, steps_per_round=1)
    bare = dataclass_replace(
        noised,
        study=noised.study.replace(
            privacy={**noised.study.privacy.model_dump(), "trust": "none", "noise_multiplier": None}
        ),
    )
    units = noised.patients(*SIZES)
    for seed in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(private_trainer, "add_gaussian", lambda sum_P, **_: sum_P)
            expected = noised.train(units, seed=seed)
        with monkeypatch.context() as patched:
            patched.delattr(private_trainer, "add_gaussian")
            got = bare.train(units, seed=seed)
        assert torch.equal(got.adapter_P, expected.adapter_P)
        assert set(got.facts) <= {"clip_fraction"}
        assert got.facts.get("clip_fraction") == expected.facts.get("clip_fraction")
        assert not torch.equal(noised.train(units, seed=seed).adapter_P, got.adapter_P)


def has_noise_of(adapter_P: Tensor, world: World, noise_std: float) -> bool:
    """Whether (start - after) q N / lr is normal with this standard deviation and the number of steps.

    With more than five hundred elements the sample variance is within 25 % of the true one but for one time in
    ten thousand; a scale of 2/3 or 3/2 is off by a factor of 2.25.
    """
    plan, config = world.plan, world.study.training
    noise_P = (world.start() - adapter_P).double() * plan.sampling_rate * DECLARED / config.learning_rate
    assert len(noise_P) > 500
    variance_ratio = float(noise_P.square().mean()) / (plan.steps_per_round * noise_std**2)
    return abs(variance_ratio - 1) < 0.25 and abs(float(noise_P.mean())) < 5 * noise_std * (4 / len(noise_P)) ** 0.5


@pytest.mark.parametrize("steps", [1, 4])
def test_noise_of_the_right_scale_reaches_the_adapter_and_other_scales_are_told_from_it(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    world = make_world(
        noise_multiplier=1.7, clip_norm=0.3, steps_per_round=steps,
        training={"learning_rate": 1.0, "batch_size": 1},
    )  # fmt: skip
    silent = Altered(world.engine(), lambda _, gradients_BP: torch.zeros_like(gradients_BP))
    units, noise_std = world.patients(*SIZES), 1.7 * 0.3
    for scale, is_right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        with monkeypatch.context() as patched:
            recorded_noise(patched, scale=scale)
            adapter_P = world.train(units, engine=silent, stream=RandomStream.from_system()).adapter_P
        assert has_noise_of(adapter_P, world, noise_std) is is_right


def test_noise_is_the_systems_unless_the_site_was_given_a_seed(
    make_world: MakeWorld, open_sites: Callable[..., Path]
) -> None:
    world = make_world()
    units = world.patients(*SIZES)

    def trained(noise_seed: int | None, scope: str = "federated", round_number: int = 1) -> Tensor:
        open_sites(world.study, noise_seed=noise_seed)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        stream = site_of_partition(0).random_stream(scope, round_number)
        return world.train(units, stream=stream).adapter_P

    assert not torch.equal(trained(None), trained(None))
    assert torch.equal(trained(5), trained(5))
    others = [trained(5), trained(6), trained(5, round_number=2), trained(5, scope="pooled"), trained(None)]
    assert len({other.numpy().tobytes() for other in others}) == len(others)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_patient_whose_gradient_overflows_is_as_good_as_absent(make_world: MakeWorld, bad: float) -> None:
    """A server can choose an adapter at which one patient's gradient overflows: a refusal would name the patient."""
    world = make_world(sampling_rate=1.0, images_per_patient=1, steps_per_round=1)

    def change(images: Tensor, gradients_BP: Tensor) -> Tensor:
        return torch.where((images == target).flatten(1).all(1)[:, None], bad, gradients_BP)

    units = world.patients(1, 1, 1, 1)
    engine = world.engine()
    target = world.model.encode(units[2][0].image_CHW.expand(3, -1, -1)[None])
    overflowing = Altered(engine, change)
    with_patient = world.sum(units, batch_size=2, engine=overflowing)
    without = world.sum([*units[:2], *units[3:]], batch_size=2, engine=overflowing)
    assert (with_patient.num_unusable, without.num_unusable) == (1, 0)
    torch.testing.assert_close(with_patient.sum_P, without.sum_P, rtol=1e-4, atol=1e-9)
    assert world.train(units, engine=overflowing).facts["unusable_fraction"] == 0.25


def test_gradient_that_is_not_finite_stops_training_without_noise_and_names_the_tensor(make_world: MakeWorld) -> None:
    world = make_world(sampling_rate=1.0, trust="none", noise_multiplier=None)
    name = world.model.manifest.tensors[1].name
    element = world.model.manifest.tensors[0].num_elements

    def change(_: Tensor, gradients_BP: Tensor) -> Tensor:
        gradients_BP[-1, element] = float("nan")
        return gradients_BP

    with pytest.raises(PrivacyError, match=rf"NaN or infinity in '{name}'"):
        world.train(world.patients(*SIZES), engine=Altered(world.engine(), change))


def test_phase_that_trains_lora_a_alone_is_checked_although_b_starts_at_zero(make_world: MakeWorld) -> None:
    world = make_world()
    private_trainer._engines.clear()
    world.model.load(world.model.initial_P)
    assert world.engine(lambda name: "lora_A" in name).name == "lora-exact"


def test_self_check_does_not_depend_on_the_adapter_that_an_earlier_round_left(make_world: MakeWorld) -> None:
    world = make_world()
    private_trainer._engines.clear()
    diverged_P = torch.full_like(world.model.initial_P, 1e30)
    world.model.load(diverged_P)
    assert world.engine().name == "lora-exact"
    assert torch.equal(world.model.read(), diverged_P)


def test_facts_are_a_share_and_a_ratio_from_which_nobody_counts_patients(make_world: MakeWorld) -> None:
    """A clip fraction of 0.6923076923 would say that 13 patients, or 26, were drawn."""
    world = make_world(sampling_rate=1.0, steps_per_round=1, clip_norm=0.5)
    units = world.patients(1, 1, 1, 1, 1, 1, 1)
    total = world.sum(units, batch_size=3)
    engine = world.engine()
    # Three of seven are above the clip norm.
    scales = torch.tensor([2.0, 0.5, 2.0, 0.5, 0.5, 2.0, 0.5]) * world.plan.clip_norm
    position = iter(scales.split(3))
    uneven = Altered(engine, lambda _, g: g / g.norm(dim=1, keepdim=True) * next(position)[:, None])
    facts = world.train(units, engine=uneven).facts
    assert total.num_patients == 7
    assert facts["clip_fraction"] == 0.43
    norm = facts["signal_to_noise"] * world.plan.noise_std * engine.num_parameters**0.5
    assert 0 < norm <= 7 * world.plan.clip_norm
    assert facts["signal_to_noise"] == float(f"{facts['signal_to_noise']:.2g}")
