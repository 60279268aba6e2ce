"""The verified entries of a privacy ledger, and what they add up to.

A :class:`Chain` grows only by entries that were checked, so whatever is asked of it rests on entries that the
site's key signed, in the order in which they were signed, none left out in between. That none is missing at
the end is what the head file is for (:mod:`privacy.ledger_head`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medfed.errors import LedgerError
from privacy.ledger_entry import (
    NO_DIGEST,
    Body,
    Charge,
    ChargedMechanism,
    Entry,
    Opened,
    Reserved,
    Settled,
    chained_digest,
    is_signed,
    read_body,
)

REMEDY = "train nothing with it; keep the files, find out who changed them, and restore the newest true copy"


@dataclass(frozen=True)
class Spending:
    """A reservation and what became of it.

    Attributes:
        reserved: the entry that reserved.
        settled: the entry that settled; None while training goes on, and for ever after a crash.
    """

    reserved: Reserved
    settled: Settled | None

    @property
    def charge(self) -> Charge:
        """What was charged: it counts whatever became of it."""
        return self.reserved.charge


class Chain:
    """Entries that were verified, from the first on.

    Attributes:
        public_key: the only key whose signatures count.
    """

    def __init__(self, public_key: Ed25519PublicKey) -> None:
        self.public_key = public_key
        self._bodies: list[Body] = []
        self._digests = [NO_DIGEST]
        self._settled: dict[int, Settled] = {}

    def __len__(self) -> int:
        return len(self._bodies)

    @property
    def bodies(self) -> tuple[Body, ...]:
        """All verified entries, in order."""
        return tuple(self._bodies)

    def digest_of(self, sequence: int) -> bytes:
        """Digest of entry ``sequence``, which must be in the chain; 0 stands before the first."""
        return self._digests[sequence]

    @property
    def last_digest(self) -> bytes:
        """Digest of the last entry; :data:`NO_DIGEST` of an empty chain."""
        return self._digests[-1]

    @property
    def last_time_ms(self) -> int:
        """Time of the last entry; 0 of an empty chain."""
        return self._bodies[-1].time_ms if self._bodies else 0

    @property
    def last_label(self) -> str:
        """The last entry, named for people."""
        return self._label(len(self), self._bodies[-1]) if self._bodies else "no entry"

    def extend(self, entries: Iterable[Entry]) -> None:
        """Append entries, each after it was checked.

        Raises:
            LedgerError: naming the first entry that is not as it was written; those before it are kept.
        """
        for entry in entries:
            self._append(entry)

    def _append(self, entry: Entry) -> None:
        expected = len(self) + 1
        if entry.sequence > expected:
            raise LedgerError(
                f"Expected entry {expected} of the ledger after {self.last_label}, got entry {entry.sequence}: "
                f"entry {expected} is missing; {REMEDY}."
            )
        body = read_body(entry.body)
        label = self._label(entry.sequence, body)
        if entry.sequence < expected:
            raise LedgerError(f"Expected ledger entries numbered from 1, got {label}, which was inserted; {REMEDY}.")
        if body is not None and body.sequence != expected:
            raise LedgerError(
                f"Expected entry {expected} of the ledger in its place, got {label}, "
                f"which was written as entry {body.sequence}: entries were moved or removed; {REMEDY}."
            )
        if chained_digest(self.last_digest, entry.body) != entry.digest:
            raise LedgerError(
                f"Expected ledger {label} to have the digest of its bytes and of the entry before, "
                f"got another: its body or its digest was changed; {REMEDY}."
            )
        if not is_signed(entry, self.public_key):
            raise LedgerError(
                f"Expected ledger {label} to be signed with this ledger's key, got a signature that is not: "
                f"it was changed or written with another key; {REMEDY}."
            )
        self._keep(entry, body, label)

    def _keep(self, entry: Entry, body: Body | None, label: str) -> None:
        """Append what the key has signed, if it also makes sense after the entries before it."""
        match body:
            case Opened():
                sound = not self._bodies and body.public_key == raw_hex(self.public_key)
            case Reserved():
                sound = bool(self._bodies)
            case Settled():
                sound = self.spending(body.reservation) is not None and body.reservation not in self._settled
            case None:
                sound = False
        if not sound or body is None:
            raise LedgerError(
                f"Expected ledger {label} to follow from the entries before it, got one that is signed and does not: "
                f"another version wrote it; use the version that did."
            )
        if isinstance(body, Settled):
            self._settled[body.reservation] = body
        self._bodies.append(body)
        self._digests.append(entry.digest)

    def _label(self, sequence: int, body: Body | None) -> str:
        """``entry 7 (study 'x', round 3)``, as far as it can be read."""
        match body:
            case Reserved():
                charge = body.charge
                return f"entry {sequence} (study {charge.study!r}, round {charge.round})"
            case Settled() if (spending := self.spending(body.reservation)) is not None:
                charge = spending.charge
                return (
                    f"entry {sequence} (settles entry {body.reservation}: study {charge.study!r}, round {charge.round})"
                )
            case Opened():
                return f"entry {sequence} (opens the ledger)"
            case _:
                return f"entry {sequence} (unreadable)"

    def spending(self, sequence: int) -> Spending | None:
        """The reservation that stands in entry ``sequence``, if one does."""
        body = self._bodies[sequence - 1] if 1 <= sequence <= len(self) else None
        return Spending(body, self._settled.get(sequence)) if isinstance(body, Reserved) else None

    @property
    def cohorts(self) -> tuple[str, ...]:
        """Every cohort that was ever charged, in the order of its first charge."""
        return tuple(dict.fromkeys(body.charge.cohort for body in self._bodies if isinstance(body, Reserved)))

    def spendings(self, cohort: str) -> tuple[Spending, ...]:
        """Every reservation of a cohort, over all studies, settled or not, in order."""
        return tuple(
            Spending(body, self._settled.get(body.sequence))
            for body in self._bodies
            if isinstance(body, Reserved) and body.charge.cohort == cohort
        )

    def mechanisms(self, cohort: str) -> tuple[ChargedMechanism, ...]:
        """What was ever charged to a cohort, settled or not: all of it counts."""
        return tuple(spending.charge.mechanism for spending in self.spendings(cohort))

    def kept_replies(self) -> dict[int, str]:
        """Digest of each reply that must still be stored, by the sequence of its reservation.

        That is the last one sent for each cohort, study and scope.
        """
        latest: dict[tuple[str, str, str], tuple[int, str]] = {}
        for reservation, settled in self._settled.items():
            spending = self.spending(reservation)
            if spending is not None and settled.reply_digest is not None:
                latest[reply_key(spending.charge)] = (reservation, settled.reply_digest)
        return dict(latest.values())


def reply_key(charge: Charge) -> tuple[str, str, str]:
    """Cohort, study and scope: one reply is kept for each."""
    return charge.cohort, charge.study_digest, charge.scope


def raw_hex(key: Ed25519PublicKey) -> str:
    """The 32 bytes of a public key as 64 hexadecimal digits."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
