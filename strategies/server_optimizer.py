"""The server's step along the mean change: plain addition, momentum, or an adaptive method (Reddi et al. 2021).

All of them act on coordinates of what trains and is shared, element by element, and see nothing but the mean change.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from strategies.strategy import Tree

_FIRST, _SECOND = "first:", "second:"


class ServerOptimizer:
    """Turns the mean change into the change that is made; this one makes it as it is.

    Attributes:
        name: in study files.
        needs_fixed_subspace: whether it remembers something along coordinates that must stay the same.
    """

    name: ClassVar[str] = "plain"
    needs_fixed_subspace: ClassVar[bool] = False

    def step(self, delta: Tree, memory: Tree) -> tuple[Tree, Tree]:
        """The change to make, and what to remember.

        Args:
            delta: mean change of the sites, by tensor.
            memory: from the step before; empty at first.
        """
        return delta, {}


class FedAvgM(ServerOptimizer):
    """Momentum (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", section 4.3).

    Args:
        learning_rate: of the server.
        momentum: beta.
    """

    name = "fedavgm"
    needs_fixed_subspace = True

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self._learning_rate = learning_rate
        self._momentum = momentum

    def step(self, delta: Tree, memory: Tree) -> tuple[Tree, Tree]:
        """``v = beta v + delta``; the change is ``learning_rate v``."""
        velocity = {name: self._momentum * memory.get(name, torch.zeros(())) + mean for name, mean in delta.items()}
        return {name: self._learning_rate * v for name, v in velocity.items()}, velocity


class AdaptiveOptimizer(ServerOptimizer):
    """Steps over the root of a second moment (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2).

    Moments start at zero, where the paper lets the second start from tau squared on, and are not corrected for that;
    tau bounds the first steps.

    Args:
        learning_rate: eta.
        beta_1: of the first moment.
        beta_2: of the second.
        tau: added to its root.
    """

    needs_fixed_subspace = True

    def __init__(self, learning_rate: float, beta_1: float, beta_2: float, tau: float) -> None:
        self._learning_rate = learning_rate
        self._beta_1 = beta_1
        self._beta_2 = beta_2
        self._tau = tau

    def step(self, delta: Tree, memory: Tree) -> tuple[Tree, Tree]:
        """``m = beta_1 m + (1 - beta_1) delta``; the change is ``eta m / (sqrt(v) + tau)``."""
        change: dict[str, Tensor] = {}
        remembered: dict[str, Tensor] = {}
        for name, mean in delta.items():
            first = self._beta_1 * memory.get(f"{_FIRST}{name}", torch.zeros(())) + (1 - self._beta_1) * mean
            second = self._second_moment(memory.get(f"{_SECOND}{name}", torch.zeros_like(mean)), mean.square())
            change[name] = self._learning_rate * first / (second.sqrt() + self._tau)
            remembered |= {f"{_FIRST}{name}": first, f"{_SECOND}{name}": second}
        return change, remembered

    @abstractmethod
    def _second_moment(self, second: Tensor, squared: Tensor) -> Tensor:
        """V from the one before and the squared mean change."""


class FedAdagrad(AdaptiveOptimizer):
    """Squares add up."""

    name = "fedadagrad"

    def _second_moment(self, second: Tensor, squared: Tensor) -> Tensor:
        return second + squared


class FedYogi(AdaptiveOptimizer):
    """Squares are followed additively: v grows slowly, and forgets large squares slowly too."""

    name = "fedyogi"

    def _second_moment(self, second: Tensor, squared: Tensor) -> Tensor:
        return second - (1 - self._beta_2) * squared * torch.sign(second - squared)


class FedAdam(AdaptiveOptimizer):
    """Squares are averaged with exponentially falling weights."""

    name = "fedadam"

    def _second_moment(self, second: Tensor, squared: Tensor) -> Tensor:
        return self._beta_2 * second + (1 - self._beta_2) * squared
