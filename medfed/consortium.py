"""How many sites secure aggregation needs: the inequalities, and the nearest numbers that keep them.

With n sites, of which up to c may collude with the server, t votes and shares open a sum of at least k sites:

================  =====================================================================================
2 t > n + c       two different sets of survivors cannot both get t votes, though c sites vote twice
k >= max(t, c+2)  a sum holds at least two honest sites, so that no honest site is alone with the corrupt
c + 2 <= n        otherwise no k is small enough
================  =====================================================================================

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", section 6
(malicious server), for the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from medfed.errors import SecureAggregationError

MAX_SITES = 128
"""Every pair of sites shares a mask: beyond this the work per site calls for a sparser graph."""


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """The numbers of a consortium; they cannot contradict each other.

    Attributes:
        num_sites: n, sites of the study; 3 to 128.
        max_colluding: c, sites that may be corrupt and share everything with the server.
        threshold: t, votes for one set of survivors, and shares that open a secret.
        min_sites: k, sites in a sum at least.

    Raises:
        SecureAggregationError: names the inequality, the numbers, and the nearest valid value.
    """

    num_sites: int
    max_colluding: int
    threshold: int
    min_sites: int

    @classmethod
    def of(
        cls, *, num_sites: int, max_colluding: int, threshold: int | None = None, min_sites: int | None = None
    ) -> Quorum:
        """The numbers with what is not given at its least: t = floor((n + c) / 2) + 1, k = max(t, c + 2).

        Raises:
            SecureAggregationError: if they contradict each other.
        """
        t = _smallest_threshold(num_sites, max_colluding) if threshold is None else threshold
        k = max(t, max_colluding + 2) if min_sites is None else min_sites
        return cls(num_sites=num_sites, max_colluding=max_colluding, threshold=t, min_sites=k)

    def __post_init__(self) -> None:
        n, c, t, k = self.num_sites, self.max_colluding, self.threshold, self.min_sites
        if not 3 <= n <= MAX_SITES:
            raise SecureAggregationError(
                f"Expected 3 to {MAX_SITES} sites, got {n}; of two, each knows the other's update from the sum."
            )
        if c < 0:
            raise SecureAggregationError(
                f"Expected max_colluding >= 0, got {c}; 0 means that no site helps the server."
            )
        if c + 2 > n:
            raise SecureAggregationError(
                f"Expected max_colluding c with c + 2 <= n = {n} sites, got {c}; set max_colluding to at most {n - 2}."
            )
        least = _smallest_threshold(n, c)
        if 2 * t <= n + c:
            most_colluding = 2 * t - n - 1
            instead = f", or max_colluding to at most {most_colluding}" if most_colluding >= 0 else ""
            raise SecureAggregationError(
                f"Expected threshold t with 2 t > n + c = {n} + {c}, got {t}: two sets of survivors could both be "
                f"opened; set threshold to at least {least}{instead}."
            )
        if t > n:
            raise SecureAggregationError(
                f"Expected threshold t <= n = {n} sites, got {t}: no round could end; set threshold to {least}..{n}."
            )
        fewest = max(t, c + 2)
        if k < fewest:
            raise SecureAggregationError(
                f"Expected min_sites >= max(threshold, max_colluding + 2) = max({t}, {c + 2}), got {k}; set min_sites "
                f"to at least {fewest}."
            )
        if k > n:
            raise SecureAggregationError(
                f"Expected min_sites <= n = {n} sites, got {k}: no round could end; set min_sites to {fewest}..{n}."
            )

    @property
    def min_honest(self) -> int:
        """H = k - c, honest sites in a sum at least: as many shares of noise hide what is summed."""
        return self.min_sites - self.max_colluding


def _smallest_threshold(num_sites: int, max_colluding: int) -> int:
    return (num_sites + max_colluding) // 2 + 1
