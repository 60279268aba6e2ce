"""The same unmodified apps on two engines end with the same adapter."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medfed.study import StudyConfig
from simulation.harness import simulate


def simulate_on_ray(study: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What ``medfed simulate --engine ray --json`` prints, in a process of its own."""
    command = [sys.executable, "-m", "medfed", "simulate", str(study), "--engine", "ray", "--workers", "2", "--json"]
    done = subprocess.run(
        [*command, "--out", str(folder / "ray"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an extra: make setup-ray")


@pytest.mark.process
@pytest.mark.slow
@needs_ray
def test_ray_and_in_process_adapters_agree_to_1e_6(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    path = study_file(make_study(("north", "south", "west")))
    here = simulate(path, out=tmp_path / "here", workers=0)
    on_ray = simulate_on_ray(path, tmp_path)
    stored = [
        load_file(Path(folder) / "adapter/adapter_model.safetensors") for folder in (here.folder, on_ray["run_dir"])
    ]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=0, atol=1e-6)
    for site, metrics in here.summary.sites.items():
        for name, columns in metrics.items():
            assert on_ray["sites"][site][name] == pytest.approx(columns, abs=1e-4)


@pytest.mark.process
@pytest.mark.slow
@needs_ray
def test_secure_sums_on_ray_are_those_of_one_process(
    make_secure_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    """Any actor may answer for any site: what a site must remember is in its journal."""
    path = study_file(make_secure_study())
    here = simulate(path, out=tmp_path / "here", workers=0, baselines=False)
    on_ray = simulate_on_ray(path, tmp_path, "--no-baselines")
    stored = [
        load_file(Path(folder) / "adapter/adapter_model.safetensors") for folder in (here.folder, on_ray["run_dir"])
    ]
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=0, atol=1e-6)
