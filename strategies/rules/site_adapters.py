"""The sites' adapters of a round, one by one: what rules that look at single sites begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.lora import LoraPair
from strategies.strategy import Tree, moved
from strategies.subspace import Subspace


@dataclass(frozen=True)
class SiteAdapters:
    """Adapters and the shares that they have in a mean.

    Attributes:
        adapters: of the sites that replied, in the order of the study.
        shares: public weight of each, over the sum of them.
    """

    adapters: tuple[Tree, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(
        cls, subspace: Subspace, adapter: Tree, deltas: Mapping[str, Tree], weights: Mapping[str, float]
    ) -> SiteAdapters:
        """What each site's change made of the adapter that all began the round with."""
        total = sum(weights[site] for site in deltas)
        return cls(
            tuple(moved(subspace, adapter, delta) for delta in deltas.values()),
            tuple(weights[site] / total for site in deltas),
        )

    def mean(self) -> dict[str, Tensor]:
        """The mean of each tensor: summed in float64, float32."""
        return {name: self._mean(name).float() for name in self.adapters[0]}

    def side_by_side(self, pair: LoraPair) -> tuple[Tensor, Tensor]:
        """(B, A) of rank sites times r whose product is the mean of the sites' products; float64."""
        shared = zip(self.shares, self.adapters, strict=True)
        b = torch.cat([share * adapter[pair.b].double() for share, adapter in shared], dim=1)
        return b, torch.cat([adapter[pair.a].double() for adapter in self.adapters])

    def _mean(self, name: str) -> Tensor:
        total = torch.zeros_like(self.adapters[0][name], dtype=torch.float64)
        for share, adapter in zip(self.shares, self.adapters, strict=True):
            total.add_(adapter[name], alpha=share)
        return total
