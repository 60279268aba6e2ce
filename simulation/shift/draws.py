"""Where the families of a shift draw from: one generator for each family, patient and image.

A family never draws from another's generator, and none from that of the patient's anatomy. So to add, remove or change
one leaves all that the others do as it is, and a site without a shift has the cohort that it had before there were any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medfed.canonical import derive_seed

Draws = Callable[[str], np.random.Generator]
"""Generator of a family, by its name."""


@dataclass(frozen=True)
class Drawn:
    """Generators that follow from a seed and from what they are for.

    Attributes:
        seed: of the cohort.
        labels: site, and below it patient and image.
    """

    seed: int
    labels: tuple[str | int, ...]

    def __call__(self, family: str) -> np.random.Generator:
        """The generator of a family, new at every call."""
        return np.random.default_rng(derive_seed(self.seed, "shift", *self.labels, family))

    def of(self, label: str | int) -> Drawn:
        """Those of a part: a patient of a site, an image of a patient."""
        return Drawn(self.seed, (*self.labels, label))
