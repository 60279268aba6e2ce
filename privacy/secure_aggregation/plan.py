"""What the sites of a study agree on before anything is summed: who takes part, and how many must."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.framing import digest, frame, number
from privacy.secure_aggregation.identity import Member

MAX_SITES = 128
"""Every pair of sites shares a mask: beyond this the work per site calls for a sparser graph."""


def smallest_threshold(num_sites: int, max_colluding: int) -> int:
    """The smallest t with 2 t > n + c: two different sets of survivors cannot both get t votes."""
    return (num_sites + max_colluding) // 2 + 1


def smallest_sum(threshold: int, max_colluding: int) -> int:
    """The fewest sites that may be summed, max(t, c + 2): at least two honest ones, so that no one is alone."""
    return max(threshold, max_colluding + 2)


def check_numbers(*, num_sites: int, max_colluding: int, threshold: int, min_sites: int) -> None:
    """Refuse numbers with which the protocol promises nothing, or can never finish.

    Raises:
        SecureAggregationError: names the inequality, the numbers, and the nearest valid value.
    """
    n, c, t, k = num_sites, max_colluding, threshold, min_sites
    if not 3 <= n <= MAX_SITES:
        raise SecureAggregationError(
            f"Expected 3 to {MAX_SITES} sites, got {n}; with two, each knows the other's update from the sum."
        )
    if c < 0:
        raise SecureAggregationError(f"Expected max_colluding >= 0, got {c}; 0 means that no site helps the server.")
    if c + 2 > n:
        raise SecureAggregationError(
            f"Expected max_colluding c with c + 2 <= n = {n} sites, got {c}; set max_colluding to at most {n - 2}."
        )
    least = smallest_threshold(n, c)
    if 2 * t <= n + c:
        raise SecureAggregationError(
            f"Expected threshold t with 2 t > n + c = {n} + {c}, got {t}: two sets of survivors could both be opened; "
            f"set threshold to at least {least}, or max_colluding to at most {max(0, 2 * t - n - 1)}."
        )
    if t > n:
        raise SecureAggregationError(
            f"Expected threshold t <= n = {n} sites, got {t}: no round could end; set threshold to {least}..{n}."
        )
    if k < smallest_sum(t, c):
        raise SecureAggregationError(
            f"Expected min_sites >= max(threshold, max_colluding + 2) = max({t}, {c + 2}), got {k}; set min_sites to "
            f"at least {smallest_sum(t, c)}."
        )
    if k > n:
        raise SecureAggregationError(
            f"Expected min_sites <= n = {n} sites, got {k}: no round could end; set min_sites to "
            f"{smallest_sum(t, c)}..{n}."
        )


@dataclass(frozen=True, kw_only=True)
class SecureAggregationPlan:
    """The agreement of a consortium; every site computes it from the study that its hospital approved.

    Guarantee (Bonawitz et al. 2017, "Practical Secure Aggregation", section 6, malicious server): as long as at
    most ``max_colluding`` sites collude with it, the server learns of a round at most the sum over one set of at
    least ``min_sites`` sites, of which at least ``min_sites - max_colluding`` are honest. Nothing is promised
    about availability: the server can always make a round fail. Not formally verified or audited.

    Attributes:
        study_digest: SHA-256 of the resolved study, 32 bytes; covers the weights and encodings of what is summed.
        scope: the federation inside the study.
        members: the sites, in the order of the study; 3 to 128.
        threshold: t, sites that must vote for one set of survivors, and shares that open a secret.
        max_colluding: c, sites that may be corrupt and share everything with the server.
        min_sites: k, sites in a sum at least.
        rounds_per_epoch: sums that one setup serves.

    Raises:
        SecureAggregationError: see :func:`check_numbers`; also if two members share a name or a key.
    """

    study_digest: bytes
    scope: str
    members: tuple[Member, ...]
    threshold: int
    max_colluding: int
    min_sites: int
    rounds_per_epoch: int

    def __post_init__(self) -> None:
        check_numbers(
            num_sites=len(self.members),
            max_colluding=self.max_colluding,
            threshold=self.threshold,
            min_sites=self.min_sites,
        )
        for what in ("site", "signing_key", "box_key"):
            if len({getattr(member, what) for member in self.members}) < len(self.members):
                raise SecureAggregationError(
                    f"Expected members with a {what} of their own, got one twice: one site would count as two; "
                    "correct the study."
                )
        if not 1 <= self.rounds_per_epoch <= 1024:
            raise SecureAggregationError(
                f"Expected rounds_per_epoch in 1..1024, got {self.rounds_per_epoch}; 32 suits most studies."
            )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the plan; in every key and every signature of the protocol."""
        members = [frame(member.site.encode(), member.signing_key, member.box_key) for member in self.members]
        numbers = (self.threshold, self.max_colluding, self.min_sites, self.rounds_per_epoch)
        return digest("plan", self.study_digest, self.scope.encode(), frame(*members), *map(number, numbers))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names of the members, in order."""
        return tuple(member.site for member in self.members)

    def member(self, site: str) -> Member:
        """The member of that name.

        Raises:
            SecureAggregationError: if there is none.
        """
        return self.members[self.index(site)]

    def index(self, site: str) -> int:
        """Where a site stands among the members, from 0.

        Raises:
            SecureAggregationError: if it is no member.
        """
        if site not in self.sites:
            raise SecureAggregationError(f"Expected a member of the study, got {site!r}.")
        return self.sites.index(site)

    def point(self, site: str) -> int:
        """Where the polynomials are evaluated for a site's shares: 1, 2, ... in the order of the members."""
        return self.index(site) + 1

    def in_order(self, sites: frozenset[str] | set[str]) -> tuple[str, ...]:
        """The sites in the order of the members."""
        return tuple(site for site in self.sites if site in sites)
