"""A server that lies while an epoch is set up, or a site that does: exchanged keys, bad boxes, different views.

And a thief who comes later: what opens the boxes of an epoch is nowhere but in the journal, and soon not there.

Four sites, of which one colludes; three votes open a sum of at least three.
"""

import dataclasses
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import names, number
from privacy.secure_aggregation.identity import create_identity, derived_key
from privacy.secure_aggregation.messages import (
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
    VoteRequest,
)
from privacy.secure_aggregation.server import SecureSum, SetupPhase

C, D, J, I = "site-0", "site-1", "site-2", "site-3"  # noqa: E741  # corrupt, and three honest ones
ALL = (C, D, J, I)
WITHOUT_D = (C, J, I)
SMALL_ORDER = (bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f"))


@dataclasses.dataclass
class SetUp:
    """An epoch between setup and acceptance."""

    consortium: Any
    setups: dict[str, Setup]
    phase: SetupPhase

    @property
    def roster(self) -> Roster:
        return self.phase.roster

    def relay(self, site: str = J, **changed: Setup | None) -> Relay:
        """What the server shows to a site, with some setups exchanged or left out."""
        whole = self.phase.relay_to(site)
        place = self.roster.sites.index(site)
        setups = []
        for name, one in zip(ALL, whole.setups, strict=True):
            key = name.replace("-", "_")
            if key not in changed:
                setups.append(one)
            elif (new := changed[key]) is not None:
                setups.append(dataclasses.replace(one, body=new.body, signature=new.signature, box=new.boxes[place]))
        return dataclasses.replace(whole, setups=tuple(setups))

    def fresh_phase(self) -> SetupPhase:
        """A server that was sent the same keys, and no setup yet."""
        phase = SetupPhase(self.consortium.plan, 1)
        for one in self.roster.advertised:
            phase.advertise(one)
        return phase

    def resigned(self, site: str, **changes: Any) -> Setup:
        """A site's setup with another body, signed by it."""
        setup = self.setups[site]
        boxes = changes.pop("boxes", setup.boxes)
        body = dataclasses.replace(SetupBody.parse(setup.body), **changes).to_bytes()
        return Setup(body, self.consortium.identities[site].sign("setup", body), boxes)


@pytest.fixture
def set_up(make_consortium: Callable[..., Any]) -> SetUp:
    consortium = make_consortium(seed=3)
    phase = consortium.advertised(1)
    setups = {site: consortium.client(site).setup(phase.roster) for site in ALL}
    for setup in setups.values():
        phase.add(setup)
    return SetUp(consortium, setups, phase)


@pytest.fixture
def made_known(make_consortium: Callable[..., Any]) -> tuple[Any, Roster]:
    """A consortium that has made its keys known, and the roster of them."""
    consortium = make_consortium(seed=3)
    return consortium, consortium.advertised(1).roster


def advertised(consortium: Any, site: str, box_key: bytes, epoch: int = 1, *, signer: str | None = None) -> Advertised:
    """A key that a site signs, or another for it."""
    fields = Advertised.signed_fields(consortium.plan.digest, epoch, box_key)
    signature = consortium.identities[signer or site].sign("advertised", *fields)
    return Advertised(site, consortium.plan.digest, epoch, box_key, signature)


def some_key() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def with_key(roster: Roster, new: Advertised) -> Roster:
    """The roster with another key of one site."""
    exchanged = tuple(new if one.site == new.site else one for one in roster.advertised)
    return dataclasses.replace(roster, advertised=exchanged)


# Who takes part


def test_exchanged_box_key_is_refused(made_known: tuple[Any, Roster]) -> None:
    """The man in the middle, who has a box key of his own for D; or one of D's from an earlier epoch."""
    consortium, roster = made_known
    honest, key = roster.advertised[1], some_key()
    earlier = advertised(consortium, D, key, epoch=0)
    for forged in (
        dataclasses.replace(honest, box_key=key),
        advertised(consortium, D, key, signer=C),
        dataclasses.replace(advertised(consortium, C, key), site=D),
        earlier,
        dataclasses.replace(earlier, epoch=1),
        dataclasses.replace(honest, plan=bytes(32)),
        dataclasses.replace(honest, signature=bytes(64)),
    ):
        with pytest.raises(SecureAggregationError, match="a key that 'site-1' signed for epoch 1, got another"):
            consortium.client(J).setup(with_key(roster, forged))
        with pytest.raises(SecureAggregationError, match="a key that 'site-1' signed for epoch 1, got another"):
            SetupPhase(consortium.plan, 1).advertise(forged)
    consortium.client(J).setup(roster)  # what was refused used nothing up


def test_roster_without_this_sites_own_key_is_refused(made_known: tuple[Any, Roster]) -> None:
    """Even with one that this site signed: it may be from an earlier life."""
    consortium, roster = made_known
    with pytest.raises(SecureAggregationError, match="this site's own key as it was sent, got another"):
        consortium.client(J).setup(with_key(roster, advertised(consortium, J, some_key())))
    without = dataclasses.replace(roster, advertised=tuple(one for one in roster.advertised if one.site != J))
    with pytest.raises(SecureAggregationError, match="a roster of at least 3 sites, this one among them, got 3"):
        consortium.client(J).setup(without)


def test_roster_in_another_order_or_with_a_site_twice_is_refused(made_known: tuple[Any, Roster]) -> None:
    consortium, roster = made_known
    c, d, j, i = roster.advertised
    stranger = dataclasses.replace(c, site="sybil")
    for wrong in ((d, c, j, i), (c, c, d, j, i), (c, d, j, j), (c, d, j, i, stranger)):
        with pytest.raises(SecureAggregationError, match="each site once and in the order of the study, got another"):
            consortium.client(J).setup(dataclasses.replace(roster, advertised=wrong))
    with pytest.raises(SecureAggregationError, match="a roster of this site's plan"):
        consortium.client(J).setup(dataclasses.replace(roster, plan=bytes(32)))


def test_roster_of_another_epoch_is_refused(made_known: tuple[Any, Roster]) -> None:
    consortium, roster = made_known
    with pytest.raises(SecureAggregationError, match="secrets of epoch 2, got none"):
        consortium.client(J).setup(dataclasses.replace(roster, epoch=2))
    consortium.advertised(2)
    with pytest.raises(SecureAggregationError, match="secrets of epoch 1, got none"):
        consortium.client(J).setup(roster)
    with pytest.raises(SecureAggregationError, match="a key that 'site-0' signed for epoch 2, got another"):
        consortium.client(J).setup(dataclasses.replace(roster, epoch=2))


def test_roster_of_fewer_than_min_sites_is_refused(made_known: tuple[Any, Roster]) -> None:
    consortium, roster = made_known
    fewer = dataclasses.replace(roster, advertised=roster.advertised[1:3])
    with pytest.raises(SecureAggregationError, match="a roster of at least 3 sites, this one among them, got 2"):
        consortium.client(J).setup(fewer)
    server = SetupPhase(consortium.plan, 1)
    for one in roster.advertised[:2]:
        server.advertise(one)
    with pytest.raises(SecureAggregationError, match="keys of at least 3 sites, got 2: site-0, site-1"):
        server.roster  # noqa: B018


def test_key_that_comes_after_the_roster_is_late(made_known: tuple[Any, Roster]) -> None:
    consortium, roster = made_known
    server = SetupPhase(consortium.plan, 1)
    for one in roster.advertised[1:]:
        server.advertise(one)
    assert server.roster.sites == (D, J, I)
    with pytest.raises(SecureAggregationError, match="before the roster was made, got 'site-0' late"):
        server.advertise(roster.advertised[0])
    with pytest.raises(SecureAggregationError, match="a setup of 'site-0' for epoch 1, got another"):
        server.add(consortium.client(C).setup(roster))


def test_site_sets_up_once_in_an_epoch(made_known: tuple[Any, Roster]) -> None:
    """A second setup would seal other secrets under the same keys and nonces, and deal a site two of each."""
    consortium, roster = made_known
    consortium.client(J).setup(roster)
    other = with_key(roster, advertised(consortium, C, some_key()))
    for shown in (roster, other):
        with pytest.raises(SecureAggregationError, match="one setup of this site in epoch 1, got asked again"):
            consortium.client(J).setup(shown)
    with pytest.raises(SecureAggregationError, match="an epoch newer than 1, got 1"):
        consortium.client(J).advertise(1)


def test_setup_needs_a_key_that_was_made_known(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    roster = consortium.advertised(1, (C, D, I)).roster
    with pytest.raises(SecureAggregationError, match="secrets of epoch 1, got none"):
        consortium.client(J).setup(roster)


@pytest.mark.parametrize("key", SMALL_ORDER, ids=lambda key: key.hex()[:4])
def test_box_key_of_small_order_is_refused(made_known: tuple[Any, Roster], key: bytes) -> None:
    """What was sealed to it, and what it seals, would be open to all."""
    consortium, roster = made_known
    small = advertised(consortium, C, key)
    with pytest.raises(SecureAggregationError, match="a key of 'site-0' that gives secrets, got one of small order"):
        consortium.client(J).setup(with_key(roster, small))
    with pytest.raises(SecureAggregationError, match="a key of 'site-0' that gives secrets, got one of small order"):
        SetupPhase(consortium.plan, 1).advertise(small)


def test_sites_that_were_shown_different_rosters_accept_nothing_of_each_other(made_known: tuple[Any, Roster]) -> None:
    """C makes two keys known, and J alone sees the second; C sets up for both. J is left with C, and two are too few."""
    consortium, first = made_known
    second = with_key(first, advertised(consortium, C, some_key()))
    shown = {C: first, D: first, J: second, I: first}
    setups = {site: consortium.client(site).setup(roster) for site, roster in shown.items()}
    place, server = second.sites.index(J), SetupPhase(consortium.plan, 1)
    for one in first.advertised:
        server.advertise(one)
    for site in (C, D, I):
        server.add(setups[site])
    with pytest.raises(SecureAggregationError, match="a setup of 'site-2' for epoch 1, got another"):
        server.add(setups[J])
    moved = dataclasses.replace(SetupBody.parse(setups[C].body), roster=second.digest).to_bytes()
    setups[C] = Setup(moved, consortium.identities[C].sign("setup", moved), setups[C].boxes)
    relayed = {site: RelayedSetup(one.body, one.signature, one.boxes[place]) for site, one in setups.items()}
    for sites in (ALL, (D, J, I), (J, I)):
        relay = Relay(consortium.plan.digest, 1, tuple(relayed[site] for site in sites))
        with pytest.raises(SecureAggregationError, match="for this plan, epoch and roster, got one for another"):
            consortium.client(J).accept(relay)
    with pytest.raises(SecureAggregationError, match="sound setups of at least 3 sites, got 1"):
        consortium.client(J).accept(Relay(consortium.plan.digest, 1, (relayed[C], relayed[J])))
    consortium.client(D).accept(server.relay_to(D))  # without J


def test_setup_of_a_member_outside_the_roster_is_refused(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    server = consortium.advertised(1, (D, J, I))
    for site in (D, J, I):
        server.add(consortium.client(site).setup(server.roster))
    body = SetupBody.parse(server._setups[D].body)
    joined = dataclasses.replace(body, site=C).to_bytes()
    setup = Setup(joined, consortium.identities[C].sign("setup", joined), server._setups[D].boxes)
    with pytest.raises(SecureAggregationError, match="a setup of 'site-0' for epoch 1, got another"):
        server.add(setup)
    relay = server.relay_to(J)
    late = RelayedSetup(joined, setup.signature, relay.setups[0].box)
    with pytest.raises(SecureAggregationError, match="setups of sites of the roster, got one of 'site-0'"):
        consortium.client(J).accept(dataclasses.replace(relay, setups=(late, *relay.setups)))


# What opens a box


def opens(consortium: Any, private_key: bytes, roster: Roster, box: bytes, sender: str = D, receiver: str = J) -> bool:
    """Whether a key opens what a sender sealed to a receiver."""
    key, sealed_by = X25519PrivateKey.from_private_bytes(private_key), roster.advertised[roster.sites.index(sender)]
    cipher = consortium.client(receiver)._cipher(key, sealed_by.box_key, roster, sender, receiver)
    try:
        cipher.decrypt(bytes(12), box, None)
    except InvalidTag:
        return False
    return True


def test_second_life_after_a_lost_journal_cannot_open_what_was_sealed_to_the_first(set_up: SetUp) -> None:
    consortium, first = set_up.consortium, set_up.roster
    box = set_up.setups[D].boxes[2]
    assert opens(consortium, consortium.journal(J).own(1), first, box)
    shutil.rmtree(consortium.folder / J)
    second = with_key(first, consortium.client(J).advertise(1))
    assert not opens(consortium, consortium.journal(J).own(1), first, box)
    with pytest.raises(SecureAggregationError, match="this site's own key as it was sent, got another"):
        consortium.client(J).setup(first)
    with pytest.raises(SecureAggregationError, match="secrets of epoch 1, got none"):
        consortium.client(J).accept(set_up.relay(J))
    own = consortium.client(J).setup(second)
    with pytest.raises(SecureAggregationError, match="for this plan, epoch and roster, got one for another"):
        consortium.client(J).accept(set_up.relay(J, site_2=own))
    with pytest.raises(SecureAggregationError, match="accepted setups of epoch 1, got none at this site"):
        consortium.mask(J, RoundStart(consortium.plan.digest, 1, 0, bytes(32), bytes(32), ALL), np.zeros(3, np.uint32))
    for site in (D, I):  # nobody sets up again for its sake
        with pytest.raises(SecureAggregationError, match="one setup of this site in epoch 1, got asked again"):
            consortium.client(site).setup(second)


def test_stolen_identity_opens_no_recorded_box(make_consortium: Callable[..., Any], tmp_path: Path) -> None:
    """The thief recorded everything that was sent, and has the secret and all that the site still has on disk."""
    path = tmp_path / "identity"
    consortium = make_consortium()
    identities = {**consortium.identities, J: create_identity(path)}
    plan = dataclasses.replace(consortium.plan, members=tuple(one.member(site) for site, one in identities.items()))
    consortium = dataclasses.replace(consortium, plan=plan, identities=identities)
    server = consortium.advertised(1)
    for site in ALL:
        server.add(consortium.client(site).setup(server.roster))
    (box,) = [one.box for one in server.relay_to(J).setups if SetupBody.parse(one.body).site == D]
    epoch_key = consortium.journal(J).own(1)
    assert opens(consortium, epoch_key, server.roster, box)
    for site in ALL:
        server.accept(consortium.client(site).accept(server.relay_to(site)))
    consortium.epoch = server.finish()
    consortium.run(consortium.start(0), dict.fromkeys(ALL, np.zeros(3, np.uint32)))
    secret = path.read_bytes()
    derived = [derived_key(secret, f"identity: {use}") for use in ("signing", "box")]
    kept = b"".join(file.read_bytes() for file in (consortium.folder / J).rglob("*") if file.is_file())
    assert epoch_key not in kept
    found = [kept[place : place + 32] for place in range(len(kept) - 31)]
    for key in (secret, *derived, *dict.fromkeys(found)):
        assert not opens(consortium, key, server.roster, box)


# Setups


def with_exchanged_keys(set_up: SetUp, site: str, signer: str | None = None) -> Setup:
    """A setup of a site with keys of the server's, signed by nobody, or by a member."""
    own = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(4)]
    body = dataclasses.replace(SetupBody.parse(set_up.setups[site].body), round_keys=tuple(own)).to_bytes()
    old = set_up.setups[site]
    signature = old.signature if signer is None else set_up.consortium.identities[signer].sign("setup", body)
    return Setup(body, signature, old.boxes)


def test_exchanged_round_keys_are_refused(set_up: SetUp) -> None:
    """The man in the middle, who has keys of his own for D."""
    for signer in (None, C):
        with pytest.raises(SecureAggregationError, match="a setup signed by 'site-1', got another signature"):
            set_up.consortium.client(J).accept(set_up.relay(site_1=with_exchanged_keys(set_up, D, signer)))


def test_setup_of_one_site_does_not_stand_for_another(set_up: SetUp) -> None:
    renamed = dataclasses.replace(SetupBody.parse(set_up.setups[C].body), site=D).to_bytes()
    forged = Setup(renamed, set_up.consortium.identities[C].sign("setup", renamed), set_up.setups[C].boxes)
    with pytest.raises(SecureAggregationError, match="a setup signed by 'site-1'"):
        set_up.consortium.client(J).accept(set_up.relay(site_1=forged))
    with pytest.raises(SecureAggregationError, match="one setup of site 'site-0', got two"):
        set_up.consortium.client(J).accept(set_up.relay(site_1=set_up.setups[C]))


def test_site_that_the_study_does_not_name_is_no_member(set_up: SetUp) -> None:
    """A Sybil has keys and signatures of its own, and no place in the plan."""
    sybil = dataclasses.replace(SetupBody.parse(set_up.setups[C].body), site="sybil").to_bytes()
    forged = Setup(sybil, set_up.consortium.identities[C].sign("setup", sybil), set_up.setups[C].boxes)
    with pytest.raises(SecureAggregationError, match="setups of sites of the roster, got one of 'sybil'"):
        set_up.consortium.client(J).accept(set_up.relay(site_1=forged))
    with pytest.raises(SecureAggregationError, match="Expected a member of the study, got 'sybil'"):
        set_up.fresh_phase().add(forged)


def test_member_with_the_keys_of_another_is_no_second_member(make_consortium: Callable[..., Any]) -> None:
    plan = make_consortium().plan
    for name in ("site", "signing_key"):
        twin = dataclasses.replace(plan.members[1], **{name: getattr(plan.members[0], name)})
        with pytest.raises(SecureAggregationError, match=f"with a {name} of their own, got one twice"):
            dataclasses.replace(plan, members=(plan.members[0], twin, *plan.members[2:]))


def test_plan_with_other_keys_for_this_site_is_refused(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    with pytest.raises(SecureAggregationError, match="this site's own keys for 'site-1', got others"):
        SecureClient(D, consortium.identities[J], consortium.plan, consortium.folder / "any")


def test_own_setup_that_was_replaced_is_refused(set_up: SetUp) -> None:
    """Even signed by this site: it may be from an earlier life, whose secrets are known."""
    body = dataclasses.replace(
        SetupBody.parse(set_up.setups[J].body), commitments=tuple(bytes([slot]) * 32 for slot in range(4))
    ).to_bytes()
    earlier = Setup(body, set_up.consortium.identities[J].sign("setup", body), set_up.setups[J].boxes)
    with pytest.raises(SecureAggregationError, match="this site's own setup as it was sent, got another"):
        set_up.consortium.client(J).accept(set_up.relay(site_2=earlier))
    with pytest.raises(SecureAggregationError, match="own setup among those relayed, got none"):
        set_up.consortium.client(J).accept(set_up.relay(site_2=None))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"plan": b"p" * 32},
        {"roster": b"r" * 32},
        {"round_keys": (b"k" * 32,) * 3},
        {"commitments": ()},
        {"box_digests": (b"d" * 32,) * 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_setup_that_is_not_of_this_plan_and_epoch_is_refused(set_up: SetUp, change: dict[str, Any]) -> None:
    setup = set_up.resigned(C, **change)
    with pytest.raises(SecureAggregationError, match="for this plan, epoch and roster, got one for another"):
        set_up.consortium.client(J).accept(set_up.relay(site_0=setup))
    with pytest.raises(
        SecureAggregationError, match="a setup of 'site-0' for epoch 1, got another|boxes that 'site-0'"
    ):
        set_up.fresh_phase().add(setup)


def test_relay_of_another_plan_or_epoch_is_refused(set_up: SetUp) -> None:
    client = set_up.consortium.client(J)
    with pytest.raises(SecureAggregationError, match="setups for this site's plan"):
        client.accept(dataclasses.replace(set_up.relay(), plan=bytes(32)))
    with pytest.raises(SecureAggregationError, match="secrets of epoch 7, got none"):
        client.accept(dataclasses.replace(set_up.relay(), epoch=7))


def test_setups_are_accepted_once(set_up: SetUp) -> None:
    set_up.consortium.client(J).accept(set_up.relay())
    for relay in (set_up.relay(), set_up.relay(site_1=None)):
        with pytest.raises(SecureAggregationError, match="secrets of epoch 1, got none"):
            set_up.consortium.client(J).accept(relay)


def test_fewer_setups_than_min_sites_are_refused(set_up: SetUp) -> None:
    with pytest.raises(SecureAggregationError, match="sound setups of at least 3 sites, got 2"):
        set_up.consortium.client(J).accept(set_up.relay(site_0=None, site_1=None))
    phase = set_up.fresh_phase()
    phase.add(set_up.setups[C])
    with pytest.raises(SecureAggregationError, match="setups of at least 3 sites, got 1: site-0"):
        phase.relay_to(C)


def test_sites_that_were_shown_different_setups_agree_on_no_round(set_up: SetUp) -> None:
    """C deals twice, and J alone sees the second: J's round is another one, with other masks and votes."""
    consortium = set_up.consortium
    other = set_up.resigned(C, commitments=tuple(bytes([slot]) * 32 for slot in range(4)))
    for site in ALL:
        set_up.phase.accept(
            consortium.client(site).accept(set_up.relay(site) if site != J else set_up.relay(J, site_0=other))
        )
    consortium.epoch = set_up.phase.finish()
    start = consortium.start(0)
    vector = np.zeros(3, np.uint32)
    masked = {site: consortium.mask(site, start, vector) for site in ALL}
    assert len({masked[site].round_id for site in ALL}) == 2
    votes = tuple(consortium.client(site).vote(VoteRequest(start, WITHOUT_D)) for site in ALL)
    request = OpenRequest(start, WITHOUT_D, votes, tuple(consortium.upload(masked[site]) for site in WITHOUT_D))
    for site in (D, J, I):
        with pytest.raises(SecureAggregationError, match="one that it did not give"):
            consortium.client(site).open(request)


def test_round_over_a_site_that_was_not_accepted_is_refused(set_up: SetUp) -> None:
    consortium = set_up.consortium
    consortium.client(J).accept(set_up.relay(J, site_1=None))
    for site in (C, D, I):
        consortium.client(site).accept(set_up.relay(site))
    start = RoundStart(consortium.plan.digest, 1, 0, b"c" * 32, b"m" * 32, ALL)
    with pytest.raises(SecureAggregationError, match="sites whose setup this site accepted, got 'site-1'"):
        consortium.mask(J, start, np.zeros(3, np.uint32))


def test_box_that_was_changed_on_the_way_is_refused(set_up: SetUp) -> None:
    boxes = set_up.setups[C].boxes
    flipped = bytes([boxes[2][0] ^ 1]) + boxes[2][1:]
    for wrong in (flipped, boxes[3], b""):
        setup = dataclasses.replace(set_up.setups[C], boxes=(*boxes[:2], wrong, boxes[3]))
        with pytest.raises(SecureAggregationError, match="the box that 'site-0' sealed for this site, got another"):
            set_up.consortium.client(J).accept(set_up.relay(site_0=setup))
        with pytest.raises(SecureAggregationError, match="the boxes that 'site-0' signed, got others"):
            set_up.fresh_phase().add(setup)


def bad_box(set_up: SetUp, box: bytes) -> Setup:
    """C's setup with a box for J that C itself signed."""
    boxes = (*set_up.setups[C].boxes[:2], box, set_up.setups[C].boxes[3])
    digests = SetupBody.parse(set_up.setups[C].body).box_digests
    return set_up.resigned(C, boxes=boxes, box_digests=(*digests[:2], sha256(box).digest(), digests[3]))


def sealed(consortium: Any, roster: Roster, receiver: str, shares: bytes, *, key: bytes | None = None) -> bytes:
    """C's box for a receiver, sealed as it should be, or to another key than the receiver's."""
    private_key = X25519PrivateKey.from_private_bytes(consortium.journal(C).own(roster.epoch))
    public_key = key or roster.advertised[roster.sites.index(receiver)].box_key
    cipher: ChaCha20Poly1305 = consortium.client(C)._cipher(private_key, public_key, roster, C, receiver)
    return cipher.encrypt(bytes(12), shares, None)


def too_short_box(set_up: SetUp) -> bytes:
    return sealed(set_up.consortium, set_up.roster, J, bytes(64 * 4 - 1))


def box_to_another_site(set_up: SetUp) -> bytes:
    return sealed(set_up.consortium, set_up.roster, J, bytes(64 * 4), key=set_up.roster.advertised[1].box_key)


def box_under_another_roster(set_up: SetUp) -> bytes:
    other = with_key(set_up.roster, advertised(set_up.consortium, I, some_key()))
    return sealed(set_up.consortium, other, J, bytes(64 * 4))


def box_of_another_sender(set_up: SetUp) -> bytes:
    """What D sealed to J, copied."""
    return set_up.setups[D].boxes[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"garbage",
        lambda _: bytes(272),
        too_short_box,
        box_to_another_site,
        box_under_another_roster,
        box_of_another_sender,
    ],
)
def test_box_that_its_sender_sealed_wrongly_is_a_signed_complaint_that_excludes_the_sender(
    set_up: SetUp, make: Callable[[SetUp], bytes]
) -> None:
    consortium, bad = set_up.consortium, bad_box(set_up, make(set_up))
    phase = set_up.fresh_phase()
    for site in ALL:
        phase.add(bad if site == C else set_up.setups[site])
    accepted = {site: consortium.client(site).accept(phase.relay_to(site)) for site in (D, J, I)}
    assert {site: acceptance.complaints for site, acceptance in accepted.items()} == {D: (), J: (C,), I: ()}
    signed = ("acceptance", consortium.plan.digest, number(1), names([C]))
    assert consortium.plan.member(J).has_signed(accepted[J].signature, *signed)
    for acceptance in accepted.values():
        phase.accept(acceptance)
    consortium.epoch = phase.finish()
    assert consortium.epoch.complaints == {C: (J,)}
    assert tuple(consortium.epoch.setups) == (D, J, I)
    start = dataclasses.replace(consortium.start(0), sites=ALL)
    with pytest.raises(SecureAggregationError, match="sites whose setup this site accepted, got 'site-0'"):
        consortium.mask(J, start, np.zeros(3, np.uint32))
    total, survivors, _ = consortium.run(consortium.start(0), dict.fromkeys((D, J, I), np.ones(3, np.uint32)))
    assert (total.tolist(), survivors) == ([3, 3, 3], (D, J, I))


def test_false_complaint_is_signed_and_named_and_costs_no_secrecy(set_up: SetUp) -> None:
    """C accuses the innocent: who accuses whom is on record, and too many complaints stop the epoch."""
    consortium, phase = set_up.consortium, set_up.phase

    def lie(*accused: str) -> Acceptance:
        signature = consortium.identities[C].sign("acceptance", consortium.plan.digest, number(1), names(accused))
        return Acceptance(C, 1, accused, signature)

    for site in (D, J, I):
        phase.accept(consortium.client(site).accept(phase.relay_to(site)))
    phase.accept(lie(D))
    epoch = phase.finish()
    assert (epoch.complaints, tuple(epoch.setups)) == ({D: (C,)}, WITHOUT_D)
    phase.accept(lie(D, J))
    with pytest.raises(SecureAggregationError, match=r"complaints about site-1 \(by site-0\); site-2 \(by site-0\)"):
        phase.finish()
    with pytest.raises(SecureAggregationError, match="the acceptance of 'site-1', got one it did not sign"):
        phase.accept(dataclasses.replace(lie(J), site=D))


def test_round_key_of_small_order_gives_no_secret(set_up: SetUp) -> None:
    """With such a key of C, every pair mask of C would be known to all; and masking would fail at every site."""
    consortium = set_up.consortium
    for point in SMALL_ORDER:
        keys = (point, *SetupBody.parse(set_up.setups[C].body).round_keys[1:])
        setup = set_up.resigned(C, round_keys=keys)
        with pytest.raises(SecureAggregationError, match="round keys of 'site-0' that give secrets"):
            set_up.fresh_phase().add(setup)
    acceptance = consortium.client(D).accept(set_up.relay(D, site_0=setup))  # of a server that shows the key anyway
    assert acceptance.complaints == ()
    start = RoundStart(consortium.plan.digest, 1, 0, b"c" * 32, b"m" * 32, ALL)
    with pytest.raises(SecureAggregationError, match="X25519 public key, got one that gives no secret"):
        consortium.mask(D, start, np.zeros(3, np.uint32))


def test_setup_that_comes_after_the_relay_is_refused(set_up: SetUp) -> None:
    phase = set_up.fresh_phase()
    for site in (D, J, I):
        phase.add(set_up.setups[site])
    with pytest.raises(SecureAggregationError, match="one setup of 'site-1', got a second"):
        phase.add(set_up.setups[D])
    phase.relay_to(D)
    with pytest.raises(SecureAggregationError, match="before any was relayed, got that of 'site-0' late"):
        phase.add(set_up.setups[C])
    signature = set_up.consortium.identities[C].sign("acceptance", set_up.consortium.plan.digest, number(1), names([]))
    with pytest.raises(SecureAggregationError, match="'site-0' to accept after its own setup"):
        phase.accept(Acceptance(C, 1, (), signature))


def test_dealer_of_garbage_in_sound_boxes_is_named(make_consortium: Callable[..., Any]) -> None:
    """C's boxes open, and hold shares of nothing: no site can tell, and the server names C when it is opened."""
    consortium = make_consortium()
    phase = consortium.advertised(1)
    good, generator = SetupBody.parse(consortium.client(C).setup(phase.roster).body), np.random.default_rng(1)
    boxes = tuple(sealed(consortium, phase.roster, site, generator.bytes(64 * 4)) for site in ALL)
    body = dataclasses.replace(good, box_digests=tuple(sha256(box).digest() for box in boxes)).to_bytes()
    phase.add(Setup(body, consortium.identities[C].sign("setup", body), boxes))
    for site in (D, J, I):
        phase.add(consortium.client(site).setup(phase.roster))
    for site in (D, J, I):
        acceptance = consortium.client(site).accept(phase.relay_to(site))
        assert acceptance.complaints == ()
        phase.accept(acceptance)
    signature = consortium.identities[C].sign("acceptance", consortium.plan.digest, number(1), names([]))
    phase.accept(Acceptance(C, 1, (), signature))
    consortium.epoch = phase.finish()
    start = consortium.start(0)
    server = SecureSum(consortium.epoch, start, num_elements=3)
    round_id, vector = consortium.round_id(start), bytes(12)
    signature = consortium.identities[C].sign("masked", *Masked.signed_fields(round_id, vector))
    server.add(Masked(C, round_id, signature, vector))
    for site in (D, J, I):
        server.add(consortium.mask(site, start, np.zeros(3, np.uint32)))
    server.close()
    for site in (D, J, I):
        server.add_shares(consortium.client(site).open(server.open_request()))
    with pytest.raises(SecureAggregationError, match="either 'site-0' dealt bad shares, or"):
        server.opened()
