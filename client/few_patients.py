"""Some of a site's training patients, for simulations that ask how many are needed.

The patients of a smaller number are among those of a larger one, and held-out patients are not touched. A hospital
trains on all that it lists: nothing here is asked for by a message.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from client.data import Cohort
from medfed.canonical import derive_seed


@dataclass(frozen=True)
class FewPatients:
    """How many training patients of each site a federation gets, and who comes first.

    Attributes:
        count: of each site; at least 1. A site that has no more gives all of them.
        seed: fixes the order in which patients are taken.
    """

    count: int
    seed: int

    def of(self, patient_ids: Iterable[str]) -> frozenset[str]:
        """The chosen ones among the training patients of one site, whatever their order and repetitions."""
        ranked = sorted(set(patient_ids), key=lambda patient: (derive_seed(self.seed, "few-shot", patient), patient))
        return frozenset(ranked[: self.count])


def training_on(cohort: Cohort, patients: frozenset[str]) -> Cohort:
    """The cohort with the training images of these patients alone, in their order."""
    return replace(cohort, train=tuple(item for item in cohort.train if item.patient_id in patients))
