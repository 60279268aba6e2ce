"""Runs an approved study in a consortium to its end: waits for sites, survives what fails, goes on where it stopped.

A try is one run at the SuperLink. What ends it early (a missed quorum, a SuperLink that was away too long) is said in
one line, and the next try goes on from the last checkpoint; sites answer what they answered before with the same bytes.
A study is given up when several tries in a row complete no round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import ConfigRecord, Context, Message, RecordDict

from medfed.consortium_documents import Roster
from medfed.errors import ConsortiumError, LinkError, MedfedError, RoundError
from medfed.messages import (
    INSTRUCTION_FIELDS,
    RECORD_KEY,
    REPLY_FIELDS,
    RoundInstruction,
    RoundReply,
    exact_fields,
    told,
)
from medfed.study import FEDERATED, StudyConfig
from privacy.plan import PrivacyPlan
from server.app import app as server_app
from server.checkpoint import read_checkpoint
from server.flower_link import SiteNode, StudyRun, SuperLinkAddress, register_sites
from server.run_results import write_run_results
from server.run_status import RunStatus, SiteStatus, StatusBoard, now_text

_log = logging.getLogger("medfed.server.study_run")


@dataclass(frozen=True)
class Patience:
    """How long a run waits, and how often it tries.

    Attributes:
        sites_s: for a quorum of sites, before a try is given up.
        stragglers_s: for the others, once a quorum is there.
        tries: in a row that complete no round, before the run is given up.
        pause_s: between two tries; doubles up to a minute.
    """

    sites_s: float = 600.0
    stragglers_s: float = 20.0
    tries: int = 5
    pause_s: float = 5.0


def node_keys(study: StudyConfig, roster: Roster) -> dict[str, EllipticCurvePublicKey]:
    """By which the server knows the study's sites.

    Raises:
        ConsortiumError: names the sites that have not enrolled.
    """
    members = {site: roster.member(site) for site in study.site_names}
    if missing := [site for site, member in members.items() if member is None]:
        raise ConsortiumError(
            f"Expected the study's sites in the roster, got none for {', '.join(missing)}; enrol them with "
            "'medfed provision --enrol'."
        )
    return {site: member.public_node_key for site, member in members.items() if member is not None}


def first_status(study: StudyConfig, consortium: str) -> RunStatus:
    """The status of a run that has not begun."""
    epsilon = delta = None
    if study.privacy is not None and (plan := PrivacyPlan.of_study(study)).is_private:
        epsilon, delta = plan.epsilon.value, plan.delta
    return RunStatus(
        study=study.name,
        study_digest=study.digest,
        consortium=consortium,
        num_rounds=study.rounds.num_rounds,
        started_at=now_text(),
        updated_at=now_text(),
        epsilon_planned=epsilon,
        delta=delta,
        sites={site: SiteStatus() for site in study.site_names},
    )


def run_study(
    study: StudyConfig,
    keys: Mapping[str, EllipticCurvePublicKey],
    superlink: SuperLinkAddress,
    board: StatusBoard,
    *,
    folder: Path,
    patience: Patience,
    stop: threading.Event,
) -> None:
    """Run a study, or what is left of it, and write its results into the run folder.

    Args:
        study: resolved; every site has approved it, or refuses.
        keys: of the nodes of its sites.
        superlink: where messages go through.
        board: is told what happens.
        folder: of the run.
        patience: when to give up.
        stop: ends the run between two tries.

    Raises:
        RoundError: if several tries in a row completed no round. The run can be resumed.
        LinkError: likewise, when the SuperLink refuses or stays away.
        MedfedError: for what another try does not mend.
    """
    failures, pause_s = 0, patience.pause_s
    while True:
        before = _completed_rounds(study, folder)
        board.completed(before)
        board.next_try()
        try:
            _one_try(study, keys, superlink, board, folder=folder, patience=patience, stop=stop)
        except (RoundError, LinkError) as error:
            progressed = _completed_rounds(study, folder) > before
            failures, pause_s = (1, patience.pause_s) if progressed else (failures + 1, pause_s)
            _log.warning("event=try_ended failures=%d why=%s", failures, error)
            if failures >= patience.tries or stop.is_set():
                board.phase("failed", str(error))
                raise
            board.phase("paused", str(error))
            stop.wait(pause_s)
            pause_s = min(60.0, 2 * pause_s)
            continue
        except MedfedError as error:
            board.phase("failed", str(error))
            raise
        except KeyboardInterrupt:
            board.phase("paused", "stopped by the coordinator; go on with 'medfed server resume'")
            raise
        break
    board.completed(study.rounds.num_rounds)
    write_run_results(folder, study, board.snapshot())
    board.phase("finished")


def _one_try(
    study: StudyConfig,
    keys: Mapping[str, EllipticCurvePublicKey],
    superlink: SuperLinkAddress,
    board: StatusBoard,
    *,
    folder: Path,
    patience: Patience,
    stop: threading.Event,
) -> None:
    board.phase("waiting")
    nodes = _sites_that_are_there(study, keys, superlink, board, patience=patience, stop=stop)
    board.phase("running")
    watch = _Watch(board, {node.node_id: site for site, node in nodes.items()})
    with StudyRun(superlink, on_sent=watch.sent, on_reply=watch.answered) as run:
        config: dict[str, bool | float | int | str] = {
            "study": study.canonical.decode(),
            "run-dir": str(folder),
            "nodes": ",".join(f"{site}={node.node_id}" for site, node in nodes.items()),
        }
        server_app(
            grid=run.grid, context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        )


def _sites_that_are_there(
    study: StudyConfig,
    keys: Mapping[str, EllipticCurvePublicKey],
    superlink: SuperLinkAddress,
    board: StatusBoard,
    *,
    patience: Patience,
    stop: threading.Event,
) -> dict[str, SiteNode]:
    """All sites of the study by name, registered, once enough of them are online.

    Raises:
        RoundError: if too few came; names those that did not.
    """
    began_s = time.monotonic()
    quorum_since_s: float | None = None
    while True:
        nodes = register_sites(superlink, keys)
        there = [site for site, node in nodes.items() if node.is_online]
        board.online(there)
        now_s = time.monotonic()
        if len(there) < study.quorum:
            quorum_since_s = None
        elif quorum_since_s is None:
            quorum_since_s = now_s
        if len(there) == len(nodes) or (quorum_since_s is not None and now_s - quorum_since_s > patience.stragglers_s):
            return {site: nodes[site] for site in study.site_names}
        if now_s - began_s > patience.sites_s or stop.is_set():
            away = [site for site in study.site_names if site not in there]
            raise RoundError(
                f"Expected {study.quorum} of {len(nodes)} sites within {patience.sites_s:g} s, got {len(there)}; not "
                f"there: {', '.join(away)}. Ask them to run 'medfed site start', and resume."
            )
        stop.wait(0.5)


def _completed_rounds(study: StudyConfig, folder: Path) -> int:
    state = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope=FEDERATED)
    return 0 if state is None else state.round


class _Watch:
    """Tells the board what goes out and comes in.

    Args:
        board: is told.
        site_of: node number -> site.
    """

    def __init__(self, board: StatusBoard, site_of: Mapping[int, str]) -> None:
        self._board = board
        self._site_of = site_of
        self._training = 0
        self._began_s = time.monotonic()

    def sent(self, message: Message) -> None:
        """A message was handed over."""
        fields = exact_fields(_record(message), INSTRUCTION_FIELDS)
        number = RoundInstruction.parse(fields).round
        if message.metadata.message_type == "train" and number > self._training:
            now_s = time.monotonic()
            self._board.completed(number - 1, now_s - self._began_s if self._training else None)
            self._training, self._began_s = number, now_s
        self._board.sent(self._site_of[message.metadata.dst_node_id], sum(map(len, fields.values())))

    def answered(self, reply: Message) -> None:
        """A reply came; one that cannot be read is the round loop's to complain about."""
        site = self._site_of.get(reply.metadata.src_node_id)
        if site is None:
            return
        action = told(reply.metadata.message_type)
        if reply.has_error():
            self._board.answered(
                site, action=action, round=self._training, payload_bytes=0, refusal=told(str(reply.error.reason))
            )
            return
        try:
            fields = exact_fields(_record(reply), REPLY_FIELDS)
            said = RoundReply.parse(fields)
        except MedfedError:
            return
        self._board.answered(
            site,
            action=action.removeprefix("query."),
            round=said.round,
            payload_bytes=sum(map(len, fields.values())),
            refusal="" if said.refusal is None else f"{said.refusal.kind}: {said.refusal.reason}",
            epsilon=said.epsilon,
        )


def _record(message: Message) -> ConfigRecord:
    record = message.content.get(RECORD_KEY) if message.has_content() else None
    return record if isinstance(record, ConfigRecord) else ConfigRecord()
