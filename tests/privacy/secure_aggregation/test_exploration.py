"""Every order of messages that a malicious server can send to the sites' real state machines, for small consortia.

A site's life in a slot depends on its journal alone, and every call here is made by a new :class:`SecureClient` on
a copy of a journal. So each site is explored by itself: from every journal that can be reached, every message of
an alphabet is sent; and the journal that each file operation of the answer would leave, if the process were killed
before it, is explored as well. What messages need of other sites (a vote, a proof that somebody uploaded) is noted,
and only asked for when those sites are put together.

Putting them together, one life of each honest site is chosen, in all combinations in which what a site was shown
is what another one answered in its life (in any order: that is more than a server can do, so nothing is missed).
What the server then knows, with the corrupt sites' shares and secrets, must open no sum of fewer honest sites than
``max(threshold, max_colluding + 2) - max_colluding``; of what is summed more than once (one channel) it must open
sums over one set of honest sites only, so that there is no difference of two; and a site masks one vector in a round,
once.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfed.consortium import Quorum
from medfed.errors import SecureAggregationError
from privacy.secure_aggregation import client
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import names
from privacy.secure_aggregation.identity import Member
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.messages import OpenRequest, RoundStart, Upload, Vote, VoteRequest

pytestmark = pytest.mark.slow

Fact = tuple[Any, ...]
"""What a site answered: ("masked", site, round, vector), ("vote" or "shares", site, round, survivors)."""

Files = tuple[tuple[str, bytes], ...]
Steps = dict[Files, dict[tuple[frozenset[Fact], Files], set[frozenset[Fact]]]]
"""From a journal: what is answered (nothing if the process was killed), the journal after, and what that needs."""

StepsOfOne = dict[tuple[frozenset[Fact], Files], set[frozenset[Fact]]]
Sums = Callable[..., list[frozenset[str]]]


@dataclasses.dataclass(frozen=True)
class Message:
    """Something that the server may send to a site, and what it needs of other sites for it."""

    kind: str
    round: int
    survivors: tuple[str, ...] = ()
    vector: int = 0
    request: OpenRequest | None = None
    needs: frozenset[Fact] = frozenset()

    def fact(self, site: str) -> Fact:
        """What an answer of a site is."""
        return (self.kind, site, self.round, self.vector if self.kind == "masked" else self.survivors)


@dataclasses.dataclass(frozen=True)
class Life:
    """What a site answered, and what others answered for it to be asked so."""

    answers: frozenset[Fact]
    needs: frozenset[Fact]


class Explorer:
    """All rounds that the server may speak of, and all that it may ask of a site."""

    wrote = True
    """Whether the last answer or refusal may have changed a file."""

    def __init__(self, consortium: Any, starts: list[RoundStart], *, num_corrupt: int) -> None:
        self.consortium = consortium
        self.plan = consortium.plan
        self.starts = starts
        self.corrupt = consortium.sites[:num_corrupt]
        self.honest = consortium.sites[num_corrupt:]
        self.round_ids = [consortium.round_id(start) for start in starts]
        self.clients = {site: consortium.client(site) for site in self.honest}  # they remember nothing
        self.calls = 0
        self.kills = True
        self.races = False
        numbers = {"num_sites": len(self.plan.members), "max_colluding": self.plan.max_colluding}
        self.min_honest = Quorum.of(**numbers).min_honest
        self.folder = consortium.folder / "explored"

    def sets(self, round: int, *, fewest: int) -> Iterator[tuple[str, ...]]:
        sites = self.starts[round].sites
        for size in range(fewest, len(sites) + 1):
            yield from itertools.combinations(sites, size)

    @functools.cache  # noqa: B019  # lives as long as the test
    def vote(self, site: str, round: int, survivors: tuple[str, ...], named: int) -> Vote:
        """A vote for ``round``, shown as one for round ``named``."""
        signature = self.consortium.identities[site].sign("vote", self.round_ids[round], names(survivors))
        return Vote(site, self.round_ids[named], signature)

    @functools.cache  # noqa: B019
    def upload(self, site: str, signer: str, round: int) -> Upload:
        signature = self.consortium.identities[signer].sign("masked", self.round_ids[round], bytes(32))
        return Upload(site, bytes(32), signature)

    def proved(
        self,
        round: int,
        survivors: tuple[str, ...],
        voters: Iterable[str],
        *,
        voted_in: int | None = None,
        uploaded_in: int | None = None,
        forged: bool = False,
    ) -> Message:
        """A request to open with votes and proofs of uploads: of this round, or as far as possible of another.

        ``forged`` proofs of uploads are signed by a corrupt site, or are not there if there is none.
        """
        by, voted_in = list(voters), round if voted_in is None else voted_in
        votes = tuple(self.vote(site, voted_in, survivors, round) for site in by)
        needs: set[Fact] = {("vote", site, voted_in, survivors) for site in by if site in self.honest}
        uploads = []
        for site in survivors:
            told = round if uploaded_in is None or site not in self.starts[uploaded_in].sites else uploaded_in
            if forged and site in self.honest:
                uploads += [self.upload(site, signer, told) for signer in self.corrupt[:1]]
                continue
            uploads.append(self.upload(site, site, told))
            if site in self.honest:
                needs.add(("masked", site, told))
        request = OpenRequest(self.starts[round], survivors, votes, tuple(uploads))
        return Message("shares", round, survivors, request=request, needs=frozenset(needs))

    def alphabet(self) -> list[Message]:
        """All messages, of a server that has whatever other sites may have answered."""
        found = []
        for round, start in enumerate(self.starts):
            found += [Message("masked", round, vector=vector) for vector in (0, 1)]
            twins = [
                other
                for other, one in enumerate(self.starts)
                if other != round and one.slot == start.slot and set(one.sites) <= set(start.sites)
            ]
            corrupt = [site for site in self.corrupt if site in start.sites]
            honest = [site for site in self.honest if site in start.sites]
            for survivors in self.sets(round, fewest=self.plan.min_sites - 1):
                found.append(Message("vote", round, survivors))
                found.append(
                    Message("shares", round, survivors, request=OpenRequest(start, survivors))  # without any proof
                )
                if len(survivors) < self.plan.min_sites:
                    continue
                found.append(self.proved(round, survivors, corrupt, forged=True))
                short = max(0, self.plan.threshold - len(corrupt))
                for voters in itertools.combinations(honest, max(0, short - 1)):
                    found.append(self.proved(round, survivors, (*corrupt, *voters)))
                for voters in itertools.combinations(honest, short):
                    found.append(self.proved(round, survivors, (*corrupt, *voters)))
                    found.append(self.proved(round, survivors, (*corrupt, *voters), forged=True))
                    found += [self.proved(round, survivors, (*corrupt, *voters), uploaded_in=twin) for twin in twins]
                for twin in twins:
                    if set(survivors) <= set(self.starts[twin].sites):
                        voters = [site for site in (*corrupt, *honest) if site in self.starts[twin].sites]
                        found.append(self.proved(round, survivors, voters, voted_in=twin))
        return list(dict.fromkeys(found))

    def send(self, site: str, message: Message) -> Fact | None:
        """A new process of the site answers, or refuses."""
        self.calls += 1
        Explorer.wrote = False
        asked = self.clients[site]
        asked._journal = Journal(self.folder)
        start = self.starts[message.round]
        try:
            if message.kind == "masked":
                vector = np.full(1, message.vector, np.uint32)
                asked.mask(start, vector, channel=start.channel, model=start.model)
            elif message.kind == "vote":
                asked.vote(VoteRequest(start, message.survivors))
            else:
                assert message.request is not None
                asked.open(message.request)
        except SecureAggregationError:
            return None
        return message.fact(site)

    def restore(self, files: Files) -> None:
        """The journal on disk is this one: the epoch, and what was agreed to of each channel."""
        (self.folder / "epoch-1").mkdir(parents=True, exist_ok=True)
        there = dict(self.files())
        for name in there.keys() - dict(files).keys():
            (self.folder / name).unlink()
        for name, content in files:
            if there.get(name) != content:
                (self.folder / name).write_bytes(content)

    def files(self) -> Files:
        return _files(self.folder)

    def first_journal(self, site: str) -> Files:
        return _files(self.consortium.folder / site)

    def journals(self, site: str) -> tuple[Files, Steps]:
        """The first journal of a site, and from each one that can be reached, what every message leads to."""
        first = self.first_journal(site)
        steps: Steps = {}
        waiting = [first]
        alphabet = self.alphabet()
        while waiting:
            files = waiting.pop()
            if files in steps:
                continue
            steps[files] = {}
            self.restore(files)
            for message in alphabet:
                answer = self.send(site, message)
                after = self.files() if Explorer.wrote else files
                if answer is None:
                    # Of what else is summed in a slot, more may be noted than is answered.
                    noted = {name for name, _ in set(after) - set(files)}
                    assert set(files) <= set(after), "a refusal changed the journal"
                    assert noted <= self.channels_of_others(message.round), "a refusal changed the journal"
                    if noted:
                        steps[files].setdefault((frozenset(), after), set()).add(message.needs)
                        self.restore(files)
                    continue
                edges = steps[files].setdefault((frozenset([answer]), after), set())
                edges.add(message.needs)
                if self.kills and len(edges) == 1:
                    for killed in self.killed(site, message, files):
                        steps[files][frozenset(), killed] = {message.needs}
                self.restore(files)
            assert self.files() == files, "a refusal changed the journal"
            if self.races and files == first:
                steps[files].update(self.raced(site, files, steps[files], alphabet))
            for edge, needs in steps[files].items():
                steps[files][edge] = least(needs)
                waiting.append(edge[1])
        return first, steps

    def channels_of_others(self, round: int) -> set[str]:
        """Where it is noted what was agreed to in a round, if some other one of its slot sums something else."""
        start = self.starts[round]
        others = {one.channel for one in self.starts if one.slot == start.slot} - {start.channel}
        return {f"channel-{start.channel.hex()}"} if others else set()

    def lives(self, site: str) -> list[Life]:
        """Every life of a site that no other one with as few needs says more than."""
        first, steps = self.journals(site)
        life = (first, Life(frozenset(), frozenset()))
        seen, waiting = {life}, [life]
        while waiting:
            files, before = waiting.pop()
            for (answered, after), all_needs in steps[files].items():
                for needs in all_needs:
                    life = (after, Life(before.answers | answered, before.needs | needs))
                    if life not in seen:
                        seen.add(life)
                        waiting.append(life)
        return longest({life for _, life in seen})

    def raced(self, site: str, files: Files, steps: Collection[Any], alphabet: Iterable[Message]) -> StepsOfOne:
        """Two processes at once: before each file operation of one, the other does all of its work."""
        answered = {answer for answers, _ in steps for answer in answers}
        accepted = {message.fact(site): message for message in alphabet if message.fact(site) in answered}
        found: StepsOfOne = {}
        for one, other in itertools.product(accepted.values(), repeat=2):
            for operation in itertools.count():
                self.restore(files)
                between: list[Fact | None] = []
                with before_operation(
                    operation, lambda other=other, between=between: between.append(self.send(site, other))
                ) as reached:
                    answers = [self.send(site, one)]
                if not reached():
                    break
                facts = frozenset(answer for answer in answers + between if answer is not None)
                found.setdefault((facts, self.files()), set()).add(one.needs | other.needs)
        return found

    def killed(self, site: str, message: Message, files: Files) -> set[Files]:
        """What a journal may look like after the process was killed before one of its file operations."""
        found: set[Files] = set()
        self.restore(files)
        with before_operation(None, lambda: found.add(self.files())):
            self.send(site, message)
        return found


def _files(folder: Path) -> Files:
    found: list[tuple[str, bytes]] = []
    for inside in ("", "epoch-1/"):
        for name in sorted(os.listdir(f"{folder}/{inside}")):  # noqa: PTH208  # much quicker
            if inside or name != "epoch-1":
                with open(f"{folder}/{inside}{name}", "rb", buffering=0) as file:  # noqa: PTH123
                    found.append((inside + name, file.read()))
    return tuple(found)


@contextlib.contextmanager
def before_operation(number: int | None, act: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Acts before the ``number``-th operation of this process that changes a file or makes a change durable.

    Before each of them, if there is no number.
    """
    count, acted = 0, False

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal count, acted
            count += 1
            if number is None or (count == number + 1 and not acted):
                acted = True
                act()
            return original(*args, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "open"), (os, "fdopen"), (os, "fsync"), (os, "unlink"), (Path, "open")):
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield lambda: acted


