"""LoRA-FAIR: average A and B, then correct B for what averaging misses.

Bian et al. 2024, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement". The
correction D minimises |M - (B + D) A|^2 + lambda |D|^2 for the mean product M and the means B and A, in Frobenius
norm. That has a closed form, D = (M - B A) A^T (A A^T + lambda I)^-1, where the paper descends on another measure of
similarity: so its numbers may differ. Close, not exact: rank r holds no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from strategies.lora import lora_pairs
from strategies.rules.site_adapters import SiteAdapters
from strategies.strategy import IndividualRule, State, Tree
from strategies.subspace import Subspace

LAMBDA = 0.01
"""Weight of the regulariser. Small beside A A^T, so that the correction is nearly the best there is."""


class LoraFair(IndividualRule):
    """Everything trains and is averaged; B of each pair is corrected."""

    name = "lora-fair"
    exact = False

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The mean with corrected B."""
        sites = SiteAdapters.of(self.trainable(round_number), state.adapter, deltas, weights)
        adapter = sites.mean()
        for pair in lora_pairs(self.manifest):
            b, a = sites.side_by_side(pair)
            mean_b, mean_a = adapter[pair.b].double(), adapter[pair.a].double()
            adapter[pair.b] = (mean_b + correction(b @ a - mean_b @ mean_a, mean_a)).float()
        return replace(state, adapter=adapter)


def correction(missed: Tensor, a: Tensor) -> Tensor:
    """The D of least |missed - D A|^2 + lambda |D|^2."""
    regularised = a @ a.T + LAMBDA * torch.eye(len(a), dtype=a.dtype)
    transposed: Tensor = torch.linalg.solve(regularised, a @ missed.T)
    return transposed.T.contiguous()
