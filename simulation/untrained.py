"""Outlines that a study does not train on: of the structures of a simulated cohort that its task leaves out.

They are made from the recipe again, of held-out patients alone, and kept beside the cohort: the cohort itself, which a
study's digest stands for, does not change. Whoever outlines them makes no mistakes, whatever the shifts of the sites.

A file holds one uint8 array for each held-out image, named ``<site>/<patient>/<image>``: 0 is background, i + 1 is
structure i of :func:`untrained_structures`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medfed.study import StudyConfig
from medfed.tasks.segmentation import MIN_STRUCTURE_AREA_PX
from server.checkpoint import write_durably
from server.evaluation import NotMeasured
from simulation.anatomy import load_anatomy, sided_structures, structure_labels
from simulation.cohort import CohortRecipe, atlas_planes_of, class_map, examples_of

VERSION = 1
"""Raised when the same recipe would give other outlines: files of another version are not read."""

MAX_TRIED = 2
"""Structures that are tried at most: an outline takes as long as one that was trained, and there are two of each."""

FRESH_HEAD = "a classifier's head is fresh, so before training there is no skill to forget"
OWN_DATA = "the data outlines the structures that the study trains, and no others"
NONE_LEFT = "the study trains every structure that the cohort has"
NONE_THERE = "no other structure lies in the held-out slices"


@dataclass(frozen=True)
class UntrainedOutlines:
    """Label maps of structures that a study does not train.

    Attributes:
        structures: their names, one side at a time, in class order; at most ``MAX_TRIED``.
        other_sides: those of them whose mirror image is trained.
        label_maps: site -> patient id -> uint8 [H, W] of each of the patient's images, in order.
    """

    structures: tuple[str, ...]
    other_sides: frozenset[str]
    label_maps: Mapping[str, Mapping[str, Sequence[npt.NDArray[np.uint8]]]]


def untrained_structures(trained: Sequence[str]) -> tuple[str, ...]:
    """The structures of the anatomy, one side at a time, that are in none of the trained ones."""
    taken = frozenset[int]().union(*(structure_labels(name) for name in trained))
    return tuple(name for name in sided_structures() if not structure_labels(name) & taken)


def untrained_outlines(
    study: StudyConfig, recipe: CohortRecipe | None, folder: Path
) -> UntrainedOutlines | NotMeasured:
    """What a study's held-out patients have besides what it trains, made if it is not there yet.

    Args:
        study: resolved.
        recipe: of its cohort; None for the user's own data.
        folder: where label maps are kept.

    Returns:
        Or why there is none.

    Raises:
        MissingExtraError: the packages with the anatomy are not installed.
    """
    if study.task.kind == "classification":
        return NotMeasured(why=FRESH_HEAD)
    if recipe is None:
        return NotMeasured(why=OWN_DATA)
    structures = untrained_structures(recipe.structures)
    if not structures:
        return NotMeasured(why=NONE_LEFT)
    path = folder / f"{recipe.digest[:32]}-v{VERSION}.npz"
    maps = _read(path) if path.is_file() else None
    if maps is None:
        maps = _made(recipe, structures)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **maps)  # type: ignore[arg-type]  # its stub takes the names for its own options
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, buffer.getvalue())
    return _tried(structures, recipe.structures, maps)


def _tried(
    structures: tuple[str, ...], trained: tuple[str, ...], maps: Mapping[str, npt.NDArray[np.uint8]]
) -> UntrainedOutlines | NotMeasured:
    """The structures to try: in turn one that is trained on neither side and one whose mirror image is trained.

    Of each kind those first that the most images show; what no image shows is not tried.
    """
    is_shown = [
        np.bincount(label_HW.ravel(), minlength=len(structures) + 1)[1:] >= MIN_STRUCTURE_AREA_PX
        for label_HW in maps.values()
    ]
    num_images = dict(zip(structures, np.sum(is_shown, axis=0).tolist(), strict=True))
    shown = sorted((name for name in structures if num_images[name]), key=lambda name: -num_images[name])
    sideless = {name.rpartition("-")[0] for name in trained}
    mirrored = [name for name in shown if name.rpartition("-")[0] in sideless]
    others = [name for name in shown if name not in mirrored]
    in_turn = [name for pair in zip_longest(others, mirrored) for name in pair if name is not None]
    tried = tuple(in_turn[:MAX_TRIED])
    if not tried:
        return NotMeasured(why=NONE_THERE)
    class_of_label = np.array([0, *(tried.index(name) + 1 if name in tried else 0 for name in structures)], np.uint8)
    return UntrainedOutlines(
        structures=tried,
        other_sides=frozenset(mirrored) & set(tried),
        label_maps=_by_patient({name: class_of_label[label_HW] for name, label_HW in maps.items()}),
    )


def _made(recipe: CohortRecipe, structures: tuple[str, ...]) -> dict[str, npt.NDArray[np.uint8]]:
    anatomy = load_anatomy()
    planes = atlas_planes_of(recipe, anatomy)
    maps = {}
    for site in recipe.sites:
        last = site.after_drift or site  # after the last round sites hold what their last scanner sees
        for number in range(site.train_patients, site.train_patients + site.test_patients):
            for index, example in enumerate(examples_of(recipe, last, number, anatomy, planes)):
                maps[f"{site.name}/{site.name}-{number:04d}/{index}"] = class_map(example.bare, structures)
    return maps


def _read(path: Path) -> dict[str, npt.NDArray[np.uint8]] | None:
    """None if the file is damaged: it is then made again."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _by_patient(
    maps: Mapping[str, npt.NDArray[np.uint8]],
) -> dict[str, dict[str, list[npt.NDArray[np.uint8]]]]:
    found: dict[str, dict[str, list[npt.NDArray[np.uint8]]]] = {}
    for name, label_HW in maps.items():
        site, patient, _ = name.split("/")
        found.setdefault(site, {}).setdefault(patient, []).append(label_HW)
    return found
