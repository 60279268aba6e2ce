"""Pictures for the report: what the adapter changes on one held-out patient of every site.

Patients are taken in the order of the manifest, never chosen for their result. The figures have a black
background, as a viewing station has, so that they look the same on a light and on a dark page.

Legend: C channels, H height, W width, N structures of one image, P elements of the adapter.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.data import Item
from client.site import Site
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.models.pixels import PixelSpec
from medfed.study import POOLED_SITE, StudyConfig
from medfed.study_sections import ClassificationConfig, SegmentationConfig, SiteConfig
from medfed.tasks.segmentation import SegmentationAnnotation, SegmentationTask, dice_score
from server.checkpoint import write_durably
from simulation.inspection import SiteState

_MIN_CLASSIFIED, _MAX_CLASSIFIED = 4, 6
# A figure is as wide as the report's text column at twice its resolution in print.
_WIDTH_IN, _DPI = 8.0, 130
_LINE_IN, _POINTS_PER_IN = 0.15, 72
_MARGIN_PX = 14
_BLACK, _WHITE = "#000000", "#e8e8e8"
_RIGHT, _WRONG = "#6fd08c", "#ff8c8c"
# Okabe and Ito 2008, in the order in which they are brightest on grey tissue.
COLOURS = ("#e69f00", "#56b4e9", "#f0e442", "#cc79a7", "#009e73", "#d55e00", "#4d8fd6")

_Image = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]


def draw_overlays(
    folder: Path, study: StudyConfig, sites: Sequence[Site], model: AdaptedModel, final: SiteState
) -> None:
    """Write ``overlay-<site>.png`` for each site of the study, and ``captions.json``.

    Segmentation shows the first held-out image with a structure: image, reference, before, after. A site
    without one has no picture. Classification shows the first held-out images with what was predicted.

    Args:
        folder: figures folder of the run; made if it is not there.
        study: the study.
        sites: as opened; the pooled one is passed over.
        model: its adapter is put back afterwards.
        final: the model of a site after the last round.
    """
    described = {site.name: site for site in study.sites}
    before_P = model.read()
    model.train(False)
    captions = []
    try:
        for site in sites:
            if site.name == POOLED_SITE:
                continue
            drawn = _draw_site(study, site, model, final(site))
            if drawn is None:
                continue
            png, what = drawn
            file = f"overlay-{site.name}.png"
            write_durably(folder / file, png)
            whose = _whose(study, described[site.name])
            captions.append({"file": file, "title": site.name, "caption": f"{whose}. {what}"})
    finally:
        model.load(before_P)
    write_durably(folder / "captions.json", json.dumps(captions, indent=2).encode())


def _draw_site(study: StudyConfig, site: Site, model: AdaptedModel, final: ModelState) -> tuple[bytes, str] | None:
    """A PNG and what it shows; None if no held-out image of the site has something to show."""
    held_out = site.cohort(study, model.pixels).test
    upright = Upright(study, site.manifests[0])
    if isinstance(study.task, ClassificationConfig):
        items = held_out[:_MAX_CLASSIFIED]
        return _draw_classified(study.task, items, site, model, final, upright), (
            "First held-out images, in manifest order, with the true class and what the federated adapter predicts."
        )
    item = next((item for item in held_out if len(item.annotation.class_M)), None)
    if item is None:
        return None
    return _draw_segmented(study.task, item, site, model, final, upright), (
        "First held-out image: the whole slice; enlarged, the reference, and what is outlined before training and "
        "after the last federated round, with the mean Dice over its structures."
    )


def _draw_segmented(
    config: SegmentationConfig,
    item: Item,
    site: Site,
    model: AdaptedModel,
    final: ModelState,
    upright: Upright,
) -> bytes:
    from matplotlib.patches import Patch, Rectangle

    annotation: SegmentationAnnotation = item.annotation
    truth_NHW = annotation.mask_MHW.numpy()
    panels = [("reference", truth_NHW)]
    for name, state in (("before", ModelState(model.initial_P)), ("after", final)):
        predicted_NHW, dice = _segment(config, item, site, model, state)
        panels.append((f"{name}: Dice {dice:.3f}", predicted_NHW))
    image_HW = upright(displayable(item.image_CHW, model.pixels))
    turned = [(title, np.stack([upright(mask_HW) for mask_HW in masks])) for title, masks in panels]
    rows, columns = _region(np.any(turned[0][1], axis=0))

    figure = _figure(height_in=2.6)
    whole, *zoomed = figure.subplots(1, 4)
    _show(whole, image_HW, "image")
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    whole.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_WHITE, linewidth=0.8))
    for axes, (title, masks_NHW) in zip(zoomed, turned, strict=True):
        _show(axes, image_HW[rows, columns], title)
        for index, mask_HW in zip(annotation.class_M.tolist(), masks_NHW, strict=True):
            _outline(axes, mask_HW[rows, columns], _colour(index))
    present = dict.fromkeys(annotation.class_M.tolist())
    figure.legend(
        handles=[Patch(color=_colour(index), label=config.classes[index]) for index in present],
        loc="outside lower center",
        ncols=min(len(present), 6),
        frameon=False,
        labelcolor=_WHITE,
        fontsize=9,
    )
    return packed_png(figure)


def _segment(
    config: SegmentationConfig, item: Item, site: Site, model: AdaptedModel, state: ModelState
) -> tuple[_Mask, float]:
    """Masks (N, H, W) that the model predicts in a state, and their mean Dice."""
    task = SegmentationTask(config)
    model.put(state)
    target = task.collate([item.annotation], model.device)
    with torch.no_grad():
        predicted_NHW = task.logits(model, site.features.features_of(item, model)[None], target) > 0
        dice = float(dice_score(predicted_NHW, target.mask_NHW).mean())
    return predicted_NHW.cpu().numpy(), dice


def _draw_classified(
    config: ClassificationConfig,
    items: Sequence[Item],
    site: Site,
    model: AdaptedModel,
    final: ModelState,
    upright: Upright,
) -> bytes:
    model.put(final)
    with torch.no_grad():
        features = torch.stack([site.features.features_of(item, model) for item in items])
        logits = model.backbone.classify(model.embed(features))
    predicted = {name: logits[name].argmax(dim=1).tolist() for name in config.targets}

    num_columns = max(len(items), _MIN_CLASSIFIED)
    text_in = _LINE_IN * (3 * len(config.targets) + 1)
    height_in = _WIDTH_IN / num_columns + text_in
    figure = _figure(height_in=height_in, layout=None)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=text_in / height_in, wspace=0.06)
    for index, item in enumerate(items):
        axes = figure.add_subplot(1, num_columns, index + 1)
        _show(axes, upright(displayable(item.image_CHW, model.pixels)), "")
        for number, (target, classes) in enumerate(config.targets.items()):
            truth, guess = item.annotation[target], predicted[target][index]
            axes.annotate(
                f"{target}\ntrue: {classes[truth]}\npredicted: {classes[guess]} {'✓' if truth == guess else '✗'}",
                (0.5, 0.0),
                xytext=(0, -_POINTS_PER_IN * _LINE_IN * (3 * number + 0.4)),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7.5,
                color=_RIGHT if truth == guess else _WRONG,
                parse_math=False,
            )
    return packed_png(figure)


def displayable(image_CHW: Tensor, pixels: PixelSpec) -> _Image:
    """Grey levels in [0, 1], shape (H, W): the backbone's normalisation undone, channels averaged.

    An image that is constant is black.
    """
    num_channels = image_CHW.shape[0]
    mean, std = (torch.tensor(values)[:num_channels].view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    grey_HW = (image_CHW.float() * std + mean).mean(dim=0)
    low, high = float(grey_HW.min()), float(grey_HW.max())
    if high <= low:
        return np.zeros(tuple(grey_HW.shape), dtype=np.float32)
    levels: _Image = ((grey_HW - low) / (high - low)).numpy()
    return levels


class Upright:
    """Turns arrays as they were read into rows by columns as people look at them.

    A simulated cohort holds them that way, and so do all formats of a user's own files but NIfTI: there the
    axes are [x, y], and y usually runs upwards on the screen. Orientation matters for the picture alone.
    """

    def __init__(self, study: StudyConfig, manifest: Path) -> None:
        own = study.cohort is None
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            name = next(csv.DictReader(file))["image"].strip() if own else ""
        self._is_nifti = name.endswith((".nii", ".nii.gz"))

    def __call__(self, array_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array as people look at it."""
        return array_HW.T[::-1] if self._is_nifti else array_HW


