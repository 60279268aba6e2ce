"""What stands in a privacy ledger: charges, what became of them, and the bytes that are chained and signed.

An entry is a canonical-JSON body, the digest ``SHA-256(digest of the entry before || body)`` and an Ed25519
signature of that digest. The first entry opens the ledger and names its key; each later one reserves a
charge before training or settles it after. No entry says which patients were drawn, or how many.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medfed.canonical import canonical_bytes
from medfed.errors import PrivacyError
from medfed.study_sections import Digest
from privacy.accounting import Mechanism
from privacy.skellam_accounting import SkellamMechanism

Unit = Literal["patient", "record"]
Adjacency = Literal["add-remove"]
Outcome = Literal["sent", "failed"]

ChargedMechanism = Mechanism | SkellamMechanism
"""Noise that a site adds alone, or that sites share; each is told from the other by its fields."""

NO_DIGEST = bytes(32)
"""Stands for the digest before the first entry."""

_SIGNED = b"medfed privacy ledger entry v1\0"
"""Begins what is signed, so that no other signature of the site's key can pass for an entry's."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FACT = re.compile(r"[a-z][a-z0-9_]{0,62}")

_EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one piece of training on a cohort may spend. Everything here is public to the site's partners.

    Attributes:
        cohort: the patients, under the name that the hospital gave them; the same in every study.
        study: name of the study.
        study_digest: SHA-256 of the study, 64 hexadecimal digits.
        scope: federation inside the study.
        round: 0 or more; 0 for tuning runs and released metrics outside a round.
        mechanism: noise multiplier, sampling rate and steps (at least 1); with Skellam noise also the L2 bound in
            integers and the number of parameters.
        clip_norm: L2 bound of one unit's contribution, > 0.
        delta: for which the study states its epsilon, in (0, 1).
        unit: what is added or removed: a patient with all images, or a record.
        adjacency: the relation of neighbouring data sets.
        request_digest: SHA-256 of what was asked, 64 hexadecimal digits; a retry has the same.

    Raises:
        PrivacyError: if a value is not as stated.
    """

    __pydantic_config__ = _EXACT

    cohort: str
    study: str
    study_digest: str
    scope: str
    round: int
    mechanism: ChargedMechanism
    clip_norm: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    request_digest: str

    def __post_init__(self) -> None:
        for field in ("cohort", "study", "scope"):
            _require(_NAME.fullmatch(getattr(self, field)), f"a {field} named like 'chest-2024'", getattr(self, field))
        for field in ("study_digest", "request_digest"):
            _require(_DIGEST.fullmatch(getattr(self, field)), f"{field} as 64 hex digits", getattr(self, field))
        _require(self.round >= 0, "round >= 0", self.round)
        _require(self.mechanism.steps >= 1, "a charge of at least 1 step", self.mechanism.steps)
        _require(0 < self.clip_norm < math.inf, "clip_norm > 0 and finite", self.clip_norm)
        _require(0 < self.delta < 1, "0 < delta < 1", self.delta)
        _require(self.unit in ("patient", "record"), "unit 'patient' or 'record'", self.unit)
        _require(
            self.adjacency == "add-remove", "adjacency 'add-remove', for which epsilon is computed", self.adjacency
        )


@dataclass(frozen=True, kw_only=True)
class Cap:
    """What the hospital lets all studies together spend on a cohort.

    Attributes:
        epsilon: of all charges composed, > 0 and finite.
        delta: for which epsilon is computed, in (0, 1).
        unit: what epsilon protects.

    Raises:
        PrivacyError: if a value is not as stated.
    """

    __pydantic_config__ = _EXACT

    epsilon: float
    delta: float
    unit: Unit

    def __post_init__(self) -> None:
        _require(0 < self.epsilon < math.inf, "a cap of epsilon > 0 and finite", self.epsilon)
        _require(0 < self.delta < 1, "a cap with 0 < delta < 1", self.delta)
        _require(self.unit in ("patient", "record"), "a cap with unit 'patient' or 'record'", self.unit)


class _Body(BaseModel):
    """Attributes: sequence: 1, 2, 3, ...; time_ms: since 1970 in UTC, never less than in the entry before."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    sequence: int
    time_ms: int


class Opened(_Body):
    """The first entry of a ledger.

    Attributes:
        version: of the format.
        public_key: the only key whose signatures the ledger accepts, raw, as 64 hexadecimal digits.
        nonce: random, so that no two ledgers begin with the same digest.
    """

    kind: Literal["open"] = "open"
    version: Literal[1] = 1
    public_key: Digest
    nonce: Digest


class Reserved(_Body):
    """A charge, written before training; from then on it counts. The cap is the one it was held against."""

    kind: Literal["reserve"] = "reserve"
    charge: Charge
    cap: Cap


class Settled(_Body):
    """What became of a reservation; it counts in any case.

    Attributes:
        reservation: sequence of the entry that is settled.
        outcome: ``sent`` when there is a reply, ``failed`` when there is none.
        reply_digest: SHA-256 of the reply.
        facts: numbers for the hospital alone, such as the clip fraction.
    """

    kind: Literal["settle"] = "settle"
    reservation: int
    outcome: Outcome
    reply_digest: Digest | None
    facts: dict[str, float]


Body = Opened | Reserved | Settled

_BODY: TypeAdapter[Body] = TypeAdapter(Annotated[Body, Field(discriminator="kind")])


@dataclass(frozen=True)
class Entry:
    """One entry as it is stored.

    Attributes:
        sequence: where it stands.
        body: canonical JSON.
        digest: 32 bytes.
        signature: 64 bytes.
    """

    sequence: int
    body: bytes
    digest: bytes
    signature: bytes


def signed_entry(body: Body, previous_digest: bytes, key: Ed25519PrivateKey) -> Entry:
    """The entry that continues a chain whose last digest is ``previous_digest``.

    Raises:
        PrivacyError: if the body would be read back as another, which would end the chain for good.
    """
    data = canonical_bytes(body.model_dump(mode="json", warnings=False))
    _require(read_body(data) == body, "an entry that can be read back as it was written", data)
    digest = chained_digest(previous_digest, data)
    return Entry(body.sequence, data, digest, key.sign(_SIGNED + digest))


def chained_digest(previous_digest: bytes, body: bytes) -> bytes:
    """SHA-256 of the 32 bytes of the digest before, followed by the body."""
    return hashlib.sha256(previous_digest + body).digest()


def is_signed(entry: Entry, key: Ed25519PublicKey) -> bool:
    """Whether the entry's digest was signed, as an entry's digest, with this key."""
    try:
        key.verify(entry.signature, _SIGNED + entry.digest)
    except InvalidSignature:
        return False
    return True


def read_body(data: bytes) -> Body | None:
    """The body in ``data``; None if these bytes are no body of a known kind and version."""
    try:
        return _BODY.validate_json(data)
    except (ValidationError, PrivacyError, ValueError):
        return None


def checked_facts(facts: Mapping[str, float]) -> dict[str, float]:
    """The facts as plain floats.

    Raises:
        PrivacyError: if a name is not a lower-case identifier, or a value is not a finite number.
    """
    for name, value in facts.items():
        _require(_FACT.fullmatch(name), "facts named like 'clip_fraction'", name)
        _require(math.isfinite(value), f"a finite number as fact {name!r}", value)
    return {name: float(value) for name, value in facts.items()}


def _require(holds: object, expected: str, got: object) -> None:
    if not holds:
        raise PrivacyError(f"Expected {expected}, got {got!r}; correct it before it is charged.")
