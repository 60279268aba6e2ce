"""The evaluation of a simulation: the same numbers as training reports, and nothing where they are withheld."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfed.study import StudyConfig
from server.evaluation import EVALUATION, Evaluation, read_evaluation
from simulation.arms import arms_of
from simulation.harness import Run, simulate

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


def evaluation_of(run: Run) -> Evaluation:
    evaluation = read_evaluation(run.folder)
    assert evaluation is not None
    return evaluation


@pytest.fixture
def make_classifier_study(tmp_path: Path, make_study: MakeStudy) -> MakeStudy:
    """Two sites with a bright lesion in some images, outlined by an expert, and an attribute of the patients."""

    def write_site(site: str) -> Path:
        folder = tmp_path / "classes" / site
        folder.mkdir(parents=True)
        generator = np.random.default_rng([1, *site.encode()])
        rows = []
        for number in range(20):
            present = number % 2
            image, mask = generator.normal(90, 20, size=(28, 28)), np.zeros((28, 28), dtype=np.uint8)
            mask[4:12, 4:12] = present
            Image.fromarray(np.clip(image + 100 * mask, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
            Image.fromarray(mask * 255).save(folder / f"mask{number}.png")
            rows.append(
                {
                    "image": f"{number}.png",
                    "patient_id": f"{site}-{number}",
                    "split": "train" if number < 8 else "test",
                    "present": present,
                    "side": number % 3,
                    "lesion_mask": f"mask{number}.png" if present else "",
                    "attribute_sex": "fm"[number % 4 // 2] if number != 19 else "",
                }
            )
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder / "manifest.csv"

    def make(**sections: object) -> StudyConfig:
        plain = make_study()
        return plain.replace(
            backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
            adapter={"rank": 2, "alpha": 4.0, "targets": "last-block"},
            task={"kind": "classification", "targets": {"present": ["no", "yes"], "side": ["none", "left", "right"]}},
            sites=[{"name": site, "data": write_site(site)} for site in ("north", "south")],
            **sections,
        )

    return make


def test_segmentation_scores_are_those_of_the_results_table(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0)
    evaluation = evaluation_of(run)
    for site, metrics in run.summary.sites.items():
        for metric, columns in metrics.items():
            for column, value in columns.items():
                assert evaluation.sites[site].metrics[metric][column].value == pytest.approx(value, abs=1e-6)
        joining = evaluation.sites[site].differences["joining"]
        assert joining.value == pytest.approx(metrics["dice"]["federated"] - metrics["dice"]["local_only"], abs=1e-6)
        assert joining.low is not None
        assert joining.low <= joining.value <= joining.high
        assert evaluation.sites[site].patients == 2
        assert evaluation.sites[site].distance_unit == "px"  # the NIfTI headers name no unit
    for column, value in run.summary.worst_site.items():
        assert evaluation.over_sites["dice"][column].worst == pytest.approx(value, abs=1e-6)
    assert (evaluation.embedding is None) or evaluation.embedding.images == 4
    report = (run.folder / "report.html").read_text()
    assert "Was joining worth it?" in report
    assert "Surface distance (Hausdorff" not in report  # among what was not measured


def test_forked_processes_measure_the_same(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    path = study_file(make_study())
    here, forked = (evaluation_of(simulate(path, out=tmp_path / f"{n}", workers=n)) for n in (0, 2))
    assert here.model_dump(exclude={"seconds"}) == forked.model_dump(exclude={"seconds"})


def test_classifier_is_measured_in_every_way(
    make_classifier_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_classifier_study()), out=tmp_path / "runs", workers=0)
    evaluation = evaluation_of(run)
    for site, metrics in run.summary.sites.items():
        found = evaluation.sites[site]
        for metric, columns in metrics.items():
            for column, value in columns.items():
                assert found.metrics[metric][column].value == pytest.approx(value, abs=1e-6)
        assert {"auroc/present", "auprc/side", "ece", "sensitivity-at-specificity-0.9/present"} <= set(found.metrics)
        assert "sensitivity-at-specificity-0.9/side" not in found.metrics
        assert set(found.metrics["ece-scaled"]) == {"federated"}
        assert sum(found.calibration["present"].before.count) == found.images == 12
        assert found.distance_unit is None
        assert found.flips is None
    saliency = evaluation.saliency
    assert saliency is not None
    assert saliency.images == 12
    assert saliency.mask_share == pytest.approx(64 / 784)
    assert set(saliency.pointing) == {"zero_shot", "federated"}
    (group,) = evaluation.groups
    assert group.attribute == "sex"
    assert group.cases == {"f": 12, "m": 10}  # two patients of unknown sex belong to neither
    assert set(group.parity) == {"present/1", "side/0", "side/1", "side/2"}
    report = (run.folder / "report.html").read_text()
    for shown in ("Do its probabilities mean what they say?", "Where the model looks", "Groups by sex", "AUROC"):
        assert shown in report


def test_withheld_metrics_are_measured_by_nobody(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(evaluation="withheld")
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert not (run.folder / EVALUATION).exists()
    assert "How sure is that?" not in (run.folder / "report.html").read_text()


def test_patients_are_named_nowhere_in_the_evaluation(
    make_classifier_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_classifier_study()), out=tmp_path / "runs", workers=0, baselines=False)
    text = (run.folder / EVALUATION).read_text()
    assert not any(f"{site}-{number}" in text for site in ("north", "south") for number in range(20))
    assert str(tmp_path) not in text


def test_every_site_is_left_out_once_if_asked_for(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    study = make_study()
    assert [arm.scope for arm in arms_of(study, baselines=False, leave_one_out=True)] == [
        "federated",
        "without-north",
        "without-south",
    ]
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, leave_one_out=True)
    evaluation = evaluation_of(run)
    # With two sites, the federation without one of them is the other one alone.
    for site, other in (("north", "south"), ("south", "north")):
        left_out = evaluation.sites[site].metrics["dice"]["left_out"]
        assert left_out.value == evaluation_of_other(run, site, other)
    assert set(evaluation.difference("being_in")) == {"north", "south"}
    assert "Does it help a hospital that was not there?" in (run.folder / "report.html").read_text()
    report = (run.folder / "report.html").read_text()
    assert "(--leave-one-out does)" not in report
    assert "medfed simulate STUDY.toml --leave-one-out" in report


def evaluation_of_other(run: Run, site: str, other: str) -> float:
    from simulation.run_folder import metrics_of

    lines = metrics_of(run.folder / "arms" / f"without-{site}")
    assert {line["site"] for line in lines if line["event"] == "train"} == {other}
    (evaluated,) = [line for line in lines if line["event"] == "evaluate"]
    return pytest.approx(evaluated["dice"], abs=1e-6)
