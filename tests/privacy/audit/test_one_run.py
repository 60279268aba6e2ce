"""The bound of one run: the paper's sum term by term, its numbers, and that it is rarely above the truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from privacy.audit.one_run import LARGEST_EPSILON, Guesses, guess, one_run_epsilon, one_run_p_value


def slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 term by term, every tail of the binomial added up from its definition."""
    accuracy = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * accuracy**k * (1 - accuracy) ** (r - k) for k in range(r + 1)]

    def tail(at_least: int) -> float:
        return math.fsum(mass[max(0, at_least) :])

    slack = max([0.0, *((tail(v - i) - tail(v)) / i for i in range(1, v + 1))])
    return min(1.0, tail(v) + 2 * m * delta * slack)


counts = st.integers(1, 60).flatmap(
    lambda m: st.integers(0, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)


@given(counts=counts, epsilon=st.floats(0, 6), delta=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]))
def test_p_value_is_the_papers_term_by_term(counts: tuple[int, int, int], epsilon: float, delta: float) -> None:
    got = one_run_p_value(Guesses(*counts), epsilon=epsilon, delta=delta)
    assert got == pytest.approx(slow_p_value(*counts, epsilon, delta), rel=1e-9, abs=1e-12)


@given(
    counts=counts,
    delta=st.sampled_from([0.0, 1e-6, 1e-3, 0.05]),
    confidence=st.sampled_from([0.9, 0.95, 0.999]),
)
def test_epsilon_is_where_a_slow_search_ends(counts: tuple[int, int, int], delta: float, confidence: float) -> None:
    epsilon = one_run_epsilon(Guesses(*counts), delta=delta, confidence=confidence)
    refuted = [e for e in np.arange(0, 8, 0.02) if slow_p_value(*counts, float(e), delta) <= 1 - confidence]
    last = max(refuted, default=None)
    if last is None:
        assert epsilon == 0.0
    else:
        assert last <= epsilon <= last + 0.02 + 1e-5


@given(counts=counts, delta=st.sampled_from([0.0, 1e-4]))
def test_bound_grows_with_right_guesses_and_shrinks_with_confidence_delta_and_canaries(
    counts: tuple[int, int, int], delta: float
) -> None:
    m, r, v = counts

    def bound(m: int, v: int, delta: float, confidence: float) -> float:
        return one_run_epsilon(Guesses(m, r, v), delta=delta, confidence=confidence)

    here = bound(m, v, delta, 0.95)
    assert here >= bound(m, max(0, v - 1), delta, 0.95) - 2e-6
    assert here >= bound(m, v, delta, 0.99) - 2e-6
    assert here >= bound(m, v, delta + 1e-3, 0.95) - 2e-6
    assert here >= bound(m + 50, v, delta, 0.95) - 2e-6


@pytest.mark.parametrize("m", [1, 10, 100, 1000, 10_000])
def test_perfect_guesses_give_the_best_bound_that_m_canaries_can(m: int) -> None:
    """P[all right] = a^m for accuracy a = e^eps / (1 + e^eps); for 1000 canaries 5.81 at 95 %."""
    accuracy = 0.05 ** (1 / m)
    expected = max(0.0, math.log(accuracy / (1 - accuracy)))
    assert one_run_epsilon(Guesses(m, m, m), delta=0.0, confidence=0.95) == pytest.approx(expected, abs=2e-6)
    if m == 1000:
        assert expected == pytest.approx(5.809, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_bound_exceeds_the_epsilon_of_randomised_response_as_rarely_as_it_says(epsilon: float) -> None:
    """The tight case: each coin is told truly with probability e^eps / (1 + e^eps)."""
    generator = np.random.default_rng(1)
    accuracy, repetitions, m = 1 / (1 + math.exp(-epsilon)), 1000, 200
    correct = generator.binomial(m, accuracy, size=repetitions)
    bounds = {v: one_run_epsilon(Guesses(m, m, int(v)), delta=0.0, confidence=0.9) for v in set(correct.tolist())}
    exceeded = sum(bounds[int(v)] > epsilon for v in correct)
    assert exceeded <= 0.1 * repetitions + 3 * math.sqrt(0.09 * repetitions)
    assert exceeded >= 0.02 * repetitions, "a bound that is never above says too little"
    assert np.mean([bounds[int(v)] for v in correct]) > 0.6 * epsilon


def test_bound_of_a_gaussian_mechanism_stays_below_its_epsilon() -> None:
    """mu = 1 has epsilon 4.377 at delta 1e-5; the bound with abstention lies between a tenth of it and it."""
    delta, mu, m = 1e-5, 1.0, 1000
    true = 4.377
    assert norm.cdf(mu / 2 - true / mu) - math.exp(true) * norm.cdf(-mu / 2 - true / mu) == pytest.approx(
        delta, rel=0.01
    )
    generator = np.random.default_rng(2)
    bounds = []
    for _ in range(60):
        included_m = generator.random(m) < 0.5
        scores_m = generator.normal(size=m) + mu * included_m
        bounds.append(one_run_epsilon(guess(scores_m, included_m, 100), delta=delta, confidence=0.9))
    assert max(bounds) <= true
    assert np.mean(bounds) > true / 10


def test_guesses_are_in_at_the_top_out_at_the_bottom_and_none_between() -> None:
    scores = np.array([5.0, -1.0, 0.0, 4.0, -2.0, 0.1])
    included = np.array([True, False, True, False, True, False])
    assert guess(scores, included, 4) == Guesses(6, 4, 2)
    assert guess(scores, included, 1) == Guesses(6, 1, 1)
    assert guess(scores, included, 0) == Guesses(6, 0, 0)
    assert guess(np.where(included, np.inf, -np.inf), included, 6) == Guesses(6, 6, 6)


def test_guesses_do_not_depend_on_the_coins() -> None:
    """Equal scores are told apart by their order: half of them are right, on average, whatever the coins."""
    included = np.array([True] * 5 + [False] * 5)
    assert guess(np.zeros(10), included, 10).num_correct == 0
    assert guess(np.zeros(10), ~included, 10).num_correct == 10


@pytest.mark.parametrize(("m", "r", "v"), [(0, 0, 0), (5, 6, 1), (5, 3, 4), (5, 3, -1)])
def test_counts_that_contradict_each_other_are_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(ValueError, match="num_correct"):
        Guesses(m, r, v)


def test_edges_of_the_table() -> None:
    assert one_run_p_value(Guesses(5, 0, 0), epsilon=1.0, delta=0.1) == 1.0
    assert one_run_p_value(Guesses(5, 5, 0), epsilon=1.0, delta=0.1) == 1.0
    assert one_run_p_value(Guesses(5, 5, 5), epsilon=math.inf, delta=0.0) == 1.0
    assert one_run_epsilon(Guesses(5, 5, 2), delta=0.0, confidence=0.9) == 0.0
    assert one_run_epsilon(Guesses(10**9, 10**9, 10**9), delta=0.0, confidence=0.9) < LARGEST_EPSILON
    for bad in ({"epsilon": -1.0, "delta": 0.0}, {"epsilon": 1.0, "delta": 2.0}, {"epsilon": math.nan, "delta": 0.0}):
        with pytest.raises(ValueError):
            one_run_p_value(Guesses(5, 5, 5), **bad)
    with pytest.raises(ValueError):
        one_run_epsilon(Guesses(5, 5, 5), delta=0.0, confidence=1.0)
    with pytest.raises(ValueError):
        guess(np.array([np.nan]), np.array([True]), 1)
    with pytest.raises(ValueError):
        guess(np.array([1.0]), np.array([True]), 2)
