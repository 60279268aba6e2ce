"""Stain: what another laboratory's dyes do to an RGB image of histology.

By the law of Lambert and Beer, optical density is a sum over stains of concentration times stain vector. An image is
taken apart into concentrations, these are scaled and offset at random, and it is put together again (Tellez et al.
2018, IEEE Trans. Med. Imaging 37, "HED colour augmentation"). Stain vectors are fixed ones (Ruifrok and Johnston 2001)
or the image's own (Macenko et al. 2009, ISBI). No pixel moves.

Dimension key: 3 = red, green, blue, or stains; H = rows, W = columns; N = pixels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medfed.shift_profile import StainShift

# Rows: haematoxylin, eosin, DAB; columns: red, green, blue (Ruifrok and Johnston 2001, table 1).
_HED_33 = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_WHITE = 255.0
_LEAST_DENSITY = 0.15  # Macenko et al. 2009, beta: pixels with less hold no stain
_EXTREME_PERCENT = 1.0  # and alpha: robust extremes of the angle
_LEAST_STAINED_PIXELS = 32

_Image = npt.NDArray[np.uint8]
_Float = npt.NDArray[np.float64]


def restain(image_HW3: _Image, shift: StainShift, generator: np.random.Generator) -> _Image:
    """The image as another laboratory would have stained it.

    =============================================  ==================================================
    input                                          output
    =============================================  ==================================================
    scale and offset 0                             the image itself
    ``macenko``, hardly any stained pixel          the image itself: it has no stain vectors
    =============================================  ==================================================

    Args:
        image_HW3: uint8 RGB.
        shift: how far.
        generator: the only source of randomness.

    Returns:
        uint8, same shape. Unstained background is white before and, but for the offset, after.

    Raises:
        ValueError: the image is not uint8 RGB.
    """
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(
            f"Expected an RGB image of 8 bits, got {image_HW3.dtype} of shape {list(image_HW3.shape)}; "
            "stain is for histology in colour."
        )
    scales = 1.0 + generator.uniform(-shift.scale, shift.scale, 3)
    offsets = generator.uniform(-shift.offset, shift.offset, 3)
    if shift.scale == 0.0 and shift.offset == 0.0:
        return image_HW3
    density_N3 = -np.log(np.maximum(image_HW3.reshape(-1, 3), 1.0) / _WHITE)
    vectors_33 = _unit(_HED_33) if shift.space == "hed" else _own_vectors(density_N3)
    if vectors_33 is None:
        return image_HW3
    concentrations_N3 = density_N3 @ np.linalg.inv(vectors_33)
    if shift.space == "macenko":
        scales[2], offsets[2] = 1.0, 0.0  # the third vector is what two stains leave over
    changed_N3 = (concentrations_N3 * scales + offsets) @ vectors_33
    pixels_N3 = np.clip(np.rint(_WHITE * np.exp(-changed_N3)), 0, 255)
    restained_HW3: _Image = pixels_N3.astype(np.uint8).reshape(image_HW3.shape)
    return restained_HW3


def _own_vectors(density_N3: _Float) -> _Float | None:
    """Rows: haematoxylin and eosin of this image, and their normal; None if it holds hardly any stain."""
    stained_N3 = density_N3[(density_N3 > _LEAST_DENSITY).all(axis=1)]
    if len(stained_N3) < _LEAST_STAINED_PIXELS:
        return None
    _, vectors_33 = np.linalg.eigh(np.cov(stained_N3.T))
    plane_32 = vectors_33[:, [2, 1]] * np.sign(vectors_33[0, [2, 1]] + 1e-12)
    angle_N = np.arctan2(*(stained_N3 @ plane_32).T[::-1])
    ends = np.percentile(angle_N, [_EXTREME_PERCENT, 100.0 - _EXTREME_PERCENT])
    first, second = (plane_32 @ np.array([np.cos(end), np.sin(end)]) for end in ends)
    if np.linalg.norm(np.cross(first, second)) < 1e-3:  # one stain only
        return None
    haematoxylin, eosin = (first, second) if first[0] > second[0] else (second, first)
    return _unit(np.stack([haematoxylin, eosin, np.cross(haematoxylin, eosin)]))


def _unit(vectors_33: _Float) -> _Float:
    unit_33: _Float = vectors_33 / np.linalg.norm(vectors_33, axis=1, keepdims=True)
    return unit_33
