"""Names in a sentence."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; there is at least one."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