def _region(mask_HW: _Mask) -> tuple[slice, slice]:
    """Rows and columns of a square around all structures, inside of the image."""
    edges = [np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0)]
    side = max(int(edge[-1] - edge[0]) + 1 for edge in edges) + 2 * _MARGIN_PX
    side = min(side, *mask_HW.shape)
    slices = []
    for edge, length in zip(edges, mask_HW.shape, strict=True):
        start = (int(edge[0]) + int(edge[-1]) + 1 - side) // 2
        start = min(max(start, 0), length - side)
        slices.append(slice(start, start + side))
    return slices[0], slices[1]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _figure(*, height_in: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI, facecolor=_BLACK, layout=layout)


def _show(axes: Any, image_HW: _Image, title: str) -> None:
    axes.imshow(image_HW, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title, color=_WHITE, fontsize=9)
    axes.set_axis_off()


def _outline(axes: Any, mask_HW: _Mask, colour: str) -> None:
    """A faint fill and a sharp line; nothing for an empty mask."""
    if not mask_HW.any():
        return
    from matplotlib.colors import to_rgba

    fill_HW4 = np.zeros((*mask_HW.shape, 4), dtype=np.float32)
    fill_HW4[mask_HW] = to_rgba(colour, 0.25)
    axes.imshow(fill_HW4, interpolation="nearest")
    if not mask_HW.all():
        axes.contour(mask_HW.astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.1)


def packed_png(figure: Any) -> bytes:
    """The figure as a PNG of 256 colours: a quarter of the size, and no difference to see on grey images."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def _whose(study: StudyConfig, site: SiteConfig) -> str:
    if study.cohort is None:
        return f"Held-out patient of site {site.name}, from the user's own data"
    drift = site.shift.drift if site.shift else None
    scanner = drift.scanner if drift else site.scanner  # the last, as pictures are of the last round
    return f"Virtual patient of site {site.name}, scanner {scanner}; the patient's left is on the right"
