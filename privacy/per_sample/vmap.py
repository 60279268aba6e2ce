"""The general engine: the whole model's gradient, vectorised over samples (``torch.func``).

Right where parameters are used outside a layer of their own (DoRA, IA3, VeRA, AdaLoRA), because every sample
passes through the model by itself. Not for models that torch cannot vectorise: LoHa's own autograd function,
LoRA inside ``nn.MultiheadAttention``, gradient checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from medfed.errors import EngineError
from privacy.per_sample.engine import Batch, Engine, Losses, one_per_sample

_SAMPLES_AT_A_TIME = 8
"""More are faster by a few per cent and hold all their activations at once: 2.1 GiB for a ViT-S at 8, 7.6 at 32."""


class Vmap(Engine):
    """Per-sample gradients by vectorising the gradient of a batch of one."""

    name: ClassVar[str] = "vmap"

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses) -> None:
        super().__init__(module, parameters, losses)
        self._losses = _LossesOf(module, losses)

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        names = {name: f"module.{self._module_names[name]}" for name in self.parameters}

        def loss_of_one(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
            one = tree_map(lambda leaf: leaf.unsqueeze(0), sample)
            in_place = {names[name]: parameter for name, parameter in parameters.items()}
            # Tied tensors are refused. With tie_weights torch would exchange a layer that is registered twice
            # under both of its names, and put the exchanged tensor "back" into the model.
            losses = torch.func.functional_call(self._losses, in_place, (one,), tie_weights=False)
            return one_per_sample(losses, 1).squeeze(0)

        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        try:
            # Of the kernels for attention only the plain one can be vectorised. Rarer ones run sample by sample,
            # which is right and slower, and torch says so each time.
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                gradients, losses_B = torch.func.vmap(
                    torch.func.grad_and_value(loss_of_one),
                    in_dims=(None, 0),
                    randomness="different",
                    chunk_size=_SAMPLES_AT_A_TIME,
                )(parameters, batch)
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise EngineError(
                f"Expected a model that can be vectorised over samples, got {_in_one_sentence(error)} in "
                f"{_innermost_module(error, self.module)}; choose adapter.method = 'lora', adapt other layers, or set "
                "privacy.engine = 'loop', which is exact and slower."
            ) from error
        flat = [gradients[name].reshape(num_samples, -1).float() for name in self.parameters]
        return torch.cat(flat, dim=1), losses_B.detach()


class _LossesOf(nn.Module):
    """A module whose forward is ``losses``, so that parameters can be exchanged for a call."""

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.module = module
        self._losses = losses

    def forward(self, batch: Batch) -> Tensor:
        return self._losses(batch)


def _in_one_sentence(error: Exception) -> str:
    """Kind and beginning of what torch says, which goes on with advice to those who write torch.func code."""
    sentence = str(error).partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__} ({sentence[:160]})"


def _innermost_module(error: Exception, module: nn.Module) -> str:
    """Name and class of the layer in whose forward the error was raised."""
    names = {id(layer): name for name, layer in module.named_modules()}
    trace, innermost = error.__traceback__, "the losses"
    while trace is not None:
        layer = trace.tb_frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and names.get(id(layer)):
            innermost = f"{names[id(layer)]} ({type(layer).__name__})"
        trace = trace.tb_next
    return innermost
