from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Generator, Tensor
from transformers import Dinov2ForImageClassification

from medfed.models.vit_classifier import (
    ClassificationHeads,
    VitClassifier,
    tiny_vit_classifier,
    vit_s_focus_classifier,
)

TARGETS = {"finding": 3, "effusion": 1}
NUM_TINY_STAGES = 7  # embeddings, four blocks, final norm, head


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def model() -> VitClassifier:
    return tiny_vit_classifier(TARGETS, generator=seeded())


@pytest.fixture(name="image_B3HW")
def make_image() -> Tensor:
    return torch.randn(2, 3, 28, 28, generator=seeded(1))


def with_lora(model: VitClassifier) -> peft.PeftModel:
    """LoRA on q and v of the last quarter of the blocks, heads saved beside it."""
    blocks = [stage for stage in model.stages if ".layer." in stage]
    last_quarter = blocks[-math.ceil(len(blocks) / 4) :]
    linears = [f"{block}.attention.{name}" for block in last_quarter for name in ("q_proj", "v_proj")]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, modules_to_save=["head"])
    )


def test_stages_are_modules_in_the_order_of_the_data_flow(model: VitClassifier) -> None:
    assert model.stages == (
        "backbone.embeddings",
        "backbone.encoder.layer.0",
        "backbone.encoder.layer.1",
        "backbone.encoder.layer.2",
        "backbone.encoder.layer.3",
        "backbone.layernorm",
        "head",
    )
    covered = {name for name, _ in model.named_parameters() if any(name.startswith(f"{s}.") for s in model.stages)}
    assert covered == {name for name, _ in model.named_parameters()}


def test_logits_are_those_of_transformers_own_classifier(model: VitClassifier, image_B3HW: Tensor) -> None:
    for target in TARGETS:
        oracle = Dinov2ForImageClassification(model.backbone.config).eval()
        oracle.dinov2 = model.backbone
        oracle.classifier = model.head.linear[target]
        torch.testing.assert_close(model(image_B3HW)[target], oracle(image_B3HW).logits, rtol=0, atol=0, msg=target)


def test_position_embedding_is_interpolated_alike_in_every_call(model: VitClassifier, image_B3HW: Tensor) -> None:
    tokens = model.prefix(image_B3HW, NUM_TINY_STAGES - 2)
    assert tokens.shape == (2, 1 + 4, 32)  # 2 x 2 patches from 3 x 3 positions
    for _ in range(3):
        assert torch.equal(model.prefix(image_B3HW, NUM_TINY_STAGES - 2), tokens)
    own_forward = model.backbone(image_B3HW).last_hidden_state
    assert torch.equal(model.backbone.layernorm(tokens), own_forward)


@pytest.mark.parametrize("num_stages", range(NUM_TINY_STAGES))
def test_prefix_and_resume_are_the_forward_to_the_bit(
    num_stages: int, model: VitClassifier, image_B3HW: Tensor
) -> None:
    cached = model.prefix(image_B3HW, num_stages)
    logits = model.classify(model.resume(cached, num_stages))
    for target, expected in model(image_B3HW).items():
        assert torch.equal(logits[target], expected)


def test_prefix_of_no_stage_is_the_image_and_of_all_the_embedding(model: VitClassifier, image_B3HW: Tensor) -> None:
    assert model.prefix(image_B3HW, 0) is image_B3HW
    embedding = model.prefix(image_B3HW, NUM_TINY_STAGES - 1)
    assert embedding.shape == (2, 2 * 32)
    assert model.resume(embedding, NUM_TINY_STAGES - 1) is embedding


