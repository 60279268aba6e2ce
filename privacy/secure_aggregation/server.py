"""The server's side of secure aggregation: it relays setups, adds up masked vectors, and opens the sum.

Nothing here protects the sites, who do not believe it; what it checks, it checks for the sake of a right sum and
to say who is to blame when there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, islice

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.encoding import Ring, RingBits
from privacy.secure_aggregation.framing import names, number
from privacy.secure_aggregation.identity import gives_secrets
from privacy.secure_aggregation.masking import add_mask
from privacy.secure_aggregation.masks import add_pair_masks, own_mask_key
from privacy.secure_aggregation.messages import (
    SHARE_BYTES,
    Acceptance,
    Advertised,
    Masked,
    OpenRequest,
    Relay,
    RelayedSetup,
    Roster,
    RoundStart,
    Setup,
    SetupBody,
    Shares,
    Upload,
    Vote,
    VoteRequest,
)
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.shamir import reconstruct

MAX_SUBSETS = 4096
"""Sets of shares that are tried before a secret is given up, when some share is bad."""

_RAW_PUBLIC = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@dataclass(frozen=True)
class Epoch:
    """Setups that serve ``rounds_per_epoch`` sums.

    Attributes:
        plan: of the consortium.
        number: of the epoch.
        setups: of each site that takes part, in the order of the members.
        body_digests: SHA-256 of each setup's body.
        complaints: sites that were complained about, and by whom.
    """

    plan: SecureAggregationPlan
    number: int
    setups: Mapping[str, SetupBody]
    body_digests: Mapping[str, bytes]
    complaints: Mapping[str, tuple[str, ...]]

    def start(self, slot: int, *, channel: bytes, model: bytes, sites: Sequence[str]) -> RoundStart:
        """The start of a round over some of the epoch's sites."""
        in_order = self.plan.in_order(set(sites))
        return RoundStart(self.plan.digest, self.number, slot, channel, model, in_order)


