"""Shared noise: its bound lies above the divergence itself, both ways; calibrated noise reaches its target."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from medfed.errors import PrivacyError
from privacy import skellam_accounting
from privacy.accounting import Epsilon, Mechanism, RenyiEpsilon, calibrate_noise, epsilon_spent
from privacy.renyi import ORDERS
from privacy.skellam import skellam_noise
from privacy.skellam_accounting import SkellamMechanism, calibrate_skellam, skellam_divergence

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "skellam_epsilon.json").read_text())
DELTA = 1e-5
USUAL = SkellamMechanism(6.2244, 0.2, 200, 10528, 50_000)


# --- Against the divergence itself, summed up ----------------------------------------------------------------


@cache
def log_noise(variance: int) -> np.ndarray:
    """log P(k) for k from 0 to far beyond every sum here: ratios of Bessel functions by their continued fraction."""
    length = 12_000 + 60 * math.isqrt(variance)
    ratio, log_ratios = 0.0, np.empty(length)
    for k in range(length + 300, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)  # I_k / I_(k-1)
        if k <= length:
            log_ratios[k - 1] = math.log(ratio)
    return np.log(special.ive(0, variance)) + np.concatenate([[0.0], np.cumsum(log_ratios)])


def log_pair(variance: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of noise, and of noise shifted, on the same integers."""
    table = log_noise(variance)
    point = np.arange(shift - len(table) + 1, len(table) - shift)
    return table[np.abs(point)], table[np.abs(point - shift)]


def renyi(log_numerator: np.ndarray, log_denominator: np.ndarray, order: int) -> float | None:
    """Rényi divergence; None where the sum reaches the ends of the table."""
    terms = order * log_numerator - (order - 1) * log_denominator
    largest = terms.max()
    if max(terms[0], terms[-1]) > largest - 40:
        return None
    return float((largest + np.log(np.exp(terms - largest).sum())) / (order - 1))


def bound(order: int, variance: int, l2_bound: int, l1_bound: int) -> float:
    return float(skellam_divergence(np.array(float(order)), variance=variance, l2_bound=l2_bound, l1_bound=l1_bound))


@pytest.mark.parametrize("variance", [1, 2, 3, 10, 30, 100, 1000, 10_000, 2**16, 2**20])
def test_bound_lies_above_the_divergence_and_close_to_it(variance: int) -> None:
    compared = 0
    for shift in (1, 2, 3, 5, 8, 16, 50, 200):
        noise, shifted = log_pair(variance, shift)
        for order in (2, 3, 4, 5, 8, 16, 32, 64, 256, 1024):
            truth = renyi(noise, shifted, order)
            if truth is None:
                continue
            stated = bound(order, variance, shift, shift)
            assert truth <= stated * (1 + 1e-12), (variance, shift, order)
            if order * shift < variance / 50:
                assert stated <= truth * (1 + 4 / variance + (order * shift / variance) ** 2), (variance, shift, order)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("variance", [2, 10, 1000, 2**16])
