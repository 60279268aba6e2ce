"""FedProx: sites are pulled back to where the round began (Li et al. 2020, "Federated Optimization", Algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from strategies.local_method import LocalMethod
from strategies.strategy import Tree


class FedProx(LocalMethod):
    """The gradient of ``mu / 2 |z - z0|^2`` is added; z are the coordinates of what trains and is shared.

    Args:
        mu: strength; 0 is plain training.
    """

    name = "fedprox"

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def pull(self, offset_Z: Tensor, broadcast: Tree, memory: Tree) -> Tensor:
        """``mu (z - z0)``."""
        return self._mu * offset_Z
