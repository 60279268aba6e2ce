"""Accounting: two bounds, both above the truth and close to it; never fewer steps, less noise, or one opinion."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from medfed.errors import PrivacyError
from privacy import accounting
from privacy.accounting import Epsilon, Mechanism, calibrate_noise, epsilon_spent
from privacy.renyi import epsilon_of_renyi

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "epsilon.json").read_text())["rows"]
DELTA = 1e-5
SLACK = 0.015  # PRV reports the upper end of an interval of +-0.01; its share of delta adds the rest


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """The exact epsilon of the Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    loss = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + norm.logcdf(-loss / 2 - epsilon / loss))
        return float(norm.cdf(loss / 2 - epsilon / loss) - tail - delta)

    return float(brentq(excess, 0, 500, xtol=1e-10))


def one_step_epsilon(noise_multiplier: float, sampling_rate: float, delta: float) -> float:
    """Epsilon of a single step in both directions: the hockey-stick divergence by summation over outputs."""
    output, width = np.linspace(-14 * noise_multiplier, 1 + 14 * noise_multiplier, 400_001, retstep=True)
    without = norm.pdf(output, 0, noise_multiplier)
    present = (1 - sampling_rate) * without + sampling_rate * norm.pdf(output, 1, noise_multiplier)

    def excess(epsilon: float) -> float:
        removed = np.maximum(0, present - math.exp(epsilon) * without).sum() * width
        added = np.maximum(0, without - math.exp(epsilon) * present).sum() * width
        return float(max(removed, added) - delta)

    return float(brentq(excess, 0, 100, xtol=1e-10))