def least(sets: set[frozenset[Fact]]) -> set[frozenset[Fact]]:
    return {one for one in sets if not any(other < one for other in sets)}


def longest(lives: Collection[Life]) -> list[Life]:
    """Without those that another one contains which needs no more."""
    return [
        one
        for one in lives
        if not any(other != one and one.answers <= other.answers and other.needs <= one.needs for other in lives)
    ]


def too_small_sums(explorer: Explorer, facts: Collection[Fact], sums_open_to: Sums) -> list[object]:
    """Sums of too few honest sites that follow from what was answered, differences of two, vectors under one mask."""
    plan, found = explorer.plan, []
    opened: dict[bytes, set[frozenset[str]]] = {}
    givers: dict[tuple[str, int, str], set[str]] = {}
    masked: dict[int, dict[str, set[int]]] = {}
    for fact in facts:
        if fact[0] == "masked":
            masked.setdefault(fact[2], {}).setdefault(fact[1], set()).add(fact[3])
        elif fact[0] == "shares":
            start = explorer.starts[fact[2]]
            for dealer in start.sites:
                kind = "seed" if dealer in fact[3] else "key"
                givers.setdefault((kind, start.slot, dealer), set(explorer.corrupt)).add(fact[1])
    for round, vectors in masked.items():
        start = explorer.starts[round]
        found += [(site, sent) for site, sent in vectors.items() if len(sent) > 1]
        known = {
            kind: {site for site in start.sites if len(givers.get((kind, start.slot, site), ())) >= plan.threshold}
            for kind in ("seed", "key")
        }
        for group in sums_open_to(start.sites, vectors, known["seed"], known["key"] | set(explorer.corrupt)):
            opened.setdefault(start.channel, set()).add(group)
            if len(group) < explorer.min_honest:
                found.append((round, group))
    return found + [groups for groups in opened.values() if len(groups) > 1]


