"""What steps release is read off exactly, canaries are clipped to one clip norm, and the noise is the accounted one."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from client import private_trainer
from client.data import load_cohort
from client.features import FeatureCache
from client.private_trainer import checked_engine
from medfed.models.adapted import adapted_model
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.accounting import epsilon_spent
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.audit.canaries import (
    LENGTH,
    CanaryEngine,
    CanaryFeatures,
    basis_directions,
    canary_units,
    gradients_of,
)
from simulation.audit.findings import game_findings
from simulation.audit.steps import SiteTraining, log_likelihood_ratio
from simulation.audit.whitebox import GameScores, play
from strategies.subspace import Core, Subspace

World = tuple[SiteTraining, Engine, list]


def unknown() -> Callable[[int], RandomStream]:
    """Streams that no attacker knows, the same in every test run."""
    numbers = count()
    return lambda _: RandomStream.for_simulation(0, "unknown", next(numbers))


@pytest.fixture
def make_world(
    make_private_study: Callable[..., StudyConfig], make_cohort: Callable[..., Path]
) -> Callable[..., World]:
    """A site's training on the stand-in segmenter, its engine, and its images."""

    def make(plan: PrivacyPlan | None = None, **privacy: object) -> World:
        study = make_private_study(("north",), **privacy)
        model, task = adapted_model(study, torch.device("cpu")), task_of(study.task)
        items = load_cohort("north", [make_cohort("many", train=4, test=1)], study.task, model.pixels).train
        trainable = Subspace.everything(model.manifest)
        engine = checked_engine(model, task, study, trainable=trainable, example=items[0], features=FeatureCache())
        config = study.training.model_copy(update={"optimizer": "sgd"})
        plan = plan or PrivacyPlan.of_study(study)
        return SiteTraining(model, task, plan, config, trainable, model.initial_P, 3), engine, list(items)

    return make


def shared_plan(**changes: object) -> PrivacyPlan:
    given = {
        "trust": "consortium", "unit": "patient", "clip_norm": 0.5, "sampling_rate": 1.0, "noise_multiplier": 0.5,
        "steps_per_round": 1, "num_rounds": 1, "delta": 0.01, "images_per_patient": 2, "views": 1, "min_honest": 3,
        "num_parameters": 64, "evaluation_noise": None, "num_evaluations": 0,
    }  # fmt: skip
    return PrivacyPlan(**{**given, **changes})


def without_noise(world: World) -> World:
    training, engine, items = world
    return replace(training, plan=replace(training.plan, trust="none", noise_multiplier=0.0)), engine, items


def scores_of(training: SiteTraining, engine: Engine, items: list, *, num_runs: int, seed: int) -> GameScores:
    """Of a game whose noise nobody can recompute, with coins by ``seed``."""
    return play(
        training,
        engine,
        like=items[0],
        num_runs=num_runs,
        streams=unknown(),
        guessed=lambda _: RandomStream.for_simulation(0),
        coins=RandomStream.for_simulation(seed),
    )


@pytest.mark.parametrize("images", [1, 4])
def test_canary_leaves_one_clip_norm_in_its_own_coordinate_whatever_its_length(
    make_world: Callable[..., World], images: int
) -> None:
    training, engine, items = without_noise(
        make_world(sampling_rate=1.0, steps_per_round=3, images_per_patient=images, clip_norm=0.3)
    )
    num_coordinates = training.trainable.manifest.num_elements
    places = [5, 17]
    table = gradients_of(basis_directions(places, num_coordinates), training.trainable, norm=LENGTH * 0.3)
    seen_TZ = training.released(
        canary_units(2, images, items[0])[:1],
        engine=CanaryEngine(engine, table),
        features=CanaryFeatures(FeatureCache(), (1,)),
        streams=lambda _: RandomStream.for_simulation(0),
    )
    expected_TZ = np.zeros((training.plan.total_steps, num_coordinates))
    expected_TZ[:, 5] = 1.0
    np.testing.assert_allclose(seen_TZ, expected_TZ, atol=1e-5)


def test_real_patients_beside_canaries_are_computed_as_without(make_world: Callable[..., World]) -> None:
    training, engine, items = without_noise(make_world(sampling_rate=1.0, steps_per_round=1, clip_norm=0.01))
    training = replace(training, plan=replace(training.plan, num_rounds=1))
    patients = tuple((item,) for item in items)
    features = CanaryFeatures(FeatureCache(), FeatureCache().features_of(items[0], training.model).shape)
    place = 3
    table = gradients_of(
        basis_directions([place], training.trainable.manifest.num_elements), training.trainable, norm=1.0
    )

    def seen(units: tuple, of: Engine) -> np.ndarray:
        return training.released(units, engine=of, features=features, streams=lambda _: RandomStream.for_simulation(0))

    alone, together = (
        seen(patients, engine),
        seen((*patients, *canary_units(1, 2, items[0])), CanaryEngine(engine, table)),
    )
    difference_TZ = together - alone
    assert difference_TZ[0, place] == pytest.approx(1.0, abs=1e-3)
    assert float(np.abs(np.delete(difference_TZ, place, axis=1)).max()) < 1e-3
    assert float(np.linalg.norm(alone)) > 0.5


