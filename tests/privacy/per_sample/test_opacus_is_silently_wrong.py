"""What plain Opacus 1.6 does with adapters on medical backbones, without a word, and what ours does there.

Opacus reads the number of samples off the leading axis of what a layer sees. Where windows, boxes or prompts are
folded into it, each of those is clipped by itself, and one image moves the sum by several clip norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from backbones import Batch, Subject, adapted, head_losses, images_with_labels
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from medfed.errors import EngineError
from privacy.clipping import ClippedSum
from privacy.per_sample.engine import Engine, samples
from privacy.per_sample.loop import Loop
from privacy.per_sample.opacus_hooks import OpacusHooks
from privacy.per_sample.self_check import choose_engine, self_check

# Legend: B samples, P adapter parameters.

# Said by Opacus' hooks wherever a layer's input needs no gradient, as under a frozen backbone.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

NO_CLIPPING = 1e9


def opacus_sum(subject: Subject, batch: Batch, *, clip_norm: float, reduction: str = "sum") -> Tensor:
    """The clipped sum of a step as a user of Opacus gets it: GradSampleModule and DPOptimizer, without noise."""
    parameters = list(subject.parameters.values())
    num_samples = len(next(iter(batch.values())))
    wrapped = GradSampleModule(subject.module, loss_reduction=reduction)  # strict: runs the validator
    try:
        optimizer = DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=clip_norm,
            expected_batch_size=num_samples,
            loss_reduction=reduction,
        )
        losses_B = subject.losses(batch)
        (losses_B.sum() if reduction == "sum" else losses_B.mean()).backward()
        optimizer.clip_and_accumulate()
        return torch.cat([parameter.summed_grad.reshape(-1) for parameter in parameters])
    finally:
        wrapped._close()
        for parameter in parameters:
            parameter.grad = None


def our_engine(subject: Subject) -> Engine:
    return choose_engine(
        "auto", subject.module, subject.parameters, subject.losses, batch_of=subject.batch_of, clip_norm=1.0
    )


def our_sum(engine: Engine, batch: Batch, *, clip_norm: float) -> Tensor:
    """The same step by one of our engines."""
    gradients_BP, _ = engine.gradients(batch)
    total = ClippedSum(engine.num_parameters, clip_norm=clip_norm, device="cpu")
    total.add(gradients_BP, range(len(gradients_BP)), [1.0] * len(gradients_BP))
    return total.close().sum_P.float()


@dataclass(frozen=True)
class Measured:
    """Contribution of one image in clip norms, and the relative error of the sum of two."""

    opacus: float
    ours: float
    off: float


def measured(subject: Subject) -> Measured:
    engine, batch = our_engine(subject), subject.batch_of(2)
    alone = samples(batch, slice(0, 1))
    clip_norm = norm_that_clips_all(engine, batch)
    opacus_P = opacus_sum(subject, batch, clip_norm=clip_norm)
    ours_P = our_sum(engine, batch, clip_norm=clip_norm)
    return Measured(
        opacus=float(opacus_sum(subject, alone, clip_norm=clip_norm).norm()) / clip_norm,
        ours=float(our_sum(engine, alone, clip_norm=clip_norm).norm()) / clip_norm,
        off=float((opacus_P - ours_P).norm() / ours_P.norm()),
    )


def norm_that_clips_all(engine: Engine, batch: Batch) -> float:
    gradients_BP, _ = Loop(engine.module, engine.parameters, engine.losses).gradients(batch)
    return 0.1 * float(gradients_BP.norm(dim=1).min())


def assert_refused_by_our_check(subject: Subject) -> None:
    """Opacus' own gradients, put before our self-check."""
    engine = OpacusHooks(subject.module, subject.parameters, subject.losses)
    with pytest.raises(EngineError, match=r"opacus-hooks|from Opacus"):
        self_check(engine, batch_of=subject.batch_of, clip_norm=1.0)


