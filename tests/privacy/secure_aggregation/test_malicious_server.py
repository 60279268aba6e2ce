"""A server that lies, through the same messages as an honest one: what the sites refuse, and why it matters.

Four sites, of which one colludes; three votes open a sum of at least three.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import names
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.messages import (
    Masked,
    OpenRequest,
    RoundStart,
    Shares,
    Upload,
    Vote,
    VoteRequest,
)
from privacy.secure_aggregation.server import SecureSum, SetupPhase

C, D, J, I = "site-0", "site-1", "site-2", "site-3"  # noqa: E741  # corrupt, dropped, and two more
ALL = (C, D, J, I)
WITHOUT_D = (C, J, I)
WITHOUT_I = (C, D, J)
OTHER_SUM = "the survivors that this site agreed to when this was summed before"
MakeVectors = Callable[..., dict[str, Any]]


def corrupt_vote(consortium: Any, site: str, start: RoundStart, survivors: tuple[str, ...]) -> Vote:
    """A vote that a corrupt site signs, whatever it voted before."""
    round_id = consortium.round_id(start)
    return Vote(site, round_id, consortium.identities[site].sign("vote", round_id, names(survivors)))


def corrupt_upload(consortium: Any, site: str, start: RoundStart) -> Upload:
    signature = consortium.identities[site].sign("masked", consortium.round_id(start), bytes(32))
    return Upload(site, bytes(32), signature)


@dataclasses.dataclass
class Round:
    """A round in which all have uploaded, and what a server may ask of it."""

    consortium: Any
    start: RoundStart
    masked: dict[str, Masked]

    def votes(self, survivors: tuple[str, ...], voters: Sequence[str]) -> tuple[Vote, ...]:
        return tuple(self.consortium.client(site).vote(VoteRequest(self.start, survivors)) for site in voters)

    def request(self, survivors: tuple[str, ...], votes: tuple[Vote, ...]) -> OpenRequest:
        return OpenRequest(
            self.start, survivors, votes, tuple(self.consortium.upload(self.masked[site]) for site in survivors)
        )


@pytest.fixture
def uploaded(consortium: Any, vectors: MakeVectors) -> Round:
    start, plain = consortium.start(0), vectors(ALL)
    return Round(consortium, start, {site: consortium.mask(site, start, plain[site]) for site in ALL})


# Who survived


def test_site_that_was_told_of_a_smaller_round_is_not_opened_as_survivor_of_a_larger_one(
    consortium: Any, adversary_of: Callable[..., Any], vectors: MakeVectors
) -> None:
    """Site I masks with C and D alone; the others then call D missing and I a survivor of a round of all.

    Votes alone do not stop this: I votes nowhere, and three others do. D's round key and I's own seed would be
    opened, and with them I's vector, alone.
    """
    adversary = adversary_of(consortium, (C,))
    adversary.join(1, [0])
    small, large = consortium.start(0, [C, D, I]), consortium.start(0)
    plain = vectors(ALL)
    told_small = consortium.mask(I, small, plain[I])
    adversary.hear_masked(small, told_small)
    uploads = (corrupt_upload(consortium, C, large), consortium.upload(consortium.mask(J, large, plain[J])))
    votes = [corrupt_vote(consortium, C, large, WITHOUT_D)]
    votes += [consortium.client(site).vote(VoteRequest(large, WITHOUT_D)) for site in (D, J)]
    for proof in (consortium.upload(told_small), Upload(I, bytes(32), uploads[0].signature)):
        request = OpenRequest(large, WITHOUT_D, tuple(votes), (*uploads, proof))
        for site in (D, J):
            with pytest.raises(SecureAggregationError, match="proof that 'site-3' masked a vector for this round"):
                consortium.client(site).open(request)
    for some in ((), uploads, (*uploads, uploads[0])):
        with pytest.raises(SecureAggregationError, match="proof that each survivor uploaded"):
            consortium.client(D).open(OpenRequest(large, WITHOUT_D, tuple(votes), some))
    assert adversary.sums() == {}


def test_without_proofs_of_uploads_that_site_would_be_read(
    consortium: Any, adversary_of: Callable[..., Any], vectors: MakeVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack in full, on a client that lacks the rule: one hospital's vector, alone and exact."""
    monkeypatch.setattr(SecureClient, "_check_uploads", lambda *_: None)
    adversary, plain = adversary_of(consortium, (C,)), vectors(ALL)
    adversary.join(1, [0])
    small, large = consortium.start(0, [C, D, I]), consortium.start(0)
    adversary.hear_masked(small, consortium.mask(I, small, plain[I]))
    votes = [consortium.client(site).vote(VoteRequest(large, WITHOUT_D)) for site in (D, J)]
    request = OpenRequest(large, WITHOUT_D, (corrupt_vote(consortium, C, large, WITHOUT_D), *votes))
    for site in (D, J):
        adversary.hear_shares(request, consortium.client(site).open(request))
    ((opened, vector),) = adversary.sums().items()
    assert opened == {I}
    np.testing.assert_array_equal(vector, plain[I])


