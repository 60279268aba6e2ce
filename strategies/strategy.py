"""The one abstraction of aggregation: linear statistics in, a new global adapter out.

A strategy declares, for each round, which tensors train and which statistics of a site's result the server
may learn the sum of. The server never looks at one site's statistics: so whatever can be written here also
works when the sum is all that secure aggregation lets it see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest

Tree = Mapping[str, Tensor]
"""Adapter tensors by name."""


@dataclass(frozen=True)
class Stat:
    """A linear statistic: what a site computes from the global and its local adapter.

    Attributes:
        name: unique in its phase.
        fn: (global, local) -> tensors by name; shapes must not depend on values.
        reduce: ``mean`` divides the weighted sum by the weights of the sites that took part.
        elementwise: promises that ``fn`` treats every element alike, whatever tensor it is in: then it may be
            given the whole adapter as one tensor.
    """

    name: str
    fn: Callable[[Tree, Tree], Tree]
    reduce: Literal["mean", "sum"] = "mean"
    elementwise: bool = False


@dataclass(frozen=True)
class Phase:
    """One round's plan.

    Attributes:
        trainable: which adapter tensors train, by name; the others stay as they came, bit for bit.
        stats: what travels.
    """

    trainable: Callable[[str], bool]
    stats: tuple[Stat, ...]

    def upload(self, before: Tree, after: Tree) -> dict[str, Tensor]:
        """All statistics of a site by name; a tensor is called ``stat:tensor`` if there are several stats."""
        return {
            name if len(self.stats) == 1 else f"{stat.name}:{name}": value
            for stat in self.stats
            for name, value in stat.fn(before, after).items()
        }

    def upload_vector(self, adapter: AdapterManifest, before_P: Tensor, after_P: Tensor) -> Tensor:
        """What :meth:`upload` gives, as the flat vector of :meth:`upload_manifest`.

        Raises:
            AdapterMismatchError: if a vector does not fit ``adapter``. Values are looked at where it is encoded.
        """
        manifest = self.upload_manifest(adapter)
        if len(self.stats) == 1 and self.stats[0].elementwise:
            (upload_P,) = self.stats[0].fn({"adapter": before_P}, {"adapter": after_P}).values()
            manifest.check_form(upload_P)
            return upload_P
        return manifest.flatten(self.upload(adapter.unflatten(before_P), adapter.unflatten(after_P)))

    def upload_manifest(self, adapter: AdapterManifest) -> AdapterManifest:
        """What may travel in this phase, given the adapter's manifest; both ends derive it."""
        return _upload_manifest(self, adapter)


@lru_cache(maxsize=32)
def _upload_manifest(phase: Phase, adapter: AdapterManifest) -> AdapterManifest:
    zeros = adapter.unflatten(torch.zeros(adapter.num_elements))
    return AdapterManifest.of(phase.upload(zeros, zeros), method=adapter.method, rank=adapter.rank)


class Strategy(ABC):
    """Turns sums over sites into the next global adapter. Pure: all state is in its arguments."""

    name: str

    @abstractmethod
    def plan(self, round_number: int) -> Phase:
        """The phase of a round, 1-based."""

    @abstractmethod
    def post(self, round_number: int, global_adapter: Tree, aggregated: Tree) -> Tree:
        """The next global adapter from the aggregated statistics of a round."""


def everything(_name: str) -> bool:
    """Selects every tensor."""
    return True
