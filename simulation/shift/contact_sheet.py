"""One page that shows what every family does: always the same patient, so that what differs is the shift.

Dimension key: H = rows, W = columns, 3 = red, green, blue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medfed.shift_profile import ShiftProfile, StainShift
from simulation.anatomy import load_anatomy
from simulation.cohort import CohortRecipe, Example, SiteRecipe, atlas_planes_of, examples_of
from simulation.overlays import COLOURS
from simulation.shift.print_style import FAINT, SMALL_PT, TEXT_PT, WIDTH_IN, figure, saved, styled
from simulation.shift.stain import restain

_SEED = 2026
_COLUMNS = 6
_GAP_IN, _TEXT_IN, _TOP_IN, _BOTTOM_IN = 0.1, 0.4, 0.45, 0.3
_STRUCTURES = ("thalamus-left", "putamen-right", "caudate-left", "hippocampus-right")


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: the family.
        setting: what it is set to, in words.
        families: the profile; empty is the reference.
    """

    title: str
    setting: str
    families: Mapping[str, Any]


def _both(value: float) -> tuple[float, float]:
    return (value, value)


PANELS = (
    Panel("none", "reference-3t", {}),
    Panel("contrast", "gamma 1.8", {"contrast": {"gamma": _both(1.8)}}),
    Panel("contrast", "histogram, 8 points", {"contrast": {"histogram_points": 8}}),
    Panel("bias_field", "strength 0.45", {"bias_field": {"strength": _both(0.45)}}),
    Panel("point_spread", "sigma 1.6 px", {"point_spread": {"sigma_px": _both(1.6)}}),
    Panel("resolution", "zoom 0.35", {"resolution": {"zoom": _both(0.35)}}),
    Panel("slice_thickness", "8 mm", {"slice_thickness": {"thickness_mm": 8.0}}),
    Panel("ghosting", "4 ghosts, intensity 0.7", {"ghosting": {"intensity": _both(0.7)}}),
    Panel("motion", "up to 6 px", {"motion": {"max_shift_px": _both(6.0)}}),
    Panel("gibbs", "alpha 0.7", {"gibbs": {"alpha": _both(0.7)}}),
    Panel("spikes", "amplitude 0.4", {"spikes": {"amplitude": _both(0.4)}}),
    Panel("noise", "Rician, sd 0.1", {"noise": {"sd": _both(0.1)}}),
    Panel("noise", "Gaussian, sd 0.1", {"noise": {"kind": "gaussian", "sd": _both(0.1)}}),
    Panel("window", "0.2 to 0.75", {"window": {"low": _both(0.2), "high": _both(0.75)}}),
    Panel("annotator", "margin 2.5 px", {"annotator": {"margin_px": _both(2.5)}}),
    Panel("annotator", "margin -1.5 px", {"annotator": {"margin_px": _both(-1.5)}}),
    Panel("annotator", "strays by 2 px", {"annotator": {"boundary_sd_px": 2.0}}),
    Panel("missing", "two classes", {"missing": {"classes": ("thalamus-left", "hippocampus-right")}}),
    Panel("demographics", "woman, 65-plus", {"demographics": {"female": 1.0, "age_groups": (0, 0, 1)}}),
    Panel("demographics", "woman, under 40", {"demographics": {"female": 1.0, "age_groups": (1, 0, 0)}}),
    Panel("demographics", "man, under 40", {"demographics": {"female": 0.0, "age_groups": (1, 0, 0)}}),
)
"""What the page shows, before stain."""


