"""Confidence intervals by the bootstrap over patients: whole patients are drawn, with all their images.

A resample of a cohort is a row of multiplicities, one for each patient. Metrics take many rows at once and give a
value for each, so that an estimate, its interval and a paired difference come from one computation. Row 0 is the
cohort as it is.

Legend: R rows (the cohort and its resamples), U patients, N cases (images, or structures of images).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import MedfedError

Weights = NDArray[np.float64]
"""Multiplicities: [R, U] of patients or [R, N] of cases."""

Values = NDArray[np.float64]
"""One value for each row; NaN where the metric has no value in that row."""

NUM_RESAMPLES = 2000
"""Enough for two digits of a 95 % interval (Efron and Tibshirani 1993, section 14.2: 1000 to 2000)."""

CONFIDENCE = 0.95

MIN_PATIENTS = 2
"""Fewer have no spread to resample."""

MIN_DEFINED = 0.9
"""Part of the resamples in which a metric must have a value for its interval to be shown."""


@dataclass(frozen=True)
class Estimate:
    """A value and its interval.

    Attributes:
        value: on the cohort as it is.
        low: lower end of the 95 % percentile interval; None if there is none to show.
        high: upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; False without one."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def patient_weights(num_patients: int, seed: int, *, num_resamples: int = NUM_RESAMPLES) -> Weights:
    """The cohort (ones) and ``num_resamples`` draws of as many patients with replacement, [R, U].

    Raises:
        MedfedError: without a patient.
    """
    if num_patients < 1:
        raise MedfedError(f"Expected at least one patient to resample, got {num_patients}; add held-out patients.")
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_resamples)
    return np.concatenate([np.ones((1, num_patients)), drawn.astype(np.float64)])


def estimate(value_R: Values) -> Estimate | None:
    """Value and 95 % percentile interval from the rows of a metric, or of the difference of two.

    ================================== ==================================
    row 0 is NaN                       None: there is nothing to estimate
    one row                            no interval
    over 10 % of the resamples NaN     no interval
    ================================== ==================================

    Not guaranteed: coverage for few patients, where percentile intervals are too narrow.
    """
    if not np.isfinite(value_R[0]):
        return None
    resampled = value_R[1:]
    defined = resampled[np.isfinite(resampled)]
    if not len(resampled) or len(defined) < MIN_DEFINED * len(resampled):
        return Estimate(float(value_R[0]), None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Estimate(float(value_R[0]), float(low), float(high))


def weighted_mean(value_N: NDArray[np.float64], weight_RN: Weights) -> Values:
    """Mean of the values under each row of weights; values that are NaN do not count, no value gives NaN."""
    is_defined = np.isfinite(value_N)
    weight_RN = weight_RN[:, is_defined]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_R: Values = weight_RN @ value_N[is_defined] / weight_RN.sum(axis=1)
    return mean_R


def mean_of_defined(value_MR: NDArray[np.float64]) -> Values:
    """Mean over the leading axis of what is not NaN; NaN where nothing is."""
    defined_MR = np.isfinite(value_MR)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_R: Values = np.where(defined_MR, value_MR, 0.0).sum(axis=0) / defined_MR.sum(axis=0)
    return mean_R
