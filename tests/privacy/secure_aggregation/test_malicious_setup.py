"""A server that lies while an epoch is set up, or a site that does: exchanged keys, bad boxes, different views.

Four sites, of which one colludes; three votes open a sum of at least three.
"""

import dataclasses
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import names, number
from privacy.secure_aggregation.identity import shared_secret
from privacy.secure_aggregation.messages import (
    Acceptance,
    Masked,
    OpenRequest,
    Relay,
    RoundStart,
    Setup,
    SetupBody,
    VoteRequest,
)
from privacy.secure_aggregation.server import SecureSum, SetupPhase

C, D, J, I = "site-0", "site-1", "site-2", "site-3"  # noqa: E741  # corrupt, and three honest ones
ALL = (C, D, J, I)
WITHOUT_D = (C, J, I)


@dataclasses.dataclass
class SetUp:
    """An epoch between setup and acceptance."""

    consortium: Any
    setups: dict[str, Setup]
    phase: SetupPhase

    def relay(self, site: str = J, **changed: Setup | None) -> Relay:
        """What the server shows to a site, with some setups exchanged or left out."""
        whole = self.phase.relay_to(site)
        place = self.consortium.plan.index(site)
        setups = []
        for name, one in zip(ALL, whole.setups, strict=True):
            key = name.replace("-", "_")
            if key not in changed:
                setups.append(one)
            elif (new := changed[key]) is not None:
                setups.append(dataclasses.replace(one, body=new.body, signature=new.signature, box=new.boxes[place]))
        return dataclasses.replace(whole, setups=tuple(setups))

    def resigned(self, site: str, **changes: Any) -> Setup:
        """A site's setup with another body, signed by it."""
        setup = self.setups[site]
        boxes = changes.pop("boxes", setup.boxes)
        body = dataclasses.replace(SetupBody.parse(setup.body), **changes).to_bytes()
        return Setup(body, self.consortium.identities[site].sign("setup", body), boxes)


@pytest.fixture
def set_up(make_consortium: Callable[..., Any]) -> SetUp:
    consortium = make_consortium(seed=3)
    phase = SetupPhase(consortium.plan, 1)
    setups = {site: consortium.client(site).setup(1) for site in ALL}
    for setup in setups.values():
        phase.add(setup)
    return SetUp(consortium, setups, phase)


def with_exchanged_keys(set_up: SetUp, site: str, signer: str | None = None) -> Setup:
    """A setup of a site with keys of the server's, signed by nobody, or by a member."""
    own = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(4)]
    body = dataclasses.replace(SetupBody.parse(set_up.setups[site].body), round_keys=tuple(own)).to_bytes()
    old = set_up.setups[site]
    signature = old.signature if signer is None else set_up.consortium.identities[signer].sign("setup", body)
    return Setup(body, signature, old.boxes)


def test_exchanged_keys_are_refused(set_up: SetUp) -> None:
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
    with pytest.raises(SecureAggregationError, match="Expected a member of the study, got 'sybil'"):
        set_up.consortium.client(J).accept(set_up.relay(site_1=forged))
    with pytest.raises(SecureAggregationError, match="Expected a member of the study, got 'sybil'"):
        SetupPhase(set_up.consortium.plan, 1).add(forged)


def test_member_with_the_keys_of_another_is_no_second_member(make_consortium: Callable[..., Any]) -> None:
    plan = make_consortium().plan
    for name in ("site", "signing_key", "box_key"):
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
        {"round_keys": (b"k" * 32,) * 3},
        {"commitments": ()},
        {"box_digests": (b"d" * 32,) * 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_setup_that_is_not_of_this_plan_and_epoch_is_refused(set_up: SetUp, change: dict[str, Any]) -> None:
    setup = set_up.resigned(C, **change)
    with pytest.raises(SecureAggregationError, match="for epoch 1 of this plan, got one for another"):
        set_up.consortium.client(J).accept(set_up.relay(site_0=setup))
    with pytest.raises(SecureAggregationError):
        SetupPhase(set_up.consortium.plan, 1).add(setup)


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
    phase = SetupPhase(set_up.consortium.plan, 1)
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
            SetupPhase(set_up.consortium.plan, 1).add(setup)


def bad_box(set_up: SetUp, box: bytes) -> Setup:
    """C's setup with a box for J that C itself signed."""
    boxes = (*set_up.setups[C].boxes[:2], box, set_up.setups[C].boxes[3])
    digests = SetupBody.parse(set_up.setups[C].body).box_digests
    return set_up.resigned(C, boxes=boxes, box_digests=(*digests[:2], sha256(box).digest(), digests[3]))


def too_short_box(set_up: SetUp) -> bytes:
    """Sealed as it should be, with a byte too few."""
    ephemeral = X25519PrivateKey.generate()
    secret = shared_secret(ephemeral, set_up.consortium.identities[J].box_key)
    key = set_up.consortium.client(C)._box_key(secret, 1, C, J)
    return ChaCha20Poly1305(key).encrypt(bytes(12), bytes(64 * 4 - 1), None)


@pytest.mark.parametrize("make", [lambda _: b"garbage", lambda _: bytes(272), too_short_box])
def test_box_that_its_sender_sealed_wrongly_is_a_signed_complaint_that_excludes_the_sender(
    set_up: SetUp, make: Callable[[SetUp], bytes]
) -> None:
    consortium, bad = set_up.consortium, bad_box(set_up, make(set_up))
    phase = SetupPhase(consortium.plan, 1)
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


def test_small_order_keys_give_no_secret(set_up: SetUp) -> None:
    """With such a key of C, every pair mask of C would be known to all; and masking would fail at every site."""
    consortium = set_up.consortium
    points = (bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f"))
    for point in points:
        keys = (point, *SetupBody.parse(set_up.setups[C].body).round_keys[1:])
        setup = set_up.resigned(C, round_keys=keys)
        with pytest.raises(SecureAggregationError, match="round keys of 'site-0' that give secrets"):
            SetupPhase(consortium.plan, 1).add(setup)
    boxed = set_up.resigned(C, ephemeral_key=points[0])
    for site in (D, J):  # sites that a server shows the key anyway
        shown = set_up.relay(site, site_0=setup if site == D else boxed)
        acceptance = consortium.client(site).accept(shown)
        assert acceptance.complaints == (() if site == D else (C,))
    start = RoundStart(consortium.plan.digest, 1, 0, b"c" * 32, b"m" * 32, ALL)
    with pytest.raises(SecureAggregationError, match="X25519 public key, got one that gives no secret"):
        consortium.mask(D, start, np.zeros(3, np.uint32))


def test_setup_that_comes_after_the_relay_is_refused(set_up: SetUp) -> None:
    phase = SetupPhase(set_up.consortium.plan, 1)
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
    phase = SetupPhase(consortium.plan, 1)
    client = consortium.client(C)
    sent, ephemeral = client.setup(1), X25519PrivateKey.generate()
    good, generator = SetupBody.parse(sent.body), np.random.default_rng(1)
    boxes = tuple(
        ChaCha20Poly1305(client._box_key(shared_secret(ephemeral, member.box_key), 1, C, member.site)).encrypt(
            bytes(12), generator.bytes(64 * 4), None
        )
        for member in consortium.plan.members
    )
    body = dataclasses.replace(
        good,
        ephemeral_key=ephemeral.public_key().public_bytes_raw(),
        box_digests=tuple(sha256(box).digest() for box in boxes),
    ).to_bytes()
    phase.add(Setup(body, consortium.identities[C].sign("setup", body), boxes))
    for site in (D, J, I):
        phase.add(consortium.client(site).setup(1))
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
