"""Honest rounds: the sum is exact whoever drops out, as far as the plan tolerates it; and every byte is fixed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.codec import WireMessage
from privacy.secure_aggregation.identity import Identity, derived_key, shared_secret
from privacy.secure_aggregation.masking import add_mask
from privacy.secure_aggregation.masks import own_mask_key, pair_mask_key
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
    Shares,
    Upload,
    Vote,
    VoteRequest,
)
from privacy.secure_aggregation.plan import SecureAggregationPlan

GOLDEN = Path(__file__).parents[2] / "golden" / "secure_aggregation.json"
MakeConsortium = Callable[..., Any]
MakeVectors = Callable[..., dict[str, Any]]

with_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """n, c, t and k that a plan allows."""
    n = draw(st.integers(3, 8))
    c = draw(st.integers(0, n - 2))
    t = draw(st.integers((n + c) // 2 + 1, n))
    return n, c, t, draw(st.integers(max(t, c + 2), n))


@with_fixtures
@given(numbers(), st.sampled_from([32, 64]), st.integers(0, 40), st.data())
def test_sum_is_exact_whoever_drops_out_within_tolerance(
    make_consortium: MakeConsortium, vectors: MakeVectors, numbers: tuple[int, int, int, int], ring_bits: int,
    num_elements: int, data: st.DataObject,
) -> None:  # fmt: skip
    n, c, t, k = numbers
    consortium = make_consortium(n, c, threshold=t, min_sites=k, rounds_per_epoch=2)
    consortium.begin()
    plain = vectors(consortium.sites, num_elements, ring_bits=ring_bits, seed=data.draw(st.integers(0, 99)))
    start = consortium.start(data.draw(st.integers(0, 1)))
    order = data.draw(st.permutations(consortium.sites))
    never = order[: data.draw(st.integers(0, n - k))]
    after_upload = order[len(never) :][: data.draw(st.integers(0, n - len(never) - t))]
    left = n - len(never) - len(after_upload)
    after_vote = order[len(never) + len(after_upload) :][: data.draw(st.integers(0, left - t))]
    total, survivors, _ = consortium.run(
        start, plain, before_upload=never, before_vote=after_upload, before_open=after_vote
    )
    assert survivors == tuple(site for site in consortium.sites if site not in never)
    expected = sum((plain[site] for site in survivors), np.zeros(num_elements, plain[survivors[0]].dtype))
    np.testing.assert_array_equal(total, expected)
    assert total.dtype == expected.dtype


@with_fixtures
@given(numbers(), st.sampled_from(["before_upload", "before_vote", "before_open"]), st.data())
def test_nothing_is_opened_beyond_tolerance(
    make_consortium: MakeConsortium, vectors: MakeVectors,
    numbers: tuple[int, int, int, int], stage: str, data: st.DataObject,
) -> None:  # fmt: skip
    n, c, t, k = numbers
    consortium = make_consortium(n, c, threshold=t, min_sites=k, rounds_per_epoch=1)
    consortium.begin()
    start = consortium.start(0)
    order = data.draw(st.permutations(consortium.sites))
    needed = k if stage == "before_upload" else t
    dropped = order[: data.draw(st.integers(n - needed + 1, n))]
    more = {}
    if stage != "before_upload" and k < n:  # so that votes are needed at all
        more["before_upload"] = [site for site in order if site not in dropped][-1:] or [order[-1]]
    with pytest.raises(SecureAggregationError, match=r"Expected (vectors|votes|shares) of at least"):
        consortium.run(start, vectors(consortium.sites), **{stage: dropped, **more})
    opened = [site for site in consortium.sites if is_opened(consortium, site)]
    assert not opened or stage != "before_upload"
    assert not opened or stage == "before_open" or k == n  # votes were missing
    assert len(opened) < t


def is_opened(consortium: Any, site: str) -> bool:
    """Whether the site gave its shares: it keeps them until then."""
    return not (consortium.folder / site / "epoch-1" / "0.secret").exists()


def test_epoch_serves_all_its_rounds_and_then_a_new_one_is_needed(
    make_consortium: MakeConsortium, vectors: MakeVectors
) -> None:
    consortium = make_consortium(4, 1, rounds_per_epoch=32)
    for epoch in (1, 9):
        consortium.begin(epoch)
        for slot in range(32):
            plain = vectors(consortium.sites, seed=slot)
            missing = consortium.sites[slot % 4 : slot % 4 + 1] if slot % 3 == 0 else ()
            total, survivors, _ = consortium.run(consortium.start(slot), plain, before_upload=missing)
            np.testing.assert_array_equal(total, sum(plain[site] for site in survivors))
        with pytest.raises(SecureAggregationError, match=r"a slot in 0\.\.31, got 32; begin a newer epoch"):
            consortium.mask("site-1", consortium.start(32), plain["site-1"])


def test_site_that_missed_the_setup_is_left_out_and_the_others_sum(
    make_consortium: MakeConsortium, vectors: MakeVectors
) -> None:
    consortium = make_consortium(5, 1)
    consortium.begin(1, ["site-0", "site-2", "site-3", "site-4"])
    plain = vectors(consortium.sites)
    total, survivors, _ = consortium.run(consortium.start(0), plain)
    assert survivors == ("site-0", "site-2", "site-3", "site-4")
    np.testing.assert_array_equal(total, sum(plain[site] for site in survivors))


def test_masking_changes_nothing_in_the_vector_that_was_given(consortium: Any, vectors: MakeVectors) -> None:
    plain = vectors(consortium.sites)["site-1"]
    before = plain.copy()
    plain.flags.writeable = False
    consortium.mask("site-1", consortium.start(0), plain)
    np.testing.assert_array_equal(plain, before)


def test_masked_vector_is_uniform(consortium: Any) -> None:
    """Of a vector of zeros; chi-square of 255 degrees of freedom, 1 - 1e-5."""
    masked = consortium.mask("site-1", consortium.start(0), np.zeros(2**14, np.uint32))
    octets = np.bincount(np.frombuffer(masked.vector, np.uint8), minlength=256)
    assert ((octets - 256.0) ** 2 / 256.0).sum() < 360


def test_own_masks_are_uniform_and_differ_by_site_and_round() -> None:
    keys = {
        (site, round_id): own_mask_key(b"s" * 32, round_id * 32, site) for site in "ab" for round_id in (b"1", b"2")
    }
    assert len(set(keys.values())) == 4
    total = np.zeros(2**14, np.uint32)
    add_mask(total, keys["a", b"1"])
    octets = np.bincount(total.view(np.uint8), minlength=256)
    assert ((octets - 256.0) ** 2 / 256.0).sum() < 360


def test_seeded_consortium_is_the_same_twice(make_consortium: MakeConsortium, vectors: MakeVectors) -> None:
    sent = []
    for _ in range(2):
        consortium = make_consortium(seed=4)
        consortium.begin()
        sent.append(consortium.mask("site-1", consortium.start(0), vectors(consortium.sites)["site-1"]).to_bytes())
    assert sent[0] == sent[1]


# Bytes

names = st.lists(st.text(max_size=8).filter(lambda text: text.isprintable()), unique=True, max_size=4).map(tuple)
name = st.text(max_size=8).filter(lambda text: text.isprintable())
numbers_64 = st.integers(0, 2**64 - 1)
any_bytes = st.binary(max_size=40)


def exactly(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


def tuples(one: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(one, max_size=3).map(tuple)


digest, signature = exactly(32), exactly(64)
bodies = st.builds(SetupBody, name, digest, numbers_64, digest, tuples(digest), tuples(digest), tuples(digest))
advertised = st.builds(Advertised, name, digest, numbers_64, digest, signature)
starts = st.builds(RoundStart, digest, numbers_64, numbers_64, digest, digest, names)
votes = st.builds(Vote, name, digest, signature)
uploads = st.builds(Upload, name, digest, signature)
MESSAGES: list[st.SearchStrategy[WireMessage]] = [
    bodies,
    advertised,
    st.builds(Roster, digest, numbers_64, tuples(advertised)),
    starts,
    votes,
    uploads,
    st.builds(Setup, any_bytes, signature, tuples(any_bytes)),
    st.builds(Relay, digest, numbers_64, tuples(st.builds(RelayedSetup, any_bytes, signature, any_bytes))),
    st.builds(Acceptance, name, numbers_64, names, signature),
    st.builds(Masked, name, digest, signature, any_bytes),
    st.builds(VoteRequest, starts, names),
    st.builds(OpenRequest, starts, names, tuples(votes), tuples(uploads)),
    st.builds(Shares, name, digest, tuples(digest), signature),
]
KINDS = (
    Advertised, Roster, SetupBody, RoundStart, Vote, Upload, Setup, Relay, RelayedSetup, Acceptance, Masked,
    VoteRequest, OpenRequest, Shares,
)  # fmt: skip


@given(st.one_of(MESSAGES))
def test_message_is_what_its_bytes_say(message: WireMessage) -> None:
    assert type(message).parse(message.to_bytes()) == message


@given(st.one_of(MESSAGES), st.data())
def test_damaged_message_is_refused_or_is_another_message(message: WireMessage, data: st.DataObject) -> None:
    """Nothing but a :class:`SecureAggregationError`, whatever comes; and what is read has just these bytes."""
    whole = bytearray(message.to_bytes())
    cut = data.draw(st.integers(0, len(whole)))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(whole[:cut]), bytes(whole), bytes(whole) + data.draw(st.binary(min_size=1, max_size=5))):
        for kind in KINDS:
            try:
                read = kind.parse(damaged)
            except SecureAggregationError:
                continue
            assert read.to_bytes() == damaged
    if 0 < cut < len(message.to_bytes()):
        with pytest.raises(SecureAggregationError):
            type(message).parse(message.to_bytes()[:cut])


@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_garbage_is_refused(data: bytes, kind: type[WireMessage]) -> None:
    try:
        assert kind.parse(data).to_bytes() == data
    except SecureAggregationError:
        return


def test_known_answers_of_digests_keys_and_masks_have_not_changed(tmp_path: Path) -> None:
    """The vectors are computed from the standards alone: see tests/golden/secure_aggregation.py."""
    golden = json.loads(GOLDEN.read_text())
    identities = {site: Identity(bytes([place]) * 32) for place, site in enumerate(golden["members"])}
    members = tuple(identity.member(site) for site, identity in identities.items())
    assert {one.site: one.signing_key.hex() for one in members} == golden["members"]
    plan = SecureAggregationPlan(
        study_digest=bytes(range(32)),
        scope="federated",
        members=members,
        threshold=3,
        max_colluding=1,
        min_sites=3,
        rounds_per_epoch=32,
    )
    assert plan.digest.hex() == golden["plan_digest"]
    start = RoundStart(plan.digest, 7, 5, b"c" * 32, b"m" * 32, plan.sites)
    assert start.to_bytes().hex() == golden["start"]
    round_id = start.round_id(tuple(bytes([16 + place]) * 32 for place in range(3)))
    assert round_id.hex() == golden["round_id"]
    own = own_mask_key(b"s" * 32, round_id, "east")
    assert own.hex() == golden["own_mask_key"]
    total = np.zeros(4, np.uint32)
    add_mask(total, own)
    assert total.tolist() == golden["own_mask"]
    first, second = (X25519PrivateKey.from_private_bytes(bytes([64 + place]) * 32) for place in range(2))
    public = second.public_key().public_bytes_raw()
    assert pair_mask_key(first.private_bytes_raw(), public, round_id, "north", "east").hex() == golden["pair_mask_key"]
    roster = Roster.parse(bytes.fromhex(golden["roster"]))
    assert roster.digest.hex() == golden["roster_digest"]
    assert [one.box_key for one in roster.advertised][1] == public
    for place, site in enumerate(plan.sites):
        client = SecureClient(
            site, identities[site], plan, tmp_path / site, random_bytes=lambda _, place=place: bytes([64 + place]) * 32
        )
        assert client.advertise(7) == roster.advertised[place]
    box = derived_key(shared_secret(first, public), "box", plan.digest, roster.digest, b"north", b"east")
    assert box.hex() == golden["box_key"]
    nonce, sealed = bytes(12), ChaCha20Poly1305(box).encrypt(bytes(12), b"shares", None)
    opener = SecureClient("east", identities["east"], plan, tmp_path / "none")
    assert opener._cipher(second, roster.advertised[0].box_key, roster, "north", "east").decrypt(
        nonce, sealed, None
    ) == b"shares"  # fmt: skip