class SetupPhase:
    """Collects the setups of an epoch and hands each site its boxes."""

    def __init__(self, plan: SecureAggregationPlan, epoch: int) -> None:
        self._plan = plan
        self._epoch = epoch
        self._advertised: dict[str, Advertised] = {}
        self._roster: Roster | None = None
        self._setups: dict[str, Setup] = {}
        self._bodies: dict[str, SetupBody] = {}
        self._accepted: dict[str, tuple[str, ...]] = {}
        self._is_closed = False

    def advertise(self, advertised: Advertised) -> None:
        """Take a site's key.

        Raises:
            SecureAggregationError: if it is not this epoch's, not signed by the member it names, of small order, or
                too late: the roster was made.
        """
        fields = Advertised.signed_fields(self._plan.digest, self._epoch, advertised.box_key)
        if self._roster is not None:
            raise SecureAggregationError(f"Expected keys before the roster was made, got {advertised.site!r} late.")
        if (advertised.plan, advertised.epoch) != (self._plan.digest, self._epoch) or not self._plan.member(
            advertised.site
        ).has_signed(advertised.signature, "advertised", *fields):
            raise SecureAggregationError(
                f"Expected a key that {advertised.site!r} signed for epoch {self._epoch}, got another."
            )
        if not gives_secrets(advertised.box_key):
            raise SecureAggregationError(
                f"Expected a key of {advertised.site!r} that gives secrets, got one of small order; leave it out."
            )
        self._advertised[advertised.site] = advertised

    @property
    def roster(self) -> Roster:
        """Who takes part; made when it is first asked for.

        Raises:
            SecureAggregationError: if fewer than ``min_sites`` do.
        """
        if len(self._advertised) < self._plan.min_sites:
            raise SecureAggregationError(
                f"Expected keys of at least {self._plan.min_sites} sites, got {len(self._advertised)}: "
                f"{', '.join(self._advertised)}; begin again when more sites are there."
            )
        if self._roster is None:
            in_order = tuple(self._advertised[site] for site in self._plan.in_order(set(self._advertised)))
            self._roster = Roster(self._plan.digest, self._epoch, in_order)
        return self._roster

    def add(self, setup: Setup) -> str:
        """Take a site's setup and return its name.

        Raises:
            SecureAggregationError: if it is not this epoch's, not signed by the member it names, a second one, or
                too late: setups were relayed.
        """
        plan, body = self._plan, SetupBody.parse(setup.body)
        if self._is_closed:
            raise SecureAggregationError(f"Expected setups before any was relayed, got that of {body.site!r} late.")
        member, roster, slots = plan.member(body.site), self.roster, plan.rounds_per_epoch
        got = (body.plan, body.epoch, body.roster, len(body.round_keys), len(body.commitments), len(setup.boxes))
        if body.site not in roster.sites or got != (
            plan.digest, self._epoch, roster.digest, slots, slots, len(roster.sites)
        ):  # fmt: skip
            raise SecureAggregationError(f"Expected a setup of {body.site!r} for epoch {self._epoch}, got another.")
        if body.site in self._bodies:
            raise SecureAggregationError(f"Expected one setup of {body.site!r}, got a second.")
        if not member.has_signed(setup.signature, "setup", setup.body):
            raise SecureAggregationError(f"Expected a setup that {body.site!r} signed, got another signature.")
        if body.box_digests != tuple(sha256(box).digest() for box in setup.boxes):
            raise SecureAggregationError(f"Expected the boxes that {body.site!r} signed, got others.")
        if not all(gives_secrets(key) for key in body.round_keys):
            raise SecureAggregationError(
                f"Expected round keys of {body.site!r} that give secrets, got one of small order: with it no site "
                "could mask; leave the site out."
            )
        self._setups[body.site], self._bodies[body.site] = setup, body
        return body.site

    def relay_to(self, site: str) -> Relay:
        """What a site is shown of all setups that were taken; no more are.

        Raises:
            SecureAggregationError: if fewer than ``min_sites`` sent one.
        """
        if len(self._setups) < self._plan.min_sites:
            raise SecureAggregationError(
                f"Expected setups of at least {self._plan.min_sites} sites, got {len(self._setups)}: "
                f"{', '.join(self._setups)}; begin again when more sites are there."
            )
        self._is_closed = True  # sites that were shown others would refuse every round
        index = self.roster.sites.index(site)
        ordered = self._plan.in_order(set(self._setups))
        setups = [self._setups[name] for name in ordered]
        relayed = tuple(RelayedSetup(setup.body, setup.signature, setup.boxes[index]) for setup in setups)
        return Relay(self._plan.digest, self._epoch, relayed)

    def accept(self, acceptance: Acceptance) -> None:
        """Take a site's acceptance and its complaints.

        Raises:
            SecureAggregationError: if it is for another epoch, the site did not sign it, or it sent no setup.
        """
        member = self._plan.member(acceptance.site)
        signed = (self._plan.digest, number(acceptance.epoch), names(acceptance.complaints))
        if acceptance.site not in self._bodies:
            raise SecureAggregationError(f"Expected {acceptance.site!r} to accept after its own setup, got none of it.")
        if acceptance.epoch != self._epoch or not member.has_signed(acceptance.signature, "acceptance", *signed):
            raise SecureAggregationError(f"Expected the acceptance of {acceptance.site!r}, got one it did not sign.")
        self._accepted[acceptance.site] = acceptance.complaints

    def finish(self) -> Epoch:
        """The epoch over all sites that accepted and that nobody complained about.

        Raises:
            SecureAggregationError: if fewer than ``min_sites`` are left; names the complaints.
        """
        complaints: dict[str, tuple[str, ...]] = {}
        for site, accused in self._accepted.items():
            for name in accused:
                complaints[name] = (*complaints.get(name, ()), site)
        sites = [site for site in self._plan.sites if site in self._accepted and site not in complaints]
        if len(sites) < self._plan.min_sites:
            by_whom = "; ".join(f"{name} (by {', '.join(by)})" for name, by in complaints.items())
            raise SecureAggregationError(
                f"Expected at least {self._plan.min_sites} sites that accepted the setups, got {len(sites)}"
                f"{f'; complaints about {by_whom}' if by_whom else ''}; begin again when more sites are there."
            )
        return Epoch(
            self._plan,
            self._epoch,
            {site: self._bodies[site] for site in sites},
            {site: sha256(self._setups[site].body).digest() for site in sites},
            complaints,
        )


