# Shape legend
#   B  images in the batch    3  colour channels    C  channels of the image embedding
#   H  rows, W  columns       N  boxes of all images together, in any order
"""LiteMedSAM: a promptable medical segmentation model, cut into stages that can be frozen and cached.

TinyViT encoder (Wu et al. 2022, https://arxiv.org/abs/2207.10666), SAM prompt encoder and mask decoder
(Kirillov et al. 2023, https://arxiv.org/abs/2304.02643), distilled and fine-tuned on medical images as MedSAM's
light version (Ma et al. 2024, Nature Communications 15:654). State-dict keys equal those of `lite_medsam.pth`.

On a CPU, encoding one image costs about as much as training on eight boxes. When the first k stages are frozen, their
output for an image never changes, so a trainer computes `prefix(image, k)` once and repeats only
`resume(features, k)` and `decode(...)`.

Adapters attach to any `nn.Linear` by name: `qkv`, `proj`, `fc1`, `fc2` in the encoder; `q_proj`, `k_proj`, `v_proj`,
`out_proj`, `lin1`, `lin2` in the decoder. Every Linear is called as a module, so replacing it always takes effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from medfed.models.sam_decoder import MaskDecoder, PromptEncoder, SamDecoderConfig
from medfed.models.tiny_vit import TinyVit, TinyVitConfig


@dataclass(frozen=True)
class LiteMedSamConfig:
    """Sizes of the whole model; the defaults are those of the published checkpoint.

    Attributes:
        encoder: sizes of the image encoder.
        decoder: sizes of prompt encoder and mask decoder.
    """

    encoder: TinyVitConfig = field(default_factory=TinyVitConfig)
    decoder: SamDecoderConfig = field(default_factory=SamDecoderConfig)

    def __post_init__(self) -> None:
        if self.encoder.embedding_width != self.decoder.width:
            raise ValueError(
                "Expected the encoder's embedding_width to equal the decoder's width, "
                f"got {self.encoder.embedding_width} and {self.decoder.width}."
            )

    @classmethod
    def tiny(cls) -> LiteMedSamConfig:
        """Returns a configuration for unit tests: 64x64 images, milliseconds a step, no pretrained weights."""
        return cls(
            encoder=TinyVitConfig(
                image_size=64,
                widths=(8, 8, 12, 16),
                depths=(1, 1, 1, 1),
                heads=(1, 2, 3, 4),
                window_sides=(7, 7, 14, 7),
                expansion=2,
                embedding_width=16,
            ),
            decoder=SamDecoderConfig(width=16, depth=2, heads=2, mlp_width=32, mask_prompt_width=4),
        )


class LiteMedSam(nn.Module):
    """Segments what lies in given boxes.

    Attributes:
        stages: module-name prefixes in the order data flows through them. The last is the mask decoder; the ones
            before are the encoder stages that `prefix` and `resume` count. The prompt encoder is in no stage: it is
            always frozen, and every one of its parameters has `requires_grad=False`.

    BatchNorm stays in eval whatever `train()` is told, and there is no dropout: train and eval mode give the same
    numbers.

    Args:
        config: sizes of every part.
    """

    stages: ClassVar[tuple[str, ...]] = (
        "image_encoder.patch_embed",
        "image_encoder.layers.0",
        "image_encoder.layers.1",
        "image_encoder.layers.2",
        "image_encoder.layers.3",
        "image_encoder.neck",
        "mask_decoder",
    )

    def __init__(self, config: LiteMedSamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = TinyVit(config.encoder)
        self.prompt_encoder = PromptEncoder(
            config.decoder, image_size=self.image_size, grid_side=self.image_encoder.embedding_side
        )
        self.mask_decoder = MaskDecoder(config.decoder)

    @property
    def image_size(self) -> int:
        """Rows and columns of input images and of output masks, in pixels."""
        return self.config.encoder.image_size

    @property
    def num_encoder_stages(self) -> int:
        """How many leading `stages` belong to the encoder: the largest `num_stages` of `prefix` and `resume`."""
        return len(self.stages) - 1

    def prefix(self, image_B3HW: Tensor, num_stages: int) -> Tensor:
        """Returns the features after the first `num_stages` encoder stages, to be given to `resume`.

        For frozen stages call it under `torch.no_grad()`; the result then does not require grad.

        | num_stages             | result                                                   |
        |------------------------|----------------------------------------------------------|
        | 0                      | the image itself                                         |
        | 1 to 5                 | float (B, H', W', C') of that stage, contiguous          |
        | 6 (all encoder stages) | the embedding, float (B, C, image_size/4, image_size/4)  |

        Args:
            image_B3HW: float (B, 3, image_size, image_size), scaled to [0, 1].
            num_stages: from 0 to `num_encoder_stages`.

        Raises:
            ValueError: the image size or `num_stages` is not as described.
        """
        self._check_num_stages(num_stages)
        expected = (3, self.image_size, self.image_size)
        if image_B3HW.ndim != 4 or image_B3HW.shape[1:] != expected:
            raise ValueError(f"Expected images of shape (B, {expected}), got {tuple(image_B3HW.shape)}; resize them.")
        return self._run_encoder(image_B3HW, 0, num_stages)

    def resume(self, features: Tensor, num_stages: int) -> Tensor:
        """Returns the image embedding, float (B, C, image_size/4, image_size/4), from features of `prefix`.

        For the same batch, `resume(prefix(image, k), k)` is the same, bit for bit, for every k.

        Args:
            features: what `prefix` returned for the same `num_stages`; stored copies keep their layout.
            num_stages: the encoder stages that have already run.

        Raises:
            ValueError: `num_stages` is not from 0 to `num_encoder_stages`.
        """
        self._check_num_stages(num_stages)
        return self._run_encoder(features, num_stages, self.num_encoder_stages)

    def decode(self, embedding_BCHW: Tensor, boxes_N4: Tensor, owner_N: Tensor) -> Tensor:
        """Returns one mask per box as logits, float (N, image_size, image_size); above 0 is foreground.

        | N                        | result                            |
        |--------------------------|-----------------------------------|
        | 0                        | empty, (0, image_size, image_size) |
        | boxes of images mixed    | in the order of the boxes         |
        | an image without boxes   | contributes nothing               |

        Args:
            embedding_BCHW: float image embeddings from `resume`.
            boxes_N4: (x0, y0, x1, y1) in pixels of the model's input image, any real dtype.
            owner_N: int64 index in [0, B) of the image that each box lies in.

        Raises:
            ValueError: boxes and owners do not match in shape, or an owner is no image of the batch.
        """
        if boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4 or owner_N.shape != boxes_N4.shape[:1]:
            raise ValueError(
                "Expected boxes of shape (N, 4) and owners of shape (N,), "
                f"got {tuple(boxes_N4.shape)} and {tuple(owner_N.shape)}."
            )
        if len(boxes_N4) == 0:
            return embedding_BCHW.new_zeros(0, self.image_size, self.image_size)
        if int(owner_N.min()) < 0 or int(owner_N.max()) >= len(embedding_BCHW):
            raise ValueError(f"Expected owners in [0, {len(embedding_BCHW)}), got {owner_N.tolist()}.")
        prompted_BCHW = embedding_BCHW + self.prompt_encoder.no_mask_embed.weight[0, :, None, None]
        logits_NHW: Tensor = self.mask_decoder(
            prompted_BCHW,
            self.prompt_encoder.pixel_positions(),
            self.prompt_encoder.box_tokens(boxes_N4),
            owner_N,
        )
        return logits_NHW

    def forward(self, image_B3HW: Tensor, boxes_N4: Tensor, owner_N: Tensor) -> Tensor:
        """Returns mask logits, float (N, image_size, image_size): all encoder stages, then `decode`."""
        return self.decode(self.resume(self.prefix(image_B3HW, 0), 0), boxes_N4, owner_N)

    def _check_num_stages(self, num_stages: int) -> None:
        if not 0 <= num_stages <= self.num_encoder_stages:
            raise ValueError(f"Expected num_stages from 0 to {self.num_encoder_stages}, got {num_stages}.")

    def _run_encoder(self, x: Tensor, first: int, last: int) -> Tensor:
        encoder = self.image_encoder
        runners = (encoder.patch_embed, *encoder.layers, encoder.embed)
        for run in runners[first:last]:
            x = run(x)
        return x


def build_lite_medsam(config: LiteMedSamConfig | None = None) -> LiteMedSam:
    """Returns a randomly initialised model in eval mode; without `config`, of the checkpoint's sizes."""
    return LiteMedSam(config or LiteMedSamConfig()).eval()
