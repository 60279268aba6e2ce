"""The few-shot curve: what each point trained on, the numbers it shows, and where it is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.few_patients import FewPatients
from medfed.errors import CheckpointError, StudyError
from medfed.study import StudyConfig, is_of_all_sites
from server.few_shot import FEW_SHOT_FILE, read_few_shot
from simulation.arms import arms_of
from simulation.few_shot import shots_of
from simulation.harness import simulate
from simulation.progress import Reporter
from simulation.run_folder import metrics_of

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


class Counting(Reporter):
    """The last bar."""

    total = done = 0

    def stage(self, text: str) -> None:
        """Nothing."""

    def start(self, text: str, total: int) -> None:
        """A new bar."""
        self.total, self.done = total, 0

    def step(self, steps: int = 1) -> None:
        """Count."""
        self.done += steps


def test_every_arm_runs_once_more_for_each_number(make_study: MakeStudy) -> None:
    arms = arms_of(make_study(), baselines=True, shots=(2, 1))
    assert [(arm.scope, arm.patients) for arm in arms[4:]] == [
        ("few-shot-2-pooled", 2),
        ("few-shot-2", 2),
        ("few-shot-2-local-north", 2),
        ("few-shot-2-local-south", 2),
        ("few-shot-1-pooled", 1),
        ("few-shot-1", 1),
        ("few-shot-1-local-north", 1),
        ("few-shot-1-local-south", 1),
    ]
    assert not any(arm.evaluate_initial for arm in arms[4:])
    assert [arm.scope for arm in arms if is_of_all_sites(arm.scope)] == ["federated", "few-shot-2", "few-shot-1"]
    assert [arm.scope for arm in arms_of(make_study(("east",)), baselines=True, shots=(1,))] == [
        "federated",
        "few-shot-1",
    ]


@pytest.mark.parametrize("text", ["", "0", "1,0", "1,,2", "-1", "two", "1.5", "2,2"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^Expected"):
        shots_of(text)
    assert shots_of(" 4,1, 2") == (1, 2, 4)


def test_points_are_trainings_on_those_patients_alone(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    """With one image at each site nothing is shuffled: a study that lists no other patients trains the same."""
    study = make_study()
    run = simulate(study_file(study), out=tmp_path / "curve", workers=0, few_shot=[1])
    curve = run.few_shot
    assert curve is not None
    assert read_few_shot(run.folder) == curve
    before, one, every = curve.points
    assert [point.patients for point in curve.points] == [0, 1, 3]
    assert one.patients_at == {"north": 1, "south": 1}

    for site in study.sites:
        assert site.data is not None
        (kept,) = FewPatients(1, study.seed).of(f"{site.name}-{number}" for number in range(3))
        heading, *rows = site.data.read_text().splitlines()
        rows = [row for row in rows if ",test," in row or f",{kept}," in row]
        site.data.write_text("\n".join([heading, *rows]) + "\n")
    alone = simulate(study_file(study), out=tmp_path / "alone", workers=0).summary
    for column in ("local_only", "federated", "pooled"):
        assert one.mean[column].value == pytest.approx(alone.mean[column], abs=1e-5)
        assert every.mean[column].value == pytest.approx(run.summary.mean[column], abs=1e-6)
        for site_name in study.site_names:
            score = alone.score(site_name, column)
            assert one.sites[site_name][column].value == pytest.approx(score, abs=1e-5)
    assert one.mean["federated"].value != pytest.approx(every.mean["federated"].value, abs=1e-4)
    assert before.mean["zero_shot"].value == pytest.approx(run.summary.mean["zero_shot"], abs=1e-6)
    assert set(before.mean) == {"zero_shot"}
    assert one.joining is not None
    assert one.joining.value == pytest.approx(alone.mean["federated"] - alone.mean["local_only"], abs=1e-5)
    assert one.joining.low is not None
    assert one.joining.low <= one.joining.value <= one.joining.high

    report = (run.folder / "report.html").read_text()
    assert "How many patients does each site need?" in report
    assert "<pre>medfed simulate STUDY.toml --few-shot 1</pre>" in report
    assert "tries fewer" not in report
    assert "tries fewer" in (tmp_path / "alone" / Path(alone.run_dir).name / "report.html").read_text()
    for file in (FEW_SHOT_FILE, "sites.json", "options.json"):
        text = (run.folder / file).read_text()
        assert not any(f"{site}-{number}" in text for site in study.site_names for number in range(5))
    with pytest.raises(CheckpointError, match=r"few_shot = \(1,\)"):
        simulate(resume=run.folder, workers=0, few_shot=[2])


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_curve_is_the_same_in_forked_processes_and_after_a_stop(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_study(training={"local_epochs": 1, "batch_size": 1, "learning_rate": 0.01}))
    reporter = Counting()
    here = simulate(path, out=tmp_path / "here", workers=0, few_shot=[2], reporter=reporter)
    assert reporter.done == reporter.total
    forked = simulate(path, out=tmp_path / "forked", workers=2, few_shot=[2])
    assert here.few_shot is not None
    assert here.few_shot == forked.few_shot
    (here.folder / "few_shot.json").unlink()
    (here.folder / "arms" / "few-shot-2-local-north" / "checkpoint.safetensors").unlink()
    assert simulate(resume=here.folder, workers=0).few_shot == here.few_shot


@pytest.mark.usefixtures("without_pictures")
def test_without_baselines_the_curve_is_of_the_federation_alone_and_of_each_sites_own_model(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    """Under a strategy that lets sites differ, as it does in the federation with all patients."""
    study = make_study().replace(strategy={"name": "fedsa"})
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False, few_shot=[2])
    assert run.few_shot is not None
    assert run.few_shot.columns == ("federated",)
    assert all(point.joining is None for point in run.few_shot.points)
    assert sorted(path.name for path in (run.folder / "arms").iterdir()) == ["few-shot-2"]
    told = [line for line in metrics_of(run.folder / "arms" / "few-shot-2") if line["event"] == "evaluate"]
    assert [(line["site"], line["round"]) for line in told] == [("north", 2), ("south", 2)]
    for line in told:
        shown = run.few_shot.points[1].sites[line["site"]]["federated"].value
        assert shown == pytest.approx(line["dice"], abs=1e-6)


def test_trainings_that_would_be_charged_are_refused_before_anything_is_made(
    make_private_study: MakeStudy, make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    for make, sites, why in (
        (make_private_study, ("north", "south"), "would have to pay for"),
        (lambda _: make_secure_study(), (), "weigh each site by the patients it declared"),
    ):
        for folder in (tmp_path / "cohorts").glob("*"):
            folder.rename(tmp_path / f"old-{folder.name}")
        with pytest.raises(StudyError, match=why) as refused:
            simulate(study_file(make(sites)), out=tmp_path / "runs", workers=0, few_shot=[1])
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_as_many_as_there_are_is_refused(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    path = study_file(make_study())
    for shots, message in (([3], "below 3, the training patients of the largest site, got 3"), ([0], "from 1 on")):
        with pytest.raises(StudyError, match=message):
            simulate(path, out=tmp_path / "runs", workers=0, few_shot=shots)
    assert not (tmp_path / "runs").exists()


def test_damaged_curve_is_named(tmp_path: Path) -> None:
    assert read_few_shot(tmp_path) is None
    (tmp_path / FEW_SHOT_FILE).write_text(json.dumps({"resamples": 1}))
    with pytest.raises(CheckpointError, match="remove the file and resume"):
        read_few_shot(tmp_path)
