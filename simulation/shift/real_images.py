"""A hospital's shift on real images: changed copies of a manifest's files, patient by patient.

What can be applied to an image that is already there: scanner physics and window on grey images, stain on RGB ones,
annotators and missing structures on label maps. Who comes, and when, cannot; a partition does that.

Dimension key: H = rows, W = columns, 3 = red, green, blue.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import torch

from client.images import read_image, read_label_map
from medfed.errors import DataError
from medfed.shift_profile import ShiftProfile
from simulation.scanner import ScannerProfile
from simulation.shift.draws import Drawn
from simulation.shift.partition import Row, read_rows, write_rows
from simulation.shift.patient import ShiftedPatient
from simulation.shift.physics import PHYSICS
from simulation.shift.stain import restain

_IMAGE_FAMILIES = (*PHYSICS, "window", "stain")
_LABEL_FAMILIES = ("annotator", "missing")
_PERCENTILES = (0.5, 99.5)  # what the loader maps to [0, 1]
_AS_IT_IS = ScannerProfile("none", "the image as it is", "none", steps=())


def shift_images(
    manifest: Path,
    profile: ShiftProfile,
    out: Path,
    *,
    structures: Sequence[str] = (),
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a manifest and changed copies of its images and label maps.

    Args:
        manifest: as ``docs/your-own-data.md`` describes; 2-D images.
        profile: resolved.
        out: folder; must not be there yet, or be empty.
        structures: names of label values 1, 2, ..., by which ``missing.classes`` names them.
        seed: equal seeds give equal copies; an image's depends on its patient and on its number among theirs.
        progress: called with the number of images finished.

    Returns:
        The new manifest; columns that are not files are as they were.

    Raises:
        DataError: a family that has no meaning here, an image that cannot be read, or something at ``out``.
    """
    if foreign := [name for name in profile.families if name not in (*_IMAGE_FAMILIES, *_LABEL_FAMILIES)]:
        raise DataError(
            f"Expected families of {', '.join((*_IMAGE_FAMILIES, *_LABEL_FAMILIES))} for images that are there "
            f"already, got {foreign[0]!r}; 'medfed cohort partition' deals out patients."
        )
    if out.exists() and any(out.iterdir()):
        raise DataError(f"Expected an empty folder at {out}, got files; choose another folder.")
    rows = read_rows(manifest)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}-{os.getpid()}-building")
    try:
        for folder in ("images", "labels"):
            (building / folder).mkdir(parents=True, exist_ok=True)
        write_rows(building / "manifest.csv", _copies(rows, manifest, profile, building, structures, seed, progress))
        building.replace(out)  # whole or not at all
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out / "manifest.csv"


def _copies(
    rows: Sequence[Row],
    manifest: Path,
    profile: ShiftProfile,
    out: Path,
    structures: Sequence[str],
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[Row]:
    """The rows of the copies, after their files are written."""
    site = Drawn(seed, ("images",))
    numbers: dict[str, int] = {}
    shifted: list[Row] = []
    for number, row in enumerate(rows):
        index = numbers[row["patient_id"]] = numbers.get(row["patient_id"], -1) + 1
        patient = ShiftedPatient(profile, site, site.of(row["patient_id"]), is_held_out=row["split"] == "test")
        where = f"{manifest}, row {number + 2}"
        copy = {**row, "image": _shift_image(manifest.parent / row["image"], out, number, patient, index, where)}
        if row.get("label"):
            label = manifest.parent / row["label"]
            copy["label"] = _shift_label(label, out, number, patient, index, tuple(structures), where)
        shifted.append(copy)
        if progress is not None:
            progress(number + 1)
    return shifted


def _shift_image(path: Path, out: Path, number: int, patient: ShiftedPatient, index: int, where: str) -> str:
    pixels = read_image(path, where=where).array
    name = f"images/{number:06d}"
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        return _write(out, name, path, _restained(pixels[..., :3], patient, index, where))
    if pixels.ndim != 2:
        raise DataError(f"{where}: expected a 2-D image, grey or RGB, got shape {list(pixels.shape)}; export slices.")
    if patient.profile.stain is not None:
        raise DataError(f"{where}: expected an RGB image for stain, got a grey one; leave stain out.")
    low, high = np.percentile(pixels, _PERCENTILES)
    if not np.isfinite(pixels).all() or high <= low:
        raise DataError(f"{where}: expected an image of finite and different pixels at {path}; repair it.")
    image_HW = torch.from_numpy(((pixels - low) / (high - low)).clip(0.0, 1.0)).float()
    acquired_HW = patient.acquire(_AS_IT_IS, image_HW, np.random.default_rng(0), index=index)
    return _write(out, name, path, np.rint(acquired_HW.numpy() * 255).astype(np.uint8))


def _restained(
    pixels_HW3: npt.NDArray[np.float32], patient: ShiftedPatient, index: int, where: str
) -> npt.NDArray[np.uint8]:
    if grey := [name for name in patient.profile.families if name in (*PHYSICS, "window")]:
        raise DataError(f"{where}: expected a grey image for {grey[0]!r}, got an RGB one; leave it out.")
    image_HW3 = pixels_HW3.astype(np.uint8)
    if not np.array_equal(image_HW3, pixels_HW3):
        raise DataError(f"{where}: expected an RGB image of 8 bits, got other values; convert it.")
    stain = patient.profile.stain
    return image_HW3 if stain is None else restain(image_HW3, stain, patient.patient.of(index)("stain"))


def _shift_label(
    path: Path,
    out: Path,
    number: int,
    patient: ShiftedPatient,
    index: int,
    structures: tuple[str, ...],
    where: str,
) -> str:
    label = read_label_map(path, where=where).array
    label_HW = label.astype(np.uint8)
    if label_HW.ndim != 2 or not np.array_equal(label_HW, label):
        raise DataError(f"{where}: expected a 2-D label map of values 0..255 at {path}, got something else.")
    return _write(out, f"labels/{number:06d}", path, patient.structures(label_HW, structures, index=index))


def _write(out: Path, name: str, source: Path, pixels: npt.NDArray[np.uint8]) -> str:
    """Write as NIfTI with the source's affine if the source is one, else as PNG; the name with its ending."""
    if source.name.endswith((".nii", ".nii.gz")):
        file = f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(pixels, nibabel.load(source).affine), out / file)
        return file
    from PIL import Image

    file = f"{name}.png"
    Image.fromarray(pixels).save(out / file)
    return file
