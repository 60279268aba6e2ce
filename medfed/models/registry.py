"""Backbones by name: how to build one, which weights it needs, where adapters may sit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from medfed.errors import StudyError, WeightsError
from medfed.models.pixels import PixelSpec
from medfed.models.weights import LITE_MEDSAM, VIT_S_FOCUS, WeightsFile, load_state_dict, locate
from medfed.study_sections import BackboneConfig, ClassificationConfig, SegmentationConfig


@dataclass(frozen=True)
class Backbone:
    """A registered backbone.

    Attributes:
        build: makes the module, with its pretrained weights, for a task. A fresh head draws from the
            generator, so that all sites start from the same one.
        weights: the file that is read, with its digest; None for backbones made from scratch in tests and
            benchmarks.
        pixels: preprocessing of images.
        task_kind: the task it serves.
        presets: adapter targets by name, as regular expressions over module names.
        heads: modules trained in full beside the adapter.
        large_activations: whether LoRA is quicker multiplied out (:mod:`medfed.models.multiplied_out`).
    """

    build: Callable[[SegmentationConfig | ClassificationConfig, torch.Generator], nn.Module]
    weights: WeightsFile | None
    pixels: PixelSpec
    task_kind: str
    presets: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    large_activations: bool = False

    def target_expression(self, targets: str) -> str:
        """The regular expression of a preset name or of ``regex:...``.

        Raises:
            StudyError: for a preset that this backbone does not have.
        """
        if targets.startswith("regex:"):
            return targets.removeprefix("regex:")
        if targets not in self.presets:
            raise StudyError(
                f"Expected adapter.targets of {', '.join(sorted(self.presets))} or 'regex:...', got {targets!r}."
            )
        return self.presets[targets]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics that DINOv2 was trained with, on intensities in [0, 1]."""

_BACKBONES: dict[str, Backbone] = {}


def register_backbone(name: str, backbone: Backbone) -> None:
    """Make a backbone available to study files.

    Raises:
        ValueError: if the name is taken by another backbone.
    """
    if _BACKBONES.setdefault(name, backbone) is not backbone:
        raise ValueError(f"Expected a new backbone name, got {name!r}, which is registered already.")


def backbone_of(config: BackboneConfig) -> Backbone:
    """The registered backbone of a study, whose weights have the digest that the study names.

    Raises:
        StudyError: for an unknown name.
        WeightsError: if this backbone's weights have another digest than the study expects.
    """
    if config.name not in _BACKBONES:
        raise StudyError(f"Expected backbone.name of {', '.join(sorted(_BACKBONES))}, got {config.name!r}.")
    backbone = _BACKBONES[config.name]
    expected = backbone.weights.sha256 if backbone.weights else "0" * 64
    if config.sha256 != expected:
        raise WeightsError(
            f"Expected backbone.sha256 = {expected} for {config.name}, got {config.sha256}; "
            "correct the study, or install the weights it was made for."
        )
    return backbone


def _lite_medsam(_task: SegmentationConfig | ClassificationConfig, _generator: torch.Generator) -> nn.Module:
    from medfed.models.lite_medsam import build_lite_medsam

    model = build_lite_medsam()
    model.load_state_dict(load_state_dict(locate(LITE_MEDSAM), LITE_MEDSAM.sha256), strict=True)
    return model


def _vit_s_focus(task: SegmentationConfig | ClassificationConfig, generator: torch.Generator) -> nn.Module:
    from medfed.models.vit_classifier import vit_s_focus_classifier

    return vit_s_focus_classifier(_class_counts(task), generator=generator)


def _stand_in_segmenter(_task: SegmentationConfig | ClassificationConfig, generator: torch.Generator) -> nn.Module:
    from medfed.models.lite_medsam import LiteMedSamConfig, build_lite_medsam

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return build_lite_medsam(LiteMedSamConfig.tiny())


def _stand_in_classifier(task: SegmentationConfig | ClassificationConfig, generator: torch.Generator) -> nn.Module:
    from medfed.models.vit_classifier import tiny_vit_classifier

    return tiny_vit_classifier(_class_counts(task), generator=generator)


def _class_counts(task: SegmentationConfig | ClassificationConfig) -> dict[str, int]:
    return {name: len(classes) for name, classes in cast(ClassificationConfig, task).targets.items()}


_DECODER_QV = r"mask_decoder\.transformer\..*\.(q_proj|v_proj)"

register_backbone(
    "lite-medsam",
    Backbone(
        build=_lite_medsam,
        weights=LITE_MEDSAM,
        pixels=PixelSpec(image_size=256),
        task_kind="segmentation",
        presets={
            "decoder-qv": _DECODER_QV,
            "decoder-attention": r"mask_decoder\.transformer\..*\.(q_proj|k_proj|v_proj|out_proj)",
            "decoder-last-attention": r"mask_decoder\.transformer\.final_attn_token_to_image"
            r"\.(q_proj|k_proj|v_proj|out_proj)",
            "decoder": r"mask_decoder\.(transformer\..*\.(q_proj|k_proj|v_proj|out_proj|lin1|lin2)"
            r"|output_hypernetworks_mlps\.0\.layers\.\d)",
            "encoder-last-stage": r"image_encoder\.layers\.3\.blocks\.\d\.attn\.(qkv|proj)",
            "encoder-qkv+decoder-qv": r"image_encoder\.layers\.\d\.blocks\.\d\.attn\.qkv"
            rf"|{_DECODER_QV}",
        },
        large_activations=True,
    ),
)
register_backbone(
    "vit-s-focus",
    Backbone(
        build=_vit_s_focus,
        weights=VIT_S_FOCUS,
        pixels=PixelSpec(image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        task_kind="classification",
        presets={
            "last-quarter": r"backbone\.encoder\.layer\.(9|10|11)\.attention\.(q_proj|v_proj)",
            "all-blocks": r"backbone\.encoder\.layer\.\d+\.attention\.(q_proj|v_proj)",
        },
        heads=("head",),
    ),
)

# Random weights in the shapes of the real architectures: for tests and for trying a set-up, never pretrained.
register_backbone(
    "stand-in-segmenter",
    Backbone(
        build=_stand_in_segmenter,
        weights=None,
        pixels=PixelSpec(image_size=64),
        task_kind="segmentation",
        presets={"decoder-qv": _DECODER_QV},
        large_activations=True,  # as the model that it stands in for
    ),
)
register_backbone(
    "stand-in-classifier",
    Backbone(
        build=_stand_in_classifier,
        weights=None,
        pixels=PixelSpec(image_size=28, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        task_kind="classification",
        presets={"last-block": r"backbone\.encoder\.layer\.3\.attention\.(q_proj|v_proj)"},
        heads=("head",),
    ),
)
