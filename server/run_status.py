"""How a study that runs is doing: one small file that is replaced at every event, for people and for monitors.

The file says what the server has seen, and what sites have told. It holds no update and no secret.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import CheckpointError

STATUS = "status.json"

Phase = Literal["waiting", "running", "paused", "finished", "failed"]
"""``waiting`` for sites; ``paused`` between two tries after a round that could not be completed."""

_WRITE_EVERY_S = 0.5


def _is_a_moment(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError("expected a time with its zone")
    return value


Moment = Annotated[str, AfterValidator(_is_a_moment)]
"""ISO 8601 with a zone."""


class SiteStatus(BaseModel):
    """What the server knows of a site.

    Attributes:
        is_online: whether it gave a sign in the last minute.
        last_seen: when its last answer came, ISO 8601 in UTC; None before the first.
        last_action: what that answered.
        round: the last round that it answered for.
        answers: answers that came.
        refusals: of these, how many refused.
        last_refusal: kind and public sentence of the last one.
        bytes_sent: payload sent to it.
        bytes_received: payload that came from it.
        epsilon: spent on its patients by this study, as the site told; None if it told nothing.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)

    is_online: bool = False
    last_seen: Moment | None = None
    last_action: str = ""
    round: Annotated[int, Field(ge=0)] = 0
    answers: int = 0
    refusals: int = 0
    last_refusal: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    epsilon: float | None = None


class RunStatus(BaseModel):
    """What ``status.json`` holds.

    Attributes:
        study: name of the study.
        study_digest: of the study.
        consortium: whose.
        phase: see :data:`Phase`.
        reason: why, in one line; empty if there is nothing to say.
        round: last completed round.
        num_rounds: rounds of the study.
        tries: how often the run was begun or resumed.
        process: number of the process that wrote this.
        started_at: of the first try, ISO 8601 in UTC.
        updated_at: of this file, likewise.
        round_seconds: of the last completed round; None before the first.
        epsilon_planned: what the study may spend at a site in all; None if it spends nothing.
        delta: of every epsilon here; None if it spends nothing.
        sites: by name, in the order of the study.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)

    study: str
    study_digest: str
    consortium: str
    phase: Phase = "waiting"
    reason: str = ""
    round: int = 0
    num_rounds: int
    tries: int = 0
    process: int = 0
    started_at: Moment
    updated_at: Moment
    round_seconds: float | None = None
    epsilon_planned: float | None = None
    delta: float | None = None
    sites: dict[str, SiteStatus]


def now_text() -> str:
    """This moment as it is written into the file."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class StatusBoard:
    """The status of one run, kept in memory and on disk. May be used by several threads.

    Args:
        folder: of the run.
        status: to begin with.
    """

    def __init__(self, folder: Path, status: RunStatus) -> None:
        self._folder = folder
        self._status = status.model_copy(update={"process": os.getpid()})
        self._lock = threading.Lock()
        self._written_s = 0.0

    def snapshot(self) -> RunStatus:
        """The status now."""
        with self._lock:
            return self._status.model_copy(deep=True)

    def phase(self, phase: Phase, reason: str = "") -> None:
        """Enter a phase."""
        with self._lock:
            self._status.phase, self._status.reason = phase, reason
            self._write()

    def next_try(self) -> None:
        """Another try begins."""
        with self._lock:
            self._status.tries += 1
            self._write()

    def online(self, sites: Iterable[str]) -> None:
        """These sites gave a sign lately, and the others did not."""
        there = set(sites)
        with self._lock:
            for name, site in self._status.sites.items():
                site.is_online = name in there
            self._write(at_once=False)

    def sent(self, site: str, payload_bytes: int) -> None:
        """Something was sent to a site."""
        with self._lock:
            if site in self._status.sites:
                self._status.sites[site].bytes_sent += payload_bytes
                self._write(at_once=False)

    def answered(
        self, site: str, *, action: str, round: int, payload_bytes: int, refusal: str = "", epsilon: float | None = None
    ) -> None:
        """An answer came."""
        with self._lock:
            if (one := self._status.sites.get(site)) is None:
                return
            one.is_online = True
            one.last_seen = now_text()
            one.last_action = action
            one.round = max(one.round, round)
            one.answers += 1
            one.bytes_received += payload_bytes
            if refusal:
                one.refusals += 1
                one.last_refusal = refusal
            if epsilon is not None:
                one.epsilon = epsilon
            self._write(at_once=False)

    def completed(self, round: int, seconds: float | None = None) -> None:
        """A round was completed."""
        with self._lock:
            self._status.round = round
            if seconds is not None:
                self._status.round_seconds = round_to_ms(seconds)
            self._write()

    def _write(self, *, at_once: bool = True) -> None:
        """Replace the file; events that come in numbers at most twice a second."""
        if not at_once and time.monotonic() - self._written_s < _WRITE_EVERY_S:
            return
        self._status.updated_at = now_text()
        partial = self._folder / f".{STATUS}.partial"
        partial.write_text(self._status.model_dump_json(indent=2))
        partial.replace(self._folder / STATUS)
        self._written_s = time.monotonic()


def round_to_ms(seconds: float) -> float:
    """Seconds, without digits that mean nothing."""
    return round(seconds, 3)


def read_status(folder: Path) -> RunStatus:
    """The status of a run.

    Raises:
        CheckpointError: if the folder is not one of a run in a consortium.
    """
    path = folder / STATUS
    try:
        return RunStatus.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise CheckpointError(
            f"Expected a run of a consortium with {STATUS} in {folder}, got none; begin one with 'medfed server run'."
        ) from None
