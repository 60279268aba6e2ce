"""Studies without a shift keep their cohorts: the digests here were printed by the code before there were shifts."""

from __future__ import annotations

import hashlib
import json
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

BLOCKS = json.loads(Path(__file__).with_name("old_cohorts.json").read_text())
"""Of the first patients, by example and file: mean grey level of 4 x 4 blocks of an image, pixels of each class of a
label map; and a digest of the manifests.

Pixels have no digest: matrix products differ in their last bit between processors, and with it a pixel here and there
by one of 255 grey levels.
"""


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
    images, labels = blocks(tmp_path / "cohort", "images"), blocks(tmp_path / "cohort", "labels")
    assert images == {file: pytest.approx(means, abs=0.01) for file, means in BLOCKS[name]["images"].items()}
    assert labels == {file: pytest.approx(counts, abs=2) for file, counts in BLOCKS[name]["labels"].items()}
    assert manifests(tmp_path / "cohort") == BLOCKS[name]["manifests"]


def test_site_without_a_shift_does_not_mention_one() -> None:
    recipe = recipe_of(read_study(EXAMPLES / "brain-structures.toml"))
    assert "shift" not in recipe.model_dump_json()
    assert CohortRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def blocks(folder: Path, kind: str) -> dict[str, list[float]]:
    """What :data:`BLOCKS` holds of a cohort's images or labels."""
    found = {}
    for path in sorted(folder.rglob(f"{kind}/*.nii.gz")):
        pixels = np.asarray(nibabel.load(path).dataobj.get_unscaled())
        if kind == "images":
            values = pixels.reshape(4, pixels.shape[0] // 4, 4, pixels.shape[1] // 4).mean(axis=(1, 3)).ravel()
        else:
            values = np.bincount(pixels.ravel(), minlength=5)
        found[str(path.relative_to(folder))] = values.tolist()
    return found


def manifests(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("manifest.csv")))).hexdigest()
