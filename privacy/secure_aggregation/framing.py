"""Length-prefixed byte strings: the only form in which secure aggregation hashes, signs and sends anything.

Two different lists of fields never have the same bytes, so nothing that was signed or hashed as one message can
be read as another. A field is preceded by its length in 4 bytes, numbers are 8 bytes, both big-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from medfed.errors import SecureAggregationError

_PROTOCOL = b"medfed secure aggregation v1"
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")


def frame(*fields: bytes) -> bytes:
    """The fields, each after its length."""
    return b"".join(part for field in fields for part in (_LENGTH.pack(len(field)), field))


def unframe(data: bytes, count: int | None = None) -> tuple[bytes, ...]:
    """The fields of :func:`frame`: exactly those, with nothing after them.

    Args:
        data: framed fields.
        count: how many there must be; None for any number.

    Raises:
        SecureAggregationError: if the bytes are cut short, or there are more or fewer fields.
    """
    fields, start = [], 0
    while start < len(data):
        end = start + _LENGTH.size
        if end > len(data):
            raise SecureAggregationError(f"Expected framed fields, got {len(data) - start} bytes after the last.")
        (length,) = _LENGTH.unpack_from(data, start)
        start, end = end, end + length
        if end > len(data):
            raise SecureAggregationError(f"Expected a field of {length} bytes, got only {len(data) - start}.")
        fields.append(data[start:end])
        start = end
    if count is not None and len(fields) != count:
        raise SecureAggregationError(f"Expected {count} fields, got {len(fields)}.")
    return tuple(fields)


def number(value: int) -> bytes:
    """A count or an index, 0 <= value < 2**64, in 8 bytes."""
    return _NUMBER.pack(value)


def read_number(field: bytes) -> int:
    """The number in a field.

    Raises:
        SecureAggregationError: if it does not have 8 bytes.
    """
    if len(field) != _NUMBER.size:
        raise SecureAggregationError(f"Expected a number in {_NUMBER.size} bytes, got {len(field)}.")
    value: int = _NUMBER.unpack(field)[0]
    return value


def names(sites: Iterable[str]) -> bytes:
    """Site names as one field."""
    return frame(*(site.encode() for site in sites))


def read_names(field: bytes) -> tuple[str, ...]:
    """The site names of a field.

    Raises:
        SecureAggregationError: if they are not text, or a name appears twice.
    """
    try:
        sites = tuple(name.decode() for name in unframe(field))
    except UnicodeDecodeError:
        raise SecureAggregationError("Expected names of sites, got bytes that are no text.") from None
    if len(set(sites)) != len(sites):
        raise SecureAggregationError(f"Expected each site once, got {', '.join(sites)}.")
    return sites


def digest(label: str, *fields: bytes) -> bytes:
    """SHA-256 of framed fields under a label, which says what they are."""
    return hashlib.sha256(labelled(label, *fields)).digest()


def labelled(label: str, *fields: bytes) -> bytes:
    """What is signed, or given to a key derivation: the protocol's name, a label, and the fields."""
    return frame(_PROTOCOL, label.encode(), *fields)
