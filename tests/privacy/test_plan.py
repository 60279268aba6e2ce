"""The privacy plan: built from consistent numbers only, and everything else follows from them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from medfed.errors import PrivacyError
from medfed.study import StudyConfig
from medfed.study_sections import PrivacyConfig
from privacy import plan as plan_module
from privacy.accounting import Epsilon, Mechanism, epsilon_spent
from privacy.plan import NOISE_STD_INTEGER, PrivacyPlan, calibrated
from privacy.skellam_accounting import SkellamMechanism

USUAL: dict[str, Any] = {
    "trust": "site",
    "unit": "patient",
    "clip_norm": 0.5,
    "sampling_rate": 0.1,
    "noise_multiplier": 1.2,
    "steps_per_round": 20,
    "num_rounds": 10,
    "delta": 1e-5,
    "images_per_patient": 4,
    "views": 2,
    "min_honest": None,
    "num_parameters": None,
    "evaluation_noise": None,
    "num_evaluations": 0,
}

CONFIG: dict[str, Any] = {
    "trust": "site",
    "unit": "patient",
    "noise_multiplier": 1.2,
    "delta": 1e-5,
    "clip_norm": 0.5,
    "sampling_rate": 0.1,
    "steps_per_round": 20,
    "images_per_patient": 4,
    "views": 2,
    "evaluation": "withheld",
}


def plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan(**{**USUAL, **changes})


def config(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig.model_validate({**CONFIG, **changes})


NOTHING_PRIVATE = plan(trust="none", noise_multiplier=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trust": "server"}, "Expected trust 'site', 'consortium' or 'none', got 'server'; choose who is trusted"),
        ({"trust": "consortium"}, "Expected min_honest as an integer >= 1, got None; give a whole number"),
        (
            {"evaluation_noise": 0.0, "num_evaluations": 2},
            "Expected a finite evaluation_noise > 0, got 0.0; counts without noise are not private.",
        ),
        (
            {"evaluation_noise": 4.0},
            "Expected num_evaluations as an integer >= 1, got 0; give a whole number.",
        ),
        (
            {"num_evaluations": 2},
            "Expected evaluation_noise for 2 evaluations, got none; give it.",
        ),
        (
            {"evaluation_noise": 4.0, "num_evaluations": 2, "unit": "record", "images_per_patient": None},
            "Expected evaluation_noise with trust 'site' or 'consortium' and unit 'patient' alone, got 'site' and "
            "'record'; remove it.",
        ),
        (
            {"evaluation_noise": 4.0, "num_evaluations": 2, "trust": "none", "noise_multiplier": 0.0},
            "got 'none' and 'patient'; remove it.",
        ),
        (
            {"min_honest": 3},
            "Expected min_honest and num_parameters with trust 'consortium' alone, got them with 'site'",
        ),
        ({"unit": "image"}, "Expected unit 'patient' or 'record', got 'image'; choose what is hidden"),
        ({"clip_norm": 0.0}, "Expected a finite clip_norm > 0, got 0.0; without a bound no noise is enough"),
        ({"clip_norm": math.inf}, "clip_norm > 0, got inf"),
        ({"clip_norm": math.nan}, "clip_norm > 0, got nan"),
        ({"clip_norm": "1"}, "clip_norm > 0, got '1'"),
        ({"sampling_rate": 0.0}, r"Expected sampling_rate in \(0, 1\], got 0.0; give the probability"),
        ({"sampling_rate": 1.1}, "got 1.1"),
        ({"sampling_rate": math.nan}, "got nan"),
        ({"sampling_rate": True}, "got True"),
        ({"noise_multiplier": -1.2}, "Expected a finite noise_multiplier >= 0, got -1.2; calibrate it from epsilon"),
        ({"noise_multiplier": math.inf}, "noise_multiplier >= 0, got inf"),
        ({"noise_multiplier": math.nan}, "noise_multiplier >= 0, got nan"),
        ({"noise_multiplier": None}, "noise_multiplier >= 0, got None"),
        ({"noise_multiplier": 0.0}, "Expected noise_multiplier > 0 with trust 'site', got 0, which protects nobody"),
        ({"trust": "none"}, "Expected noise_multiplier 0 with trust 'none', got 1.2; remove it, or set trust 'site'"),
        ({"trust": "none", "noise_multiplier": 1e-6}, "Expected noise_multiplier 0 with trust 'none', got 1e-06"),
        ({"delta": 0.0}, r"Expected delta in \(0, 1\), got 0.0"),
        ({"delta": 1.0}, r"Expected delta in \(0, 1\), got 1.0"),
        ({"steps_per_round": 0}, "Expected steps_per_round as an integer >= 1, got 0; give a whole number"),
        ({"steps_per_round": 2.0}, "steps_per_round as an integer >= 1, got 2.0"),
        ({"num_rounds": 0}, "num_rounds as an integer >= 1, got 0"),
        ({"num_rounds": True}, "num_rounds as an integer >= 1, got True"),
        ({"views": 0}, "views as an integer >= 1, got 0"),
        ({"images_per_patient": 0}, "images_per_patient as an integer >= 1, got 0"),
        ({"images_per_patient": None}, "images_per_patient as an integer >= 1, got None"),
        ({"unit": "record"}, "Expected no images_per_patient with unit 'record', got 4; a record is one image"),
    ],
)
def test_an_inconsistent_plan_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        plan(**changes)


def test_a_plan_cannot_be_made_inconsistent() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().noise_multiplier = 0.0  # type: ignore[misc]
    with pytest.raises(PrivacyError, match="noise_multiplier > 0 with trust 'site'"):
        dataclasses.replace(plan(), noise_multiplier=0.0)


def test_nothing_that_changes_the_guarantee_has_a_default() -> None:
    for field in dataclasses.fields(PrivacyPlan):
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING


def test_adjacency_is_stated_and_is_no_choice() -> None:
    assert plan().adjacency == "add-remove"
    assert "adjacency" not in {field.name for field in dataclasses.fields(PrivacyPlan)}


def test_noise_is_the_multiplier_times_the_clip_norm() -> None:
    assert plan().noise_std == pytest.approx(0.6)
    assert NOTHING_PRIVATE.noise_std == 0.0


@pytest.mark.parametrize("noise_multiplier", [1e-6, 0.5, 1.0, 1.5])
def test_any_noise_makes_a_plan_private_and_its_delta_checked(noise_multiplier: float) -> None:
    private = plan(noise_multiplier=noise_multiplier, delta=1e-3)
    assert private.is_private
    with pytest.raises(PrivacyError, match="Expected delta below 1/1000"):
        private.check_cohort(1000)
    assert not NOTHING_PRIVATE.is_private


@pytest.mark.parametrize("rounds", [0, 1, 7, 10])
def test_every_step_of_every_round_is_accounted(rounds: int) -> None:
    assert plan().mechanism(rounds) == Mechanism(noise_multiplier=1.2, sampling_rate=0.1, steps=20 * rounds)


@pytest.mark.parametrize("rounds", [-1, 11, 1.0, True, None])
def test_rounds_outside_the_plan_are_refused(rounds: int) -> None:
    message = f"Expected rounds as an integer from 0 to the plan's 10, got {rounds}; a longer study"
    with pytest.raises(PrivacyError, match=message):
        plan().mechanism(rounds)


def test_epsilon_is_that_of_all_steps_of_the_study() -> None:
    assert plan().total_steps == 200
    assert plan().epsilon == epsilon_spent([Mechanism(1.2, 0.1, 200)], 1e-5)
    assert plan().epsilon == epsilon_spent([plan().mechanism(1)] * 10, 1e-5)
    assert plan(delta=1e-6).epsilon.value > plan().epsilon.value


def test_clip_norm_images_and_views_cost_no_privacy() -> None:
    assert plan(clip_norm=7.0, images_per_patient=1, views=1).epsilon == plan().epsilon


@pytest.mark.parametrize("sampling_rate", [0.1, 1.0])
def test_the_event_says_the_same_to_another_accountant(sampling_rate: float) -> None:
    planned = plan(sampling_rate=sampling_rate, steps_per_round=2)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(planned.event)
    assert accountant.get_epsilon(planned.delta) == pytest.approx(planned.epsilon.pld, abs=1e-3)


def test_without_noise_nothing_is_private() -> None:
    assert plan().is_private
    assert not NOTHING_PRIVATE.is_private
    assert NOTHING_PRIVATE.epsilon == Epsilon(prv=math.inf, pld=math.inf)
    assert NOTHING_PRIVATE.epsilon.value == math.inf
    assert NOTHING_PRIVATE.event == dp_accounting.NonPrivateDpEvent()
    with pytest.raises(PrivacyError, match="steps without noise have no finite epsilon"):
        NOTHING_PRIVATE.mechanism(1)


def test_a_plan_takes_every_number_of_its_study() -> None:
    assert PrivacyPlan.of(config(), 10) == plan()
    assert PrivacyPlan.of(config(unit="record", images_per_patient=None), 10) == plan(
        unit="record", images_per_patient=None
    )
    assert PrivacyPlan.of(config(trust="none", noise_multiplier=None), 10) == NOTHING_PRIVATE


def test_noise_is_calibrated_over_all_rounds() -> None:
    planned = PrivacyPlan.of(config(epsilon=2.0, noise_multiplier=None, steps_per_round=3), 5)
    assert planned.total_steps == 15
    assert 1.98 < planned.epsilon.value <= 2.0
    resolved = config(epsilon=2.0, noise_multiplier=planned.noise_multiplier, steps_per_round=3)
    assert PrivacyPlan.of(resolved, 5) == planned


def test_noise_that_does_not_reach_the_promised_epsilon_is_refused() -> None:
    epsilon = plan().epsilon.value
    assert PrivacyPlan.of(config(epsilon=epsilon), 10) == plan()
    message = (
        rf"Expected epsilon of at most {epsilon - 1e-3:g} at delta 1e-05, got {epsilon:.4f} from noise_multiplier "
        "1.2 over 200 steps; remove noise_multiplier to have it calibrated, or raise epsilon"
    )
    with pytest.raises(PrivacyError, match=message):
        PrivacyPlan.of(config(epsilon=epsilon - 1e-3), 10)
    with pytest.raises(PrivacyError, match="over 220 steps"):
        PrivacyPlan.of(config(epsilon=epsilon), 11)


def test_a_section_without_noise_and_epsilon_is_refused() -> None:
    neither = config().model_copy(update={"noise_multiplier": None})
    with pytest.raises(PrivacyError, match="Expected epsilon or noise_multiplier with trust 'site', got neither"):
        PrivacyPlan.of(neither, 10)


@pytest.mark.parametrize("num_rounds", [0, 2.5])
def test_rounds_are_checked_before_anything_is_calibrated(monkeypatch: pytest.MonkeyPatch, num_rounds: int) -> None:
    monkeypatch.setattr(plan_module, "calibrate_noise", lambda **_: pytest.fail("calibrated"))
    with pytest.raises(PrivacyError, match="num_rounds as an integer >= 1"):
        PrivacyPlan.of(config(epsilon=2.0, noise_multiplier=None), num_rounds)


@pytest.mark.parametrize("num_units", [1, 999])
def test_a_cohort_smaller_than_one_over_delta_is_accepted(num_units: int) -> None:
    plan(delta=1e-3).check_cohort(num_units)


@pytest.mark.parametrize("num_units", [1000, 1001, 10**6])
def test_a_delta_of_one_over_the_cohort_or_more_is_refused(num_units: int) -> None:
    message = rf"Expected delta below 1/{num_units} = .*number of patients in the cohort, got 0.001; lower delta"
    with pytest.raises(PrivacyError, match=message):
        plan(delta=1e-3).check_cohort(num_units)
    with pytest.raises(PrivacyError, match="number of records"):
        plan(delta=1e-3, unit="record", images_per_patient=None).check_cohort(num_units)
    plan(delta=1e-3, trust="none", noise_multiplier=0.0).check_cohort(num_units)


@pytest.mark.parametrize("num_units", [0, -3, 2.0, True])
def test_a_cohort_without_units_is_refused(num_units: int) -> None:
    with pytest.raises(PrivacyError, match="Expected at least one patient in the cohort"):
        plan().check_cohort(num_units)
    with pytest.raises(PrivacyError, match="Expected at least one patient in the cohort"):
        NOTHING_PRIVATE.check_cohort(num_units)


def test_noise_to_signal_is_the_ratio_of_the_norms() -> None:
    num_units, num_parameters = 50, 10_000
    noise_P = np.random.default_rng(0).normal(0, plan().noise_std, num_parameters)
    largest_signal = plan().sampling_rate * num_units * plan().clip_norm
    predicted = plan().noise_to_signal(num_units, num_parameters)
    assert predicted == pytest.approx(24.0)
    assert predicted == pytest.approx(np.linalg.norm(noise_P) / largest_signal, rel=0.03)
    assert NOTHING_PRIVATE.noise_to_signal(num_units, num_parameters) == 0.0
    assert plan().noise_to_signal(1, 1) == pytest.approx(12.0)


@pytest.mark.parametrize(("num_units", "num_parameters"), [(0, 5), (5, 0), (2.0, 5), (5, True)])
def test_noise_to_signal_of_nothing_is_refused(num_units: int, num_parameters: int) -> None:
    with pytest.raises(PrivacyError, match="Expected num_(units|parameters) as an integer >= 1"):
        plan().noise_to_signal(num_units, num_parameters)


def study(**privacy: Any) -> StudyConfig:
    """Two virtual hospitals, two rounds of two steps."""
    sites = [
        {"name": name, "scanner": "reference-3t", "train_patients": 4, "test_patients": 1}
        for name in ("north", "south")
    ]
    return StudyConfig.model_validate(
        {
            "name": "private",
            "seed": 7,
            "backbone": {"name": "lite-medsam", "sha256": "0" * 64},
            "adapter": {"method": "lora", "rank": 4, "alpha": 8.0, "targets": "decoder-qv"},
            "task": {"kind": "segmentation", "classes": ["thalamus"]},
            "training": {"batch_size": 2, "learning_rate": 1e-3, "augmentation": "intensity"},
            "rounds": {"num_rounds": 2},
            "cohort": {"kind": "brain-structures"},
            "sites": sites,
            "privacy": {**CONFIG, "sampling_rate": 0.2, "steps_per_round": 2, **privacy},
        }
    )


def test_a_study_is_resolved_once() -> None:
    asked = study(epsilon=1.5, noise_multiplier=None)
    resolved = calibrated(asked)
    assert resolved.privacy is not None
    assert resolved.privacy.noise_multiplier is not None
    assert resolved == asked.replace(
        privacy=asked.privacy.model_copy(update={"noise_multiplier": resolved.privacy.noise_multiplier})
    )
    assert 1.485 < epsilon_spent([Mechanism(resolved.privacy.noise_multiplier, 0.2, 4)], 1e-5).value <= 1.5
    assert resolved.digest != asked.digest
    assert calibrated(resolved) is resolved


def test_a_study_with_nothing_to_resolve_stays_as_it_is(make_study: Callable[..., StudyConfig]) -> None:
    for settled in (study(), study(trust="none", noise_multiplier=None), make_study()):
        assert calibrated(settled) is settled


def test_a_resolved_study_that_breaks_its_word_is_refused() -> None:
    with pytest.raises(PrivacyError, match="Expected epsilon of at most 0.5"):
        calibrated(study(epsilon=0.5))


SHARED: dict[str, Any] = {"trust": "consortium", "steps_per_round": 1, "min_honest": 3, "num_parameters": 1000}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_round": 2}, "Expected steps_per_round 1 with trust 'consortium', got 2"),
        ({"min_honest": 0}, "Expected min_honest as an integer >= 1, got 0"),
        ({"num_parameters": None}, "Expected num_parameters as an integer >= 1, got None"),
        ({"noise_multiplier": 0.0}, "Expected noise_multiplier > 0 with trust 'consortium', got 0"),
        ({"noise_multiplier": 2.0**17}, "Expected noise_multiplier of at most 65536"),
        ({"noise_multiplier": 3000.0}, "rounding to integers would be most of the sum"),
    ],
)
def test_inconsistent_plan_of_shared_noise_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        plan(**{**SHARED, **changes})


@pytest.mark.parametrize("min_honest", [1, 2, 3, 7])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.1637, 20.0])
def test_shares_of_the_honest_add_up_to_the_noise_that_is_accounted(min_honest: int, noise_multiplier: float) -> None:
    shared = plan(**{**SHARED, "min_honest": min_honest, "noise_multiplier": noise_multiplier})
    mechanism = shared.mechanism(1)
    assert isinstance(mechanism, SkellamMechanism)
    assert min_honest * shared.share_variance >= mechanism.variance >= (noise_multiplier * shared.l2_bound) ** 2
    in_units = shared.noise_std * shared.l2_bound / shared.clip_norm
    assert in_units == pytest.approx(math.sqrt(mechanism.variance / min_honest), rel=1e-6)
    # The next larger range of integers would need more noise than there is.
    assert noise_multiplier * shared.l2_bound <= NOISE_STD_INTEGER < noise_multiplier * (shared.l2_bound + 1)


def test_site_that_shares_with_nobody_adds_all_of_the_noise() -> None:
    shared = plan(**SHARED)
    assert shared.alone.trust == "site"
    assert shared.alone.noise_std == shared.noise_multiplier * shared.clip_norm > shared.noise_std
    assert isinstance(shared.alone.mechanism(1), Mechanism)
    assert plan().alone == plan()


def test_shared_noise_is_calibrated_to_its_epsilon_and_held_to_it() -> None:
    given = config(trust="consortium", epsilon=2.0, noise_multiplier=None, steps_per_round=1)
    planned = PrivacyPlan.of(given, 50, min_honest=3, num_parameters=1000)
    assert 1.99 < planned.epsilon.value <= 2.0
    with pytest.raises(PrivacyError, match="Expected epsilon of at most 2"):
        PrivacyPlan.of(
            config(
                trust="consortium", epsilon=2.0, noise_multiplier=planned.noise_multiplier - 1e-3, steps_per_round=1
            ),
            50,
            min_honest=3,
            num_parameters=1000,
        )


def test_noised_evaluations_add_up_with_shared_noise_and_each_site_adds_all_of_theirs() -> None:
    given = config(
        trust="consortium",
        epsilon=2.0,
        noise_multiplier=None,
        steps_per_round=1,
        evaluation={"noise_multiplier": 8.0},
    )
    planned = PrivacyPlan.of(given, 50, min_honest=3, num_parameters=1000, num_evaluations=4)
    assert planned.evaluations == (Mechanism(8.0, 1.0, 4),)
    assert planned.epsilon == epsilon_spent([planned.mechanism(50), Mechanism(8.0, 1.0, 4)], planned.delta)
    assert 1.99 < planned.epsilon.value <= 2.0
    alone = PrivacyPlan.of(given.model_copy(update={"evaluation": "withheld"}), 50, min_honest=3, num_parameters=1000)
    assert planned.noise_multiplier > alone.noise_multiplier
    assert planned.alone.evaluations == planned.evaluations


def test_event_of_a_plan_with_evaluations_costs_what_the_plan_says() -> None:
    from dp_accounting.pld import PLDAccountant

    noised = plan(evaluation_noise=4.0, num_evaluations=3)
    accountant = PLDAccountant()
    epsilon = accountant.compose(noised.event).get_epsilon(noised.delta)
    assert noised.epsilon.value == pytest.approx(epsilon, abs=0.03)
    assert noised.epsilon.value > plan().epsilon.value
