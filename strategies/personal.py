"""What a site keeps for itself: tensors that never leave it, or a model of its own beside the shared one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from strategies.strategy import Tree
from strategies.subspace import Subspace


class Personalisation:
    """How a site's model differs from the shared one; this one: not at all.

    Attributes:
        name: in study files.
        trains_its_own: whether a second training, of a model that never leaves the site, follows the shared one.
        needs_fixed_subspace: whether it remembers something along coordinates that must stay the same.
    """

    name: ClassVar[str] = "none"
    trains_its_own: ClassVar[bool] = False
    needs_fixed_subspace: ClassVar[bool] = False

    def stays(self, name: str) -> bool:
        """Whether an adapter tensor is each site's own."""
        return False

    def passes(self, trainable: Subspace) -> tuple[Subspace, ...]:
        """What trains in each pass over the data, one pass after the other."""
        return (trainable,)

    def own_start(self, shared_P: Tensor, memory: Tree) -> Tensor:
        """Where the site's own model begins a round's training, or is evaluated: its own, or at first the shared.

        Args:
            shared_P: the shared adapter, as it came.
            memory: what the site remembers.
        """
        return shared_P

    def own_pull(self, own_Z: Tensor, shared_Z: Tensor) -> Tensor | None:
        """What to add to the gradient of the site's own model, in coordinates of what trains; None for nothing."""
        return None

    def own_memory(self, own_P: Tensor, shared_P: Tensor) -> Tree:
        """What the site remembers of its own model after training it."""
        return {}