# Contributions measured: 1.9, 1.8, 2.2, 3.2 and 3.9 clip norms. They grow as the clip norm falls, up to the number
# of windows. One stage at a time: with several, the leading axes differ and DPOptimizer stops with an error.
FOLDED = {
    "LiteMedSAM encoder, 4 windows an image": ("LiteMedSAM", r"image_encoder\.layers\.2\..*\.(qkv|proj)", 1.5),
    "LiteMedSAM decoder, 2 boxes an image": ("LiteMedSAM", r"mask_decoder\.transformer\.layers\.1\..*\.[qv]_proj", 1.5),
    "SAM, 9 windows an image": ("SAM", r"vision_encoder\.layers\.0\.attn\.qkv", 1.5),
    "Swin, 9 windows an image": ("Swin", r".*layers\.0\..*\.q_proj", 1.5),
    "SwinUNETR, first stage": ("SwinUNETR", r"swinViT\.layers1\..*\.(qkv|proj)", 2.5),
}


@pytest.mark.parametrize("case", FOLDED)
def test_one_image_moves_the_sum_by_several_clip_norms_where_windows_or_boxes_are_folded(case: str) -> None:
    backbone, linears, factor = FOLDED[case]
    subject = adapted(backbone, "LoRA", linears=linears)
    found = measured(subject)
    assert found.opacus > factor
    assert found.ours <= 1 + 1e-5
    assert_refused_by_our_check(subject)


@pytest.mark.parametrize(
    ("backbone", "linears", "scale"),
    [
        ("LiteMedSAM", r"image_encoder\.layers\.1\..*\.(qkv|proj)", 25),
        ("LiteMedSAM", r"image_encoder\.layers\.2\..*\.(qkv|proj)", 4),
        ("SAM", r"vision_encoder\.layers\.0\.attn\.qkv", 9),
        ("SAM", r"vision_encoder\.layers\.1\.attn\.qkv", 1),
    ],
)
def test_the_default_reduction_scales_gradients_by_the_windows_of_the_layer(
    backbone: str, linears: str, scale: int
) -> None:
    subject = adapted(backbone, "LoRA", linears=linears)
    batch = subject.batch_of(2)
    opacus_P = opacus_sum(subject, batch, clip_norm=NO_CLIPPING, reduction="mean")
    ours_P = our_sum(our_engine(subject), batch, clip_norm=NO_CLIPPING)
    torch.testing.assert_close(opacus_P, scale * ours_P, rtol=1e-3, atol=1e-3 * float(ours_P.abs().max()) * scale)


def test_as_many_prompts_as_images_mix_class_prompts_with_images() -> None:
    subject = adapted("CLIP both towers", "LoRA")
    engine, batch = our_engine(subject), subject.batch_of(3)
    clip_norm = norm_that_clips_all(engine, batch)
    opacus_P = opacus_sum(subject, batch, clip_norm=clip_norm)
    ours_P = our_sum(engine, batch, clip_norm=clip_norm)
    loop_P = our_sum(Loop(engine.module, engine.parameters, engine.losses), batch, clip_norm=clip_norm)
    torch.testing.assert_close(ours_P, loop_P, rtol=1e-3, atol=1e-4 * clip_norm)
    assert float((opacus_P - ours_P).norm() / ours_P.norm()) > 0.25  # of the update; 0.67 measured
    assert_refused_by_our_check(subject)
    with pytest.raises(RuntimeError, match="equal size"):  # for every other number of images it is no secret
        opacus_sum(subject, subject.batch_of(2), clip_norm=clip_norm)


def test_modules_registered_twice_have_their_gradient_twice() -> None:
    subject = adapted("DynUNet", "conv LoRA")
    batch = subject.batch_of(2)
    opacus_P = opacus_sum(subject, batch, clip_norm=NO_CLIPPING)
    ours_P = our_sum(our_engine(subject), batch, clip_norm=NO_CLIPPING)
    torch.testing.assert_close(opacus_P, 2 * ours_P, rtol=1e-3, atol=1e-5)
    assert_refused_by_our_check(subject)


