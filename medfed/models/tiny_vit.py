# Shape legend
#   B  images in the batch          C  channels of the current stage     O  channels after a convolution
#   H  rows, W  columns of the current feature grid
#   G  windows in the whole batch = B * windows per image, batch outermost
#   T  tokens in one window = side * side
#   A  attention heads              D  channels per head
"""TinyViT image encoder: a convolutional stem stage and three windowed-attention stages.

The architecture is TinyViT (Wu et al. 2022, "TinyViT: Fast Pretraining Distillation for Small Vision
Transformers", ECCV, https://arxiv.org/abs/2207.10666) in the variant that LiteMedSAM distilled from MedSAM
(Ma et al. 2024, "Segment anything in medical images", Nature Communications 15:654): the patch embedding
keeps full resolution, the last merging does not shrink, and a SAM neck maps the result to the decoder's width.
Parameter names are those of `lite_medsam.pth`, so that file loads with `strict=True`.

Two choices make it fast on a CPU without changing its result beyond float rounding:

* Features travel between stages as contiguous `(B, H, W, C)`. Linear layers read that layout directly and
  convolutions see it as a channels-last view, so neither copies it into another order.
* BatchNorm is frozen by contract, so `ConvBN` folds it into its convolution and saves one pass over the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_LAYERS = 4
# Which of the three mergings halves the grid: 256 -> 128 -> 64 -> 64 (LiteMedSAM; TinyViT itself halves thrice).
MERGE_STRIDES = (2, 2, 1)
# LayerNorm2d of SAM (Kirillov et al. 2023, reference implementation) uses this epsilon.
SAM_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class TinyVitConfig:
    """Sizes of the encoder; the defaults are those of LiteMedSAM.

    Attributes:
        image_size: rows and columns of the input, a multiple of 4; the embedding grid is a quarter of it.
        widths: channels of the four stages.
        depths: blocks in each stage.
        heads: attention heads of each stage; the first entry is unused, stage 0 is convolutional.
        window_sides: rows and columns of an attention window, per stage; the first entry is unused.
        expansion: hidden width of every MLP and inverted bottleneck as a multiple of its input width.
        embedding_width: channels that the neck hands to the mask decoder.
    """

    image_size: int = 256
    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    window_sides: tuple[int, int, int, int] = (7, 7, 14, 7)
    expansion: int = 4
    embedding_width: int = 256

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % 4:
            raise ValueError(f"Expected image_size to be a positive multiple of 4, got {self.image_size}.")
        for width, heads in zip(self.widths[1:], self.heads[1:], strict=True):
            if width % heads:
                raise ValueError(f"Expected each width to be a multiple of its heads, got {width} and {heads}.")


class ConvBN(nn.Module):
    """A convolution followed by BatchNorm that never leaves evaluation mode.

    Running statistics are pretrained constants: updating them would leak patient statistics around the privacy
    engine and normalising by the batch would couple the patients in it. So `train()` keeps `bn` in eval, and
    `forward` folds `bn` into the convolution, which never writes to the statistics.

    If `c` has been replaced by another module (for instance a LoRA convolution), both are called in turn instead,
    so that the replacement is not bypassed.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        groups = channels_in if depthwise else 1
        self.c = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)
        self.bn.eval()

    def train(self, mode: bool = True) -> ConvBN:
        """Sets the mode of everything but the BatchNorm, which stays in eval."""
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns the normalised convolution, float (B, O, H', W') in the memory layout of the input."""
        if type(self.c) is not nn.Conv2d:
            return self._unfolded(x_BCHW)
        mean_O, variance_O = self.bn.running_mean, self.bn.running_var
        assert mean_O is not None
        assert variance_O is not None
        gain_O = self.bn.weight * torch.rsqrt(variance_O + self.bn.eps)
        return functional.conv2d(
            x_BCHW,
            self.c.weight * gain_O[:, None, None, None],
            self.bn.bias - mean_O * gain_O,
            self.c.stride,
            self.c.padding,
            self.c.dilation,
            self.c.groups,
        )

    def _unfolded(self, x_BCHW: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.c(x_BCHW))
        return normalised


class PatchEmbed(nn.Module):
    """Lifts RGB to the first stage's width with two 1x1 convolutions; the resolution stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, width // 2), nn.GELU(), ConvBN(width // 2, width))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Returns float (B, H, W, C), contiguous."""
        # As `contiguous(memory_format=torch.channels_last)`, in terms that torch can vectorise over samples.
        strided_B3HW = image_B3HW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return to_channels_last(self.seq(strided_B3HW))


