"""Local training: repeatable, held tensors hold, wrong adapters are refused."""

from collections.abc import Callable
from dataclasses import replace as dataclass_replace

import pytest
import torch

from client.data import Cohort, load_cohort
from client.features import FeatureCache
from client.trainer import TrainResult, evaluate_locally, train_locally
from medfed.errors import AdapterMismatchError, DivergedError
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import task_of
from strategies.subspace import Subspace, Whole


@pytest.fixture
def cohort(study: StudyConfig, model: AdaptedModel) -> Cohort:
    assert study.sites[0].data is not None
    return load_cohort("north", [study.sites[0].data], study.task, model.pixels)


def run(study: StudyConfig, model: AdaptedModel, cohort: Cohort, *, seed: int = 0, **options: object) -> TrainResult:
    settings: dict = {
        "start_P": model.initial_P,
        "trainable": Subspace.everything(model.manifest),
        "features": FeatureCache(),
        **options,
    }
    return train_locally(
        model,
        task_of(study.task),
        cohort.train,
        study.training,
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )


def test_training_is_fixed_by_its_arguments(study: StudyConfig, model: AdaptedModel, cohort: Cohort) -> None:
    first = run(study, model, cohort)
    run(study, model, cohort, seed=9)  # leaves another adapter in place
    again = run(study, model, cohort)
    assert torch.equal(first.adapter_P, again.adapter_P)
    assert first.loss == again.loss
    assert not torch.equal(first.adapter_P, model.initial_P)


def test_order_of_images_comes_from_the_generator(study: StudyConfig, model: AdaptedModel, cohort: Cohort) -> None:
    assert not torch.equal(run(study, model, cohort, seed=0).adapter_P, run(study, model, cohort, seed=3).adapter_P)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_flat_training_agrees_with_a_plain_torch_loop(make_study: Callable[..., StudyConfig], optimizer: str) -> None:
    """Oracle: separate parameters, torch's own optimiser over all of them, whole images, no cache."""
    training = {
        "local_epochs": 2,
        "batch_size": 2,
        "learning_rate": 0.01,
        "optimizer": optimizer,
        "order": "sequential",
    }
    study = make_study(("north",), training=training)
    model = AdaptedModel(study, torch.device("cpu"))
    assert study.sites[0].data is not None
    cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
    fast = run(study, model, cohort)

    plain = AdaptedModel(study, torch.device("cpu"))
    parameters = [p for p in plain._peft.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data, parameter.grad = parameter.data.clone(), None
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    stepper = make(parameters, lr=0.01, weight_decay=0.0)
    task = task_of(study.task)
    for _ in range(2):
        for start in (0, 2):
            batch = cohort.train[start : start + 2]
            features = torch.stack([i.image_CHW.expand(3, -1, -1) for i in batch])
            embedding = plain.backbone.prefix(features, plain.num_frozen_stages)
            loss = task.losses(plain, embedding, task.collate([i.annotation for i in batch], plain.device)).mean()
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    from peft import get_peft_model_state_dict

    slow = plain.manifest.flatten(get_peft_model_state_dict(plain._peft))
    torch.testing.assert_close(fast.adapter_P, slow, rtol=1e-4, atol=1e-6)


def test_held_tensors_stay_bit_for_bit(make_study: Callable[..., StudyConfig]) -> None:
    training = {"local_epochs": 2, "batch_size": 2, "learning_rate": 0.01, "weight_decay": 0.1}
    study = make_study(("north",), training=training)
    model = adapted_model(study, torch.device("cpu"))
    assert study.sites[0].data is not None
    cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
    start_P = torch.randn(model.manifest.num_elements, generator=torch.Generator().manual_seed(1))
    b_alone = Subspace.of(model.manifest, lambda spec: Whole() if "lora_B" in spec.name else None)
    result = run(study, model, cohort, start_P=start_P, trainable=b_alone)
    before, after = model.manifest.unflatten(start_P), model.manifest.unflatten(result.adapter_P)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_A" in name)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


def test_phase_that_trains_nothing_is_refused(study: StudyConfig, model: AdaptedModel, cohort: Cohort) -> None:
    with pytest.raises(AdapterMismatchError, match="trainable"):
        run(study, model, cohort, trainable=Subspace.of(model.manifest, lambda _: None))


def test_diverged_training_is_refused_with_a_tensor_name(
    make_study: Callable[..., StudyConfig], recwarn: pytest.WarningsRecorder
) -> None:
    training = {"local_epochs": 3, "batch_size": 2, "learning_rate": 1e38, "optimizer": "sgd"}
    study = make_study(("north",), training=training)
    model = adapted_model(study, torch.device("cpu"))
    assert study.sites[0].data is not None
    cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
    with pytest.raises(DivergedError, match="lora"):
        run(study, model, cohort)


def test_augmented_training_differs_and_is_repeatable(make_study: Callable[..., StudyConfig]) -> None:
    training = {"local_epochs": 1, "batch_size": 2, "learning_rate": 0.01, "augmentation": "intensity"}
    study = make_study(("north",), training=training)
    model = adapted_model(study, torch.device("cpu"))
    assert study.sites[0].data is not None
    cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
    cache = FeatureCache()
    first = run(study, model, cohort, features=cache)
    assert not cache._memory, "random images must not be cached"
    assert torch.equal(first.adapter_P, run(study, model, cohort).adapter_P)
    assert not torch.equal(first.adapter_P, run(study, model, cohort, seed=4).adapter_P)


def test_evaluation_does_not_depend_on_the_batch_size(study: StudyConfig, model: AdaptedModel, cohort: Cohort) -> None:
    trained = run(study, model, cohort).adapter_P
    task = task_of(study.task)
    results = [
        evaluate_locally(model, task, cohort.items, state=ModelState(trained), features=FeatureCache(), batch_size=size)
        for size in (1, 2, 5)
    ]
    assert set(results[0]) == {"dice", "dice/near", "dice/far"}
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-5)


def test_batch_without_any_structure_trains_nothing_and_does_not_fail(
    study: StudyConfig, model: AdaptedModel, cohort: Cohort
) -> None:
    import numpy as np

    from medfed.tasks.segmentation import annotate

    empty = dataclass_replace(cohort.train[0], annotation=annotate(np.zeros((64, 64)), 2))
    alone = run(study, model, dataclass_replace(cohort, train=(empty,)))
    assert alone.loss == 0.0
    assert torch.equal(alone.adapter_P, model.initial_P)
    assert not torch.equal(
        run(study, model, dataclass_replace(cohort, train=(empty, *cohort.train))).adapter_P, model.initial_P
    )


def test_metrics_of_a_class_that_never_occurs_are_left_out(
    study: StudyConfig, model: AdaptedModel, cohort: Cohort
) -> None:
    import numpy as np

    from medfed.tasks.segmentation import annotate

    empty = dataclass_replace(cohort.test[0], annotation=annotate(np.zeros((64, 64)), 2))
    metrics = evaluate_locally(
        model, task_of(study.task), [empty], state=ModelState(model.initial_P), features=FeatureCache(), batch_size=1
    )
    assert metrics == {}
