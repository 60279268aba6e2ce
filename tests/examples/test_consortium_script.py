"""`make consortium`: one script does what the README says, to the end of the study, and leaves nothing running."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/consortium.sh"
SITES = ("north", "east", "south")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def consortium_at(port: int, folder: Path) -> Path:
    path = folder / "consortium.toml"
    text = (ROOT / "examples/consortium.toml").read_text()
    assert "port = 8443" in text
    path.write_text(text.replace("port = 8443", f"port = {port}"))
    return path


def smaller_study(folder: Path) -> Path:
    """One round on one structure; as many patients as a fresh policy asks for."""
    text = (ROOT / "examples/three-hospitals.toml").read_text()
    for old, new in (
        ("num_rounds = 3", "num_rounds = 1"),
        ("steps_per_round = 4", "steps_per_round = 1"),
        ("train_patients = 24", "train_patients = 20"),
        ("test_patients = 2", "test_patients = 1"),
        ('"thalamus-left", "putamen-right", "caudate-left", "hippocampus-right"', '"thalamus-left"'),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "study.toml"
    path.write_text(text)
    return path


def run_script(*arguments: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def left_running(folder: Path) -> list[str]:
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and str(folder) in " ".join(process.info["cmdline"])
        and "medfed" in " ".join(process.info["cmdline"])
    ]


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.process
@pytest.mark.timeout(1800)  # 220 s of processor time; ten minutes on a machine that others keep busy
def test_script_ends_with_a_finished_private_study_and_nothing_left_running(tmp_path: Path) -> None:
    port = free_port()
    demo = tmp_path / "demo"
    done = run_script(demo, smaller_study(tmp_path), consortium_at(port, tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (summary,) = demo.glob("consortium/runs/*/summary.json")
    results = json.loads(summary.read_text())
    assert (tuple(results["sites"]), results["rounds"]) == (SITES, 1)
    assert results["privacy"]["promise"].startswith("Differential privacy for each training patient")
    for name in ("report.html", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (summary.parent / name).stat().st_size > 0
    for site in SITES:
        (trained,) = (
            line["departure"]
            for line in map(json.loads, (demo / "sites" / site / "state/audit-log.jsonl").read_text().splitlines())
            if line["departure"]["action"] == "train"
        )
        assert (trained["outcome"], trained["round"]) == ("reply", 1)
        assert 0 < trained["epsilon_after"] <= 8
    assert "the log is as it was written" in done.stdout
    assert "of 10 spent" in done.stdout
    assert left_running(demo) == []
    socket.create_server(("127.0.0.1", port)).close()  # free again, for a second time


def test_script_refuses_a_port_in_use_and_a_folder_that_is_there_before_it_makes_anything(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run_script(tmp_path / "demo", smaller_study(tmp_path), consortium_at(port, tmp_path), folder=tmp_path)
    assert done.returncode == 1
    assert f"Expected port {port} of this machine to be free" in done.stderr
    assert not (tmp_path / "demo").exists()
    done = run_script(tmp_path, smaller_study(tmp_path), consortium_at(free_port(), tmp_path), folder=tmp_path)
    assert done.returncode == 1
    assert "Expected a new folder" in done.stderr
