"""What server and site say to each other: one header, at most one adapter payload, and what is said under masks.

These are typed views; Flower carries them as one ``ConfigRecord`` of scalars. A header is JSON of a pydantic
model that refuses unknown fields, so a field that nobody agreed on cannot ride along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import MedfedError, MessageError
from medfed.study_sections import Digest, Name

RECORD_KEY = "medfed"
"""The only record in a message of ours."""

Fields = dict[str, str | bytes]
"""What a message is on the wire: ``header`` (JSON) and byte fields."""

MAX_MESSAGE_BYTES = 256 * 2**20
"""No message is larger, and neither end keeps more (one part more while it comes): 64 million numbers.

A study that needs more cannot be signed."""

MESSAGE_FRAME_BYTES = 2**16
"""Room for what Flower puts around a part of a message."""

MAX_ENVELOPE_BYTES = 4 * 2**20
"""Of what is no part of a message: ids, states, and what is said of a message before its parts are asked for."""

MAX_MESSAGE_PARTS = 16
"""Flower takes a message apart: one of ours into the message, its records, and our record."""

INSTRUCTION_FIELDS = ("header", "study", "adapter", "broadcast", "secure")
REPLY_FIELDS = ("header", "adapter", "secure")


_TOLD_CHARACTERS = 200


def told(text: str, *, most: int = _TOLD_CHARACTERS) -> str:
    """What the other side of the network said, fit for log and terminal: one printable line of ``most`` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _is_told(text: str) -> str:
    if told(text) != text:
        raise ValueError(f"expected one printable line of at most {_TOLD_CHARACTERS} characters")
    return text


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the header of a message.

        Raises:
            MessageError: if it is missing or not exactly this header.
        """
        header = fields.get("header")
        if not isinstance(header, str):
            raise MessageError(f"Expected a text header for {cls.__name__}, got {type(header).__name__}.")
        try:
            return cls.model_validate_json(header)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = told(".".join(map(str, first["loc"])))
            raise MessageError(f"Expected a valid {cls.__name__}, got {where or 'header'}: {first['msg']}.") from None


class RoundInstruction(_Header):
    """What a site is asked to do.

    Attributes:
        study_digest: digest of the study bytes that travel along; a site trains only for a study it knows.
        round: 1-based; 0 stands for the state before the first round.
        attempt: 1-based; the same (study, round, attempt) gets the same reply.
        scope: name of the federation inside a simulation (``federated``, ``pooled``, ``local-<site>``), part
            of what seeds the data order.
    """

    study_digest: Digest
    round: Annotated[int, Field(ge=0)]
    attempt: Annotated[int, Field(ge=1)] = 1
    scope: Name = "federated"

    def to_fields(self, *, study: bytes, adapter: bytes, broadcast: bytes = b"", secure: bytes = b"") -> Fields:
        """The message: header, canonical study bytes, and payloads that may be empty.

        Args:
            study: canonical bytes.
            adapter: payload of the global adapter.
            broadcast: payload of what the strategy tells beside it.
            secure: secure-aggregation message.
        """
        return {
            "header": self.model_dump_json(),
            "study": study,
            "adapter": adapter,
            "broadcast": broadcast,
            "secure": secure,
        }


class Refusal(_Header):
    """Why a site did not do what it was asked.

    Attributes:
        kind: class name of the error.
        reason: its public sentence, which names no file and no patient.
    """

    kind: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
    reason: Annotated[str, AfterValidator(_is_told)]

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """The refusal that may travel for ``error``: nothing of its text."""
        public = error.public if isinstance(error, MedfedError) else MedfedError.public
        return cls(kind=type(error).__name__, reason=public)


class RoundReply(_Header):
    """What a site answers.

    Attributes:
        site: name of the site.
        study_digest: of the study it worked for.
        round: as asked.
        attempt: as asked.
        num_examples: images used for training or evaluation; the public size of the site's cohort where the true
            one is private, nothing where only sums are told.
        metrics: finite numbers only, under the names of the study's task (the server refuses others); what
            cannot be computed is left out.
        epsilon: spent by this study on the site's cohort so far, retries included, as the site's ledger has it; told
            by real sites that spend.
        refusal: set when nothing was done; then there is no payload.
    """

    site: Name
    study_digest: Digest
    round: Annotated[int, Field(ge=0)]
    attempt: Annotated[int, Field(ge=1)]
    num_examples: Annotated[int, Field(ge=0, le=10**9)] = 0
    metrics: Annotated[dict[str, float], Field(max_length=1000)] = {}
    epsilon: Annotated[float, Field(ge=0)] | None = None
    refusal: Refusal | None = None

    def to_fields(self, *, adapter: bytes = b"", secure: bytes = b"") -> Fields:
        """The message: header, adapter payload and secure-aggregation message (may be empty)."""
        return {"header": self.model_dump_json(), "adapter": adapter, "secure": secure}


def model_digest(adapter: bytes, broadcast: bytes) -> bytes:
    """SHA-256 of what a site was sent to put into the model: both payloads, each by its own digest."""
    return hashlib.sha256(hashlib.sha256(adapter).digest() + hashlib.sha256(broadcast).digest()).digest()


def exact_fields(record: Mapping[str, object], names: Collection[str]) -> Fields:
    """The fields of a record that holds text or bytes under exactly these names.

    Raises:
        MessageError: if a name is missing or strange, or a value is neither text nor bytes.
    """
    fields: Fields = {name: value for name, value in record.items() if isinstance(value, (str, bytes))}
    if set(fields) != set(names) or len(fields) != len(record):
        raise MessageError(f"Expected text or bytes as {', '.join(names)}, got other fields.")
    return fields


def bytes_field(fields: Fields, name: str) -> bytes:
    """A byte field of a message.

    Raises:
        MessageError: if it is missing or not bytes.
    """
    value = fields.get(name)
    if not isinstance(value, bytes):
        raise MessageError(f"Expected field {name!r} as bytes, got {type(value).__name__}.")
    return value


Action = Literal[
    "describe", "train", "evaluate", "secure_advertise", "secure_setup", "secure_accept", "secure_vote", "secure_open"
]
"""``describe``: who are you and is your cohort in order; then ``train`` and ``evaluate``. With secure aggregation
``advertise``, ``setup`` and ``accept`` come before an epoch of rounds, ``vote`` (if a site is missing) and ``open``
after each."""