def test_site_is_never_survivor_and_missing_at_once(uploaded: Round) -> None:
    """Shares come one for each site, by whether it survived: there is no message that lists a site as both."""
    votes = uploaded.votes(WITHOUT_D, WITHOUT_D)
    request = uploaded.request(WITHOUT_D, votes)
    for bad in (("site-0", "site-0", "site-2"), (*WITHOUT_D, "site-1", "site-1")):
        with pytest.raises(SecureAggregationError, match="Expected each site once"):
            OpenRequest.parse(dataclasses.replace(request, survivors=bad).to_bytes())
    with pytest.raises(SecureAggregationError, match=OTHER_SUM):
        uploaded.consortium.client(J).open(OpenRequest(uploaded.start, ALL))
    (shares,) = {len(uploaded.consortium.client(site).open(request).shares) for site in WITHOUT_D}
    assert shares == len(ALL)


def test_second_set_of_survivors_gets_no_vote(uploaded: Round) -> None:
    uploaded.votes(WITHOUT_D, ALL)
    for survivors in (WITHOUT_I, ALL):
        for site in ALL:
            with pytest.raises(SecureAggregationError, match=OTHER_SUM):
                uploaded.votes(survivors, [site])
    assert len(uploaded.votes(WITHOUT_D, ALL)) == 4  # the same vote may be asked for again


def test_second_set_of_survivors_gets_no_vote_in_a_slot_whatever_is_summed(consortium: Any) -> None:
    """Of sites that masked nothing in it: what is summed is in their vote."""
    first, other = consortium.start(0), consortium.start(0, channel=b"x" * 32)
    for site in ALL:
        consortium.client(site).vote(VoteRequest(first, WITHOUT_D))
        for survivors in (WITHOUT_I, ALL, WITHOUT_D):
            with pytest.raises(SecureAggregationError, match="others; it agrees to one set, once"):
                consortium.client(site).vote(
                    VoteRequest(dataclasses.replace(other, channel=names(survivors)[:32]), survivors)
                )
        with pytest.raises(SecureAggregationError, match="others; it agrees to one set, once"):
            consortium.client(site).open(OpenRequest(other, ALL))


def test_votes_collected_for_two_sets_never_suffice_for_both(uploaded: Round) -> None:
    first = (*uploaded.votes(WITHOUT_D, [J, I]), corrupt_vote(uploaded.consortium, C, uploaded.start, WITHOUT_D))
    second = (*uploaded.votes(WITHOUT_I, [D]), corrupt_vote(uploaded.consortium, C, uploaded.start, WITHOUT_I))
    with pytest.raises(SecureAggregationError, match="votes of at least 3 sites for these survivors, got 2"):
        uploaded.consortium.client(D).open(uploaded.request(WITHOUT_I, second))
    uploaded.consortium.client(J).open(uploaded.request(WITHOUT_D, first))
    with pytest.raises(SecureAggregationError, match=OTHER_SUM):
        uploaded.consortium.client(D).open(uploaded.request(WITHOUT_D, first))


def test_nothing_is_voted_after_the_fast_path(uploaded: Round) -> None:
    site = uploaded.consortium.client(J)
    site.open(OpenRequest(uploaded.start, ALL))
    for survivors in (WITHOUT_D, WITHOUT_I, ALL):
        with pytest.raises(SecureAggregationError):
            site.vote(VoteRequest(uploaded.start, survivors))
    with pytest.raises(SecureAggregationError, match="used, closed by a later round, or lost"):
        site.open(OpenRequest(uploaded.start, ALL))


