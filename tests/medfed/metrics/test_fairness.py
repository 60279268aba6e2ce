import itertools
import math

import numpy as np
import pytest

from medfed.metrics.fairness import MIN_GROUP, demographic_parity_difference, equalised_odds_difference


def _cases(seed, n=90, groups=3):
    generator = np.random.default_rng(seed)
    return generator.random(n) < 0.5, generator.random(n) < 0.4, generator.integers(0, groups, n)


@pytest.mark.parametrize("seed", range(5))
def test_differences_are_those_of_the_obvious_loops(seed):
    predicted, truth, group = _cases(seed)

    def rate(keep):
        return sum(bool(p) for p, k in zip(predicted, keep, strict=True) if k) / sum(keep)

    selected = [rate(group == g) for g in range(3)]
    assert demographic_parity_difference(predicted, group) == pytest.approx(
        max(abs(a - b) for a, b in itertools.combinations(selected, 2))
    )
    odds = [[rate((group == g) & (truth == label)) for g in range(3)] for label in (True, False)]
    expected = max(abs(a - b) for rates in odds for a, b in itertools.combinations(rates, 2))
    assert equalised_odds_difference(predicted, truth, group) == pytest.approx(expected)


def test_perfect_predictions_have_equal_odds_whatever_the_prevalence():
    truth = np.array([True] * 15 + [False] * 5 + [True] * 5 + [False] * 15)
    group = np.repeat([0, 1], 20)
    assert equalised_odds_difference(truth, truth, group) == 0.0
    assert demographic_parity_difference(truth, group) == pytest.approx(0.5)


def test_small_groups_are_not_compared():
    predicted = np.array([True] * 10 + [False] * (MIN_GROUP - 1))
    group = np.array([0] * 10 + [1] * (MIN_GROUP - 1))
    assert math.isnan(demographic_parity_difference(predicted, group))
    assert math.isnan(equalised_odds_difference(predicted, predicted, group))
    assert demographic_parity_difference(np.append(predicted, False), np.append(group, 1)) == 1.0
