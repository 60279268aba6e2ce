"""Studies without a shift keep their cohorts: the digests here were printed by the code before there were shifts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medfed.study import read_study
from simulation.cohort import CohortRecipe, write_cohort
from simulation.harness import recipe_of

EXAMPLES = Path(__file__).parents[3] / "examples"

DIGESTS = {
    "brain-structures": (
        "81c347b6011b579f3fa8c3d65f7de6c201ea97d62f306688d44a47001ee18638",
        "7f0c071005571e443597b7abe4c5e5eb31e733de4e9ab327c6d4f8fce6658042",
    ),
    "brain-structures-private": (
        "808ed9eb175f58fab38147a3884c6e320f7744caa68137964099ac43da2237d6",
        "8bd5dc13012cfe5118fe2f341dca7800f01183347c96ca3fc532d9db2db360fa",
    ),
    "brain-structures-consortium": (
        "4bf4883fa137956ada0703f9dbbee6c25f74d42d23cc02b35b4d81ad314a0b41",
        "8e06aca4abd1ba30e5512ffcd3dd09061b3537905bfd1037672e5413f2e3d5a8",
    ),
    "lesion-classification": (
        "99486e920f00db975b650381d4aba983710571701739f50fae5337ec24023fb8",
        "88d2bf04fb7fa8e92937ed0fd8a97c130d1bccf4c2174bbb12dfa7425b4ed38e",
    ),
}
"""Of the study, and of its cohort's recipe."""

PIXELS = {
    "brain-structures": "8502e8da638f6e96683f3d4c1c891d8687602acc85500bfdccec6cae4f29d58b",
    "lesion-classification": "8ac3fc4c7b2cb4a6e719ae3b22a00d2102f6034df8061bd8dec07d4b4a1a93c2",
}
"""Of pixels, labels and manifests of the first patients."""


@pytest.mark.parametrize("name", DIGESTS)
def test_study_and_recipe_of_an_example_are_those_that_the_numbers_in_the_readme_come_from(name: str) -> None:
    study = read_study(EXAMPLES / f"{name}.toml")
    assert (study.digest, recipe_of(study).digest) == DIGESTS[name]


@pytest.mark.weights
@pytest.mark.parametrize(("name", "train", "sites"), [("brain-structures", 1, 4), ("lesion-classification", 2, 2)])
def test_pixels_of_an_example_are_those_from_before_shifts(name: str, train: int, sites: int, tmp_path: Path) -> None:
    recipe = recipe_of(read_study(EXAMPLES / f"{name}.toml"))
    first = [site.model_copy(update={"train_patients": train, "test_patients": 1}) for site in recipe.sites[:sites]]
    write_cohort(recipe.model_copy(update={"sites": tuple(first)}), tmp_path / "cohort")
    assert pixels_and_manifests(tmp_path / "cohort") == PIXELS[name]


def test_site_without_a_shift_does_not_mention_one() -> None:
    recipe = recipe_of(read_study(EXAMPLES / "brain-structures.toml"))
    assert "shift" not in recipe.model_dump_json()
    assert CohortRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def pixels_and_manifests(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.nii.gz")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(np.asarray(nibabel.load(path).dataobj.get_unscaled()).tobytes())
    for path in sorted(folder.rglob("manifest.csv")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
