"""Outlines that a study does not train: of other structures, of the very slices that are held out, or a reason."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medfed.study import StudyConfig
from server.evaluation import Forgetting, NotMeasured, read_evaluation
from simulation import untrained
from simulation.cohort import CohortRecipe, SiteRecipe, write_cohort
from simulation.harness import simulate
from simulation.untrained import UntrainedOutlines, untrained_outlines, untrained_structures

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]
SITES = ("north", "south")


def brain_study(make_study: MakeStudy, *classes: str) -> StudyConfig:
    plain = make_study(rounds={"num_rounds": 1})
    return plain.replace(
        task={"kind": "segmentation", "classes": classes},
        cohort={"kind": "brain-structures"},
        sites=[{"name": name, "scanner": "noisy-1p5t", "train_patients": 1, "test_patients": 2} for name in SITES],
    )


def recipe(structures: tuple[str, ...] = ("thalamus-left", "putamen"), **shift: object) -> CohortRecipe:
    site = SiteRecipe.model_validate(
        {"name": "north", "scanner": "noisy-1p5t", "train_patients": 1, "test_patients": 1}
        | ({"shift": shift} if shift else {})
    )
    return CohortRecipe(
        kind="brain-structures", seed=4, structures=structures, image_size=96, images_per_patient=2, sites=(site,)
    )


def test_what_is_left_is_what_no_trained_structure_holds() -> None:
    left = untrained_structures(("thalamus-left", "putamen"))
    assert left[0] == "thalamus-right"
    assert not {"thalamus-left", "putamen-left", "putamen-right"} & set(left)
    assert len(left) == 7
    assert untrained_structures(("thalamus", "putamen", "caudate", "pallidum", "hippocampus")) == ()


def test_reason_is_given_where_there_is_nothing_to_try(make_study: MakeStudy, tmp_path: Path) -> None:
    own = make_study()
    classifier = own.replace(
        backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
        adapter={"rank": 2, "alpha": 4.0, "targets": "last-block"},
        task={"kind": "classification", "targets": {"present": ["no", "yes"]}},
    )
    every = recipe(("thalamus", "putamen", "caudate", "pallidum", "hippocampus"))
    for study, of_cohort, why in (
        (classifier, None, untrained.FRESH_HEAD),
        (own, None, untrained.OWN_DATA),
        (own, every, untrained.NONE_LEFT),
    ):
        assert untrained_outlines(study, of_cohort, tmp_path / "untrained") == NotMeasured(why=why)
    assert not (tmp_path / "untrained").exists()


def test_both_kinds_are_tried_in_turn_the_most_shown_first_and_unseen_ones_never() -> None:
    structures = ("thalamus-right", "pallidum-left", "caudate-left", "hippocampus-left", "hippocampus-right")
    first_HW = np.repeat(np.arange(6, dtype=np.uint8), 20).reshape(10, 12)
    first_HW[first_HW == 3] = 0
    first_HW[0, 0] = 3  # one pixel of the caudate is none
    second_HW = np.where(first_HW == 5, 5, 0).astype(np.uint8)
    maps = {"north/north-0001/0": first_HW, "north/north-0001/1": second_HW}
    found = untrained._tried(structures, ("thalamus-left",), maps)
    assert isinstance(found, UntrainedOutlines)
    assert found.structures == ("hippocampus-right", "thalamus-right")
    assert found.other_sides == {"thalamus-right"}
    for stored_HW, label_HW in zip(found.label_maps["north"]["north-0001"], maps.values(), strict=True):
        for index, name in enumerate(found.structures, start=1):
            assert np.array_equal(stored_HW == index, label_HW == structures.index(name) + 1)
        assert stored_HW.max() <= 2
    neither = untrained._tried(structures, ("amygdala",), maps)
    assert isinstance(neither, UntrainedOutlines)
    assert (neither.structures, neither.other_sides) == (("hippocampus-right", "thalamus-right"), frozenset())
    empty = {"north/north-0001/0": np.zeros_like(first_HW)}
    assert untrained._tried(structures, ("thalamus-left",), empty) == NotMeasured(why=untrained.NONE_THERE)


@pytest.mark.weights
@pytest.mark.parametrize("drift", [{}, {"drift": {"from_round": 2, "scanner": "legacy-lowres"}}])
def test_outlines_are_of_the_slices_that_the_cohort_holds(drift: dict[str, object], tmp_path: Path) -> None:
    """Asked for the structures that are trained, the same code gives the label files of the cohort, bit for bit."""
    made = recipe(**drift)
    (manifest,) = write_cohort(made, tmp_path / "cohort").values()
    folder = manifest.parent / "replaced" if drift else manifest.parent
    maps = untrained._made(made, made.structures)
    assert list(maps) == ["north/north-0001/0", "north/north-0001/1"]
    for index, label_HW in enumerate(maps.values()):
        stored = nibabel.load(folder / "labels" / f"north-0001-{index}.nii.gz")
        assert np.array_equal(np.asarray(stored.dataobj), label_HW)
    others = untrained._made(made, untrained_structures(made.structures))
    for name, label_HW in maps.items():
        assert others[name].any()
        assert not (others[name] * label_HW).any()


@pytest.mark.weights
def test_outlines_are_made_once_and_again_if_damaged(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    first = untrained_outlines(study, recipe(), tmp_path / "untrained")
    assert isinstance(first, UntrainedOutlines)
    (file,) = (tmp_path / "untrained").iterdir()
    content = file.read_bytes()
    monkeypatch.setattr(untrained, "load_anatomy", lambda: pytest.fail("made again"))
    again = untrained_outlines(study, recipe(), tmp_path / "untrained")
    assert isinstance(again, UntrainedOutlines)
    assert again.structures == first.structures
    monkeypatch.undo()
    file.write_bytes(content[:-40])
    untrained_outlines(study, recipe(), tmp_path / "untrained")
    assert file.read_bytes() == content


@pytest.mark.weights
def test_a_simulated_study_says_what_it_forgot(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    study = brain_study(make_study, "thalamus-left", "caudate-right")
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    evaluation = read_evaluation(run.folder)
    assert evaluation is not None
    found = evaluation.forgetting
    assert isinstance(found, Forgetting)
    assert found.patients == 4
    assert 0 < len(found.structures) <= untrained.MAX_TRIED
    assert not set(found.structures) & {"thalamus-left", "caudate-right"}
    for skill in found.structures.values():
        assert 1 <= skill.cases <= 4
        assert skill.change.value == pytest.approx(skill.after.value - skill.before.value)
    report = (run.folder / "report.html").read_text()
    assert "Did it forget what it was not trained for?" in report
    assert "Forgetting of what" not in report


def test_own_data_and_classifiers_are_said_not_to_be_measured(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0, baselines=False)
    report = (run.folder / "report.html").read_text()
    assert f"Forgetting of what the study does not train: {untrained.OWN_DATA}." in report
    assert "Did it forget" not in report
