"""The likelihood-ratio attack: is this loss rather that of a patient who trained, or of one who did not?

Carlini et al. 2022, "Membership Inference Attacks From First Principles" (LiRA, https://arxiv.org/abs/2112.03570).
Shadow models are trained as the attacked one was, each on patients that a coin chose. For each patient there are then
scores of models that had seen that patient and of models that had not; both are taken to be normal, and the attacked
model's score goes to the likelier of the two. What makes a patient easy or hard for everybody drops out.

Legend: K shadows, N patients.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALLEST_LOSS = 1e-12  # below it the scaled loss is that of this one: a loss of 0 has no finite one
_SMALLEST_VARIANCE = 1e-12  # of scores; where shadows agree to the bit a difference of 1e-6 decides


def scaled(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Losses as log-odds, log(p / (1 - p)) of p = exp(-loss): higher is better, nearly normal (section IV-C).

    ====================  ====================
    loss                  scaled
    ====================  ====================
    0, or below 1e-12     about 27.6
    log 2                 0
    large                 minus the loss
    infinite              minus infinity
    NaN                   ValueError
    ====================  ====================

    Of losses that are no log-likelihood (Dice) it is a monotone scale like any other.

    Raises:
        ValueError: if a loss is negative or NaN.
    """
    if not (losses >= 0).all():
        raise ValueError("Expected losses >= 0, got a negative one or NaN.")
    with np.errstate(over="ignore"):  # log(expm1(x)) is x + log(1 - exp(-x)), which cannot overflow
        clipped = np.maximum(losses, _SMALLEST_LOSS)
        odds: NDArray[np.float64] = -(clipped + np.log(-np.expm1(-clipped)))
    return odds


def log_likelihood_ratios(
    scores_N: NDArray[np.float64], shadow_KN: NDArray[np.float64], included_KN: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """How much likelier each patient's score is of a model that had the patient than of one that had not, (N,).

    Means are each patient's own; the two variances are those of all patients together, as a handful of shadows gives
    no variance of one patient (section VI-C); a mean of n scores adds 1 / n of the variance, being uncertain itself.
    0, which says nothing, for a patient whom all shadows had or none; infinite scores count as very large ones.

    Args:
        scores_N: of the attacked model.
        shadow_KN: of each shadow, the same patients.
        included_KN: who trained which shadow.

    Raises:
        ValueError: if shapes do not fit, a score is NaN, or no patient has two shadows on one side.
    """
    if shadow_KN.shape != included_KN.shape or shadow_KN.shape[1:] != scores_N.shape or scores_N.ndim != 1:
        raise ValueError(
            f"Expected scores (N,), (K, N) and coins (K, N), got {scores_N.shape}, {shadow_KN.shape}, "
            f"{included_KN.shape}."
        )
    if np.isnan(scores_N).any() or np.isnan(shadow_KN).any():
        raise ValueError("Expected scores that are numbers, got NaN.")
    scores_N, shadow_KN = (np.clip(scores, -1e6, 1e6) for scores in (scores_N, shadow_KN))
    within_N = _log_density(scores_N, shadow_KN, included_KN)
    without_N = _log_density(scores_N, shadow_KN, ~included_KN)
    return np.where(np.isnan(within_N) | np.isnan(without_N), 0.0, within_N - without_N)


def _log_density(
    scores_N: NDArray[np.float64], shadow_KN: NDArray[np.float64], chosen_KN: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Of the scores under each patient's normal, but for a constant; NaN for a patient without chosen shadows."""
    count_N = chosen_KN.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_N = np.where(chosen_KN, shadow_KN, 0.0).sum(axis=0) / count_N
    freedom = int(np.maximum(count_N - 1, 0).sum())
    if freedom == 0:
        raise ValueError("Expected a patient with two shadows on each side, got none; train more shadows.")
    squares = float(np.where(chosen_KN, (shadow_KN - np.nan_to_num(mean_N)) ** 2, 0.0).sum())
    variance = max(squares / freedom, _SMALLEST_VARIANCE)
    with np.errstate(divide="ignore"):
        spread_N = variance * (1.0 + 1.0 / count_N)
    density_N: NDArray[np.float64] = -((scores_N - mean_N) ** 2) / (2 * spread_N) - np.log(spread_N) / 2
    return density_N


def each_in_turn(shadow_KN: NDArray[np.float64], included_KN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ratios of each shadow, attacked with all the others, (K, N).

    The coins of one shadow must say nothing of those of another: halves that complement each other would tell.

    Raises:
        ValueError: as :func:`log_likelihood_ratios`.
    """
    others = [np.arange(len(shadow_KN)) != attacked for attacked in range(len(shadow_KN))]
    return np.stack(
        [
            log_likelihood_ratios(shadow_N, shadow_KN[other], included_KN[other])
            for shadow_N, other in zip(shadow_KN, others, strict=True)
        ]
    )


def at_the_shadows_level(scores_N: NDArray[np.float64], shadow_KN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores, moved by one number to the median difference from the shadows' means.

    A model of several sites is better or worse for everybody than the shadows of one; that says nothing of a patient.
    """
    moved: NDArray[np.float64] = scores_N - np.median(scores_N - shadow_KN.mean(axis=0))
    return moved
