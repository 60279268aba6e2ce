"""FedIT: average every adapter tensor, A and B alike (Zhang et al. 2023, "Towards Building the Federated GPT").

Not exact for LoRA: mean(B) mean(A) is not mean(B A); the error grows with the sites' disagreement and with noise.
Exact for adapters without pairs: heads alone, or weights trained in full (there it is FedAvg, McMahan et al. 2017).
"""

from __future__ import annotations

from strategies.strategy import Rule
from strategies.subspace import Subspace


class FedIT(Rule):
    """Everything trains, every round."""

    name = "fedit"
    exact = False

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)
