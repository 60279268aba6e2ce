"""Rules that fold what is no pair of the adapter's rank into the base, and tell sites every fold.

A round's fold has a rank that both ends know before anybody has replied: that of all sites' pairs side by side, but
no more than the layer has room for. Fewer sites, or sites that agree, leave zeros.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.models.folding import compressed
from strategies.lora import LoraPair, lora_pairs
from strategies.rules.fresh import fold_name
from strategies.rules.site_adapters import SiteAdapters
from strategies.strategy import IndividualRule, State, Tree
from strategies.subspace import Subspace

Factors = dict[str, tuple[Tensor, Tensor]]
"""(B, A) of each layer."""


class FoldingRule(IndividualRule):
    """Everything trains; after every round something is folded into the base."""

    exact = True
    takes_ranks = True

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)

    @abstractmethod
    def merged(self, round_number: int, sites: SiteAdapters) -> tuple[dict[str, Tensor], Factors]:
        """The next adapter, and what to fold into each layer, of any rank up to that of all sites side by side."""

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The next adapter, and one more fold to tell."""
        sites = SiteAdapters.of(self.trainable(round_number), state.adapter, deltas, weights)
        adapter, factors = self.merged(round_number, sites)
        told = dict(state.broadcast)
        for pair in lora_pairs(self.manifest):
            b, a = _of_rank(self.fold_rank(pair), *factors[pair.layer])
            told[fold_name(round_number, pair.b)], told[fold_name(round_number, pair.a)] = b, a
        return replace(state, adapter=adapter, broadcast=told)

    def fold_rank(self, pair: LoraPair) -> int:
        """Rank of a fold: no product of this layer needs more, and no round's sites make more."""
        return min(self.setting.num_sites * pair.rank, pair.d_out, pair.d_in)

    def told_in(self, round_number: int) -> AdapterManifest | None:
        """The folds of all rounds before."""
        return self._told(round_number - 1)

    def told_after(self, round_number: int) -> AdapterManifest | None:
        """The folds of this round too."""
        return self._told(round_number)

    def folds(self, broadcast: Tree) -> list[Tree]:
        """The folds in the order of rounds."""
        pairs, folded = lora_pairs(self.manifest), list[Tree]()
        while pairs and fold_name(len(folded) + 1, pairs[0].a) in broadcast:
            number = len(folded) + 1
            folded.append({name: broadcast[fold_name(number, name)] for pair in pairs for name in (pair.a, pair.b)})
        return folded

    def _told(self, num_folds: int) -> AdapterManifest | None:
        specs = [
            TensorSpec(name=fold_name(number, name), shape=shape)
            for number in range(1, num_folds + 1)
            for pair in lora_pairs(self.manifest)
            for name, shape in (
                (pair.a, (self.fold_rank(pair), pair.d_in)),
                (pair.b, (pair.d_out, self.fold_rank(pair))),
            )
        ]
        if not specs:
            return None
        ordered = tuple(sorted(specs, key=lambda spec: spec.name))
        return AdapterManifest(method=self.manifest.method, rank=self.manifest.rank, tensors=ordered)


def _of_rank(rank: int, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product at exactly this rank, float32; a longer pair has no more than this."""
    if b.shape[1] > rank:
        b, a = compressed(b, a, rank)
    missing = rank - b.shape[1]
    return pad(b, (0, missing)).float().contiguous(), pad(a, (0, 0, 0, missing)).float().contiguous()
