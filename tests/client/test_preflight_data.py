"""Preflight of data: what a study would refuse is a failure, what would mislead it a warning."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.data import load_cohort
from client.policy import SitePolicy
from client.preflight_check import Check, PreflightInputs, distribution, guarded, some
from client.preflight_data import data_checks
from client.survey import survey
from medfed.errors import DataError
from medfed.models.pixels import PixelSpec
from medfed.study import StudyConfig

MakeCohort = Callable[..., Path]
Look = Callable[..., dict[str, Check]]


@pytest.fixture
def look(make_study: Callable[..., StudyConfig]) -> Look:
    """The checks of north's data by name, after ``edit`` of its manifest's folder."""

    def run(
        edit: Callable[[Path], object] = lambda folder: None, *, policy: SitePolicy | None = None, **sections: Any
    ) -> dict[str, Check]:
        study = make_study(("north",), **sections)
        manifest = study.sites[0].data
        assert manifest is not None
        edit(manifest.parent)
        return looked_at(study, manifest, policy)

    return run


def looked_at(study: StudyConfig, manifest: Path, policy: SitePolicy | None = None) -> dict[str, Check]:
    inputs = PreflightInputs(site_name="north", manifests=(manifest,), study=study)
    checks = data_checks(survey([manifest], study.task), inputs, policy)
    assert all(check.what_to_do for check in checks if check.outcome != "ok")
    assert all(check.found for check in checks)
    return {check.name: check for check in checks}


def in_manifest(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / "manifest.csv").read_text()
        assert old in text
        (folder / "manifest.csv").write_text(text.replace(old, new))

    return edit


def copy(source: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes()) and None


def nifti(name: str, array: np.ndarray, affine: np.ndarray | None = None) -> Callable[[Path], None]:
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    return lambda folder: nibabel.save(image, folder / name)


def test_sound_cohort_is_counted_and_has_nothing_to_mend(look: Look) -> None:
    checks = look()
    assert {check.outcome for check in checks.values()} == {"ok"}
    assert checks["patients"].found == "train: 3 patients, 3 images; test: 2 patients, 2 images"
    assert checks["structures, train"].found == "images with each: near 3, far 3"
    assert checks["image sizes"].found == "64 x 64 (5)"
    assert checks["pixel spacing"].found == "1 x 1 mm (5)"
    assert checks["orientation"].found == "axes point to RA (5)"
    assert checks["duplicates"].found == "no two images have equal pixels"


NOISE = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("edit", "name", "outcome", "found"),
    [
        (in_manifest("image1.nii.gz", "image9.nii.gz"), "manifest", "fail", "row 3: expected a file"),
        (nifti("image1.nii.gz", np.full((64, 64), np.nan)), "files", "fail", "4096 NaN or infinite"),
        (nifti("image1.nii.gz", np.ones((64, 64, 9))), "files", "fail", "2-D image, got shape"),
        (nifti("label1.nii.gz", np.full((64, 64), 7.0)), "files", "fail", r"labels 0\.\.2 in .*got 7"),
        (in_manifest(",test,", ",train,"), "splits", "fail", "'test'"),
        (in_manifest("north-4,test", "north-0,test"), "patients in two splits", "fail", "1 patient .*: row 6"),
        (copy("image0.nii.gz", "image4.nii.gz"), "duplicates across splits", "fail", "row 2 = row 6"),
        (copy("image0.nii.gz", "image1.nii.gz"), "duplicates across patients", "fail", "row 2 = row 3"),
        (nifti("image1.nii.gz", np.full((64, 64), 3.0)), "constant images", "warn", "1 image .*: row 3"),
        (nifti("label1.nii.gz", np.zeros((64, 64))), "empty label maps", "warn", "1 image .*: row 3"),
        (nifti("image1.nii.gz", NOISE, np.diag([-1.0, 1, 1, 1])), "orientation", "warn", r"RA \(4\), LA \(1\)"),
        (nifti("image1.nii.gz", NOISE, np.diag([4.0, 4, 1, 1])), "pixel spacing", "warn", "1 image .*2x off: row 3"),
    ],
)
def test_fault_is_told_with_its_row(
    look: Look, edit: Callable[[Path], object], name: str, outcome: str, found: str
) -> None:
    check = look(edit)[name]
    assert check.outcome == outcome
    assert re.search(found, check.found), check.found


def test_equal_pixels_in_other_file_formats_are_duplicates(look: Look) -> None:
    def edit(folder: Path) -> None:
        picture = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
        Image.fromarray(picture).save(folder / "a.png")
        np.save(folder / "b.npy", picture.astype(np.float64))
        for name in ("la", "lb"):
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / f"{name}.png")
        in_manifest("image0.nii.gz,label0.nii.gz", "a.png,la.png")(folder)
        in_manifest("image4.nii.gz,label4.nii.gz", "b.npy,lb.png")(folder)

    assert look(edit)["duplicates across splits"].found == "equal pixels in 1 group: row 2 = row 6."


def test_copies_of_one_patient_in_one_split_are_only_pointed_out(look: Look) -> None:
    def edit(folder: Path) -> None:
        in_manifest("north-1,", "north-0,")(folder)
        copy("image0.nii.gz", "image1.nii.gz")(folder)

    checks = look(edit)
    assert checks["duplicates of one patient"].outcome == "warn"
    assert "duplicates across patients" not in checks


def test_structure_without_images_and_specks_are_pointed_out(look: Look) -> None:
    def edit(folder: Path) -> None:
        label = np.zeros((64, 64))
        label[:2, :2] = 1
        for number in range(3):
            nifti(f"label{number}.nii.gz", label)(folder)

    checks = look(edit)
    assert "no image with far" in checks["structures, train"].what_to_do
    assert "3 images" in checks["specks in label maps"].found


def test_class_that_no_image_shows_is_pointed_out(look: Look) -> None:
    task = {"kind": "classification", "targets": {"side": ["left", "right", "both"]}}
    backbone = {"name": "stand-in-classifier", "sha256": "0" * 64}
    adapter = {"rank": 2, "alpha": 4.0, "targets": "last-quarter"}
    checks = look(task=task, backbone=backbone, adapter=adapter)
    assert checks["classes of side, train"].found == "images with each: left 2, right 1, both 0."


def test_image_far_from_square_is_pointed_out(look: Look) -> None:
    def edit(folder: Path) -> None:
        nifti("image1.nii.gz", NOISE[:, :20])(folder)
        nifti("label1.nii.gz", np.zeros((64, 20)))(folder)

    assert "1 image far from square: row 3" in look(edit)["image sizes"].found


@pytest.mark.parametrize(("least", "outcome"), [(3, "ok"), (4, "fail")])
def test_cohort_is_held_against_the_policy(look: Look, least: int, outcome: str) -> None:
    policy = SitePolicy(approved_studies=(), minimum_patients=least, allow_unprotected=True)
    check = look(policy=policy)["cohort size"]
    assert check.outcome == outcome
    assert f"the policy asks for {least}" in check.found


@pytest.mark.parametrize(("declared", "outcome"), [(3, "ok"), (4, "fail")])
def test_cohort_is_held_against_what_the_study_declares(
    make_private_study: Callable[..., StudyConfig], declared: int, outcome: str
) -> None:
    study = make_private_study(("north",))
    study = study.replace(sites=[study.sites[0].model_copy(update={"declared_patients": declared})])
    manifest = study.sites[0].data
    assert manifest is not None
    assert looked_at(study, manifest)["cohort size"].outcome == outcome


EDITS: list[Callable[[Path], object]] = [
    in_manifest("image1.nii.gz", "image9.nii.gz"),
    in_manifest("-4,te", "-0,te"),
    in_manifest(",test,", ",train,"),
    in_manifest("patient_id", "patient"),
    nifti("image2.nii.gz", np.full((64, 64), np.inf)),
    nifti("label2.nii.gz", np.full((64, 64), 3.0)),
    nifti("label2.nii.gz", np.zeros((64, 60))),
    nifti("image3.nii.gz", NOISE),
    nifti("label3.nii.gz", np.zeros((64, 64))),
    lambda folder: (folder / "image0.nii.gz").write_bytes(b"damaged"),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(chosen=st.sets(st.integers(0, len(EDITS) - 1), max_size=2))
def test_cohort_loads_exactly_when_no_check_of_its_rules_fails(
    make_study: Callable[..., StudyConfig], chosen: set[int]
) -> None:
    """Duplicates and numbers apart, which are no rule of a cohort, a failure here is a refusal there."""
    study = make_study(("other",))
    manifest = study.sites[0].data
    assert manifest is not None
    try:
        for index in sorted(chosen):
            EDITS[index](manifest.parent)
        checks = looked_at(study, manifest)
        failed = any(check.outcome == "fail" for check in checks.values())
        try:
            load_cohort("other", [manifest], study.task, PixelSpec(image_size=64))
            refused = False
        except DataError:
            refused = True
        assert failed == refused, checks
    finally:
        shutil.rmtree(manifest.parent)


def test_manifest_that_cannot_be_read_at_all_is_one_failure(tmp_path: Path) -> None:
    findings = survey([tmp_path / "none.csv"], None)
    checks = data_checks(findings, PreflightInputs(site_name="north", manifests=(tmp_path / "none.csv",)), None)
    assert next(check.name for check in checks if check.outcome == "fail") == "manifest"


def test_progress_counts_every_image(make_cohort: MakeCohort) -> None:
    told: list[tuple[int, int]] = []
    survey([make_cohort()], None, lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(1, 6)]


def test_check_that_breaks_down_is_a_failure_without_its_text() -> None:
    def broken() -> Check:
        raise ValueError("Jane Doe")

    def broken_later() -> Iterator[Check]:
        yield Check("data", "manifest", "ok", "read")
        raise ValueError("Jane Doe")

    assert [check.outcome for check in guarded("data", "files", broken_later)] == ["ok", "fail"]
    (check,) = guarded("data", "files", broken)
    assert (check.outcome, check.found) == ("fail", "the check itself ended with ValueError.")


def test_long_lists_are_counted_beyond_the_first_few() -> None:
    assert some([f"row {n}" for n in range(2, 9)]) == "row 2, row 3, row 4, row 5 and 3 more"
    assert distribution("aaaabbbccde") == "a (4), b (3), c (2), d (1) and 1 other value (1)"