def test_fast_path_is_closed_after_a_vote(uploaded: Round) -> None:
    uploaded.votes(WITHOUT_D, [J])
    with pytest.raises(SecureAggregationError, match=OTHER_SUM):
        uploaded.consortium.client(J).open(OpenRequest(uploaded.start, ALL))


def test_survivors_fewer_than_the_sites_are_not_opened_without_votes(uploaded: Round) -> None:
    with pytest.raises(SecureAggregationError, match="votes of at least 3 sites for these survivors, got 0"):
        uploaded.consortium.client(J).open(OpenRequest(uploaded.start, WITHOUT_D))
    uploaded.votes(WITHOUT_D, [J])  # what was refused is not held against the site


def test_votes_that_a_site_did_not_give_are_refused(uploaded: Round) -> None:
    consortium, start = uploaded.consortium, uploaded.start
    good = uploaded.votes(WITHOUT_D, [J, I])
    (other,) = uploaded.votes(WITHOUT_I, [D])
    opener = consortium.client(J)

    def tried(third: Vote, match: str) -> None:
        with pytest.raises(SecureAggregationError, match=match):
            opener.open(uploaded.request(WITHOUT_D, (*good, third)))

    not_given = "one that it did not give"
    tried(other, not_given)  # for other survivors
    tried(dataclasses.replace(corrupt_vote(consortium, C, start, WITHOUT_D), site=D), not_given)
    tried(dataclasses.replace(good[0], site=D), not_given)
    tried(Vote(D, good[0].round_id, bytes(64)), not_given)
    tried(corrupt_vote(consortium, C, consortium.start(0, model=b"x" * 32), WITHOUT_D), not_given)
    tried(good[0], "one vote of each site, got two")
    tried(dataclasses.replace(good[0], site="stranger"), "votes of sites of the round")
    opener.open(uploaded.request(WITHOUT_D, (*good, corrupt_vote(consortium, C, start, WITHOUT_D))))


def test_member_outside_the_round_has_no_vote_in_it(consortium: Any, vectors: MakeVectors) -> None:
    start = consortium.start(0, WITHOUT_D)
    masked = {site: consortium.mask(site, start, vectors(ALL)[site]) for site in WITHOUT_D}
    votes = tuple(corrupt_vote(consortium, site, start, WITHOUT_D) for site in (C, D, I))
    request = OpenRequest(start, WITHOUT_D, votes, tuple(consortium.upload(masked[site]) for site in WITHOUT_D))
    with pytest.raises(SecureAggregationError, match="votes of sites of the round, got one of 'site-1'"):
        consortium.client(J).open(request)
    with pytest.raises(SecureAggregationError, match="this one among them"):
        consortium.client(D).vote(VoteRequest(start, WITHOUT_D))


def test_sum_of_fewer_than_min_sites_gets_no_vote_and_no_share(uploaded: Round) -> None:
    for survivors in ((C, J), (J,), ()):
        votes = tuple(corrupt_vote(uploaded.consortium, site, uploaded.start, survivors) for site in ALL)
        for site in (D, J):
            client = uploaded.consortium.client(site)
            with pytest.raises(SecureAggregationError, match="at least 3 survivors"):
                client.vote(VoteRequest(uploaded.start, survivors))
            with pytest.raises(SecureAggregationError, match="at least 3 survivors"):
                client.open(uploaded.request(survivors, votes))


def test_round_of_fewer_than_min_sites_gets_no_vector(consortium: Any, vectors: MakeVectors) -> None:
    for sites in ((J, I), (J,), ()):
        start = RoundStart(consortium.plan.digest, 1, 0, b"c" * 32, b"m" * 32, sites)
        with pytest.raises(SecureAggregationError, match="a round of at least 3 sites, this one among them"):
            consortium.mask(J, start, vectors(ALL)[J])


@pytest.mark.parametrize(
    ("survivors", "match"),
    [
        ((C, I, J), "in the order of the study"),
        ((C, J, I, "stranger"), "among the sites of the round"),
        ((C, J, D, I), "in the order of the study"),
    ],
)
def test_survivors_are_sites_of_the_round_in_order(uploaded: Round, survivors: tuple[str, ...], match: str) -> None:
    votes = tuple(corrupt_vote(uploaded.consortium, site, uploaded.start, survivors) for site in ALL)
    request = OpenRequest(uploaded.start, survivors, votes, ())
    with pytest.raises(SecureAggregationError, match=match):
        uploaded.consortium.client(J).vote(VoteRequest(uploaded.start, survivors))
    with pytest.raises(SecureAggregationError):
        uploaded.consortium.client(J).open(request)


