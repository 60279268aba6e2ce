"""FedEx-LoRA: average A and B, and fold what that misses into the base.

Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models".
What averaging misses, mean(B_k A_k) - mean(B) mean(A), is mean(B_k (A_k - mean(A))): the server needs each site's pair.
"""

from __future__ import annotations

from torch import Tensor

from strategies.lora import lora_pairs
from strategies.rules.site_adapters import SiteAdapters
from strategies.rules.told_folds import Factors, FoldingRule


class FedEx(FoldingRule):
    """The mean of all tensors, and the residual of each product in the base."""

    name = "fedex"

    def merged(self, round_number: int, sites: SiteAdapters) -> tuple[dict[str, Tensor], Factors]:
        """The mean; and what its product misses."""
        mean, residuals = sites.mean(), {}
        for pair in lora_pairs(self.manifest):
            b, a = sites.side_by_side(pair)
            residuals[pair.layer] = (b, a - mean[pair.a].double().repeat(len(sites.adapters), 1))
        return mean, residuals
