"""The head file: which entry a privacy ledger ends with, kept beside the database.

A database that was restored from a backup is a valid chain that ends too early: its charges would be spent
again. The head file, signed and replaced after each commit, remembers how far the chain had come.

===========================================  ======================================================
database against head file                   meaning
===========================================  ======================================================
ends where the head says                     the usual case
goes on after it, through the same entry     a crash between commit and head: the head is advanced
ends before it, or through another entry     restored, cut off or exchanged: refused
no head, the opening entry alone             a crash while it was made: opening it again writes the head
no head, more entries                        the head was lost or removed: refused
head, no entries or no database              the database was lost or removed: refused
===========================================  ======================================================

Not detected: database and head file restored or removed together, and entries cut off that a crash kept out
of the head. Keep a copy of the digest that ``medfed site ledger`` ends with elsewhere, to notice the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfed.canonical import canonical_bytes
from medfed.durable_file import replace_durably
from medfed.errors import LedgerError
from privacy.ledger_chain import Chain

_SIGNED = b"medfed privacy ledger head v1\0"
_REMEDY = "train nothing with it; restore the newest copy of both files, or count the cohort as spent"


@dataclass(frozen=True)
class Head:
    """The end of a chain.

    Attributes:
        sequence: of its last entry.
        digest: of its last entry, 32 bytes.
    """

    sequence: int
    digest: bytes

    @property
    def signed_bytes(self) -> bytes:
        """What the key signs."""
        return _SIGNED + canonical_bytes([self.sequence, self.digest.hex()])


def head_path(ledger: Path) -> Path:
    """Where the head file of a ledger lies."""
    return ledger.with_suffix(".head")


def read_head(path: Path, key: Ed25519PublicKey) -> Head | None:
    """The head that was last written, or None if there is no file.

    Raises:
        LedgerError: if the file cannot be read or was not written with the key.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"Expected to read the ledger's head file {path}, got: {error}; {_REMEDY}.") from None
    try:
        fields = json.loads(data)
        head = Head(int(fields["sequence"]), bytes.fromhex(fields["digest"]))
        key.verify(bytes.fromhex(fields["signature"]), head.signed_bytes)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidSignature):
        raise LedgerError(
            f"Expected the ledger's head file {path} as this ledger's key signed it, got another; {_REMEDY}."
        ) from None
    return head


def write_head(path: Path, head: Head, key: Ed25519PrivateKey) -> None:
    """Replace the head file, atomically and durably. The caller holds the ledger's write lock.

    Raises:
        OSError: if it cannot be written; the old head still stands.
    """
    signature = key.sign(head.signed_bytes)
    fields = {"sequence": head.sequence, "digest": head.digest.hex(), "signature": signature.hex()}
    replace_durably(path, canonical_bytes(fields) + b"\n", mode=0o600)


def require_head_in(chain: Chain, head: Head | None, path: Path) -> None:
    """Refuse a chain that does not go through the head.

    Raises:
        LedgerError: see the table above.
    """
    if head is None:
        if len(chain) > 1:
            raise LedgerError(
                f"Expected a head file {path} beside a ledger that ends with {chain.last_label}, got none; {_REMEDY}."
            )
    elif head.sequence > len(chain):
        raise LedgerError(
            f"Expected the ledger to reach entry {head.sequence}, which its head file remembers, got one that ends "
            f"with {chain.last_label}: restored from a backup, or cut off? {_REMEDY.capitalize()}."
        )
    elif head.digest != chain.digest_of(head.sequence):
        raise LedgerError(
            f"Expected the ledger's entry {head.sequence} to be the one that its head file remembers, got another: "
            f"the database or the head file was exchanged; {_REMEDY}."
        )
