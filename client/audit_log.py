"""The site's log of everything that left it: append-only JSON lines, hash-chained, the end of it signed.

A line is written and synced before its message is sent: what is not in the log has not left. A line holds digests and
sizes; never pixels, patients, file names, keys, masks or the update itself.

::

    audit-log.jsonl     one line an answer; each holds the digest of the line before
    audit-log.head      number and digest of the last line, signed with the key of the site's ledger

What can happen, and what then holds:

=====================================================  ====================================================
a line was changed, moved, inserted or removed         refused, with the number of the first such line
lines are missing at the end                           refused: the head knows how many there were
killed while a line was written                        the torn line is taken away: its message was not sent
killed between line and head                           the head is moved on
log and head removed or restored together              not noticed: keep a copy of the last digest elsewhere
=====================================================  ====================================================
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.canonical import canonical_bytes, sha256_hex
from medfed.durable_file import make_private_folder, replace_durably, sync_folder
from medfed.errors import AuditLogError
from medfed.study_sections import Digest

LOG_NAME = "audit-log.jsonl"

_SIGNED = b"medfed audit log head v1\0"
_NONE = "0" * 64
"""Stands for the digest of the line before the first."""


class Departure(BaseModel):
    """One message that left the site.

    Attributes:
        time: ISO 8601 in UTC, by the site's clock; nothing rests on it.
        run: number of the server's run.
        action: what the server had asked for.
        study_digest: of the study; empty if the question could not be read.
        scope: federation inside the study; empty likewise.
        round: of the study.
        attempt: of the round.
        outcome: ``reply``, ``refusal`` (nothing was done) or ``error`` (the process could not answer).
        kind: of the refusal or error; empty for a reply.
        again: whether these very bytes were noted before: the server asked twice, or the process was killed.
        payload_bytes: of header and payloads.
        payload_digest: SHA-256 of them, in order; what the server can be shown to have received.
        metrics: names of the numbers told beside it.
        epsilon_after: spent on the cohort by all studies together, once this has left; None where nothing is spent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    time: str
    run: str
    action: str
    study_digest: str = ""
    scope: str = ""
    round: Annotated[int, Field(ge=0)] = 0
    attempt: Annotated[int, Field(ge=0)] = 0
    outcome: Literal["reply", "refusal", "error"]
    kind: str = ""
    again: bool = False
    payload_bytes: Annotated[int, Field(ge=0)]
    payload_digest: Digest
    metrics: tuple[str, ...] = ()
    epsilon_after: float | None = None


class Line(BaseModel):
    """A departure in its place in the log.

    Attributes:
        sequence: from 1.
        previous: digest of the line before.
        departure: what left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sequence: Annotated[int, Field(ge=1)]
    previous: Digest
    departure: Departure

    @property
    def canonical(self) -> bytes:
        """The line as it is written, without its end."""
        return canonical_bytes(self.model_dump(mode="json"))


class AuditLog:
    """The log of one site; open it once, append before every sending.

    Args:
        folder: where log and head lie; made for its owner alone.
        key: signs the end of the log.

    Raises:
        AuditLogError: if the log is not as it was written.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey) -> None:
        self._path = folder / LOG_NAME
        self._key = key
        with _writing(self._path):
            make_private_folder(folder)
            if not self._path.exists():
                if head_path(self._path).exists():
                    raise AuditLogError(f"Expected the log {self._path}, which its head file remembers, got none.")
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                sync_folder(folder)
            with self._locked():
                self._take_torn_line_away()
                lines = read_audit_log(self._path, key.public_key())
                self._sequence, self._digest = len(lines), sha256_hex(lines[-1].canonical) if lines else _NONE
                self._left = {line.departure.payload_digest for line in lines}
                self._write_head()

    def append(self, departure: Departure) -> Line:
        """Add a line, durably. Only then may the message leave.

        Raises:
            AuditLogError: if it cannot be written; then nothing may leave.
        """
        with _writing(self._path), self._locked():
            line = Line(sequence=self._sequence + 1, previous=self._digest, departure=departure)
            with self._path.open("ab") as file:
                file.write(line.canonical + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._sequence, self._digest = line.sequence, sha256_hex(line.canonical)
            self._write_head()
        self._left.add(departure.payload_digest)
        return line

    def has_left(self, payload_digest: str) -> bool:
        """Whether these very bytes were noted before."""
        return payload_digest in self._left

    def _write_head(self) -> None:
        signature = self._key.sign(_signed(self._sequence, self._digest)).hex()
        head = {"sequence": self._sequence, "digest": self._digest, "signature": signature}
        replace_durably(head_path(self._path), canonical_bytes(head) + b"\n", mode=0o600)

    def _take_torn_line_away(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def head_path(log: Path) -> Path:
    """Where the head file of a log lies."""
    return log.with_suffix(".head")


def read_audit_log(path: Path, key: Ed25519PublicKey) -> tuple[Line, ...]:
    """All lines of a log, verified from the first to the last.

    Raises:
        AuditLogError: names the first line that is not as it was written, or says how many are missing.
    """
    lines: list[Line] = []
    digests = [_NONE]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AuditLogError(f"Expected to read the audit log {path}, got: {error}; restore it.") from None
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = Line.model_validate_json(text)
        except ValidationError:
            raise AuditLogError(f"{path}, line {number}: expected a line of this log, got other text.") from None
        if line.canonical != text or line.sequence != number or line.previous != digests[-1]:
            raise AuditLogError(
                f"{path}, line {number}: expected line {number} after {digests[-1][:16]}, got line {line.sequence} "
                f"after {line.previous[:16]}: a line was changed, moved or removed here."
            )
        lines.append(line)
        digests.append(sha256_hex(line.canonical))
    _require_head(path, key, digests)
    return tuple(lines)


def _require_head(path: Path, key: Ed25519PublicKey, digests: list[str]) -> None:
    try:
        head = json.loads(head_path(path).read_bytes())
        sequence, digest = int(head["sequence"]), str(head["digest"])
        key.verify(bytes.fromhex(head["signature"]), _signed(sequence, digest))
    except FileNotFoundError:
        if len(digests) > 2:  # one line without a head was written by a process that was killed in between
            raise AuditLogError(f"Expected a head file {head_path(path)} beside the log, got none.") from None
        return
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidSignature):
        raise AuditLogError(
            f"Expected the head file {head_path(path)} as this site's key signed it, got another."
        ) from None
    if sequence >= len(digests):
        raise AuditLogError(
            f"Expected {sequence} lines in {path}, which its head file remembers, got {len(digests) - 1}: the end was "
            "cut off, or an old copy was restored."
        )
    if digests[sequence] != digest:
        raise AuditLogError(f"{path}, line {sequence}: expected the line that the head file remembers, got another.")


def _signed(sequence: int, digest: str) -> bytes:
    return _SIGNED + canonical_bytes([sequence, digest])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AuditLogError(
            f"Expected to write the audit log {path}, got: {error}; make room: nothing leaves without a line in it."
        ) from None
