"""Opacus' own hooks, as a reference to compare with; never used for training.

Opacus reads the number of samples off the leading axis of what a layer sees. That is right for plain
transformers, and silently wrong where windows, prompts or boxes are folded into that axis
(``tests/privacy/per_sample/test_opacus_is_silently_wrong.py``).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from medfed.errors import EngineError
from privacy.per_sample.engine import Batch, Engine, one_per_sample


class OpacusHooks(Engine):
    """Per-sample gradients as ``opacus.GradSampleModule`` computes them."""

    name: ClassVar[str] = "opacus-hooks"

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        from opacus import GradSampleModule

        kept = [(parameter, parameter.grad) for parameter in self.parameters.values()]
        wrapped = GradSampleModule(self.module, loss_reduction="sum", strict=False)
        try:
            with torch.enable_grad():
                losses_B = one_per_sample(self.losses(batch), num_samples)
                losses_B.sum().backward()  # type: ignore[no-untyped-call]
            rows = [getattr(parameter, "grad_sample", None) for parameter in self.parameters.values()]
        finally:
            wrapped.remove_hooks()
            for parameter, gradient in kept:
                parameter.grad = gradient
                parameter.__dict__.pop("grad_sample", None)
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
