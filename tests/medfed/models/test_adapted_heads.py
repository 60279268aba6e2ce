"""``adapter.method = "heads"``: the heads train, nothing is injected, and the file is still a PEFT file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel, load_adapter
from medfed.models.folding import ModelState
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig, parse_study

CPU = torch.device("cpu")


def study(**changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "probe",
            "seed": 5,
            "backbone": {"name": "stand-in-classifier", "sha256": "0" * 64},
            "adapter": {"method": "heads"},
            "task": {"kind": "classification", "targets": {"lesion": ["no", "yes"]}},
            "training": {"local_epochs": 1, "batch_size": 2, "learning_rate": 0.1},
            "rounds": {"num_rounds": 1},
            "sites": [{"name": "north"}],
            **changes,
        }
    )


def test_only_heads_may_travel_and_the_whole_backbone_is_cacheable() -> None:
    model = AdaptedModel(study(), CPU)
    names = [spec.name for spec in model.manifest.tensors]
    assert names
    assert all(name.startswith("base_model.model.head.") for name in names)
    assert (model.manifest.method, model.manifest.rank) == ("heads", None)
    assert model.num_frozen_stages == len(model.backbone.stages) - 1


def test_saved_heads_come_back_through_peft(tmp_path: Path) -> None:
    model = AdaptedModel(study(), CPU)
    adapter_P = model.initial_P + torch.arange(len(model.initial_P))
    model.save(tmp_path, ModelState(adapter_P))
    generator = torch.Generator().manual_seed(0)
    back = load_adapter(tmp_path, backbone_of(study().backbone).build(study().task, generator))
    image_B3HW = torch.randn(1, 3, 28, 28)
    model.load(adapter_P)
    model.train(False)
    expected = model.backbone.classify(model.backbone.resume(image_B3HW, 0))
    actual = back.get_base_model().classify(back.get_base_model().resume(image_B3HW, 0))
    assert actual["lesion"].shape == expected["lesion"].shape
    weights = [p for name, p in back.named_parameters() if "modules_to_save" in name]
    assert torch.equal(torch.cat([p.flatten() for p in weights]).sort().values, adapter_P.sort().values)


def test_backbone_without_heads_is_refused() -> None:
    segmenter = study(
        backbone={"name": "stand-in-segmenter", "sha256": "0" * 64},
        task={"kind": "segmentation", "classes": ["near"]},
    )
    with pytest.raises(StudyError, match="fresh heads"):
        AdaptedModel(segmenter, CPU)


def test_study_of_heads_survives_the_wire() -> None:
    assert parse_study(study().canonical, digest=study().digest) == study()


def test_lora_is_the_method_unless_another_is_named() -> None:
    lora = {"rank": 2, "alpha": 4.0, "targets": "last-block"}
    assert study(adapter=lora) == study(adapter={"method": "lora", **lora})
