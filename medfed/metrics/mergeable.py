"""Metrics as counts that add up: what a site may release of its held-out patients, and what the sums mean.

Counts of two sites added are the counts of both together, so that a secure sum is enough to have the areas and
errors of all patients, and noise can be added to them once. Each patient counts once, however many images there are
of it: its images are averaged. What a patient adds has a bounded length, which is what noise is measured by.

=============== ============================================================= =======================
part            elements of one target (K classes) or structure               squared length at most
=============== ============================================================= =======================
``confusion``   K x K: truth by prediction                                    1
``scores``      P x 2 x 20: class, whether true, bin of its probability       P
``reliability`` 2 x 10: whether right, bin of the likeliest class's confidence 1
``excess``      10: confidence less the lower edge of its bin                 0.01
``overlap``     sum of Dice, and 1                                            2
=============== ============================================================= =======================

P is 1 for two classes (the second), else K. A classification target has the first four parts, a structure the last.

Legend: U patients, N cases, K classes, D elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.metrics.calibration import NUM_BINS, softmax
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.outline_scores import OutlineScores
from medfed.study_sections import ClassificationConfig, SegmentationConfig

SCORE_BINS = 20
"""Of the probability of a class. Within a bin, cases cannot be told apart and count as ties."""

LEAST_COUNT = 1.0
"""A ratio whose noised denominator is below this has no value."""

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class CountLayout:
    """Which element of a vector counts what; the same for all sites of a study.

    Attributes:
        task: what is counted.
    """

    task: SegmentationConfig | ClassificationConfig

    @property
    def num_elements(self) -> int:
        """D."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def l2_bound(self) -> float:
        """Largest L2 norm of what one patient adds: the sensitivity of the sum, adding or removing a patient."""
        if isinstance(self.task, SegmentationConfig):
            return math.sqrt(2 * len(self.task.classes))
        width = 1 / NUM_BINS
        return math.sqrt(sum(2 + _num_scored(len(classes)) + width**2 for classes in self.task.targets.values()))

    @property
    def names(self) -> frozenset[str]:
        """Every name that :meth:`metrics` may give."""
        if isinstance(self.task, SegmentationConfig):
            return frozenset({"dice", *(f"dice/{name}" for name in self.task.classes)})
        kinds = ("balanced-accuracy", "auroc", "ece")
        return frozenset({*kinds, *(f"{kind}/{name}" for kind in kinds for name in self.task.targets)})

    def contributions(self, scores: OutlineScores | ClassScores) -> NDArray[np.float64]:
        """What each patient adds, [U, D]; a row depends on that patient alone and has norm :attr:`l2_bound` at most.

        A patient with a score that is not finite adds zeros, like one who is absent: whether something is released
        must not depend on a patient.
        """
        if isinstance(scores, OutlineScores):
            found_UD = self._of_outlines(scores)
        else:
            cases_ND = np.concatenate([self._of_target(scores, target) for target in scores.num_classes], axis=1)
            found_UD = _mean_by_patient(cases_ND, scores.patient_N, scores.num_patients)
        found_UD[~np.isfinite(found_UD).all(axis=1)] = 0.0
        return found_UD

    def metrics(self, count_D: Counts) -> dict[str, float]:
        """The metrics that a sum of contributions means, noised or not; in [0, 1], no value where nothing counts.

        Differences to the metrics of cases: patients count once; areas take scores within a bin as ties.
        """
        part = self._parts(np.maximum(count_D, 0.0))
        by_kind: dict[str, dict[str, float]] = {}
        if isinstance(self.task, SegmentationConfig):
            for (total, number), name in zip(part["overlap"], self.task.classes, strict=True):
                _put(by_kind, "dice", name, _ratio(total, number))
        else:
            for name in self.task.targets:
                _put(by_kind, "balanced-accuracy", name, _balanced_accuracy(part[f"confusion/{name}"]))
                _put(by_kind, "auroc", name, _area(part[f"scores/{name}"]))
                _put(by_kind, "ece", name, _error(part[f"reliability/{name}"], part[f"excess/{name}"]))
        found: dict[str, float] = {}
        for kind, by_part in by_kind.items():
            found[kind] = float(np.mean(list(by_part.values())))
            found |= {f"{kind}/{name}": value for name, value in by_part.items()}
        return found

    @property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        if isinstance(self.task, SegmentationConfig):
            return {"overlap": (len(self.task.classes), 2)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, classes in self.task.targets.items():
            shapes[f"confusion/{name}"] = (len(classes), len(classes))
            shapes[f"scores/{name}"] = (_num_scored(len(classes)), 2, SCORE_BINS)
            shapes[f"reliability/{name}"] = (2, NUM_BINS)
            shapes[f"excess/{name}"] = (NUM_BINS,)
        return shapes

    def _parts(self, count_D: Counts) -> dict[str, NDArray[np.float64]]:
        parts, start = {}, 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            parts[name] = count_D[start:stop].reshape(shape)
            start = stop
        return parts

    def _of_outlines(self, scores: OutlineScores) -> NDArray[np.float64]:
        found_UC2 = np.zeros((scores.num_patients, len(scores.classes), 2))
        for index in range(len(scores.classes)):
            own_N = scores.class_N == index
            number_U = np.bincount(scores.patient_N[own_N], minlength=scores.num_patients)
            total_U = np.bincount(scores.patient_N[own_N], weights=scores.dice_N[own_N], minlength=scores.num_patients)
            found_UC2[:, index, 0] = np.clip(total_U / np.maximum(number_U, 1), 0.0, 1.0)
            found_UC2[:, index, 1] = number_U > 0
        return found_UC2.reshape(scores.num_patients, -1)

    def _of_target(self, scores: ClassScores, target: str) -> NDArray[np.float64]:
        """What each image adds: one-hot vectors in the order of the shapes; NaN if a logit is not finite."""
        is_finite_N = np.asarray(np.isfinite(scores.logits[target]).all(axis=1))
        probability_NK = softmax(np.where(is_finite_N[:, None], scores.logits[target], 0.0))
        truth_N = scores.truth[target]
        num_images, num_classes = probability_NK.shape
        rows_N, predicted_N = np.arange(num_images), probability_NK.argmax(axis=1)
        confusion = np.zeros((num_images, num_classes, num_classes))
        confusion[rows_N, truth_N, predicted_N] = 1
        scored = [1] if num_classes == 2 else list(range(num_classes))
        histogram = np.zeros((num_images, len(scored), 2, SCORE_BINS))
        for place, index in enumerate(scored):
            bin_N = _bins(probability_NK[:, index], SCORE_BINS)
            histogram[rows_N, place, (truth_N == index).astype(int), bin_N] = 1
        confidence_N = probability_NK[rows_N, predicted_N]
        bin_N = _bins(confidence_N, NUM_BINS)
        reliability, excess = np.zeros((num_images, 2, NUM_BINS)), np.zeros((num_images, NUM_BINS))
        reliability[rows_N, (predicted_N == truth_N).astype(int), bin_N] = 1
        excess[rows_N, bin_N] = np.clip(confidence_N - bin_N / NUM_BINS, 0.0, 1 / NUM_BINS)
        parts = (confusion, histogram, reliability, excess)
        added_ND = np.concatenate([part.reshape(num_images, -1) for part in parts], axis=1)
        added_ND[~is_finite_N] = np.nan
        return added_ND


def _num_scored(num_classes: int) -> int:
    return 1 if num_classes == 2 else num_classes


def _bins(value_N: NDArray[np.float64], num_bins: int) -> NDArray[np.int64]:
    return np.minimum((value_N * num_bins).astype(np.int64), num_bins - 1)


def _mean_by_patient(
    case_ND: NDArray[np.float64], patient_N: NDArray[np.int64], num_patients: int
) -> NDArray[np.float64]:
    total_UD = np.zeros((num_patients, case_ND.shape[1]))
    np.add.at(total_UD, patient_N, case_ND)
    return total_UD / np.maximum(np.bincount(patient_N, minlength=num_patients), 1)[:, None]


def _ratio(part: float, whole: float) -> float | None:
    return min(1.0, float(part / whole)) if whole >= LEAST_COUNT else None


def _balanced_accuracy(confusion_KK: NDArray[np.float64]) -> float | None:
    recalls = [_ratio(row[index], float(row.sum())) for index, row in enumerate(confusion_KK)]
    defined = [recall for recall in recalls if recall is not None]
    return float(np.mean(defined)) if defined else None


def _area(histogram_P2B: NDArray[np.float64]) -> float | None:
    areas = []
    for negative_B, positive_B in histogram_P2B:
        pairs = float(negative_B.sum() * positive_B.sum())
        if min(negative_B.sum(), positive_B.sum()) >= LEAST_COUNT:
            below_B = np.cumsum(negative_B) - negative_B
            areas.append(float((positive_B * (below_B + negative_B / 2)).sum()) / pairs)
    return float(np.mean(areas)) if areas else None


def _error(reliability_2B: NDArray[np.float64], excess_B: NDArray[np.float64]) -> float | None:
    wrong_B, right_B = reliability_2B
    number_B = wrong_B + right_B
    confidence_B = np.minimum(number_B * np.arange(NUM_BINS) / NUM_BINS + excess_B, number_B)
    return _ratio(float(np.abs(right_B - confidence_B).sum()), float(number_B.sum()))


def _put(by_kind: dict[str, dict[str, float]], kind: str, name: str, value: float | None) -> None:
    if value is not None:
        by_kind.setdefault(kind, {})[name] = value
