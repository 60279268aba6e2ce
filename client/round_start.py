"""What a site begins a round with: the shared model as it came, what the site keeps of its own, and the plan.

Legend: P adapter parameters, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from client.site import Site
from client.subspace_steps import Pull
from medfed.adapter_manifest import AdapterManifest
from medfed.errors import MessageError
from medfed.messages import Fields, RoundInstruction, bytes_field, model_digest
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from strategies.federation import Strategy
from strategies.narrowed import trainable_of
from strategies.registry import strategy_of
from strategies.shared_model import shared_state
from strategies.strategy import LocalResult, Phase, Tree
from strategies.subspace import Subspace

_OWN = "own:"
"""Begins the names of a site's own adapter tensors in its memory."""


@dataclass(frozen=True)
class SharedModel:
    """What the server sent to put into the model.

    Attributes:
        state: the global adapter, to be read only, and what the rule folded into the base.
        broadcast: what the strategy told beside it.
        digest: SHA-256 of both.
    """

    state: ModelState
    broadcast: Tree
    digest: bytes


@dataclass(frozen=True)
class RoundStart:
    """The start of one site's training round; the model holds the round's base weights.

    Attributes:
        strategy: of the study, in this federation.
        phase: of the round; the same at all sites.
        trainable: what of it this site trains; less where the study gives the site a smaller rank.
        shared: what the server sent.
        adapter_P: its adapter, with the site's own tensors in place.
        memory: what the site remembers of earlier rounds.
        learning_rate: of local training.
    """

    strategy: Strategy
    phase: Phase
    trainable: Subspace
    shared: SharedModel
    adapter_P: Tensor
    memory: Mapping[str, Tensor]
    learning_rate: float

    @property
    def digest(self) -> bytes:
        """SHA-256 of what the server sent."""
        return self.shared.digest

    @property
    def pull(self) -> Pull | None:
        """What is added to each gradient in training the shared model."""
        local, shared_Z = self.strategy.local, self.phase.shared_elements
        if not local.pulls:
            return None

        def pulled(offset_Z: Tensor) -> Tensor | None:
            if shared_Z is None:
                return local.pull(offset_Z, self.shared.broadcast, self.memory)
            part = local.pull(offset_Z[shared_Z], self.shared.broadcast, self.memory)
            if part is None:
                return None
            pull_Z = offset_Z.new_zeros(offset_Z.shape)
            pull_Z[shared_Z] = part
            return pull_Z

        return pulled

    def result(self, after_P: Tensor, num_steps: int, start_loss: float = 0.0) -> LocalResult:
        """What training made, as statistics see it."""
        shared = self.phase.shared
        return LocalResult(
            shared.manifest,
            shared.coordinates(self.adapter_P),
            shared.coordinates(after_P),
            num_steps,
            self.learning_rate,
            start_loss,
            self.shared.broadcast,
            self.memory,
        )

    def payload(self, result: LocalResult) -> bytes:
        """The statistics of a result, ready to be sent."""
        return encode_adapter(self.phase.upload_vector(result), self.phase.upload_manifest)

    def remembered(self, after_P: Tensor, result: LocalResult) -> dict[str, Tensor]:
        """What the site remembers after training the shared model."""
        after = self.phase.trainable.adapter.unflatten(after_P)
        own = {f"{_OWN}{name}": after[name] for name in self.phase.stays}
        return {**own, **self.strategy.local.remember(result)}


def begin_round(
    instruction: RoundInstruction, fields: Fields, study: StudyConfig, model: AdaptedModel, site: Site
) -> RoundStart:
    """The start of a training round, checked; puts the round's base weights into the model.

    Raises:
        MedfedError: if what came does not fit the round, or what the site remembers cannot be read.
    """
    strategy = strategy_of(study, instruction.scope)
    phase = strategy.plan(instruction.round)
    shared = _shared_model(fields, strategy, phase.broadcast)
    model.fold(shared.state.folds)
    memory = site.memory(study, instruction.scope).before(instruction.round) if strategy.remembers_at_sites else {}
    adapter_P = _with_own(shared.state.adapter_P, study.resolved_manifest, memory)
    trainable = trainable_of(strategy.rule, phase, site.name)
    return RoundStart(strategy, phase, trainable, shared, adapter_P, memory, study.training.learning_rate)


def evaluated_state(instruction: RoundInstruction, fields: Fields, study: StudyConfig, site: Site) -> ModelState:
    """What a site evaluates after a round.

    Raises:
        MedfedError: as :func:`begin_round`.
    """
    strategy = strategy_of(study, instruction.scope)
    shared = _shared_model(fields, strategy, strategy.told_after(instruction.round))
    return own_state(shared.state, strategy, instruction.round, study, instruction.scope, site)


def own_state(
    shared: ModelState, strategy: Strategy, round_number: int, study: StudyConfig, scope: str, site: Site
) -> ModelState:
    """A site's own model after a round, given the shared one: the same, unless the strategy lets sites differ.

    Raises:
        SiteError: if what the site remembers cannot be read.
    """
    if not strategy.remembers_at_sites:
        return shared
    memory = site.memory(study, scope).after(round_number)
    own_P = _with_own(shared.adapter_P, study.resolved_manifest, memory)
    if strategy.trains_its_own:
        own_P = strategy.personal.own_start(own_P, memory)
    return ModelState(own_P, shared.folds)


def _with_own(shared_P: Tensor, manifest: AdapterManifest, memory: Mapping[str, Tensor]) -> Tensor:
    own = {name.removeprefix(_OWN): tensor for name, tensor in memory.items() if name.startswith(_OWN)}
    return manifest.flatten({**manifest.unflatten(shared_P), **own}) if own else shared_P


def _shared_model(fields: Fields, strategy: Strategy, told: AdapterManifest | None) -> SharedModel:
    return _decoded(bytes_field(fields, "adapter"), bytes_field(fields, "broadcast"), strategy, told)


@lru_cache(maxsize=1)  # all virtual sites of a process start a round from the same bytes
def _decoded(adapter: bytes, broadcast: bytes, strategy: Strategy, told: AdapterManifest | None) -> SharedModel:
    if told is None and broadcast:
        raise MessageError("Expected nothing beside the adapter in this round, got something.")
    tensors = {} if told is None else told.unflatten(decode_adapter(broadcast, told))
    adapter_P = decode_adapter(adapter, strategy.rule.manifest)
    return SharedModel(shared_state(strategy, adapter_P, tensors), tensors, model_digest(adapter, broadcast))
