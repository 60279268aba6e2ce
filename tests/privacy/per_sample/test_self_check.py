"""Engines that are broken on purpose, and models on which nothing can be proven, must all be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from backbones import adapted, sam
from torch import Tensor, nn
from torch.nn import functional

from medfed.errors import EngineError
from privacy.per_sample.engine import Batch, Engine, Losses
from privacy.per_sample.loop import Loop
from privacy.per_sample.lora_exact import LoraExact
from privacy.per_sample.self_check import choose_engine, self_check
from privacy.per_sample.vmap import Vmap

CLIP_NORM = 0.1
ENGINES = ("auto", "lora-exact", "vmap", "loop")


class Lora(nn.Module):
    """A frozen linear layer with LoRA as it starts: B is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.A = nn.Linear(6, 2, bias=False)
        self.B = nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.base(x) + self.B(self.A(x))
        return hidden


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 6, generator=generator)[:count]


def squares(module: nn.Module) -> Losses:
    return lambda x: module(x).flatten(1).square().mean(dim=1)


def check(kind: type[Engine], module: nn.Module | None = None, losses: Losses | None = None) -> None:
    torch.manual_seed(0)
    module = module or nn.Sequential(Lora(), nn.Tanh(), Lora())
    engine = kind(module, trainable(module), losses or squares(module))
    self_check(engine, batch_of=batch_of, clip_norm=CLIP_NORM)


def choose(choice: str, module: nn.Module, losses: Losses | None = None) -> Engine:
    return choose_engine(
        choice, module, trainable(module), losses or squares(module), batch_of=batch_of, clip_norm=CLIP_NORM
    )


@pytest.mark.parametrize("kind", [LoraExact, Vmap, Loop])
def test_engines_that_are_right_pass(kind: type[Engine]) -> None:
    check(kind)


# ------------------------------------------------------------------------------------------- broken engines


def broken(change: Callable[[LoraExact, Tensor], Tensor]) -> type[Engine]:
    """The fast engine with its gradients changed."""

    class Broken(LoraExact):
        name: ClassVar[str] = "broken"

        def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
            gradients_BP, losses_B = super()._gradients(batch, num_samples)
            return change(self, gradients_BP), losses_B

    return Broken


def _only_last_layer(_: LoraExact, gradients_BP: Tensor) -> Tensor:
    gradients_BP[:, -12:] = 0
    return gradients_BP


