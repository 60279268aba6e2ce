"""Optimiser steps on the coordinates of what trains; the rest of the adapter stays as it came, bit for bit.

Legend: P adapter parameters, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from medfed.models.adapted import AdaptedModel
from medfed.study_sections import TrainingConfig
from strategies.subspace import Subspace

Pull = Callable[[Tensor], Tensor | None]
"""What to add to the gradient, from how far the coordinates have come since the round began; both (Z,)."""


class SubspaceSteps:
    """Steps of a model's adapter within a subspace, with fresh optimiser state.

    Args:
        model: holds the adapter that the steps begin at.
        subspace: what trains.
        config: optimiser and learning rate.
        pull: added to each gradient; None for nothing.
    """

    def __init__(self, model: AdaptedModel, subspace: Subspace, config: TrainingConfig, pull: Pull | None) -> None:
        self._flat = model.flat
        self._subspace = subspace
        self._pull = pull
        if subspace.is_everything:
            self._z = model.flat
        else:
            self._z = nn.Parameter(subspace.coordinates(model.flat.detach()).clone())
            self._z.grad = torch.zeros_like(self._z)
        self._start_Z = None if pull is None else self._z.detach().clone()
        self._optimize = optimizer_step(self._z, config)

    def step(self) -> None:
        """One step along the gradient that lies in the model's flat adapter."""
        if self._z is not self._flat:
            assert self._flat.grad is not None
            self._gradient.copy_(self._subspace.coordinates(self._flat.grad))
        self._stepped()

    def step_along(self, gradient_Z: Tensor) -> None:
        """One step along a gradient given in coordinates."""
        self._gradient.copy_(gradient_Z)
        self._stepped()

    def _stepped(self) -> None:
        with torch.no_grad():
            if self._pull is not None and self._start_Z is not None:
                pulled_Z = self._pull(self._z.detach() - self._start_Z)
                if pulled_Z is not None:
                    self._gradient.add_(pulled_Z)
            self._optimize()
            if self._z is not self._flat:
                self._subspace.put(self._flat.data, self._z.data)

    @property
    def _gradient(self) -> Tensor:
        assert self._z.grad is not None
        return self._z.grad


def optimizer_step(parameter: nn.Parameter, config: TrainingConfig) -> Callable[[], object]:
    """What takes one optimiser step on a parameter, with fresh optimiser state."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW([parameter], lr=config.learning_rate, weight_decay=config.weight_decay).step
    assert parameter.grad is not None
    # Plain SGD is this one operation; torch.optim.SGD takes as long again to get there.
    return partial(parameter.data.add_, parameter.grad, alpha=-config.learning_rate)
