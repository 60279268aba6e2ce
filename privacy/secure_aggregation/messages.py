"""What site and server send each other. Each message is one byte string; whoever reads one checks its whole form.

======================  =================  ==========================================================
message                 from -> to         says
======================  =================  ==========================================================
:class:`Advertised`     site -> server     a new key, to which others seal what they send this site in an epoch
:class:`Roster`         server -> site     everybody's key of the epoch
:class:`Setup`          site -> server     keys and commitments of an epoch, and a sealed box per site
:class:`Relay`          server -> site     everybody's setup, each with the box for this site
:class:`Acceptance`     site -> server     the setups are in order, but for those complained about
:class:`RoundStart`     server -> site     what is summed next, and over whom
:class:`Masked`         site -> server     the masked vector
:class:`VoteRequest`    server -> site     these are the survivors: do you agree?
:class:`Vote`           site -> server     yes, and to no other set in this round
:class:`OpenRequest`    server -> site     these are the survivors, their votes, and proof that they uploaded
:class:`Shares`         site -> server     of a survivor a share of its own mask, of others of their key
======================  =================  ==========================================================
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

from privacy.secure_aggregation.codec import BYTES, NUMBER, SITE, SITES, WireMessage, many, nested, sized
from privacy.secure_aggregation.framing import digest, frame, number
from privacy.secure_aggregation.identity import KEY_BYTES, SIGNATURE_BYTES

SHARE_BYTES = 32
"""Bytes of a share: as many as the secret has, a round key or the seed of a site's own mask."""

DIGEST = sized(32, "a digest")
KEY = sized(KEY_BYTES, "a public key")
SHARE = sized(SHARE_BYTES, "a share")
SIGNATURE = sized(SIGNATURE_BYTES, "a signature")


@dataclass(frozen=True)
class Advertised(WireMessage):
    """M0. A site takes part in an epoch.

    Attributes:
        site: whose key.
        plan: digest of the plan.
        epoch: number of the epoch, larger than any before.
        box_key: X25519 public key of this epoch alone: with the private half everything that was sealed to it goes.
        signature: of all this.
    """

    site: Annotated[str, SITE]
    plan: Annotated[bytes, DIGEST]
    epoch: Annotated[int, NUMBER]
    box_key: Annotated[bytes, KEY]
    signature: Annotated[bytes, SIGNATURE]

    @staticmethod
    def signed_fields(plan: bytes, epoch: int, box_key: bytes) -> tuple[bytes, bytes, bytes]:
        """What the signature covers."""
        return plan, number(epoch), box_key


@dataclass(frozen=True)
class Roster(WireMessage):
    """Who takes part in an epoch, in the order of the members: the same for all, or no setup fits another."""

    plan: Annotated[bytes, DIGEST]
    epoch: Annotated[int, NUMBER]
    advertised: Annotated[tuple[Advertised, ...], many(nested(Advertised))]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the roster; in every setup and every box."""
        return digest("roster", self.to_bytes())

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(advertised.site for advertised in self.advertised)


@dataclass(frozen=True)
class SetupBody(WireMessage):
    """The signed part of a setup.

    Attributes:
        site: whose setup.
        plan: digest of the plan.
        epoch: number of the epoch.
        roster: digest of the roster that this site was shown.
        round_keys: an X25519 public key for each round of the epoch.
        commitments: SHA-256 of the seed of the site's own mask, for each round.
        box_digests: SHA-256 of each box, in the order of the roster.
    """

    site: Annotated[str, SITE]
    plan: Annotated[bytes, DIGEST]
    epoch: Annotated[int, NUMBER]
    roster: Annotated[bytes, DIGEST]
    round_keys: Annotated[tuple[bytes, ...], many(KEY)]
    commitments: Annotated[tuple[bytes, ...], many(DIGEST)]
    box_digests: Annotated[tuple[bytes, ...], many(DIGEST)]


@dataclass(frozen=True)
class Setup(WireMessage):
    """M1. Attributes: body: of a :class:`SetupBody`; signature: of the body; boxes: one per site of the roster."""

    body: Annotated[bytes, BYTES]
    signature: Annotated[bytes, SIGNATURE]
    boxes: Annotated[tuple[bytes, ...], many(BYTES)]


@dataclass(frozen=True)
class RelayedSetup(WireMessage):
    """A site's setup as another site gets it: with the one box that is for it."""

    body: Annotated[bytes, BYTES]
    signature: Annotated[bytes, SIGNATURE]
    box: Annotated[bytes, BYTES]


@dataclass(frozen=True)
class Relay(WireMessage):
    """Everybody's setup of one epoch, for one site."""

    plan: Annotated[bytes, DIGEST]
    epoch: Annotated[int, NUMBER]
    setups: Annotated[tuple[RelayedSetup, ...], many(nested(RelayedSetup))]


