"""Opacus' own hooks, as a reference to compare with; never used for training.

Opacus reads the number of samples off the leading axis of what a layer sees. That is right for plain
transformers, and silently wrong where windows, prompts or boxes are folded into that axis
(``tests/privacy/per_sample/test_opacus_is_silently_wrong.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from medfed.errors import EngineError
from privacy.per_sample.engine import Batch, Engine, one_per_sample, own_gradients


class OpacusHooks(Engine):
    """Per-sample gradients as ``opacus.GradSampleModule`` computes them."""

    name: ClassVar[str] = "opacus-hooks"

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        from opacus import GradSampleModule

        wrapped = GradSampleModule(self.module, loss_reduction="sum", strict=False)
        try:
            with own_gradients(self.module), _heard_by_opacus(self.module), torch.enable_grad():
                losses_B = one_per_sample(self.losses(batch), num_samples)
                losses_B.sum().backward()  # type: ignore[no-untyped-call]
            rows = [getattr(parameter, "grad_sample", None) for parameter in self.parameters.values()]
        finally:
            wrapped._close()
        return torch.cat([self._flat(row, num_samples) for row in zip(self.parameters, rows, strict=True)], dim=1), (
            losses_B.detach()
        )

    def _flat(self, named: tuple[str, object], num_samples: int) -> Tensor:
        name, value = named
        total = sum(value) if isinstance(value, list) else value
        if not isinstance(total, Tensor):
            return torch.zeros(num_samples, self.parameters[name].numel())
        if len(total) != num_samples:
            raise EngineError(f"Expected {num_samples} gradients of {name}, got {len(total)} from Opacus.")
        return total.reshape(num_samples, -1)


@contextmanager
def _heard_by_opacus(module: nn.Module) -> Iterator[None]:
    """Trainable layers in training mode, the only one in which Opacus listens; batch normalisation as it is."""
    switched = [
        layer
        for layer in module.modules()
        if not layer.training
        and not isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    ]
    for layer in switched:
        layer.training = True
    try:
        yield
    finally:
        for layer in switched:
            layer.training = False
