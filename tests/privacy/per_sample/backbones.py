"""Small versions of real architectures, with random weights, and the adapters that are attached to them.

Shapes are the smallest that keep what matters: windows that are folded into the batch axis and padded, boxes
that are folded likewise, residual paths, normalisations of every kind. All losses are functions of one sample.

Legend: B samples, M boxes of one image, N boxes of all images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = dict[str, Tensor]

NUM_CLASSES = 3


@dataclass(frozen=True)
class Backbone:
    """One architecture.

    Attributes:
        build: makes the network, with random weights.
        losses: the loss of each sample of a batch, (B,), from the network.
        batch_of: as many different samples as asked; the same at every call.
        linears, convs, norms: regular expressions of layers that adapters attach to.
        feedforward: those of ``linears`` whose input, not output, IA3 scales.
        head: layer that ``modules_to_save`` trains in full.
    """

    build: Callable[[], nn.Module]
    losses: Callable[[Any, Batch], Tensor]
    batch_of: Callable[[int], Batch]
    linears: str
    feedforward: str = ""
    convs: str = ""
    norms: str = ""
    head: str = ""


@dataclass(frozen=True)
class Subject:
    """A network with its adapter: what an engine is made from."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    losses: Callable[[Batch], Tensor]
    batch_of: Callable[[int], Batch]


def adapted(backbone: str, method: str, **changes: Any) -> Subject:
    """The small ``backbone``, with ``changes`` to its entry, and the adapter of ``method`` moved from its start."""
    entry = replace(BACKBONES[backbone], **changes)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT warns that norms are no linear layers and that grouped convolutions do not merge, and reads an
        # attribute of SAM that transformers gave another name.
        warnings.simplefilter("ignore")
        network = METHODS[method](entry.build().requires_grad_(False), entry)
    # Without dropout; otherwise in training mode, as it is used.
    network.train()
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():  # LoRA's B is zero, DoRA's and VeRA's gradients would be too
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return Subject(network, parameters, lambda batch: entry.losses(network, batch), entry.batch_of)


# ---------------------------------------------------------------------------------------------- batches, losses


