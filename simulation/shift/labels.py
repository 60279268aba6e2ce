"""Label shift: which patients come to a hospital, by the real prevalence table or drawn from a Dirichlet distribution.

The table holds the share of images with a finding in four collections of chest radiographs, counted from the labels
that torchxrayvision 1.5.7 ships: NIH ChestX-ray14 (Wang et al. 2017), CheXpert (Irvin et al. 2019) and PadChest
(Bustos et al. 2020) by the maker of the machine. They are prevalences of real hospitals for other findings than a
simulated lesion: what is real about them is how far hospitals differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from medfed.shift_profile import LabelShift
from simulation.lesions import Lesion, Side, Size, sample_lesion
from simulation.shift.draws import Draws

_SOURCES = ("nih", "chexpert", "padchest-philips", "padchest-idc")
_PERCENT: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {
        "cardiomegaly": (2.5, 12.1, 9.8, 8.8),
        "pneumothorax": (4.7, 8.7, 0.6, 0.1),
        "effusion": (11.9, 38.6, 9.2, 3.1),
        "pneumonia": (1.3, 2.7, 7.5, 2.6),
        "edema": (2.1, 23.4, 1.7, 0.1),
    }
)
PREVALENCE: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        finding: MappingProxyType({source: value / 100 for source, value in zip(_SOURCES, percent, strict=True)})
        for finding, percent in _PERCENT.items()
    }
)
"""Share of images by finding and source, in [0, 1]."""

LesionType = tuple[Side, Size] | None

LESION_TYPES: tuple[LesionType, ...] = (
    None,
    ("left", "small"),
    ("left", "large"),
    ("right", "small"),
    ("right", "large"),
)
LESION_CLASSES = ("left", "right", "small", "large")
"""What a site may never see."""


def prevalence_of(finding: str, source: str) -> float:
    """A number of the table.

    Raises:
        ValueError: if it is not there.
    """
    if finding not in PREVALENCE or source not in _SOURCES:
        raise ValueError(
            f"Expected a finding of {', '.join(PREVALENCE)} and a source of {', '.join(_SOURCES)}, got {finding!r} and "
            f"{source!r}."
        )
    return PREVALENCE[finding][source]


def lesion_proportions(
    prevalence: float, shift: LabelShift | None, absent: tuple[str, ...], site: Draws
) -> npt.NDArray[np.float64]:
    """The share of each of ``LESION_TYPES`` among a site's patients; sums to 1.

    Types that never come leave their share to the other lesions, so that the prevalence stays as it was.

    Args:
        prevalence: share of patients with a lesion, before a Dirichlet draw.
        shift: its concentration is of the draw around the common proportions (Hsu, Qi and Brown 2019); None for none.
        absent: sides or sizes that never come.
        site: generators of the site.

    Raises:
        ValueError: if every lesion is absent although some are wanted.
    """
    allowed = [kind is not None and not set(kind) & set(absent) for kind in LESION_TYPES]
    num_allowed = sum(allowed)
    if prevalence > 0 and num_allowed == 0:
        raise ValueError(f"Expected a lesion that may come, got none but {', '.join(absent)}; name fewer classes.")
    common = np.array([prevalence / num_allowed if flag else 0.0 for flag in allowed])
    common[0] = 1.0 - prevalence
    if shift is None or shift.concentration is None:
        return common
    there = common > 0
    drawn = np.zeros_like(common)
    drawn[there] = site("labels").dirichlet(shift.concentration * common[there])
    return drawn


def draw_lesion(proportions: npt.NDArray[np.float64], generator: np.random.Generator) -> Lesion | None:
    """The lesion of one patient, or None, by a site's proportions.

    Args:
        proportions: of ``LESION_TYPES``.
        generator: of this patient.
    """
    kind = LESION_TYPES[int(generator.choice(len(LESION_TYPES), p=proportions))]
    if kind is None:
        return None
    while True:  # four equally likely types: four tries on average
        lesion = sample_lesion(generator)
        if (lesion.side, lesion.size) == kind:
            return lesion
