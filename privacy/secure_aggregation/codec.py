"""One form for every message: a frozen dataclass whose fields say how they stand in bytes.

A field is annotated ``Annotated[type, codec]``; the bytes of a message are its fields, framed, in their order.
Reading checks the whole form, down to lengths, so that whoever holds a message holds one that is well formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, get_args, get_type_hints

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.framing import frame, names, number, read_names, read_number, unframe

T = TypeVar("T")


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How a value stands in bytes; ``read`` raises :class:`~medfed.errors.SecureAggregationError`."""

    write: Callable[[T], bytes]
    read: Callable[[bytes], T]


class WireMessage:
    """Base of messages."""

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        return frame(*(codec.write(getattr(self, name)) for name, codec in _codecs(type(self)).items()))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The message in ``data``.

        Raises:
            SecureAggregationError: if the bytes are not exactly one message of this kind.
        """
        codecs = _codecs(cls)
        fields = unframe(data, len(codecs))
        return cls(*(codec.read(field) for codec, field in zip(codecs.values(), fields, strict=True)))


_known: dict[type[WireMessage], dict[str, Codec[Any]]] = {}


def _codecs(message: type[WireMessage]) -> dict[str, Codec[Any]]:
    if message not in _known:
        hints = get_type_hints(message, include_extras=True)
        _known[message] = {name: get_args(hint)[1] for name, hint in hints.items()}
    return _known[message]


def _read_site(field: bytes) -> str:
    (site,) = read_names(frame(field))
    return site


BYTES: Codec[bytes] = Codec(bytes, bytes)
"""Any bytes."""

NUMBER: Codec[int] = Codec(number, read_number)
"""0 <= value < 2**64."""

SITE: Codec[str] = Codec(str.encode, _read_site)
"""The name of one site."""

SITES: Codec[tuple[str, ...]] = Codec(names, read_names)
"""Names of sites, each once."""


def sized(length: int, what: str) -> Codec[bytes]:
    """Bytes of this length."""

    def read(field: bytes) -> bytes:
        if len(field) != length:
            raise SecureAggregationError(f"Expected {what} of {length} bytes, got {len(field)}.")
        return field

    return Codec(bytes, read)


def many(codec: Codec[T]) -> Codec[tuple[T, ...]]:
    """Any number of values, framed one by one."""
    return Codec(
        lambda values: frame(*(codec.write(value) for value in values)),
        lambda field: tuple(codec.read(one) for one in unframe(field)),
    )


M = TypeVar("M", bound=WireMessage)


def nested(message: type[M]) -> Codec[M]:
    """A message inside a message."""
    return Codec(WireMessage.to_bytes, message.parse)
