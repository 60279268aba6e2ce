"""Every backbone with every adapter method that is claimed: which engine is chosen, and that it is exact."""

from __future__ import annotations

import pytest
import torch
from backbones import Subject, adapted

from medfed.errors import EngineError
from privacy.per_sample.engine import Engine, samples
from privacy.per_sample.loop import Loop
from privacy.per_sample.self_check import choose_engine

# Legend: B samples, P adapter parameters.

CLIP_NORM = 1.0

# By hooks: adapters made of linear, convolution and normalisation layers that see one sample after another.
LORA_EXACT = {
    "LiteMedSAM": ("LoRA", "conv LoRA", "bottleneck", "norm tuning", "head"),
    "LiteMedSAM, cached": ("LoRA + head",),
    "SAM": ("LoRA", "conv LoRA", "bottleneck"),
    "ViT": ("LoRA", "rsLoRA", "LoRA + head", "bottleneck", "norm tuning", "BitFit", "head"),
    "DINOv2": ("LoRA", "conv LoRA", "LoRA + head", "bottleneck", "norm tuning", "BitFit", "head"),
    "CLIP vision": ("LoRA", "LoRA + head", "bottleneck", "norm tuning", "BitFit", "head"),
    "CLIP both towers": ("head",),
    "Swin": ("LoRA", "LoRA + head", "bottleneck", "norm tuning", "BitFit", "head"),
    "MONAI ViT": ("LoRA", "LoRA + head", "bottleneck", "norm tuning", "BitFit", "head"),
    "UNETR": ("LoRA", "conv LoRA", "bottleneck", "BitFit", "head"),
    "SwinUNETR": ("LoRA", "conv LoRA", "norm tuning"),
    "SegResNet": ("conv LoRA", "norm tuning", "BitFit", "head"),
    "SegResNet 3-D": ("conv LoRA", "norm tuning", "BitFit", "head"),
    "DynUNet": ("conv LoRA", "norm tuning", "BitFit", "head"),
    "MultiheadAttention": ("conv LoRA", "head"),
}
# Vectorised: parameters outside such layers, or layers that something shared by all samples passes through.
VMAP = {
    "LiteMedSAM": ("DoRA", "IA3", "VeRA", "AdaLoRA", "BitFit"),
    "LiteMedSAM, cached": ("DoRA", "IA3", "BitFit"),
    "SAM": ("LoRA + head", "DoRA", "IA3", "VeRA", "AdaLoRA", "norm tuning", "BitFit", "head"),
    "ViT": ("DoRA", "IA3", "VeRA", "AdaLoRA", "OFT"),
    "DINOv2": ("DoRA", "IA3", "VeRA", "AdaLoRA", "OFT"),
    "CLIP vision": ("DoRA", "IA3", "VeRA", "AdaLoRA", "OFT"),
    "CLIP both towers": ("LoRA", "DoRA", "IA3", "VeRA", "AdaLoRA", "OFT", "bottleneck", "norm tuning", "BitFit"),
    "Swin": ("DoRA", "IA3", "VeRA", "AdaLoRA", "OFT"),
    "MONAI ViT": ("DoRA", "IA3", "VeRA", "AdaLoRA", "OFT"),
    "UNETR": ("DoRA",),
    "SwinUNETR": ("DoRA", "IA3"),
    "SegResNet": ("OFT",),
    "MultiheadAttention": ("BitFit",),
}
# Refused by every fast engine; the message names what is in the way.
REFUSED = {
    ("ViT", "LoHa"): "attention.q_proj",
    ("SegResNet", "LoHa"): "convInit.conv",
    ("MultiheadAttention", "LoRA"): "attention.base_layer.out_proj",
}


def largest_error(engine: Engine, subject: Subject) -> float:
    """Of a sample's gradient, by global norm, relative to the largest, in batches of 1, 3 and 4."""
    batch = subject.batch_of(4)
    expected_BP, expected_B = Loop(subject.module, subject.parameters, subject.losses).gradients(batch)
    largest = 0.0
    for num_samples in (1, 3, 4):
        got_BP, got_B = engine.gradients(samples(batch, slice(0, num_samples)))
        torch.testing.assert_close(got_B.float(), expected_B[:num_samples], rtol=1e-5, atol=1e-6)
        largest = max(largest, float((got_BP - expected_BP[:num_samples]).norm(dim=1).max()))
    return largest / float(expected_BP.norm(dim=1).max())


def pairs(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(backbone, method) for backbone, methods in table.items() for method in methods]


@pytest.mark.parametrize(
    ("backbone", "method", "engine"),
    [(*pair, "lora-exact") for pair in pairs(LORA_EXACT)] + [(*pair, "vmap") for pair in pairs(VMAP)],
)
def test_the_chosen_engine_gives_the_gradients_of_a_batch_of_one_loop(backbone: str, method: str, engine: str) -> None:
    subject = adapted(backbone, method)
    chosen = choose_engine(
        "auto", subject.module, subject.parameters, subject.losses, batch_of=subject.batch_of, clip_norm=CLIP_NORM
    )
    assert chosen.name == engine
    assert subject.module.training
    assert largest_error(chosen, subject) < 1e-4


@pytest.mark.filterwarnings("ignore:Already unmerged")  # said by PEFT's attention at every call
@pytest.mark.parametrize(("backbone", "method"), REFUSED)
def test_what_cannot_be_made_right_is_refused_by_name_and_the_loop_remains(backbone: str, method: str) -> None:
    subject = adapted(backbone, method)
    arguments = (subject.module, subject.parameters, subject.losses)
    with pytest.raises(EngineError) as refused:
        choose_engine("auto", *arguments, batch_of=subject.batch_of, clip_norm=CLIP_NORM)
    message = str(refused.value)
    assert REFUSED[backbone, method] in message
    assert "lora-exact: " in message
    assert "vmap: " in message
    assert "privacy.engine = 'loop'" in message
    chosen = choose_engine("loop", *arguments, batch_of=subject.batch_of, clip_norm=CLIP_NORM)
    assert chosen.name == "loop"
