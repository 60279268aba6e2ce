"""How much noise is left: distances beside their definition, and epsilons that are never above the accountants'."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from privacy.accounting import Mechanism, epsilon_spent
from privacy.audit.noise_bound import least_epsilon, noise_bound, total_variation


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (1.0, 0.5), (3.0, 0.1)])
def test_distance_of_one_step_is_the_integral_of_its_densities(noise: float, rate: float) -> None:
    x = np.linspace(-40, 40, 400_001)
    without = norm.pdf(x, scale=noise)
    within = (1 - rate) * without + rate * norm.pdf(x, loc=1.0, scale=noise)
    expected = 0.5 * np.trapezoid(np.abs(within - without), x)
    got = total_variation(Mechanism(noise, rate, 1))
    assert expected - 1e-9 <= got <= expected + 2e-3


@pytest.mark.parametrize("steps", [1, 9])
def test_distance_of_a_gaussian_mechanism_is_exact_and_sampling_comes_near_it(steps: int) -> None:
    mu = math.sqrt(steps) / 2.0
    exact = total_variation(Mechanism(2.0, 1.0, steps))
    assert exact == pytest.approx(2 * norm.cdf(mu / 2) - 1, abs=1e-12)
    assert total_variation(Mechanism(2.0, 0.9999, steps)) == pytest.approx(exact, abs=3e-3)


@pytest.mark.parametrize("mechanism", [Mechanism(1.0, 1.0, 1), Mechanism(1.03, 0.5, 16), Mechanism(0.6, 0.1, 50)])
@pytest.mark.parametrize("delta", [1e-5, 0.004])
def test_epsilon_for_lower_bounds_is_just_below_the_one_that_is_claimed(mechanism: Mechanism, delta: float) -> None:
    claimed = epsilon_spent([mechanism], delta).value
    assert claimed - 0.06 * max(1.0, claimed / 4) < least_epsilon(mechanism, delta) < claimed


def test_no_steps_show_nothing() -> None:
    assert total_variation(Mechanism(1.0, 0.5, 0)) == 0.0
    assert least_epsilon(Mechanism(1.0, 0.5, 0), 0.01) == 0.0


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_search_finds_the_noise_whose_distance_is_refuted(rate: float, factor: float) -> None:
    claimed = Mechanism(1.2, rate, 4)
    limit = total_variation(Mechanism(1.2 * factor, rate, 4))
    found = noise_bound(claimed, lambda distance: distance <= limit, delta=0.01)
    assert found.noise_multiplier == pytest.approx(1.2 * factor, rel=5e-3)
    assert found.epsilon == pytest.approx(least_epsilon(Mechanism(1.2 * factor, rate, 4), 0.01), rel=0.02)
    assert found.epsilon <= least_epsilon(Mechanism(1.2 * factor * 0.999, rate, 4), 0.01)


def test_edges_of_the_search() -> None:
    claimed = Mechanism(1.0, 1.0, 1)
    assert noise_bound(claimed, lambda _: False, delta=0.01).epsilon == 0.0
    assert noise_bound(claimed, lambda _: False, delta=0.01).noise_multiplier is None
    everything = noise_bound(claimed, lambda _: True, delta=0.01)
    assert everything.noise_multiplier == 1 / 8
    assert everything.epsilon > 40
