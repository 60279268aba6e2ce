# Shape legend
#   B  images in the batch         N  boxes of all images together, in any order
#   P  pixels of the embedding grid = side * side, row-major
#   Q  queries of one box = IoU token, mask tokens, two box corners
#   C  channels of the decoder     D  channels inside one attention
#   H  rows, W  columns            M  leading rows of an attention: B (images) or N (boxes)
#   T  tokens that ask, S  tokens that are asked, in one attention
#   K  output tokens = IoU + mask  E  channels after upscaling
#   ij, kl  row and column inside the tile that the first, the second upscaling makes of a pixel
"""SAM's prompt encoder and mask decoder, for box prompts over a batch of images.

The architecture is SAM (Kirillov et al. 2023, "Segment Anything", ICCV, https://arxiv.org/abs/2304.02643,
appendix A) as used by MedSAM (Ma et al. 2024, Nature Communications 15:654). Parameter names are those of
`lite_medsam.pth`, including point and mask prompts, which this project never uses.

Unlike the original, which decodes the boxes of one image at a time, boxes of several images are decoded together:
`owner_N` names the image of each box. Until the first image-to-token update, the image side is the same for every
box of an image, because a box prompt adds only the shared `no_mask_embed`. So three projections of the first block
run once per image, and their rows are then handed to the boxes:

| Linear of `transformer.layers.0`          | rows of its input |
|-------------------------------------------|-------------------|
| `cross_attn_token_to_image.k_proj/v_proj` | one per image     |
| `cross_attn_image_to_token.q_proj`        | one per image     |
| every other Linear of the decoder         | one per box       |

With the same number of boxes for every image, image by image, the rows of both kinds are in image order: what
per-sample gradients need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.tiny_vit import LayerNorm2d

# Upscaling doubles the grid twice, by transposed convolutions whose kernel equals their stride.
UPSCALE = 2
HEAD_LAYERS = 3


@dataclass(frozen=True)
class SamDecoderConfig:
    """Sizes of the prompt encoder and the mask decoder; the defaults are those of LiteMedSAM.

    Attributes:
        width: channels of queries and of the image embedding.
        depth: two-way blocks.
        heads: attention heads, in every attention.
        mlp_width: hidden width of the MLP in a block.
        num_multimask_outputs: masks for ambiguous prompts, beside the one used for boxes.
        mask_prompt_width: hidden width of the (unused) mask prompt encoder.
    """

    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp_width: int = 2048
    num_multimask_outputs: int = 3
    mask_prompt_width: int = 16

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"Expected depth >= 1, got {self.depth}.")
        if self.width % 8 or (self.width // 2) % self.heads:
            raise ValueError(
                "Expected width to be a multiple of 8 and of twice the number of heads, "
                f"got width {self.width} and {self.heads} heads."
            )


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of a point in the unit square (Tancik et al. 2020), with a stored matrix."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, point_xy: Tensor) -> Tensor:
        """Returns float (..., C) features of points (..., 2), given as (x, y) in [0, 1]."""
        phase = 2 * math.pi * ((2 * point_xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Turns boxes into two query tokens each, and places every pixel of the embedding grid.

    It has no trainable parameter: prompts are geometry, and what a site learns belongs to encoder and decoder.
    Modules for points and masks exist only so that the checkpoint loads with `strict=True`.

    Args:
        config: sizes.
        image_size: rows and columns of the image that boxes refer to, in pixels.
        grid_side: rows and columns of the embedding grid.
    """

    def __init__(self, config: SamDecoderConfig, *, image_size: int, grid_side: int) -> None:
        super().__init__()
        self.image_size, self.grid_side = image_size, grid_side
        width, hidden = config.width, config.mask_prompt_width
        self.pe_layer = PositionEmbeddingRandom(width)
        # Background point, foreground point, top-left corner, bottom-right corner.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, hidden // 4, 2, 2),
            LayerNorm2d(hidden // 4),
            nn.GELU(),
            nn.Conv2d(hidden // 4, hidden, 2, 2),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)
        self.requires_grad_(False)

    def box_tokens(self, boxes_N4: Tensor) -> Tensor:
        """Returns float (N, 2, C): the corner tokens of boxes (x0, y0, x1, y1) in pixels."""
        pixel_center = 0.5
        corners_N22 = (boxes_N4.to(self.no_mask_embed.weight.dtype) + pixel_center).reshape(-1, 2, 2)
        kind_2C = torch.cat(tuple(self.point_embeddings.parameters())[2:])
        tokens_N2C: Tensor = self.pe_layer(corners_N22 / self.image_size) + kind_2C
        return tokens_N2C

    def pixel_positions(self) -> Tensor:
        """Returns float (P, C): the position features of the centres of the embedding grid, row-major."""
        weight = self.no_mask_embed.weight
        center = (torch.arange(self.grid_side, device=weight.device, dtype=weight.dtype) + 0.5) / self.grid_side
        y_HW, x_HW = torch.meshgrid(center, center, indexing="ij")
        position_PC: Tensor = self.pe_layer(torch.stack([x_HW, y_HW], dim=-1).flatten(0, 1))
        return position_PC


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the width of its input.

    The leading axis of `q_proj`, `k_proj`, `v_proj` and `out_proj` inputs is never merged with the token axis.
    It counts boxes, or images for the three Linears of the table above.
    """

    def __init__(self, width: int, heads: int, *, shrink: int = 1) -> None:
        super().__init__()
        self.heads = heads
        inner = width // shrink
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query_MTC: Tensor, key_MSC: Tensor, value_MSC: Tensor) -> Tensor:
        """Returns float (M, T, C): what each query token gathered from the values."""
        return self.attend(self.q_proj(query_MTC), self.k_proj(key_MSC), self.v_proj(value_MSC))

    def attend(self, q_NTD: Tensor, k_NSD: Tensor, v_NSD: Tensor) -> Tensor:
        """Returns float (N, T, C) from queries, keys and values that are already projected."""
        q, k, v = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (q_NTD, k_NSD, v_NSD))
        attended_NTD = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output_NTC: Tensor = self.out_proj(attended_NTD)
        return output_NTC


class MlpBlock(nn.Module):
    """Two-layer perceptron with a ReLU, on the queries."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x_NQC: Tensor) -> Tensor:
        """Returns float (N, Q, C)."""
        update_NQC: Tensor = self.lin2(functional.relu(self.lin1(x_NQC)))
        return update_NQC


class TwoWayBlock(nn.Module):
    """Self-attention of the queries, queries look at the image, MLP, the image looks at the queries.

    Args:
        config: sizes.
        is_first: the block that receives the image before any box has touched it. Its image side holds one row
            per image and is expanded to boxes after projection; its self-attention replaces the queries and
            ignores positions, since at this point the queries are their positions.
    """

    def __init__(self, config: SamDecoderConfig, *, is_first: bool) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.is_first = is_first
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, heads, shrink=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MlpBlock(width, config.mlp_width)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, heads, shrink=2)

    def forward(
        self,
        query_NQC: Tensor,
        image_MPC: Tensor,
        *,
        query_position_NQC: Tensor,
        pixel_position_PC: Tensor,
        owner_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the updated queries (N, Q, C) and the updated image, now one per box, (N, P, C).

        Args:
            query_NQC: float queries.
            image_MPC: float image tokens; M is B when `owner_N` is given, else N.
            query_position_NQC: added to queries wherever they are compared.
            pixel_position_PC: added to image tokens wherever they are compared.
            owner_N: int64 image of each box if rows of `image_MPC` are images, None if they are boxes already.
        """
        if self.is_first:
            query_NQC = self.self_attn(query_NQC, query_NQC, query_NQC)
        else:
            placed_NQC = query_NQC + query_position_NQC
            query_NQC = query_NQC + self.self_attn(placed_NQC, placed_NQC, query_NQC)
        query_NQC = self.norm1(query_NQC)

        placed_image_MPC = image_MPC + pixel_position_PC
        to_image = self.cross_attn_token_to_image
        query_NQC = self.norm2(
            query_NQC
            + to_image.attend(
                to_image.q_proj(query_NQC + query_position_NQC),
                rows_of_boxes(to_image.k_proj(placed_image_MPC), owner_N),
                rows_of_boxes(to_image.v_proj(image_MPC), owner_N),
            )
        )
        query_NQC = self.norm3(query_NQC + self.mlp(query_NQC))

        to_token = self.cross_attn_image_to_token
        update_NPC = to_token.attend(
            rows_of_boxes(to_token.q_proj(placed_image_MPC), owner_N),
            to_token.k_proj(query_NQC + query_position_NQC),
            to_token.v_proj(query_NQC),
        )
        return query_NQC, self.norm4(rows_of_boxes(image_MPC, owner_N) + update_NPC)


class TwoWayTransformer(nn.Module):
    """The two-way blocks and a last look of the queries at the image."""

    def __init__(self, config: SamDecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(config, is_first=index == 0) for index in range(config.depth))
        self.final_attn_token_to_image = Attention(config.width, config.heads, shrink=2)
        self.norm_final_attn = nn.LayerNorm(config.width)

    def forward(
        self, image_BPC: Tensor, pixel_position_PC: Tensor, token_NQC: Tensor, owner_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the final queries (N, Q, C) and the image as each box sees it (N, P, C)."""
        query_NQC, image_MPC = token_NQC, image_BPC
        for index, block in enumerate(self.layers):
            query_NQC, image_MPC = block(
                query_NQC,
                image_MPC,
                query_position_NQC=token_NQC,
                pixel_position_PC=pixel_position_PC,
                owner_N=owner_N if index == 0 else None,
            )
        gathered_NQC = self.final_attn_token_to_image(query_NQC + token_NQC, image_MPC + pixel_position_PC, image_MPC)
        return self.norm_final_attn(query_NQC + gathered_NQC), image_MPC


class HeadMlp(nn.Module):
    """Three Linears with ReLU between them, as SAM uses for mask weights and mask quality."""

    def __init__(self, width: int, channels_out: int) -> None:
        super().__init__()
        outs = [width] * (HEAD_LAYERS - 1) + [channels_out]
        self.layers = nn.ModuleList(nn.Linear(width, out) for out in outs)

    def forward(self, x_NC: Tensor) -> Tensor:
        """Returns float (N, channels_out)."""
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            x_NC = functional.relu(layer(x_NC))
        output: Tensor = last(x_NC)
        return output


class MaskDecoder(nn.Module):
    """Predicts one mask for each box; four times the embedding grid in each direction.

    Only mask token 0 is evaluated, SAM's answer to an unambiguous prompt. The heads of the other mask tokens and
    of mask quality are held for the checkpoint and receive no gradient.
    """

    def __init__(self, config: SamDecoderConfig) -> None:
        super().__init__()
        width, num_masks = config.width, config.num_multimask_outputs + 1
        self.transformer = TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(num_masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, UPSCALE, UPSCALE),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, UPSCALE, UPSCALE),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(HeadMlp(width, width // 8) for _ in range(num_masks))
        self.iou_prediction_head = HeadMlp(width, num_masks)

    def forward(self, image_BCHW: Tensor, pixel_position_PC: Tensor, corner_N2C: Tensor, owner_N: Tensor) -> Tensor:
        """Returns mask logits, float (N, 4 * H, 4 * W).

        Args:
            image_BCHW: float image embedding with the dense prompt added.
            pixel_position_PC: float positions of its pixels.
            corner_N2C: float box tokens.
            owner_N: int64 index in [0, B) of the image that each box belongs to.
        """
        rows, columns = image_BCHW.shape[2:]
        output_token_KC = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        token_NQC = torch.cat([output_token_KC.expand(len(corner_N2C), -1, -1), corner_N2C], dim=1)
        image_BPC = image_BCHW.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        query_NQC, image_NPC = self.transformer(image_BPC, pixel_position_PC, token_NQC, owner_N)
        mask_weight_NE = self.output_hypernetworks_mlps[0](query_NQC[:, 1])
        return self._paint(image_NPC.view(-1, rows, columns, image_NPC.shape[-1]), mask_weight_NE)

    def _paint(self, image_NHWC: Tensor, mask_weight_NE: Tensor) -> Tensor:
        """Returns float (N, 4H, 4W): the upscaled image, weighted over its channels.

        A transposed convolution whose stride equals its kernel maps each pixel to a tile on its own, so it is a
        matrix product over channels. Keeping both upscalings in that form, pixels are put in place only once,
        after the channels have been summed away.
        """
        first, norm, _, second, _ = self.output_upscaling
        assert isinstance(first, nn.ConvTranspose2d)
        assert isinstance(norm, LayerNorm2d)
        assert isinstance(second, nn.ConvTranspose2d)
        tile_NHWijC = functional.gelu(norm.normalise_channels_last(tiles_of_pixels(image_NHWC, first)))
        tile_NHWijklE = functional.gelu(tiles_of_pixels(tile_NHWijC, second))
        # Box by box: a batched product with one column is a third slower on a CPU, forwards and backwards.
        logits = [
            tile.flatten(0, -2).mv(weight_E) for tile, weight_E in zip(tile_NHWijklE, mask_weight_NE, strict=True)
        ]
        logits_NHWijkl = torch.stack(logits).view(tile_NHWijklE.shape[:-1])
        boxes, rows, columns = image_NHWC.shape[:3]
        scale = UPSCALE * UPSCALE
        # Rows interleave H, i, k and columns interleave W, j, l.
        placed = logits_NHWijkl.permute(0, 1, 3, 5, 2, 4, 6)
        return placed.reshape(boxes, rows * scale, columns * scale)


def rows_of_boxes(x_MTC: Tensor, owner_N: Tensor | None) -> Tensor:
    """Returns (N, T, C): for each box the row of its image; the input itself if rows are boxes already."""
    if owner_N is None:
        return x_MTC
    if len(x_MTC) == 1:
        return x_MTC.expand(len(owner_N), -1, -1)
    return x_MTC.index_select(0, owner_N)


def tiles_of_pixels(x_C: Tensor, upscaling: nn.ConvTranspose2d) -> Tensor:
    """Returns (..., 2, 2, O): the tile that each pixel (..., C) becomes, as (row, column, channel)."""
    channels_in, channels_out, *_ = upscaling.weight.shape
    weight = upscaling.weight.permute(2, 3, 1, 0).reshape(-1, channels_in)
    assert upscaling.bias is not None
    bias = upscaling.bias.repeat(UPSCALE * UPSCALE)
    return functional.linear(x_C, weight, bias).view(*x_C.shape[:-1], UPSCALE, UPSCALE, channels_out)