@dataclass(frozen=True)
class Acceptance(WireMessage):
    """A site has what it needs for an epoch.

    Attributes:
        site: who says so.
        epoch: of which epoch.
        complaints: sites whose box for this one held no shares; they cannot take part.
        signature: of all this, so that a complaint can be held against whoever makes it.
    """

    site: Annotated[str, SITE]
    epoch: Annotated[int, NUMBER]
    complaints: Annotated[tuple[str, ...], SITES]
    signature: Annotated[bytes, SIGNATURE]


@dataclass(frozen=True)
class RoundStart(WireMessage):
    """M2. What is summed in one round of an epoch.

    Attributes:
        plan: digest of the plan.
        epoch: number of the epoch.
        slot: which of the epoch's keys serve this round, 0, 1, ...; each is used once, ascending.
        channel: digest of all that is agreed about the vectors: purpose, round, length, encoding, weights.
        model: digest of the model that the sites were sent.
        sites: who may be summed, in the order of the members.
    """

    plan: Annotated[bytes, DIGEST]
    epoch: Annotated[int, NUMBER]
    slot: Annotated[int, NUMBER]
    channel: Annotated[bytes, DIGEST]
    model: Annotated[bytes, DIGEST]
    sites: Annotated[tuple[str, ...], SITES]

    def round_id(self, body_digests: tuple[bytes, ...]) -> bytes:
        """What binds every key, mask and vote of this round: the start, and the setups of its sites, in order.

        Sites that were shown different setups, models or plans compute different ids, so that their masks do
        not cancel and their votes do not add up.
        """
        return digest("round", self.to_bytes(), frame(*body_digests))


@dataclass(frozen=True)
class Masked(WireMessage):
    """M3. A site's masked vector.

    Attributes:
        site: whose.
        round_id: of the round.
        signature: of the round and SHA-256 of the vector: evidence, should the sum be disputed later.
        vector: ring elements, little-endian.
    """

    site: Annotated[str, SITE]
    round_id: Annotated[bytes, DIGEST]
    signature: Annotated[bytes, SIGNATURE]
    vector: Annotated[bytes, BYTES]

    @staticmethod
    def signed_fields(round_id: bytes, vector: bytes) -> tuple[bytes, bytes]:
        """What the signature covers."""
        return round_id, hashlib.sha256(vector).digest()


@dataclass(frozen=True)
class Upload(WireMessage):
    """Proof that a site masked a vector for a round, and so for no other of the same slot.

    Attributes:
        site: whose vector.
        vector_digest: SHA-256 of it.
        signature: of the :class:`Masked` message.
    """

    site: Annotated[str, SITE]
    vector_digest: Annotated[bytes, DIGEST]
    signature: Annotated[bytes, SIGNATURE]


@dataclass(frozen=True)
class VoteRequest(WireMessage):
    """Asks a site to vote for a set of survivors, in the order of the members."""

    start: Annotated[RoundStart, nested(RoundStart)]
    survivors: Annotated[tuple[str, ...], SITES]


@dataclass(frozen=True)
class Vote(WireMessage):
    """M4b. A site's only vote in a round: for this set of survivors. Attributes: site, round_id, signature."""

    site: Annotated[str, SITE]
    round_id: Annotated[bytes, DIGEST]
    signature: Annotated[bytes, SIGNATURE]


@dataclass(frozen=True)
class OpenRequest(WireMessage):
    """Asks for shares.

    Attributes:
        start: of the round.
        survivors: whose vectors are in the sum, in the order of the members. Without votes (M4a) they must be all
            sites of the round, with votes (M5) they may be fewer.
        votes: for these survivors; none in M4a.
        uploads: of each survivor, in their order, in M5: a survivor that masked its vector for another round of
            the slot would be stripped of its own mask, and of its pair masks with the missing, in that round.
    """

    start: Annotated[RoundStart, nested(RoundStart)]
    survivors: Annotated[tuple[str, ...], SITES]
    votes: Annotated[tuple[Vote, ...], many(nested(Vote))] = ()
    uploads: Annotated[tuple[Upload, ...], many(nested(Upload))] = ()


@dataclass(frozen=True)
class Shares(WireMessage):
    """What opens the sum, from one site.

    Attributes:
        site: whose shares these are.
        round_id: of the round.
        shares: for each site of the round in order: of a survivor the share of the seed of its own mask, of any
            other the share of its round key. Never both of one site.
        signature: of the above, so that a bad share can be held against whoever sent it.
    """

    site: Annotated[str, SITE]
    round_id: Annotated[bytes, DIGEST]
    shares: Annotated[tuple[bytes, ...], many(SHARE)]
    signature: Annotated[bytes, SIGNATURE]
