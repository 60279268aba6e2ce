"""Metrics of a score that should be higher for one class: areas under curves, and one chosen point of a curve.

Weighted as scikit-learn weighs by ``sample_weight``, for many rows of weights at once: two thousand resamples cost
one sort. The tests hold each to scikit-learn's answer.

=========================== ==================================================
one class only (in a row)   NaN: there is nothing to tell apart
equal scores                count as half a win (area under the ROC curve), or as one threshold
a NaN score                 MedfedError
no cases                    NaN
=========================== ==================================================

Legend: R rows of weights, N cases, G groups of equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import MedfedError
from medfed.metrics.resampling import Values, Weights


@dataclass(frozen=True)
class _Curve:
    """Weight at and above each threshold, thresholds falling: [R, G]."""

    true_positive_RG: NDArray[np.float64]
    false_positive_RG: NDArray[np.float64]

    @property
    def positives(self) -> NDArray[np.float64]:
        return self.true_positive_RG[:, -1:]

    @property
    def negatives(self) -> NDArray[np.float64]:
        return self.false_positive_RG[:, -1:]


def area_under_roc(score_N: NDArray[np.float64], positive_N: NDArray[np.bool_], weight_RN: Weights) -> Values:
    """Probability that a positive case scores above a negative one, ties counting half; [R], in [0, 1]."""
    curve = _curve(score_N, positive_N, weight_RN)
    if curve is None:
        return np.full(len(weight_RN), np.nan)
    true_RG, false_RG = curve.true_positive_RG, curve.false_positive_RG
    new_false_RG = np.diff(false_RG, axis=1, prepend=0.0)
    new_true_RG = np.diff(true_RG, axis=1, prepend=0.0)
    wins_R = (new_false_RG * (true_RG - new_true_RG / 2)).sum(axis=1)
    return _ratio(wins_R, (curve.positives * curve.negatives)[:, 0])


def average_precision(score_N: NDArray[np.float64], positive_N: NDArray[np.bool_], weight_RN: Weights) -> Values:
    """Area under precision over recall as a step function (no interpolation); [R], in (0, 1].

    Chance is the prevalence. NaN without a positive case; without a negative one it is 1, which says nothing, so
    that is NaN as well.
    """
    curve = _curve(score_N, positive_N, weight_RN)
    if curve is None:
        return np.full(len(weight_RN), np.nan)
    true_RG, false_RG = curve.true_positive_RG, curve.false_positive_RG
    precision_RG = np.divide(true_RG, true_RG + false_RG, out=np.zeros_like(true_RG), where=true_RG + false_RG > 0)
    gained_R = (np.diff(true_RG, axis=1, prepend=0.0) * precision_RG).sum(axis=1)
    has_negative_R = curve.negatives[:, 0] > 0
    return np.where(has_negative_R, _ratio(gained_R, curve.positives[:, 0]), np.nan)


def sensitivity_at_specificity(
    score_N: NDArray[np.float64], positive_N: NDArray[np.bool_], weight_RN: Weights, *, specificity: float
) -> Values:
    """Highest sensitivity of any threshold whose specificity is at least ``specificity``; [R], in [0, 1].

    The threshold is chosen on the very cases it is judged on, so this is what the score could do, not what a
    threshold fixed beforehand will do. Calling no case positive has specificity 1, so 0 is always reached.

    Raises:
        MedfedError: if ``specificity`` is outside (0, 1].
    """
    if not 0.0 < specificity <= 1.0:
        raise MedfedError(f"Expected a specificity in (0, 1], got {specificity}; give it as a fraction.")
    curve = _curve(score_N, positive_N, weight_RN)
    if curve is None:
        return np.full(len(weight_RN), np.nan)
    most_false_R1 = (1.0 - specificity) * curve.negatives + 1e-9  # of weights that are whole numbers
    allowed_RG = curve.false_positive_RG <= most_false_R1
    best_R = np.where(allowed_RG, curve.true_positive_RG, 0.0).max(axis=1)
    has_negative_R = curve.negatives[:, 0] > 0
    return np.where(has_negative_R, _ratio(best_R, curve.positives[:, 0]), np.nan)


def balanced_accuracy(
    predicted_N: NDArray[np.int64], truth_N: NDArray[np.int64], weight_RN: Weights, *, num_classes: int
) -> Values:
    """Mean recall over the classes that occur in a row; [R]. Chance is one over the number of those classes."""
    hit_N = (predicted_N == truth_N).astype(np.float64)
    of_class_NK = (truth_N[:, None] == np.arange(num_classes)).astype(np.float64)
    weight_RK = weight_RN @ of_class_NK
    recall_RK = np.divide(
        weight_RN @ (of_class_NK * hit_N[:, None]), weight_RK, out=np.zeros_like(weight_RK), where=weight_RK > 0
    )
    return _ratio(recall_RK.sum(axis=1), (weight_RK > 0).sum(axis=1).astype(np.float64))


def _curve(score_N: NDArray[np.float64], positive_N: NDArray[np.bool_], weight_RN: Weights) -> _Curve | None:
    if not len(score_N):
        return None
    if np.isnan(score_N).any():
        raise MedfedError(f"Expected scores, got {int(np.isnan(score_N).sum())} NaN; the model has diverged.")
    order = np.argsort(-score_N, kind="stable")
    falling_N, positive_N = score_N[order], positive_N[order]
    last_G = np.flatnonzero(np.append(np.diff(falling_N) != 0, True))  # of each group of equal scores
    weight_RN = weight_RN[:, order]
    return _Curve(
        true_positive_RG=np.cumsum(weight_RN * positive_N, axis=1)[:, last_G],
        false_positive_RG=np.cumsum(weight_RN * ~positive_N, axis=1)[:, last_G],
    )


def _ratio(part_R: Values, whole_R: Values) -> Values:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_R: Values = np.where(whole_R > 0, part_R / whole_R, np.nan)
    return ratio_R
