r"""A file of a small JSON header and named bytes, that says whether it is whole: no pickle, nothing to execute.

::

    b"medfed framed 1\n"     what it is
    32 bytes                 SHA-256 of all that follows
    8 bytes                  length of the header, big-endian
    header                   canonical JSON: {"facts": {...}, "sizes": [[name, size], ...]}
    bytes                    one after the other, in the order of "sizes"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from medfed.canonical import canonical_bytes

_MAGIC = b"medfed framed 1\n"
_DIGEST_BYTES = 32
_LENGTH_BYTES = 8


class DamagedFileError(ValueError):
    """Bytes that are not a framed file, or not a whole one."""


def pack(facts: Mapping[str, Any], blobs: Mapping[str, bytes]) -> bytes:
    """The bytes of a framed file.

    Args:
        facts: what canonical JSON can carry.
        blobs: by name.
    """
    header = canonical_bytes({"facts": dict(facts), "sizes": [[name, len(blob)] for name, blob in blobs.items()]})
    body = b"".join((len(header).to_bytes(_LENGTH_BYTES, "big"), header, *blobs.values()))
    return _MAGIC + hashlib.sha256(body).digest() + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and bytes of a framed file, exactly as they were packed.

    Raises:
        DamagedFileError: for anything that :func:`pack` did not make, or that was changed or cut short since.
    """
    start = len(_MAGIC) + _DIGEST_BYTES
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise DamagedFileError("Expected a whole file, got other bytes or a part of it.")
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    try:
        header = json.loads(body[_LENGTH_BYTES:end])
        facts, sizes = header["facts"], {str(name): int(size) for name, size in header["sizes"]}
        packed = canonical_bytes({"facts": facts, "sizes": [[name, size] for name, size in sizes.items()]})
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DamagedFileError(f"Expected a header, got {type(error).__name__}.") from None
    blobs: dict[str, bytes] = {}
    if packed != body[_LENGTH_BYTES:end] or not isinstance(facts, dict) or any(size < 0 for size in sizes.values()):
        raise DamagedFileError("Expected a header as it is packed, got another.")
    for name, size in sizes.items():
        blobs[name] = body[end : end + size]
        end += size
    if end != len(body):
        raise DamagedFileError("Expected bytes as long as the header says, got others.")
    return facts, blobs