# One vector in a slot


def test_slot_masks_one_vector(consortium: Any, vectors: MakeVectors) -> None:
    start = consortium.start(0)
    consortium.mask(J, start, vectors(ALL)[J])
    for again in (start, consortium.start(0, WITHOUT_D), consortium.start(0, model=b"x" * 32)):
        with pytest.raises(SecureAggregationError, match="a slot after 0, got 0; a retry needs a new slot"):
            consortium.mask(J, again, vectors(ALL)[J])


def test_earlier_slot_is_closed_for_ever(consortium: Any, vectors: MakeVectors) -> None:
    first, third = consortium.start(0), consortium.start(2)
    consortium.mask(J, first, vectors(ALL)[J])
    consortium.mask(J, third, vectors(ALL)[J])
    with pytest.raises(SecureAggregationError, match="a slot after 2, got 1"):
        consortium.mask(J, consortium.start(1), vectors(ALL)[J])
    for call in (
        lambda: consortium.client(J).vote(VoteRequest(first, ALL)),
        lambda: consortium.client(J).open(OpenRequest(first, ALL)),
    ):
        with pytest.raises(SecureAggregationError, match="used, closed by a later round, or lost"):
            call()


def test_vector_is_not_masked_after_a_vote(consortium: Any, vectors: MakeVectors) -> None:
    start = consortium.start(0)
    consortium.client(J).vote(VoteRequest(start, WITHOUT_D))
    with pytest.raises(SecureAggregationError, match="it was given up as lost there"):
        consortium.mask(J, start, vectors(ALL)[J])


def test_site_answers_only_for_the_round_it_masked_for(uploaded: Round) -> None:
    consortium = uploaded.consortium
    for other in (
        consortium.start(0, model=b"x" * 32),
        consortium.start(0, channel=b"x" * 32),
        consortium.start(0, WITHOUT_D),
    ):
        for call in (
            lambda other=other: consortium.client(J).vote(VoteRequest(other, WITHOUT_D)),
            lambda other=other: consortium.client(J).open(OpenRequest(other, other.sites)),
        ):
            with pytest.raises(SecureAggregationError, match="got another of the same slot"):
                call()


def test_retry_uses_new_masks(consortium: Any, vectors: MakeVectors) -> None:
    """The same vector in a new slot: the difference of what was sent is as uniform as one mask."""
    plain = vectors(ALL, 4096)[J]
    sent = [np.frombuffer(consortium.mask(J, consortium.start(slot), plain).vector, "<u4") for slot in (0, 1)]
    difference = sent[0] - sent[1]
    assert len(np.unique(difference)) > 4000
    octets = np.bincount(difference.view(np.uint8), minlength=256)
    assert ((octets - 64.0) ** 2 / 64.0).sum() < 360  # chi-square of 255 degrees of freedom, 1 - 1e-5


def test_vector_that_comes_late_stays_masked(
    consortium: Any, adversary_of: Callable[..., Any], vectors: MakeVectors
) -> None:
    """D was called missing, and its round key is open; its vector, which arrives then, has its own mask still."""
    adversary, start, plain = adversary_of(consortium, (C,)), consortium.start(0), vectors(ALL, 2048)
    adversary.join(1, [0])
    masked = {site: consortium.mask(site, start, plain[site]) for site in ALL}
    for site in ALL:
        adversary.hear_masked(start, masked[site])  # D's too
    votes = tuple(consortium.client(site).vote(VoteRequest(start, WITHOUT_D)) for site in ALL)
    request = OpenRequest(start, WITHOUT_D, votes, tuple(consortium.upload(masked[site]) for site in WITHOUT_D))
    for site in ALL:
        adversary.hear_shares(request, consortium.client(site).open(request))
    assert adversary.secret("key", D, 0) is not None
    assert adversary.secret("seed", D, 0) is None
    sums = adversary.sums()
    assert set(sums) == {frozenset([C]), frozenset([J, I])}  # the corrupt site's own, and the sum of two honest ones
    np.testing.assert_array_equal(sums[frozenset([J, I])], plain[J] + plain[I])


