"""A site's cohort: its manifest and images, checked as a whole and ready to train on.

A cohort is a manifest (:mod:`client.manifest`) and the files that it names (:mod:`client.images`). A manifest that
breaks a rule is refused as a whole, with the row and what to change; nothing trains on the rest of it.

Legend: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.images import check_label_map, read_image, read_label_map, refuse_other_axes
from client.manifest import Labelling, Row, printable, read_manifest, refuse_patients_in_two_splits
from client.spacing import Spacing, pixel_spacing_mm
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import DataError
from medfed.models.pixels import PixelSpec
from medfed.study_sections import SegmentationConfig
from medfed.tasks.segmentation import annotate


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

    @cached_property
    def num_train_patients(self) -> int:
        """Patients for training."""
        return len({item.patient_id for item in self.train})

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
    task: Labelling,
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
    rows = [row for manifest in manifests for row in read_manifest(manifest, task)]
    refuse_patients_in_two_splits(rows)
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


def _read_item(row: Row, site_id: str, task: Labelling, pixels: PixelSpec) -> Item:
    array = read_image(row.image, where=row.where).array
    image_CHW = preprocess(array, pixels, where=f"{row.where}: {printable(row.image)}")
    reference = canonical_bytes(dict(row.targets))
    annotation: Any = dict(row.targets)
    if isinstance(task, SegmentationConfig):
        assert row.label is not None
        refuse_other_axes(row.image, row.label, row.where)
        label_HW = read_label_map(row.label, where=row.where).array
        check_label_map(label_HW, array, row.label, row.where, len(task.classes))
        annotation = annotate(resized_label(label_HW, pixels), len(task.classes))
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
    mask_HW = read_image(item.expert_mask, where=printable(item.expert_mask)).array > 0
    if mask_HW.ndim != 2:
        raise DataError(
            f"Expected a 2-D mask at {item.expert_mask}, got shape {list(mask_HW.shape)}; export 2-D files."
        )
    size = tuple(item.image_CHW.shape[-2:])
    if mask_HW.shape != size:
        from monai.transforms import Resize

        mask_HW = np.asarray(Resize(size, mode="nearest-exact")(mask_HW[None].astype(np.float32)))[0] > 0
    return mask_HW


def preprocess(array: np.ndarray, pixels: PixelSpec, *, where: str) -> Tensor:
    """The image a backbone expects, shape (C, H, W), float32; ``raw`` pixels keep any shape.

    Raises:
        DataError: if a voxel is NaN or infinite, or the image is not 2-D (optionally with channels first).
    """
    refuse_not_finite(array, where=where)
    if pixels.intensity == "raw":
        return torch.from_numpy(array)
    scaled_CHW = _intensity_transform(pixels)(channels_first(array, where=where))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
    image_CHW = torch.as_tensor(np.asarray(scaled_CHW), dtype=torch.float32)
    if pixels.mean == (0.0, 0.0, 0.0) and pixels.std == (1.0, 1.0, 1.0):
        return image_CHW
    return (image_CHW - mean) / std


def refuse_not_finite(array: np.ndarray, *, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: one line that starts with ``where``.
    """
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise DataError(f"{where}: expected finite voxels, got {bad} NaN or infinite ones; repair the image.")


def channels_first(array: np.ndarray, *, where: str) -> np.ndarray:
    """A 2-D image as (1, H, W) or (3, H, W), whichever way its colours were stored; a fourth channel is dropped.

    Raises:
        DataError: one line that starts with ``where``, if it is no 2-D image.
    """
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[-1] in (3, 4):
        array = np.moveaxis(array[..., :3], -1, 0)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise DataError(f"{where}: expected a 2-D image, got shape {list(array.shape)}; export slices as 2-D files.")
    return array


@lru_cache(maxsize=4)
def _intensity_transform(pixels: PixelSpec) -> Any:
    from monai.transforms import Compose, Resize, ScaleIntensityRangePercentiles

    steps: list[Any] = [ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True)]
    if pixels.image_size is not None:
        steps.append(Resize((pixels.image_size, pixels.image_size), mode="bilinear", anti_aliasing=True))
    return Compose(steps)


def resized_label(label_HW: np.ndarray, pixels: PixelSpec) -> np.ndarray:
    """A label map at the size of the preprocessed image, int16; every pixel keeps a label that was there."""
    if pixels.image_size is not None and label_HW.shape != (pixels.image_size, pixels.image_size):
        from monai.transforms import Resize

        resized = Resize((pixels.image_size, pixels.image_size), mode="nearest-exact")(label_HW[None])
        label_HW = np.asarray(resized)[0]
    return label_HW.astype(np.int16)