def test_gradients_have_the_directions_as_coordinates_in_any_subspace(make_world: Callable[..., World]) -> None:
    training, _, _ = make_world()
    manifest = training.model.manifest
    spec = next(spec for spec in manifest.tensors if "lora_B" in spec.name)
    frame = torch.linalg.qr(torch.randn(spec.shape[0], 2, generator=torch.Generator().manual_seed(0))).Q
    subspace = Subspace(manifest, {spec.name: Core(frame)})
    directions = torch.randn(3, subspace.manifest.num_elements, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)
    gradients = gradients_of(directions, subspace, norm=7.0)
    torch.testing.assert_close(subspace.coordinates_of_support(gradients), 7.0 * directions)
    torch.testing.assert_close(gradients.norm(dim=1), torch.full((3,), 7.0))


@pytest.mark.parametrize("trust", ["site", "consortium"])
def test_noise_that_is_seen_is_the_noise_that_is_accounted(make_world: Callable[..., World], trust: str) -> None:
    training, engine, _ = make_world(noise_multiplier=0.5, sampling_rate=1.0, clip_norm=0.5, steps_per_round=1)
    num_coordinates = training.trainable.manifest.num_elements
    plan = replace(training.plan, num_rounds=8)
    if trust == "consortium":
        plan = shared_plan(num_rounds=8, num_parameters=num_coordinates)
    seen_TZ = replace(training, plan=plan).released(
        (), engine=engine, features=FeatureCache(), streams=lambda number: RandomStream.for_simulation(number)
    )
    assert seen_TZ.shape == (8, num_coordinates)
    # Thousands of values: the sample variance is within 10 % but for one time in thousands; 2/3 of the noise is not.
    assert seen_TZ.size > 4000
    ratio = float(np.mean(seen_TZ**2)) / 0.5**2
    assert abs(ratio - 1) < 0.1


def test_shared_noise_is_audited_and_shares_of_a_third_of_the_noise_are_caught(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, engine, items = make_world()
    training = replace(training, plan=shared_plan(num_parameters=training.trainable.manifest.num_elements))

    def exceeding() -> list[str]:
        scores = scores_of(training, engine, items, num_runs=200, seed=3)
        return [finding.attack for finding in game_findings(scores, training.plan, confidence=0.998) if finding.exceeds]

    assert exceeding() == []
    skellam = importlib.import_module("privacy.skellam").add_skellam
    monkeypatch.setattr(
        private_trainer,
        "add_skellam",
        lambda sum_P, *, variance, stream: skellam(sum_P, variance=variance // 9, stream=stream),
    )
    assert exceeding() == ["likelihood"]


def test_steps_without_noise_claim_nothing_and_show_as_much_as_the_runs_allow(make_world: Callable[..., World]) -> None:
    training, engine, items = without_noise(make_world(sampling_rate=1.0, steps_per_round=1))
    scores = scores_of(training, engine, items, num_runs=200, seed=4)
    likelihood = game_findings(scores, training.plan, confidence=0.998)[0]
    assert (likelihood.claimed, likelihood.num_correct) == (math.inf, 200)
    assert likelihood.epsilon > 1.5
    assert not likelihood.exceeds


def test_claim_beside_training_is_that_of_training_though_evaluations_cost_more(
    make_world: Callable[..., World],
) -> None:
    """What noised counts cost would be slack: too little noise in training would have to beat it, too."""
    training, engine, items = make_world(sampling_rate=1.0, steps_per_round=1)
    scores = scores_of(training, engine, items, num_runs=20, seed=4)
    noised = replace(training.plan, evaluation_noise=1.0, num_evaluations=2)
    expected = epsilon_spent([noised.mechanism(noised.num_rounds)], noised.delta).value
    assert expected < noised.epsilon.value
    assert {finding.claimed for finding in game_findings(scores, noised, confidence=0.998)} == {expected}


@pytest.mark.parametrize(("rate", "noise"), [(0.3, 0.8), (1.0, 2.0)])
def test_likelihood_ratio_is_that_of_the_densities(rate: float, noise: float) -> None:
    seen_TM = np.random.default_rng(0).normal(size=(4, 3)) * 2
    within = (1 - rate) * norm.pdf(seen_TM, 0, noise) + rate * norm.pdf(seen_TM, 1, noise)
    expected = np.log(within / norm.pdf(seen_TM, 0, noise)).sum(axis=0)
    np.testing.assert_allclose(
        log_likelihood_ratio(seen_TM, sampling_rate=rate, noise_multiplier=noise), expected, rtol=1e-9
    )


def test_likelihood_ratio_without_noise_orders_by_what_was_seen() -> None:
    seen_TM = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert log_likelihood_ratio(seen_TM, sampling_rate=0.5, noise_multiplier=0.0).tolist() == [0.0, 2.0]
    assert math.isfinite(float(log_likelihood_ratio(np.full((1, 1), -1e6), sampling_rate=0.5, noise_multiplier=1.0)[0]))
