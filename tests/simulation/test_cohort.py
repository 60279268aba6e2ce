"""Cohorts: byte-identical for one recipe, patients in one split of one site, files as the manifest says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydantic import ValidationError

from medfed.errors import DataError
from simulation.cohort import STATEMENT, CohortRecipe, SiteRecipe, write_cohort

needs_anatomy = pytest.mark.weights
NORTH = SiteRecipe(name="north", scanner="reference-3t", train_patients=2, test_patients=1)
SOUTH = SiteRecipe(name="south", scanner="legacy-lowres", train_patients=1, test_patients=1)


def structures_recipe(*sites: SiteRecipe, seed: int = 3, image_size: int = 96) -> CohortRecipe:
    return CohortRecipe(
        kind="brain-structures",
        seed=seed,
        structures=("thalamus", "putamen-left"),
        image_size=image_size,
        images_per_patient=2,
        sites=sites,
    )


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cohorts") / "structures"
    write_cohort(structures_recipe(NORTH, SOUTH), directory)
    return directory


@needs_anatomy
def test_manifest_names_files_of_one_image_each(cohort: Path) -> None:
    rows = rows_of(cohort / "north" / "manifest.csv")
    assert [(row["patient_id"], row["split"]) for row in rows] == [
        *[("north-0000", "train")] * 2,
        *[("north-0001", "train")] * 2,
        *[("north-0002", "test")] * 2,
    ]
    for row in rows:
        image = nibabel.load(cohort / "north" / row["image"])
        label = nibabel.load(cohort / "north" / row["label"])
        pixels, classes = np.asarray(image.dataobj), np.asarray(label.dataobj)
        assert pixels.shape == classes.shape == (96, 96)
        assert image.get_data_dtype() == label.get_data_dtype() == np.uint8
        assert 0.0 <= pixels.min() < 0.05
        assert 0.9 < pixels.max() <= 1.00001
        assert set(np.unique(classes)) == {0, 1, 2}
        assert np.allclose(image.affine, label.affine)


@needs_anatomy
def test_one_sided_class_is_on_the_patients_left(cohort: Path) -> None:
    for row in rows_of(cohort / "south" / "manifest.csv"):
        label = nibabel.load(cohort / "south" / row["label"])
        putamen_px = np.argwhere(np.asarray(label.dataobj) == 2)
        x_mm = (label.affine @ [*putamen_px.mean(axis=0), 0, 1])[0]
        assert x_mm < -10


@needs_anatomy
def test_patients_never_cross_a_split_or_a_site(cohort: Path) -> None:
    homes: dict[str, set[tuple[str, str]]] = {}
    for site in ("north", "south"):
        for row in rows_of(cohort / site / "manifest.csv"):
            homes.setdefault(row["patient_id"], set()).add((site, row["split"]))
    assert len(homes) == 5
    assert all(len(home) == 1 for home in homes.values())


@needs_anatomy
def test_same_recipe_gives_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    write_cohort(structures_recipe(NORTH, SOUTH), tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(cohort)


@needs_anatomy
def test_adding_a_site_leaves_the_others_as_they_are(cohort: Path, tmp_path: Path) -> None:
    write_cohort(structures_recipe(SOUTH), tmp_path / "alone")
    assert bytes_of(tmp_path / "alone" / "south") == bytes_of(cohort / "south")


@needs_anatomy
def test_another_seed_gives_other_patients(cohort: Path, tmp_path: Path) -> None:
    write_cohort(structures_recipe(SOUTH, seed=4), tmp_path / "other")
    image = "images/south-0000-0.nii.gz"
    assert (tmp_path / "other" / "south" / image).read_bytes() != (cohort / "south" / image).read_bytes()


@needs_anatomy
def test_cohort_card_says_what_is_real(cohort: Path) -> None:
    card = json.loads((cohort / "cohort.json").read_text())
    assert card["statement"] == STATEMENT
    assert card["recipe_digest"] == structures_recipe(NORTH, SOUTH).digest
    assert CohortRecipe.model_validate(card["recipe"]) == structures_recipe(NORTH, SOUTH)
    assert card["structures"] == {"1": "thalamus", "2": "putamen-left"}
    assert len(card["licences"]) == 2


@needs_anatomy
def test_finished_cohort_is_reused_and_another_recipe_replaces_it(tmp_path: Path) -> None:
    directory = tmp_path / "cohort"
    finished: list[int] = []
    manifests = write_cohort(structures_recipe(NORTH), directory, progress=finished.append)
    assert finished == [1, 2, 3]
    assert manifests == {"north": directory / "north" / "manifest.csv"}
    written = (directory / "cohort.json").stat().st_mtime_ns
    assert write_cohort(structures_recipe(NORTH), directory, progress=finished.append) == manifests
    assert finished == [1, 2, 3]
    assert (directory / "cohort.json").stat().st_mtime_ns == written
    write_cohort(structures_recipe(SOUTH), directory)
    assert sorted(path.name for path in directory.iterdir()) == ["cohort.json", "south"]
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="choose another folder"):
        write_cohort(structures_recipe(NORTH), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@needs_anatomy
def test_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(finished: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohort(structures_recipe(NORTH), tmp_path / "cohort", progress=stop)
    assert list(tmp_path.iterdir()) == []


@needs_anatomy
def test_lesion_cohort_keeps_prevalence_targets_and_masks(tmp_path: Path) -> None:
    site = SiteRecipe(name="east", scanner="noisy-1p5t", train_patients=8, test_patients=4, lesion_prevalence=0.25)
    recipe = CohortRecipe(kind="brain-lesions", seed=1, image_size=128, sites=(site,))
    manifest = write_cohort(recipe, tmp_path / "lesions")["east"]
    rows = rows_of(manifest)
    assert list(rows[0]) == [
        "image",
        "patient_id",
        "split",
        "lesion_present",
        "lesion_side",
        "lesion_size",
        "lesion_mask",
    ]
    assert sum(row["lesion_present"] == "1" for row in rows) == 3
    for row in rows:
        mask = nibabel.load(manifest.parent / row["lesion_mask"])
        pixels = np.argwhere(np.asarray(mask.dataobj) == 1)
        assert (len(pixels) > 0) == (row["lesion_present"] == "1")
        if len(pixels):
            x_mm = (mask.affine @ [*pixels.mean(axis=0), 0, 1])[0]
            assert row["lesion_side"] == ("1" if x_mm < 0 else "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structures": ()}, "Expected structures"),
        ({"structures": ("thalamus", "thalamus-left")}, "disjoint"),
        ({"structures": ("cortex",)}, "Expected a structure of"),
        ({"sites": (NORTH, NORTH)}, "distinct"),
        ({"sites": (NORTH.model_copy(update={"lesion_prevalence": 0.5}),)}, "lesion_prevalence"),
        ({"kind": "brain-lesions"}, "none for brain-lesions"),
        ({"sites": ()}, "at least 1"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_inconsistent_recipe_is_refused(change: dict[str, object], message: str) -> None:
    fields = {"kind": "brain-structures", "seed": 1, "structures": ("thalamus",), "sites": (NORTH,)}
    with pytest.raises(ValidationError, match=message):
        CohortRecipe.model_validate(fields | change)


@pytest.mark.parametrize(("field", "value"), [("name", "../north"), ("name", "North"), ("scanner", "unknown")])
def test_site_with_a_strange_name_or_scanner_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match="Expected"):
        SiteRecipe.model_validate(NORTH.model_dump() | {field: value})


def test_digest_changes_with_every_field() -> None:
    digests = {
        structures_recipe(NORTH).digest,
        structures_recipe(SOUTH).digest,
        structures_recipe(NORTH, seed=4).digest,
        structures_recipe(NORTH, image_size=128).digest,
    }
    assert len(digests) == 4
