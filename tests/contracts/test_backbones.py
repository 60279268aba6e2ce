"""Every registered backbone keeps the same promises."""

from typing import Any

import pytest
import torch
from peft import PeftModel

from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.models.registry import backbone_of
from medfed.models.staged import StagedBackbone, count_frozen_stages
from medfed.study import StudyConfig

SEGMENTATION = {"kind": "segmentation", "classes": ["a", "b"]}
CLASSIFICATION = {"kind": "classification", "targets": {"present": ["no", "yes"], "side": ["none", "left", "right"]}}
LITE_MEDSAM = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
VIT_S_FOCUS = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
REAL = [pytest.mark.weights, pytest.mark.slow]
CASES = [
    pytest.param("stand-in-segmenter", "0" * 64, SEGMENTATION, "decoder-qv", id="stand-in-segmenter"),
    pytest.param("stand-in-classifier", "0" * 64, CLASSIFICATION, "last-block", id="stand-in-classifier"),
    pytest.param("lite-medsam", LITE_MEDSAM, SEGMENTATION, "decoder-attention", id="lite-medsam", marks=REAL),
    pytest.param("lite-medsam", LITE_MEDSAM, SEGMENTATION, "encoder-last-stage", id="lite-medsam-encoder", marks=REAL),
    pytest.param("vit-s-focus", VIT_S_FOCUS, CLASSIFICATION, "last-quarter", id="vit-s-focus", marks=REAL),
]


def study_of(name: str, sha256: str, task: dict[str, Any], targets: str) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "contract",
            "seed": 3,
            "backbone": {"name": name, "sha256": sha256},
            "adapter": {"rank": 2, "alpha": 4.0, "targets": targets},
            "task": task,
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 0.1},
            "rounds": {"num_rounds": 1},
            "sites": [{"name": "a", "data": "x"}],
        }
    )


def outputs(model: AdaptedModel, embedding: torch.Tensor) -> torch.Tensor:
    if hasattr(model.backbone, "decode"):
        size = float(model.pixels.image_size or 0)
        box_N4 = torch.tensor([[0.1, 0.2, 0.7, 0.8]]) * size
        result: torch.Tensor = model.backbone.decode(embedding, box_N4, torch.zeros(1, dtype=torch.int64))
        return result
    return torch.cat(list(model.backbone.classify(embedding).values()), dim=1)


@pytest.mark.parametrize(("name", "sha256", "task", "targets"), CASES)
def test_backbone_keeps_its_contract(name: str, sha256: str, task: dict[str, Any], targets: str, tmp_path: Any) -> None:
    study = study_of(name, sha256, task, targets)
    model = AdaptedModel(study, torch.device("cpu"))
    assert isinstance(model.backbone, StagedBackbone)
    size = model.pixels.image_size
    assert size is not None
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)

    # The frozen prefix reaches as far as it can and its features stand for the image, bit for bit.
    assert 0 < model.num_frozen_stages < len(model.backbone.stages)
    whole = model.backbone.resume(image, 0)
    assert torch.equal(model.embed(model.encode(image)), whole)
    assert not model.encode(image).requires_grad

    # The initial adapter changes nothing; another one does; the first comes back exactly.
    plain = outputs(AdaptedModel(study, torch.device("cpu")), whole)
    model.train(False)
    assert torch.equal(outputs(model, model.embed(model.encode(image))), plain)
    other_P = torch.randn(model.manifest.num_elements) * 0.3
    model.load(other_P)
    assert torch.equal(model.read(), other_P)
    changed = outputs(model, model.embed(model.encode(image)))
    assert not torch.equal(changed, plain)

    # Every tensor of the manifest gets a gradient, and nothing else does.
    model.train()
    outputs(model, model.embed(model.encode(image))).square().sum().backward()
    assert model.flat.grad is not None
    for tensor_name, gradient in model.manifest.unflatten(model.flat.grad.detach().clone()).items():
        assert float(gradient.abs().sum()) > 0, tensor_name
    trainable = sum(p.numel() for p in model._peft.parameters() if p.requires_grad)
    assert trainable == model.manifest.num_elements

    # It is built from the seed alone, and stored as a standard PEFT folder.
    assert torch.equal(AdaptedModel(study, torch.device("cpu")).initial_P, model.initial_P)
    model.save(tmp_path / "adapter", ModelState(other_P))
    bare = AdaptedModel(study, torch.device("cpu"))._peft.unload()
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "adapter")).eval()
    inner = AdaptedModel.__new__(AdaptedModel)
    inner.backbone, inner.pixels = loaded.get_base_model(), model.pixels
    # To rounding: PEFT adds what LoRA layers multiply out (medfed/models/multiplied_out.py).
    torch.testing.assert_close(outputs(inner, inner.backbone.resume(image, 0)), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "sha256", "task", "targets"), CASES)
def test_presets_of_a_backbone_all_find_layers(name: str, sha256: str, task: dict[str, Any], targets: str) -> None:
    study = study_of(name, sha256, task, targets)
    entry = backbone_of(study.backbone)
    for preset in entry.presets:
        adapter = study.adapter.model_copy(update={"targets": preset})
        assert AdaptedModel(study.replace(adapter=adapter), torch.device("cpu")).manifest.num_elements > 0


def test_unknown_names_and_fruitless_targets_say_what_there_is() -> None:
    from medfed.errors import StudyError

    study = study_of("stand-in-segmenter", "0" * 64, SEGMENTATION, "decoder-qv")
    for changes, expected in [
        ({"backbone": {"name": "nothing", "sha256": "0" * 64}}, "lite-medsam"),
        ({"adapter": {"rank": 2, "alpha": 1.0, "targets": "everywhere"}}, "decoder-qv"),
        ({"adapter": {"rank": 2, "alpha": 1.0, "targets": "regex:nothing_like_it"}}, "not found"),
        ({"task": CLASSIFICATION}, "task.kind"),
    ]:
        with pytest.raises(StudyError, match=expected):
            AdaptedModel(study.replace(**changes), torch.device("cpu"))


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [(["c.x"], 2), (["b.1.x"], 1), (["a"], 0), (["bb.x"], 3), ([], 3), (["head.w"], 3)],
)
def test_frozen_stages_end_at_the_first_trainable_one(trainable: list[str], expected: int) -> None:
    assert count_frozen_stages(("a", "b.1", "c", "head"), trainable) == expected
