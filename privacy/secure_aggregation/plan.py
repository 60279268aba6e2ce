"""What the sites of a study agree on before anything is summed: who takes part, and how many must."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from medfed.consortium import Quorum
from medfed.errors import SecureAggregationError
from medfed.study import StudyConfig
from privacy.secure_aggregation.framing import digest, frame, number
from privacy.secure_aggregation.identity import Member


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
        SecureAggregationError: if the numbers contradict each other (:class:`medfed.consortium.Quorum`), or two
            members share a name or a key.
    """

    study_digest: bytes
    scope: str
    members: tuple[Member, ...]
    threshold: int
    max_colluding: int
    min_sites: int
    rounds_per_epoch: int

    def __post_init__(self) -> None:
        Quorum(
            num_sites=len(self.members),
            max_colluding=self.max_colluding,
            threshold=self.threshold,
            min_sites=self.min_sites,
        )
        for what in ("site", "signing_key"):
            if len({getattr(member, what) for member in self.members}) < len(self.members):
                raise SecureAggregationError(
                    f"Expected members with a {what} of their own, got one twice: one site would count as two; "
                    "correct the study."
                )
        if not 1 <= self.rounds_per_epoch <= 1024:
            raise SecureAggregationError(
                f"Expected rounds_per_epoch in 1..1024, got {self.rounds_per_epoch}; 32 suits most studies."
            )

    @classmethod
    def of_study(cls, study: StudyConfig, scope: str) -> SecureAggregationPlan:
        """The plan that a resolved study with secure aggregation stands for; the same at every site.

        Raises:
            SecureAggregationError: if the study names no keys for a site.
            StudyError: if secure aggregation is not enabled.
        """
        quorum, secure = study.secure_quorum, study.secure_aggregation
        assert secure is not None
        members = []
        for site in study.sites:
            if site.signing_key is None:
                raise SecureAggregationError(
                    f"Expected signing_key of site {site.name!r} in the study, got none; ask the site for the public "
                    "key of its identity."
                )
            members.append(Member(site.name, bytes.fromhex(site.signing_key)))
        return cls(
            study_digest=bytes.fromhex(study.digest),
            scope=scope,
            members=tuple(members),
            threshold=quorum.threshold,
            max_colluding=quorum.max_colluding,
            min_sites=quorum.min_sites,
            rounds_per_epoch=secure.rounds_per_epoch,
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the plan; in every key and every signature of the protocol."""
        members = [frame(member.site.encode(), member.signing_key) for member in self.members]
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
