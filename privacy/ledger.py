"""The privacy ledger: what a site's patients have spent, in all studies together, and the cap on it.

The hospital owns it. A charge is reserved, durably, before anything trains, and counts from then on: settled
or not, sent or failed, so a crash has spent what it reserved. A reservation after which the cohort's epsilon
would pass its cap is refused.

What can go wrong, and what then holds:

=============================================  ====================================================
event                                          effect
=============================================  ====================================================
kill or power cut before ``reserve`` returned  counted or not; nothing has trained
... before ``settle`` returned                 counted, once: a retry finds the reply, or takes the
                                               open reservation up
disk full, read-only, I/O error                ``LedgerError``; a reservation that was made counts
two processes reserve                          one after the other; both count
the clock goes backwards                       times stand still; the accounting uses none
an entry or reply changed, moved, removed      ``LedgerError`` that names the first such entry
database restored from a backup                ``LedgerError``, see :mod:`privacy.ledger_head`
=============================================  ====================================================

Not defended: whoever holds the signing key, one group of patients under two cohort names, and a disk that
says it has written and has not.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfed.canonical import sha256_hex
from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import LedgerError, PrivacyError, SiteError
from medfed.private_file import require_private
from medfed.signing import public_pem
from privacy.ledger_cap import projected_epsilon, refusal, require_one_unit
from privacy.ledger_chain import raw_hex, reply_key
from privacy.ledger_entry import Body, Cap, Charge, Opened, Outcome, Reserved, Settled, checked_facts, signed_entry
from privacy.ledger_head import Head, head_path, read_head, write_head
from privacy.ledger_store import append_entry, create_file, create_schema, has_schema, replace_reply, transaction
from privacy.ledger_view import LedgerView, public_key_path

_log = logging.getLogger("medfed.privacy.ledger")

SUFFIX = ".sqlite"
"""Of a ledger's database; head file and public key lie beside it with ``.head`` and ``.pub``."""


@dataclass(frozen=True)
class Reservation:
    """A charge that stands in the ledger and counts.

    Attributes:
        sequence: of its entry.
        charge: what was reserved.
    """

    sequence: int
    charge: Charge


