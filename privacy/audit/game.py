"""Many independent runs with and without one canary: the plainest audit, and the one with the most power.

Each run throws a coin, trains with or without the canary, and an attacker scores what came out. Two bounds follow,
for any score whatsoever, since runs are independent:

=============  ==========================================================================================
errors         false alarms and misses at one threshold, each below its bound of Clopper and Pearson (1934),
               refute every (epsilon, delta) that would ask for more errors (Nasr et al. 2023, "Tight Auditing of
               Differentially Private Machine Learning", https://arxiv.org/abs/2302.07956)
right guesses  whoever guesses is right with probability (1 + TV) / 2 at most, where TV is the total variation
               distance between runs with and without; more right guesses refute the distance, by an exact binomial
               test, and so the noise (:mod:`privacy.audit.noise_bound`). Sees faults with hundreds of runs
=============  ==========================================================================================

A threshold is either fixed before the runs, or chosen on the first half of them and judged on the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CANDIDATES = 41  # thresholds that are tried on the first half, at quantiles of its scores


@dataclass(frozen=True)
class Errors:
    """An attack's errors at one threshold, as counted.

    Attributes:
        false_alarms: runs without the canary that were taken for runs with it.
        without: runs without the canary.
        misses: runs with the canary that were taken for runs without.
        within: runs with the canary.
    """

    false_alarms: int
    without: int
    misses: int
    within: int

    @property
    def num_runs(self) -> int:
        """Runs that were guessed."""
        return self.without + self.within

    @property
    def num_correct(self) -> int:
        """Runs that were guessed right."""
        return self.num_runs - self.false_alarms - self.misses

    def refute(self, total_variation: float, *, confidence: float) -> bool:
        """Whether so many right guesses have a probability of at most 1 - confidence at this distance.

        The coins must be fair: then a guess is right with probability (1 + total_variation) / 2 at most.
        """
        from scipy.stats import binom

        return bool(binom.sf(self.num_correct - 1, self.num_runs, (1 + total_variation) / 2) <= 1 - confidence)

    def epsilon(self, *, delta: float, confidence: float) -> float:
        """The largest epsilon that the errors refute with nothing assumed; 0 if they refute none.

        (epsilon, delta)-privacy needs 1 - misses <= e^eps false_alarms + delta, and likewise with the errors exchanged
        (Kairouz, Oh and Viswanath 2015). Each error may exceed its bound with half of what the confidence leaves.
        """
        _, alarms = clopper_pearson(self.false_alarms, self.without, confidence=confidence)
        _, misses = clopper_pearson(self.misses, self.within, confidence=confidence)
        bounds = [
            math.log((1 - delta - other) / one)
            for one, other in ((alarms, misses), (misses, alarms))
            if 1 - delta - other > 0
        ]
        return max([0.0, *bounds])


def clopper_pearson(successes: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """The exact two-sided interval of a proportion, each side with half of the rest; (0, 1) without trials.

    Raises:
        ValueError: if the numbers are no proportion, or the confidence is not in (0, 1).
    """
    from scipy.stats import beta

    if not (0 <= successes <= trials and 0 < confidence < 1):
        raise ValueError(f"Expected 0..{trials} successes and a confidence in (0, 1), got {successes}, {confidence}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.isf(tail, successes + 1, trials - successes))
    return low, high


def errors_at(scores_n: NDArray[np.float64], included_n: NDArray[np.bool_], threshold: float) -> Errors:
    """Errors of taking runs with a score above the threshold for runs with the canary.

    Raises:
        ValueError: if there is not one score for each run, or one is NaN.
    """
    if scores_n.ndim != 1 or scores_n.shape != included_n.shape or np.isnan(scores_n).any():
        raise ValueError(f"Expected one score for each run, none NaN, got {scores_n.shape} and {included_n.shape}.")
    alarms = scores_n > threshold
    within = int(included_n.sum())
    return Errors(
        false_alarms=int(alarms[~included_n].sum()),
        without=len(included_n) - within,
        misses=int((~alarms)[included_n].sum()),
        within=within,
    )


def halved(
    scores_n: NDArray[np.float64], included_n: NDArray[np.bool_], *, delta: float, confidence: float
) -> tuple[Errors, Errors]:
    """Errors on the second half of the runs, at two thresholds that suit the first half best.

    Returns:
        At the threshold with the most right guesses; at the one with the largest :meth:`Errors.epsilon`.

    Raises:
        ValueError: as :func:`errors_at`.
    """
    half = len(scores_n) // 2
    first, second = (scores_n[:half], included_n[:half]), (scores_n[half:], included_n[half:])
    candidates = [-math.inf, *np.quantile(first[0], np.linspace(0, 1, _CANDIDATES), method="lower")] if half else [0.0]
    tried = [(errors_at(*first, float(threshold)), float(threshold)) for threshold in candidates]
    most_right = max(tried, key=lambda one: one[0].num_correct)[1]
    largest = max(tried, key=lambda one: one[0].epsilon(delta=delta, confidence=confidence))[1]
    return errors_at(*second, most_right), errors_at(*second, largest)
