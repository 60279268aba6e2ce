"""Image files of the formats that hospitals have, as arrays: the only place that opens them.

====================================  ==============================================================
format                                as an array
====================================  ==============================================================
NIfTI (``.nii``, ``.nii.gz``)         axes as stored, singleton ones dropped
PNG, JPEG, TIFF, BMP                  rows, columns; an image's palette is applied, a label map's is not
``.npy``                              as stored; no pickle
DICOM (any other name)                rows, columns; see :mod:`client.dicom_image`
====================================  ==============================================================

Whatever a damaged file does to a reader, the answer is one :class:`~medfed.errors.DataError`. What readers remark
about headers is silenced: it may quote a patient's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.dicom_image import read_dicom
from client.manifest import printable
from medfed.errors import DataError

MAX_PIXELS = 2**27
"""Of one image, over all channels: 134 million, twice the largest mammogram; more is a volume or a damaged header."""

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_TRUE_COLOURS = {"P": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "LA": "L"}
"""Ways of storing a picture (Pillow's modes) in which numbers are neither grey nor red, green and blue."""


@dataclass(frozen=True)
class Picture:
    """One image file.

    Attributes:
        array: float32, at least one pixel, no singleton axes; NaN and infinity as stored.
        spacing_mm: between pixels along the first and second axis; None where the file does not say.
        orientation: where the first and second axis point in the patient, for example ``PL`` for rows that follow
            each other to posterior and columns to the left (letters as in NIfTI: L/R, A/P, S/I); None where the
            file does not say.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    orientation: str | None = None


def read_image(path: Path, *, where: str) -> Picture:
    """The image in a file.

    Raises:
        DataError: one line that starts with ``where``.
    """
    return _read(path, where, is_label=False)


def read_label_map(path: Path, *, where: str) -> Picture:
    """The label map in a file: the stored numbers, never their colours.

    Raises:
        DataError: one line that starts with ``where``.
    """
    return _read(path, where, is_label=True)


def check_label_map(label_HW: np.ndarray, image: np.ndarray, path: Path, where: str, num_classes: int) -> None:
    """Refuse a label map with other values or another size than the image's.

    Raises:
        DataError: one line that starts with ``where``.
    """
    values = np.unique(label_HW)
    if not np.isin(values, np.arange(num_classes + 1)).all():
        outside = next(value for value in values if value not in range(num_classes + 1))
        raise DataError(
            f"{where}: expected labels 0..{num_classes} in {printable(path)}, got {outside:g}; "
            "0 is background and i + 1 is the i-th of task.classes."
        )
    if label_HW.ndim != 2:
        raise DataError(
            f"{where}: expected a 2-D label map at {printable(path)}, got shape {list(label_HW.shape)}; "
            "export slices as 2-D files."
        )
    if label_HW.shape not in (image.shape[:2], image.shape[-2:]):
        raise DataError(
            f"{where}: expected a label map of the image's size {list(image.shape)}, got {list(label_HW.shape)}; "
            "resample the label map onto the image."
        )


def refuse_other_axes(image: Path, label: Path, where: str) -> None:
    """Refuse an image and a label map in formats that store axes in different orders.

    Raises:
        DataError: one line that starts with ``where``.
    """
    if is_nifti(image) != is_nifti(label):
        raise DataError(
            f"{where}: expected image and label both as NIfTI or neither, got {printable(Path(image.name))} and "
            f"{printable(Path(label.name))}; their axes differ, convert one of them."
        )


def is_nifti(path: Path) -> bool:
    """Whether the file's name is that of a NIfTI file."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_dicom(path: Path) -> bool:
    """Whether the file would be read as DICOM: its name is that of no other format."""
    return not is_nifti(path) and not path.name.lower().endswith((".npy", *_PICTURES))


def directions(axes_RAS: Sequence[np.ndarray]) -> str:
    """The letter of the nearest anatomical direction for each axis, given in RAS+ coordinates."""
    letters = []
    for axis in axes_RAS:
        largest = int(np.argmax(np.abs(axis)))
        letters.append(("LR", "PA", "IS")[largest][int(axis[largest] > 0)])
    return "".join(letters)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Silences warnings and loggers of the image libraries, which quote header fields."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel", "nibabel.global", "PIL")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def _read(path: Path, where: str, *, is_label: bool) -> Picture:
    try:
        with without_remarks():
            if path.name.lower().endswith(".npy"):
                picture = Picture(np.load(path, allow_pickle=False, mmap_mode="r"))
            elif is_nifti(path):
                picture = _read_nifti(path, where)
            elif path.name.lower().endswith(_PICTURES):
                picture = Picture(_read_picture(path, where, is_label=is_label))
            else:
                array, spacing_mm, axes_RAS = read_dicom(path, where=where, is_label=is_label, max_pixels=MAX_PIXELS)
                picture = Picture(array, spacing_mm, None if axes_RAS is None else directions(axes_RAS))
            _refuse_size(picture.array.shape, where)
            _refuse_what_is_no_number(picture.array.dtype, path, where)
            array = np.array(picture.array, dtype=np.float32).squeeze()  # its own memory: a mapped file may change
    except DataError:
        raise
    except Exception as error:  # readers of many formats raise whatever they like; the answer is the same
        # What pydicom says may quote the header, and a damaged header may hold a patient's name anywhere.
        said = "" if is_dicom(path) else f": {' '.join(str(error).split())[:300]}"
        raise DataError(
            f"{where}: expected a readable image at {printable(path)}, got {type(error).__name__}{said}; "
            "restore the file, or drop its row."
        ) from None
    return Picture(array, picture.spacing_mm, picture.orientation)


def _read_nifti(path: Path, where: str) -> Picture:
    from monai.data.image_reader import NibabelReader

    reader = NibabelReader()
    image = reader.read(str(path))
    _refuse_size(image.shape, where)
    array, _ = reader.get_data(image)
    shown = [axis for axis in range(min(3, len(image.shape))) if image.shape[axis] > 1][:2]
    if len(shown) < 2:
        return Picture(np.asarray(array))
    zooms = image.header.get_zooms()
    affine = np.asarray(image.affine, dtype=float)
    return Picture(
        np.asarray(array),
        spacing_mm=(float(zooms[shown[0]]), float(zooms[shown[1]])),
        orientation=directions([affine[:3, axis] for axis in shown]) if np.isfinite(affine).all() else None,
    )


def _read_picture(path: Path, where: str, *, is_label: bool) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames != 1:
            raise DataError(
                f"{where}: expected one picture in {printable(path)}, got {frames}; export them one by one."
            )
        return np.asarray(image if is_label else image.convert(_TRUE_COLOURS.get(image.mode, image.mode)))


def _refuse_size(shape: Sequence[int], where: str) -> None:
    pixels = int(np.prod(shape, dtype=object)) if len(shape) else 1
    if not 1 <= pixels <= MAX_PIXELS:
        raise DataError(
            f"{where}: expected a 2-D image of 1 to {MAX_PIXELS} pixels, got shape {list(shape)}; "
            "export slices as 2-D files."
        )


def _refuse_what_is_no_number(dtype: np.dtype[Any], path: Path, where: str) -> None:
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: expected real numbers in {printable(path)}, got {dtype}; convert the file.")
