"""The held-out outlines of a site, and their metrics under resampling of patients.

Legend: R rows of weights, U patients, B images, D features, N structures of images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfed.metrics.resampling import Values, Weights, mean_of_defined, weighted_mean

DISTANCES = ("hd95", "surface-distance")


@dataclass(frozen=True)
class OutlineScores:
    """One row for each structure of each held-out image. No row says whose it is: patients are numbered.

    Attributes:
        classes: names of the structures.
        unit: of the distances: ``mm`` if every image's spacing is known, else ``px`` of the preprocessed image.
        num_patients: U; the patients of rows are numbered within it.
        patient_N: number of the patient.
        class_N: which structure.
        dice_N: overlap, in [0, 1].
        hd95_N: 95th percentile Hausdorff distance; NaN where nothing was outlined.
        surface_distance_N: average symmetric surface distance, likewise.
        attributes: attribute -> group of each row; "" where unknown.
        embedding_BD: what the task's head read of each image, averaged over positions where it has any.
    """

    classes: tuple[str, ...]
    unit: Literal["mm", "px"]
    num_patients: int
    patient_N: NDArray[np.int64]
    class_N: NDArray[np.int64]
    dice_N: NDArray[np.float64]
    hd95_N: NDArray[np.float64]
    surface_distance_N: NDArray[np.float64]
    attributes: Mapping[str, tuple[str, ...]]
    embedding_BD: NDArray[np.float64]

    def metrics(self, weight_RU: Weights) -> dict[str, Values]:
        """Every metric in every row of patients' multiplicities.

        ``dice`` is the mean over classes of the mean over images that hold the structure, as everywhere in medfed;
        distances are averaged likewise over the structures that were outlined at all; ``missed`` is the fraction of
        structures that were not.
        """
        weight_RN = weight_RU[:, self.patient_N]
        found: dict[str, Values] = {}
        columns = {"dice": self.dice_N, "hd95": self.hd95_N, "surface-distance": self.surface_distance_N}
        for name, value_N in columns.items():
            by_class = {
                f"{name}/{part}": weighted_mean(value_N[self.class_N == index], weight_RN[:, self.class_N == index])
                for index, part in enumerate(self.classes)
                if (self.class_N == index).any()
            }
            if by_class:
                found[name] = mean_of_defined(np.array(list(by_class.values())))
                found.update(by_class)
        if len(self.class_N):
            found["missed"] = weighted_mean(np.isnan(self.hd95_N).astype(np.float64), weight_RN)
        return found

    @property
    def case_scores(self) -> NDArray[np.float64]:
        """What groups of patients are compared by: the overlap of each row."""
        return self.dice_N
