"""What the planner says is what the formulas say, and what a run then sends."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from medfed.errors import PrivacyError, StudyError
from medfed.messages import RECORD_KEY
from medfed.models.adapted import resolve
from medfed.study import StudyConfig
from privacy.accounting import Mechanism, calibrate_noise, epsilon_spent
from privacy.skellam_accounting import calibrate_skellam
from server import study_plan
from server.study_plan import CONSORTIUM_EPSILON, CONSORTIUM_ROUNDS, Traffic, _recommendation, plan_study
from simulation.grid import InProcessGrid
from simulation.harness import simulate

MakeStudy = Callable[..., StudyConfig]
CPU = torch.device("cpu")


def shared(study: StudyConfig, *, secure: dict[str, Any] | None = None, **privacy: Any) -> StudyConfig:
    """The study of five sites with shared noise, c = 1, noise multiplier 2 unless epsilon is given."""
    given = {
        "trust": "consortium",
        "unit": "patient",
        "noise_multiplier": None if "epsilon" in privacy else 2.0,
        "delta": 0.01,
        "clip_norm": 0.5,
        "sampling_rate": 0.5,
        "steps_per_round": 1,
        "images_per_patient": 2,
        "evaluation": "exact",
        **privacy,
    }
    return study.replace(
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        secure_aggregation={"enabled": True, "max_colluding": 1, **(secure or {})},
        privacy={name: value for name, value in given.items() if value is not None},
    )


def with_units(study: StudyConfig, *declared: int) -> StudyConfig:
    sites = zip(study.sites, declared, strict=True)
    return study.replace(sites=[site.model_copy(update={"declared_patients": count}) for site, count in sites])


def test_numbers_of_shared_noise_are_those_computed_by_hand(make_secure_study: MakeStudy) -> None:
    study = resolve(with_units(shared(make_secure_study()), 3, 5, 4, 8, 10), CPU)
    planned = plan_study(study)
    assert planned.quorum is not None
    assert planned.quorum.model_dump() == {
        "max_colluding": 1,
        "threshold": 4,  # floor((5 + 1) / 2) + 1
        "min_sites": 4,
        "min_honest": 3,
        "dropouts": 1,
    }
    own, other = planned.modes
    root_p = math.sqrt(planned.num_parameters)
    assert (own.trust, own.steps, own.rounds, own.min_honest, own.alone) == ("consortium", 2, 2, 3, None)
    assert own.noise_multiplier == 2.0
    assert own.site_noise_std == pytest.approx(2 / math.sqrt(3), rel=1e-6)  # a share, in clip norms
    whole, fewest = own.releases
    assert (whole.num_sites, fewest.num_sites) == (5, 4)
    assert whole.m == pytest.approx(math.sqrt(5 / 3))
    assert fewest.m == pytest.approx(math.sqrt(4 / 3))
    assert whole.noise_std == pytest.approx(2 * math.sqrt(5 / 3))
    assert whole.noise_to_signal == pytest.approx(math.sqrt(5 / 3) * 2 * root_p / (0.5 * 30))
    assert fewest.noise_to_signal == pytest.approx(math.sqrt(4 / 3) * 2 * root_p / (0.5 * (3 + 4 + 5 + 8)))

    assert (other.trust, other.steps, other.min_honest) == ("site", 2, None)
    assert other.epsilon <= own.epsilon < other.epsilon + 0.02  # at the same epsilon, by the tighter accountant
    assert other.noise_multiplier < own.noise_multiplier
    z = other.noise_multiplier
    assert other.site_noise_std == z
    assert other.releases[0].m == pytest.approx(math.sqrt(5))
    assert other.releases[0].noise_std == pytest.approx(z * math.sqrt(5))
    assert other.releases[0].noise_to_signal == pytest.approx(z * math.sqrt(5) * root_p / (0.5 * 30))
    assert other.alone == pytest.approx((z * root_p / (0.5 * 10), z * root_p / (0.5 * 3)))


def test_mean_of_equal_sites_has_the_noise_of_one_over_the_root_of_their_number(make_private_study: MakeStudy) -> None:
    study = make_private_study(("a", "b", "c", "d"))
    for weighting in ("examples", "uniform"):
        own = plan_study(resolve(study.replace(strategy={"weighting": weighting}), CPU)).modes[0]
        assert own.alone is not None
        assert own.alone[0] == own.alone[1]
        assert own.releases[0].noise_to_signal == pytest.approx(own.alone[0] / math.sqrt(4))


def test_uniform_weighting_lets_the_smallest_site_add_most_noise(make_private_study: MakeStudy) -> None:
    study = with_units(make_private_study(), 1, 3).replace(strategy={"weighting": "uniform"})
    planned = plan_study(resolve(study, CPU))
    one = math.sqrt(planned.num_parameters) / 0.5
    assert planned.modes[0].releases[0].noise_to_signal == pytest.approx(math.sqrt(1 + 1 / 9) * one / 2)


def test_noise_is_calibrated_for_both_ways_at_the_epsilon_of_the_study(make_secure_study: MakeStudy) -> None:
    study = resolve(shared(make_secure_study(), epsilon=4.0), CPU)
    planned = plan_study(study)
    own, other = planned.modes
    common = {"epsilon": 4.0, "delta": 0.01, "sampling_rate": 0.5, "steps": 2}
    assert other.noise_multiplier == calibrate_noise(**common)  # type: ignore[arg-type]
    expected = calibrate_skellam(**common, num_parameters=planned.num_parameters, noise_std_integer=2**16)  # type: ignore[arg-type]
    assert own.noise_multiplier == expected.noise_multiplier
    assert max(own.epsilon, other.epsilon) <= 4.0


@pytest.mark.parametrize("trust", ["consortium", "site"])
def test_both_ways_pay_for_the_same_noised_evaluations(make_secure_study: MakeStudy, trust: str) -> None:
    study, noised = make_secure_study(), {"evaluation": {"noise_multiplier": 20.0}}
    secure = {} if trust == "consortium" else {"update_clip_norm": 8.0}
    own, other = plan_study(resolve(shared(study, secure=secure, trust=trust, epsilon=4.0, **noised), CPU)).modes
    exact = plan_study(resolve(shared(study, secure=secure, trust=trust, epsilon=4.0), CPU)).modes
    assert (own.trust, other.trust) == (trust, "site" if trust == "consortium" else "consortium")
    for mode, without in zip((own, other), exact, strict=True):
        assert 3.9 < mode.epsilon <= 4.0
        assert mode.noise_multiplier > without.noise_multiplier


def test_study_of_sites_that_trust_nobody_is_set_beside_shared_noise_with_one_colluding(
    make_private_study: MakeStudy,
) -> None:
    study = resolve(make_private_study(("a", "b", "c", "d")), CPU)
    planned = plan_study(study)
    own, other = planned.modes
    assert planned.quorum is None
    assert own.epsilon == epsilon_spent([Mechanism(1.0, 0.5, 4)], 0.01).value
    assert (own.trust, own.steps, own.rounds) == ("site", 4, 2)
    assert (other.trust, other.steps, other.rounds, other.min_honest) == ("consortium", 4, 4, 2)
    assert [release.num_sites for release in own.releases] == [4]
    assert [release.num_sites for release in other.releases] == [4, 3]


def test_two_sites_cannot_share_noise(make_private_study: MakeStudy) -> None:
    planned = plan_study(resolve(make_private_study(), CPU))
    assert [mode.trust for mode in planned.modes] == ["site"]
    assert planned.recommended == "site"
    assert "3 to 128 sites" in planned.reason


@pytest.mark.parametrize(("rounds", "epsilon", "expected"), [
    (CONSORTIUM_ROUNDS, 8.0, "consortium"),
    (CONSORTIUM_ROUNDS - 1, 8.0, "site"),
    (1, CONSORTIUM_EPSILON, "consortium"),
    (CONSORTIUM_ROUNDS - 1, CONSORTIUM_EPSILON + 1e-6, "site"),
])  # fmt: skip
def test_recommendation_switches_at_fifty_rounds_and_at_epsilon_two(rounds: int, epsilon: float, expected: str) -> None:
    assert _recommendation(epsilon, rounds)[0] == expected


@given(st.integers(1, 10_000), st.floats(0.01, 100), st.integers(0, 1000), st.floats(0, 10))
def test_more_rounds_or_less_epsilon_never_turn_the_advice_to_sites(
    rounds: int, epsilon: float, more: int, less: float
) -> None:
    if _recommendation(epsilon, rounds)[0] == "consortium":
        assert _recommendation(max(0.01, epsilon - less), rounds + more)[0] == "consortium"


def test_recommendation_asks_how_many_rounds_are_possible(make_secure_study: MakeStudy) -> None:
    plain = make_secure_study()
    study = resolve(shared(plain, epsilon=8.0), CPU)
    assert plan_study(study).recommended == "site"
    assert plan_study(study, possible_rounds=200).recommended == "consortium"
    low = resolve(shared(plain, epsilon=1.5), CPU)
    assert plan_study(low).recommended == "consortium"


@pytest.mark.parametrize(("secure", "few"), [
    ({"max_colluding": 1}, False),  # k = 4, h = 3
    ({"max_colluding": 2}, True),  # k = 4, h = 2
    ({"max_colluding": 2, "min_sites": 5}, False),
])  # fmt: skip
def test_two_honest_sites_in_a_sum_are_warned_of(
    make_secure_study: MakeStudy, secure: dict[str, int], few: bool
) -> None:
    planned = plan_study(resolve(shared(make_secure_study(), secure=secure), CPU))
    assert any("only 2 honest sites" in warning for warning in planned.warnings) == few


def test_nothing_is_recommended_where_no_noise_is_added(
    make_secure_study: MakeStudy,
) -> None:
    study = make_secure_study()
    sites = [site.model_copy(update={"declared_patients": None}) for site in study.sites]
    noiseless = shared(study, trust="none", epsilon=None, secure={"update_clip_norm": 8.0}).replace(
        secure_aggregation=None
    )
    masked, plain, unnoised = (
        plan_study(resolve(one, CPU)) for one in (study, study.replace(secure_aggregation=None, sites=sites), noiseless)
    )
    for planned in (masked, plain, unnoised):
        assert (planned.recommended, planned.modes, planned.unit, planned.delta) == (None, (), None, None)
        assert "Not differentially private" in planned.warnings[0]
    assert "sums of updates" in masked.warnings[0]
    assert "each update" in plain.warnings[0]
    assert masked.quorum is not None
    assert masked.quorum.min_honest == masked.quorum.min_sites == 3


def test_study_that_sites_would_refuse_has_no_plan(make_private_study: MakeStudy) -> None:
    with pytest.raises(PrivacyError, match="delta below 1/3"):
        plan_study(resolve(make_private_study(delta=0.4), CPU))


def test_study_that_is_not_resolved_has_no_plan(make_study: MakeStudy) -> None:
    with pytest.raises(StudyError, match="resolved"):
        plan_study(make_study())


def test_study_whose_messages_no_site_would_read_has_no_plan(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolve(make_study(), CPU)
    traffic = plan_study(study).traffic
    largest = max(traffic.round_up, traffic.round_down)
    monkeypatch.setattr(study_plan, "MAX_MESSAGE_BYTES", largest + study_plan._ENVELOPE_BYTES)
    plan_study(study)
    monkeypatch.setattr(study_plan, "MAX_MESSAGE_BYTES", largest + study_plan._ENVELOPE_BYTES - 1)
    with pytest.raises(StudyError, match=f"got a study that needs {largest}; choose a smaller rank"):
        plan_study(study)


def test_noise_too_coarse_for_the_ring_has_no_plan(make_secure_study: MakeStudy) -> None:
    """With so little noise a patient's integers are larger than a site's part of 32 bits."""
    study = resolve(shared(make_secure_study(), noise_multiplier=1e-4), CPU)
    with pytest.raises(PrivacyError, match="room"):
        plan_study(study)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("kind", ["plain", "masked", "shared"])
def test_bytes_are_those_of_a_run(
    make_study: MakeStudy,
    make_secure_study: MakeStudy,
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    study = make_study() if kind == "plain" else make_secure_study(rounds_per_epoch=4)
    if kind == "shared":
        study = shared(study, secure={"rounds_per_epoch": 4}, evaluation="withheld")
    study = study.replace(rounds={"num_rounds": 1})
    planned = plan_study(resolve(study, CPU)).traffic
    down, up = _bytes_by_action(monkeypatch)
    simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    opened = (up.get("query.secure_open", 0), down.get("query.secure_open", 0))
    assert planned.round_up == up["train"] + opened[0]
    assert planned.round_down == down["train"] + opened[1]
    keys = ("query.secure_advertise", "query.secure_setup", "query.secure_accept")
    assert all(kind in up for kind in keys) == (planned.sums_per_keys > 0)
    assert planned == Traffic(
        round_up=planned.round_up,
        round_down=planned.round_down,
        keys_up=sum(up.get(kind, 0) for kind in keys),
        keys_down=sum(down.get(kind, 0) for kind in keys),
        sums_per_keys=0 if kind == "plain" else 4,
    )


def _bytes_by_action(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], dict[str, int]]:
    """Largest content of a message of each kind in a run, headers left out, either way."""
    down: dict[str, int] = {}
    up: dict[str, int] = {}
    original = InProcessGrid.send_and_receive

    def size(message: Message) -> int:
        fields = message.content[RECORD_KEY]
        return sum(len(value) for name, value in fields.items() if name != "header")  # type: ignore[arg-type]

    def record(self: InProcessGrid, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        came = original(self, sent, timeout=timeout)
        for into, found in ((down, sent), (up, came)):
            for message in found:
                kind = message.metadata.message_type
                into[kind] = max(into.get(kind, 0), size(message))
        return came

    monkeypatch.setattr(InProcessGrid, "send_and_receive", record)
    return down, up
