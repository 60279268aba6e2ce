"""Patients who are in nobody's cohort, made as those of a simulated site were: for attacks that need non-members."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from client.data import Item, load_cohort
from medfed.study import StudyConfig
from simulation.audit.scene import Scene
from simulation.cohort import CohortRecipe, write_cohort
from simulation.harness import recipe_of


def newcomers(scene: Scene, count: int, *, done: Callable[[], None] = lambda: None) -> tuple[Item, ...]:
    """Images of so many patients beyond the site's own, with its scanner, shift and prevalence.

    A patient draws from a generator of its own, so the site's patients are made again, byte for byte, and left out.

    Args:
        scene: of a study with a cohort.
        count: of patients, >= 0.
        done: called after each patient that was made, the site's own among them.

    Raises:
        MedfedError: as making a cohort does.
    """
    if count == 0:
        return ()
    recipe = _recipe(scene.study, scene.site.name, count)
    own = {item.patient_id for item in scene.cohort.items}
    with tempfile.TemporaryDirectory(prefix="medfed-audit-") as folder:
        manifests = write_cohort(recipe, Path(folder) / "cohort", progress=lambda _done: done())
        cohort = load_cohort(
            scene.site.name, [manifests[scene.site.name]], scene.study.task, scene.model.pixels
        )  # reads all pixels: the folder may go
    return tuple(item for item in cohort.items if item.patient_id not in own)


def num_made(scene: Scene, count: int) -> int:
    """How often ``done`` of :func:`newcomers` is called."""
    return 0 if count == 0 else _recipe(scene.study, scene.site.name, count).num_patients


def _recipe(study: StudyConfig, name: str, count: int) -> CohortRecipe:
    """The study's own recipe, of this site alone and with more held-out patients; its scanner is not replaced."""
    recipe = recipe_of(study)
    (site,) = (site for site in recipe.sites if site.name == name)
    shift = None if site.shift is None else site.shift.model_copy(update={"drift": None})
    more = {"test_patients": site.test_patients + count, "shift": shift}
    return recipe.model_copy(update={"sites": (site.model_copy(update=more),)})