class MBConv(nn.Module):
    """Inverted bottleneck (MobileNetV2/EfficientNet) with a residual connection, on (B, C, H, W)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.conv1 = ConvBN(width, hidden)
        self.conv2 = ConvBN(hidden, hidden, kernel=3, depthwise=True)
        self.conv3 = ConvBN(hidden, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns float (B, C, H, W)."""
        hidden_BCHW = functional.gelu(self.conv1(x_BCHW))
        hidden_BCHW = functional.gelu(self.conv2(hidden_BCHW))
        projected_BCHW: Tensor = self.conv3(hidden_BCHW)
        return functional.gelu(projected_BCHW + x_BCHW)


class PatchMerging(nn.Module):
    """Changes the width and, with stride 2, halves the grid, between two stages."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels_in, channels_out)
        self.conv2 = ConvBN(channels_out, channels_out, kernel=3, stride=stride, depthwise=True)
        self.conv3 = ConvBN(channels_out, channels_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns float (B, O, H / stride, W / stride)."""
        hidden_BOHW = functional.gelu(self.conv1(x_BCHW))
        hidden_BOHW = functional.gelu(self.conv2(hidden_BOHW))
        merged_BOHW: Tensor = self.conv3(hidden_BOHW)
        return merged_BOHW


class Mlp(nn.Module):
    """Pre-normalised two-layer perceptron over the last axis."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width * expansion)
        self.fc2 = nn.Linear(width * expansion, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Returns float (B, H, W, C); its Linears see the batch as their outermost axis."""
        update_BHWC: Tensor = self.fc2(functional.gelu(self.fc1(self.norm(x_BHWC))))
        return update_BHWC


