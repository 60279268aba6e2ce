"""A site's cohort: the only place that reads images.

A cohort is a CSV manifest and the files that it names, relative to it. One row is one image:

=================  ============================================================================
column             meaning
=================  ============================================================================
``image``          NIfTI, PNG, DICOM (one 2-D image) or ``.npy``
``patient_id``     whose image it is: the unit of privacy and of splitting
``split``          ``train`` or ``test``; all images of a patient are in one split
``label``          segmentation: label map of the image's size, 0 = background, i + 1 = class i
one per target     classification: class index
``lesion_mask``    classification, optional: file of an expert's outline, above 0 inside; saliency is held to it
``attribute_...``  optional: the group that the patient belongs to, such as ``attribute_sex``; may be empty
=================  ============================================================================

Other columns are ignored. A manifest that breaks a rule is refused as a whole, with the row and what to
change; nothing trains on the rest of it.

Legend: C channels, H height, W width.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from client.spacing import Spacing, pixel_spacing_mm
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import DataError
from medfed.models.pixels import PixelSpec
from medfed.study_sections import ClassificationConfig, SegmentationConfig
from medfed.tasks.segmentation import annotate

Split = Literal["train", "test"]

ATTRIBUTE_PREFIX = "attribute_"
"""Of the columns that say which group a patient belongs to."""

EXPERT_MASK = "lesion_mask"
"""The column with an expert's outline of what a classifier should look at."""


