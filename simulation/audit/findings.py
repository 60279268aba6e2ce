"""From scores to lower bounds on epsilon, each beside the claim that it may refute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.accounting import Mechanism, epsilon_spent
from privacy.audit.game import Errors, errors_at, halved
from privacy.audit.noise_bound import noise_bound
from privacy.audit.one_run import guess, one_run_epsilon
from privacy.plan import PrivacyPlan
from simulation.audit.whitebox import GameScores

ONE_RUN_DELTA = 1e-5
"""At which one run is audited if the study's delta is larger: the bound has a term of canaries times delta, which at
the delta of a cohort of some dozens leaves nothing of it. The claim is computed at the same delta."""

ABSTAINING = (0.1, 0.3)
"""Shares of the canaries that are guessed, the others abstained from; fixed here, before any run."""


@dataclass(frozen=True)
class Finding:
    """One attack's result.

    Attributes:
        attack: its name, see :data:`ATTACKS`.
        epsilon: lower bound.
        claimed: epsilon that is claimed at the same delta; infinite without noise.
        delta: of both.
        confidence: with which the bound holds.
        num_trials: runs, or canaries of one run.
        num_correct: how many of them were guessed right at the threshold that gave the bound, or of those guessed.
        num_guessed: how many were guessed.
    """

    attack: str
    epsilon: float
    claimed: float
    delta: float
    confidence: float
    num_trials: int
    num_guessed: int
    num_correct: int

    @property
    def exceeds(self) -> bool:
        """Whether the claim is refuted."""
        return self.epsilon > self.claimed


def game_findings(scores: GameScores, plan: PrivacyPlan, *, confidence: float) -> list[Finding]:
    """What the three attackers of many runs show; each finding holds with this confidence by itself.

    The likelihood has a threshold that was fixed before the runs; the others choose theirs on the first half.
    """
    likelihood = errors_at(scores.likelihood_N, scores.included_N, 0.0)
    _, by_errors = halved(scores.likelihood_N, scores.included_N, delta=plan.delta, confidence=confidence)
    found = [_of_game("likelihood", likelihood, by_errors, plan, confidence)]
    for name, scores_N in (("repeats", scores.repeats_N), ("replay", scores.replay_N)):
        most_right, by_errors = halved(scores_N, scores.included_N, delta=plan.delta, confidence=confidence)
        found.append(_of_game(name, most_right, by_errors, plan, confidence))
    return found


def _of_game(attack: str, most_right: Errors, by_errors: Errors, plan: PrivacyPlan, confidence: float) -> Finding:
    """The larger of the two bounds of :mod:`privacy.audit.game`, each with half of what the confidence leaves."""
    each = 1 - (1 - confidence) / 2
    epsilon = by_errors.epsilon(delta=plan.delta, confidence=each)
    if plan.is_private:
        claimed = noised_steps(plan)
        of_noise = noise_bound(claimed, lambda distance: most_right.refute(distance, confidence=each), delta=plan.delta)
        epsilon = max(epsilon, of_noise.epsilon)
    return Finding(
        attack,
        epsilon,
        claimed_at(plan, plan.delta),
        plan.delta,
        confidence,
        num_trials=most_right.num_runs,
        num_guessed=most_right.num_runs,
        num_correct=most_right.num_correct,
    )


def one_run_finding(
    attack: str,
    scores_M: NDArray[np.float64],
    included_M: NDArray[np.bool_],
    plan: PrivacyPlan | None,
    *,
    confidence: float,
) -> Finding:
    """What the guesses of one run show, at the best of :data:`ABSTAINING`; without a plan nothing is claimed."""
    delta = ONE_RUN_DELTA if plan is None else min(plan.delta, ONE_RUN_DELTA)
    each = 1 - (1 - confidence) / len(ABSTAINING)
    tried = [guess(scores_M, included_M, max(1, round(share * len(scores_M)))) for share in ABSTAINING]
    epsilon, best = max(
        ((one_run_epsilon(guesses, delta=delta, confidence=each), guesses) for guesses in tried),
        key=lambda pair: (pair[0], pair[1].num_guesses),
    )
    return Finding(
        attack,
        epsilon,
        float("inf") if plan is None else claimed_at(plan, delta),
        delta,
        confidence,
        num_trials=best.num_canaries,
        num_guessed=best.num_guesses,
        num_correct=best.num_correct,
    )


def noised_steps(plan: PrivacyPlan) -> Mechanism:
    """The plan's steps with Gaussian noise; Skellam noise as fine as the plan's is the same to any audit."""
    return Mechanism(plan.noise_multiplier, plan.sampling_rate, plan.total_steps)


def claimed_at(plan: PrivacyPlan, delta: float) -> float:
    """What the plan claims of training, which is what is attacked; infinite without noise. Evaluations cost more."""
    if not plan.is_private:
        return float("inf")
    return epsilon_spent([plan.mechanism(plan.num_rounds)], delta).value
