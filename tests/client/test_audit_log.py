"""The audit log: every line counts, what is torn was not sent, and an end that was cut off is noticed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from client.audit_log import AuditLog, Departure, head_path, read_audit_log
from client.audit_log_command import _table
from medfed.canonical import canonical_bytes
from medfed.errors import AuditLogError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)


def departure(number: int) -> Departure:
    return Departure(
        time="2026-01-01T00:00:00.000+00:00", run="7", action="train", study_digest="ab" * 32, scope="federated",
        round=number, attempt=1, outcome="reply", payload_bytes=10, payload_digest=f"{number:064x}",
    )  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of five lines."""
    opened = AuditLog(tmp_path / "state", KEY)
    for number in range(1, 6):
        opened.append(departure(number))
    return tmp_path / "state" / "audit-log.jsonl"


def read(log: Path) -> list[int]:
    return [line.departure.round for line in read_audit_log(log, KEY.public_key())]


def test_what_was_appended_is_read_back_and_known_after_a_restart(log: Path) -> None:
    assert read(log) == [1, 2, 3, 4, 5]
    again = AuditLog(log.parent, KEY)
    assert again.has_left(f"{3:064x}")
    assert not again.has_left(f"{6:064x}")
    assert again.append(departure(6)).sequence == 6
    assert read(log) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", range(5))
def test_every_line_that_is_changed_moved_or_removed_is_named(log: Path, number: int) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[number])
    changed["departure"]["payload_bytes"] = 11
    tampered = {
        "changed": [*lines[:number], canonical_bytes(changed) + b"\n", *lines[number + 1 :]],
        "removed": [*lines[:number], *lines[number + 1 :]],
        "doubled": [*lines[: number + 1], *lines[number:]],
        "no line": [*lines[:number], b"{}\n", *lines[number + 1 :]],
        "first": [lines[number], *lines[:number], *lines[number + 1 :]],
    }
    for how, content in tampered.items():
        if content == lines:
            continue
        log.write_bytes(b"".join(content))
        with pytest.raises(AuditLogError):
            read(log)
        with pytest.raises(AuditLogError):
            AuditLog(log.parent, KEY)
        assert log.read_bytes() == b"".join(content), how


@pytest.mark.parametrize("kept", range(5))
def test_an_end_that_was_cut_off_is_noticed(log: Path, kept: int) -> None:
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(AuditLogError, match=f"Expected 5 lines in .*, got {kept}"):
        read(log)


def test_a_torn_line_is_taken_away_by_the_next_process_and_no_whole_one_is(log: Path) -> None:
    whole, head = log.read_bytes(), head_path(log).read_bytes()
    torn = canonical_bytes({"sequence": 6, "previous": "0" * 64})
    for length in range(1, len(torn), 7):
        log.write_bytes(whole + torn[:length])
        assert AuditLog(log.parent, KEY).append(departure(6)).sequence == 6
        assert read(log) == [1, 2, 3, 4, 5, 6]
        log.write_bytes(whole)
        head_path(log).write_bytes(head)


def test_a_line_that_could_not_be_written_whole_does_not_spoil_the_next(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    opened = AuditLog(log.parent, KEY)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", _no_space)
        with pytest.raises(AuditLogError):
            opened.append(departure(6))
    AuditLog(log.parent, KEY)  # the process ended; the line is whole and may stay: one line too many hides nothing
    assert read(log) in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])


def test_killed_between_line_and_head_the_head_is_moved_on(log: Path) -> None:
    head = head_path(log).read_bytes()
    AuditLog(log.parent, KEY).append(departure(6))
    head_path(log).write_bytes(head)
    assert read(log) == [1, 2, 3, 4, 5, 6]
    AuditLog(log.parent, KEY)
    assert json.loads(head_path(log).read_bytes())["sequence"] == 6


def test_a_head_that_is_gone_damaged_or_of_another_key_is_refused(log: Path) -> None:
    good = head_path(log).read_bytes()
    for content in (b"", b"{}", b"[1]", good.replace(b'"sequence":5', b'"sequence":4'), good[:-9]):
        head_path(log).write_bytes(content)
        with pytest.raises(AuditLogError, match="head file"):
            read(log)
    head_path(log).write_bytes(good)
    with pytest.raises(AuditLogError, match="head file"):
        read_audit_log(log, OTHER.public_key())
    head_path(log).unlink()
    with pytest.raises(AuditLogError, match="got none"):
        read(log)
    head_path(log).write_bytes(good)
    log.unlink()
    with pytest.raises(AuditLogError, match="which its head file remembers, got none"):
        AuditLog(log.parent, KEY)


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_table_of_the_log_fits_eighty_columns_and_its_head_is_one_line(log: Path) -> None:
    opened = AuditLog(log.parent, KEY)
    plain = departure(6).model_dump()
    for said in (
        {"action": "query.secure_advertise", "payload_bytes": 12_345_678},
        {"outcome": "refusal", "kind": "SecureAggregationError", "again": True},
        {"epsilon_after": 1234.5678, "round": 10_000},
    ):
        opened.append(Departure.model_validate({**plain, **said}))
    console = Console(width=80, file=io.StringIO())
    console.print(_table(read_audit_log(log, KEY.public_key())))
    assert isinstance(console.file, io.StringIO)
    head, _, *lines = console.file.getvalue().splitlines()
    assert head.split() == ["UTC", "study", "asked", "for", "round", "bytes", "SHA-256", "epsilon", "outcome"]
    assert lines[0].split() == ["26-01-01", "00:00:00", "abababab", "train", "1", "10", "00000000", "reply"]
    shown = "\n".join(lines)
    for whole in ("advertise", "12,345,678", "1234.568", "10000"):
        assert whole in shown
    assert "SecureAggregationError,again" in "".join("".join(line[-9:] for line in lines).split())