def test_all_that_three_openers_tell_is_the_sum(
    consortium: Any, adversary_of: Callable[..., Any], vectors: MakeVectors
) -> None:
    adversary, start, plain = adversary_of(consortium, (C,)), consortium.start(0), vectors(ALL)
    adversary.join(1, [0])
    for site in ALL:
        adversary.hear_masked(start, consortium.mask(site, start, plain[site]))
    request = OpenRequest(start, ALL)
    for site in (D, J, I):
        adversary.hear_shares(request, consortium.client(site).open(request))
    sums = adversary.sums()
    assert set(sums) == {frozenset([C]), frozenset([D, J, I])}
    np.testing.assert_array_equal(sums[frozenset([D, J, I])], plain[D] + plain[J] + plain[I])


# What is summed


def test_sites_that_got_different_models_send_noise(consortium: Any, vectors: MakeVectors) -> None:
    """I alone gets another model: with it, what I sent does not belong to the round, and the rest opens nothing."""
    start, other, plain = consortium.start(0), consortium.start(0, model=b"x" * 32), vectors(ALL, 64)
    masked = {site: consortium.mask(site, other if site == I else start, plain[site]) for site in ALL}
    server = SecureSum(consortium.epoch, start, num_elements=64)
    for site in (C, D, J):
        server.add(masked[site])
    with pytest.raises(SecureAggregationError, match="a vector that 'site-3' signed for this round"):
        server.add(masked[I])
    # A server that adds it up all the same, and gets all own masks opened by those who agree:
    round_id = consortium.round_id(start)
    forged = dataclasses.replace(
        masked[I],
        round_id=round_id,
        signature=consortium.identities[I].sign("masked", *Masked.signed_fields(round_id, masked[I].vector)),
    )
    server.add(forged)
    server.close()
    for site in (C, D, J):
        server.add_shares(consortium.client(site).open(server.open_request()))
    total, _ = server.opened()
    assert not np.any(total == sum(plain[site] for site in ALL))
    assert len(np.unique(total)) > 60


def test_model_that_is_not_the_announced_one_is_refused(consortium: Any, vectors: MakeVectors) -> None:
    client, vector = consortium.client(J), vectors(ALL)[J]
    start = consortium.start(0)
    with pytest.raises(SecureAggregationError, match="digest of the model that came with the round, got another"):
        client.mask(start, vector, channel=start.channel, model=b"x" * 32)
    with pytest.raises(SecureAggregationError, match="for the vectors that the study defines, got one for others"):
        client.mask(start, vector, channel=b"x" * 32, model=start.model)
    client.mask(start, vector, channel=start.channel, model=start.model)  # nothing was used up


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sites": (C, I, J)}, "in the order of the study"),
        ({"sites": (C, J, I, "stranger")}, "sites whose setup this site accepted, got 'stranger'"),
        ({"sites": (C, D, I)}, "this one among them"),
        ({"epoch": 2}, "newest epoch of this site, 1, got 2"),
        ({"epoch": 0}, "newest epoch of this site, 1, got 0"),
        ({"epoch": 2**64 - 1}, "newest epoch of this site, 1, got 18446744073709551615"),
        ({"slot": 4}, "a slot in 0..3, got 4"),
        ({"slot": 2**64 - 1}, "a slot in 0..3, got 18446744073709551615"),
        ({"plan": b"p" * 32}, "a round of this site's plan"),
    ],
)
def test_start_that_is_not_of_this_plan_and_epoch_is_refused(
    consortium: Any, vectors: MakeVectors, change: dict[str, Any], match: str
) -> None:
    start = RoundStart.parse(dataclasses.replace(consortium.start(0), **change).to_bytes())
    votes = tuple(Vote(site, bytes(32), bytes(64)) for site in ALL)
    client = consortium.client(J)
    for call in (
        lambda: client.mask(start, vectors(ALL)[J], channel=start.channel, model=start.model),
        lambda: client.vote(VoteRequest(start, WITHOUT_D)),
        lambda: client.open(OpenRequest(start, start.sites)),
        lambda: client.open(OpenRequest(start, WITHOUT_D, votes)),
    ):
        with pytest.raises(SecureAggregationError, match=match):
            call()


# The same thing, summed again


