"""A PEFT folder that carries folds: plain PEFT makes of it what the folded model computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from medfed.canonical import derive_seed
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import Fold, ModelState
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig

CPU = torch.device("cpu")
BLOCK = r"backbone\.encoder\.layer\.3\."


def study_of(*, rank: int = 2, alpha: float = 3.0, targets: str = "last-block") -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "folds",
            "seed": 3,
            "backbone": {"name": "stand-in-classifier", "sha256": "0" * 64},
            "adapter": {"rank": rank, "alpha": alpha, "targets": targets},
            "task": {"kind": "classification", "targets": {"present": ["no", "yes"], "side": ["none", "left"]}},
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 0.1},
            "rounds": {"num_rounds": 1},
            "sites": [{"name": "a", "data": "x"}],
        }
    )


def fold_of(model: AdaptedModel, seed: int, rank: int, *, only: str = "") -> Fold:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in model.manifest.tensors:
        if spec.name.endswith("lora_A.weight") and only in spec.name:
            tensors[spec.name] = 0.2 * torch.randn(rank, spec.shape[1], generator=generator)
        if spec.name.endswith("lora_B.weight") and only in spec.name:
            tensors[spec.name] = 0.2 * torch.randn(spec.shape[0], rank, generator=generator)
    return Fold.of(tensors)


def outputs(backbone: Any) -> Tensor:
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        classified = backbone.classify(backbone.resume(images, 0))
    return torch.cat([classified[target] for target in sorted(classified)], dim=1)


def read_by_peft(folder: Path, study: StudyConfig) -> Any:
    # A stand-in has no weights file: its seed is what its weights come from.
    generator = torch.Generator().manual_seed(derive_seed(study.seed, "head"))
    bare = backbone_of(study.backbone).build(study.task, generator)
    return PeftModel.from_pretrained(bare, str(folder)).eval()


def state_of(model: AdaptedModel, *folds: Fold) -> ModelState:
    generator = torch.Generator().manual_seed(8)
    return ModelState(0.3 * torch.randn(model.manifest.num_elements, generator=generator), folds)


MIXED = rf"regex:{BLOCK}(attention\.q_proj|mlp\.fc1|mlp\.fc2)"


@pytest.mark.parametrize(
    ("targets", "rank", "fold_ranks"),
    [
        ("last-block", 2, []),
        ("last-block", 2, [2, 2, 2]),
        ("last-block", 2, [1, 5]),
        ("last-block", 4, [30, 30]),  # layers are 32 wide
        (MIXED, 2, [40]),  # more than 32 at each of them, whose other sides differ
        (MIXED, 3, [3]),
    ],
    ids=["none", "three", "unequal", "beyond-the-layer", "mixed-beyond", "mixed"],
)
def test_peft_alone_computes_what_the_folded_model_does(
    targets: str, rank: int, fold_ranks: list[int], tmp_path: Path
) -> None:
    study = study_of(rank=rank, targets=targets)
    model = AdaptedModel(study, CPU)
    state = state_of(model, *(fold_of(model, number, r) for number, r in enumerate(fold_ranks)))
    model.save(tmp_path, state)
    model.put(state)
    model.train(False)
    expected = outputs(model.backbone)
    torch.testing.assert_close(outputs(read_by_peft(tmp_path, study).get_base_model()), expected, rtol=1e-4, atol=1e-4)
    # Folds are seen in the outputs, so a file without them would be another model.
    model.put(ModelState(state.adapter_P))
    if fold_ranks:
        assert float((outputs(model.backbone) - expected).abs().max()) > 1e-2


def test_layers_of_different_rank_keep_their_scale(tmp_path: Path) -> None:
    study = study_of(alpha=5.0)
    model = AdaptedModel(study, CPU)
    state = state_of(model, fold_of(model, 1, 7, only="q_proj"))
    model.save(tmp_path, state)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (9, 22.5)
    v_proj = "backbone.encoder.layer.3.attention.v_proj"
    assert config["rank_pattern"] == {v_proj: 2}
    assert config["alpha_pattern"] == {v_proj: 5.0}
    model.put(state)
    model.train(False)
    expected = outputs(model.backbone)
    torch.testing.assert_close(outputs(read_by_peft(tmp_path, study).get_base_model()), expected, rtol=1e-4, atol=1e-4)


def test_rank_of_a_saved_layer_is_at_most_its_smaller_side(tmp_path: Path) -> None:
    study = study_of(targets=MIXED)
    model = AdaptedModel(study, CPU)
    model.save(tmp_path, state_of(model, fold_of(model, 1, 100)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for spec in model.manifest.tensors:
        if spec.name.endswith("lora_A.weight"):
            d_out = tensors[spec.name.replace("lora_A", "lora_B")].shape[0]
            assert tensors[spec.name].shape[0] == min(d_out, spec.shape[1]) == 32


def test_heads_are_saved_as_they_are(tmp_path: Path) -> None:
    model = AdaptedModel(study_of(), CPU)
    state = state_of(model, fold_of(model, 1, 2))
    model.save(tmp_path, state)
    tensors, adapter = load_file(tmp_path / "adapter_model.safetensors"), model.manifest.unflatten(state.adapter_P)
    heads = [name for name in adapter if "lora" not in name]
    assert heads
    assert all(torch.equal(tensors[name], adapter[name]) for name in heads)
    assert tensors.keys() == adapter.keys()


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = AdaptedModel(study_of(), CPU)
    model.put(state_of(model, fold_of(model, 5, 3)))
    model.train(False)
    before_P, before = model.read(), outputs(model.backbone)
    model.save(tmp_path, ModelState(torch.zeros_like(before_P), (fold_of(model, 1, 2),)))
    assert torch.equal(model.read(), before_P)
    assert torch.equal(outputs(model.backbone), before)


def test_base_weights_are_the_backbones_again_without_folds() -> None:
    model = AdaptedModel(study_of(), CPU)
    model.train(False)
    plain = outputs(model.backbone)
    model.put(state_of(model, fold_of(model, 5, 3), fold_of(model, 6, 2)))
    assert not torch.equal(outputs(model.backbone), plain)
    model.put(ModelState(model.initial_P))
    assert torch.equal(outputs(model.backbone), plain)
