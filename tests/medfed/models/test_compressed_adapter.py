"""Smaller adapters: the best of their rank, with the error that was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import medfed
from medfed.adapter_command import app
from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel
from medfed.models.compressed_adapter import compress, relative_error
from medfed.models.folding import ModelState
from medfed.study import StudyConfig

CPU = torch.device("cpu")
RANK = 4


@pytest.fixture
def saved(make_study: Callable[..., StudyConfig], tmp_path: Path) -> tuple[StudyConfig, Path]:
    study = make_study(adapter={"rank": RANK, "alpha": 8.0, "targets": "decoder-qv"})
    model = AdaptedModel(study, CPU)
    trained_P = torch.randn(model.initial_P.shape, generator=torch.Generator().manual_seed(1))
    model.save(tmp_path / "adapter", ModelState(trained_P))
    return study, tmp_path / "adapter"


def products_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in stored if "lora_A" in name]
    return {n: stored[f"{n}.lora_B.weight"].double() @ stored[f"{n}.lora_A.weight"].double() for n in names}


def test_what_is_lost_is_what_the_smallest_singular_values_hold(saved: tuple[StudyConfig, Path]) -> None:
    _, folder = saved
    layers = compress(folder, folder.parent / "small", 2)
    before, after = products_of(folder), products_of(folder.parent / "small")
    for layer in layers:
        values = torch.linalg.svdvals(before[layer.layer])
        assert (layer.rank, layer.kept) == (RANK, 2)
        assert layer.lost == pytest.approx(float(values[2:].norm()), rel=1e-6)
        difference = before[layer.layer] - after[layer.layer]
        assert float(difference.norm()) == pytest.approx(layer.lost, rel=1e-4)  # stored in float32
    norm = torch.cat([value.flatten() for value in before.values()]).norm()
    lost = torch.cat([(before[name] - after[name]).flatten() for name in before]).norm()
    assert relative_error(layers) == pytest.approx(float(lost / norm), rel=1e-4)


def test_smaller_adapter_loads_with_peft_and_all_of_the_rank_loses_nothing(saved: tuple[StudyConfig, Path]) -> None:
    study, folder = saved
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    owner = torch.zeros(1, dtype=torch.int64)
    outputs = []
    compress(folder, folder.parent / "same", RANK + 3)
    compress(folder, folder.parent / "one", 1)
    for place in (folder, folder.parent / "same", folder.parent / "one"):
        bare = AdaptedModel(study, CPU)._peft.unload()
        with torch.no_grad():
            outputs.append(medfed.load_adapter(place, bare).get_base_model()(image, box, owner))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_folder_that_is_there_is_not_written_over(saved: tuple[StudyConfig, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="name another"):
        compress(saved[1], saved[1], 1)
    with pytest.raises(StudyError, match="check the path"):
        compress(tmp_path / "nowhere", tmp_path / "out", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_layers_that_peft_scales_otherwise_are_refused(saved: tuple[StudyConfig, Path], change: dict[str, Any]) -> None:
    path = saved[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StudyError, match="cannot be compressed"):
        compress(saved[1], saved[1].parent / "small", 1)


def test_command_says_what_is_lost(saved: tuple[StudyConfig, Path]) -> None:
    result = CliRunner().invoke(app, ["compress", str(saved[1]), str(saved[1].parent / "small"), "--rank", "2"])
    assert result.exit_code == 0, result.output
    assert "of the update is lost" in result.output
