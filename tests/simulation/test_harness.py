"""Whole simulations on stand-in backbones: the same apps, every engine, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medfed.errors import CheckpointError, DataError, MedfedError, StudyError
from medfed.study import StudyConfig
from server.checkpoint import read_checkpoint
from simulation.harness import Run, simulate
from simulation.run_folder import metrics_of, stored_study

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


def adapter_of(run: Run) -> torch.Tensor:
    study = stored_study(run.folder)
    state = read_checkpoint(run.folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state.adapter_P


def test_run_leaves_everything_it_promises(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0)
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "study.json", "sites.json", "metrics.jsonl", "adapter", "arms", "summary.json", "report.html", "figures",
    }  # fmt: skip
    assert {p.name for p in (run.folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert set(run.summary.sites) == {"north", "south"}
    for site in run.summary.sites.values():
        assert set(site["dice"]) == {"zero_shot", "local_only", "federated", "pooled"}
    assert json.loads((run.folder / "summary.json").read_text())["mean"] == run.summary.mean
    assert {line["scope"] for line in metrics_of(run.folder)} == {"federated"}


def test_adapter_folder_loads_with_peft_and_gives_the_same_masks(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    import medfed
    from medfed.models.adapted import AdaptedModel

    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0)
    trained_P = adapter_of(run)
    model = AdaptedModel(stored_study(run.folder), torch.device("cpu"))
    fresh = AdaptedModel(stored_study(run.folder), torch.device("cpu"))._peft.unload()
    loaded = medfed.load_adapter(run.folder / "adapter", fresh).get_base_model()
    model.load(trained_P)
    model.train(False)
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    owner = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image, box, owner), model.backbone(image, box, owner))
    stored = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(model.manifest.flatten(stored), trained_P)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
def test_result_is_bit_identical_for_any_number_of_workers(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_study())
    runs = [simulate(path, out=tmp_path / f"runs{n}", workers=n) for n in (0, 1, 2)]
    for other in runs[1:]:
        assert torch.equal(adapter_of(runs[0]), adapter_of(other))
        assert (runs[0].folder / "metrics.jsonl").read_bytes() == (other.folder / "metrics.jsonl").read_bytes()
        assert runs[0].summary.sites == other.summary.sites


@pytest.mark.usefixtures("without_pictures")
def test_same_study_and_seed_give_the_same_metrics(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_study())
    first, second = (simulate(path, out=tmp_path / name, workers=0, baselines=False) for name in ("a", "b"))
    assert (first.folder / "metrics.jsonl").read_bytes() == (second.folder / "metrics.jsonl").read_bytes()
    assert torch.equal(adapter_of(first), adapter_of(second))


@pytest.mark.usefixtures("without_pictures")
def test_another_seed_gives_another_adapter(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    study = make_study()
    runs = [simulate(study_file(study.replace(seed=seed)), out=tmp_path, workers=0, baselines=False) for seed in (1, 2)]
    assert not torch.equal(adapter_of(runs[0]), adapter_of(runs[1]))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_adapter_bit_for_bit(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_study(rounds={"num_rounds": 6}, training={"local_epochs": 4, "batch_size": 1, "learning_rate": 0.01})
    path = study_file(study)
    command = [sys.executable, "-m", "medfed", "simulate", str(path), "--workers", "2", "--json"]
    with subprocess.Popen([*command, "--out", str(tmp_path / "killed")], start_new_session=True) as process:
        checkpoint = _wait_for(tmp_path / "killed", "*/metrics.jsonl", b'"round": 2')
        os.killpg(process.pid, signal.SIGKILL)
    folder = checkpoint.parent
    assert not (folder / "summary.json").exists()
    stopped_at = max(line["round"] for line in metrics_of(folder))
    assert 2 <= stopped_at < 6

    done = subprocess.run(
        [*command[:3], "simulate", "--resume", str(folder), "--json"], capture_output=True, check=True
    )
    resumed = json.loads(done.stdout)
    undisturbed = simulate(path, out=tmp_path / "undisturbed", workers=0)
    assert resumed["sites"] == undisturbed.summary.model_dump()["sites"]
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed.folder / "metrics.jsonl").read_bytes()
    same = load_file(folder / "adapter/adapter_model.safetensors")
    other = load_file(undisturbed.folder / "adapter/adapter_model.safetensors")
    assert all(torch.equal(same[name], other[name]) for name in other)


def _wait_for(root: Path, pattern: str, content: bytes, timeout_s: float = 90.0) -> Path:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for path in root.glob(pattern):
            if content in path.read_bytes():
                return path
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} with {content!r} in {root} within {timeout_s} s")


def test_site_that_cannot_be_read_stops_the_run_before_it_starts(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    import nibabel

    study = make_study()
    image = next((tmp_path / "cohorts" / "south").glob("image0*"))
    nibabel.save(nibabel.Nifti1Image(np.full((64, 64), np.nan, np.float32), np.eye(4)), image)
    with pytest.raises(DataError, match="row 2: .*image0.nii.gz: expected finite voxels"):
        simulate(study_file(study), out=tmp_path / "runs", workers=0)


def test_run_is_not_resumed_on_other_data_or_with_other_options(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0, baselines=False)
    assert simulate(resume=run.folder, workers=0).summary.sites == run.summary.sites
    with pytest.raises(CheckpointError, match="baselines = False"):
        simulate(resume=run.folder, baselines=True)
    manifest = tmp_path / "cohorts" / "south" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("south-0,train", "south-0,test"))
    with pytest.raises(CheckpointError, match="other data at 'south'"):
        simulate(resume=run.folder, workers=0)


def test_folder_that_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="study.json"):
        simulate(resume=tmp_path)
    with pytest.raises(StudyError, match="one of them"):
        simulate()


def test_wrong_backbone_digest_is_refused_with_the_right_one(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_study(backbone={"name": "stand-in-segmenter", "sha256": "1" * 64})
    with pytest.raises(MedfedError, match="backbone.sha256 = 0000"):
        simulate(study_file(study), out=tmp_path / "runs")


def test_classification_study_runs_with_its_heads(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    study = make_study(
        backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
        adapter={"rank": 2, "alpha": 4.0, "targets": "last-block"},
        task={"kind": "classification", "targets": {"side": ("left", "right")}},
    )
    path = study_file(study)
    run = simulate(path, out=tmp_path / "runs", workers=0)
    assert set(run.summary.sites["north"]) == {"balanced-accuracy", "balanced-accuracy/side"}
    stored = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert any("head" in name for name in stored)
    assert any("lora_A" in name for name in stored)


@pytest.mark.usefixtures("without_pictures")
def test_arms_make_the_same_number_of_passes_over_every_image(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0)
    rounds = {
        scope: len({line["round"] for line in metrics_of(run.folder / "arms" / scope) if line["event"] == "train"})
        for scope in ("pooled", "local-north", "local-south")
    }
    assert set(rounds.values()) == {2}
