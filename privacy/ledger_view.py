"""A privacy ledger for reading: verified as it is read, with the public key and without the right to write."""

from __future__ import annotations

import threading
from pathlib import Path
from sqlite3 import Connection

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medfed.canonical import sha256_hex
from medfed.errors import LedgerError
from privacy.accounting import Epsilon, RenyiEpsilon, epsilon_spent
from privacy.ledger_chain import Chain, Spending
from privacy.ledger_entry import Body, Reserved
from privacy.ledger_head import Head, head_path, read_head, require_head_in
from privacy.ledger_store import count_entries, entries_from, has_schema, read_reply, stored_replies, transaction


class LedgerView:
    """A ledger for reading: needs the public key and no right to write.

    Every call first verifies what was appended since the one before.

    Raises:
        LedgerError: from any call, if an entry is not as the site's key signed it, or some are missing.
    """

    def __init__(self, path: Path, public_key: Ed25519PublicKey) -> None:
        self._path = path
        self._public_key = public_key
        self._chain = Chain(public_key)
        self._lock = threading.Lock()

    def cohorts(self) -> tuple[str, ...]:
        """Every cohort that was ever charged."""
        return self._newest().cohorts

    def charges(self, cohort: str) -> tuple[Spending, ...]:
        """Every charge of a cohort in all studies, settled or not, in order."""
        return self._newest().spendings(cohort)

    def entries(self) -> tuple[Body, ...]:
        """Every entry, in order."""
        return self._newest().bodies

    def spent(self, cohort: str, delta: float) -> Epsilon | RenyiEpsilon:
        """The epsilon of all charges of a cohort, in all studies, composed; 0 for one never charged.

        It holds for the unit and adjacency of the cohort's charges, which all have the same.
        """
        return epsilon_spent(self._newest().mechanisms(cohort), delta)

    def stored_reply(self, cohort: str, request_digest: str) -> bytes | None:
        """The reply to a request that was answered before, byte for byte; None if there is none any more.

        None means that answering needs a new charge. Only the last reply sent for each cohort, study and
        scope is kept.

        Raises:
            LedgerError: also if the reply is not the one that was sent.
        """
        with self._lock, transaction(self._path, write=False) as connection:
            self._catch_up(connection)
            kept = self._chain.kept_replies()
            for reservation, digest in kept.items():
                spending = self._chain.spending(reservation)
                assert spending is not None
                charge = spending.charge
                if (charge.cohort, charge.request_digest) == (cohort, request_digest):
                    return _checked_reply(read_reply(connection, reservation), digest, spending.reserved)
        return None

    def verify(self) -> None:
        """Verify the whole ledger from its first byte: entries, signatures, order, end, stored replies.

        Raises:
            LedgerError: naming the first entry that is not as it was written (sequence, study, round).
        """
        chain = Chain(self._public_key)
        with self._lock, transaction(self._path, write=False) as connection:
            self._catch_up(connection)
            _read_whole(connection, self._path, chain)

    def _newest(self) -> Chain:
        with self._lock, transaction(self._path, write=False) as connection:
            self._catch_up(connection)
        return self._chain

    def _catch_up(self, connection: Connection) -> Head | None:
        """Verify what other processes have appended; returns what the head file says. Part of a transaction.

        Entries that this process has verified are not read again: what they said is held in memory.
        """
        if not len(self._chain):
            chain = Chain(self._public_key)
            head = _read_whole(connection, self._path, chain)
            self._chain = chain  # all of it or nothing: what was refused once is not taken up in part
            return head
        _require_schema(connection, self._path)
        entries = entries_from(connection, len(self._chain))
        last = next(entries, None)
        if last is None or last.digest != self._chain.last_digest:
            raise LedgerError(
                f"Expected the ledger {self._path} to go on after {self._chain.last_label}, which this process has "
                f"read, got another history: the database was exchanged; restore the newest true copy."
            )
        self._chain.extend(entries)
        return _require_complete(connection, self._path, self._chain)


def inspect_ledger(path: Path, public_key: Ed25519PublicKey) -> tuple[Chain, LedgerError | None]:
    """The entries up to the first that is not as it was written, and what is wrong with that one.

    For people who look for what happened; what such a chain adds up to is at most a part of what was spent.
    """
    chain = Chain(public_key)
    try:
        with transaction(path, write=False) as connection:
            _read_whole(connection, path, chain)
    except LedgerError as error:
        return chain, error
    return chain, None


def public_key_path(ledger: Path) -> Path:
    """Where a ledger leaves its public key; compare it with a copy kept elsewhere."""
    return ledger.with_suffix(".pub")


def _read_whole(connection: Connection, path: Path, chain: Chain) -> Head | None:
    """Verify everything in a database into an empty chain."""
    _require_schema(connection, path)
    chain.extend(entries_from(connection, None))
    head = _require_complete(connection, path, chain)
    replies, kept = stored_replies(connection), chain.kept_replies()
    for reservation in sorted({*replies, *kept}):
        spending = chain.spending(reservation)
        if spending is None or reservation not in kept:
            raise LedgerError(
                f"Expected no stored reply for entry {reservation} of the ledger {path}, got one: "
                f"it was inserted; keep the files, find out who changed them, and restore the newest true copy."
            )
        _checked_reply(replies.get(reservation), kept[reservation], spending.reserved)
    return head


def _require_schema(connection: Connection, path: Path) -> None:
    if not has_schema(connection, path):
        raise LedgerError(
            f"Expected a ledger in {path}, got an empty database; name the ledger, or open it at the site to make one."
        )


def _require_complete(connection: Connection, path: Path, chain: Chain) -> Head | None:
    """Refuse a chain with rows beside it, or that ends before its head file says."""
    count = count_entries(connection)
    if count != len(chain):
        raise LedgerError(
            f"Expected {len(chain)} entries in the ledger {path}, numbered from 1, got {count}: "
            f"entries were inserted or removed; restore the newest true copy."
        )
    head = read_head(head_path(path), chain.public_key)
    require_head_in(chain, head, head_path(path))
    return head


def _checked_reply(reply: bytes | None, digest: str, reserved: Reserved) -> bytes:
    if reply is None or sha256_hex(reply) != digest:
        raise LedgerError(
            f"Expected the stored reply of entry {reserved.sequence} (study {reserved.charge.study!r}, round "
            f"{reserved.charge.round}) as it was sent, got {'none' if reply is None else 'other bytes'}: it was "
            f"changed or removed; send nothing, find out who changed it, and restore the newest true copy."
        )
    return reply