def start_again(consortium: Any, where: str, sites: Sequence[str] = ALL, *, channel: bytes = b"x" * 32) -> RoundStart:
    """A round that sums the same thing as slot 0 of epoch 1 did, later."""
    if where == "another epoch":
        consortium.begin(2)
    start: RoundStart = consortium.start(0 if where == "another epoch" else 1, sites, channel=channel)
    return start


LATER = pytest.mark.parametrize("where", ["another slot", "another epoch"])


@LATER
@pytest.mark.parametrize("missing", ["not asked", "dropped out"])
def test_second_sum_of_the_same_thing_over_other_sites_is_refused(
    consortium: Any, vectors: MakeVectors, where: str, missing: str
) -> None:
    """The difference of the two would be D's vector. Whether D is not asked, or is said to have dropped out."""
    plain = vectors(ALL)
    consortium.run(consortium.start(0, channel=b"x" * 32), plain)
    start = start_again(consortium, where, ALL if missing == "dropped out" else WITHOUT_D)
    masked = {site: consortium.mask(site, start, plain[site]) for site in WITHOUT_D}
    by_corrupt = tuple(corrupt_vote(consortium, site, start, WITHOUT_D) for site in WITHOUT_D)  # as if two were more
    uploads = tuple(consortium.upload(masked[site]) for site in WITHOUT_D)
    for site in (J, I):
        client = consortium.client(site)
        with pytest.raises(SecureAggregationError, match=OTHER_SUM):
            client.vote(VoteRequest(start, WITHOUT_D))
        with pytest.raises(SecureAggregationError, match=OTHER_SUM):
            client.open(OpenRequest(start, WITHOUT_D, by_corrupt, uploads))
        if missing == "not asked":
            with pytest.raises(SecureAggregationError, match=OTHER_SUM):
                client.open(OpenRequest(start, WITHOUT_D))


@LATER
def test_sum_over_more_sites_than_the_first_is_refused(consortium: Any, vectors: MakeVectors, where: str) -> None:
    plain = vectors(ALL)
    consortium.run(consortium.start(0, channel=b"x" * 32), plain, before_upload=[D])
    start = start_again(consortium, where)
    for site in ALL:
        consortium.mask(site, start, plain[site])
    for site in (J, I):
        with pytest.raises(SecureAggregationError, match=OTHER_SUM):
            consortium.client(site).open(OpenRequest(start, ALL))


@LATER
def test_vote_that_opened_nothing_binds_all_the_same(consortium: Any, where: str) -> None:
    """Nobody can tell whether others opened it."""
    consortium.client(J).vote(VoteRequest(consortium.start(0, channel=b"x" * 32), WITHOUT_D))
    start = start_again(consortium, where)
    for call in (
        lambda: consortium.client(J).vote(VoteRequest(start, ALL)),
        lambda: consortium.client(J).open(OpenRequest(start, ALL)),
    ):
        with pytest.raises(SecureAggregationError, match=OTHER_SUM):
            call()
    consortium.client(J).vote(VoteRequest(start, WITHOUT_D))


@LATER
@pytest.mark.parametrize("sites", [ALL, WITHOUT_D])
def test_same_survivors_may_be_summed_again(
    consortium: Any, vectors: MakeVectors, where: str, sites: tuple[str, ...]
) -> None:
    """Whether the missing site dropped out or was not asked; and with other vectors."""
    first, second = vectors(ALL), vectors(ALL, seed=1)
    consortium.run(consortium.start(0, channel=b"x" * 32), first, before_upload=[D])
    start = start_again(consortium, where, sites)
    total, survivors, _ = consortium.run(start, second, before_upload=[D] if sites == ALL else [])
    assert survivors == WITHOUT_D
    np.testing.assert_array_equal(total, second[C] + second[J] + second[I])


@LATER
def test_something_else_may_be_summed_over_other_sites(consortium: Any, vectors: MakeVectors, where: str) -> None:
    plain = vectors(ALL)
    consortium.run(consortium.start(0, channel=b"x" * 32), plain)
    start = start_again(consortium, where, channel=b"y" * 32)
    _, survivors, _ = consortium.run(start, plain, before_upload=[D])
    assert survivors == WITHOUT_D


