"""Errors of many runs: exact intervals, bounds that hold, and faults that they see."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from privacy.audit.game import Errors, clopper_pearson, errors_at, halved


@given(trials=st.integers(1, 80), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.99]))
def test_interval_is_where_the_binomial_tails_reach_the_level(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    low, high = clopper_pearson(successes, trials, confidence=confidence)
    tail = (1 - confidence) / 2
    assert low <= successes / trials <= high
    if successes:
        assert binom.sf(successes - 1, trials, low) == pytest.approx(tail, rel=1e-6)
    if successes < trials:
        assert binom.cdf(successes, trials, high) == pytest.approx(tail, rel=1e-6)


def test_interval_without_trials_and_of_nonsense() -> None:
    assert clopper_pearson(0, 0, confidence=0.9) == (0.0, 1.0)
    assert clopper_pearson(0, 10, confidence=0.95)[1] == pytest.approx(1 - 0.025**0.1)
    with pytest.raises(ValueError):
        clopper_pearson(3, 2, confidence=0.9)
    with pytest.raises(ValueError):
        clopper_pearson(1, 2, confidence=1.0)


def normal_game(runs: int, mu: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    included = generator.random(runs) < 0.5
    return generator.normal(size=runs) + mu * included, included


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_sound_distance_is_refuted_as_rarely_as_said_and_two_thirds_of_the_noise_nearly_always(mu: float) -> None:
    distance = 2 * norm.cdf(mu / 2) - 1
    refuted = {1.0: 0, 1.5: 0}
    for factor in refuted:
        for seed in range(200):
            scores, included = normal_game(1500, factor * mu, seed)
            errors = errors_at(scores, included, factor * mu / 2)
            refuted[factor] += errors.refute(distance, confidence=0.9)
    assert 5 <= refuted[1.0] <= 20 + 3 * math.sqrt(18)
    assert refuted[1.5] >= 180


def test_epsilon_of_errors_exceeds_the_truth_as_rarely_as_said() -> None:
    """Randomised response of epsilon 1, told by two scores: the tight case."""
    epsilon, above = 1.0, 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        included = generator.random(1000) < 0.5
        truthful = generator.random(1000) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(truthful, included, ~included).astype(float)
        errors = errors_at(scores, included, 0.5)
        bound = errors.epsilon(delta=0.0, confidence=0.9)
        above += bound > epsilon
        assert bound > 0.4
    assert above <= 20 + 3 * math.sqrt(18)


def test_epsilon_of_errors_by_hand() -> None:
    none = Errors(false_alarms=0, without=500, misses=0, within=500)
    upper = clopper_pearson(0, 500, confidence=0.99)[1]
    assert none.epsilon(delta=0.01, confidence=0.99) == pytest.approx(math.log((0.99 - upper) / upper))
    assert none.num_correct == none.num_runs == 1000
    assert Errors(false_alarms=250, without=500, misses=250, within=500).epsilon(delta=0.0, confidence=0.99) == 0.0
    assert Errors(false_alarms=0, without=0, misses=0, within=0).epsilon(delta=0.0, confidence=0.99) == 0.0
    # Few misses among those with the canary count as much as few false alarms among those without.
    one = Errors(false_alarms=0, without=500, misses=400, within=500)
    other = Errors(false_alarms=400, without=500, misses=0, within=500)
    assert one.epsilon(delta=0.0, confidence=0.9) == other.epsilon(delta=0.0, confidence=0.9) > 3


def test_threshold_of_the_first_half_is_judged_on_the_second() -> None:
    """A score that tells everything about the first half and nothing about the second shows nothing."""
    generator = np.random.default_rng(3)
    included = generator.random(1000) < 0.5
    scores = generator.normal(size=1000)
    scores[:500] = included[:500] * 10.0
    most_right, largest = halved(scores, included, delta=0.0, confidence=0.95)
    assert most_right.num_runs == 500
    assert largest.epsilon(delta=0.0, confidence=0.95) == 0.0
    assert abs(most_right.num_correct / 500 - 0.5) < 0.1


def test_halves_find_a_score_of_any_scale() -> None:
    scores, included = normal_game(1000, 3.0, seed=4)
    most_right, largest = halved(1e-6 * scores - 5, included, delta=0.0, confidence=0.95)
    assert most_right.num_correct / most_right.num_runs > 0.88
    assert largest.epsilon(delta=0.0, confidence=0.95) > 1.5


def test_scores_that_are_none_are_refused() -> None:
    for scores, included in ((np.array([np.nan]), np.array([True])), (np.zeros(2), np.array([True]))):
        with pytest.raises(ValueError, match="one score"):
            errors_at(scores, included, 0.0)
    assert halved(np.zeros(0), np.zeros(0, dtype=bool), delta=0.0, confidence=0.9)[0].num_runs == 0
