"""FedSA-LoRA: A is shared, B stays at its site (Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation").

A learns what sites have in common, B what is a site's own: each site ends with a model of its own. Under
differential privacy both are clipped and noised as one vector, although only A leaves: a site's next A is computed
with its B, and scores of its model tell about B too.
"""

from __future__ import annotations

from strategies.lora import is_b
from strategies.strategy import Rule
from strategies.subspace import Subspace


class FedSA(Rule):
    """Everything trains; B of each pair is each site's own."""

    name = "fedsa"
    exact = False

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)

    def stays(self, name: str) -> bool:
        """B."""
        return is_b(name)