def composed_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of removing a unit, by composing the privacy losses of sampled outputs; slow, plain, no bound.

    Losses are put into bins and convolved by one transform on a circle wide enough to hold all of them.
    """
    width, bins = 5e-4, 2**17
    spectrum = np.ones(bins // 2 + 1, dtype=complex)
    for mechanism in mechanisms:
        z, q = mechanism.noise_multiplier, mechanism.sampling_rate
        output = np.linspace(-12 * z, 1 + 12 * z, 1_000_001)
        without, present = norm.pdf(output, 0, z), norm.pdf(output, 1, z)
        present = (1 - q) * without + q * present
        loss_bin = np.log(present / without) / width
        lower = np.floor(loss_bin).astype(int)
        upper_share = loss_bin - lower  # split between two bins, so that the mean loss is kept
        mass = present / present.sum()
        pmf = np.bincount(lower % bins, mass * (1 - upper_share), bins)
        pmf += np.bincount((lower + 1) % bins, mass * upper_share, bins)
        spectrum *= np.fft.rfft(pmf) ** mechanism.steps
    pmf = np.fft.irfft(spectrum, bins)
    loss = width * ((np.arange(bins) + bins // 2) % bins - bins // 2)
    loss, pmf = np.fft.fftshift(loss), np.fft.fftshift(pmf)

    def excess(epsilon: float) -> float:
        above = loss > epsilon
        return float((pmf[above] * -np.expm1(epsilon - loss[above])).sum() - delta)

    return float(brentq(excess, 0, 30, xtol=1e-9))


def assert_close_from_above(epsilon: Epsilon, truth: float) -> None:
    assert truth - 1e-6 <= epsilon.pld <= truth + 0.005
    assert truth - 1e-6 <= epsilon.prv <= truth + SLACK


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['history']}-{row['delta']:g}")
def test_both_accountants_agree_with_the_whole_libraries(row: dict[str, object]) -> None:
    history, delta, prv, pld = row.values()
    epsilon = epsilon_spent([Mechanism(*run) for run in history], delta)  # type: ignore[attr-defined, arg-type]
    assert -1e-6 < epsilon.prv - prv < 5e-4  # type: ignore[operator]
    assert -1e-6 < epsilon.pld - pld < 5e-4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("noise_multiplier", "steps", "delta"), [(1.0, 1, DELTA), (5.0, 60, DELTA), (0.5, 1, 1e-3), (80.0, 1000, 1e-6)]
)
def test_without_sampling_it_is_the_gaussian_mechanism(noise_multiplier: float, steps: int, delta: float) -> None:
    truth = gaussian_epsilon(noise_multiplier, steps, delta)
    assert_close_from_above(epsilon_spent([Mechanism(noise_multiplier, 1.0, steps)], delta), truth)


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_rate", "delta"),
    [(1.0, 0.1, DELTA), (0.6, 0.01, 1e-4), (2.0, 0.9, 1e-6), (0.5, 0.5, 0.01)],
)
def test_one_step_is_the_hockey_stick_divergence(noise_multiplier: float, sampling_rate: float, delta: float) -> None:
    truth = one_step_epsilon(noise_multiplier, sampling_rate, delta)
    assert_close_from_above(epsilon_spent([Mechanism(noise_multiplier, sampling_rate, 1)], delta), truth)


@pytest.mark.parametrize(
    "mechanisms",
    [
        [Mechanism(1.0, 0.1, 200)],
        [Mechanism(3.0, 0.3, 100)],
        [Mechanism(1.0, 0.02, 100), Mechanism(2.0, 0.1, 50), Mechanism(0.9, 0.01, 300)],
        [Mechanism(1.5, 0.2, 40), Mechanism(4.0, 1.0, 5)],
    ],
    ids=["ten rounds", "weak steps", "three settings", "with and without sampling"],
)
def test_compositions_agree_with_a_plain_convolution_of_losses(mechanisms: list[Mechanism]) -> None:
    truth = composed_epsilon(mechanisms, DELTA)
    epsilon = epsilon_spent(mechanisms, DELTA)
    assert truth - 1e-3 <= epsilon.pld <= truth + 0.005
    assert truth - 1e-3 <= epsilon.prv <= truth + SLACK


def test_rounds_compose_to_the_one_shot_value() -> None:
    rounds = [Mechanism(0.8372, 0.1, 20)] * 10
    assert epsilon_spent(rounds, DELTA) == epsilon_spent([Mechanism(0.8372, 0.1, 200)], DELTA)
    assert epsilon_spent(rounds, DELTA).value == pytest.approx(14.13, abs=0.005)


def test_a_history_whose_settings_hardly_differ_composes_like_one_setting() -> None:
    rounds = [Mechanism(1.0 + number * 1e-9, 0.1, 40) for number in range(5)]  # nothing to merge: all are convolved
    one_shot = epsilon_spent([Mechanism(1.0, 0.1, 200)], DELTA).value
    assert epsilon_spent(rounds, DELTA).value == pytest.approx(one_shot, abs=0.02)


HISTORY = [Mechanism(1.2, 0.05, 30), Mechanism(2.0, 0.2, 10), Mechanism(1.2, 0.05, 12), Mechanism(4.0, 1.0, 2)]


@given(st.permutations(HISTORY))
@settings(max_examples=24)
def test_order_and_repetition_do_not_matter(mechanisms: list[Mechanism]) -> None:
    merged = [Mechanism(4, 1, 2), Mechanism(1.2, 0.05, 42), Mechanism(2.0, 0.2, 10)]
    assert epsilon_spent(mechanisms, DELTA) == epsilon_spent(merged, DELTA)


@pytest.mark.parametrize("dropped", range(len(HISTORY)))
def test_every_mechanism_counts(dropped: int) -> None:
    fewer = HISTORY[:dropped] + HISTORY[dropped + 1 :]
    assert epsilon_spent(fewer, DELTA).value < epsilon_spent(HISTORY, DELTA).value - 0.01


noises = st.integers(8, 60).map(lambda tenths: tenths / 10)
rates = st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.999, 1.0])
step_counts = st.integers(1, 60)


@given(noises, rates, step_counts)
@settings(max_examples=12)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta(z: float, q: float, steps: int) -> None:
    def epsilon(z: float = z, q: float = q, steps: int = steps, delta: float = DELTA) -> float:
        return epsilon_spent([Mechanism(z, q, steps)], delta).value

    wiggle = 1e-3  # grids differ between settings
    assert epsilon(steps=2 * steps) >= epsilon() - wiggle
    assert epsilon(q=min(1.0, 1.3 * q)) >= epsilon() - wiggle
    assert epsilon(z=1.2 * z) <= epsilon() + wiggle
    assert epsilon(delta=10 * DELTA) <= epsilon() + wiggle


@pytest.mark.parametrize("sampling_rate", [0.1, 1.0])
def test_two_thirds_of_the_noise_costs_visibly_more(sampling_rate: float) -> None:
    right = epsilon_spent([Mechanism(3.0, sampling_rate, 20)], DELTA).value
    assert epsilon_spent([Mechanism(2.0, sampling_rate, 20)], DELTA).value > 1.4 * right


@pytest.mark.parametrize("mechanism", [Mechanism(4.0, 1.0, 20), Mechanism(1.2, 0.05, 100), Mechanism(5.7971, 0.2, 200)])
def test_renyi_curve_bounds_the_same_steps_from_above(mechanism: Mechanism) -> None:
    of_curve, order = epsilon_of_renyi(mechanism.steps * mechanism.renyi(), DELTA)
    assert 1.02 < of_curve / epsilon_spent([mechanism], DELTA).value < 1.25
    assert order > 2


def test_the_larger_of_two_bounds_counts() -> None:
    assert Epsilon(prv=1.0, pld=2.0).value == 2.0
    assert Epsilon(prv=3.0, pld=2.0).value == 3.0


@pytest.mark.parametrize("mechanisms", [[], [Mechanism(1.0, 0.1, 0)], [Mechanism(1.0, 0.1, 0), Mechanism(2.0, 1.0, 0)]])
def test_nothing_run_is_nothing_spent(mechanisms: list[Mechanism]) -> None:
    assert epsilon_spent(mechanisms, DELTA) == Epsilon(prv=0.0, pld=0.0)


def test_runs_of_no_steps_change_nothing() -> None:
    run = Mechanism(1.0, 0.1, 5)
    assert epsilon_spent([run, Mechanism(0.01, 1.0, 0)], DELTA) == epsilon_spent([run], DELTA)


def test_enormous_noise_costs_no_more_than_the_error_of_the_accountant() -> None:
    epsilon = epsilon_spent([Mechanism(1e6, 0.1, 10)], DELTA)
    assert 0 <= epsilon.value <= accounting.PRV_EPSILON_ERROR + 1e-4


def test_the_same_question_is_answered_from_memory() -> None:
    epsilon_spent([Mechanism(1.0, 0.1, 77)], DELTA)
    start = time.perf_counter()
    for _ in range(100):
        epsilon_spent([Mechanism(1.0, 0.1, 70), Mechanism(1.0, 0.1, 7)], DELTA)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.1, 1), r"Expected a finite noise_multiplier > 0 to account for, got 0.0; steps without noise"),
        ((-1.0, 0.1, 1), "noise_multiplier > 0"),
        ((math.inf, 0.1, 1), "noise_multiplier > 0"),
        ((math.nan, 0.1, 1), "noise_multiplier > 0"),
        (("1", 0.1, 1), "noise_multiplier > 0"),
        ((True, 0.1, 1), "noise_multiplier > 0"),
        ((1.0, 0.0, 1), r"Expected sampling_rate in \(0, 1\], got 0.0; give the probability"),
        ((1.0, 1.0000001, 1), "sampling_rate in"),
        ((1.0, math.nan, 1), "sampling_rate in"),
        ((1.0, None, 1), "sampling_rate in"),
        ((1.0, 0.1, -1), "Expected steps as an integer >= 0, got -1; count every noised step"),
        ((1.0, 0.1, 1.0), "steps as an integer"),
        ((1.0, 0.1, True), "steps as an integer"),
    ],
)
def test_a_mechanism_out_of_range_is_refused(values: tuple[float, float, int], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        Mechanism(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf, "1e-5", True])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    message = r"Expected delta in \(0, 1\), got .*; choose it below 1 / number of units"
    with pytest.raises(PrivacyError, match=message):
        epsilon_spent([Mechanism(1.0, 0.1, 1)], delta)
    with pytest.raises(PrivacyError, match=message):
        calibrate_noise(epsilon=1.0, delta=delta, sampling_rate=0.1, steps=1)


@pytest.mark.parametrize(
    ("mechanism", "delta", "message"),
    [
        (Mechanism(0.02, 0.1, 1), DELTA, "Expected privacy losses up to 700 .* raise noise_multiplier"),
        (Mechanism(1.0, 0.1, 10**6), DELTA, r"got losses up to 1.\d+e\+04 on .* for 1000000 steps"),
        (Mechanism(1e-200, 0.5, 1), DELTA, "got losses up to inf"),
        (Mechanism(1e-200, 1.0, 1), DELTA, "got losses up to inf"),
        (Mechanism(1e200, 0.5, 1), DELTA, "Expected privacy losses up to 700"),
        (Mechanism(1.0, 0.1, 10**9), DELTA, "or lower sampling_rate or the number of steps"),
        (Mechanism(1.0, 0.1, 200), 1e-12, r"Expected delta > .* got 1e-12; below it, float64 rounding would decide"),
        (Mechanism(1.0, 0.1, 200), 5e-324, "Choose a larger delta or fewer steps"),
    ],
)
def test_what_cannot_be_bounded_is_refused_before_memory_or_float64_end(
    mechanism: Mechanism, delta: float, message: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(PrivacyError, match=message):
        epsilon_spent([mechanism], delta)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(("sampling_rate", "steps"), [(1e-4, 1000), (0.2, 200)])  # ruled by a single step; by all
def test_the_grid_holds_the_losses_of_all_steps_and_of_any_one(sampling_rate: float, steps: int) -> None:
    error = DELTA * accounting.PRV_DELTA_ERROR
    one_step = accounting._renyi(0.6, sampling_rate)
    needed_for_all = accounting._epsilon_of_renyi(one_step * steps, error / 4)
    needed_for_one = accounting._epsilon_of_renyi(one_step, error / (8 * steps))
    extent = accounting._extent(((0.6, sampling_rate, steps),), DELTA)
    assert extent == pytest.approx(3 + max(needed_for_all, needed_for_one))


@pytest.mark.parametrize("accountant", ["_prv_epsilon", "_pld_epsilon"])
@pytest.mark.parametrize("wrong", [0.0, 2.0, math.inf, math.nan])
def test_accountants_that_disagree_give_no_answer(
    monkeypatch: pytest.MonkeyPatch, accountant: str, wrong: float
) -> None:
    accounting._epsilon_of_runs.cache_clear()
    right = getattr(accounting, accountant)
    monkeypatch.setattr(accounting, accountant, lambda runs, delta: wrong * right(runs, delta))
    message = r"Expected two accountants to agree to 0.05, got epsilon .* \(PRV\) and .* \(PLD\)"
    with pytest.raises(PrivacyError, match=message):
        epsilon_spent([Mechanism(1.0, 0.1, 3)], DELTA)


def test_overflow_is_no_answer_even_where_the_limits_let_it_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "MAX_PRIVACY_LOSS", math.inf)
    with pytest.raises(PrivacyError, match="Expected the PRV accountant to bound 2 steps .* got overflow"):
        epsilon_spent([Mechanism(0.05, 0.1, 2)], DELTA)


def failing(error: Exception) -> Callable[..., None]:
    def fail(**_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("Cannot compute epsilon"), FloatingPointError("overflow")])
def test_a_failing_accountant_gives_no_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    accounting._epsilon_of_runs.cache_clear()
    monkeypatch.setattr("opacus.accountants.analysis.prv.compose_heterogeneous", failing(error))
    with pytest.raises(PrivacyError, match=f"Expected the PRV accountant to bound 4 steps .*{error}; change"):
        epsilon_spent([Mechanism(1.0, 0.1, 4)], DELTA)


@pytest.mark.parametrize(
    ("epsilon", "sampling_rate", "steps"),
    [(8.0, 0.2, 200), (1.0, 0.5, 20), (0.05, 0.01, 5), (3.0, 1.0, 1)],
)
def test_calibrated_noise_reaches_the_target_and_no_smaller_decimal_does(
    epsilon: float, sampling_rate: float, steps: int
) -> None:
    noise = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=sampling_rate, steps=steps)
    assert noise == round(noise, 4)
    reached = epsilon_spent([Mechanism(noise, sampling_rate, steps)], DELTA).value
    assert 0.99 * epsilon < reached <= epsilon
    assert epsilon_spent([Mechanism(noise - 1e-4, sampling_rate, steps)], DELTA).value > epsilon


def test_calibration_gives_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting._calibrated.cache_clear()
    first = calibrate_noise(epsilon=3, delta=DELTA, sampling_rate=1, steps=1)
    accounting._calibrated.cache_clear()
    assert first == calibrate_noise(epsilon=3.0, delta=DELTA, sampling_rate=1.0, steps=1)
    # Remembered: no accountant is asked again.
    monkeypatch.setattr(accounting, "_pld_epsilon", failing(AssertionError()))
    monkeypatch.setattr(accounting, "epsilon_spent", failing(AssertionError()))
    assert first == calibrate_noise(epsilon=3.0, delta=DELTA, sampling_rate=1.0, steps=1)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 5000))
def test_the_search_finds_the_smallest_fitting_integer(smallest: int, guess: int, stride: int) -> None:
    found = accounting._smallest_that(lambda number: number >= smallest, guess=guess, stride=stride)
    assert found == smallest


@given(st.sets(st.integers(1, 200)), st.integers(1, 200))
def test_the_search_returns_what_fits_even_if_fitting_is_not_monotone(holes: set[int], guess: int) -> None:
    found = accounting._smallest_that(lambda number: number not in holes, guess=guess, stride=1)
    assert found not in holes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.01}, r"Expected a finite epsilon > 0.01, got 0.01; that much is added for the error"),
        ({"epsilon": -1.0}, "epsilon > 0.01, got -1.0"),
        ({"epsilon": math.inf}, "Expected a finite epsilon"),
        ({"epsilon": math.nan}, "Expected a finite epsilon"),
        ({"epsilon": None}, "Expected a finite epsilon"),
        ({"sampling_rate": 0.0}, "Expected sampling_rate in"),
        ({"sampling_rate": 1.5}, "Expected sampling_rate in"),
        ({"steps": 0}, "Expected steps as an integer >= 1, got 0; count every noised step of the study"),
        ({"steps": 2.0}, "Expected steps as an integer >= 1, got 2.0"),
        ({"delta": 1e-14}, "Expected delta > "),
        ({"steps": 10**9}, "Expected privacy losses up to 700"),
    ],
)
def test_calibration_out_of_range_is_refused(arguments: dict[str, float], message: str) -> None:
    usual = {"epsilon": 1.0, "delta": DELTA, "sampling_rate": 0.1, "steps": 10}
    with pytest.raises(PrivacyError, match=message):
        calibrate_noise(**{**usual, **arguments})  # type: ignore[arg-type]


def test_a_target_that_no_noise_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "MAX_NOISE_MULTIPLIER", 2.0)
    message = r"Expected a noise multiplier up to 2 to reach epsilon 0.1, got 2\.\d+ there; raise epsilon or delta"
    with pytest.raises(PrivacyError, match=message):
        calibrate_noise(epsilon=0.1, delta=DELTA, sampling_rate=1.0, steps=1)


def test_mesh_of_the_prv_grid_is_that_of_the_theorem() -> None:
    """Gopi et al. 2021, theorem 5.5: error 0.01 over 200 steps, a thousandth of delta 1e-5 for truncation."""
    assert accounting._prv_mesh(200, 1e-5) == pytest.approx(0.01 / math.sqrt(100 * math.log(12 / 1e-8)), rel=1e-12)


@pytest.mark.parametrize("run", [(1.0, 0.1, 200), (100.0, 0.01, 1_000_000)])
def test_what_rounding_may_take_of_delta_is_a_unit_per_point_and_ten_per_step(run: tuple[float, float, int]) -> None:
    steps = run[2]
    points = 2 * accounting._extent((run,), 1e-7) / accounting._prv_mesh(steps, 1e-7)
    lost = (points + 10 * steps) * 2.0**-52
    assert 1e-7 - accounting._usable_delta((run,), 1e-7) == pytest.approx(lost, rel=1e-3)


def test_delta_of_which_rounding_may_take_more_than_a_tenth_is_refused() -> None:
    runs = ((1.0, 0.1, 200),)
    lost = 1e-9 - accounting._usable_delta(runs, 1e-9)
    assert accounting._usable_delta(runs, 12 * lost) > 0
    for delta in (9 * lost, 2 * lost, lost / 2):
        with pytest.raises(PrivacyError, match="float64 rounding would decide"):
            accounting._usable_delta(runs, delta)