class BatchNormed(nn.Module):
    """Two convolutions, each with a batch normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.norm(self.first(image)).relu()
        logits: Tensor = self.head(self.last_norm(self.second(hidden)).relu().mean(dim=(2, 3)))
        return logits


def test_frozen_batch_norm_in_training_mode_couples_patients_and_absorbs_their_data() -> None:
    subject = adapted(
        "SegResNet", "conv LoRA", build=BatchNormed, losses=head_losses, batch_of=images_with_labels(1, 8),
        convs="first|second",
    )  # fmt: skip
    norm = subject.module.get_submodule("norm")
    assert norm.training
    assert not ModuleValidator.validate(subject.module)  # Opacus has nothing against it

    batch = subject.batch_of(4)
    other = {name: torch.cat([values[:-1], values[:1]]) for name, values in batch.items()}

    def moved_by_another_sample(before_BP: Tensor, after_BP: Tensor) -> float:
        return float(((after_BP - before_BP)[:-1].norm(dim=1) / before_BP[:-1].norm(dim=1)).max())

    kept = norm.running_mean.clone()
    opacus = OpacusPlain(subject)
    assert moved_by_another_sample(opacus.gradients(batch), opacus.gradients(other)) > 0.5  # about 1 measured
    assert not torch.equal(norm.running_mean, kept)

    norm.running_mean.copy_(kept)
    ours = our_engine(subject)
    assert moved_by_another_sample(ours.gradients(batch)[0], ours.gradients(other)[0]) < 1e-5
    assert torch.equal(norm.running_mean, kept)


class OpacusPlain:
    """Opacus' gradients without the protection that our engines put around batch normalisation."""

    def __init__(self, subject: Subject) -> None:
        self._engine = OpacusHooks(subject.module, subject.parameters, subject.losses)

    def gradients(self, batch: Batch) -> Tensor:
        return self._engine._gradients(batch, len(batch["image"]))[0]


# ------------------------------------------------------------------------------- where Opacus is right, or says so


@pytest.mark.parametrize(
    ("backbone", "method"),
    [("ViT", "LoRA"), ("DINOv2", "LoRA + head"), ("MONAI ViT", "norm tuning"), ("ViT", "BitFit"), ("ViT", "bottleneck"),
     ("SegResNet", "conv LoRA"), ("UNETR", "LoRA")],
)  # fmt: skip
def test_opacus_agrees_where_the_leading_axis_is_the_sample(backbone: str, method: str) -> None:
    subject = adapted(backbone, method)
    self_check(
        OpacusHooks(subject.module, subject.parameters, subject.losses), batch_of=subject.batch_of, clip_norm=1.0
    )


@pytest.mark.parametrize(
    ("backbone", "linears"),
    [("LiteMedSAM", r"image_encoder\..*\.qkv"), ("SAM", r"vision_encoder\..*\.qkv"), ("SwinUNETR", r"swinViT\..*\.qkv")],
)  # fmt: skip
def test_adapters_in_all_stages_stop_opacus_with_an_error(backbone: str, linears: str) -> None:
    subject = adapted(backbone, "LoRA", linears=linears)
    with pytest.raises(RuntimeError, match="equal size"):
        opacus_sum(subject, subject.batch_of(2), clip_norm=1.0)


@pytest.mark.parametrize("method", ["DoRA", "IA3", "VeRA", "AdaLoRA", "OFT", "LoHa"])
def test_adapters_outside_known_layers_stop_opacus_with_an_error(method: str) -> None:
    subject = adapted("ViT", method)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        opacus_sum(subject, subject.batch_of(2), clip_norm=1.0)


def test_an_activation_in_place_behind_an_instance_norm_stops_opacus_with_an_error() -> None:
    subject = adapted("DynUNet", "norm tuning")
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        opacus_sum(subject, subject.batch_of(2), clip_norm=1.0)
