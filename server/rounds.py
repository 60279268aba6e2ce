"""The round loop: explicit sites, quorum, deadline, a checkpoint after every round, resume.

A round is a pure function of the checkpoint before it and the sites' replies; sites draw their randomness
from (study, round, site). So a run that was killed and resumed ends with the same adapter, bit for bit, as
one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.serverapp import Grid
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError, LostRoundError, RoundError
from medfed.messages import Action, RoundInstruction
from medfed.metrics.mergeable import CountLayout
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import ALL_SITES, StudyConfig
from medfed.tasks import task_of
from server.asked_sums import ASKED_SUMS
from server.checkpoint import Checkpoint, metrics_line, read_checkpoint, write_checkpoint, write_metrics
from server.exchange import Exchange, ModelPayload, exchange
from server.secure_sums import SecureSums, SummedRound
from server.tracking import Tracker, tell, tracker_of
from strategies.naive_error import LARGE, NAIVE_ERROR
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel
from strategies.shrinkage import noise_std_of_mean
from strategies.strategy import Phase, State
from strategies.weighted_sum import weighted_sum

_log = logging.getLogger("medfed.server.rounds")


@dataclass(frozen=True)
class Federation:
    """Who takes part.

    Attributes:
        scope: ``federated``, or in simulations ``pooled`` or ``local-<site>``.
        train_sites: sites that train, in the order of sums.
        evaluate_sites: sites that evaluate on their held-out patients.
        quorum: replies without which a round is not aggregated.
        evaluate_initial: whether the adapter before round 1 is evaluated.
        node_of: number of each site's node, where keys say who is who: then only these are asked, and a reply counts
            for the site that the key belongs to. Empty in simulations, where every node is asked who it is.
    """

    scope: str
    train_sites: tuple[str, ...]
    evaluate_sites: tuple[str, ...]
    quorum: int
    evaluate_initial: bool = True
    node_of: Mapping[str, int] = field(default_factory=dict)


def run_rounds(
    grid: Grid, study: StudyConfig, federation: Federation, *, initial_P: Tensor, folder: Path
) -> Checkpoint:
    """Run the study's rounds, or what is left of them, and return the last checkpoint.

    Args:
        grid: the transport.
        study: resolved.
        federation: who takes part.
        initial_P: the adapter before round 1, float32, shape (P,).
        folder: where the checkpoint and ``metrics.jsonl`` live. A checkpoint found there is continued.

    Raises:
        RoundError: if fewer sites than the quorum can serve the study, or a round misses its quorum. The checkpoint
            of the last completed round stays, and the run can be resumed. A site that is missing is looked for again
            before every round, and takes part from then on.
        CheckpointError: if the folder's checkpoint is not this study's.
        MissingExtraError: if the study's tracker is not installed.
    """
    tracker = tracker_of(study, folder)
    try:
        return _run_rounds(_Loop(grid, study, federation, folder), study, federation, initial_P, folder, tracker)
    finally:
        if tracker is not None:
            tracker.close()


def _run_rounds(
    loop: _Loop, study: StudyConfig, federation: Federation, initial_P: Tensor, folder: Path, tracker: Tracker | None
) -> Checkpoint:
    def keep(state: Checkpoint) -> None:
        write_checkpoint(folder, state)
        if tracker is not None:
            tell(tracker, folder, state.metrics)

    state = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope=federation.scope)
    weights = loop.find_sites()
    if state is None:
        state = loop.initial(initial_P, weights)
        if federation.evaluate_initial:
            state = loop.evaluated(state)
        keep(state)
    else:
        write_metrics(folder, state)  # a crash may have come between the checkpoint and its metrics.jsonl
        state = replace(state, weights={**weights, **state.weights})
    while state.round < study.rounds.num_rounds:
        state = loop.trained(loop.with_returned_sites(state))
        every, last = study.rounds.evaluate_every, state.round == study.rounds.num_rounds
        if last or (every is not None and state.round % every == 0):
            state = loop.evaluated(state)
        keep(state)
        _log.info("event=round_done scope=%s round=%d", federation.scope, state.round)
    return state


class _Loop:
    """One run's transport, study, federation and folder, so that the steps need not pass them along."""

    def __init__(self, grid: Grid, study: StudyConfig, federation: Federation, folder: Path) -> None:
        self._grid = grid
        self._study = study
        self._federation = federation
        self._strategy = strategy_of(study, federation.scope)
        self._metric_names = task_of(study.task).metric_names
        if study.noises_evaluation:
            self._metric_names |= CountLayout(study.task).names
        self._node_of: dict[str, int] = {}
        self._lost_round: int | None = None
        self._secure_sums: SecureSums | None = None
        if study.sums_securely_in(federation.scope):
            # Sites that are known by their keys are real ones, and store what they answer.
            asked_sums = folder / ASKED_SUMS if federation.node_of else None
            self._secure_sums = SecureSums(
                study, federation.scope, self._ask_sites, quorum=federation.quorum, asked_sums=asked_sums
            )

    def find_sites(self) -> dict[str, float]:
        """Ask who is there; learn the nodes of the federation's sites and their public weights.

        Raises:
            RoundError: if fewer than the quorum can serve the study; names the sites that cannot, and why.
        """
        wanted = tuple(dict.fromkeys((*self._federation.train_sites, *self._federation.evaluate_sites)))
        found, answered = self._described(wanted)
        missing = [site for site in wanted if site not in self._node_of]
        if not self._enough(self._federation.train_sites) or not self._enough(self._federation.evaluate_sites):
            raise RoundError(
                f"Expected {len(wanted)} sites that can serve the study, {_reasons(missing, answered)}; "
                "correct them and resume."
            )
        if missing:
            _log.warning("event=missing sites=%s why=%s", ",".join(missing), _reasons(missing, answered))
        return found

    def with_returned_sites(self, state: Checkpoint) -> Checkpoint:
        """The state with the weights of sites that were missing so far and answer now."""
        missing = [site for site in self._federation.train_sites if site not in self._node_of]
        if not missing:
            return state
        found, _ = self._described(missing)
        for site in found:
            _log.info("event=returned round=%d site=%s", state.round + 1, site)
        return replace(state, weights={**found, **state.weights})

    def _described(self, sites: Sequence[str]) -> tuple[dict[str, float], Exchange]:
        """Public weights of those of these sites that train and answer; their nodes are known from now on."""
        known = self._federation.node_of
        nodes: dict[int, str | None] = {known[site]: site for site in sites if site in known}
        if not known:
            taken = set(self._node_of.values())
            nodes = dict.fromkeys(node for node in self._grid.get_node_ids() if node not in taken)
        answered = self._ask("describe", nodes, 0, ModelPayload())
        self._node_of |= {site: answered.node_of[site] for site in sites if site in answered.replies}
        uniform = self._study.strategy.weighting == "uniform"
        found = {
            site: 1.0 if uniform else float(answered.replies[site].reply.num_examples)
            for site in self._federation.train_sites
            if site in sites and site in answered.replies
        }
        return found, answered

    def _enough(self, sites: Sequence[str]) -> bool:
        there = sum(site in self._node_of for site in sites)
        return there >= min(self._federation.quorum, len(sites))

    def trained(self, state: Checkpoint) -> Checkpoint:
        """The state after one more round of training.

        Raises:
            RoundError: if fewer than the quorum sent a usable update in time.
        """
        number = state.round + 1
        phase = self._strategy.plan(number)
        state = self._checkpoint(state, self._strategy.gauge(number, self._state(state)))
        model = self._model(state, phase.broadcast)
        if self._secure_sums is not None:
            channel = SecureChannel.training(self._study, number, phase)
            try:
                summed = self._secure_sums.sum("train", channel, model)
            except LostRoundError as error:
                return self._without_round(state, error)
            assert summed.sum.update_P is not None
            line = self._sum_line("train", number, summed)
            return self._next(state, phase, summed.sum.update_P, summed.sum.weight, summed.sites, [line])
        answered = self._ask("train", self._nodes(self._federation.train_sites), number, model)
        uploads: dict[str, Tensor] = {}
        for site, answer in answered.replies.items():
            try:
                uploads[site] = decode_adapter(answer.payload, phase.upload_manifest)
            except AdapterMismatchError as error:
                answered.failures[site] = str(error)
        if len(uploads) < self._federation.quorum:
            missing = [site for site in self._federation.train_sites if site not in uploads]
            raise RoundError(
                f"Round {number}: expected updates of {self._federation.quorum} sites, got {len(uploads)}; "
                f"{_reasons(missing, answered)}; correct them and resume."
            )
        present = [site for site in self._federation.train_sites if site in uploads]
        lines = [self._line("train", number, site, answered.replies[site].reply.metrics) for site in present]
        if self._strategy.needs_individuals:
            deltas = {site: phase.upload_manifest.unflatten(uploads[site]) for site in present}
            weights = {site: state.weights[site] for site in present}
            merged = self._strategy.merge(number, self._state(state), deltas, weights)
            return replace(self._checkpoint(state, merged), round=number, metrics=(*state.metrics, *lines))
        total_P = weighted_sum(uploads, state.weights, present)
        return self._next(state, phase, total_P, sum(state.weights[site] for site in present), present, lines)

    def _without_round(self, state: Checkpoint, error: LostRoundError) -> Checkpoint:
        """The state after a round whose sum is lost: the adapter stays as it was.

        Raises:
            LostRoundError: if the round before was lost as well: something is wrong that more rounds do not mend. A
                run that is resumed after that goes past the round.
        """
        number = state.round + 1
        if self._lost_round == state.round:
            raise error
        self._lost_round = number
        _log.warning("event=lost round=%d why=%s", number, error)
        return replace(state, round=number, metrics=(*state.metrics, self._line("lost", number, ALL_SITES, {})))

    def initial(self, initial_P: Tensor, weights: dict[str, float]) -> Checkpoint:
        """The state before the first round."""
        empty = Checkpoint(self._study.digest, self._federation.scope, 0, initial_P, (), weights)
        return self._checkpoint(empty, self._strategy.start(self._study.resolved_manifest.unflatten(initial_P)))

    def _next(
        self,
        state: Checkpoint,
        phase: Phase,
        total_P: Tensor,
        weight: float,
        present: Sequence[str],
        lines: Sequence[str],
    ) -> Checkpoint:
        """The state after a round whose uploads sum to this, over sites of this public weight."""
        number = state.round + 1
        statistics = phase.statistics(total_P, weight)
        participation = weight / sum(state.weights.values())
        noise_std = 0.0
        if self._study.strategy.shrinkage:
            noise_std = noise_std_of_mean(self._study, present, self._federation.scope)
        following = self._strategy.post(number, self._state(state), statistics, participation, noise_std=noise_std)
        if (error := following.memory.get(NAIVE_ERROR)) is not None:
            lines = [*lines, self._line("probe", number, ALL_SITES, {"naive_error": float(error)})]
            if error > LARGE:
                _log.warning("event=naive_error round=%d share_of_update=%.2f", number, error)
        return replace(self._checkpoint(state, following), round=number, metrics=(*state.metrics, *lines))

    def _state(self, checkpoint: Checkpoint) -> State:
        """What the strategy sees of a checkpoint."""
        adapter = self._study.resolved_manifest.unflatten(checkpoint.adapter_P)
        return State(adapter, checkpoint.broadcast, checkpoint.memory)

    def _checkpoint(self, checkpoint: Checkpoint, state: State) -> Checkpoint:
        """The checkpoint with the strategy's state in it."""
        adapter_P = self._study.resolved_manifest.flatten(state.adapter)
        return replace(checkpoint, adapter_P=adapter_P, broadcast=dict(state.broadcast), memory=dict(state.memory))

    def _model(self, state: Checkpoint, told: AdapterManifest | None) -> ModelPayload:
        """What sites put into the model: the adapter, and what the strategy tells beside it."""
        adapter = encode_adapter(state.adapter_P, self._study.resolved_manifest)
        return ModelPayload(adapter, b"" if told is None else encode_adapter(told.flatten(state.broadcast), told))

    def evaluated(self, state: Checkpoint) -> Checkpoint:
        """The state with the metrics of its adapter on every evaluating site's held-out patients.

        Raises:
            RoundError: if fewer than the quorum evaluated. A site that did not has no numbers for this round.
        """
        if self._study.withholds_evaluation or not self._federation.evaluate_sites:
            return state
        model = self._model(state, self._strategy.told_after(state.round))
        if self._secure_sums is not None:
            channel = SecureChannel.evaluation(self._study, state.round)
            try:
                summed = self._secure_sums.sum("evaluate", channel, model)
            except LostRoundError as error:
                _log.warning("event=lost_evaluation round=%d why=%s", state.round, error)
                return state
            return replace(state, metrics=(*state.metrics, self._sum_line("evaluate", state.round, summed)))
        sites = self._federation.evaluate_sites
        answered = self._ask("evaluate", self._nodes(sites), state.round, model)
        missing = [site for site in sites if site not in answered.replies]
        if len(sites) - len(missing) < min(self._federation.quorum, len(sites)):
            raise RoundError(
                f"Round {state.round}: expected evaluations of {len(sites)} sites, {_reasons(missing, answered)}; "
                "correct them and resume."
            )
        lines = [
            self._line("evaluate", state.round, site, {"num_examples": reply.num_examples, **reply.metrics})
            for site in sites
            if site in answered.replies and (reply := answered.replies[site].reply)
        ]
        return replace(state, metrics=(*state.metrics, *lines))

    def _sum_line(self, event: str, number: int, summed: SummedRound) -> str:
        """What a sum over sites tells, under the name that stands for all of them."""
        for site, why in summed.failures.items():
            _log.warning("event=missing round=%d site=%s why=%s", number, site, why)
        facts: dict[str, float] = {"num_sites": len(summed.sites), **summed.sum.metrics}
        if summed.sum.count_D.size:
            of_all = CountLayout(self._study.task).metrics(summed.sum.count_D)
            facts |= {f"all-patients/{name}": value for name, value in of_all.items()}
        return self._line(event, number, ALL_SITES, facts)

    def _line(self, event: str, number: int, site: str, metrics: Mapping[str, float]) -> str:
        return metrics_line(event=event, scope=self._federation.scope, round=number, site=site, **metrics)

    def _nodes(self, sites: Sequence[str]) -> dict[int, str | None]:
        return {self._node_of[site]: site for site in sites if site in self._node_of}

    def _ask_sites(
        self, action: Action, sites: Sequence[str], number: int, model: ModelPayload, secure: Mapping[str, bytes]
    ) -> Exchange:
        by_node = {self._node_of[site]: secure[site] for site in sites if site in self._node_of}
        return self._ask(action, self._nodes(sites), number, model, by_node)

    def _ask(
        self,
        action: Action,
        nodes: Mapping[int, str | None],
        number: int,
        model: ModelPayload,
        secure: Mapping[int, bytes] | bytes = b"",
    ) -> Exchange:
        instruction = RoundInstruction(study_digest=self._study.digest, round=number, scope=self._federation.scope)
        return exchange(
            self._grid,
            action,
            nodes,
            instruction,
            study=self._study.canonical,
            model=model,
            deadline_s=self._study.rounds.deadline_s,
            metric_names=self._metric_names,
            secure=secure,
        )


def _reasons(sites: Sequence[str], answered: Exchange) -> str:
    reasons = [f"{site}: {answered.failures.get(site, 'no such node')}" for site in sites]
    strangers = [f"{where}: {why}" for where, why in answered.failures.items() if where.startswith("node ")]
    return "; ".join([*reasons, *strangers])
