"""The same unmodified apps on two engines end with the same adapter."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medfed.study import StudyConfig
from simulation.harness import simulate


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an extra: make setup-ray")
def test_ray_and_in_process_adapters_agree_to_1e_6(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    path = study_file(make_study(("north", "south", "west")))
    here = simulate(path, out=tmp_path / "here", workers=0)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "medfed",
            "simulate",
            str(path),
            "--engine",
            "ray",
            "--workers",
            "2",
            "--json",
            "--out",
            str(tmp_path / "ray"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    on_ray = json.loads(done.stdout)
    stored = [
        load_file(Path(folder) / "adapter/adapter_model.safetensors") for folder in (here.folder, on_ray["run_dir"])
    ]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=0, atol=1e-6)
    for site, metrics in here.summary.sites.items():
        for name, columns in metrics.items():
            assert on_ray["sites"][site][name] == pytest.approx(columns, abs=1e-4)
