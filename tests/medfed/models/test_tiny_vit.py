from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medfed.models.tiny_vit import (
    ConvBN,
    LayerNorm2d,
    TinyVit,
    TinyVitConfig,
    WindowAttention,
    join_windows,
    split_windows,
)

TINY = TinyVitConfig(
    image_size=32,
    widths=(4, 4, 6, 8),
    depths=(1, 1, 1, 1),
    heads=(1, 2, 3, 4),
    window_sides=(7, 7, 14, 7),
    expansion=2,
    embedding_width=8,
)


def conv_with_random_statistics(**options: int) -> ConvBN:
    conv = ConvBN(6, 6, **options)
    with torch.no_grad():
        conv.bn.running_mean.uniform_(-1, 1)
        conv.bn.running_var.uniform_(0.5, 2)
        conv.bn.weight.uniform_(0.5, 2)
        conv.bn.bias.uniform_(-1, 1)
    return conv


def attention_one_window_and_head_at_a_time(attention: WindowAttention, x_GTC: Tensor, side: int) -> Tensor:
    width = x_GTC.shape[2]
    per_head = width // attention.heads
    qkv_GTK = attention.qkv(attention.norm(x_GTC))
    out_GTC = torch.zeros_like(x_GTC)
    for window in range(len(x_GTC)):
        for head in range(attention.heads):
            q, k, v = qkv_GTK[window, :, head * 3 * per_head :][:, : 3 * per_head].split(per_head, dim=1)
            score = q @ k.T / math.sqrt(per_head)
            for i in range(side * side):
                for j in range(side * side):
                    rows, columns = abs(i // side - j // side), abs(i % side - j % side)
                    score[i, j] += attention.attention_biases[head, rows * side + columns]
            out_GTC[window, :, head * per_head : (head + 1) * per_head] = score.softmax(-1) @ v
    return attention.proj(out_GTC)


@pytest.mark.parametrize("options", [{}, {"kernel": 3, "stride": 2}, {"kernel": 3, "depthwise": True}])
def test_folded_convolution_equals_convolution_then_batch_norm(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv = conv_with_random_statistics(**options)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(conv(x), conv.bn(conv.c(x)))


def test_batch_norm_stays_in_eval_and_keeps_its_statistics_in_train_mode() -> None:
    conv = conv_with_random_statistics()
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    conv.train()
    assert conv.training
    assert not conv.bn.training
    conv(torch.randn(2, 6, 5, 5))
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())


def test_a_replaced_convolution_is_called_rather_than_bypassed() -> None:
    conv = conv_with_random_statistics()
    x = torch.randn(1, 6, 4, 4)
    plain = conv(x)
    conv.c = nn.Sequential(conv.c)
    torch.testing.assert_close(conv(x), plain)
    conv.c = nn.Sequential(conv.c, nn.Tanh())
    assert not torch.allclose(conv(x), plain)


def test_window_attention_agrees_with_loops_over_windows_heads_and_offsets() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(12, heads=3, side=4)
    nn.init.normal_(attention.attention_biases)
    x = torch.randn(5, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), attention_one_window_and_head_at_a_time(attention, x, side=4))


def test_attention_biases_changed_in_train_mode_take_effect_in_the_next_eval_forward() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, heads=2, side=3).eval()
    x = torch.randn(1, 9, 8)
    before = attention(x)
    attention.train()
    nn.init.normal_(attention.attention_biases)
    in_train = attention(x)
    assert not torch.allclose(in_train, before)
    assert torch.equal(attention.eval()(x), in_train)


def test_attention_biases_receive_a_gradient_when_they_are_trained() -> None:
    attention = WindowAttention(8, heads=2, side=3)
    attention(torch.randn(2, 9, 8)).square().sum().backward()
    assert attention.attention_biases.grad is not None
    assert attention.attention_biases.grad.abs().sum() > 0


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 17), st.integers(1, 17), st.integers(1, 8))
def test_joining_the_windows_of_a_split_grid_restores_it(batch: int, rows: int, columns: int, side: int) -> None:
    x = torch.arange(batch * rows * columns * 2.0).view(batch, rows, columns, 2)
    windows = split_windows(x, side)
    assert windows.shape[1:] == (side * side, 2)
    assert torch.equal(join_windows(windows, side, batch, rows, columns), x)


def test_windows_are_folded_with_the_batch_outermost() -> None:
    x = torch.zeros(3, 10, 10, 1) + torch.arange(1, 4).view(3, 1, 1, 1)
    windows = split_windows(x, 5)
    image_of_row = torch.arange(len(windows)) // (len(windows) // 3)
    assert torch.equal(windows[:, 0, 0], image_of_row + 1.0)


def test_layer_norm_2d_normalises_over_channels_with_biased_variance() -> None:
    torch.manual_seed(0)
    norm = LayerNorm2d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_encoder_maps_an_image_to_a_quarter_grid_and_keeps_images_apart() -> None:
    torch.manual_seed(0)
    encoder = TinyVit(TINY).eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        both = encoder(image)
        image[1] = 0
        other = encoder(image)
    assert both.shape == (2, 8, 8, 8)
    assert torch.equal(both[0], other[0])
    assert not torch.allclose(both[1], other[1])


def test_encoder_gives_the_same_numbers_in_train_and_eval_mode() -> None:
    torch.manual_seed(0)
    encoder, image = TinyVit(TINY), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.train()(image), encoder.eval()(image))


@pytest.mark.parametrize("wrong", [{"image_size": 30}, {"image_size": 0}, {"heads": (1, 3, 5, 10)}])
def test_config_refuses_sizes_that_do_not_divide(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of"):
        TinyVitConfig(**wrong)