class WindowAttention(nn.Module):
    """Self-attention inside square windows, with a learned bias per head and absolute offset.

    The windows of all images are folded into the leading axis G, batch outermost: with B images, rows
    `b * G / B` to `(b + 1) * G / B - 1` of every input, output and output gradient of `qkv` and `proj` belong to
    image b. Per-sample gradients must be summed over those rows before clipping.

    Keys and values of the padding around the image take part unmasked, as the checkpoint was trained.
    """

    attention_bias_idxs: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        # One bias for each (|row difference|, |column difference|), numbered row-major; looked up in every forward,
        # because a cached table would go stale when the biases are loaded or trained.
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        row_T, column_T = torch.arange(side * side) // side, torch.arange(side * side) % side
        offset_TT = (row_T[:, None] - row_T).abs() * side + (column_T[:, None] - column_T).abs()
        self.register_buffer("attention_bias_idxs", offset_TT, persistent=False)

    def forward(self, x_GTC: Tensor) -> Tensor:
        """Returns the attended windows, float (G, T, C)."""
        groups, tokens, width = x_GTC.shape
        # The checkpoint interleaves per head: q, k and v of head 0, then of head 1, and so on.
        qkv_GTA3D = self.qkv(self.norm(x_GTC)).view(groups, tokens, self.heads, 3, width // self.heads)
        q_GATD, k_GATD, v_GATD = qkv_GTA3D.permute(3, 0, 2, 1, 4).unbind(0)
        bias_ATT = self.attention_biases[:, self.attention_bias_idxs]
        out_GATD = functional.scaled_dot_product_attention(q_GATD, k_GATD, v_GATD, attn_mask=bias_ATT[None])
        attended_GTC: Tensor = self.proj(out_GATD.transpose(1, 2).reshape(groups, tokens, width))
        return attended_GTC


class TinyVitBlock(nn.Module):
    """Windowed attention, a depthwise 3x3 convolution that mixes across windows, and an MLP."""

    def __init__(self, width: int, heads: int, window_side: int, expansion: int) -> None:
        super().__init__()
        self.window_side = window_side
        self.attn = WindowAttention(width, heads, window_side)
        self.local_conv = ConvBN(width, width, kernel=3, depthwise=True)
        self.mlp = Mlp(width, expansion)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Returns float (B, H, W, C), contiguous."""
        batch, rows, columns, _ = x_BHWC.shape
        windows_GTC = split_windows(x_BHWC, self.window_side)
        attended_BHWC = join_windows(self.attn(windows_GTC), self.window_side, batch, rows, columns)
        mixed_BHWC = to_channels_last(self.local_conv((x_BHWC + attended_BHWC).permute(0, 3, 1, 2)))
        update_BHWC: Tensor = self.mlp(mixed_BHWC)
        return mixed_BHWC + update_BHWC


class ConvLayer(nn.Module):
    """Stage 0: inverted bottlenecks at full resolution, then a merging."""

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__()
        width = config.widths[0]
        self.blocks = nn.ModuleList(MBConv(width, config.expansion) for _ in range(config.depths[0]))
        self.downsample = PatchMerging(width, config.widths[1], MERGE_STRIDES[0])

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Returns float (B, H / 2, W / 2, O), contiguous."""
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return to_channels_last(self.downsample(x_BCHW))


class AttentionLayer(nn.Module):
    """Stages 1 to 3: windowed-attention blocks, then a merging except after the last stage."""

    def __init__(self, config: TinyVitConfig, layer: int) -> None:
        super().__init__()
        width, heads, side = config.widths[layer], config.heads[layer], config.window_sides[layer]
        self.blocks = nn.ModuleList(
            TinyVitBlock(width, heads, side, config.expansion) for _ in range(config.depths[layer])
        )
        is_last = layer == NUM_LAYERS - 1
        self.downsample = None if is_last else PatchMerging(width, config.widths[layer + 1], MERGE_STRIDES[layer])

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Returns float (B, H', W', O), contiguous."""
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        if self.downsample is None:
            return x_BHWC
        return to_channels_last(self.downsample(x_BHWC.permute(0, 3, 1, 2)))


class LayerNorm2d(nn.Module):
    """LayerNorm over the channel axis of (B, C, H, W), with the parameter names of SAM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns float (B, C, H, W), channels last in memory."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        return self.normalise_channels_last(x_BHWC).permute(0, 3, 1, 2)

    def normalise_channels_last(self, x_C: Tensor) -> Tensor:
        """Returns the same normalisation for a tensor whose last axis is the channels."""
        return functional.layer_norm(x_C, self.weight.shape, self.weight, self.bias, SAM_NORM_EPSILON)


class TinyVit(nn.Module):
    """The whole encoder: `patch_embed`, `layers.0` to `layers.3`, `neck`, run one after the other.

    Args:
        config: sizes of every stage.
    """

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.widths[0])
        self.layers = nn.ModuleList(
            [ConvLayer(config), *(AttentionLayer(config, layer) for layer in range(1, NUM_LAYERS))]
        )
        out = config.embedding_width
        self.neck = nn.Sequential(
            nn.Conv2d(config.widths[-1], out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    @property
    def embedding_side(self) -> int:
        """Rows and columns of the embedding grid."""
        return self.config.image_size // 4

    def embed(self, x_BHWC: Tensor) -> Tensor:
        """Returns the neck's output for stage-3 features: float (B, embedding_width, side, side)."""
        embedding_BCHW: Tensor = self.neck(x_BHWC.permute(0, 3, 1, 2))
        return embedding_BCHW

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Returns the image embedding, float (B, embedding_width, side, side), channels last in memory."""
        x_BHWC = self.patch_embed(image_B3HW)
        for layer in self.layers:
            x_BHWC = layer(x_BHWC)
        return self.embed(x_BHWC)


def to_channels_last(x_BCHW: Tensor) -> Tensor:
    """Returns the contiguous (B, H, W, C) view of a feature map; a copy only if it was not channels last."""
    return x_BCHW.permute(0, 2, 3, 1).contiguous()


def split_windows(x_BHWC: Tensor, side: int) -> Tensor:
    """Returns float (G, side * side, C): the windows of every image, row-major, batch outermost.

    The grid is padded with zeros at the bottom and right up to a multiple of `side`.
    """
    batch, rows, columns, width = x_BHWC.shape
    padded = functional.pad(x_BHWC, (0, 0, 0, -columns % side, 0, -rows % side))
    window_rows, window_columns = padded.shape[1] // side, padded.shape[2] // side
    tiled = padded.view(batch, window_rows, side, window_columns, side, width).transpose(2, 3)
    return tiled.reshape(-1, side * side, width)


def join_windows(x_GTC: Tensor, side: int, batch: int, rows: int, columns: int) -> Tensor:
    """Returns float (B, rows, columns, C): the inverse of `split_windows`, without the padding."""
    window_rows, window_columns = -(-rows // side), -(-columns // side)
    tiled = x_GTC.view(batch, window_rows, window_columns, side, side, -1).transpose(2, 3)
    return tiled.reshape(batch, window_rows * side, window_columns * side, -1)[:, :rows, :columns]