@LATER
def test_without_that_rule_the_difference_of_two_sums_would_be_a_vector(
    consortium: Any, vectors: MakeVectors, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack in full, on a client that lacks the rule."""
    monkeypatch.setattr(Journal, "agree", lambda *_: True)
    plain = vectors(ALL)
    all_of_them, _, _ = consortium.run(consortium.start(0, channel=b"x" * 32), plain)
    without_d, _, _ = consortium.run(start_again(consortium, where), plain, before_upload=[D])
    np.testing.assert_array_equal(all_of_them - without_d, plain[D])


# Replay


def replays(consortium: Any) -> list[tuple[str, Callable[[Any], object]]]:
    """Messages of a whole round, each as a call on a consortium that has not heard of it."""
    start = consortium.start(0)
    masked = {site: consortium.mask(site, start, np.zeros(3, np.uint32)) for site in ALL}
    votes = tuple(consortium.client(site).vote(VoteRequest(start, WITHOUT_D)) for site in ALL)
    request = OpenRequest(start, WITHOUT_D, votes, tuple(consortium.upload(masked[site]) for site in WITHOUT_D))
    return [
        ("start", lambda other: other.mask(J, start, np.zeros(3, np.uint32))),
        ("vote", lambda other: other.client(J).vote(VoteRequest(start, WITHOUT_D))),
        ("open", lambda other: other.client(J).open(request)),
        ("fast", lambda other: other.client(J).open(OpenRequest(start, ALL))),
    ]


def test_messages_of_an_earlier_epoch_are_refused(consortium: Any) -> None:
    calls = replays(consortium)
    consortium.begin(2)
    for _, call in calls:
        with pytest.raises(SecureAggregationError, match="newest epoch of this site, 2, got 1"):
            call(consortium)
    with pytest.raises(SecureAggregationError, match="an epoch newer than 2, got 2"):
        consortium.client(J).advertise(2)
    with pytest.raises(SecureAggregationError, match="an epoch newer than 2, got 1"):
        consortium.client(J).advertise(1)


def test_votes_and_uploads_of_another_epoch_round_or_view_count_for_nothing(consortium: Any) -> None:
    """The same slot, sites, survivors, model: only the epoch differs, and so all signatures do."""

    def heard() -> tuple[tuple[Vote, ...], tuple[Upload, ...]]:
        start = consortium.start(0)
        masked = {site: consortium.mask(site, start, np.zeros(3, np.uint32)) for site in ALL}
        votes = tuple(consortium.client(site).vote(VoteRequest(start, WITHOUT_D)) for site in ALL)
        return votes, tuple(consortium.upload(masked[site]) for site in WITHOUT_D)

    old_votes, old_uploads = heard()
    consortium.begin(2)
    votes, uploads = heard()
    round_id, start = consortium.round_id(consortium.start(0)), consortium.start(0)
    renamed = tuple(dataclasses.replace(vote, round_id=round_id) for vote in old_votes)
    for bad in (old_votes, renamed):
        with pytest.raises(SecureAggregationError, match="one that it did not give"):
            consortium.client(J).open(OpenRequest(start, WITHOUT_D, bad, uploads))
    with pytest.raises(SecureAggregationError, match="none that it signed"):
        consortium.client(J).open(OpenRequest(start, WITHOUT_D, votes, old_uploads))
    consortium.client(J).open(OpenRequest(start, WITHOUT_D, votes, uploads))


@pytest.mark.parametrize("other", [{"study": b"s" * 32}, {"scope": "other"}, {"rounds_per_epoch": 5}])
def test_messages_of_another_study_or_scope_are_refused(
    consortium: Any, make_consortium: Callable[..., Any], other: dict[str, Any]
) -> None:
    """The same sites with the same identities."""
    neighbour = make_consortium(**other)
    neighbour.begin(1)
    for _, call in replays(neighbour):
        with pytest.raises(SecureAggregationError, match="a round of this site's plan"):
            call(consortium)
    theirs, ours = neighbour.advertised(2), consortium.advertised(2)
    with pytest.raises(SecureAggregationError, match="a setup of 'site-2' for epoch 2, got another"):
        ours.add(neighbour.client(J).setup(theirs.roster))
    for one in theirs.roster.advertised:
        for renamed in (one, dataclasses.replace(one, plan=consortium.plan.digest)):
            with pytest.raises(SecureAggregationError, match="signed for epoch 2, got another"):
                SetupPhase(consortium.plan, 2).advertise(renamed)
    for roster in (theirs.roster, dataclasses.replace(theirs.roster, plan=consortium.plan.digest)):
        with pytest.raises(SecureAggregationError, match="a roster of this site's plan|'site-0' signed for epoch 2"):
            consortium.client(J).setup(roster)
    assert neighbour.plan.digest != consortium.plan.digest


# What a server that does not lie finds out about sites that do


def test_tampered_share_is_blamed_on_its_sender_and_the_sum_is_right(uploaded: Round, vectors: MakeVectors) -> None:
    consortium, plain = uploaded.consortium, vectors(ALL)
    server = SecureSum(consortium.epoch, uploaded.start, num_elements=5)
    for masked in uploaded.masked.values():
        server.add(masked)
    server.close()
    shares = {site: consortium.client(site).open(server.open_request()) for site in ALL}
    changed = (bytes([shares[C].shares[1][0] ^ 1]) + shares[C].shares[1][1:], *shares[C].shares[2:])
    wrong = dataclasses.replace(shares[C], shares=(shares[C].shares[0], *changed))
    with pytest.raises(SecureAggregationError, match="shares that 'site-0' signed for this round, got others"):
        server.add_shares(wrong)  # changed on the way
    signed = (consortium.round_id(uploaded.start), names(ALL), b"".join(wrong.shares))
    wrong = dataclasses.replace(wrong, signature=consortium.identities[C].sign("shares", *signed))
    for site in ALL:
        server.add_shares(wrong if site == C else shares[site])
    total, blamed = server.opened()
    assert blamed == (C,)
    np.testing.assert_array_equal(total, sum(plain[site] for site in ALL))


def test_too_few_or_too_many_bad_shares_open_nothing(uploaded: Round) -> None:
    consortium = uploaded.consortium
    server = SecureSum(consortium.epoch, uploaded.start, num_elements=5)
    for masked in uploaded.masked.values():
        server.add(masked)
    server.close()
    for site in (J, I):
        server.add_shares(consortium.client(site).open(server.open_request()))
    with pytest.raises(SecureAggregationError, match="shares of at least 3 sites, got 2"):
        server.opened()
    lie = tuple(bytes(32) for _ in ALL)
    signature = consortium.identities[C].sign("shares", consortium.round_id(uploaded.start), names(ALL), b"".join(lie))
    server.add_shares(Shares(C, consortium.round_id(uploaded.start), lie, signature))
    with pytest.raises(SecureAggregationError, match="too many of them sent bad ones. Nothing of the round"):
        server.opened()


def test_server_refuses_vectors_and_votes_that_are_not_of_the_round(uploaded: Round) -> None:
    consortium, start = uploaded.consortium, uploaded.start
    server = SecureSum(consortium.epoch, start, num_elements=5)
    server.add(uploaded.masked[C])
    for bad, match in [
        (uploaded.masked[C], "one vector of each site of the round"),
        (dataclasses.replace(uploaded.masked[C], site="stranger"), "one vector of each site of the round"),
        (dataclasses.replace(uploaded.masked[C], site=D), "a vector that 'site-1' signed"),
        (dataclasses.replace(uploaded.masked[D], vector=bytes(20)), "a vector that 'site-1' signed"),
    ]:
        with pytest.raises(SecureAggregationError, match=match):
            server.add(bad)
    round_id = consortium.round_id(start)
    long = Masked(D, round_id, consortium.identities[D].sign("masked", *Masked.signed_fields(round_id, b"")), b"")
    with pytest.raises(SecureAggregationError, match="20 bytes of 'site-1', got 0"):
        server.add(long)
    with pytest.raises(SecureAggregationError, match="vectors of at least 3 sites, got 1; missing: site-1, site-2"):
        server.close()
    with pytest.raises(SecureAggregationError, match="'site-1' late"):
        server.add(uploaded.masked[D])
    for vote in (
        corrupt_vote(consortium, D, start, ALL),
        dataclasses.replace(corrupt_vote(consortium, D, start, (C,)), site="stranger"),
    ):
        with pytest.raises(SecureAggregationError, match="a vote of a site of the round"):
            server.add_vote(vote)
    with pytest.raises(SecureAggregationError, match="votes of at least 3 sites, got 0"):
        server.open_request()
