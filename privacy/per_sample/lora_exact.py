"""The fast engine: hooks on the adapter's own layers, which are told how many samples a batch has.

A layer's gradient for one sample needs only that sample's inputs and output gradients. Windowed attention
folds windows into the batch axis, promptable decoders fold boxes into it, so the leading axis of what a layer
sees is not the number of samples: reading it off there, as hooks usually do, clips windows instead of patients
and protects nobody. Here the number is given, and rows are only assumed to be *sample by sample* (all rows of
the first sample, then all of the second), which the self-check verifies on the real model.

One forward and one backward pass, no wrapper around the module; a layer called several times adds up.

Legend: B samples, R rows of one sample, I inputs, O outputs of a layer, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medfed.errors import EngineError
from privacy.per_sample.engine import Batch, Engine, Losses, one_per_sample, own_gradients

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
)  # fmt: skip
"""Layers that treat every entry of their leading axis alike and read their parameters in ``forward`` only."""


@dataclass(frozen=True)
class _Piece:
    """A parameter of a layer and its columns of the flat gradient."""

    name: str
    columns: slice
    parameter: nn.Parameter


class LoraExact(Engine):
    """Per-sample gradients of adapters made of linear, convolution and normalisation layers.

    Right for LoRA, bottleneck adapters, tuned normalisations and biases, and heads trained in full. Adapters
    with parameters outside such layers (DoRA, IA3, VeRA, AdaLoRA) are refused.
    """

    name: ClassVar[str] = "lora-exact"

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses) -> None:
        super().__init__(module, parameters, losses)
        self._layers = self._find_layers()

    def _find_layers(self) -> list[tuple[str, nn.Module, list[_Piece]]]:
        columns: dict[int, slice] = {}
        start = 0
        for parameter in self.parameters.values():
            columns[id(parameter)] = slice(start, start + parameter.numel())
            start += parameter.numel()
        layers = []
        for name, layer in self.module.named_modules():
            pieces = [
                _Piece(own, columns[id(parameter)], parameter)
                for own, parameter in layer.named_parameters(recurse=False)
                if id(parameter) in columns
            ]
            if not pieces:
                continue
            if not any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in _LAYERS):
                raise EngineError(
                    f"Expected adapter parameters in linear, convolution or normalisation layers, got "
                    f"{pieces[0].name} in {name or 'the module itself'} ({type(layer).__name__}); "
                    "engine 'vmap' may know it, or choose adapter.method = 'lora'."
                )
            layers.append((name, layer, pieces))
        return layers

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        device = next(iter(self.parameters.values())).device
        gradients_BP = torch.zeros(num_samples, self.num_parameters, device=device)
        heard: set[str] = set()
        handles = [
            layer.register_forward_hook(
                partial(_watch, name=name, pieces=pieces, gradients_BP=gradients_BP, heard=heard), with_kwargs=True
            )
            for name, layer, pieces in self._layers
        ]
        try:
            with own_gradients(self.module), torch.enable_grad():
                losses_B = one_per_sample(self.losses(batch), num_samples)
                if losses_B.requires_grad:  # not where no sample of the batch holds anything to learn from
                    losses_B.sum().backward()  # type: ignore[no-untyped-call]
                self._refuse_unheard(heard)
        finally:
            for handle in handles:
                handle.remove()
        return gradients_BP, losses_B.detach()

    def _refuse_unheard(self, heard: set[str]) -> None:
        """A layer with a gradient that no hook was told of is not used in the way this engine knows."""
        for name, layer, pieces in self._layers:
            for piece in pieces:
                if piece.parameter.grad is not None and name not in heard:
                    raise EngineError(
                        f"Expected {piece.name} of {name} ({type(layer).__name__}) to be used by calling the layer, "
                        "got a gradient that no call accounts for: something reads the tensor by itself, as "
                        "nn.MultiheadAttention does, or changes the layer's output in place; adapt other layers, or "
                        "use engine 'vmap' or 'loop'."
                    )


def _watch(
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: dict[str, Any],
    output: Tensor,
    *,
    name: str,
    pieces: list[_Piece],
    gradients_BP: Tensor,
    heard: set[str],
) -> Tensor | None:
    """Forward hook: have the output's gradient added to ``gradients_BP`` when it is known."""
    if not output.requires_grad:
        return None
    num_samples = len(gradients_BP)
    if len(inputs) != 1 or keywords:
        raise EngineError(
            f"Expected {name} ({type(layer).__name__}) to be called with its input only, got further arguments; "
            "adapt other layers, or use engine 'vmap'."
        )
    x = inputs[0].detach()
    if x.dim() < 2 or x.shape[0] % num_samples:
        raise EngineError(
            f"Expected the rows of {name} sample by sample for {num_samples} samples, got input shape "
            f"{tuple(x.shape)}: something that all samples share passes through it; adapt other layers, "
            "or use engine 'vmap'."
        )
    rule = _linear if isinstance(layer, nn.Linear) else _any_layer
    # Instance normalisation returns a view, and an in-place activation behind it would cut the view's hook off.
    # Linear layers may return views, too; there a copy at every LoRA layer would cost time, and it is refused.
    watched = output.clone() if rule is _any_layer and output._is_view() else output

    def add(gradient: Tensor) -> None:
        heard.add(name)
        rule(layer, x, gradient, pieces, gradients_BP)

    watched.register_hook(add)  # type: ignore[no-untyped-call]
    return watched


