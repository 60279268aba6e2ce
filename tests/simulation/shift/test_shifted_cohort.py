"""Cohorts with shifts: families reach the files, masks follow what moves anatomy and stay where nothing does."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from medfed.errors import StudyError
from medfed.shift_profile import ShiftProfile
from medfed.study import StudyConfig, read_study
from simulation.anatomy import load_anatomy
from simulation.cohort import (
    CohortRecipe,
    Example,
    SiteRecipe,
    atlas_planes_of,
    drifted,
    examples_of,
    write_cohort,
)
from simulation.harness import recipe_of
from simulation.shift.study_shift import shifts_of

needs_anatomy = pytest.mark.weights
STRUCTURES = ("thalamus", "putamen-left")


def recipe(
    shift: dict[str, Any] | None, *, kind: str = "brain-structures", prevalence: float | None = None
) -> CohortRecipe:
    profile = None if shift is None else ShiftProfile.model_validate(shift)
    site = SiteRecipe(
        name="north",
        scanner="reference-3t",
        train_patients=2,
        test_patients=1,
        lesion_prevalence=prevalence,
        shift=profile,
    )
    structures = STRUCTURES if kind == "brain-structures" else ()
    return CohortRecipe(kind=kind, seed=3, structures=structures, image_size=64, sites=(site,))


def example(shift: dict[str, Any] | None, number: int = 0) -> Example:
    made = recipe(shift)
    anatomy = load_anatomy()
    return next(examples_of(made, made.sites[0], number, anatomy, atlas_planes_of(made, anatomy)))


def overlap(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> float:
    return float((2 * ((first > 0) & (second > 0)).sum()) / ((first > 0).sum() + (second > 0).sum()))


INTENSITY = {
    "contrast": {"gamma": [1.5, 1.5]},
    "bias_field": {"strength": [0.3, 0.3]},
    "motion": {"max_shift_px": [3, 3]},
    "noise": {"sd": [0.1, 0.1]},
    "window": {"high": [0.7, 0.7]},
    "slice_thickness": {"thickness_mm": 6.0},
}


@needs_anatomy
def test_families_of_intensity_change_the_image_and_leave_the_annotation() -> None:
    plain = example(None)
    for family, settings in INTENSITY.items():
        changed = example({family: settings})
        assert not np.array_equal(changed.image_HW, plain.image_HW), family
        assert np.array_equal(changed.label_HW, plain.label_HW), family


@needs_anatomy
def test_families_of_annotators_change_the_annotation_and_leave_the_image() -> None:
    plain = example(None)
    for shift in ({"annotator": {"margin_px": [1.5, 1.5]}}, {"missing": {"classes": ["thalamus"]}}):
        changed = example(shift)
        assert np.array_equal(changed.image_HW, plain.image_HW)
        assert not np.array_equal(changed.label_HW, plain.label_HW)
        held_out = example(shift, number=2)
        assert np.array_equal(held_out.label_HW, example(None, number=2).label_HW)


@needs_anatomy
def test_annotation_follows_anatomy_where_a_family_moves_it() -> None:
    """Under the body of another person the image moves, and what is annotated has the same brightness as before."""
    plain, old = example(None), example({"demographics": {"female": 1.0, "age_groups": [0, 0, 1]}})
    assert old.columns == {"attribute_sex": "female", "attribute_age_group": "65-plus"}
    assert plain.columns == {}
    assert 0.4 < overlap(plain.label_HW, old.label_HW) < 1.0
    for index in (1, 2):
        before = float(plain.image_HW.numpy()[plain.label_HW == index].mean())
        after = float(old.image_HW.numpy()[old.label_HW == index].mean())
        beside = float(old.image_HW.numpy()[old.label_HW == 0].mean())
        assert abs(after - before) < 0.05
        assert abs(after - beside) > 0.2


@needs_anatomy
def test_profile_of_zero_strengths_gives_the_cohort_without_a_shift(tmp_path: Path) -> None:
    nothing = {
        "contrast": {},
        "bias_field": {"strength": [0, 0]},
        "noise": {"sd": [0, 0]},
        "window": {},
        "annotator": {},
        "missing": {},
        "slice_thickness": {"thickness_mm": 0.0},
    }
    for name, shift in (("plain", None), ("nothing", nothing)):
        write_cohort(recipe(shift), tmp_path / name)
    for path in sorted((tmp_path / "plain").rglob("*.nii.gz")):
        twin = tmp_path / "nothing" / path.relative_to(tmp_path / "plain")
        assert path.read_bytes() == twin.read_bytes()


@needs_anatomy
def test_replaced_scanner_sees_the_same_patients(tmp_path: Path) -> None:
    drift = {"drift": {"from_round": 2, "scanner": "noisy-1p5t"}, "demographics": {"female": 0.4}}
    made = recipe(drift)
    assert made.num_patients == 6
    manifest = write_cohort(made, tmp_path / "cohort")["north"]
    with manifest.open() as before, drifted(manifest).open() as after:
        first, second = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert first == second
    for row in first:
        old, new = (
            nibabel.load(place / row["image"]).get_fdata() for place in (manifest.parent, drifted(manifest).parent)
        )
        labels = [
            nibabel.load(place / row["label"]).get_fdata() for place in (manifest.parent, drifted(manifest).parent)
        ]
        assert np.array_equal(*labels)
        assert np.abs(old - new).mean() > 0.01
        assert np.corrcoef(old.ravel(), new.ravel())[0, 1] > 0.8


@needs_anatomy
def test_lesion_cohort_records_what_its_hospital_sees(tmp_path: Path) -> None:
    shift = {"missing": {"classes": ["left"]}, "annotator": {"misses": 1.0}, "demographics": {}}
    manifest = write_cohort(recipe(shift, kind="brain-lesions", prevalence=1.0), tmp_path / "cohort")["north"]
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["lesion_present"] for row in rows if row["split"] == "train"} == {"0"}
    assert {(row["lesion_present"], row["lesion_side"]) for row in rows if row["split"] == "test"} == {("1", "2")}
    assert all(row["attribute_sex"] in ("female", "male") and row["attribute_age_group"] for row in rows)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        ({"stain": {"scale": 0.1}}, "brains are grey"),
        ({"labels": {"concentration": 1.0}}, "every brain has every structure"),
        ({"missing": {"classes": ["liver"]}}, "Expected missing classes of thalamus"),
        ({"drift": {"from_round": 2, "scanner": "petct"}}, "Expected a scanner of"),
        ({"presets": ["low-field"]}, "presets written out"),
    ],
)
def test_shift_that_means_nothing_for_brains_is_refused(shift: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(shift)


EXAMPLES = Path(__file__).parents[3] / "examples"


def lesion_study(**first_site: Any) -> StudyConfig:
    """The lesion example with other keys of its first site."""
    study = read_study(EXAMPLES / "lesion-classification.toml")
    first = {**study.sites[0].model_dump(), "lesion_prevalence": None, **first_site}
    return study.replace(sites=[first, *study.sites[1:]])


def test_example_study_spreads_its_patients_and_resolves_its_presets() -> None:
    study = read_study(EXAMPLES / "brain-under-shift.toml")
    made = recipe_of(study)
    assert sum(site.train_patients for site in made.sites) == 5 + 12
    emergency = made.sites[1].shift
    assert emergency is not None
    assert set(emergency.families) == {"motion", "gibbs", "annotator"}
    assert read_study(EXAMPLES / "brain-under-shift.toml").digest == study.digest


def test_preset_of_the_prevalence_table_takes_the_place_of_the_sites_own() -> None:
    site = recipe_of(lesion_study(shift={"presets": ["emergency-mix"]})).sites[0]
    assert site.lesion_prevalence == pytest.approx(0.386)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shift": {"labels": {"finding": "effusion", "source": "nih"}}, "lesion_prevalence": 0.5},
            "both say how many",
        ),
        ({"shift": {"labels": {"finding": "effusion", "source": "mimic"}}}, "Expected a finding of"),
        ({"shift": {"presets": ["low-feild"]}}, "Expected a preset of"),
        ({"shift": {"presets": ["low-field"]}}, "lesion_prevalence is missing"),
    ],
)
def test_shift_that_contradicts_its_study_is_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        recipe_of(lesion_study(**changes))


def test_drift_after_the_last_round_is_refused() -> None:
    study = read_study(EXAMPLES / "brain-under-shift.toml")
    with pytest.raises(StudyError, match="lower it"):
        shifts_of(study.replace(rounds={"num_rounds": 2, "quorum": 3}))