@dataclass(frozen=True)
class Item:
    """One image of a cohort.

    Attributes:
        patient_id: never leaves the site, never logged.
        site_id: the site that holds it.
        image_CHW: preprocessed float32 image; one channel stands for three equal ones.
        annotation: what the task's ``collate`` takes.
        image_digest: SHA-256 of the image file.
        reference_digest: SHA-256 of the label file, or of the class indices.
        spacing_mm: height and width of a pixel of the preprocessed image; None where it is not known.
        expert_mask: file of an expert's outline, for a classification task; None where there is none.
        attributes: attribute -> group of the patient; a group that is not known is not there.
    """

    patient_id: str
    site_id: str
    image_CHW: Tensor
    annotation: Any
    image_digest: str
    reference_digest: str
    spacing_mm: Spacing | None = None
    expert_mask: Path | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """The data of one site for one study.

    Attributes:
        site_id: the site.
        train: images for training, in manifest order.
        test: held-out images of other patients.
    """

    site_id: str
    train: tuple[Item, ...]
    test: tuple[Item, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """All images: training, then held-out."""
        return self.train + self.test

    @property
    def digest(self) -> str:
        """SHA-256 over patients, splits, images and references; changes whenever the data does."""
        return sha256_hex(
            canonical_bytes(
                [
                    [split, item.patient_id, item.image_digest, item.reference_digest]
                    for split, items in (("train", self.train), ("test", self.test))
                    for item in items
                ]
            )
        )


def load_cohort(
    site_id: str,
    manifests: Sequence[Path],
    task: SegmentationConfig | ClassificationConfig,
    pixels: PixelSpec,
) -> Cohort:
    """Read and check a cohort.

    Args:
        site_id: the site that holds it.
        manifests: usually one; the pooled upper bound of a simulation has one per site.
        task: what the labels must fit.
        pixels: preprocessing.

    Raises:
        DataError: one line with the manifest, the row and what to change.
    """
    rows = [row for manifest in manifests for row in _read_manifest(manifest, task)]
    _refuse_patients_in_two_splits(rows)
    items = {split: tuple(_read_item(row, site_id, task, pixels) for row in rows if row.split == split)
             for split in ("train", "test")}  # fmt: skip
    for split, members in items.items():
        if not members:
            raise DataError(
                f"{manifests[0]}: expected at least one image with split = {split!r}, got none; "
                "the site is empty or its patients are not split."
            )
    return Cohort(site_id=site_id, train=items["train"], test=items["test"])


def refuse_shared_patients(cohorts: Mapping[str, Cohort]) -> None:
    """Refuse sites that share a patient; possible where one process sees all of them, as in a simulation.

    Raises:
        DataError: names the sites.
    """
    owner: dict[str, str] = {}
    for site, cohort in cohorts.items():
        for item in cohort.items:
            if owner.setdefault(item.patient_id, site) != site:
                raise DataError(
                    f"Expected each patient at one site, got patient {item.patient_id!r} at {owner[item.patient_id]!r} "
                    f"and {site!r}; give patients ids that are unique over sites, or keep them at one."
                )


@dataclass(frozen=True)
class _Row:
    where: str
    image: Path
    patient_id: str
    split: Split
    label: Path | None
    targets: dict[str, int]
    expert_mask: Path | None
    attributes: dict[str, str]


def _read_manifest(manifest: Path, task: SegmentationConfig | ClassificationConfig) -> list[_Row]:
    wanted = ["image", "patient_id", "split"]
    wanted += ["label"] if isinstance(task, SegmentationConfig) else list(task.targets)
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in wanted if column not in (reader.fieldnames or [])]:
                raise DataError(f"{manifest}: expected a column {missing[0]!r}, got none; add it.")
            rows = [
                _read_row(row, f"{manifest}, row {number}", manifest.parent, task)
                for number, row in enumerate(reader, start=2)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Expected a readable CSV manifest at {manifest}, got: {error}.") from None
    if not rows:
        raise DataError(f"{manifest}: expected at least one image, got an empty manifest; add rows or drop the site.")
    return rows


def _read_row(
    row: Mapping[str, str | None],
    where: str,
    folder: Path,
    task: SegmentationConfig | ClassificationConfig,
) -> _Row:
    def cell(column: str) -> str:
        value = (row.get(column) or "").strip()
        if not value:
            raise DataError(f"{where}: expected a value in {column!r}, got nothing; every image needs one.")
        return value

    def file(column: str) -> Path:
        path = folder / cell(column)
        if not path.is_file():
            raise DataError(f"{where}: expected a file at {path} ({column}), got nothing; correct the path.")
        return path

    split = cell("split")
    if split not in ("train", "test"):
        raise DataError(f"{where}: expected split 'train' or 'test', got {split!r}.")
    targets = {}
    if isinstance(task, ClassificationConfig):
        targets = {name: _class_index(cell(name), name, len(classes), where) for name, classes in task.targets.items()}
    return _Row(
        where=where,
        image=file("image"),
        patient_id=cell("patient_id"),
        split="train" if split == "train" else "test",
        label=file("label") if isinstance(task, SegmentationConfig) else None,
        targets=targets,
        expert_mask=file(EXPERT_MASK) if isinstance(task, ClassificationConfig) and row.get(EXPERT_MASK) else None,
        attributes={
            column.removeprefix(ATTRIBUTE_PREFIX): value.strip()
            for column, value in row.items()
            if column and column.startswith(ATTRIBUTE_PREFIX) and value and value.strip()
        },
    )


def _class_index(value: str, target: str, num_classes: int, where: str) -> int:
    if not value.isdecimal() or int(value) >= num_classes:
        raise DataError(
            f"{where}: expected {target!r} in 0..{num_classes - 1}, got {value!r}; correct the class index."
        )
    return int(value)


def _refuse_patients_in_two_splits(rows: Sequence[_Row]) -> None:
    seen: dict[str, Split] = {}
    for row in rows:
        if seen.setdefault(row.patient_id, row.split) != row.split:
            raise DataError(
                f"{row.where}: expected all images of a patient in one split, got patient {row.patient_id!r} "
                "in train and test; move the patient to one of them."
            )


def _read_item(row: _Row, site_id: str, task: SegmentationConfig | ClassificationConfig, pixels: PixelSpec) -> Item:
    array = _read_array(row.image, row.where)
    image_CHW = preprocess(array, pixels, where=f"{row.where}: {row.image}")
    reference = canonical_bytes(row.targets)
    annotation: Any = row.targets
    if isinstance(task, SegmentationConfig):
        assert row.label is not None
        if _is_nifti(row.image) != _is_nifti(row.label):
            raise DataError(
                f"{row.where}: expected image and label both as NIfTI or neither, got {row.image.name} and "
                f"{row.label.name}; their axes differ, convert one of them."
            )
        label_HW = _read_array(row.label, row.where)
        _check_label(label_HW, array, row.label, row.where, len(task.classes))
        annotation = annotate(_resized_label(label_HW, pixels), len(task.classes))
        reference = row.label.read_bytes()
    return Item(
        patient_id=row.patient_id,
        site_id=site_id,
        image_CHW=image_CHW,
        annotation=annotation,
        image_digest=sha256_hex(row.image.read_bytes()),
        reference_digest=sha256_hex(reference),
        spacing_mm=_resized_spacing(pixel_spacing_mm(row.image), image_CHW.shape, array.shape),
        expert_mask=row.expert_mask,
        attributes=row.attributes,
    )


def _resized_spacing(spacing: Spacing | None, after: Sequence[int], before: Sequence[int]) -> Spacing | None:
    """Spacing once an image of one shape was resized to another; None for what is no 2-D image of one channel."""
    if spacing is None or len(before) != 2 or len(after) != 3:
        return None
    return spacing[0] * before[0] / after[1], spacing[1] * before[1] / after[2]


def read_expert_mask(item: Item) -> np.ndarray | None:
    """The expert's outline of an image, bool, at the size of the preprocessed image; None where there is none.

    Raises:
        DataError: if the file cannot be read or is no 2-D mask.
    """
    if item.expert_mask is None:
        return None
    mask_HW = _read_array(item.expert_mask, str(item.expert_mask)) > 0
    if mask_HW.ndim != 2:
        raise DataError(
            f"Expected a 2-D mask at {item.expert_mask}, got shape {list(mask_HW.shape)}; export 2-D files."
        )
    size = tuple(item.image_CHW.shape[-2:])
    if mask_HW.shape != size:
        from monai.transforms import Resize

        mask_HW = np.asarray(Resize(size, mode="nearest-exact")(mask_HW[None].astype(np.float32)))[0] > 0
    return mask_HW


def _read_array(path: Path, where: str) -> np.ndarray:
    """The file's array as float32, without singleton axes, axes as the file has them."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            reader = _reader(path.name)
            array, _ = reader.get_data(reader.read(str(path)))
    except Exception as error:  # readers of four formats raise whatever they like; the answer is the same
        raise DataError(f"{where}: expected a readable image at {path}, got {type(error).__name__}: {error}.") from None
    return np.asarray(array, dtype=np.float32).squeeze()


def _reader(file_name: str) -> Any:
    """MONAI's reader for a file name; DICOM for names it does not know."""
    from monai.data.image_reader import NibabelReader, PILReader, PydicomReader

    if _is_nifti(Path(file_name)):
        return NibabelReader()
    if file_name.lower().endswith((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")):
        return PILReader(reverse_indexing=False)
    return PydicomReader(swap_ij=False)


def preprocess(array: np.ndarray, pixels: PixelSpec, *, where: str) -> Tensor:
    """The image a backbone expects, shape (C, H, W), float32; ``raw`` pixels keep any shape.

    Raises:
        DataError: if a voxel is NaN or infinite, or the image is not 2-D (optionally with channels first).
    """
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise DataError(f"{where}: expected finite voxels, got {bad} NaN or infinite ones; repair the image.")
    if pixels.intensity == "raw":
        return torch.from_numpy(array)
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[-1] in (3, 4):
        array = np.moveaxis(array[..., :3], -1, 0)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise DataError(f"{where}: expected a 2-D image, got shape {list(array.shape)}; export slices as 2-D files.")
    scaled_CHW = _intensity_transform(pixels)(array)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
    image_CHW = torch.as_tensor(np.asarray(scaled_CHW), dtype=torch.float32)
    if pixels.mean == (0.0, 0.0, 0.0) and pixels.std == (1.0, 1.0, 1.0):
        return image_CHW
    return (image_CHW - mean) / std


@lru_cache(maxsize=4)
def _intensity_transform(pixels: PixelSpec) -> Any:
    from monai.transforms import Compose, Resize, ScaleIntensityRangePercentiles

    steps: list[Any] = [ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True)]
    if pixels.image_size is not None:
        steps.append(Resize((pixels.image_size, pixels.image_size), mode="bilinear", anti_aliasing=True))
    return Compose(steps)


def _check_label(label_HW: np.ndarray, image: np.ndarray, path: Path, where: str, num_classes: int) -> None:
    """Refuse a label map with other values or another size than the image's."""
    values = np.unique(label_HW)
    if not np.isin(values, np.arange(num_classes + 1)).all():
        outside = next(value for value in values if value not in range(num_classes + 1))
        raise DataError(
            f"{where}: expected labels 0..{num_classes} in {path}, got {outside:g}; "
            "0 is background and i + 1 is the i-th of task.classes."
        )
    if label_HW.ndim != 2:
        raise DataError(f"{where}: expected a 2-D label map at {path}, got shape {list(label_HW.shape)}.")
    if label_HW.shape not in (image.shape[:2], image.shape[-2:]):
        raise DataError(
            f"{where}: expected a label map of the image's size {list(image.shape)}, got {list(label_HW.shape)}; "
            "resample the label map onto the image."
        )


def _resized_label(label_HW: np.ndarray, pixels: PixelSpec) -> np.ndarray:
    if pixels.image_size is not None and label_HW.shape != (pixels.image_size, pixels.image_size):
        from monai.transforms import Resize

        resized = Resize((pixels.image_size, pixels.image_size), mode="nearest-exact")(label_HW[None])
        label_HW = np.asarray(resized)[0]
    return label_HW.astype(np.int16)


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))
