"""The held-out predictions of a site's classifier, and their metrics under resampling of patients.

Legend: R rows of weights, U patients, B or N images, D features, K classes of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.metrics.calibration import calibration_error, softmax
from medfed.metrics.ranking import area_under_roc, average_precision, balanced_accuracy, sensitivity_at_specificity
from medfed.metrics.resampling import Values, Weights, mean_of_defined

SPECIFICITY = 0.9
"""At which sensitivity is told."""

SENSITIVITY = "sensitivity-at-specificity-0.9"


@dataclass(frozen=True)
class ClassScores:
    """One row for each held-out image. No row says whose it is: patients are numbered.

    Attributes:
        num_classes: target -> K; of a target with two classes the second is the positive one.
        num_patients: U.
        patient_N: number of the patient.
        logits: target -> logits, [N, K].
        truth: target -> class index, [N].
        attributes: attribute -> group of each row; "" where unknown.
        embedding_BD: what the task's head read of each image, averaged over positions where it has any.
    """

    num_classes: Mapping[str, int]
    num_patients: int
    patient_N: NDArray[np.int64]
    logits: Mapping[str, NDArray[np.float64]]
    truth: Mapping[str, NDArray[np.int64]]
    attributes: Mapping[str, tuple[str, ...]]
    embedding_BD: NDArray[np.float64]

    def metrics(self, weight_RU: Weights, temperatures: Mapping[str, float] | None = None) -> dict[str, Values]:
        """Every metric of every target, and its mean over targets, in every row of patients' multiplicities.

        Areas under curves of a target with more than two classes are means over its classes, one against the rest,
        of those that occur. Sensitivity is told of targets with two classes alone. ``ece-scaled`` is the calibration
        error after temperature scaling.

        Args:
            weight_RU: multiplicities.
            temperatures: target -> temperature, fitted on other patients.
        """
        weight_RN = weight_RU[:, self.patient_N]
        by_name: dict[str, dict[str, Values]] = {}
        for target, num_classes in self.num_classes.items():
            scaled = None if temperatures is None else temperatures.get(target)
            for name, value_R in self._of_target(target, num_classes, weight_RN, scaled).items():
                by_name.setdefault(name, {})[f"{name}/{target}"] = value_R
        found: dict[str, Values] = {}
        for name, by_target in by_name.items():
            found[name] = mean_of_defined(np.array(list(by_target.values())))
            found.update(by_target)
        return found

    def probabilities(self, target: str, temperature: float = 1.0) -> NDArray[np.float64]:
        """Probabilities of a target's classes, [N, K]."""
        return softmax(self.logits[target], temperature)

    @property
    def case_scores(self) -> NDArray[np.float64]:
        """What groups of patients are compared by: the fraction of targets that are predicted right."""
        right = [self.logits[name].argmax(axis=1) == self.truth[name] for name in self.num_classes]
        fraction_N: NDArray[np.float64] = np.array(right, dtype=np.float64).mean(axis=0)
        return fraction_N

    def _of_target(
        self, target: str, num_classes: int, weight_RN: Weights, temperature: float | None
    ) -> dict[str, Values]:
        truth_N, probability_NK = self.truth[target], self.probabilities(target)
        found = {
            "balanced-accuracy": balanced_accuracy(
                self.logits[target].argmax(axis=1), truth_N, weight_RN, num_classes=num_classes
            )
        }
        positives = [1] if num_classes == 2 else list(range(num_classes))
        for name, area in (("auroc", area_under_roc), ("auprc", average_precision)):
            by_class = [area(probability_NK[:, k], truth_N == k, weight_RN) for k in positives]
            found[name] = mean_of_defined(np.array(by_class))
        if num_classes == 2:
            found[SENSITIVITY] = sensitivity_at_specificity(
                probability_NK[:, 1], truth_N == 1, weight_RN, specificity=SPECIFICITY
            )
        found["ece"] = calibration_error(probability_NK, truth_N, weight_RN)
        if temperature is not None:
            found["ece-scaled"] = calibration_error(self.probabilities(target, temperature), truth_N, weight_RN)
        return found
