"""The site's side of secure aggregation: what it answers, and above all what it does not.

The server is not believed. Whatever it sends, in whatever order, repeated or not, over crashes and from several
processes at once, this site

* masks one vector in a slot of an epoch, ever;
* agrees to one set of survivors in a slot, ever, which has ``min_sites`` members or more;
* agrees to the same set whenever the same thing (channel) is summed again, in whatever slot or epoch;
* gives of each other site a share of its own mask's seed or of its round key, never of both;
* gives shares of round keys only when every survivor is proved to have masked its vector for this very round.

As two sets of survivors cannot both have ``threshold`` votes (2 t > n + c), round keys of one set of missing sites
are opened in a slot, at most, and never with the seed of the same site. The survivors, having masked for just
that round, share pair masks that nobody can open, so nothing but the sum over all of them can be computed. (Without
the proof, a site that was told of a smaller round, over itself, the corrupt and the missing, could be named a
survivor of a larger one: both its own mask and all its pair masks would be opened.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.codec import BYTES, SITE, SITES, WireMessage, many, nested, sized
from privacy.secure_aggregation.encoding import Ring
from privacy.secure_aggregation.framing import frame, names, number
from privacy.secure_aggregation.identity import KEY_BYTES, Identity, derived_key, gives_secrets, shared_secret
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.masking import add_mask
from privacy.secure_aggregation.masks import add_pair_masks, own_mask_key
from privacy.secure_aggregation.messages import (
    DIGEST,
    KEY,
    SHARE,
    SHARE_BYTES,
    Acceptance,
    Advertised,
    Masked,
    OpenRequest,
    Relay,
    Roster,
    RoundStart,
    Setup,
    SetupBody,
    Shares,
    Vote,
    VoteRequest,
)
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.shamir import split

ABANDONED_AFTER_S = 24 * 3600.0
"""Age at which the secrets of a round that was never opened are destroyed."""

_NONCE = bytes(12)  # every box has a key of its own
_RAW_PRIVATE = (serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
_RAW_PUBLIC = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@dataclass(frozen=True)
class _Dealt(WireMessage):
    """What a site knows of another for one slot."""

    site: Annotated[str, SITE]
    round_key: Annotated[bytes, KEY]
    key_share: Annotated[bytes, SHARE]
    seed_share: Annotated[bytes, SHARE]


@dataclass(frozen=True)
class _Own(WireMessage):
    """This site's private round key and the seed of its own mask, for one slot."""

    round_key: Annotated[bytes, sized(KEY_BYTES, "a private key")]
    seed: Annotated[bytes, sized(SHARE_BYTES, "a seed")]


@dataclass(frozen=True)
class _OwnEpoch(WireMessage):
    """What a site keeps from setup to acceptance: the body that it signed, for whom, and its secrets of each slot."""

    body: Annotated[bytes, BYTES]
    roster: Annotated[Roster, nested(Roster)]
    slots: Annotated[tuple[_Own, ...], many(nested(_Own))]


@dataclass(frozen=True)
class _SlotSecrets(WireMessage):
    """What a site keeps for one slot: its own secrets, and what each accepted site dealt to it, itself included."""

    own: Annotated[_Own, nested(_Own)]
    dealt: Annotated[tuple[_Dealt, ...], many(nested(_Dealt))]

    def by_site(self) -> dict[str, _Dealt]:
        """What was dealt, by who dealt it."""
        return {dealt.site: dealt for dealt in self.dealt}


@dataclass(frozen=True)
class _Accepted(WireMessage):
    """The setups that a site accepted: SHA-256 of each body."""

    sites: Annotated[tuple[str, ...], SITES]
    body_digests: Annotated[tuple[bytes, ...], many(DIGEST)]


