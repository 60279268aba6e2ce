"""Every image of a site opened once, good and bad: what a preflight counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.data import channels_first, refuse_not_finite
from client.images import check_label_map, read_image, read_label_map, refuse_other_axes
from client.manifest import Labelling, Row, inspect_manifest
from medfed.canonical import sha256_hex
from medfed.errors import DataError
from medfed.study_sections import SegmentationConfig

Progress = Callable[[int, int], None]
"""Told how many images of how many were opened."""


@dataclass(frozen=True)
class Opened:
    """What was found in one image and its label.

    Attributes:
        row: of the manifest.
        shape: of the image.
        spacing_mm: as :class:`~client.images.Picture` has it.
        orientation: likewise.
        digest: SHA-256 of the pixels, the same whatever file format they are stored in.
        is_constant: whether all pixels have one value.
        class_pixels: segmentation: pixels of each class, in its order.
    """

    row: Row
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float] | None
    orientation: str | None
    digest: str
    is_constant: bool
    class_pixels: tuple[int, ...] = ()


@dataclass
class Findings:
    """All rows and images of a site, good and bad."""

    rows: list[Row] = field(default_factory=list)
    broken_rows: list[DataError] = field(default_factory=list)
    images: list[Opened] = field(default_factory=list)
    broken_images: list[DataError] = field(default_factory=list)


def survey(manifests: Sequence[Path], task: Labelling | None, on_progress: Progress | None = None) -> Findings:
    """Read the manifests and open every image once; labels are looked at if there is a task."""
    findings = Findings()
    for manifest in manifests:
        rows, problems = inspect_manifest(manifest, task)
        findings.rows += rows
        findings.broken_rows += problems
    for number, row in enumerate(findings.rows, start=1):
        try:
            findings.images.append(_open(row, task))
        except DataError as error:
            findings.broken_images.append(error)
        if on_progress is not None:
            on_progress(number, len(findings.rows))
    return findings


def _open(row: Row, task: Labelling | None) -> Opened:
    picture = read_image(row.image, where=row.where)
    array = picture.array
    refuse_not_finite(array, where=f"{row.where}: {row.image.name!r}")
    channels_first(array, where=f"{row.where}: {row.image.name!r}")
    class_pixels: tuple[int, ...] = ()
    if isinstance(task, SegmentationConfig):
        assert row.label is not None
        refuse_other_axes(row.image, row.label, row.where)
        label_HW = read_label_map(row.label, where=row.where).array
        check_label_map(label_HW, array, row.label, row.where, len(task.classes))
        counted = np.bincount(label_HW.astype(np.int64).ravel(), minlength=len(task.classes) + 1)
        class_pixels = tuple(int(number) for number in counted[1:])
    return Opened(
        row=row,
        shape=array.shape,
        spacing_mm=picture.spacing_mm,
        orientation=picture.orientation,
        digest=sha256_hex(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()),
        is_constant=bool((array == array.flat[0]).all()),
        class_pixels=class_pixels,
    )
