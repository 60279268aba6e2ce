"""One 2-D DICOM image: the values a radiologist's screen would start from, or a clear refusal.

==============================  =====================================================================
what the file says              what is done
==============================  =====================================================================
rescale slope, modality LUT     applied (PS3.3 C.11.1)
``MONOCHROME1``                 inverted: bright is bright in every file (PS3.3 C.7.6.3.1.2)
``PALETTE COLOR``               red, green, blue from its tables
``YBR_*``                       converted to red, green, blue
several frames, enhanced        refused: one file is one image
compressed                      decoded if this machine can, else refused with what to do
==============================  =====================================================================

Window settings and overlays are ignored. Label maps keep their stored numbers: only the rescaling is applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from client.manifest import printable
from medfed.errors import DataError

_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def read_dicom(
    path: Path, *, where: str, is_label: bool, max_pixels: int
) -> tuple[np.ndarray, tuple[float, float] | None, tuple[np.ndarray, np.ndarray] | None]:
    """Pixels (rows, columns, maybe colours), spacing in mm and directions of both axes in RAS+ coordinates.

    Spacing and directions are None where the file does not say.

    Raises:
        DataError: one line that starts with ``where``.
        Exception: whatever pydicom meets in a damaged file.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    try:
        dataset = pydicom.dcmread(path)
    except InvalidDicomError:
        raise DataError(
            f"{where}: expected an image at {printable(path)}, got neither DICOM with a file header nor a name that "
            "ends in .nii, .nii.gz, .png, .jpg, .tif, .bmp or .npy; convert the file."
        ) from None
    _refuse_what_is_no_picture(dataset, path, where, max_pixels)
    try:
        array = pixel_array(dataset)
    except RuntimeError:  # the decoder for this kind of compression does not know this variety of it
        raise _undecodable(dataset, path, where) from None
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR" and not is_label:
        array = apply_color_lut(array, dataset)
    elif array.ndim == 2:
        array = np.asarray(apply_modality_lut(array, dataset))
        if photometric == "MONOCHROME1" and not is_label:
            array = array.max().astype(float) + array.min() - array
    return array, pixel_spacing(dataset), axes_of(dataset)


def pixel_spacing(dataset: Any) -> tuple[float, float] | None:
    """Between rows and between columns, in mm; at the detector where the patient's is not known."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        values = _numbers(dataset, keyword, 2)
        if values is not None:
            return float(values[0]), float(values[1])
    return None


def axes_of(dataset: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Where rows and columns follow each other to, in RAS+ coordinates (ImageOrientationPatient, PS3.3 C.7.6.2)."""
    cosines = _numbers(dataset, "ImageOrientationPatient", 6)
    if cosines is None:
        return None
    along_row, along_column = cosines[:3], cosines[3:]
    return along_column * _LPS_TO_RAS, along_row * _LPS_TO_RAS


def _refuse_what_is_no_picture(dataset: Any, path: Path, where: str, max_pixels: int) -> None:
    name = printable(path)
    if "PixelData" not in dataset:
        kind = dataset.file_meta.get("MediaStorageSOPClassUID", "unknown kind")
        raise DataError(f"{where}: expected an image at {name}, got DICOM without pixels ({_uid_name(kind)}); drop it.")
    if absent := [keyword for keyword in ("Rows", "Columns") if keyword not in dataset]:
        raise DataError(f"{where}: expected {absent[0]} in the DICOM header of {name}, got none; restore the file.")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1 or "SharedFunctionalGroupsSequence" in dataset:
        raise DataError(
            f"{where}: expected one 2-D image at {name}, got a multi-frame DICOM object ({frames} frames); "
            "convert it to single-frame files, or label maps to PNG or NIfTI (for example with dcm2niix or "
            "dcmqi), and list the slices."
        )
    pixels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel") or 1)
    if not 1 <= pixels <= max_pixels:
        raise DataError(f"{where}: expected 1 to {max_pixels} pixels at {name}, got {pixels}; restore the file.")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not _can_decode(syntax):
        raise _undecodable(dataset, path, where)


def _undecodable(dataset: Any, path: Path, where: str) -> DataError:
    syntax = dataset.file_meta.TransferSyntaxUID
    return DataError(
        f"{where}: expected pixels that this machine can decode at {printable(path)}, got {_uid_name(syntax)}, damaged "
        "or of a variety without a decoder; decompress the file first (gdcmconv --raw IN OUT, or dcmdjpeg / dcmdjpls "
        "of DCMTK), or install a decoder that pydicom finds, for example pylibjpeg with its plugins."
    )


def _can_decode(syntax: Any) -> bool:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _uid_name(uid: Any) -> str:
    """The standard's name of a UID; nothing of a private one, which a damaged file may hold anything in."""
    from pydicom.uid import UID

    name = str(getattr(UID(str(uid)), "name", ""))
    return name if name.isprintable() and name != str(uid) else "an unknown kind"


def _numbers(dataset: Any, keyword: str, count: int) -> np.ndarray | None:
    value = dataset.get(keyword)
    try:
        numbers = np.array([float(number) for number in value], dtype=float) if value is not None else np.empty(0)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() and np.abs(numbers).any() else None
