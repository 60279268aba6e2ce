"""``medfed simulate``: what it hands to the harness, and what it prints where."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import simulation.harness
from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.study import StudyConfig
from server.evaluation import Measured
from server.few_shot import FewShot, FewShotPoint
from server.privacy_statement import NO_PRIVACY
from server.results import PrivacyStatement, Results
from simulation.command import app
from simulation.harness import Run

NUMBERS = {"zero_shot": 0.511, "local_only": 0.622, "federated": 0.733, "pooled": 0.744}
KEYS = {"run_dir", "rounds", "wall_s", "sites", "mean", "worst_site", "privacy"}


def make_run(folder: Path, *, columns=tuple(NUMBERS), sites=("north", "south"), classification=False) -> Run:
    folder.mkdir()
    lesions = {"lesion_prevalence": 0.5} if classification else {}
    study = StudyConfig.model_validate(
        {
            "name": "brain",
            "seed": 1,
            "backbone": {"name": "lite-medsam", "sha256": "0" * 64},
            "adapter": {"rank": 1, "alpha": 1, "targets": "decoder-qv"},
            "task": {"kind": "classification", "targets": {"putamen": ["no", "yes"]}}
            if classification
            else {"kind": "segmentation", "classes": ["putamen", "caudate"]},
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 0.1},
            "rounds": {"num_rounds": 2},
            "cohort": {"kind": "brain-lesions" if classification else "brain-structures"},
            "sites": [
                {"name": name, "scanner": "bias-3t", "train_patients": 1, "test_patients": 1, **lesions}
                for name in sites
            ],
            "manifest": AdapterManifest(method="lora", rank=1, tensors=(TensorSpec(name="a", shape=(1,)),)),
        }
    )
    values = {column: NUMBERS[column] for column in columns}
    summary = Results(
        run_dir=str(folder), study="brain", rounds=2, wall_s=3.0, primary="dice",
        sites={site: {"dice": values, "dice/putamen": values, "dice/caudate": values} for site in sites},
        mean=values, worst_site=values, privacy=PrivacyStatement(promise="", warnings=(NO_PRIVACY,)), cohort="patients are synthetic warps",
    )  # fmt: skip
    (folder / "study.json").write_bytes(study.canonical)
    (folder / "summary.json").write_text(summary.model_dump_json())
    return Run(folder, summary)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """Replaces the harness; holds what it was called with and, under ``run``, what it returns."""
    seen: dict = {"run": make_run(tmp_path / "run")}

    def fake(study=None, **options):
        seen.update(options, study=study)
        print("noise of a library")
        options["reporter"].start("training", 3)
        options["reporter"].step(2)
        options["reporter"].folder(seen["run"].folder)
        if "error" in seen:
            raise seen["error"]
        return seen["run"]

    monkeypatch.setattr(simulation.harness, "simulate", fake)
    return seen


def test_options_reach_the_harness(called: dict) -> None:
    result = CliRunner().invoke(
        app,
        [
            "s.toml",
            "--out",
            "o",
            "--engine",
            "ray",
            "--workers",
            "3",
            "--device",
            "cpu",
            "--no-baselines",
            "--quiet",
        ],
    )
    assert result.exit_code == 0
    assert called["study"] == Path("s.toml")
    assert (called["resume"], called["out"], called["engine"]) == (None, Path("o"), "ray")
    assert (called["workers"], called["device"], called["baselines"]) == (3, "cpu", False)


def test_resume_needs_no_study(called: dict) -> None:
    assert CliRunner().invoke(app, ["--resume", "runs/x"]).exit_code == 0
    assert (called["study"], called["resume"], called["baselines"]) == (None, Path("runs/x"), None)


def test_json_is_all_that_stdout_holds(called: dict) -> None:
    result = CliRunner().invoke(app, ["s.toml", "--json"])
    assert json.loads(result.stdout) == json.loads(called["run"].summary.model_dump_json())
    assert json.loads(result.stdout).keys() >= KEYS
    assert len(result.stdout.splitlines()) == 1
    assert "noise of a library" in result.stderr


def test_quiet_prints_the_run_folder_alone(called: dict) -> None:
    result = CliRunner().invoke(app, ["s.toml", "--quiet"])
    assert result.stdout.strip() == str(called["run"].folder)


def test_table_then_privacy_then_provenance_then_places(called: dict) -> None:
    out = CliRunner().invoke(app, ["s.toml"]).stdout
    shown = " ".join(out.split())
    marks = [
        "zero-shot",
        "mean of sites",
        "worst site",
        NO_PRIVACY,
        "patients are synthetic warps",
        "report.html",
    ]
    positions = [shown.index(mark) for mark in marks]
    assert positions == sorted(positions)
    assert f"adapter {called['run'].folder / 'adapter'}" in shown
    for value in NUMBERS.values():
        assert out.count(f"{value:.3f}") == 2 * 3 + 2
    assert "noise of a library" not in out


def test_privacy_sentence_is_red_on_a_terminal(called: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert f"\x1b[1;31m{NO_PRIVACY[:30]}" in CliRunner().invoke(app, ["s.toml"], color=True).stdout


def test_columns_that_were_not_run_are_left_out(called: dict, tmp_path: Path) -> None:
    called["run"] = make_run(tmp_path / "two", columns=("zero_shot", "federated"))
    out = CliRunner().invoke(app, ["s.toml", "--no-baselines"]).stdout
    assert "federated" in out
    assert "local-only" not in out
    assert "pooled" not in out


def test_classification_does_not_claim_zero_shot(called: dict, tmp_path: Path) -> None:
    called["run"] = make_run(tmp_path / "cls", classification=True)
    out = CliRunner().invoke(app, ["s.toml"]).stdout
    assert "before training" in " ".join(out.split())
    assert "zero-shot" not in out


def test_one_site_has_no_rows_over_sites(called: dict, tmp_path: Path) -> None:
    called["run"] = make_run(tmp_path / "one", sites=("north",))
    assert "worst site" not in CliRunner().invoke(app, ["s.toml"]).stdout


def test_few_shot_curve_is_printed_below_the_table_and_added_to_json(called: dict) -> None:
    plain = called["run"]

    def point(patients: int, **values: float) -> FewShotPoint:
        mean = {column: Measured(value=value, low=value - 0.01, high=value + 0.01) for column, value in values.items()}
        joining = mean.get("federated") and Measured(value=0.111, low=0.1, high=0.125)
        return FewShotPoint(
            patients=patients, patients_at={"north": patients}, mean=mean, sites={}, joining=joining, joining_at={}
        )

    points = (
        point(0, zero_shot=0.5),
        point(1, local_only=0.6, federated=0.65),
        point(2, local_only=0.7, federated=0.8),
    )
    curve = FewShot(resamples=2000, metric="dice", points=points)
    called["run"] = Run(plain.folder, plain.summary, curve)
    out = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["s.toml", "--few-shot", "1"]).stdout
    assert called["few_shot"] == (1,)
    shown = " ".join(out.split())
    assert "1 0.600 0.650 +0.111 0.590 to 0.610 0.640 to 0.660 +0.100 to +0.125" in shown
    assert "all (2) 0.700" in shown
    assert shown.index("worst site") < shown.index("difference") < shown.index(NO_PRIVACY)
    held = json.loads(CliRunner().invoke(app, ["s.toml", "--few-shot", "1", "--json"]).stdout)
    assert held.pop("few_shot") == curve.model_dump(mode="json")
    assert held == json.loads(plain.summary.model_dump_json())


def test_few_shot_numbers_are_checked_before_anything_runs(called: dict) -> None:
    result = CliRunner().invoke(app, ["s.toml", "--few-shot", "1,x"])
    assert result.exit_code == 2
    assert "study" not in called


def test_interrupt_says_how_to_go_on(called: dict) -> None:
    called["error"] = KeyboardInterrupt()
    result = CliRunner().invoke(app, ["s.toml"])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert f"medfed simulate --resume {called['run'].folder}" in result.stderr.replace("\n", "")


def test_interrupt_before_the_run_folder_has_nothing_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation.harness, "simulate", interrupted)
    result = CliRunner().invoke(app, ["s.toml"])
    assert result.exit_code == 130
    assert "nothing was trained yet" in result.stderr
    assert "--resume" not in result.stderr


def test_unknown_engine_is_refused_before_anything_runs(called: dict) -> None:
    assert CliRunner().invoke(app, ["s.toml", "--engine", "spark"]).exit_code == 2
    assert "study" not in called


@pytest.mark.process
def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, simulation.command, server.report_command;"
        "print([m for m in ('torch', 'flwr', 'matplotlib', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
