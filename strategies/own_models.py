"""Personalisation by a second model, which each site trains after the shared one and nothing of which leaves."""

from __future__ import annotations

from torch import Tensor

from strategies.personal import Personalisation
from strategies.strategy import Tree

_MODEL, _OFFSET = "ditto:model", "site-adapter:offset"


class Ditto(Personalisation):
    """The site's own model minimises its loss ``+ lambda / 2 |v - w|^2`` (Li et al. 2021, "Ditto", Algorithm 1).

    w is the shared model as it came. The own model begins as the shared one, and goes on from itself after.

    Args:
        proximal: lambda; 0 is training alone.
    """

    name = "ditto"
    trains_its_own = True
    needs_fixed_subspace = True

    def __init__(self, proximal: float) -> None:
        self._proximal = proximal

    def own_start(self, shared_P: Tensor, memory: Tree) -> Tensor:
        """The own model, or at first the shared one."""
        return memory.get(_MODEL, shared_P)

    def own_pull(self, own_Z: Tensor, shared_Z: Tensor) -> Tensor:
        """``lambda (v - w)``."""
        return self._proximal * (own_Z - shared_Z)

    def own_memory(self, own_P: Tensor, shared_P: Tensor) -> Tree:
        """The own model."""
        return {_MODEL: own_P}


class SiteAdapter(Personalisation):
    """The site's own model is the shared adapter and an offset of the site's.

    The offset trains with the shared adapter held as it came; in the next round it is added to the next shared
    adapter. So what the federation learns reaches every site at once, and the offset only has to hold what is the
    site's own.
    """

    name = "site-adapter"
    trains_its_own = True
    needs_fixed_subspace = True

    def own_start(self, shared_P: Tensor, memory: Tree) -> Tensor:
        """The shared adapter and the offset, which is zero at first."""
        return shared_P + memory[_OFFSET] if _OFFSET in memory else shared_P

    def own_memory(self, own_P: Tensor, shared_P: Tensor) -> Tree:
        """The offset."""
        return {_OFFSET: own_P - shared_P}
