"""The server's step along the mean change: plain addition, or an adaptive method (Reddi et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

from strategies.strategy import Tree


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
