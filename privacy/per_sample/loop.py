"""The obvious engine: one sample at a time. What the others are measured against, and the last resort."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from privacy.per_sample.engine import Batch, Engine, one_per_sample, own_gradients, samples


class Loop(Engine):
    """Per-sample gradients by a forward and a backward pass for each sample."""

    name: ClassVar[str] = "loop"

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        device = next(iter(self.parameters.values())).device
        gradients_BP = torch.zeros(num_samples, self.num_parameters, device=device)
        losses_B = torch.zeros(num_samples, device=device)
        for index in range(num_samples):
            with own_gradients(self.module), torch.enable_grad():
                loss = one_per_sample(self.losses(samples(batch, slice(index, index + 1))), 1)
                losses_B[index] = loss.detach()[0]
                if loss.requires_grad:
                    loss.sum().backward()  # type: ignore[no-untyped-call]
                    gradients_BP[index] = self._flat_gradient()
        return gradients_BP, losses_B

    def _flat_gradient(self) -> Tensor:
        return torch.cat(
            [
                torch.zeros_like(parameter).reshape(-1) if parameter.grad is None else parameter.grad.reshape(-1)
                for parameter in self.parameters.values()
            ]
        )