def attacks(
    explorer: Explorer,
    lives: Mapping[str, list[Life]],
    sums_open_to: Sums,
    *,
    stop_at_first: bool = False,
    sample: int | None = None,
) -> list[object]:
    """What too small sums a server gets from any lives of the honest sites that fit together."""
    by_answers: dict[str, dict[frozenset[Fact], list[frozenset[Fact]]]] = {}
    for site, all_lives in lives.items():
        by_answers[site] = {}
        for life in all_lives:
            by_answers[site].setdefault(life.answers, []).append(life.needs)
    found: list[object] = []
    options = [list(lives.items()) for lives in by_answers.values()]
    for chosen in itertools.product(*options):
        facts = frozenset().union(*(answers for answers, _ in chosen))
        known = facts | {fact[:3] for fact in facts if fact[0] == "masked"}
        if all(any(needs <= known for needs in all_needs) for _, all_needs in chosen):
            found += too_small_sums(explorer, facts, sums_open_to)
            if found and stop_at_first:
                break
    return found


@pytest.fixture
def quick_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature that was checked once is not checked again, nor bytes read that were read before."""
    monkeypatch.setattr(Member, "has_signed", functools.cache(Member.has_signed))
    monkeypatch.setattr(RoundStart, "round_id", functools.cache(RoundStart.round_id))
    for kind in (client._Accepted, client._SlotSecrets):
        monkeypatch.setattr(kind, "parse", functools.cache(kind.parse))


@pytest.fixture
def watched_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a file may have changed is noted, since it takes longer to look than to answer."""

    def noted(original: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            Explorer.wrote |= writes(*args, **keywords)
            return original(*args, **keywords)

        return call

    monkeypatch.setattr(os, "open", noted(os.open, lambda _, flags, *__, **___: bool(flags & ~os.O_CLOEXEC)))
    monkeypatch.setattr(os, "unlink", noted(os.unlink, lambda *_, **__: True))
    monkeypatch.setattr(Path, "open", noted(Path.open, lambda _, mode="r", *__, **___: mode not in ("r", "rb")))


@pytest.fixture
def make_explorer(
    make_consortium: Callable[..., Any], quick_signatures: None, watched_files: None
) -> Callable[..., Explorer]:
    """An explorer of a consortium in its first epoch; ``rounds`` are slots, sites (all if None), and a model.

    A fourth is what is summed, where that is not the same in a slot and another in the next.
    """

    def make(
        num_sites: int,
        max_colluding: int,
        rounds: Iterable[Any],
        **numbers: Any,
    ) -> Explorer:
        consortium = make_consortium(num_sites, max_colluding, rounds_per_epoch=2, **numbers)
        consortium.begin()
        starts = [
            consortium.start(
                slot,
                None if sites is None else [f"site-{site}" for site in sites],
                model=model * 32,
                channel=channel[0] * 32 if channel else None,
            )
            for slot, sites, model, *channel in rounds
        ]
        return Explorer(consortium, starts, num_corrupt=max_colluding)

    return make


TWO_VIEWS = [(0, None, b"m"), (0, None, b"x")]
"""Rounds of one slot over all sites, with different models."""

ALL_ROUNDS_OF_FOUR = [
    *TWO_VIEWS,
    (0, (0, 1, 2), b"m"),
    (0, (0, 1, 3), b"m"),
    (0, (0, 2, 3), b"m"),
    (0, (1, 2, 3), b"m"),
]

SPLIT_OF_TWO_THINGS = [(0, None, b"m", b"a"), (0, (0, 1, 3), b"m", b"b")]
"""Rounds of one slot that sum different things, one of them without a site."""

TWO_OF_THREE = {"threshold": 2, "min_sites": 2}

SAME_AGAIN = [(0, None, b"m", b"a"), (1, None, b"m", b"a")]
"""The same thing in two slots."""

SAME_OF_FEWER = [(0, None, b"m", b"a"), (1, (0, 2, 3), b"m", b"a")]
"""The same thing in two slots, in one of them without a site."""

SPLIT = [(0, None, b"m"), (0, (0, 1, 3), b"m")]
"""A round of all four, and one of three that are told nothing of the fourth."""


def saturated(explorer: Explorer, sums_open_to: Sums) -> list[object]:
    """The same for clients that forget nothing, whose journals stand still: all that they answer to anybody."""
    facts: set[Fact] = set()
    known: set[Fact] = set()
    steps = {site: explorer.journals(site) for site in explorer.honest}
    places = {site: first for site, (first, _) in steps.items()}
    growing = True
    while growing:
        growing = False
        for site, (_, all_steps) in steps.items():
            for (answered, after), all_needs in all_steps[places[site]].items():
                if not answered <= facts and any(needs <= known for needs in all_needs):
                    facts |= answered
                    known |= answered | {answer[:3] for answer in answered}
                    places[site], growing = after, True
                    break
    return too_small_sums(explorer, facts, sums_open_to)


def explored(explorer: Explorer, sums_open_to: Sums, **options: Any) -> list[object]:
    return attacks(explorer, {site: explorer.lives(site) for site in explorer.honest}, sums_open_to, **options)


@pytest.mark.parametrize(
    ("num_sites", "max_colluding", "numbers", "rounds"),
    [
        pytest.param(3, 1, {}, SAME_AGAIN, id="three that sum the same again"),
        pytest.param(3, 0, TWO_OF_THREE, [(0, None, b"m"), (0, (0, 1), b"m")], id="three without corrupt"),
        pytest.param(
            3, 0, TWO_OF_THREE, [(0, None, b"m", b"a"), (1, (0, 1), b"m", b"a")],
            id="three without corrupt that sum the same of fewer",
        ),
        pytest.param(4, 1, {}, SPLIT, id="four told different rounds"),
        pytest.param(4, 2, {}, TWO_VIEWS, id="four with two corrupt"),
    ],
)  # fmt: skip
def test_no_order_of_messages_opens_too_small_a_sum(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums,
    num_sites: int, max_colluding: int, numbers: dict[str, int], rounds: Any,
) -> None:  # fmt: skip
    explorer = make_explorer(num_sites, max_colluding, rounds, **numbers)
    assert explored(explorer, sums_open_to) == []
    assert explorer.calls > 300


@pytest.mark.parametrize(
    ("num_sites", "rounds"),
    [
        (3, [*TWO_VIEWS, (1, None, b"m")]),
        (3, [(0, None, b"m", b"a"), (0, None, b"x", b"a"), (1, None, b"m", b"a")]),
        (4, SAME_OF_FEWER),
        (4, SPLIT_OF_TWO_THINGS),
    ],
    ids=["two views and two slots", "two views and the same again", "the same of fewer", "different things in a slot"],
)
def test_no_order_of_messages_opens_too_small_a_sum_of_sites_that_are_not_killed(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums, num_sites: int, rounds: Any
) -> None:
    explorer = unkilled(make_explorer(num_sites, 1, rounds))
    assert explored(explorer, sums_open_to) == []
    assert explorer.calls > 300


def test_no_two_processes_at_once_open_too_small_a_sum(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums
) -> None:
    explorer = make_explorer(4, 1, SPLIT)
    explorer.kills, explorer.races = False, True
    lives = {site: explorer.lives(site) for site in explorer.honest}
    for site, all_lives in lives.items():
        for life in all_lives:
            assert sum(fact[0] == "masked" for fact in life.answers) <= 1, site
            assert len({fact[2:] for fact in life.answers if fact[0] != "masked"}) <= 1, site
    assert attacks(explorer, lives, sums_open_to) == []


def test_no_order_of_messages_of_any_round_of_four_opens_too_small_a_sum(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums
) -> None:
    explorer = make_explorer(4, 1, ALL_ROUNDS_OF_FOUR)
    assert explored(explorer, sums_open_to) == []


# The exploration can fail: with a client that lacks one rule it finds the attack.


def without_one_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "mark_voted", lambda *_: True)
    monkeypatch.setattr(Journal, "destroy", lambda *_: None)