def generator_of(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


def stacked(make: Callable[[torch.Generator], Batch]) -> Callable[[int], Batch]:
    """Batches whose sample i is made from generator i; the empty batch has the shapes of the others."""

    def batch_of(count: int) -> Batch:
        rows = [make(generator_of(number)) for number in range(max(count, 1))]
        return {name: torch.stack([row[name] for row in rows])[:count] for name in rows[0]}

    return batch_of


def images_with_labels(channels: int, side: int) -> Callable[[int], Batch]:
    return stacked(
        lambda generator: {
            "image": torch.rand(channels, side, side, generator=generator),
            "label": torch.randint(NUM_CLASSES, (), generator=generator),
        }
    )


def images_with_masks(side: int, dims: int = 2) -> Callable[[int], Batch]:
    return stacked(
        lambda generator: {
            "image": torch.rand(1, *[side] * dims, generator=generator),
            "mask": (torch.rand(2, *[side] * dims, generator=generator) > 0.5).float(),
        }
    )


def in_double(batch_of: Callable[[int], Batch]) -> Callable[[int], Batch]:
    return lambda count: {name: values.double() for name, values in batch_of(count).items()}


def images_with_boxes(side: int, boxes: int = 2) -> Callable[[int], Batch]:
    def one(generator: torch.Generator) -> Batch:
        corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values * side
        mask = (torch.rand(boxes, side, side, generator=generator) > 0.5).float()
        return {"image": torch.rand(3, side, side, generator=generator), "boxes": corners.view(boxes, 4), "mask": mask}

    return stacked(one)


def cross_entropy(logits_BK: Tensor, batch: Batch) -> Tensor:
    return functional.cross_entropy(logits_BK, batch["label"], reduction="none")


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over everything but the leading axis."""
    losses = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return losses.flatten(1).mean(dim=1)


def mask_losses(network: Any, batch: Batch) -> Tensor:
    return mask_loss(network(batch["image"]), batch["mask"])


class WithHead(nn.Module):
    """A transformers encoder with a linear head on its pooled or mean token."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.encoder(image).last_hidden_state
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def head_losses(network: Any, batch: Batch) -> Tensor:
    return cross_entropy(network(batch["image"]), batch)


# --------------------------------------------------------------------------------------------------- backbones


def lite_medsam() -> nn.Module:
    from medfed.models.lite_medsam import LiteMedSamConfig, build_lite_medsam

    return build_lite_medsam(LiteMedSamConfig.tiny())


def lite_medsam_losses(network: Any, batch: Batch) -> Tensor:
    """The mean over an image's boxes, which are folded into the leading axis, image after image."""
    num_images, num_boxes = batch["boxes"].shape[:2]
    owner_N = torch.arange(num_images).repeat_interleave(num_boxes)
    logits_NHW = network(batch["image"], batch["boxes"].flatten(0, 1), owner_N)
    return mask_loss(logits_NHW, batch["mask"].flatten(0, 1)).view(num_images, num_boxes).mean(dim=1)


def cached_lite_medsam_losses(network: Any, batch: Batch) -> Tensor:
    """As above, from cached features of the first, frozen stage: how a site trains."""
    num_images, num_boxes = batch["boxes"].shape[:2]
    owner_N = torch.arange(num_images).repeat_interleave(num_boxes)
    logits_NHW = network.decode(network.resume(batch["features"], 1), batch["boxes"].flatten(0, 1), owner_N)
    return mask_loss(logits_NHW, batch["mask"].flatten(0, 1)).view(num_images, num_boxes).mean(dim=1)


def with_features(batch_of: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Batches of boxes with what may be features of a 64 x 64 image after one stage."""

    def cached(count: int) -> Batch:
        rows = [torch.randn(64, 64, 8, generator=generator_of(number)) for number in range(max(count, 1))]
        batch = batch_of(count)
        return {"features": torch.stack(rows)[:count], "boxes": batch["boxes"], "mask": batch["mask"]}

    return cached


def sam(**options: Any) -> nn.Module:
    from transformers import SamConfig, SamModel

    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
        "image_size": 32, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 8,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = SamConfig(
        vision_config=vision | options, prompt_encoder_config=prompts, mask_decoder_config=decoder, **options
    )
    return SamModel(config)


def lively_sam() -> nn.Module:
    """With the default initializer_range, 1e-10, the model is dead, and every engine agrees on it."""
    network = sam(initializer_range=0.02)
    with torch.no_grad():  # relative positions and embeddings start at zero, where attention hides mistakes
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def sam_losses(network: Any, batch: Batch) -> Tensor:
    output = network(pixel_values=batch["image"], input_boxes=batch["boxes"], multimask_output=False)
    return mask_loss(output.pred_masks[:, :, 0], batch["mask"])


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    return WithHead(ViTModel(config, add_pooling_layer=False), 16)


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=24, patch_size=8
    )
    return WithHead(Dinov2Model(config), 16)  # 16 px images: the position embedding is interpolated


def clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    return WithHead(CLIPVisionModel(config), 16)


class Clip(nn.Module):
    """Both towers of CLIP: images against class prompts, which all images share."""

    def __init__(self, num_prompts: int) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        text = {**tower, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 18}
        vision = {**tower, "image_size": 16, "patch_size": 8}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        words = torch.randint(2, 18, (num_prompts, 6), generator=torch.Generator().manual_seed(0))
        self.register_buffer("prompts", torch.cat([words, torch.full((num_prompts, 1), 19)], dim=1))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.clip(
            input_ids=self.prompts, pixel_values=image, attention_mask=torch.ones_like(self.prompts)
        ).logits_per_image
        return logits


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=3, image_size=32, patch_size=4, drop_path_rate=0.0
    )
    return WithHead(SwinModel(config, add_pooling_layer=False), 16)


class MonaiClassifier(nn.Module):
    """MONAI's ViT returns its hidden states beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        from monai.networks.nets import ViT

        self.vit = ViT(
            in_channels=1, img_size=16, patch_size=8, hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2,
            classification=True, num_classes=NUM_CLASSES, spatial_dims=2,
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.vit(image)[0]
        return logits


def unetr() -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(
        in_channels=1, out_channels=2, img_size=32, feature_size=4, hidden_size=16, mlp_dim=32, num_heads=2,
        spatial_dims=2,
    )  # fmt: skip


def swin_unetr() -> nn.Module:
    """In double precision: so small, a leaky ReLU behind four normalised values turns within float32 rounding."""
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(
        in_channels=1, out_channels=2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4,
        spatial_dims=2,
    ).double()  # fmt: skip


def segresnet(dims: int = 2) -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(
        spatial_dims=dims, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)
    )


def dynunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    return DynUNet(
        spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[4, 8, 8],
    )  # fmt: skip


class AttentionClassifier(nn.Module):
    """Patches, one ``nn.MultiheadAttention`` and a head: the attention of torchvision's and OpenCLIP's ViTs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        nn.init.normal_(self.embed.weight)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1))
        return logits


_VIT = Backbone(
    build=transformers_vit,
    losses=head_losses,
    batch_of=images_with_labels(3, 16),
    linears=r".*\.(q_proj|v_proj|out_proj|o_proj|fc1|fc2)",
    feedforward=r".*\.fc2",
    norms=r".*\.layernorm_(before|after)",
    head="head",
)

BACKBONES: Mapping[str, Backbone] = {
    "LiteMedSAM": Backbone(
        build=lite_medsam,
        losses=lite_medsam_losses,
        batch_of=images_with_boxes(64),
        linears=r"image_encoder\..*\.(qkv|proj|fc1|fc2)|mask_decoder\.transformer\..*(_proj|lin1|lin2)",
        feedforward=r".*\.(fc2|lin2)",
        convs=r"image_encoder\..*conv[13]\.c",
        norms=r".*\.norm[1-4]",
        head="mask_decoder.output_hypernetworks_mlps.0",
    ),
    "LiteMedSAM, cached": Backbone(
        build=lite_medsam,
        losses=cached_lite_medsam_losses,
        batch_of=with_features(images_with_boxes(64)),
        linears=r"image_encoder\..*\.(qkv|proj|fc1|fc2)|mask_decoder\.transformer\..*(_proj|lin1|lin2)",
        feedforward=r".*\.(fc2|lin2)",
        norms=r".*\.norm[1-4]",
        head="mask_decoder.output_hypernetworks_mlps.0",
    ),
    "SAM": Backbone(
        build=lively_sam,
        losses=sam_losses,
        batch_of=images_with_boxes(32),
        linears=r"vision_encoder\..*\.(qkv|proj|lin1|lin2)|mask_decoder\.transformer\..*(_proj|lin1|lin2)",
        feedforward=r".*\.lin2",
        convs=r"vision_encoder\.neck\.conv\d",
        norms=r".*\.layer_norm[12]",
        head="mask_decoder",
    ),
    "ViT": _VIT,
    "DINOv2": Backbone(
        build=dinov2,
        losses=head_losses,
        batch_of=images_with_labels(3, 16),
        linears=_VIT.linears,
        feedforward=_VIT.feedforward,
        convs=r".*\.projection",
        norms=r".*\.(norm[12]|layernorm)",
        head="head",
    ),
    "CLIP vision": Backbone(
        build=clip_vision,
        losses=head_losses,
        batch_of=images_with_labels(3, 16),
        linears=_VIT.linears,
        feedforward=_VIT.feedforward,
        norms=r".*\.layer_norm[12]",
        head="head",
    ),
    # As many prompts as the batches of the self-check have samples: nothing in the shapes gives it away.
    "CLIP both towers": Backbone(
        build=lambda: Clip(num_prompts=3),
        losses=head_losses,
        batch_of=images_with_labels(3, 16),
        linears=_VIT.linears,
        feedforward=_VIT.feedforward,
        norms=r".*\.layer_norm[12]",
        head="clip.visual_projection",
    ),
    "Swin": Backbone(
        build=swin,
        losses=head_losses,
        batch_of=images_with_labels(3, 32),
        linears=_VIT.linears,
        feedforward=_VIT.feedforward,
        norms=r".*\.layernorm_(before|after)",
        head="head",
    ),
    "MONAI ViT": Backbone(
        build=MonaiClassifier,
        losses=head_losses,
        batch_of=images_with_labels(1, 16),
        linears=r".*\.(qkv|out_proj|linear1|linear2)",
        feedforward=r".*\.linear2",
        norms=r".*\.norm[12]",
        head="vit.classification_head",
    ),
    "UNETR": Backbone(
        build=unetr,
        losses=mask_losses,
        batch_of=images_with_masks(32),
        linears=r"vit\.blocks\.\d+\..*(qkv|out_proj|linear1|linear2)",
        feedforward=r".*\.linear2",
        convs=r"decoder\d\.conv_block\..*\.conv",
        norms=r"(vit\.blocks|swinViT)\..*\.norm[12]",
        head="out",
    ),
    "SwinUNETR": Backbone(
        build=swin_unetr,
        losses=mask_losses,
        batch_of=in_double(images_with_masks(64)),
        linears=r"swinViT\.layers\d\..*\.(qkv|proj|linear1|linear2)",
        feedforward=r".*\.linear2",
        convs=r"decoder\d\.conv_block\..*\.conv",
        norms=r"(vit\.blocks|swinViT)\..*\.norm[12]",
        head="out",
    ),
    "SegResNet": Backbone(
        build=segresnet,
        losses=mask_losses,
        batch_of=images_with_masks(8),
        linears="",
        convs=r".*\.conv",
        norms=r".*\.norm[12]",
        head="conv_final",
    ),
    "SegResNet 3-D": Backbone(
        build=lambda: segresnet(3),
        losses=mask_losses,
        batch_of=images_with_masks(4, dims=3),
        linears="",
        convs=r".*\.conv",
        norms=r".*\.norm[12]",
        head="conv_final",
    ),
    "DynUNet": Backbone(
        build=dynunet,
        losses=mask_losses,
        batch_of=images_with_masks(16),
        linears="",
        convs=r".*\.conv[12]\.conv",
        norms=r".*\.norm[12]",
        head="output_block",
    ),
    "MultiheadAttention": Backbone(
        build=AttentionClassifier,
        losses=head_losses,
        batch_of=images_with_labels(1, 8),
        linears="attention",
        convs="embed",
        head="head",
    ),
}


# ----------------------------------------------------------------------------------------------------- methods


def _peft(network: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    module: nn.Module = get_peft_model(network, config).get_base_model()
    return module


def lora(network: nn.Module, entry: Backbone, targets: str = "", **options: Any) -> nn.Module:
    from peft import LoraConfig

    return _peft(network, LoraConfig(r=2, lora_alpha=4, target_modules=targets or entry.linears, **options))


def lora_on_convolutions(network: nn.Module, entry: Backbone) -> nn.Module:
    return lora(network, entry, entry.convs)


def lora_on_everything(network: nn.Module, entry: Backbone) -> nn.Module:
    return lora(network, entry, f"{entry.linears}|{entry.convs}")


def ia3(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import IA3Config

    return _peft(network, IA3Config(target_modules=entry.linears, feedforward_modules=entry.feedforward))


def vera(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import VeraConfig

    return _peft(network, VeraConfig(r=4, target_modules=entry.linears))


def adalora(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import AdaLoraConfig

    return _peft(network, AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=entry.linears))


def oft(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import OFTConfig

    return _peft(network, OFTConfig(oft_block_size=4, r=0, target_modules=entry.linears or entry.convs))


def loha(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import LoHaConfig

    return _peft(network, LoHaConfig(r=2, target_modules=entry.linears or entry.convs))


def norm_tuning(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import LNTuningConfig

    return _peft(network, LNTuningConfig(target_modules=entry.norms))


def bias_tuning(network: nn.Module, entry: Backbone) -> nn.Module:
    """BitFit (Ben Zaken et al. 2022): all biases of linear, convolution and normalisation layers."""
    for layer in network.modules():
        bias = getattr(layer, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)
    return network


def head_only(network: nn.Module, entry: Backbone) -> nn.Module:
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config = LoraConfig(r=2, target_modules=DUMMY_TARGET_MODULES, modules_to_save=[entry.head])
    return _peft(network, config)


def lora_and_head(network: nn.Module, entry: Backbone) -> nn.Module:
    return lora(network, entry, modules_to_save=[entry.head])


class Bottleneck(nn.Module):
    """A layer followed by a small residual two-layer perceptron on its last axis (Houlsby et al. 2019)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.out_features, 4)
        self.up = nn.Linear(4, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x)
        update: Tensor = self.up(functional.gelu(self.down(hidden)))
        return hidden + update


def bottlenecks(network: nn.Module, entry: Backbone) -> nn.Module:
    """Houlsby adapters, which PEFT does not have, after the second layer of each feed-forward part."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(entry.feedforward, name):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, Bottleneck(layer))
    return network


METHODS: Mapping[str, Callable[[nn.Module, Backbone], nn.Module]] = {
    "LoRA": lora,
    "conv LoRA": lora_on_convolutions,
    "LoRA everywhere": lora_on_everything,
    "LoRA + head": lora_and_head,
    "rsLoRA": lambda network, entry: lora(network, entry, use_rslora=True),
    "DoRA": lambda network, entry: lora(network, entry, use_dora=True),
    "IA3": ia3,
    "VeRA": vera,
    "AdaLoRA": adalora,
    "OFT": oft,
    "LoHa": loha,
    "bottleneck": bottlenecks,
    "norm tuning": norm_tuning,
    "BitFit": bias_tuning,
    "head": head_only,
}
