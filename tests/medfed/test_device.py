"""Devices: one rule, and the same code on a GPU where there is one."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.data import load_cohort
from client.features import FeatureCache
from client.trainer import train_locally
from medfed.device import choose_device, mixed_precision, prepare_cpu
from medfed.errors import DeviceError
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig
from medfed.tasks import task_of
from strategies.subspace import Subspace


def test_auto_takes_cuda_if_present_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_absent_or_unknown_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="use --device auto or cpu"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="got 'tpu'"):
        choose_device("tpu")


def test_cpu_computes_in_full_precision() -> None:
    with mixed_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_preparing_the_cpu_fixes_the_number_of_threads() -> None:
    prepare_cpu(1)
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_free_memory_is_returned_although_the_allocator_keeps_it_between_steps() -> None:
    """In a process of its own: how the allocator is set cannot be undone."""
    code = """
import torch
from psutil import Process
from medfed.device import prepare_cpu, return_free_memory
prepare_cpu(1)
torch.ones(2**18).sum()  # loads what a process loads once
return_free_memory()
resident = [Process().memory_info().rss]
blocks = [torch.ones(2**18) for _ in range(64)]
below_the_top = torch.ones(1000)
del blocks
resident += [Process().memory_info().rss]
return_free_memory()
resident += [Process().memory_info().rss]
print((resident[1] - resident[0]) // 2**20, (resident[2] - resident[0]) // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept >= 60
    assert left <= 4


@pytest.mark.gpu
def test_autocast_on_cuda_is_bfloat16() -> None:
    device = torch.device("cuda")
    with mixed_precision(device):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_training_on_cuda_follows_the_cpu(make_study: Callable[..., StudyConfig]) -> None:
    """bfloat16 rounds to 8 bits: the adapters point the same way, they are not equal."""
    study = make_study(("north",))
    assert study.sites[0].data is not None
    results = []
    for device in ("cpu", "cuda"):
        model = AdaptedModel(study, torch.device(device))
        cohort = load_cohort("north", [study.sites[0].data], study.task, model.pixels)
        trained = train_locally(
            model,
            task_of(study.task),
            cohort.train,
            study.training.model_copy(update={"optimizer": "sgd"}),
            start_P=model.initial_P,
            trainable=Subspace.everything(model.manifest),
            features=FeatureCache(),
            generator=torch.Generator().manual_seed(0),
        )
        results.append(trained.adapter_P - model.initial_P)
    assert torch.nn.functional.cosine_similarity(results[0], results[1], dim=0) > 0.95


@pytest.mark.gpu
def test_whole_simulation_runs_on_cuda(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    from simulation.harness import simulate

    run = simulate(study_file(make_study()), out=tmp_path / "runs", device="cuda")
    assert set(run.summary.mean) == {"zero_shot", "local_only", "federated", "pooled"}
