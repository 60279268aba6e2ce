"""How a site trains within a round, beside plain steps on its own loss: what pulls at it, and what it remembers.

All of it is written in the coordinates of what trains and is shared, where every rule is linear. The pull is added
to the gradient after clipping and noise, and depends on public or already private values only; so it costs no
privacy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from strategies.strategy import DELTA, LocalResult, Stat, State, Tree


@dataclass(frozen=True)
class Combined:
    """What the server makes of a round's statistics.

    Attributes:
        delta: mean change by tensor, as the rule takes it.
        state: with what the method remembers or broadcasts brought up to date.
    """

    delta: Tree
    state: State


class LocalMethod:
    """A way to train locally; this one is plain training (FedAvg, McMahan et al. 2017).

    Attributes:
        name: in study files.
        stats: what travels.
        needs_fixed_subspace: whether it remembers something along coordinates that must stay the same.
        needs_sgd: whether its formulas hold for plain SGD only.
        needs_start_loss: whether it needs the loss before training, which is not private.
    """

    name: ClassVar[str] = "plain"
    needs_fixed_subspace: ClassVar[bool] = False
    needs_sgd: ClassVar[bool] = False
    needs_start_loss: ClassVar[bool] = False
    stats: tuple[Stat, ...] = (DELTA,)

    def broadcast(self, shared: AdapterManifest) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what it needs to be told in every round, given the coordinates that are shared."""
        return {}

    def start(self, shared: AdapterManifest, state: State) -> State:
        """The state before the first round."""
        return state

    def pull(self, offset_Z: Tensor, broadcast: Tree, memory: Tree) -> Tensor | None:
        """What to add to the gradient; None for nothing.

        Args:
            offset_Z: how far the coordinates have come from where the round began.
            broadcast: what the server told.
            memory: what this site remembers; empty in its first round.
        """
        return None

    @property
    def pulls(self) -> bool:
        """Whether :meth:`pull` is ever something."""
        return type(self).pull is not LocalMethod.pull

    def remember(self, result: LocalResult) -> Tree:
        """What the site remembers after a round."""
        return {}

    def combine(self, state: State, statistics: Tree, participation: float) -> Combined:
        """The mean change, from the statistics of a round.

        Args:
            state: before it.
            statistics: aggregated, by upload name.
            participation: public weight of the sites that took part, over that of all sites.
        """
        return Combined(statistics, state)


def with_memory(state: State, **changes: Tensor) -> State:
    """The state with some of the server's memory replaced."""
    return replace(state, memory={**state.memory, **changes})


def with_broadcast(state: State, **changes: Tensor) -> State:
    """The state with some of what sites are told replaced."""
    return replace(state, broadcast={**state.broadcast, **changes})
