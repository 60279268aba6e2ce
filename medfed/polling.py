"""How often to look for something that comes when it comes."""

from __future__ import annotations

SHORTEST_PAUSE_S = 0.05
_SHARE = 0.05


def pause_s(waited_s: float, longest_s: float) -> float:
    """Seconds until the next look: a twentieth of the wait so far, so that looking adds at most 5 % to any wait.

    Args:
        waited_s: since the last time that something came.
        longest_s: the pause of whoever has waited for long; at least :data:`SHORTEST_PAUSE_S`.
    """
    return min(longest_s, max(SHORTEST_PAUSE_S, _SHARE * waited_s))
