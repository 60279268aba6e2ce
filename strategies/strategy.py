"""The one abstraction of aggregation: linear statistics in, a new global state out.

A strategy declares, for each round, what trains (:class:`~strategies.subspace.Subspace`) and which statistics of a
site's result the server may learn the sum of (:class:`Stat`); ``gauge`` prepares the global state before a round,
without data and without changing what the model computes, and ``post`` makes the next one from the sums. The server
never looks at one site's statistics: so whatever can be written here also works when the sum is all that secure
aggregation lets it see. A rule that needs more is an :class:`IndividualRule`, and is refused there by its type.

Everything is pure: all that a strategy remembers is in its :class:`State`, which the checkpoint carries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.study_sections import StrategyConfig
from strategies.subspace import Subspace

Tree = Mapping[str, Tensor]
"""Tensors by name."""


@dataclass(frozen=True)
class Setting:
    """What of a study a strategy is made from; the same at both ends.

    Attributes:
        config: the study's ``[strategy]`` section.
        manifest: of the adapter.
        seed: of the study: frames that nobody needs to send are drawn from it.
        num_sites: in the study.
        rank_of: rank of each site that has a smaller one than the adapter.
    """

    config: StrategyConfig
    manifest: AdapterManifest
    seed: int
    num_sites: int
    rank_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a federation has come to.

    Attributes:
        adapter: by tensor name; what sites put into the model.
        broadcast: what sites are told beside it; the names and shapes of a round are the rule's.
        memory: what the server alone keeps.
    """

    adapter: Tree
    broadcast: Tree = field(default_factory=dict)
    memory: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """What a site's local training made; all that a statistic may be computed from.

    Attributes:
        shared: manifest of the coordinates that may leave the site.
        before_Z: coordinates as they came from the server.
        after_Z: coordinates after training.
        num_steps: optimiser steps.
        learning_rate: of these steps.
        start_loss: mean loss over the training images before the first step; 0 where no statistic asks for it.
        broadcast: what the server told beside the adapter.
        memory: what the site kept from its last round; empty at first.
    """

    shared: AdapterManifest
    before_Z: Tensor
    after_Z: Tensor
    num_steps: int
    learning_rate: float
    start_loss: float = 0.0
    broadcast: Tree = field(default_factory=dict)
    memory: Tree = field(default_factory=dict)

    @property
    def change(self) -> Tensor:
        """What local training changed, (Z,)."""
        return self.after_Z - self.before_Z


@dataclass(frozen=True)
class Stat:
    """A linear statistic: what a site computes from its result and the server sees the sum of.

    Attributes:
        name: unique in its phase.
        fn: result -> tensors by name; names and shapes must not depend on values.
        reduce: ``mean`` divides the weighted sum by the weights of the sites that took part.
    """

    name: str
    fn: Callable[[LocalResult], Tree]
    reduce: Literal["mean", "sum"] = "mean"


def adapter_delta(result: LocalResult) -> Tree:
    """What local training changed, by tensor."""
    return result.shared.unflatten(result.change)


DELTA = Stat("delta", adapter_delta)
"""The statistic of every rule whose sites average their changes."""