@pytest.mark.parametrize("shift", [(1, 1), (3, -4), (0, 5), (12, 5)])
def test_bound_lies_above_the_divergence_in_two_dimensions(variance: int, shift: tuple[int, int]) -> None:
    # Noise on different elements is independent, so that divergences add up.
    squared, l1_bound = shift[0] ** 2 + shift[1] ** 2, abs(shift[0]) + abs(shift[1])
    assert l1_bound <= min(math.sqrt(2 * squared), squared)
    for order in (2, 3, 8, 64):
        parts = [renyi(*log_pair(variance, abs(one)), order) for one in shift]
        if None in parts:
            continue
        l2_bound = math.isqrt(squared - 1) + 1  # bounds are integers; the next one up
        assert sum(parts) <= bound(order, variance, l2_bound, l1_bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling_rate", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("variance", "shift"), [(4, 1), (100, 10), (100, 40), (10_000, 50), (2**16, 200)])
def test_sampled_bound_lies_above_both_directions_and_close_to_one(
    sampling_rate: float, variance: int, shift: int
) -> None:
    mechanism = SkellamMechanism(math.sqrt(variance) / shift, sampling_rate, 1, shift, 1)
    assert abs(mechanism.variance - variance) <= 1
    curve = dict(zip(ORDERS, mechanism.renyi(), strict=True))
    noise, shifted = log_pair(mechanism.variance, shift)
    present = np.logaddexp(math.log1p(-sampling_rate) + noise, math.log(sampling_rate) + shifted)
    for order in (2, 3, 4, 8, 16, 32):
        removed, added = renyi(present, noise, order), renyi(noise, present, order)
        assert removed is not None
        assert added is not None
        assert added <= removed * (1 + 1e-9)
        assert removed <= curve[order]
        if variance >= 10_000:
            assert curve[order] <= removed * (1.005 if order <= 8 else 1.05)


def test_wrong_variance_would_be_noticed_by_these_comparisons() -> None:
    truth = renyi(*log_pair(10_000, 50), 8)
    assert truth is not None
    assert bound(8, 22_500, 50, 50) < truth < bound(8, 4444, 50, 50)


# --- What is drawn is what is accounted ----------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 2**17), st.integers(1, 40))
def test_shares_of_the_least_number_of_sites_add_up_to_the_accounted_variance(
    ticks: int, l2_bound: int, num_sites: int
) -> None:
    mechanism = SkellamMechanism(ticks / 10**4, 0.5, 1, l2_bound, 100)
    exact = (mechanism.noise_multiplier * l2_bound) ** 2
    assert exact * (1 - 1e-12) <= mechanism.variance <= exact * (1 + 1e-12) + 1
    together = num_sites * mechanism.share_variance(num_sites)
    assert mechanism.variance <= together < mechanism.variance + num_sites


def test_drawn_shares_have_the_noise_multiplier_of_the_mechanism(stream_of: Callable[..., Any]) -> None:
    mechanism = SkellamMechanism(3.0, 0.5, 1, 1000, 100)
    share = mechanism.share_variance(5)
    total = sum(skellam_noise(50_000, variance=share, stream=stream_of(site)) for site in range(5))
    assert np.std(total) / mechanism.l2_bound == pytest.approx(3.0, rel=0.02)


@given(st.lists(st.integers(-30, 30), min_size=1, max_size=20))
def test_no_vector_has_a_larger_l1_norm_than_its_l2_norm_allows(vector: list[int]) -> None:
    squared = sum(value * value for value in vector)
    if squared:
        l2_bound = math.isqrt(squared - 1) + 1
        assert sum(map(abs, vector)) <= SkellamMechanism(1.0, 1.0, 1, l2_bound, len(vector)).l1_bound


@pytest.fixture
def stream_of() -> Callable[..., Any]:
    from privacy.randomness import RandomStream

    return lambda *context: RandomStream.for_simulation(23, *context)


# --- Epsilon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=str)
def test_epsilon_is_that_of_exact_arithmetic(row: dict[str, Any]) -> None:
    runs = [SkellamMechanism(float(z), float(q), *rest) for z, q, *rest in row["history"]]
    epsilon = epsilon_spent(runs, row["delta"])
    assert row["epsilon"] <= epsilon.value <= row["epsilon"] * (1 + 1e-7)
    assert epsilon.order == row["order"]


def test_epsilon_is_that_of_the_librarys_conversion() -> None:
    composed = 200 * USUAL.renyi()
    assert epsilon_spent([USUAL], DELTA).value == pytest.approx(compute_epsilon(ORDERS, composed, DELTA)[0])


def test_integers_cost_next_to_nothing_beside_real_numbers() -> None:
    curve = Mechanism(4.0, 1.0, 1).renyi()
    costs = []
    for noise_std in (2**16, 2**12, 2**6):
        with_integers = SkellamMechanism(4.0, 1.0, 1, noise_std // 4, 10**6).renyi()
        costs.append(float(np.max(with_integers[: ORDERS.index(64)] / curve[: ORDERS.index(64)] - 1)))
    assert costs == sorted(costs)
    assert 0 < costs[0] < 1e-8
    assert costs[1] < 1e-6
    assert costs[2] < 1e-3


def test_mixed_history_adds_up_the_curves_of_both() -> None:
    gaussian, shared = Mechanism(5.0, 0.2, 100), dataclasses.replace(USUAL, steps=50)
    composed = 100 * gaussian.renyi() + 50 * shared.renyi()
    epsilon = epsilon_spent([gaussian, shared], DELTA)
    assert isinstance(epsilon, RenyiEpsilon)
    assert epsilon.value == pytest.approx(compute_epsilon(ORDERS, composed, DELTA)[0])
    alone = epsilon_spent([gaussian], DELTA)
    assert isinstance(alone, Epsilon)
    assert epsilon.value > max(alone.value, epsilon_spent([shared], DELTA).value)


def test_shared_noise_costs_hardly_more_than_gaussian_noise_by_the_same_curves() -> None:
    gaussian = Mechanism(USUAL.noise_multiplier, USUAL.sampling_rate, USUAL.steps)
    assert np.allclose(USUAL.renyi(), gaussian.renyi(), rtol=1e-4)
    assert (USUAL.renyi() > gaussian.renyi()).all()
    # Rényi accounting is looser than the two accountants of Gaussian noise, never tighter.
    exact = epsilon_spent([gaussian], DELTA).value
    assert exact < epsilon_spent([USUAL], DELTA).value < 1.12 * exact


HISTORY = [
    USUAL,
    Mechanism(3.0, 0.5, 4),
    dataclasses.replace(USUAL, noise_multiplier=5.0, steps=7),
    Mechanism(3, 0.5, 9),
]


@given(st.permutations(HISTORY))
@settings(max_examples=24)
def test_order_and_repetition_do_not_matter(mechanisms: list[Any]) -> None:
    halves = [dataclasses.replace(USUAL, steps=100)] * 2
    assert epsilon_spent(mechanisms, DELTA) == epsilon_spent([Mechanism(3.0, 0.5, 13), *halves, HISTORY[2]], DELTA)


@pytest.mark.parametrize("dropped", range(len(HISTORY)))
def test_every_mechanism_counts(dropped: int) -> None:
    fewer = HISTORY[:dropped] + HISTORY[dropped + 1 :]
    assert epsilon_spent(fewer, DELTA).value < epsilon_spent(HISTORY, DELTA).value - 1e-3


def test_two_thirds_of_the_noise_costs_visibly_more() -> None:
    less = dataclasses.replace(USUAL, noise_multiplier=USUAL.noise_multiplier * 2 / 3)
    assert epsilon_spent([less], DELTA).value > 1.4 * epsilon_spent([USUAL], DELTA).value


def test_runs_of_no_steps_spend_nothing() -> None:
    nothing = dataclasses.replace(USUAL, steps=0)
    assert epsilon_spent([nothing], DELTA) == RenyiEpsilon(value=0.0, order=2)
    assert epsilon_spent([nothing, USUAL], DELTA) == epsilon_spent([USUAL], DELTA)


def test_epsilon_is_never_negative() -> None:
    assert epsilon_spent([SkellamMechanism(1e6, 0.01, 1, 1, 1)], 0.9).value == 0.0


def test_noise_without_a_finite_bound_is_refused() -> None:
    with pytest.raises(PrivacyError, match="Expected Rényi curves to bound 4 steps at delta 1e-05, got inf; raise"):
        epsilon_spent([Mechanism(1e-200, 0.5, 3), dataclasses.replace(USUAL, steps=1)], DELTA)


# --- Calibration ---------------------------------------------------------------------------------------------


def calibrated(**changes: Any) -> SkellamMechanism:
    usual = {"epsilon": 2.0, "delta": DELTA, "sampling_rate": 0.2, "steps": 200, "num_parameters": 50_000}
    return calibrate_skellam(**{**usual, "noise_std_integer": 2**16, **changes})  # type: ignore[arg-type]


def test_calibrated_noise_keeps_its_golden_values() -> None:
    golden = dict(GOLDEN["calibration"])
    for row in golden.pop("rows"):
        noise = calibrated(**golden, **{name: row[name] for name in ("epsilon", "sampling_rate", "steps")})
        assert (noise.noise_multiplier, noise.l2_bound) == (row["noise_multiplier"], row["l2_bound"])


@pytest.mark.parametrize("noise_std_integer", [2**10, 2**14, 50_000, 2**16])
@pytest.mark.parametrize(("epsilon", "sampling_rate", "steps"), [(8.0, 0.2, 200), (1.0, 0.5, 20), (3.0, 1.0, 1)])
def test_calibrated_noise_reaches_the_target_and_no_smaller_decimal_does(
    epsilon: float, sampling_rate: float, steps: int, noise_std_integer: int
) -> None:
    noise = calibrated(epsilon=epsilon, sampling_rate=sampling_rate, steps=steps, noise_std_integer=noise_std_integer)
    ticks = round(noise.noise_multiplier * 10**4)
    assert noise.noise_multiplier == ticks / 10**4
    assert noise.l2_bound == noise_std_integer * 10**4 // ticks
    assert noise.variance <= noise_std_integer**2
    assert noise.variance >= (noise_std_integer * (1 - 1 / noise.l2_bound)) ** 2
    assert 0.99 * epsilon < epsilon_spent([noise], DELTA).value <= epsilon
    less = dataclasses.replace(
        noise, noise_multiplier=(ticks - 1) / 10**4, l2_bound=noise_std_integer * 10**4 // (ticks - 1)
    )
    assert epsilon_spent([less], DELTA).value > epsilon


def test_calibration_beside_other_steps_reaches_the_target_with_them_and_no_smaller_decimal_does() -> None:
    """Evaluations are noised by each site alone: Gaussian steps beside the shared ones."""
    beside = (Mechanism(6.0, 1.0, 5),)
    noise = calibrated(beside=beside)
    assert noise.noise_multiplier > calibrated().noise_multiplier
    assert 0.99 * 2.0 < epsilon_spent([noise, *beside], DELTA).value <= 2.0
    ticks = round(noise.noise_multiplier * 10**4)
    less = dataclasses.replace(noise, noise_multiplier=(ticks - 1) / 10**4, l2_bound=2**16 * 10**4 // (ticks - 1))
    assert epsilon_spent([less, *beside], DELTA).value > 2.0


def test_what_is_beside_may_be_too_much_for_any_noise() -> None:
    with pytest.raises(PrivacyError, match="and what is spent beside it to reach epsilon 2, got .* or noise more what"):
        calibrated(beside=(Mechanism(1.0, 1.0, 5),))


def test_rounds_of_a_calibrated_study_compose_to_its_target() -> None:
    noise = calibrated()
    assert epsilon_spent([dataclasses.replace(noise, steps=1)] * 200, DELTA) == epsilon_spent([noise], DELTA)


def test_coarser_integers_need_more_noise() -> None:
    noises = [calibrated(noise_std_integer=2**bits).noise_multiplier for bits in (3, 4, 16)]
    assert noises == sorted(noises, reverse=True)
    assert noises[0] > noises[-1]


def test_ratio_to_gaussian_noise_is_the_price_of_renyi_accounting() -> None:
    gaussian = calibrate_noise(epsilon=2.0, delta=DELTA, sampling_rate=0.2, steps=200)
    assert 1.06 < calibrated().noise_multiplier / gaussian < 1.09


def test_calibration_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrated(epsilon=3)

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(skellam_accounting, "epsilon_spent", fail)
    assert calibrated(epsilon=3.0) is first


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_search_finds_the_smallest_fitting_integer(smallest: int, more: int) -> None:
    assert skellam_accounting._smallest_up_to(smallest + more, lambda number: number >= smallest) == smallest


# --- Refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 0.0}, "Expected a finite noise_multiplier > 0 to account for, got 0.0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier > 0"),
        ({"sampling_rate": 0.0}, r"Expected sampling_rate in \(0, 1\], got 0.0"),
        ({"sampling_rate": 1.1}, "sampling_rate in"),
        ({"steps": -1}, "Expected steps as an integer >= 0, got -1"),
        ({"l2_bound": 0}, "Expected l2_bound as an integer >= 1, got 0; give a whole number"),
        ({"l2_bound": 10.0}, "Expected l2_bound as an integer >= 1, got 10.0"),
        ({"num_parameters": 0}, "Expected num_parameters as an integer >= 1, got 0"),
        ({"num_parameters": True}, "Expected num_parameters as an integer >= 1, got True"),
    ],
)
def test_a_mechanism_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        dataclasses.replace(USUAL, **changes)


@pytest.mark.parametrize("num_sites", [0, -1, 1.5, True, None])
def test_share_among_no_whole_number_of_sites_is_refused(num_sites: int) -> None:
    with pytest.raises(PrivacyError, match="Expected num_sites as an integer >= 1"):
        USUAL.share_variance(num_sites)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "Expected a finite epsilon > 0, got 0.0"),
        ({"epsilon": math.inf}, "Expected a finite epsilon > 0"),
        ({"epsilon": math.nan}, "Expected a finite epsilon > 0"),
        ({"delta": 0.0}, r"Expected delta in \(0, 1\)"),
        ({"sampling_rate": 0.0}, "Expected sampling_rate in"),
        ({"steps": 0}, "Expected steps as an integer >= 1, got 0"),
        ({"steps": 2.0}, "Expected steps as an integer >= 1, got 2.0"),
        ({"num_parameters": 0}, "Expected num_parameters as an integer >= 1"),
        ({"noise_std_integer": 0}, "Expected noise_std_integer as an integer >= 1, got 0"),
        ({"noise_std_integer": 2.0**16}, "Expected noise_std_integer as an integer >= 1"),
        ({"noise_std_integer": 4}, "Expected noise of standard deviation 4 on integers to reach epsilon 2, got"),
        ({"epsilon": 1e-4}, "even where one unit moves the sum by 1; raise noise_std_integer, epsilon or delta"),
    ],
)
def test_calibration_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        calibrated(**changes)