def without_one_sum_of_a_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "agree", lambda *_: True)


def without_proof_of_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureClient, "_check_uploads", lambda *_: None)


def with_proofs_not_bound_to_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Member.has_signed

    def has_signed(self: Member, signature: bytes, label: str, *fields: bytes) -> bool:
        return label == "masked" or sound(self, signature, label, *fields)

    monkeypatch.setattr(Member, "has_signed", functools.cache(has_signed))


def without_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureClient, "_check_votes", lambda *_: None)


def with_votes_for_any_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any signature of the right length is a vote."""
    sound = Member.has_signed

    def has_signed(self: Member, signature: bytes, label: str, *fields: bytes) -> bool:
        return label == "vote" or sound(self, signature, label, *fields)

    monkeypatch.setattr(Member, "has_signed", functools.cache(has_signed))


def with_a_slot_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "mark_masked", lambda *_: None)


def with_too_low_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 t = n + c - 1."""
    monkeypatch.setattr("privacy.secure_aggregation.plan.Quorum", lambda **_: None)


def with_too_small_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.secure_aggregation.plan.Quorum", lambda **_: None)


@pytest.mark.parametrize(
    ("broken", "weakened", "rounds"),
    [
        (without_proof_of_uploads, {}, SPLIT),
        (with_proofs_not_bound_to_the_round, {}, SPLIT),
        (with_a_slot_used_twice, {}, SPLIT),
        (with_too_low_a_threshold, {"threshold": 2}, SPLIT),
        (with_too_small_a_sum, {"threshold": 2, "min_sites": 2}, SPLIT),
        (without_one_vote, {}, SPLIT_OF_TWO_THINGS),
        (without_one_sum_of_a_thing, {}, SAME_OF_FEWER),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_exploration_finds_the_attack_on_a_client_that_lacks_a_rule(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums, monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None], weakened: dict[str, int], rounds: Any,
) -> None:  # fmt: skip
    broken(monkeypatch)
    explorer = unkilled(make_explorer(4, 1, rounds, weakened=weakened))
    assert explored(explorer, sums_open_to, stop_at_first=True) != []


def test_exploration_finds_the_attack_on_a_client_that_votes_more_than_once(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one thing in one slot, its only vote there and the only sum of the thing are one rule; without both:"""
    for broken in (without_one_vote, without_one_sum_of_a_thing):
        assert saturated(unkilled(make_explorer(4, 1, TWO_VIEWS[:1])), sums_open_to) == []
        broken(monkeypatch)
    assert saturated(unkilled(make_explorer(4, 1, TWO_VIEWS[:1])), sums_open_to) != []


@pytest.mark.parametrize("broken", [None, without_votes, with_votes_for_any_survivors])
def test_sites_that_need_no_votes_open_a_sum_of_two_together(
    make_explorer: Callable[..., Explorer], sums_open_to: Sums, monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None] | None,
) -> None:  # fmt: skip
    """Five sites, none corrupt, each told that two others are missing: three of them by three sites each."""
    if broken is not None:
        broken(monkeypatch)
    explorer = make_explorer(5, 0, TWO_VIEWS)
    facts: set[Fact] = {("masked", site, 0, 0) for site in explorer.honest}
    for opener, missing in enumerate([{0, 1}, {0, 1}, {0, 2}, {1, 2}, {2, 3}]):
        site = f"site-{opener}"
        explorer.restore(explorer.first_journal(site))
        survivors = tuple(f"site-{place}" for place in range(5) if place not in missing)
        other = explorer.proved(0, survivors, explorer.honest, voted_in=1)  # as many votes, for another round
        answers = [explorer.send(site, message) for message in (explorer.proved(0, survivors, [site]), other)]
        facts |= {answer for answer in answers if answer is not None}
    assert (too_small_sums(explorer, facts, sums_open_to) != []) == (broken is not None)


def unkilled(explorer: Explorer) -> Explorer:
    explorer.kills = False
    return explorer
