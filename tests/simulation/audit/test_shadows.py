"""Shadow adapters: they find who trained an overfitted model, and find nobody behind noise."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from client.data import Item
from client.features import FeatureCache
from client.private_trainer import checked_engine
from medfed.models.adapted import adapted_model, resolve
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.audit.blackbox import Training
from simulation.audit.shadows import (
    Population,
    Shadows,
    attacks_in_turn,
    halves,
    scores_of,
    shadow_attack,
    train_shadows,
)
from strategies.subspace import Subspace

PATIENTS, SHADOWS = 40, 16


def patients() -> tuple[Item, ...]:
    """Noise with labels that say nothing: all that can be learnt is learnt by heart. Some labels are rare."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        Item(
            f"patient-{number}",
            "north",
            torch.randn(3, 28, 28, generator=generator),
            {"side": int(torch.rand((), generator=generator) < 0.25)},
            f"{number:064d}",
            "0" * 64,
        )
        for number in range(PATIENTS)
    )


def population() -> Population:
    return Population(patients()[: PATIENTS // 2], patients()[PATIENTS // 2 :], num_newcomers=0)


def training(*, privacy: dict[str, Any] | None = None) -> Training:
    study = StudyConfig.model_validate(
        {
            "name": "shadows",
            "seed": 5,
            "backbone": {"name": "stand-in-classifier", "sha256": "0" * 64},
            "adapter": {"method": "heads"},
            "task": {"kind": "classification", "targets": {"side": ["left", "right"]}},
            "training": {"batch_size": 20, "learning_rate": 0.05, **({} if privacy else {"local_epochs": 15})},
            "rounds": {"num_rounds": 2},
            "sites": [{"name": "north", "data": "nowhere.csv", **({"declared_patients": 20} if privacy else {})}],
            **({"privacy": privacy} if privacy else {}),
        }
    )
    device = torch.device("cpu")
    study = resolve(study, device)
    model, task, features = adapted_model(study, device), task_of(study.task), FeatureCache()
    trainable = Subspace.everything(model.manifest)
    plan = engine = None
    if privacy:
        plan = PrivacyPlan.of_study(study)
        engine = checked_engine(model, task, study, trainable=trainable, example=patients()[0], features=features)
    return Training(
        study, model, task, plan, engine, trainable, features, "north", study.declared_units("north") if plan else None
    )


PRIVATE = {
    "trust": "site",
    "unit": "patient",
    "noise_multiplier": 8.0,
    "delta": 0.01,
    "clip_norm": 0.5,
    "sampling_rate": 0.5,
    "steps_per_round": 8,
    "images_per_patient": 1,
    "evaluation": "exact",
}


@cache
def shadows_of(*, private: bool) -> Shadows:
    return train_shadows(
        training(privacy=PRIVATE if private else None),
        population(),
        num_shadows=SHADOWS,
        coins=RandomStream.for_simulation(0, "coins"),
        noise=iter([RandomStream.for_simulation(0, "noise", number) for number in range(2 * SHADOWS)]).__next__,
    )


def test_overfitted_model_tells_who_trained_it_and_more_than_its_loss_does() -> None:
    loss, ratio = attacks_in_turn(shadows_of(private=False), np.random.default_rng(0))
    assert ratio.auroc >= loss.auroc
    assert ratio.low > 0.6
    assert (ratio.num_members, ratio.num_others) == (SHADOWS * PATIENTS // 2,) * 2


def test_private_model_tells_nothing() -> None:
    loss, ratio = attacks_in_turn(shadows_of(private=True), np.random.default_rng(0))
    for attack in (loss, ratio):
        assert attack.low < 0.5 < attack.high
        assert abs(attack.auroc - 0.5) < 0.1


def test_released_adapter_is_attacked_by_shadows_of_other_halves() -> None:
    site, who, rounds = training(), population(), []
    released = site.state([(item,) for item in who.members], lambda _: RandomStream.from_system(), lambda: None)
    shadows = train_shadows(
        site, who, num_shadows=8, coins=RandomStream.for_simulation(1, "coins"), done=lambda: rounds.append(1)
    )
    found = shadow_attack(
        shadows, who, released_N=scores_of(site, who.items, released), generator=np.random.default_rng(0)
    )
    assert len(rounds) == 8 * 2
    assert (found.num_shadows, found.num_patients, found.num_trained) == (8, PATIENTS, PATIENTS // 2)
    loss, ratio = found.released
    assert (loss.num_members, loss.num_others) == (PATIENTS // 2, PATIENTS // 2)
    assert ratio.auroc >= loss.auroc > 0.5
    assert ratio.low > 0.6


def test_shadows_differ_by_who_trained_them_and_by_order() -> None:
    site, items = training(), patients()
    first, again, reordered = (
        scores_of(site, items, site.state([(item,) for item in items], RandomStream.from_system, lambda: None, draw=n))
        for n in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != reordered).any()


def test_training_begins_without_what_was_trained_before() -> None:
    site, items = training(), patients()[:6]
    before = site.state([(item,) for item in items], RandomStream.from_system, lambda: None)
    site.model.put(ModelState(torch.full_like(site.model.initial_P, 3.0)))
    after = site.state([(item,) for item in items], RandomStream.from_system, lambda: None)
    torch.testing.assert_close(before.adapter_P, after.adapter_P, rtol=0, atol=0)


@pytest.mark.parametrize("patients", [7, 8])
def test_halves_are_halves_and_independent(patients: int) -> None:
    drawn = halves(400, patients, RandomStream.for_simulation(2, "coins"))
    assert (drawn.sum(axis=1) == patients // 2).all()
    share = patients // 2 / patients
    assert np.abs(drawn.mean(axis=0) - share).max() < 4 * np.sqrt(share * (1 - share) / 400)
    agree = (drawn[1:] == drawn[:-1]).mean()
    assert agree == pytest.approx(share**2 + (1 - share) ** 2, abs=0.03)