def draw_contact_sheet() -> Mapping[str, bytes]:
    """The page as ``svg`` and ``png``.

    Raises:
        MissingExtraError: the packages with the anatomy are not installed.
    """
    tiles: list[tuple[str, str, Callable[[Any], None]]] = [
        (panel.title, panel.setting, _drawn(_example(panel))) for panel in PANELS
    ]
    phantom_HW3 = stain_phantom()
    far = StainShift(scale=0.5, offset=0.05)
    generators = (np.random.default_rng(seed) for seed in (3, 8))
    tiles.append(("stain", "none; phantom", _shown(phantom_HW3)))
    tiles += [("stain", "HED, scale 0.5", _shown(restain(phantom_HW3, far, generator))) for generator in generators]
    num_rows = -(-len(tiles) // _COLUMNS)
    side_in = (WIDTH_IN - (_COLUMNS + 1) * _GAP_IN) / _COLUMNS
    height_in = _TOP_IN + num_rows * (side_in + _TEXT_IN) + _BOTTOM_IN
    with styled():
        page = figure(height_in)
        page.text(_GAP_IN / WIDTH_IN, 1 - 0.27 / height_in, "Shift families, one at a time", fontsize=TEXT_PT + 2)
        for number, (title, setting, draw) in enumerate(tiles):
            row, column = divmod(number, _COLUMNS)
            left_in = _GAP_IN + column * (side_in + _GAP_IN)
            top_in = _TOP_IN + row * (side_in + _TEXT_IN)
            bottom = (height_in - top_in - side_in) / height_in
            axes = page.add_axes((left_in / WIDTH_IN, bottom, side_in / WIDTH_IN, side_in / height_in))
            draw(axes)
            axes.set_axis_off()
            page.text(left_in / WIDTH_IN, bottom - 0.14 / height_in, title, fontsize=TEXT_PT, weight="bold")
            page.text(left_in / WIDTH_IN, bottom - 0.28 / height_in, setting, fontsize=SMALL_PT, color=FAINT)
        note = "Anatomy from 1 real brain (MNI152 average), one synthetic patient. The phantom is drawn, no slide."
        page.text(_GAP_IN / WIDTH_IN, 0.1 / height_in, note, fontsize=SMALL_PT, color=FAINT)
        return saved(page)


def stain_phantom(size_px: int = 192) -> npt.NDArray[np.uint8]:
    """Nuclei of haematoxylin in eosin, drawn by the law of Lambert and Beer; uint8 RGB with a white corner."""
    generator = np.random.default_rng(_SEED)
    rows_H1, columns_1W = np.mgrid[:size_px, :1][0], np.mgrid[:1, :size_px][1]
    nuclei_HW = np.zeros((size_px, size_px))
    for row, column, radius in generator.uniform((0, 0, 4), (size_px, size_px, 8), (70, 3)):
        nuclei_HW = np.maximum(nuclei_HW, np.hypot(rows_H1 - row, columns_1W - column) < radius)
    texture_HW = 0.5 + 0.15 * np.sin(rows_H1 / 7.0 + 2.5 * np.sin(columns_1W / 19.0))
    tissue_HW = rows_H1 + columns_1W > size_px / 3
    stains_HW2 = np.stack([1.1 * nuclei_HW, texture_HW * (1 - 0.6 * nuclei_HW)], axis=-1) * tissue_HW[..., None]
    vectors_23 = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    phantom_HW3: npt.NDArray[np.uint8] = np.rint(255 * np.exp(-stains_HW2 @ vectors_23)).astype(np.uint8)
    return phantom_HW3


def _example(panel: Panel) -> Example:
    shift = ShiftProfile.model_validate(panel.families) if panel.families else None
    site = SiteRecipe(name="sheet", scanner="reference-3t", train_patients=1, test_patients=0, shift=shift)
    recipe = CohortRecipe(kind="brain-structures", seed=_SEED, structures=_STRUCTURES, image_size=192, sites=(site,))
    anatomy = load_anatomy()
    return next(examples_of(recipe, site, 0, anatomy, atlas_planes_of(recipe, anatomy)))


def _drawn(example: Example) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.imshow(example.image_HW.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        for index in range(1, len(_STRUCTURES) + 1):
            mask_HW = (example.label_HW == index).astype(float)
            if mask_HW.any():
                axes.contour(mask_HW, levels=[0.5], colors=[COLOURS[index - 1]], linewidths=0.9)

    return draw


def _shown(image_HW3: npt.NDArray[np.uint8]) -> Callable[[Any], None]:
    return lambda axes: axes.imshow(image_HW3)
