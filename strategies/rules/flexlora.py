"""FlexLoRA: the mean of the sites' products, cut to the adapter's rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources". The
best pair of rank r by the singular value decomposition, B = U S and A = V^T; what lies beyond is lost, so this is
not exact. HLoRA (Liu et al. 2025) forms the same mean and decomposes it the same way: with ranks that are equal it is
this rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from medfed.models.folding import compressed
from strategies.lora import lora_pairs, with_orthonormal_a
from strategies.rules.site_adapters import SiteAdapters
from strategies.strategy import IndividualRule, State, Tree
from strategies.subspace import Subspace


class FlexLora(IndividualRule):
    """Everything trains; pairs are refactored, the rest is averaged."""

    name = "flexlora"
    exact = False
    fixed_subspace = False  # each round's SVD turns the coordinates

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The best pair for each mean product, with orthonormal rows of A."""
        sites = SiteAdapters.of(self.trainable(round_number), state.adapter, deltas, weights)
        adapter = sites.mean()
        for pair in lora_pairs(self.manifest):
            rank = min(pair.rank, pair.d_in)
            b, a = _padded(*compressed(*sites.side_by_side(pair), rank), rank)
            # A column that explains nothing has no V of its own; orthonormal completion keeps it able to learn.
            adapter[pair.b], adapter[pair.a] = _padded(*with_orthonormal_a(b, a), pair.rank)
        return replace(state, adapter=adapter)


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with zeros up to a rank, where a layer has fewer dimensions."""
    missing = rank - b.shape[1]
    return pad(b, (0, missing)), pad(a, (0, 0, 0, missing))
