"""One byte string for one value: canonical JSON, and the digests made from it.

A digest is only as good as its bytes: keys are sorted, no white space, UTF-8, no NaN or infinity. Two
processes, on any machine, get the same bytes for equal values.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_bytes(value: Any) -> bytes:
    """The canonical JSON of a value made of dicts, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON cannot carry.
    """
    return _canonical_text(value).encode("utf-8")


_canonical_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def derive_seed(root_seed: int, *labels: str | int) -> int:
    """A seed in [0, 2**63) that is fixed by ``root_seed`` and the labels, and by nothing else.

    Different labels give independent seeds (SHA-256 of the canonical JSON), so the order in which sites
    train, or how many workers there are, cannot change what any of them draws. For simulation and
    initialisation only: never for noise, masks or keys, which come from the operating system.
    """
    digest = hashlib.sha256(canonical_bytes([root_seed, *labels])).digest()
    return int.from_bytes(digest[:8], "big") >> 1
