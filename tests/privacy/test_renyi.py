"""Rényi curves: the sampled divergence in both directions, the libraries' curves, and the conversion to epsilon."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from privacy import renyi
from privacy.renyi import ORDERS, epsilon_of_renyi, gaussian_renyi, sampled_renyi

RATES = [1e-4, 0.01, 0.2, 0.5, 0.9, 0.999999, 1.0]


def divergence(numerator: np.ndarray, denominator: np.ndarray, order: int) -> float:
    """Rényi divergence of two distributions on the same points, summed up."""
    terms = order * np.log(numerator) - (order - 1) * np.log(denominator)
    return max(0.0, float(np.logaddexp.reduce(terms) / (order - 1)))


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("sampling_rate", RATES)
def test_gaussian_curve_is_that_of_both_libraries(noise_multiplier: float, sampling_rate: float) -> None:
    curve = gaussian_renyi(noise_multiplier, sampling_rate)
    accountant = RdpAccountant(ORDERS)
    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant.compose(event)
    # Both add 1 to something tiny and take the logarithm, so they lose digits that the curve keeps.
    assert np.allclose(curve, accountant._rdp, rtol=1e-6, atol=1e-13)
    orders = [order for order in ORDERS if order <= 64]
    expected = compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
    assert np.allclose(curve[: len(orders)], expected, rtol=1e-6, atol=1e-13)


@settings(max_examples=200)
@given(
    st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=12),
    st.integers(1, 6),
    st.floats(1e-3, 1.0),
    st.sampled_from([2, 3, 5, 16, 64]),
)
def test_curve_is_the_divergence_of_any_symmetric_noise_and_no_less_than_the_reverse(
    half: list[float], shift: int, sampling_rate: float, order: int
) -> None:
    # Symmetric noise on a circle: every shift has an overlap, and x -> shift - x swaps noise and shifted noise.
    mass = np.array([*half, *half[:0:-1]])
    without = mass / mass.sum()
    present = (1 - sampling_rate) * without + sampling_rate * np.roll(without, shift)
    exact = sampled_renyi(
        lambda orders: np.array([divergence(np.roll(without, shift), without, int(k)) for k in orders]), sampling_rate
    )[ORDERS.index(order)]
    assert exact == pytest.approx(divergence(present, without, order), rel=1e-8, abs=1e-12)
    assert divergence(without, present, order) <= exact + 1e-12


@given(st.floats(0.01, 100.0), st.floats(1e-6, 1 - 1e-6), st.integers(2, 512))
def test_the_step_of_the_proof_that_compares_both_directions(ratio: float, q: float, order: int) -> None:
    u, w = 1 - q + q * ratio, 1 - q + q / ratio
    assert u * w >= 1 - 1e-12
    assert u + ratio * w == pytest.approx(1 + ratio)

    def slope(t: float) -> float:  # s(t) = (t^a - t^(1 - a)) / (t - 1), as a logarithm
        log = math.log(t)
        if abs(log) < 1e-9:
            return math.log(2 * order - 1)
        return (order * log if log > 0 else (1 - order) * log) + math.log(
            -math.expm1(-abs((2 * order - 1) * log)) / abs(t - 1)
        )

    farther, nearer = (u, w) if u >= 1 else (w, u)
    assert slope(farther) >= slope(nearer) - 1e-6


def test_more_sampling_and_higher_orders_cost_more() -> None:
    curves = [gaussian_renyi(2.0, rate) for rate in RATES]
    for less, more in itertools.pairwise(curves):
        assert (less <= more).all()
    for curve in curves:
        assert (np.diff(curve) >= 0).all()


def test_curve_of_no_divergence_is_zero() -> None:
    for rate in RATES:
        assert not sampled_renyi(np.zeros_like, rate).any()


@pytest.mark.parametrize("sampling_rate", RATES)
def test_noise_that_leaves_float64_has_the_limits_of_the_curve(sampling_rate: float) -> None:
    assert np.isinf(gaussian_renyi(1e-200, sampling_rate)).all()
    assert not gaussian_renyi(1e200, sampling_rate).any()


def test_no_digits_are_lost_where_nearly_nothing_is_spent() -> None:
    # The leading term of a weak step: q^2 a / (2 z^2).
    curve = gaussian_renyi(1e4, 1e-4)
    assert np.allclose(curve, 1e-8 * np.array(ORDERS) / (2 * 1e8), rtol=1e-6)


def test_curve_is_kept_and_cannot_be_changed() -> None:
    curve = gaussian_renyi(1.0, 0.5)
    assert curve is gaussian_renyi(1.0, 0.5)
    with pytest.raises(ValueError, match="read-only"):
        curve[0] = 0.0


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize(("noise_multiplier", "sampling_rate", "steps"), [(1.0, 0.2, 50), (8.0, 1.0, 20), (60, 1.0, 1)])
def test_conversion_is_that_of_the_library(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float
) -> None:
    curve = steps * gaussian_renyi(noise_multiplier, sampling_rate)
    assert epsilon_of_renyi(curve, delta) == pytest.approx(compute_epsilon(ORDERS, curve, delta))


def test_nothing_spent_is_next_to_nothing() -> None:
    epsilon, order = epsilon_of_renyi(np.zeros(len(ORDERS)), 1e-5)
    assert 0 < epsilon < 0.004
    assert order == ORDERS[-1]


def test_rounding_is_on_the_safe_side() -> None:
    curve = sampled_renyi(lambda orders: 0.25 * orders, 1.0)
    assert (curve > 0.25 * np.array(ORDERS)).all()
    assert np.allclose(curve, 0.25 * np.array(ORDERS), rtol=2 * renyi.ROUNDING)