@dataclass(frozen=True)
class Phase:
    """One round's plan.

    Attributes:
        trainable: what trains; all else stays as it came, bit for bit.
        stats: what travels.
        stays: names of tensors that train and never leave the site.
        passes: how often local training runs over the data: the tensors that stay may take a pass of their own.
        needs_start_loss: whether a statistic needs the loss before training.
        broadcast: manifest of what comes beside the adapter; None for nothing.
    """

    trainable: Subspace
    stats: tuple[Stat, ...] = (DELTA,)
    stays: frozenset[str] = frozenset()
    passes: int = 1
    needs_start_loss: bool = False
    broadcast: AdapterManifest | None = None

    @cached_property
    def shared(self) -> Subspace:
        """What trains and may leave."""
        if not self.stays:
            return self.trainable
        kept = {name: part for name, part in self.trainable.parts.items() if name not in self.stays}
        return Subspace(self.trainable.adapter, kept)

    @cached_property
    def shared_elements(self) -> Tensor | None:
        """Which coordinates of what trains may leave, as a mask; None if all of them may."""
        if not self.stays:
            return None
        specs = self.trainable.manifest.tensors
        return torch.cat([torch.full((spec.num_elements,), spec.name not in self.stays) for spec in specs])

    @property
    def is_mean_delta(self) -> bool:
        """Whether the server learns the mean change of all that trains, and nothing else.

        Such a phase can be one step on a sum of clipped gradients (trust ``consortium``).
        """
        return self.stats == (DELTA,) and not self.stays and self.passes == 1

    def upload(self, result: LocalResult) -> dict[str, Tensor]:
        """All statistics of a site by name: those of :data:`DELTA` under their tensors' names, others ``stat:name``."""
        return {
            name if stat is DELTA else f"{stat.name}:{name}": value
            for stat in self.stats
            for name, value in stat.fn(result).items()
        }

    def upload_vector(self, result: LocalResult) -> Tensor:
        """What :meth:`upload` gives, as the flat vector of :attr:`upload_manifest`.

        Raises:
            AdapterMismatchError: if a statistic does not fit. Values are looked at where the vector is encoded.
        """
        if self.stats == (DELTA,):
            upload_Z = result.change
            self.upload_manifest.check_form(upload_Z)
            return upload_Z
        return self.upload_manifest.flatten(self.upload(result))

    @cached_property
    def upload_manifest(self) -> AdapterManifest:
        """What may travel in this phase; both ends derive it."""
        shared = self.shared.manifest
        if self.stats == (DELTA,):
            return shared
        zeros_Z = torch.zeros(shared.num_elements)
        told = {} if self.broadcast is None else self.broadcast.unflatten(torch.zeros(self.broadcast.num_elements))
        nothing = LocalResult(shared, zeros_Z, zeros_Z, num_steps=1, learning_rate=1.0, broadcast=told)
        return AdapterManifest.of(self.upload(nothing), method=shared.method, rank=shared.rank)

    def statistics(self, total_P: Tensor, sum_of_weights: float) -> dict[str, Tensor]:
        """The statistics from the weighted sum of uploads over sites: all that the server needs to see.

        Args:
            total_P: sum of weight times upload, float64, in the order of :attr:`upload_manifest`.
            sum_of_weights: over the same sites.

        Returns:
            float32 tensors under the names of :meth:`upload`: ``sum w x / sum w`` for a mean, ``sum w x`` for a sum.
        """
        manifest = self.upload_manifest
        pieces = total_P.split_with_sizes([spec.num_elements for spec in manifest.tensors])
        sums = {stat.name for stat in self.stats if stat.reduce == "sum"}
        return {
            spec.name: (piece if spec.name.split(":", 1)[0] in sums and ":" in spec.name else piece / sum_of_weights)
            .float()
            .view(spec.shape)
            for spec, piece in zip(manifest.tensors, pieces, strict=True)
        }


class Rule(ABC):
    """What trains each round, and how the mean change of it becomes the next global state.

    Attributes:
        name: in study files.
        exact: whether the new product of every LoRA pair is the mean of the sites' products (up to rounding).
        fixed_subspace: whether the same coordinates train in every round, so that the server or a site may remember
            something along them.
        takes_ranks: whether it stays exact where sites train only the first of the adapter's ranks.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    fixed_subspace: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.manifest = setting.manifest

    def start(self, adapter: Tree) -> State:
        """The state before the first round; must not change what the model computes."""
        return State(adapter)

    def gauge(self, round_number: int, state: State) -> State:
        """The state that a round (from 1 on) begins with: another, data-free form of the same model."""
        return state

    @abstractmethod
    def trainable(self, round_number: int) -> Subspace:
        """What trains in a round."""

    def stays(self, name: str) -> bool:
        """Whether a tensor is each site's own."""
        return False

    def told_in(self, round_number: int) -> AdapterManifest | None:
        """What sites are told beside the adapter when they train in a round; None for nothing."""
        return None

    def told_after(self, round_number: int) -> AdapterManifest | None:
        """The same when they evaluate what came of a round; round 0 stands for before the first."""
        return self.told_in(max(1, round_number))

    def folds(self, broadcast: Tree) -> list[Tree]:
        """LoRA pairs that were folded into the base weights, in the order in which they were."""
        return []

    def post(self, round_number: int, state: State, delta: Tree) -> State:
        """The next state from the mean change of what trains and is shared.

        Args:
            round_number: from 1 on.
            state: as :meth:`gauge` left it.
            delta: coordinates by tensor name.
        """
        return replace(state, adapter=moved(self.trainable(round_number), state.adapter, delta))


class IndividualRule(Rule):
    """A rule that looks at single sites; it needs the server to see what each sent, and no secure sum can serve it."""

    @abstractmethod
    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The next state from each site's change.

        Args:
            round_number: from 1 on.
            state: as :meth:`gauge` left it.
            deltas: of the sites that replied, in the order of the study, by tensor name.
            weights: public weight of each.
        """


def moved(subspace: Subspace, adapter: Tree, delta: Tree) -> dict[str, Tensor]:
    """An adapter whose coordinates moved by ``delta``; tensors that it does not name are the same."""
    return {
        name: _moved(subspace, name, tensor, delta[name]) if name in delta else tensor
        for name, tensor in adapter.items()
    }


def _moved(subspace: Subspace, name: str, tensor: Tensor, delta: Tensor) -> Tensor:
    part, result = subspace.parts[name], tensor.clone()
    part.put(result, part.coordinates(tensor) + delta)
    return result