def _linear(layer: nn.Module, x: Tensor, gradient: Tensor, pieces: list[_Piece], gradients_BP: Tensor) -> None:
    """Add a linear layer's share: for the weight, the sum over rows of outer products."""
    num_samples = len(gradients_BP)
    g_BRO = gradient.reshape(num_samples, -1, gradient.shape[-1])
    for piece in pieces:
        if piece.name == "weight":
            x_BRI = x.reshape(num_samples, -1, x.shape[-1]).to(g_BRO.dtype)
            # The narrow matrix goes first: for LoRA's B, of few inputs, that takes a third of the time and less.
            if g_BRO.shape[-1] <= x_BRI.shape[-1]:
                share = torch.bmm(g_BRO.transpose(1, 2), x_BRI)
            else:
                share = torch.bmm(x_BRI.transpose(1, 2), g_BRO).transpose(1, 2)
        else:
            share = g_BRO.sum(dim=1)
        gradients_BP[:, piece.columns] += share.reshape(num_samples, -1)


def _any_layer(layer: nn.Module, x: Tensor, gradient: Tensor, pieces: list[_Piece], gradients_BP: Tensor) -> None:
    """Add the share of a layer of :data:`_LAYERS`: its own vector-Jacobian product, sample by sample."""
    num_samples = len(gradients_BP)
    parameters = {f"layer.{piece.name}": piece.parameter.detach() for piece in pieces}
    bare = _WithoutHooks(layer)

    def of_one(x_one: Tensor, gradient_one: Tensor) -> dict[str, Tensor]:
        def forward(own: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(bare, own, (x_one,))

        pullback: Callable[[Tensor], tuple[dict[str, Tensor]]] = torch.func.vjp(forward, parameters)[1]
        return pullback(gradient_one)[0]

    split = (num_samples, -1)
    with torch.enable_grad():
        shares = torch.func.vmap(of_one)(
            x.reshape(*split, *x.shape[1:]).to(gradient.dtype), gradient.reshape(*split, *gradient.shape[1:])
        )
    for piece in pieces:
        gradients_BP[:, piece.columns] += shares[f"layer.{piece.name}"].reshape(num_samples, -1)


class _WithoutHooks(nn.Module):
    """A layer's forward by itself: computing its gradient must not be watched in turn."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer.forward(x)
