"""A lower bound on epsilon from one run: canaries that a coin put in or left out, and guesses which of them were in.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run" (https://arxiv.org/abs/2305.08846):
if the run is (epsilon, delta)-private with respect to adding or removing one canary, the number of correct guesses is
bounded in probability, however the guesses were made from what the run released. Many correct ones refute the claim.

The bound needs coins that are fair, independent and unknown to whoever guesses. It needs nothing of the canaries
themselves, and the guesser may abstain. How many guesses are made may not depend on how many turn out right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_EPSILON = 64.0
"""Where the search ends: no number of canaries that fits a machine refutes more."""

_TOLERANCE = 1e-6  # of a bound, downwards


@dataclass(frozen=True)
class Guesses:
    """The result of a game of guesses.

    Attributes:
        num_canaries: m, coins that were thrown; >= 1.
        num_guesses: r, canaries that were not abstained from; 0..m.
        num_correct: v, right guesses; 0..r.

    Raises:
        ValueError: if the numbers contradict each other.
    """

    num_canaries: int
    num_guesses: int
    num_correct: int

    def __post_init__(self) -> None:
        if not (self.num_canaries >= 1 and 0 <= self.num_correct <= self.num_guesses <= self.num_canaries):
            raise ValueError(
                "Expected 0 <= num_correct <= num_guesses <= num_canaries and at least one canary, got "
                f"{self.num_correct}, {self.num_guesses}, {self.num_canaries}."
            )


def guess(scores_m: NDArray[np.float64], included_m: NDArray[np.bool_], num_guesses: int) -> Guesses:
    """Guesses "in" for the half with the highest scores, "out" for the half with the lowest; abstains between.

    An odd number gives the extra guess to "in". Ties are broken by the order of the canaries, which says nothing.

    Args:
        scores_m: higher where the canary seems to have been in; finite or infinite, not NaN.
        included_m: the coins; used to count what is right and for nothing else.
        num_guesses: r; fixed before the scores were seen.

    Raises:
        ValueError: if the lengths differ, a score is NaN, or there are fewer canaries than guesses.
    """
    if scores_m.shape != included_m.shape or scores_m.ndim != 1 or np.isnan(scores_m).any():
        raise ValueError(f"Expected one score per coin, none NaN, got {scores_m.shape} and {included_m.shape}.")
    if not 0 <= num_guesses <= len(scores_m):
        raise ValueError(f"Expected 0..{len(scores_m)} guesses, got {num_guesses}.")
    order = np.argsort(scores_m, kind="stable")
    num_out = num_guesses // 2
    out, into = order[:num_out], order[len(order) - (num_guesses - num_out) :]
    num_correct = int((~included_m[out]).sum() + included_m[into].sum())
    return Guesses(len(scores_m), num_guesses, num_correct)


def one_run_p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """The largest probability of so many correct guesses under any (epsilon, delta)-private run.

    With f(v) = P[Binomial(r, e^eps / (1 + e^eps)) >= v] it is at most
    f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i (theorem 5.2 and appendix D of the paper).

    ====================  =====================================
    delta = 0             f(v): exact for randomised response
    no guess, or v = 0    1
    epsilon = infinity    1
    ====================  =====================================

    Args:
        guesses: what was guessed.
        epsilon: the claim, >= 0.
        delta: the claim, in [0, 1].

    Raises:
        ValueError: if the claim is out of range.
    """
    from scipy.stats import binom

    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"Expected epsilon >= 0 and delta in [0, 1], got {epsilon} and {delta}.")
    r, v = guesses.num_guesses, guesses.num_correct
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    p_value = float(binom.sf(v - 1, r, accuracy))
    if delta > 0 and v > 0:
        steps = np.arange(1, v + 1)
        slack = float(np.max((binom.sf(v - steps - 1, r, accuracy) - p_value) / steps))
        p_value += 2 * guesses.num_canaries * delta * slack
    return min(1.0, p_value)


def one_run_epsilon(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute at this confidence: a lower bound; 0 if they refute none.

    Guarantee: if the run is (e, delta)-private, add/remove one canary, the bound exceeds e with probability
    1 - confidence at most. With delta = 0 and all of m guesses right it is log(a / (1 - a)) for
    a = (1 - confidence)^(1/m): no m canaries can ever show more.

    Args:
        guesses: of one number of guesses, fixed beforehand; for the best of several, share the confidence among them.
        delta: of the claim, in [0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence in (0, 1), got {confidence}.")

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(guesses, epsilon=epsilon, delta=delta) <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, LARGEST_EPSILON
    if refuted(high):
        return high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
