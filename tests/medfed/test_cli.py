"""The command line: one line and an exit code for every mistake of a user, never a traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medfed.cli import main
from medfed.shift_presets import PRESETS
from medfed.shift_profile import ShiftProfile
from medfed.study import StudyConfig

Change = Callable[[Path, Path], None]


def replaced(old: str, new: str) -> Change:
    def change(study: Path, _manifest: Path) -> None:
        text = study.read_text()
        assert old in text
        study.write_text(text.replace(old, new, 1))

    return change


def in_manifest(old: str, new: str) -> Change:
    def change(_study: Path, manifest: Path) -> None:
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new, 1))

    return change


def nan_voxel(_study: Path, manifest: Path) -> None:
    image = np.ones((64, 64), np.float32)
    image[0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), manifest.parent / "image0.nii.gz")


def label_outside_the_classes(_study: Path, manifest: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.full((64, 64), 7.0), np.eye(4)), manifest.parent / "label0.nii.gz")


def empty_site(_study: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("mistake", "exit_code", "says"),
    [
        pytest.param(replaced("batch_size", "batchsize"), 2, "did you mean 'batch_size'", id="wrong key"),
        pytest.param(replaced("manifest.csv", "manifesto.csv"), 2, "expects a data manifest", id="wrong path"),
        pytest.param(replaced("0" * 64, "1" * 64), 4, "backbone.sha256", id="wrong digest"),
        pytest.param(replaced('"decoder-qv"', '"decoder"'), 2, "adapter.targets", id="wrong targets"),
        pytest.param(replaced('"fedit"', '"fedmagic"'), 2, "strategy.name", id="wrong strategy"),
        pytest.param(empty_site, 3, "at least one image", id="empty site"),
        pytest.param(in_manifest("south-1,", ","), 3, "patient_id", id="no patient id"),
        pytest.param(in_manifest("south-4,test", "south-0,test"), 3, "train and test", id="patient in two splits"),
        pytest.param(in_manifest("south-4", "north-4"), 3, "each patient at one site", id="patient at two sites"),
        pytest.param(label_outside_the_classes, 3, "labels 0..2", id="label outside the classes"),
        pytest.param(nan_voxel, 3, "finite voxels", id="NaN voxel"),
    ],
)
def test_mistake_ends_with_one_line_and_its_exit_code(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    mistake: Change,
    exit_code: int,
    says: str,
) -> None:
    study = study_file(make_study(strategy={"name": "fedit"}))
    mistake(study, tmp_path / "cohorts" / "south" / "manifest.csv")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(study), "--out", str(tmp_path / "runs"), "--workers", "0"])
    assert ended.value.code == exit_code
    error_lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("medfed:")]
    assert len(error_lines) == 1
    assert says in error_lines[0]


def test_error_as_json_is_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "none.toml"), "--json"])
    assert ended.value.code == 2
    assert json.loads(capfd.readouterr().out)["error"] == "StudyError"


@pytest.mark.process
def test_process_shows_no_traceback_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("seed = 'x'\n")
    done = subprocess.run(
        [sys.executable, "-m", "medfed", "study", "validate", str(tmp_path / "bad.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_explained(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulat"])
    assert ended.value.code == 2
    assert "simulat" in capfd.readouterr().err


def test_valid_study_is_described(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = study_file(make_study())
    main(["study", "validate", str(path)])
    assert "2 sites, 2 rounds" in capfd.readouterr().out
    main(["study", "digest", str(path)])
    assert len(capfd.readouterr().out.strip()) == 64


def test_unknown_shift_preset_is_refused_with_the_known_ones(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    study = make_study()
    for names, code in ((["weak-link"], 0), (["weak-link", "weak-lnk"], 2)):
        shifted = study.sites[0].model_copy(update={"shift": ShiftProfile(presets=tuple(names))})
        path = study_file(study.replace(sites=[shifted, *study.sites[1:]]))
        if code == 0:
            main(["study", "validate", str(path)])
            continue
        with pytest.raises(SystemExit) as ended:
            main(["study", "validate", str(path)])
        assert ended.value.code == code
    (line,) = capfd.readouterr().err.splitlines()
    assert "site 'north': shift.presets: Expected a preset of low-field" in line
    assert all(name in line for name in PRESETS)
    assert line.endswith("got 'weak-lnk'; did you mean 'weak-link'?")


def test_unreadable_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medfed.study.read_study", full)
    with pytest.raises(SystemExit) as ended:
        main(["study", "validate", "x.toml"])
    assert ended.value.code == 74
    assert "No space left on device" in capfd.readouterr().err
