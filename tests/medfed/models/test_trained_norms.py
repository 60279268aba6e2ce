"""LayerNorms in the adapter: they train and travel as heads do, and the frozen prefix stays frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.data import load_cohort
from client.features import FeatureCache
from client.private_trainer import checked_engine
from medfed.canonical import derive_seed
from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel, _trained_norms, load_adapter
from medfed.models.folding import ModelState
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig
from medfed.tasks import task_of
from strategies.subspace import Subspace

CPU = torch.device("cpu")

MakeStudy = Callable[..., StudyConfig]


@pytest.fixture
def make(make_study: MakeStudy) -> MakeStudy:
    """A classifier's study, with or without norms."""
    plain = make_study(("north",))

    def made(train_norms: bool, targets: str = "last-block", **sections: Any) -> StudyConfig:
        return plain.replace(
            backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
            adapter={"rank": 2, "alpha": 4.0, "targets": targets, "train_norms": train_norms},
            task={"kind": "classification", "targets": {"side": ["left", "right"]}},
            **sections,
        )

    return made


def norms(model: AdaptedModel) -> list[str]:
    return [spec.name for spec in model.manifest.tensors if "norm" in spec.name]


def test_norms_of_the_frozen_prefix_stay_frozen(make: MakeStudy) -> None:
    with_norms, without = AdaptedModel(make(True), CPU), AdaptedModel(make(False), CPU)
    assert len(norms(with_norms)) == 6  # two of the last block and the last of all, scale and shift each
    assert norms(without) == []
    assert with_norms.num_frozen_stages == without.num_frozen_stages == 4
    earlier = AdaptedModel(make(True, r"regex:backbone\.encoder\.layer\.1\.attention\.q_proj"), CPU)
    assert earlier.num_frozen_stages == 2
    assert len(norms(earlier)) == 2 * (3 * 2 + 1)


def test_norms_begin_as_the_backbone_has_them_and_count(make: MakeStudy) -> None:
    image_B3HW = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model, plain = AdaptedModel(make(True), CPU), AdaptedModel(make(False), CPU)
    for one in (model, plain):
        one.train(False)

    def embedded(one: AdaptedModel) -> torch.Tensor:
        with torch.no_grad():
            return one.embed(one.encode(image_B3HW))

    assert torch.equal(embedded(model), embedded(plain))
    shifted = {
        name: tensor + (1.0 if name in norms(model) else 0.0)
        for name, tensor in model.manifest.unflatten(model.initial_P).items()
    }
    model.load(model.manifest.flatten(shifted))
    assert not torch.allclose(embedded(model), embedded(plain))


def test_saved_norms_come_back_through_peft(make: MakeStudy, tmp_path: Path) -> None:
    study = make(True)
    model = AdaptedModel(study, CPU)
    adapter_P = model.initial_P + torch.linspace(0, 1, len(model.initial_P))
    model.save(tmp_path / "adapter", ModelState(adapter_P))
    back = load_adapter(
        tmp_path / "adapter",
        backbone_of(study.backbone).build(study.task, torch.Generator().manual_seed(derive_seed(study.seed, "head"))),
    )
    image_B3HW = torch.randn(1, 3, 28, 28)
    model.load(adapter_P)
    model.train(False)
    with torch.no_grad():
        expected, got = model.embed(model.encode(image_B3HW)), back.get_base_model().resume(image_B3HW, 0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("engine", ["lora-exact", "vmap", "loop"])
def test_engine_passes_its_self_check_with_norms(make: MakeStudy, engine: str) -> None:
    study = make(
        True,
        training={"batch_size": 2, "learning_rate": 0.01},
        privacy={
            "trust": "site",
            "unit": "patient",
            "noise_multiplier": 1.0,
            "delta": 0.01,
            "clip_norm": 1.0,
            "sampling_rate": 0.5,
            "steps_per_round": 2,
            "images_per_patient": 2,
            "evaluation": "exact",
            "engine": engine,
        },
        sites=[make(True).sites[0].model_copy(update={"declared_patients": 3})],
    )
    model = AdaptedModel(study, CPU)
    assert study.sites[0].data is not None
    cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
    made = checked_engine(
        model,
        task_of(study.task),
        study,
        trainable=Subspace.everything(model.manifest),
        example=cohort.train[0],
        features=FeatureCache(),
    )
    assert made.name == engine


def test_model_without_norms_behind_the_first_target_is_refused(make: MakeStudy) -> None:
    study = make(True, r"regex:late")
    bare = torch.nn.ModuleDict(
        {"early": torch.nn.LayerNorm(2), "late": torch.nn.Linear(2, 2), "end": torch.nn.Identity()}
    )
    bare.stages = ("early", "late", "end")
    with pytest.raises(StudyError, match="Expected LayerNorms in stand-in-classifier"):
        _trained_norms(bare, backbone_of(study.backbone), study)
