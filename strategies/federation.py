"""A study's strategy: a rule, how sites train, what they keep, and how the server steps, put together.

One round, with where each part has its say::

    state --rule.gauge--> state --> sites: personal.passes, local.pull, phase.stats --> sums
    sums --local.combine--> mean change --shrunk_change--> --server.step--> change --rule.post--> next state
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from strategies.local_method import Combined, LocalMethod, with_memory
from strategies.naive_error import NAIVE_ERROR, naive_error, naive_error_stat
from strategies.personal import Personalisation
from strategies.server_optimizer import ServerOptimizer
from strategies.shrinkage import shrunk_change
from strategies.strategy import DELTA, IndividualRule, Phase, Rule, State, Tree

_SERVER = "server:"
"""Begins the names of what the server's optimiser remembers."""


@dataclass(frozen=True, eq=False)
class Strategy:
    """All parts of a study's strategy; pure, like its parts.

    Attributes:
        rule: what trains, and how the mean change becomes the next state.
        local: how sites train.
        personal: what they keep.
        server: how the server steps.
        sites_differ: whether sites may keep something of their own; not where one trains for all.
        probes: whether the error of averaging A and B apart is estimated every round.
    """

    rule: Rule
    local: LocalMethod
    personal: Personalisation
    server: ServerOptimizer
    sites_differ: bool = True
    probes: bool = False

    @property
    def needs_individuals(self) -> bool:
        """Whether the server must see what each site sent."""
        return isinstance(self.rule, IndividualRule)

    @property
    def phases(self) -> tuple[Phase, Phase]:
        """The first two rounds' phases: what trains may take turns, and then does so every other round."""
        return self.plan(1), self.plan(2)

    @cached_property
    def remembers_at_sites(self) -> bool:
        """Whether sites keep something between rounds."""
        return (
            any(phase.stays for phase in self.phases)
            or self.trains_its_own
            or type(self.local).remember is not LocalMethod.remember
        )

    @property
    def num_trained(self) -> int:
        """Numbers that train in a round, at most: what clipping bounds and noise falls on."""
        return max(phase.trainable.manifest.num_elements for phase in self.phases)

    @property
    def num_uploaded(self) -> int:
        """Numbers that a site uploads in a round, at most; without masks."""
        return max(phase.upload_manifest.num_elements for phase in self.phases)

    @property
    def trains_its_own(self) -> bool:
        """Whether each site also trains a model of its own, which never leaves it."""
        return self.sites_differ and self.personal.trains_its_own

    def start(self, adapter: Tree) -> State:
        """The state before the first round, from the adapter as the model has it."""
        return self.local.start(self.plan(1).shared.manifest, self.rule.start(adapter))

    def gauge(self, round_number: int, state: State) -> State:
        """The state that a round begins with."""
        return self.rule.gauge(round_number, state)

    def plan(self, round_number: int) -> Phase:
        """The phase of a round, from 1 on."""
        return _planned(self, round_number)

    def told_after(self, round_number: int) -> AdapterManifest | None:
        """What sites are told beside the adapter when they evaluate what came of a round; 0 for before the first."""
        shared = self.plan(max(1, round_number)).shared.manifest
        return _told(self.rule.told_after(round_number), self.local.broadcast(shared), self.rule.manifest)

    def post(
        self, round_number: int, state: State, statistics: Tree, participation: float, *, noise_std: float = 0.0
    ) -> State:
        """The next state from a round's aggregated statistics.

        Args:
            round_number: from 1 on.
            state: as :meth:`gauge` left it.
            statistics: from :meth:`~strategies.strategy.Phase.statistics`.
            participation: public weight of the sites that took part, over that of all sites.
            noise_std: of the mean change, for shrinkage; 0 does not shrink.
        """
        probed = {name: tensor for name, tensor in statistics.items() if name.startswith(f"{NAIVE_ERROR}:")}
        rest = {name: tensor for name, tensor in statistics.items() if name not in probed}
        combined = self.local.combine(state, rest, participation)
        if probed:
            combined = self._with_probe(round_number, combined, probed)
        return self._stepped(round_number, combined.state, shrunk_change(combined.delta, noise_std))

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The next state from each site's change, for a rule that needs them."""
        assert isinstance(self.rule, IndividualRule)
        return self.rule.merge(round_number, state, deltas, weights)

    def _with_probe(self, round_number: int, combined: Combined, probed: Tree) -> Combined:
        before, seed = combined.state.adapter, self.rule.setting.seed
        naive = {name: tensor + combined.delta.get(name, 0.0) for name, tensor in before.items()}
        told = {name.removeprefix(f"{NAIVE_ERROR}:"): tensor for name, tensor in probed.items()}
        error = torch.tensor([naive_error(before, naive, told, seed, round_number)])
        return replace(combined, state=with_memory(combined.state, **{NAIVE_ERROR: error}))

    def _stepped(self, round_number: int, state: State, delta: Tree) -> State:
        remembered = {
            name.removeprefix(_SERVER): tensor for name, tensor in state.memory.items() if name.startswith(_SERVER)
        }
        change, memory = self.server.step(delta, remembered)
        others = {name: tensor for name, tensor in state.memory.items() if not name.startswith(_SERVER)}
        kept = {f"{_SERVER}{name}": tensor for name, tensor in memory.items()}
        return self.rule.post(round_number, replace(state, memory={**others, **kept}), change)


@lru_cache(maxsize=64)
def _planned(strategy: Strategy, round_number: int) -> Phase:
    rule, local, personal = strategy.rule, strategy.local, strategy.personal
    trainable = rule.trainable(round_number)
    stays = frozenset(
        name for name in trainable.parts if strategy.sites_differ and (rule.stays(name) or personal.stays(name))
    )
    stats = (DELTA,) if isinstance(rule, IndividualRule) else local.stats
    if strategy.probes:
        stats = (*stats, naive_error_stat(rule.manifest, rule.setting.seed, round_number))
    phase = Phase(
        trainable,
        stats=stats,
        stays=stays,
        passes=len(personal.passes(trainable)),
        needs_start_loss=local.needs_start_loss,
    )
    told = _told(rule.told_in(round_number), local.broadcast(phase.shared.manifest), rule.manifest)
    return replace(phase, broadcast=told)


def _told(
    by_rule: AdapterManifest | None, by_local: Mapping[str, tuple[int, ...]], like: AdapterManifest
) -> AdapterManifest | None:
    """One manifest of all that sites are told beside the adapter."""
    specs = [
        *(by_rule.tensors if by_rule else ()),
        *(TensorSpec(name=name, shape=shape) for name, shape in by_local.items()),
    ]
    if not specs:
        return None
    ordered = tuple(sorted(specs, key=lambda spec: spec.name))
    return AdapterManifest(method=like.method, rank=like.rank, tensors=ordered)
