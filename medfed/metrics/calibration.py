"""Whether probabilities mean what they say: reliability bins, calibration error, and one temperature to repair it.

Guo, Pleiss, Sun and Weinberger 2017 (https://arxiv.org/abs/1706.04599): equation 3 for the expected calibration
error of the likeliest class, section 4.2 for the temperature.

Legend: R rows of weights, N cases, K classes, B bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import MedfedError
from medfed.metrics.resampling import Values, Weights

NUM_BINS = 10
"""Bins of equal width on [0, 1]. More of them would be empty with the few patients of a site."""

MAX_TEMPERATURE = 20.0
"""Temperatures are sought between this and its inverse: beyond, probabilities are as good as equal, or 0 and 1."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Mergeable counts behind a reliability diagram: add those of two sites to have those of both.

    Attributes:
        count_B: cases whose confidence lies in each bin.
        confidence_B: sum of their confidences.
        correct_B: how many of them were right.
    """

    count_B: NDArray[np.float64]
    confidence_B: NDArray[np.float64]
    correct_B: NDArray[np.float64]

    def __add__(self, other: ReliabilityBins) -> ReliabilityBins:
        return ReliabilityBins(
            self.count_B + other.count_B, self.confidence_B + other.confidence_B, self.correct_B + other.correct_B
        )

    @property
    def error(self) -> float:
        """Expected calibration error; NaN without cases."""
        total = self.count_B.sum()
        return float(np.abs(self.correct_B - self.confidence_B).sum() / total) if total else math.nan


def softmax(logits_NK: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities of logits divided by a temperature; rows add up to 1, and no logit overflows."""
    shifted_NK = (logits_NK - logits_NK.max(axis=1, keepdims=True)) / temperature
    weight_NK = np.exp(shifted_NK)
    probability_NK: NDArray[np.float64] = weight_NK / weight_NK.sum(axis=1, keepdims=True)
    return probability_NK


def reliability_bins(probability_NK: NDArray[np.float64], truth_N: NDArray[np.int64]) -> ReliabilityBins:
    """The bins of the likeliest class over all cases; a confidence on an edge belongs to the bin above, 1 to the last.

    Raises:
        MedfedError: if a probability is NaN or outside [0, 1].
    """
    confidence_N, correct_N, bin_N = _binned(probability_NK, truth_N)
    in_bin_NB = (bin_N[:, None] == np.arange(NUM_BINS)).astype(np.float64)
    return ReliabilityBins(in_bin_NB.sum(axis=0), confidence_N @ in_bin_NB, correct_N @ in_bin_NB)


def calibration_error(probability_NK: NDArray[np.float64], truth_N: NDArray[np.int64], weight_RN: Weights) -> Values:
    """Expected calibration error of the likeliest class under each row of weights; [R], in [0, 1], 0 is best.

    Biased upwards for few cases: a perfectly calibrated model has an error above 0 on any finite cohort.

    Raises:
        MedfedError: as :func:`reliability_bins`.
    """
    confidence_N, correct_N, bin_N = _binned(probability_NK, truth_N)
    in_bin_NB = (bin_N[:, None] == np.arange(NUM_BINS)).astype(np.float64)
    gap_RB = weight_RN @ (in_bin_NB * (correct_N - confidence_N)[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        error_R: Values = np.abs(gap_RB).sum(axis=1) / weight_RN.sum(axis=1)
    return error_R


def fitted_temperature(logits_NK: NDArray[np.float64], truth_N: NDArray[np.int64]) -> float | None:
    """The temperature under which the true classes are likeliest; above 1 if the model is too sure of itself.

    Fit it on other patients than it is judged on. It changes no prediction, only how sure they are.

    ================================ ===========================================
    no cases                         None
    every case right by any margin   the smallest temperature that is considered
    ================================ ===========================================

    Raises:
        MedfedError: if a logit is NaN or infinite.
    """
    from scipy.optimize import minimize_scalar

    if not len(truth_N):
        return None
    if not np.isfinite(logits_NK).all():
        raise MedfedError("Expected finite logits to fit a temperature to, got NaN or infinity; the model diverged.")
    rows_N = np.arange(len(truth_N))

    def loss(log_temperature: float) -> float:
        scaled_NK = logits_NK / math.exp(log_temperature)
        top_N = scaled_NK.max(axis=1)
        log_total_N = top_N + np.log(np.exp(scaled_NK - top_N[:, None]).sum(axis=1))
        return float((log_total_N - scaled_NK[rows_N, truth_N]).mean())

    # In the inverse temperature the loss is convex, so it has one valley in the logarithm as well.
    bound = math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def _binned(
    probability_NK: NDArray[np.float64], truth_N: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    if not ((probability_NK >= 0) & (probability_NK <= 1)).all():
        raise MedfedError("Expected probabilities in [0, 1], got NaN or others; the model has diverged.")
    predicted_N = probability_NK.argmax(axis=1)
    confidence_N = probability_NK[np.arange(len(truth_N)), predicted_N]
    bin_N = np.minimum((confidence_N * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return confidence_N, (predicted_N == truth_N).astype(np.float64), bin_N