class PrivacyLedger(LedgerView):
    """The ledger of a site: reserve before training, settle after. May be used by many threads and processes.

    Args:
        path: of the database, ``<name>.sqlite``.
        key: the site's key.
        clock: seconds since 1970; noted with each entry and used for nothing else.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, key.public_key())
        self._key = key
        self._clock = clock

    @classmethod
    def open(cls, path: Path, key: Ed25519PrivateKey, *, clock: Callable[[], float] = time.time) -> PrivacyLedger:
        """Open the ledger at ``path`` and verify all of it; make it, in a folder of mode 0700, if there is none.

        Raises:
            SiteError: if anybody but the owner may enter the folder or read the database.
            LedgerError: if the ledger is not as the key signed it, or cannot be written.
        """
        ledger = cls(path, key, clock)
        with _writing(path):
            ledger._make()
        ledger._advance_head()
        return ledger

    def reserve(self, charge: Charge, cap: Cap) -> Reservation:
        """Write a charge into the ledger, if the cohort's epsilon with it stays within the cap.

        When this returns the charge is durable and counts; only then may training begin. All charges of the
        cohort count, whatever became of them, composed at the cap's delta.

        An equal charge that was never settled is taken up and not charged a second time: whoever made it ended
        before :meth:`settle`, which comes before a reply is sent, so nothing of that try has left. Noise must be drawn
        anew. If both tries live on, only the first to settle may send; the other gets a ``LedgerError``.

        Raises:
            BudgetError: if the cap would be passed, or the charges protect different units, whose epsilons
                do not compose; nothing was charged.
            LedgerError: if the ledger was changed or cannot be written; nothing may train.
        """
        with self._lock, _writing(self._path):
            with transaction(self._path, write=True) as connection:
                self._require_head(self._catch_up(connection))
                spendings = self._chain.spendings(charge.cohort)
                require_one_unit(charge, cap, spendings)
                taken_up = next((one for one in spendings if one.settled is None and one.charge == charge), None)
                earlier = tuple(one.charge.mechanism for one in spendings if one is not taken_up)
                projected = projected_epsilon(earlier, charge.mechanism, cap)
                fits = projected <= cap.epsilon  # NaN does not fit
                if taken_up is not None:
                    sequence = taken_up.reserved.sequence
                elif fits:
                    sequence, time_ms = self._next_place()
                    self._append(connection, Reserved(sequence=sequence, time_ms=time_ms, charge=charge, cap=cap))
            if fits:
                self._advance_head()
        if not fits:  # said without the lock: to count the steps that still fit takes a while
            raise refusal(earlier, charge, cap, projected)
        event = "reserved" if taken_up is None else "taken_up"
        _log.info("event=%s entry=%d round=%d steps=%d", event, sequence, charge.round, charge.mechanism.steps)
        return Reservation(sequence, charge)

    def settle(
        self, reservation: Reservation, outcome: Outcome, reply: bytes | None, facts: Mapping[str, float]
    ) -> None:
        """Note what became of a reservation, and keep the reply so that a retry gets the same bytes.

        Call it before the reply is sent. The charge counts whether this is called or not.

        Args:
            reservation: from :meth:`reserve`.
            outcome: ``sent`` with a reply, ``failed`` without one.
            reply: what will be sent.
            facts: finite numbers for the hospital alone; never a number of patients or images.

        Raises:
            PrivacyError: if reply or facts are not as stated.
            LedgerError: if the ledger has no such open reservation, was changed, or cannot be written.
        """
        if (outcome == "sent") != (reply is not None) or outcome not in ("sent", "failed"):
            raise PrivacyError(
                f"Expected outcome 'sent' with a reply or 'failed' without one, got {outcome!r} "
                f"{'without' if reply is None else 'with'} a reply; settle what happened."
            )
        noted = checked_facts(facts)
        charge = reservation.charge
        with self._lock, _writing(self._path):
            with transaction(self._path, write=True) as connection:
                self._catch_up(connection)
                spending = self._chain.spending(reservation.sequence)
                if spending is None or spending.settled is not None or spending.charge != charge:
                    raise LedgerError(
                        f"Expected an open reservation in entry {reservation.sequence} of the ledger {self._path}, "
                        f"got none: it is settled, or was made elsewhere; settle each reservation once."
                    )
                if reply is not None:
                    replace_reply(connection, self._kept_for(charge), reservation.sequence, reply)
                sequence, time_ms = self._next_place()
                settled = Settled(
                    sequence=sequence,
                    time_ms=time_ms,
                    reservation=reservation.sequence,
                    outcome=outcome,
                    reply_digest=None if reply is None else sha256_hex(reply),
                    facts=noted,
                )
                self._append(connection, settled)
            self._advance_head()

    def _make(self) -> None:
        """Make what is not there yet; refuse to make anew what its head file says there was."""
        if self._path.suffix != SUFFIX:
            raise SiteError(f"Expected a ledger named like ledger{SUFFIX}, got {self._path.name!r}; rename it.")
        make_private_folder(self._path.parent)
        require_private(self._path.parent, 0o700)
        head = read_head(head_path(self._path), self._public_key)  # before the look at the database: the other
        if not self._path.exists():  # way round, a process that makes both in between would look like a loss
            self._require_none(head)
            create_file(self._path)
        require_private(self._path, 0o600)
        with transaction(self._path, write=True) as connection:
            if not has_schema(connection, self._path):
                self._require_none(read_head(head_path(self._path), self._public_key))
                create_schema(connection)
                sequence, time_ms = self._next_place()
                public_key, nonce = raw_hex(self._public_key), secrets.token_hex(32)
                opened = Opened(sequence=sequence, time_ms=time_ms, public_key=public_key, nonce=nonce)
                self._append(connection, opened)

    def _require_none(self, head: Head | None) -> None:
        if head is not None:
            raise LedgerError(
                f"Expected a ledger {self._path} of at least {head.sequence} entries, which its head file remembers, "
                f"got none: it was lost or removed; restore the newest copy, or count its cohorts as spent."
            )

    def _require_head(self, head: Head | None) -> None:
        """Without a head file there may be the opening entry alone, and opening the ledger writes one."""
        if head is None:
            raise LedgerError(
                f"Expected the head file {head_path(self._path)}, got none: it was removed while the ledger was in "
                f"use; find out by whom, and open the ledger again."
            )

    def _next_place(self) -> tuple[int, int]:
        """Sequence and time of the next entry; a clock that goes backwards stands still here."""
        return len(self._chain) + 1, max(int(self._clock() * 1000), self._chain.last_time_ms)

    def _append(self, connection: Connection, body: Body) -> None:
        """Append an entry; the chain takes it up when it is read back, after the commit."""
        append_entry(connection, signed_entry(body, self._chain.last_digest, self._key))

    def _advance_head(self) -> None:
        """Read back what was committed, verified, and move the head file to the end of it.

        A transaction of its own, so that processes write the head one after the other, each the newest.
        """
        with _writing(self._path), transaction(self._path, write=True) as connection:
            old = self._catch_up(connection)
            new = Head(len(self._chain), self._chain.last_digest)
            if old != new:
                write_head(head_path(self._path), new, self._key)
            _write_public_key(public_key_path(self._path), self._public_key)

    def _kept_for(self, charge: Charge) -> int | None:
        """The reservation whose reply is replaced by this charge's."""
        for sequence in self._chain.kept_replies():
            spending = self._chain.spending(sequence)
            if spending is not None and reply_key(spending.charge) == reply_key(charge):
                return sequence
        return None


def _write_public_key(path: Path, key: Ed25519PublicKey) -> None:
    pem = public_pem(key)
    if not path.exists() or path.read_bytes() != pem:
        replace_durably(path, pem, mode=0o644)


@contextmanager
def _writing(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"Expected to write the ledger {path} and its head file, got: {error}; mend it and try again."
        ) from error
