"""Annotators: outlines that are too wide or too tight, that stray, that are not there.

All of it is one formula: the signed distance of every pixel to the outline of each class, to which a reader's margin
and a smooth random field are added; a pixel belongs to the class with the largest positive value. With nothing added
that is the annotation itself, and classes never overlap.

Dimension key: H = rows, W = columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medfed.shift_profile import AnnotatorShift
from simulation.shift.draws import Draws

_Labels = npt.NDArray[np.uint8]
_Float = npt.NDArray[np.float64]


def annotate(label_HW: _Labels, shift: AnnotatorShift, *, reader_margin_px: float, draws: Draws) -> _Labels:
    """The label map as this annotator would have drawn it.

    ======================================  ==========================================
    input                                   output
    ======================================  ==========================================
    no margin, no straying, no misses       the label map itself
    a class that is eroded away             not there any more
    ======================================  ==========================================

    Args:
        label_HW: class index of each pixel, 0 = background.
        shift: the site's annotators.
        reader_margin_px: how much wider this patient's reader draws than the site does.
        draws: generators of this image.

    Returns:
        Class indices, same shape; no class that was not there.
    """
    drawn, missed = draws("annotator"), draws("annotator-misses")
    margin_px = reader_margin_px + float(drawn.uniform(*shift.margin_px))
    classes = [int(index) for index in np.unique(label_HW) if index]
    kept = [index for index in classes if missed.random() >= shift.misses]
    if margin_px == 0.0 and shift.boundary_sd_px == 0.0:
        return np.where(np.isin(label_HW, kept), label_HW, np.uint8(0))
    best_HW = np.zeros(label_HW.shape)
    annotated_HW = np.zeros(label_HW.shape, dtype=np.uint8)
    for index in classes:
        stray_HW = _smooth_field(label_HW.shape, shift, drawn)
        if index not in kept:
            continue
        inside_HW = signed_distance_px(label_HW == index) + margin_px + stray_HW
        annotated_HW = np.where(inside_HW > best_HW, np.uint8(index), annotated_HW)
        best_HW = np.maximum(best_HW, inside_HW)
    return annotated_HW


def reader_margin_px(shift: AnnotatorShift, *, site: Draws, patient: Draws) -> float:
    """The margin of the reader whom a patient falls to: one of the site's, each with a margin of their own.

    Args:
        shift: the site's annotators.
        site: generators of the site, from which the readers' margins follow.
        patient: generators of the patient.
    """
    margins_px = site("annotator-readers").normal(0.0, 1.0, shift.readers) * shift.disagreement_px
    return float(margins_px[patient("annotator-reader").integers(shift.readers)])


def signed_distance_px(mask_HW: npt.NDArray[np.bool_]) -> _Float:
    """Distance of each pixel's centre to the outline in pixels: positive inside, negative outside.

    The outline runs half a pixel from the centres on its two sides. Minus infinity everywhere if the mask is empty,
    infinity if it is full.
    """
    if not mask_HW.any():
        return np.full(mask_HW.shape, -np.inf)
    if mask_HW.all():
        return np.full(mask_HW.shape, np.inf)
    inside_HW: _Float = ndimage.distance_transform_edt(mask_HW)
    outside_HW: _Float = ndimage.distance_transform_edt(~mask_HW)
    return np.where(mask_HW, inside_HW - 0.5, 0.5 - outside_HW)


def _smooth_field(shape: tuple[int, ...], shift: AnnotatorShift, generator: np.random.Generator) -> _Float:
    """A Gaussian random field with the standard deviation and correlation length of an outline's straying."""
    if shift.boundary_sd_px == 0.0:
        return np.zeros(shape)
    field_HW = ndimage.gaussian_filter(generator.standard_normal(shape), shift.boundary_scale_px, mode="wrap")
    # White noise through a Gaussian filter of width s has variance 1 / (4 pi s^2) in the plane.
    scale = np.sqrt(4 * np.pi) * shift.boundary_scale_px
    return np.asarray(field_HW * (scale * shift.boundary_sd_px))