class SecureClient:
    """One site in one plan. Stateless but for its journal: any process of the site may answer any message.

    Args:
        site: this site's name in the plan.
        identity: its keys, as the plan names them.
        plan: computed from the study that the hospital approved, never taken from a message.
        journal_folder: of this plan alone, on the site's own disk; in no backup.
        random_bytes: for keys, seeds and shares; the operating system's unless a test must repeat them.

    Raises:
        SecureAggregationError: if the plan has other keys for this site.
    """

    def __init__(
        self,
        site: str,
        identity: Identity,
        plan: SecureAggregationPlan,
        journal_folder: Path,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if plan.member(site) != identity.member(site):
            raise SecureAggregationError(
                f"Expected the study to name this site's own keys for {site!r}, got others: somebody else could speak "
                "for it; send the coordinator the keys of this site's identity."
            )
        self._site = site
        self._identity = identity
        self._plan = plan
        self._journal = Journal(journal_folder)
        self._random_bytes = random_bytes

    def advertise(self, epoch: int) -> Advertised:
        """A new key to which others can seal what they send this site in an epoch. Ends every earlier epoch.

        The private half is in the journal and nowhere else: a site that lost its journal cannot open what was sealed
        to it before, and so counts once, whatever it is asked afterwards.

        Raises:
            SecureAggregationError: if the epoch is not newer than any before.
            SiteError: if the journal cannot be written.
        """
        self._journal.forget_older_than(ABANDONED_AFTER_S)
        private_key = X25519PrivateKey.from_private_bytes(self._random_bytes(KEY_BYTES))
        box_key = private_key.public_key().public_bytes(*_RAW_PUBLIC)
        self._journal.begin_epoch(epoch, private_key.private_bytes(*_RAW_PRIVATE))
        fields = Advertised.signed_fields(self._plan.digest, epoch, box_key)
        signature = self._identity.sign("advertised", *fields)
        return Advertised(self._site, self._plan.digest, epoch, box_key, signature)

    def setup(self, roster: Roster) -> Setup:
        """New keys and seeds for every round of an epoch, shared out in boxes sealed to the roster; once in an epoch.

        Raises:
            SecureAggregationError: if the roster is for another plan, not in the order of the members, not signed by
                each, without this site's own key, or has fewer than ``min_sites``; or if this site shared out
                secrets before.
        """
        plan, epoch = self._plan, roster.epoch
        private_key = X25519PrivateKey.from_private_bytes(self._journal.own(epoch))
        self._check_roster(roster, private_key.public_key().public_bytes(*_RAW_PUBLIC))
        slots = range(plan.rounds_per_epoch)
        keys = [X25519PrivateKey.from_private_bytes(self._random_bytes(SHARE_BYTES)) for _ in slots]
        seeds = [self._random_bytes(SHARE_BYTES) for _ in slots]
        own = tuple(_Own(key.private_bytes(*_RAW_PRIVATE), seed) for key, seed in zip(keys, seeds, strict=True))
        flat = np.frombuffer(b"".join(one.round_key + one.seed for one in own), dtype=np.uint8)
        shares = split(
            flat,
            threshold=plan.threshold,
            points=[plan.point(site) for site in roster.sites],
            random_bytes=self._random_bytes,
        )
        boxes = tuple(
            self._cipher(private_key, other.box_key, roster, self._site, other.site).encrypt(
                _NONCE, share.tobytes(), None
            )
            for other, share in zip(roster.advertised, shares, strict=True)
        )
        body = SetupBody(
            site=self._site,
            plan=plan.digest,
            epoch=epoch,
            roster=roster.digest,
            round_keys=tuple(key.public_key().public_bytes(*_RAW_PUBLIC) for key in keys),
            commitments=tuple(sha256(seed).digest() for seed in seeds),
            box_digests=tuple(sha256(box).digest() for box in boxes),
        ).to_bytes()
        self._journal.deal(epoch, _OwnEpoch(body, roster, own).to_bytes())
        return Setup(body, self._identity.sign("setup", body), boxes)

    def accept(self, relay: Relay) -> Acceptance:
        """Check everybody's setup and keep what it deals to this site; once in an epoch.

        A box that its sender sealed wrongly is a complaint, and its sender takes part in no round here. Anything
        that only the server can have done is refused.

        Raises:
            SecureAggregationError: if the setups are not those of this epoch and plan, one is not signed by the
                member it names, this site's own is not there as it was sent, a member is there twice, or fewer
                than ``min_sites`` are left; or if setups were accepted before.
        """
        plan, epoch = self._plan, relay.epoch
        if relay.plan != plan.digest:
            raise SecureAggregationError("Expected setups for this site's plan, got some for another; check the study.")
        own = _OwnEpoch.parse(self._journal.dealt(epoch))
        private_key = X25519PrivateKey.from_private_bytes(self._journal.own(epoch))
        place = own.roster.sites.index(self._site)
        bodies: dict[str, SetupBody] = {}
        digests: dict[str, bytes] = {}
        opened: dict[str, bytes] = {}
        complaints = []
        for setup in relay.setups:
            body = SetupBody.parse(setup.body)
            self._check_setup(body, own.roster)
            if body.site in digests:
                raise SecureAggregationError(f"Expected one setup of site {body.site!r}, got two.")
            if not plan.member(body.site).has_signed(setup.signature, "setup", setup.body):
                raise SecureAggregationError(
                    f"Expected a setup signed by {body.site!r}, got another signature: somebody changed it on the way."
                )
            if body.site == self._site and setup.body != own.body:
                raise SecureAggregationError("Expected this site's own setup as it was sent, got another.")
            if sha256(setup.box).digest() != body.box_digests[place]:
                raise SecureAggregationError(
                    f"Expected the box that {body.site!r} sealed for this site, got another: it was changed on the way."
                )
            digests[body.site] = sha256(setup.body).digest()
            shares = self._unsealed(private_key, own.roster, body.site, setup.box)
            if shares is None:
                complaints.append(body.site)
            else:
                bodies[body.site], opened[body.site] = body, shares
        if self._site not in bodies:
            raise SecureAggregationError("Expected this site's own setup among those relayed, got none.")
        if len(bodies) < plan.min_sites:
            raise SecureAggregationError(
                f"Expected sound setups of at least {plan.min_sites} sites, got {len(bodies)}; wait for the others."
            )
        slots = {slot: _SlotSecrets(mine, _dealt(bodies, opened, slot)) for slot, mine in enumerate(own.slots)}
        known = _Accepted(tuple(bodies), tuple(digests[site] for site in bodies))
        secrets = {slot: secret.to_bytes() for slot, secret in slots.items()}
        self._journal.accept(epoch, known.to_bytes(), secrets)
        return Acceptance(
            self._site,
            epoch,
            tuple(complaints),
            self._identity.sign("acceptance", plan.digest, number(epoch), names(complaints)),
        )

    def check_start(self, start: RoundStart, *, channel: bytes, model: bytes) -> None:
        """Refuse a round before any work is done for it; :meth:`mask` refuses the same.

        Args:
            start: what the server says of the round.
            channel: digest of what this site knows is to be summed.
            model: digest of the model that this site was sent.

        Raises:
            SecureAggregationError: if anything differs, the slot was used, or fewer than ``min_sites`` are summed.
        """
        self._round_id(start)
        if start.channel != channel:
            raise SecureAggregationError(
                "Expected a round for the vectors that the study defines, got one for others; check the study."
            )
        if start.model != model:
            raise SecureAggregationError(
                "Expected the digest of the model that came with the round, got another: sites may have got different "
                "models."
            )
        if start.slot <= self._journal.last_masked(start.epoch):
            raise SecureAggregationError(
                f"Expected a slot after {self._journal.last_masked(start.epoch)}, got {start.slot}; a retry needs a "
                "new slot."
            )
        if self._journal.voted(start.epoch, start.slot) is not None:
            raise SecureAggregationError(
                f"Expected a slot in which this site has not voted, got {start.slot}: it was given up as lost there."
            )

    def mask(self, start: RoundStart, vector_P: Ring, *, channel: bytes, model: bytes) -> Masked:
        """The vector under masks; nothing of it can be told from what this returns. Once in a slot.

        Args:
            start: as for :meth:`check_start`.
            vector_P: ring elements; not changed.
            channel: as for :meth:`check_start`.
            model: as for :meth:`check_start`.

        Raises:
            SecureAggregationError: as :meth:`check_start`.
            SiteError: if the journal cannot be written.
        """
        self.check_start(start, channel=channel, model=model)
        round_id = self._round_id(start)
        secrets = self._secrets(start)
        masked_P = vector_P.copy()
        add_mask(masked_P, own_mask_key(secrets.own.seed, round_id, self._site))
        others = [site for site in start.sites if site != self._site]
        add_pair_masks(
            masked_P,
            self._site,
            secrets.own.round_key,
            {site: dealt.round_key for site, dealt in secrets.by_site().items()},
            sites=start.sites,
            others=others,
            round_id=round_id,
        )
        vector = masked_P.astype(masked_P.dtype.newbyteorder("<"), copy=False).tobytes()
        signature = self._identity.sign("masked", *Masked.signed_fields(round_id, vector))
        self._journal.mark_masked(start.epoch, start.slot, round_id)
        return Masked(self._site, round_id, signature, vector)

    def vote(self, request: VoteRequest) -> Vote:
        """This site's vote for a set of survivors: the only one in this slot, noted before it is given.

        Raises:
            SecureAggregationError: if the survivors are fewer than ``min_sites`` or no sites of the round, this
                site voted otherwise, or masked a vector for another round under the same slot.
        """
        round_id = self._agreed(request.start, request.survivors)
        return Vote(self._site, round_id, self._identity.sign("vote", round_id, names(request.survivors)))

    def open(self, request: OpenRequest) -> Shares:
        """Shares that open the sum over the survivors and nothing else; the round's secrets are destroyed.

        Raises:
            SecureAggregationError: if the survivors are not all sites of the round, and fewer than ``threshold``
                members voted for just them or one is not proved to have uploaded; and as :meth:`vote`.
        """
        start, survivors = request.start, request.survivors
        if survivors != start.sites or request.votes:
            self._check_votes(request)
            self._check_uploads(request)
        round_id = self._agreed(start, survivors)
        dealt = self._secrets(start).by_site()
        shares = tuple(dealt[site].seed_share if site in survivors else dealt[site].key_share for site in start.sites)
        signature = self._identity.sign("shares", round_id, names(survivors), b"".join(shares))
        self._journal.destroy(start.epoch, start.slot)
        return Shares(self._site, round_id, shares, signature)

    def _check_roster(self, roster: Roster, own_box_key: bytes) -> None:
        plan = self._plan
        if roster.plan != plan.digest or roster.sites != plan.in_order(set(roster.sites)):
            raise SecureAggregationError(
                "Expected a roster of this site's plan, each site once and in the order of the study, got another."
            )
        for advertised in roster.advertised:
            fields = Advertised.signed_fields(plan.digest, roster.epoch, advertised.box_key)
            if (advertised.plan, advertised.epoch) != (plan.digest, roster.epoch) or not plan.member(
                advertised.site
            ).has_signed(advertised.signature, "advertised", *fields):
                raise SecureAggregationError(
                    f"Expected a key that {advertised.site!r} signed for epoch {roster.epoch}, got another: somebody "
                    "changed it on the way."
                )
            if advertised.site == self._site and advertised.box_key != own_box_key:
                raise SecureAggregationError("Expected this site's own key as it was sent, got another.")
            if not gives_secrets(advertised.box_key):
                raise SecureAggregationError(
                    f"Expected a key of {advertised.site!r} that gives secrets, got one of small order; leave it out."
                )
        if self._site not in roster.sites or len(roster.sites) < plan.min_sites:
            raise SecureAggregationError(
                f"Expected a roster of at least {plan.min_sites} sites, this one among them, got "
                f"{len(roster.sites)}: {', '.join(roster.sites)}; wait for the others."
            )

    def _check_setup(self, body: SetupBody, roster: Roster) -> None:
        plan = self._plan
        if body.site not in roster.sites:
            raise SecureAggregationError(f"Expected setups of sites of the roster, got one of {body.site!r}.")
        got = (body.plan, body.epoch, body.roster, len(body.round_keys), len(body.commitments), len(body.box_digests))
        slots = plan.rounds_per_epoch
        if got != (plan.digest, roster.epoch, roster.digest, slots, slots, len(roster.sites)):
            raise SecureAggregationError(
                f"Expected a setup of site {body.site!r} for this plan, epoch and roster, got one for another."
            )

    def _cipher(
        self, private_key: X25519PrivateKey, public_key: bytes, roster: Roster, sender: str, receiver: str
    ) -> ChaCha20Poly1305:
        """What seals and opens the one box from a sender to a receiver under a roster."""
        context = (self._plan.digest, roster.digest, sender.encode(), receiver.encode())
        return ChaCha20Poly1305(derived_key(shared_secret(private_key, public_key), "box", *context))

    def _unsealed(self, private_key: X25519PrivateKey, roster: Roster, sender: str, box: bytes) -> bytes | None:
        """The shares in a box that is as its sender sealed it; None if the sender sealed no such thing."""
        public_key = roster.advertised[roster.sites.index(sender)].box_key
        try:
            shares = self._cipher(private_key, public_key, roster, sender, self._site).decrypt(_NONCE, box, None)
        except InvalidTag:
            return None
        return shares if len(shares) == 2 * SHARE_BYTES * self._plan.rounds_per_epoch else None

    def _round_id(self, start: RoundStart) -> bytes:
        """The id of a round, if it is one of this plan and epoch that this site may take part in."""
        plan = self._plan
        if start.plan != plan.digest:
            raise SecureAggregationError("Expected a round of this site's plan, got one of another; check the study.")
        if start.epoch != self._journal.newest_epoch():
            raise SecureAggregationError(
                f"Expected the newest epoch of this site, {self._journal.newest_epoch()}, got {start.epoch}; begin a "
                "newer epoch."
            )
        if not 0 <= start.slot < plan.rounds_per_epoch:
            raise SecureAggregationError(
                f"Expected a slot in 0..{plan.rounds_per_epoch - 1}, got {start.slot}; begin a newer epoch."
            )
        accepted = _Accepted.parse(self._journal.accepted(start.epoch))
        known = dict(zip(accepted.sites, accepted.body_digests, strict=True))
        if strange := [site for site in start.sites if site not in known]:
            raise SecureAggregationError(
                f"Expected sites whose setup this site accepted, got {strange[0]!r}; leave it out or begin a newer "
                "epoch."
            )
        if start.sites != plan.in_order(set(start.sites)):
            raise SecureAggregationError("Expected the sites of a round in the order of the study, got another order.")
        if self._site not in start.sites or len(start.sites) < plan.min_sites:
            raise SecureAggregationError(
                f"Expected a round of at least {plan.min_sites} sites, this one among them, got "
                f"{len(start.sites)}: {', '.join(start.sites)}; a smaller sum would tell too much."
            )
        return start.round_id(tuple(known[site] for site in start.sites))

    def _secrets(self, start: RoundStart) -> _SlotSecrets:
        return _SlotSecrets.parse(self._journal.secret(start.epoch, start.slot))

    def _agreed(self, start: RoundStart, survivors: tuple[str, ...]) -> bytes:
        """The id of the round, once it is noted that these are the survivors for this site, now and for ever."""
        round_id = self._round_id(start)
        if survivors != self._plan.in_order(set(survivors)) or not set(survivors) <= set(start.sites):
            raise SecureAggregationError(
                f"Expected survivors among the sites of the round, in the order of the study, got "
                f"{', '.join(survivors)}."
            )
        if len(survivors) < self._plan.min_sites:
            raise SecureAggregationError(
                f"Expected at least {self._plan.min_sites} survivors, got {len(survivors)}; a smaller sum would tell "
                "too much. Abandon the round and begin another."
            )
        masked = self._journal.masked(start.epoch, start.slot)
        if masked is not None and masked != round_id:
            raise SecureAggregationError(
                "Expected the round for which this site masked its vector, got another of the same slot."
            )
        self._secrets(start)  # whoever cannot answer does not vote either
        if not self._journal.agree(start.channel, names(survivors)):
            raise SecureAggregationError(
                f"Expected the survivors that this site agreed to when this was summed before, got "
                f"{', '.join(survivors)}: the difference of two sums would be one site's part. Go on to the next round."
            )
        vote = frame(round_id, names(survivors))
        is_first = self._journal.mark_voted(start.epoch, start.slot, vote)
        if not is_first and self._journal.voted(start.epoch, start.slot) != vote:
            raise SecureAggregationError(
                f"Expected the survivors that this site agreed to in slot {start.slot}, got others; it agrees to one "
                "set, once."
            )
        return round_id

    def _check_votes(self, request: OpenRequest) -> None:
        start, plan = request.start, self._plan
        round_id = self._round_id(start)
        voters = [vote.site for vote in request.votes]
        if len(set(voters)) < len(voters):
            raise SecureAggregationError("Expected one vote of each site, got two of one.")
        for vote in request.votes:
            if vote.site not in start.sites:
                raise SecureAggregationError(f"Expected votes of sites of the round, got one of {vote.site!r}.")
            if vote.round_id != round_id or not plan.member(vote.site).has_signed(
                vote.signature, "vote", round_id, names(request.survivors)
            ):
                raise SecureAggregationError(
                    f"Expected a vote of {vote.site!r} for these survivors, got one that it did not give."
                )
        if len(voters) < plan.threshold:
            raise SecureAggregationError(
                f"Expected votes of at least {plan.threshold} sites for these survivors, got {len(voters)}."
            )

    def _check_uploads(self, request: OpenRequest) -> None:
        round_id = self._round_id(request.start)
        if tuple(upload.site for upload in request.uploads) != request.survivors:
            raise SecureAggregationError(
                f"Expected proof that each survivor uploaded, {', '.join(request.survivors)}, got that of "
                f"{', '.join(upload.site for upload in request.uploads) or 'none'}."
            )
        for upload in request.uploads:
            if not self._plan.member(upload.site).has_signed(
                upload.signature, "masked", round_id, upload.vector_digest
            ):
                raise SecureAggregationError(
                    f"Expected proof that {upload.site!r} masked a vector for this round, got none that it signed."
                )


def _dealt(bodies: Mapping[str, SetupBody], opened: Mapping[str, bytes], slot: int) -> tuple[_Dealt, ...]:
    """What each site dealt for one slot: a share of its round key, and one of the seed of its own mask."""
    start = 2 * SHARE_BYTES * slot
    middle, end = start + SHARE_BYTES, start + 2 * SHARE_BYTES
    return tuple(
        _Dealt(site, body.round_keys[slot], opened[site][start:middle], opened[site][middle:end])
        for site, body in bodies.items()
    )