class SecureSum:
    """One round: adds up masked vectors, agrees with the sites on who survived, and opens the sum.

    Args:
        epoch: whose keys serve the round.
        start: of the round, as it is sent.
        num_elements: of every vector.
        ring_bits: of every element.
    """

    def __init__(self, epoch: Epoch, start: RoundStart, *, num_elements: int, ring_bits: RingBits = 32) -> None:
        self.start = start
        self._epoch = epoch
        self._plan = epoch.plan
        self._round_id = start.round_id(tuple(epoch.body_digests[site] for site in start.sites))
        self._total_P: Ring = (
            np.zeros(num_elements, np.uint32) if ring_bits == 32 else np.zeros(num_elements, np.uint64)
        )
        self._uploads: dict[str, Upload] = {}
        self._closed = False
        self._votes: dict[str, Vote] = {}
        self._shares: dict[str, Shares] = {}

    def add(self, masked: Masked) -> None:
        """Add a site's masked vector to the sum.

        Raises:
            SecureAggregationError: if it is not for this round, not signed by a site of it, of another length, a
                second one, or too late: the survivors were named.
        """
        if self._closed:
            raise SecureAggregationError(f"Expected vectors before the survivors were named, got {masked.site!r} late.")
        if masked.site not in self.start.sites or masked.site in self._uploads:
            raise SecureAggregationError(f"Expected one vector of each site of the round, got one of {masked.site!r}.")
        fields = Masked.signed_fields(self._round_id, masked.vector)
        if masked.round_id != self._round_id or not self._plan.member(masked.site).has_signed(
            masked.signature, "masked", *fields
        ):
            raise SecureAggregationError(f"Expected a vector that {masked.site!r} signed for this round, got another.")
        if len(masked.vector) != self._total_P.nbytes:
            raise SecureAggregationError(
                f"Expected {self._total_P.nbytes} bytes of {masked.site!r}, got {len(masked.vector)}."
            )
        vector_P = np.frombuffer(masked.vector, dtype=self._total_P.dtype.newbyteorder("<"))
        np.add(self._total_P, vector_P, out=self._total_P)
        self._uploads[masked.site] = Upload(masked.site, fields[1], masked.signature)

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose vectors are in the sum, in order."""
        return self._plan.in_order(set(self._uploads))

    @property
    def needs_votes(self) -> bool:
        """Whether a site is missing, so that the others must agree on it first."""
        return self.survivors != self.start.sites

    def close(self) -> None:
        """Name the survivors: no vector is taken from here on.

        Raises:
            SecureAggregationError: if they are fewer than ``min_sites``: no site would help to open the sum.
        """
        self._closed = True
        if len(self._uploads) < self._plan.min_sites:
            missing = [site for site in self.start.sites if site not in self._uploads]
            raise SecureAggregationError(
                f"Expected vectors of at least {self._plan.min_sites} sites, got {len(self._uploads)}; missing: "
                f"{', '.join(missing)}. Nothing of the round can be opened; begin another."
            )

    def vote_request(self) -> VoteRequest:
        """M4b, to every site that is still there."""
        return VoteRequest(self.start, self.survivors)

    def add_vote(self, vote: Vote) -> None:
        """Take a vote.

        Raises:
            SecureAggregationError: if its site is not of the round, or did not vote for these survivors.
        """
        signed = (self._round_id, names(self.survivors))
        if (
            vote.site not in self.start.sites
            or vote.round_id != self._round_id
            or not self._plan.member(vote.site).has_signed(vote.signature, "vote", *signed)
        ):
            raise SecureAggregationError(f"Expected a vote of a site of the round, got none of {vote.site!r}.")
        self._votes[vote.site] = vote

    def open_request(self) -> OpenRequest:
        """M4a if nobody is missing, otherwise M5.

        Raises:
            SecureAggregationError: if fewer than ``threshold`` sites voted.
        """
        if not self.needs_votes:
            return OpenRequest(self.start, self.survivors)
        if len(self._votes) < self._plan.threshold:
            raise SecureAggregationError(
                f"Expected votes of at least {self._plan.threshold} sites, got {len(self._votes)}; nothing of the "
                "round can be opened. Begin another."
            )
        uploads = tuple(self._uploads[site] for site in self.survivors)
        return OpenRequest(self.start, self.survivors, tuple(self._votes.values()), uploads)

    def add_shares(self, shares: Shares) -> None:
        """Take a site's shares; whether they are right shows when the sum is opened.

        Raises:
            SecureAggregationError: if they are not for this round, or not signed by a site of it.
        """
        signed = (self._round_id, names(self.survivors), b"".join(shares.shares))
        if (
            shares.site not in self.start.sites
            or shares.round_id != self._round_id
            or len(shares.shares) != len(self.start.sites)
            or not self._plan.member(shares.site).has_signed(shares.signature, "shares", *signed)
        ):
            raise SecureAggregationError(f"Expected shares that {shares.site!r} signed for this round, got others.")
        self._shares[shares.site] = shares

    def opened(self) -> tuple[Ring, tuple[str, ...]]:
        """The exact sum of the survivors' vectors in the ring, and the sites that sent a bad share.

        Raises:
            SecureAggregationError: if fewer than ``threshold`` sites sent shares, or some secret cannot be had
                from any of them; names who is to blame as far as that can be told.
        """
        if len(self._shares) < self._plan.threshold:
            raise SecureAggregationError(
                f"Expected shares of at least {self._plan.threshold} sites, got {len(self._shares)}; nothing of the "
                "round can be opened. Begin another."
            )
        secrets, blamed = self._secrets()
        total_P = self._total_P.copy()
        survivors = self.survivors
        for site in survivors:
            add_mask(total_P, own_mask_key(secrets[site], self._round_id, site), negative=True)
        public_keys = {site: self._epoch.setups[site].round_keys[self.start.slot] for site in survivors}
        for site in self.start.sites:
            if site not in survivors:
                # What a missing site would have added is minus what the others added for it.
                add_pair_masks(
                    total_P,
                    site,
                    secrets[site],
                    public_keys,
                    sites=self.start.sites,
                    others=survivors,
                    round_id=self._round_id,
                )
        return total_P, blamed

    def _secrets(self) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """Of each site the seed of its own mask, or its round key, as its setup committed to; and bad sharers."""
        threshold, sites = self._plan.threshold, self.start.sites
        first = list(self._shares)[:threshold]
        together = self._reconstruct(first, slice(None))
        secrets = {site: together[place * SHARE_BYTES : (place + 1) * SHARE_BYTES] for place, site in enumerate(sites)}
        blamed: set[str] = set()
        for place, site in enumerate(sites):
            if not self._is_committed(site, secrets[site]):
                secrets[site], bad = self._secret_despite_bad_shares(site, place)
                blamed |= bad
        return secrets, self._plan.in_order(blamed)

    def _secret_despite_bad_shares(self, site: str, place: int) -> tuple[bytes, set[str]]:
        one = slice(place, place + 1)
        subsets = combinations(self._shares, self._plan.threshold)
        for subset in islice(subsets, MAX_SUBSETS):
            secret = self._reconstruct(list(subset), one)
            if self._is_committed(site, secret):
                return secret, {
                    other
                    for other in self._shares
                    if other not in subset
                    and self._reconstruct(list(subset), one, at=self._plan.point(other))
                    != self._shares[other].shares[place]
                }
        raise SecureAggregationError(
            f"Expected shares that open what site {site!r} committed to, got none among those of "
            f"{', '.join(self._shares)}: either {site!r} dealt bad shares, or too many of them sent bad ones. Nothing "
            "of the round can be opened; begin another without them."
        )

    def _reconstruct(self, sharers: list[str], places: slice, *, at: int = 0) -> bytes:
        shares = {
            self._plan.point(site): np.frombuffer(b"".join(self._shares[site].shares[places]), dtype=np.uint8)
            for site in sharers
        }
        return reconstruct(shares, at=at).tobytes()

    def _is_committed(self, site: str, secret: bytes) -> bool:
        setup, slot = self._epoch.setups[site], self.start.slot
        if site in self._uploads:
            return sha256(secret).digest() == setup.commitments[slot]
        key = X25519PrivateKey.from_private_bytes(secret).public_key()
        return key.public_bytes(*_RAW_PUBLIC) == setup.round_keys[slot]