OWN = "each sample's own gradient, got a relative error of .* in .*; adapt other layers"
BROKEN: dict[str, tuple[Callable[[LoraExact, Tensor], Tensor], str]] = {
    "scaled by two": (lambda _, g: 2 * g, OWN),
    "zero": (lambda _, g: 0 * g, OWN),
    "averaged over the batch": (lambda _, g: g / len(g), OWN),
    "rows of the wrong sample": (lambda _, g: g.roll(1, dims=0), OWN),
    "the sum for every sample": (lambda _, g: g.sum(dim=0).expand_as(g), OWN),
    "not a number": (lambda _, g: g * float("nan"), OWN),
    "one layer missing": (_only_last_layer, r"relative error of .* in 2\.B\.weight"),
    "leaking from the next sample": (lambda _, g: g + 0.01 * g.roll(1, dims=0), OWN),
    "a thousandth of the next sample, twice the tolerance": (lambda _, g: g + 0.002 * g.roll(1, dims=0), OWN),
    "scaled in training mode only": (lambda e, g: 2 * g if e.module.training else g, OWN),
    "leaking in training mode only": (lambda e, g: g + g.mean(dim=0) if e.module.training else g, OWN),
    "wrong for one sample alone": (lambda _, g: g if len(g) > 1 else 2 * g, OWN),
    "wrong for two samples": (lambda _, g: -g if len(g) == 2 else g, r"move the clipped sum by at most 0\.1, got 0\."),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_engine_is_refused(fault: str) -> None:
    change, message = BROKEN[fault]
    with pytest.raises(EngineError, match=message):
        check(broken(change))


def test_an_engine_that_drops_what_is_zero_at_the_start_of_lora_is_refused() -> None:
    def without_a(engine: LoraExact, gradients_BP: Tensor) -> Tensor:
        start = 0
        for name, parameter in engine.parameters.items():
            stop = start + parameter.numel()
            if ".A." in name:
                gradients_BP[:, start:stop] = 0
            start = stop
        return gradients_BP

    torch.manual_seed(0)
    module = nn.Sequential(Lora(), nn.Tanh(), Lora())
    right, wrong = (kind(module, trainable(module), squares(module)) for kind in (Loop, broken(without_a)))
    # At its start LoRA cannot tell them apart ...
    torch.testing.assert_close(right.gradients(batch_of(3))[0], wrong.gradients(batch_of(3))[0])
    with pytest.raises(EngineError, match=r"in \d\.A\.weight"):  # ... the check moves away from it
        self_check(wrong, batch_of=batch_of, clip_norm=CLIP_NORM)


def test_an_engine_that_returns_something_for_no_samples_is_refused() -> None:
    class Eager(LoraExact):
        def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
            return super().gradients(batch) if len(batch) else (torch.zeros(1, self.num_parameters), torch.zeros(0))

    with pytest.raises(EngineError, match=r"no gradients of no samples, got shape \(1, 48\)"):
        check(Eager)


def test_dropout_does_not_hide_an_engine_that_is_wrong_in_training_only() -> None:
    def network() -> nn.Module:
        return nn.Sequential(Lora(), nn.Dropout(0.5), Lora())

    for kind in (LoraExact, Vmap, Loop):
        check(kind, network())
    with pytest.raises(EngineError, match=OWN):
        check(broken(lambda e, g: 2 * g if e.module.training else g), network())
    with pytest.raises(EngineError, match="from changing another sample in training mode"):
        check(broken(lambda e, g: g + g.flip(0) if e.module.training and len(g) > 1 else g), network())


# ------------------------------------------------------------------------------------------- models and losses


@pytest.mark.parametrize("engine", ENGINES)
def test_in_batch_contrast_is_refused_by_every_engine_as_what_it_is(engine: str) -> None:
    module = nn.Sequential(nn.Linear(6, 4))

    def contrast(x: Tensor) -> Tensor:
        embedding = functional.normalize(module(x), dim=1)
        return functional.cross_entropy(embedding @ embedding.T, torch.arange(len(x)), reduction="none")

    with pytest.raises(EngineError, match="in-batch contrast.*use another loss") as refused:
        choose(engine, module, contrast)
    assert str(refused.value).count("in-batch contrast") == 1  # not once for each engine


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_statistics_are_refused_by_every_engine(engine: str) -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - 0.5 * x.mean(dim=0)

    with pytest.raises(EngineError, match="batch statistics"):
        choose(engine, nn.Sequential(nn.Linear(6, 4), Centred()))
    stateless = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(EngineError, match="none in 1: it always mixes the samples"):
        choose(engine, stateless)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_norm_with_stored_statistics_passes_in_training_mode(engine: str) -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    chosen = choose(engine, module)
    assert chosen.name == {"auto": "lora-exact"}.get(engine, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_of_the_wrong_shape_is_refused(engine: str) -> None:
    module = nn.Linear(6, 4)
    with pytest.raises(EngineError, match="one loss per sample"):
        choose(engine, module, lambda x: module(x).mean())
    with pytest.raises(EngineError, match=r"one loss per sample, shape \(3,\), got \(1,\)"):
        choose(engine, module, lambda x: module(x).mean(dim=(0, 1), keepdim=True)[0])


class Counts(nn.Module):
    """Keeps a running mean of what it sees in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(dim=0), alpha=0.1)
        return x


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_that_absorbs_data_in_training_mode_is_refused_and_put_back(engine: str) -> None:
    module = nn.Sequential(Lora(), Counts(), nn.Linear(6, 2))
    with pytest.raises(EngineError, match=r"1\.mean changed by a training pass|1 \(Counts\)"):
        choose(engine, module)
    assert not module[1].mean.any()


@pytest.mark.parametrize("engine", ["lora-exact", "vmap", "loop"])
def test_a_power_iteration_in_training_mode_is_refused(engine: str) -> None:
    inner = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6).requires_grad_(False))
    module = nn.Sequential(inner, nn.Linear(6, 2))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(EngineError, match=r"0\.parametrizations\.weight"):
        choose(engine, module)
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


def test_an_adapter_that_does_not_act_on_the_loss_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.adapter(x).sum()

    with pytest.raises(EngineError, match=r"adapter to act on the loss, got a gradient that is zero.*adapter\.weight"):
        choose("auto", Beside())


def test_a_dead_random_sam_is_refused_rather_than_found_right() -> None:
    # transformers' own initializer_range is 1e-10. Its decoder would live through an adapter there.
    subject = adapted("SAM", "LoRA", build=sam, linears=r"vision_encoder\..*\.qkv")
    with pytest.raises(EngineError, match="lost in rounding.*pretrained weights"):
        choose_engine(
            "auto", subject.module, subject.parameters, subject.losses, batch_of=subject.batch_of, clip_norm=CLIP_NORM
        )


def test_samples_that_cannot_be_told_apart_prove_nothing_and_are_refused() -> None:
    module = nn.Linear(6, 2)
    with pytest.raises(EngineError, match="different samples to have different gradients"):
        choose("auto", module, lambda x: module(torch.ones_like(x)).square().mean(dim=1))


def test_gradients_that_are_not_finite_are_refused_by_name() -> None:
    module = nn.Linear(6, 2)
    with pytest.raises(EngineError, match="NaN or infinity in weight"):
        choose("auto", module, lambda x: module(x).sum(dim=1) + (module.weight * 0).sum().sqrt())


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError, match="auto, lora-exact, vmap, loop, got 'opacus'"):
        choose("opacus", nn.Linear(6, 2))


# ------------------------------------------------------------------------------------------- put back


def snapshot(module: nn.Module) -> list[Any]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        [(name, id(tensor), tensor.detach().clone().tolist()) for name, tensor in tensors],
        [layer.training for layer in module.modules()],
        [parameter.grad for parameter in module.parameters()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("refused", [False, True])
def test_model_modes_gradients_and_random_state_are_put_back(engine: str, refused: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Lora(), nn.Dropout(0.1), nn.BatchNorm1d(6), Counts() if refused else nn.Tanh(), Lora())
    module[0].train(False)
    before = snapshot(module)
    if refused:
        with pytest.raises(EngineError):
            choose(engine, module)
    else:
        choose(engine, module)
    assert snapshot(module) == before
