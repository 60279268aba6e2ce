from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from medfed.models.sam_decoder import (
    Attention,
    MaskDecoder,
    PromptEncoder,
    SamDecoderConfig,
    rows_of_boxes,
)

TINY = SamDecoderConfig(width=16, depth=2, heads=2, mlp_width=32, mask_prompt_width=4)
SIDE = 6
# Linears that run once per image: the table in the decoder's docstring.
PER_IMAGE_LINEARS = {
    "transformer.layers.0.cross_attn_token_to_image.k_proj",
    "transformer.layers.0.cross_attn_token_to_image.v_proj",
    "transformer.layers.0.cross_attn_image_to_token.q_proj",
}
# Images of boxes: interleaved, and image 1 has none.
OWNER_N = torch.tensor([2, 0, 2, 0, 3])


def decoder_and_inputs() -> tuple[MaskDecoder, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    decoder = MaskDecoder(TINY).eval()
    return decoder, torch.randn(4, 16, SIDE, SIDE), torch.randn(SIDE * SIDE, 16), torch.randn(5, 2, 16)


def test_sharing_the_image_side_equals_decoding_each_box_with_its_own_copy_of_the_image() -> None:
    decoder, image, position, corners = decoder_and_inputs()
    shared = decoder(image, position, corners, OWNER_N)
    copied = decoder(image[OWNER_N], position, corners, torch.arange(5))
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=0)


def test_sharing_the_image_side_gives_the_same_gradients() -> None:
    decoder, image, position, corners = decoder_and_inputs()
    target = torch.randn(5, 4 * SIDE, 4 * SIDE)

    def gradients(image: Tensor, owner: Tensor) -> list[Tensor | None]:
        decoder.zero_grad()
        (decoder(image, position, corners, owner) * target).mean().backward()
        return [parameter.grad for parameter in decoder.parameters()]

    shared, copied = gradients(image, OWNER_N), gradients(image[OWNER_N], torch.arange(5))
    for one, other in zip(shared, copied, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_only_the_listed_linears_see_one_row_per_image_and_all_others_one_per_box() -> None:
    decoder, image, position, corners = decoder_and_inputs()
    rows: dict[str, int] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, __, name=name: rows.update({name: len(inputs[0])}))
    decoder(image, position, corners, OWNER_N)
    assert {name for name, count in rows.items() if count == 4} == PER_IMAGE_LINEARS
    assert {name for name, count in rows.items() if count == 5} == rows.keys() - PER_IMAGE_LINEARS


def test_attention_agrees_with_a_loop_over_heads() -> None:
    torch.manual_seed(0)
    attention = Attention(16, heads=2, shrink=2)
    query, key, value = torch.randn(3, 4, 16), torch.randn(3, 9, 16), torch.randn(3, 9, 16)
    q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
    heads = [
        (q[..., part] @ k[..., part].mT / math.sqrt(4)).softmax(-1) @ v[..., part]
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(attention(query, key, value), attention.out_proj(torch.cat(heads, dim=-1)))


def test_painting_agrees_with_the_transposed_convolutions_of_the_checkpoint() -> None:
    decoder, image, *_ = decoder_and_inputs()
    mask_weight = torch.randn(4, 2)
    upscaled = decoder.output_upscaling(image)
    expected = torch.einsum("nehw,ne->nhw", upscaled, mask_weight)
    torch.testing.assert_close(decoder._paint(image.permute(0, 2, 3, 1), mask_weight), expected)


@pytest.mark.parametrize("images", [1, 3])
def test_rows_of_boxes_picks_the_row_of_each_owner(images: int) -> None:
    x, owner = torch.randn(images, 5, 2), torch.tensor([2, 0, 2, 1]) % images
    assert torch.equal(rows_of_boxes(x, owner), x[owner])
    assert rows_of_boxes(x, None) is x


def test_box_tokens_and_pixel_positions_follow_the_fourier_formula() -> None:
    torch.manual_seed(0)
    prompts = PromptEncoder(TINY, image_size=24, grid_side=SIDE)
    matrix = prompts.pe_layer.positional_encoding_gaussian_matrix

    def features(x: float, y: float) -> Tensor:
        phase = 2 * math.pi * (torch.tensor([2 * x - 1, 2 * y - 1]) @ matrix)
        return torch.cat([phase.sin(), phase.cos()])

    tokens = prompts.box_tokens(torch.tensor([[1, 2, 20, 22]]))
    top_left = features(1.5 / 24, 2.5 / 24) + prompts.point_embeddings[2].weight[0]
    bottom_right = features(20.5 / 24, 22.5 / 24) + prompts.point_embeddings[3].weight[0]
    torch.testing.assert_close(tokens[0], torch.stack([top_left, bottom_right]))
    row, column = 4, 1
    expected = features((column + 0.5) / SIDE, (row + 0.5) / SIDE)
    torch.testing.assert_close(prompts.pixel_positions()[row * SIDE + column], expected)


def test_prompt_encoder_has_nothing_to_train() -> None:
    prompts = PromptEncoder(TINY, image_size=24, grid_side=SIDE)
    assert not any(parameter.requires_grad for parameter in prompts.parameters())


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 12}, {"width": 16, "heads": 3}])
def test_config_refuses_impossible_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        SamDecoderConfig(**wrong)