@pytest.mark.parametrize("num_stages", [-1, NUM_TINY_STAGES, 100])
def test_a_cut_that_does_not_exist_is_refused(num_stages: int, model: VitClassifier, image_B3HW: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected 0 <= num_stages <= 6"):
        model.prefix(image_B3HW, num_stages)
    with pytest.raises(ValueError, match=r"Expected 0 <= num_stages <= 6"):
        model.resume(image_B3HW, num_stages)


def test_logits_have_one_column_per_class(model: VitClassifier, image_B3HW: Tensor) -> None:
    assert {name: tuple(logits.shape) for name, logits in model(image_B3HW).items()} == {
        "finding": (2, 3),
        "effusion": (2, 1),
    }


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (tiny_vit_classifier(TARGETS, generator=seeded(3)) for _ in range(2))
    other = tiny_vit_classifier(TARGETS, generator=seeded(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(first.head.linear["finding"].weight, other.head.linear["finding"].weight)


def test_new_heads_are_small_and_unbiased() -> None:
    layer = ClassificationHeads(768, {"finding": 100}, generator=seeded()).linear["finding"]
    assert torch.count_nonzero(layer.bias) == 0
    # 76,800 draws: the sample deviation lies within 1.3 % of 0.02 but for one case in a million.
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.013)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "Expected at least one target"),
        ({"finding": 0}, r"Expected num_classes >= 1 for target 'finding', got 0"),
        ({"a.b": 2}, r"module, got 'a\.b'"),
        ({"": 2}, "module, got ''"),
        ({"keys": 2}, "module, got 'keys'"),
    ],
)
def test_unusable_targets_are_refused(targets: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vit_classifier(targets, generator=seeded())


@pytest.mark.parametrize(("image_size", "nearest"), [(0, 14), (13, 14), (225, 224)])
def test_an_image_size_that_cuts_a_patch_is_refused(image_size: int, nearest: int, model: VitClassifier) -> None:
    with pytest.raises(ValueError, match=f"The nearest is {nearest}"):
        VitClassifier(model.backbone, TARGETS, generator=seeded(), image_size=image_size)


def test_lora_and_heads_train_over_a_cached_prefix(model: VitClassifier, image_B3HW: Tensor) -> None:
    cut = model.stages.index("backbone.encoder.layer.3")
    with torch.no_grad():
        cached = model.prefix(image_B3HW, cut)
    adapted = with_lora(model)

    logits = model.classify(model.resume(cached, cut))
    sum(value.square().mean() for value in logits.values()).backward()

    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    # lora_A has no gradient yet: lora_B starts at zero.
    assert {name.split(".")[-3] for name in trainable if "lora_" in name} == {"lora_A", "lora_B"}
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert ("lora_A" in name) == (torch.count_nonzero(parameter.grad) == 0), name
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


def test_peft_state_holds_lora_of_the_last_quarter_and_every_head(model: VitClassifier) -> None:
    state = peft.get_peft_model_state_dict(with_lora(model))
    block = "base_model.model.backbone.encoder.layer.3.attention"
    lora = {f"{block}.{linear}.lora_{ab}.weight" for linear in ("q_proj", "v_proj") for ab in "AB"}
    heads = {f"base_model.model.head.linear.{target}.{kind}" for target in TARGETS for kind in ("weight", "bias")}
    assert set(state) == lora | heads


@pytest.mark.parametrize("num_stages", range(NUM_TINY_STAGES))
def test_prefix_and_resume_agree_with_lora_attached(num_stages: int, model: VitClassifier, image_B3HW: Tensor) -> None:
    adapted = with_lora(model).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=seeded(5))
    logits = model.classify(model.resume(model.prefix(image_B3HW, num_stages), num_stages))
    for target, expected in adapted(image_B3HW).items():
        assert torch.equal(logits[target], expected)


@pytest.mark.weights
def test_the_pretrained_classifier_gives_the_embedding_of_its_backbone() -> None:
    model = vit_s_focus_classifier(TARGETS, generator=seeded())
    image_B3HW = torch.randn(1, 3, model.image_size, model.image_size, generator=seeded(1))
    with torch.no_grad():
        embedding_BE = model.resume(model.prefix(image_B3HW, 10), 10)
        tokens_BLD = model.backbone(image_B3HW).last_hidden_state
    expected_BE = torch.cat([tokens_BLD[:, 0], tokens_BLD[:, 1:].mean(dim=1)], dim=1)
    assert torch.equal(embedding_BE, expected_BE)
    assert tokens_BLD.shape == (1, 1 + 16 * 16, 384)
