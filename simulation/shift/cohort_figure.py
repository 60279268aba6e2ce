"""The picture of a study's cohorts: one row for each site, example images, what is annotated, who the patients are.

Images are the first training patients in the order of the manifest, never chosen. Bars are shares of a site's training
images, on one scale for all sites, so that a difference between rows is one between hospitals.

Legend: H rows, W columns, M structures of an image.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data import Cohort, Item
from medfed.models.pixels import PixelSpec
from medfed.study import StudyConfig
from medfed.study_sections import SegmentationConfig
from simulation.overlays import COLOURS, Upright, displayable
from simulation.shift.print_style import (
    BAR,
    DPI,
    FAINT,
    INK,
    PEOPLE,
    SMALL_PT,
    TEXT_PT,
    WIDTH_IN,
    figure,
    saved,
    styled,
)

_NUM_EXAMPLES = 4
_ATTRIBUTES = ("attribute_sex", "attribute_age_group")
_NAME_IN, _TOP_IN, _BOTTOM_IN, _GAP_IN = 1.45, 0.55, 0.5, 0.12
_BARS_LABEL_IN, _BARS_IN, _NUMBER_IN, _BAR_IN = 1.3, 1.6, 0.95, 0.16


@dataclass(frozen=True)
class ShownSite:
    """One row of the figure.

    Attributes:
        name: the site.
        described: short lines under its name.
        cohort: its images.
        manifest: where attributes of patients are.
    """

    name: str
    described: tuple[str, ...]
    cohort: Cohort
    manifest: Path


def draw_cohort(
    study: StudyConfig, sites: Sequence[ShownSite], pixels: PixelSpec, provenance: str
) -> Mapping[str, bytes]:
    """The figure as ``svg`` and ``png``.

    Args:
        study: what labels mean.
        sites: rows, from the top.
        pixels: how images were preprocessed.
        provenance: where they come from; said under the figure.
    """
    shares = {site.name: _labels(study, site.cohort) for site in sites}
    areas_px = {site.name: _areas_px(study, site.cohort) for site in sites}
    attributes = {site.name: _attributes(site) for site in sites}
    side_in = (WIDTH_IN - _NAME_IN - _BARS_LABEL_IN - _BARS_IN - _NUM_EXAMPLES * _GAP_IN) / _NUM_EXAMPLES
    most_bars = max(len(shares[site.name]) + len(attributes[site.name]) + 1 for site in sites)
    row_in = max(side_in, _BAR_IN * most_bars + _GAP_IN) + _GAP_IN
    height_in = _TOP_IN + row_in * len(sites) + _BOTTOM_IN
    with styled():
        page = figure(height_in)

        def place(left_in: float, top_in: float, width_in: float, tall_in: float) -> Any:
            bottom_in = height_in - top_in - tall_in
            return page.add_axes(
                (left_in / WIDTH_IN, bottom_in / height_in, width_in / WIDTH_IN, tall_in / height_in)
            )  # fmt: skip

        bars_left_in = _NAME_IN + _NUM_EXAMPLES * (side_in + _GAP_IN) + _BARS_LABEL_IN
        for number, site in enumerate(sites):
            top_in = _TOP_IN + number * row_in
            _write_name(page, site, top_in / height_in, row_in / height_in)
            upright = Upright(study, site.manifest)
            for index, item in enumerate(_examples(site.cohort)):
                axes = place(_NAME_IN + index * (side_in + _GAP_IN), top_in, side_in, side_in)
                _draw_image(axes, study, item, pixels, upright)
            labels, people = shares[site.name], attributes[site.name]
            axes = place(bars_left_in, top_in, _BARS_IN - _NUMBER_IN, _BAR_IN * len(labels))
            _draw_bars(axes, labels, _bar_colours(study), areas_px[site.name])
            if people:
                below_in = top_in + _BAR_IN * (len(labels) + 0.6)
                axes = place(bars_left_in, below_in, _BARS_IN - _NUMBER_IN, _BAR_IN * len(people))
                _draw_bars(axes, people, dict.fromkeys(people, PEOPLE), {})
        heading = 1 - 0.42 / height_in
        page.text(_NAME_IN / WIDTH_IN, heading, "first training patients", fontsize=TEXT_PT)
        page.text(bars_left_in / WIDTH_IN, heading, "share of training images, %", fontsize=TEXT_PT, ha="center")
        sized = ", with the mean area of an outline" if isinstance(study.task, SegmentationConfig) else ""
        note = f"{study.name}. {provenance} Bars: of each site's own{sized}; grey: of patients."
        page.text(0.008, 0.16 / height_in, note, fontsize=SMALL_PT, color=FAINT, parse_math=False)
        return saved(page)


def _examples(cohort: Cohort) -> list[Item]:
    """The first image of the first training patients."""
    first: dict[str, Item] = {}
    for item in cohort.train:
        first.setdefault(item.patient_id, item)
    return list(first.values())[:_NUM_EXAMPLES]


def _labels(study: StudyConfig, cohort: Cohort) -> dict[str, float]:
    """Share of training images by what is annotated: structures, or classes of every target."""
    total = len(cohort.train)
    if isinstance(study.task, SegmentationConfig):
        present = Counter(index for item in cohort.train for index in item.annotation.class_M.tolist())
        return {name: present[index] / total for index, name in enumerate(study.task.classes)}
    shares: dict[str, float] = {}
    for target, classes in study.task.targets.items():
        found = Counter(item.annotation[target] for item in cohort.train)
        shares |= {f"{target}: {name}": found[index] / total for index, name in enumerate(classes)}
    return shares


def _areas_px(study: StudyConfig, cohort: Cohort) -> dict[str, float]:
    """Mean area of each structure where it is annotated; empty for classification."""
    if not isinstance(study.task, SegmentationConfig):
        return {}
    areas: dict[str, list[int]] = {name: [] for name in study.task.classes}
    for item in cohort.train:
        for index, mask_HW in zip(item.annotation.class_M.tolist(), item.annotation.mask_MHW, strict=True):
            areas[study.task.classes[index]].append(int((mask_HW > 0).sum()))
    return {name: float(np.mean(found)) for name, found in areas.items() if found}


def _attributes(site: ShownSite) -> dict[str, float]:
    """Share of training patients by attribute, of the columns that the manifest has."""
    with site.manifest.open(newline="", encoding="utf-8-sig") as file:
        rows = {row["patient_id"]: row for row in csv.DictReader(file) if (row.get("split") or "").strip() == "train"}
    shares: dict[str, float] = {}
    for column in _ATTRIBUTES:
        found = Counter(row[column] for row in rows.values() if row.get(column))
        shares |= {
            f"{column.removeprefix('attribute_').replace('_', ' ')}: {name}": found[name] / len(rows)
            for name in sorted(found)
        }
    return shares


def _write_name(page: Any, site: ShownSite, from_top: float, row: float) -> None:
    patients = {split: len({item.patient_id for item in getattr(site.cohort, split)}) for split in ("train", "test")}
    name, _, when = site.name.partition(", ")
    lines = [*([when] if when else []), f"{patients['train']} + {patients['test']} patients", *site.described]
    top = 1.0 - from_top
    height_in = page.get_size_inches()[1]
    page.text(0.008, top, name, fontsize=TEXT_PT + 1, weight="bold", va="top", parse_math=False)
    step = min(0.145 / height_in, (row - 0.2 / height_in) / max(len(lines), 1))
    for number, line in enumerate(lines):
        where = top - 0.2 / height_in - number * step
        page.text(0.008, where, line, fontsize=SMALL_PT, color=FAINT, va="top", parse_math=False)


def _draw_image(axes: Any, study: StudyConfig, item: Item, pixels: PixelSpec, upright: Upright) -> None:
    image_HW = upright(displayable(item.image_CHW, pixels))
    axes.imshow(image_HW, cmap="gray", vmin=0.0, vmax=1.0, interpolation="antialiased")
    axes.set_axis_off()
    if not isinstance(study.task, SegmentationConfig):
        return
    for index, mask_HW in zip(item.annotation.class_M.tolist(), item.annotation.mask_MHW.numpy(), strict=True):
        outline_HW = upright(np.asarray(mask_HW, dtype=np.float32))
        if 0.0 < float(outline_HW.mean()) < 1.0:
            axes.contour(outline_HW, levels=[0.5], colors=[COLOURS[index % len(COLOURS)]], linewidths=70.0 / DPI * 2)


def _draw_bars(
    axes: Any, shares: Mapping[str, float], colours: Mapping[str, str], sizes_px: Mapping[str, float]
) -> None:
    names = list(shares)
    axes.barh(range(len(names)), [100 * shares[name] for name in names], height=0.7,
              color=[colours.get(name, BAR) for name in names])  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=SMALL_PT, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    for row, name in enumerate(names):
        size = f" ({sizes_px[name]:.0f} px)" if name in sizes_px else ""
        axes.annotate(f"{100 * shares[name]:.0f}{size}", (100 * shares[name], row), xytext=(2, 0),
                      textcoords="offset points", va="center", fontsize=SMALL_PT, color=INK)  # fmt: skip


def _bar_colours(study: StudyConfig) -> dict[str, str]:
    if not isinstance(study.task, SegmentationConfig):
        return {}
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(study.task.classes)}
