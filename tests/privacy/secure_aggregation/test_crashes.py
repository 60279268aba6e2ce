"""Sites that are killed, run twice, or lose their journal: no second vector, no second set of survivors."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfed.errors import SecureAggregationError, SiteError
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import names
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.messages import (
    Masked,
    OpenRequest,
    Relay,
    RelayedSetup,
    Setup,
    Upload,
    Vote,
    VoteRequest,
)
from privacy.secure_aggregation.server import SetupPhase

SITE, ALL = "site-2", ("site-0", "site-1", "site-2", "site-3")
WITHOUT_1 = ("site-0", "site-2", "site-3")
VECTOR = np.zeros(3, np.uint32)
ANSWERED, REFUSED, KILLED, UNEXPECTED = 0, 3, 9, 5

Call = Callable[[Any], bytes]


def in_child(work: Callable[[], bytes], *, killed_before: int | None = None) -> tuple[int, int]:
    """Forks; the child sends its answer, and exits by how it fared. Returns its id and a pipe with the answer.

    It ends as by ``kill -9``, without any clean-up, before the ``killed_before``-th operation that changes a file
    or syncs it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = UNEXPECTED
    try:
        if killed_before is not None:
            count_operations(killed_before)
        answer = work()
        os.write(writing, answer)
        code = ANSWERED
    except SecureAggregationError:
        code = REFUSED
    finally:
        os._exit(code)


def count_operations(last: int) -> None:
    """This process, a child, ends before its ``last``-th operation on files."""
    left = last

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(KILLED)
            left -= 1
            return original(*args, **keywords)

        return call

    for owner, name in (
        (os, "open"), (os, "fdopen"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (Path, "open"),
    ):  # fmt: skip
        setattr(owner, name, wrapped(getattr(owner, name)))


def ended(child: int, reading: int) -> tuple[int, bytes]:
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), answer


def every_kill(consortium: Any, site: str, call: Call, then: Callable[[bool], None]) -> int:
    """Kills ``call`` before each of its operations on files; ``then`` is told whether it had answered."""
    folder, saved = consortium.folder / site, consortium.folder / "saved"
    shutil.copytree(folder, saved) if folder.exists() else None
    operation = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if saved.exists():
            shutil.copytree(saved, folder)
        code, answer = ended(*in_child(lambda: call(consortium), killed_before=operation))
        assert code in (ANSWERED, KILLED)
        assert bool(answer) == (code == ANSWERED)
        then(code == ANSWERED)
        if code == ANSWERED:
            return operation
        operation += 1


def mask(consortium: Any, model: bytes = b"m" * 32) -> bytes:
    return consortium.mask(SITE, consortium.start(0, model=model), VECTOR).to_bytes()


def vote(consortium: Any, survivors: tuple[str, ...] = WITHOUT_1) -> bytes:
    return consortium.client(SITE).vote(VoteRequest(consortium.start(0), survivors)).to_bytes()


def open_all(consortium: Any) -> bytes:
    return consortium.client(SITE).open(OpenRequest(consortium.start(0), ALL)).to_bytes()


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except SecureAggregationError:
        return True
    return False


@pytest.mark.process
def test_kill_while_masking_never_lets_a_second_vector_out(consortium: Any) -> None:
    seen = set()

    def then(answered: bool) -> None:
        used = consortium.journal(SITE).masked(1, 0) is not None
        again = not refused(lambda: mask(consortium, b"x" * 32))
        assert again == (not used)  # whoever is restarted masks, if and only if nothing can have left
        assert not (answered and again)
        assert refused(lambda: mask(consortium))
        seen.add((answered, again))

    assert every_kill(consortium, SITE, mask, then) >= 4
    assert seen == {(False, True), (False, False), (True, False)}


@pytest.mark.process
@pytest.mark.parametrize("first", [vote, open_all])
def test_kill_while_voting_or_opening_never_lets_a_second_set_be_agreed_to(consortium: Any, first: Call) -> None:
    mask(consortium)
    seen = set()

    def then(answered: bool) -> None:
        other = ("site-1", "site-2", "site-3")
        journal = consortium.journal(SITE)
        noted = journal.voted(1, 0) is not None or any((consortium.folder / SITE).glob("channel-*"))
        again = not refused(lambda: vote(consortium, other))
        assert again == (not noted)
        assert not (answered and again)
        if again:
            assert refused(lambda: first(consortium))
        seen.add((answered, again))

    assert every_kill(consortium, SITE, first, then) >= 4
    assert seen == {(False, True), (False, False), (True, False)}


@pytest.mark.process
def test_kill_while_beginning_an_epoch_leaves_the_old_one_or_none(consortium: Any) -> None:
    """A new epoch that is not whole is followed by a newer one; the old one never comes back."""

    def then(answered: bool) -> None:
        begun = consortium.journal(SITE).newest_epoch() == 2
        assert begun or not answered
        assert refused(lambda: mask(consortium)) == begun
        assert refused(lambda: consortium.client(SITE).advertise(2)) == begun
        consortium.client(SITE).advertise(3)
        assert not list((consortium.folder / SITE).glob("epoch-[12]/*.secret"))
        assert not list((consortium.folder / SITE).glob("epoch-[12]/own"))

    assert every_kill(consortium, SITE, lambda some: some.client(SITE).advertise(2).to_bytes(), then) > 8


@pytest.mark.process
def test_kill_while_setting_up_lets_no_second_setup_out(make_consortium: Callable[..., Any]) -> None:
    """It would seal other secrets under the same keys and nonces."""
    consortium = make_consortium()
    roster = consortium.advertised(1).roster
    seen = set()

    def then(answered: bool) -> None:
        begun = (consortium.folder / SITE / "epoch-1" / "dealt").exists()
        again = not refused(lambda: consortium.client(SITE).setup(roster))
        assert again == (not begun)
        assert not (answered and again)
        seen.add((answered, again))

    assert every_kill(consortium, SITE, lambda some: some.client(SITE).setup(roster).to_bytes(), then) >= 2
    assert seen == {(False, True), (False, False), (True, False)}


@pytest.mark.process
def test_kill_while_accepting_lets_one_view_be_accepted(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    phase = consortium.advertised(1)
    for site in ALL:
        phase.add(consortium.client(site).setup(phase.roster))
    relay = phase.relay_to(SITE)
    fewer = type(relay)(relay.plan, relay.epoch, (relay.setups[0], *relay.setups[2:]))
    for site in ALL:
        if site != SITE:
            phase.accept(consortium.client(site).accept(phase.relay_to(site)))
    seen = set()

    def then(answered: bool) -> None:
        noted = (consortium.folder / SITE / "epoch-1" / "accepted").exists()
        again = not refused(lambda: consortium.client(SITE).accept(fewer))
        assert again == (not noted)
        assert not (answered and again)
        seen.add((answered, again))

    operations = every_kill(consortium, SITE, lambda some: some.client(SITE).accept(relay).to_bytes(), then)
    assert operations >= 8
    assert seen == {(False, True), (False, False), (True, False)}


def raced(consortium: Any, calls: list[Call]) -> list[bytes]:
    """The answers of processes that were let go at one moment."""
    starting, start = os.pipe()

    def waiting(call: Call) -> Callable[[], bytes]:
        def work() -> bytes:
            os.close(start)
            os.read(starting, 1)  # ends when the last writing end is closed
            return call(consortium)

        return work

    children = [in_child(waiting(call)) for call in calls]
    os.close(start)
    results = [ended(*child) for child in children]
    os.close(starting)
    assert {code for code, _ in results} <= {ANSWERED, REFUSED}
    return [answer for code, answer in results if code == ANSWERED]


@pytest.mark.process
def test_of_processes_that_mask_in_one_slot_one_answers(consortium: Any) -> None:
    for slot in range(4):
        calls: list[Call] = [
            lambda some, slot=slot, model=model: some.mask(
                SITE, some.start(slot, model=bytes([model]) * 32), VECTOR
            ).to_bytes()
            for model in (1, 1, 2, 3)
        ]  # fmt: skip
        assert len(raced(consortium, calls)) == 1


@pytest.mark.process
def test_of_processes_that_open_different_sums_at_most_one_answers(consortium: Any) -> None:
    for slot in range(4):
        start = consortium.start(slot)
        masked = {site: consortium.mask(site, start, VECTOR) for site in ALL}
        others = ("site-0", "site-1", "site-3")
        votes = tuple(consortium.client(site).vote(VoteRequest(start, WITHOUT_1)) for site in others)
        uploads = tuple(
            Upload(site, Masked.signed_fields(one.round_id, one.vector)[1], one.signature)
            for site, one in masked.items()
            if site in WITHOUT_1
        )
        slow, fast = OpenRequest(start, WITHOUT_1, votes, uploads), OpenRequest(start, ALL)
        calls: list[Call] = [
            lambda some, request=request: some.client(SITE).open(request).to_bytes() for request in (slow, fast) * 2
        ]
        answers = raced(consortium, calls)
        assert len(set(answers)) <= 1  # the same one may be given twice


def test_setup_is_durable_before_it_is_made_known(
    make_consortium: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut that left the private key alone would let other secrets be sealed under the same keys and nonces."""
    consortium = make_consortium()
    roster, synced, fsync = consortium.advertised(1).roster, [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    consortium.client(SITE).setup(roster)
    assert synced == ["dealt", "epoch-1"]


@pytest.mark.process
def test_of_processes_that_set_up_at_once_one_answers(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    for epoch in range(1, 5):
        roster = consortium.advertised(epoch).roster
        calls: list[Call] = [lambda some, roster=roster: some.client(SITE).setup(roster).to_bytes()] * 4
        assert len(raced(consortium, calls)) == 1


@pytest.mark.process
def test_of_processes_that_agree_to_different_sums_of_the_same_thing_one_answers(consortium: Any) -> None:
    """In four slots at once, which have no other marker in common."""
    sets = (ALL, WITHOUT_1, ("site-1", "site-2", "site-3"), ("site-0", "site-1", "site-2"))
    for channel in range(4):
        calls: list[Call] = [
            lambda some, slot=slot, survivors=survivors, channel=channel: (
                some.client(SITE)
                .vote(VoteRequest(some.start(slot, channel=bytes([channel]) * 32), survivors))
                .to_bytes()
            )
            for slot, survivors in enumerate(sets)
        ]  # fmt: skip
        assert len(raced(consortium, calls)) <= 1  # a marker that is not written yet stands for any answer
        consortium.begin(channel + 2)


def test_lost_journal_needs_a_new_epoch(consortium: Any) -> None:
    mask(consortium)
    shutil.rmtree(consortium.folder / SITE)
    for call in (mask, vote, open_all):
        with pytest.raises(SecureAggregationError, match="newest epoch of this site, None, got 1; begin a newer epoch"):
            call(consortium)
    consortium.begin(2)
    mask(consortium)


def test_site_that_sets_up_an_epoch_again_after_a_loss_is_in_none_of_its_rounds(consortium: Any) -> None:
    """Its new keys are others than those which the other sites accepted."""
    mask(consortium)
    shutil.rmtree(consortium.folder / SITE)
    advertised = consortium.client(SITE).advertise(1)
    for call in (mask, vote, open_all):
        with pytest.raises(SecureAggregationError, match="accepted setups of epoch 1, got none at this site"):
            call(consortium)
    phase = SetupPhase(consortium.plan, 1)
    phase.advertise(advertised)
    assert refused(lambda: phase.roster)


@pytest.mark.parametrize("later", [False, True], ids=["J set up with the first life", "J set up with the second"])
def test_site_that_lost_its_journal_in_an_epoch_does_not_count_twice(
    make_consortium: Callable[..., Any], adversary_of: Callable[..., Any], later: bool
) -> None:
    """It takes part anew, with a server that has waited for it, and answers in both lives whatever it is asked.

    If both lives held the shares that D dealt, the first would open D's own mask with D itself, and the second D's
    round key with J, who was shown no setup before: D's vector would be read.
    """
    consortium = make_consortium(4, 1)
    (c, d, j, loser), plain = ALL, np.arange(3, dtype=np.uint32)
    first = consortium.advertised(1)
    setups = {site: consortium.client(site).setup(first.roster) for site in ALL if site != j or not later}
    c_private = consortium.journal(c).own(1)
    for site in (c, d, loser):
        first.add(setups[site])
    for site in (c, d, loser):
        first.accept(consortium.client(site).accept(first.relay_to(site)))
    consortium.epoch = first.finish()
    adversary = adversary_of(consortium, (c,))
    adversary.join(1, [0])
    start = consortium.start(0)
    adversary.hear_masked(start, consortium.mask(d, start, plain))
    for site in (d, loser):
        request = OpenRequest(start, start.sites)
        adversary.hear_shares(request, consortium.client(site).open(request))
    assert adversary.secret("seed", d, 0) is not None

    shutil.rmtree(consortium.folder / loser)
    c_key, d_key, j_key, _ = first.roster.advertised
    second = dataclasses.replace(first.roster, advertised=(c_key, d_key, j_key, consortium.client(loser).advertise(1)))
    shown: dict[str, list[Setup]] = {site: [setup] for site, setup in setups.items()}
    for site in (d, j, loser):
        for roster in (second, first.roster) if later else (first.roster, second):
            with contextlib.suppress(SecureAggregationError):
                shown.setdefault(site, []).append(consortium.client(site).setup(roster))
    assert {site: len(made) for site, made in shown.items()} == {c: 1, d: 1, j: 1, loser: 2}
    kept = consortium.folder / "kept by C"  # the corrupt site sets up as often as the server likes
    Journal(kept).begin_epoch(1, c_private)
    shown[c].append(SecureClient(c, consortium.identities[c], consortium.plan, kept).setup(second))
    accepted: dict[str, list[str]] = {}
    for site in (j, loser):
        place = ALL.index(site)
        for sites in ((c, d, j, loser), (c, j, loser), (c, d, j), (d, j, loser), (c, d, loser)):
            for chosen in itertools.product(*(shown[name] for name in sites)):
                relayed = tuple(RelayedSetup(one.body, one.signature, one.boxes[place]) for one in chosen)
                with contextlib.suppress(SecureAggregationError):
                    consortium.client(site).accept(Relay(consortium.plan.digest, 1, relayed))
                    accepted.setdefault(site, []).append(sites)
    # J accepts what was set up for the roster that it was shown; the second life is alone, or in an epoch without D.
    assert accepted == ({j: [(c, j, loser)], loser: [(c, j, loser)]} if later else {j: [ALL]})
    sites, survivors = (c, j, loser) if later else ALL, (c, j, loser)
    begun, corrupt = dataclasses.replace(start, sites=sites), consortium.identities[c]
    votes: dict[str, Vote] = {}
    uploads: dict[str, Upload] = {}
    for site in (j, loser, d):
        with contextlib.suppress(SecureAggregationError):
            uploads[site] = consortium.upload(consortium.mask(site, begun, VECTOR))
        with contextlib.suppress(SecureAggregationError):
            votes[site] = consortium.client(site).vote(VoteRequest(begun, survivors))
    assert set(votes) == set(uploads) == ({j, loser} if later else {j})
    round_id = votes[j].round_id
    votes[c] = Vote(c, round_id, corrupt.sign("vote", round_id, names(survivors)))
    uploads |= {
        site: Upload(site, bytes(32), corrupt.sign("masked", round_id, bytes(32)))
        for site in {c, *survivors} - set(uploads)
    }
    for site in (d, j, loser):
        for request in (
            OpenRequest(begun, survivors, tuple(votes.values()), tuple(uploads[name] for name in survivors)),
            OpenRequest(begun, sites),
        ):
            with contextlib.suppress(SecureAggregationError):
                adversary.hear_shares(request, consortium.client(site).open(request))
    assert adversary.secret("key", d, 0) is None
    assert frozenset([d]) not in adversary.sums()


@pytest.mark.parametrize("damage", ["lost", "cut", "emptied", "changed"])
def test_damaged_secrets_need_a_new_epoch(consortium: Any, damage: str) -> None:
    path = consortium.folder / SITE / "epoch-1" / "0.secret"
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-1], "emptied": b"", "changed": bytes([whole[0] ^ 1]) + whole[1:]}[damage])
    for call in (mask, vote, open_all):
        with pytest.raises(SecureAggregationError, match="got none: they were used|got damaged ones"):
            call(consortium)
    assert consortium.journal(SITE).voted(1, 0) is None
    consortium.begin(2)
    mask(consortium)


def test_marker_that_a_crash_left_empty_stands_for_any_answer(consortium: Any) -> None:
    folder = consortium.folder / SITE / "epoch-1"
    (folder / "0.voted").touch()
    for slot, survivors in enumerate((ALL, WITHOUT_1)):
        start = consortium.start(0, channel=bytes([slot]) * 32)
        with pytest.raises(SecureAggregationError, match="it agrees to one set, once"):
            consortium.client(SITE).vote(VoteRequest(start, survivors))
    (folder / "0.voted").unlink()
    channel = folder.parent / f"channel-{consortium.start(0).channel.hex()}"
    channel.touch()
    for survivors in (ALL, WITHOUT_1):
        with pytest.raises(SecureAggregationError, match="agreed to when this was summed before"):
            vote(consortium, survivors)
    channel.unlink()
    (folder / "0.masked").touch()
    for call in (mask, vote, open_all):
        assert refused(lambda call=call: call(consortium))


def test_secrets_of_a_round_are_overwritten_and_gone_once_it_is_opened(
    consortium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = consortium.folder / SITE / "epoch-1" / "0.secret"
    second_name = consortium.folder / "kept"
    os.link(path, second_name)  # sees what is written over the content
    length = path.stat().st_size
    mask(consortium)
    assert path.exists()
    open_all(consortium)
    assert not path.exists()
    assert second_name.read_bytes() == bytes(length)


def test_secrets_of_a_slot_go_when_a_later_one_is_masked(consortium: Any) -> None:
    folder = consortium.folder / SITE / "epoch-1"
    consortium.mask(SITE, consortium.start(2), VECTOR)
    assert sorted(path.name for path in folder.glob("*.secret")) == ["2.secret", "3.secret"]


def test_secrets_of_a_round_that_nobody_opened_go_in_time(consortium: Any) -> None:
    folder = consortium.folder / SITE / "epoch-1"
    mask(consortium)
    journal = consortium.journal(SITE)
    journal.forget_older_than(3600.0)
    assert (folder / "0.secret").exists()
    os.utime(folder / "0.masked", (0, 0))
    journal.forget_older_than(3600.0)
    assert not (folder / "0.secret").exists()
    assert (folder / "0.masked").exists()


def test_secrets_of_an_earlier_epoch_go_when_a_new_one_begins(consortium: Any) -> None:
    consortium.begin(2)
    for site in ALL:
        assert not list((consortium.folder / site / "epoch-1").glob("*.secret"))
        for name in ("own", "dealt"):
            assert not list((consortium.folder / site).glob(f"epoch-*/{name}"))


def test_private_key_of_an_epoch_is_overwritten_and_gone_once_it_is_accepted_or_a_new_one_begins(
    make_consortium: Callable[..., Any],
) -> None:
    for accepted in (True, False):
        consortium = make_consortium()
        phase = consortium.advertised(1)
        for site in ALL:
            phase.add(consortium.client(site).setup(phase.roster))
        folder, kept = consortium.folder / SITE / "epoch-1", {}
        for name in ("own", "dealt"):
            kept[name] = consortium.folder / f"kept {name}"
            os.link(folder / name, kept[name])  # sees what is written over the content
        if accepted:
            consortium.client(SITE).accept(phase.relay_to(SITE))
        else:
            consortium.client(SITE).advertise(2)
        for name, other in kept.items():
            assert not (folder / name).exists()
            assert set(other.read_bytes()) == {0}


def test_what_was_agreed_to_outlives_all_epochs(consortium: Any) -> None:
    vote(consortium)
    for epoch in (2, 3):
        consortium.begin(epoch)
    journal, channel = consortium.journal(SITE), consortium.start(0).channel
    assert journal.agree(channel, names(ALL))  # of the third epoch
    ((marker, agreed),) = [
        (path, path.read_bytes())
        for path in (consortium.folder / SITE).glob("channel-*")
        if not path.name.endswith(channel.hex())
    ]
    assert agreed == names(WITHOUT_1)
    assert not journal.agree(bytes.fromhex(marker.name.removeprefix("channel-")), names(ALL))


def test_journal_is_for_its_owner_alone(consortium: Any) -> None:
    mask(consortium)
    vote(consortium)
    folder = consortium.folder / SITE
    found = [folder, *folder.rglob("*")]
    assert len(found) > 5
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_journal_that_cannot_be_written_lets_nothing_out(consortium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for call in (mask, vote, vote):  # the second time the marker is there, and not known to be durable
        with pytest.raises(SiteError, match="to write the journal of secure aggregation"):
            call(consortium)
    with pytest.raises(SiteError, match="to write the journal of secure aggregation"):
        consortium.client(SITE).advertise(2)


def test_marker_is_durable_before_the_answer_is_made_known(consortium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and then its name are synced within the call."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    channel = f"channel-{consortium.start(0).channel.hex()}"
    for call, expected in (
        (mask, ["0.masked", "epoch-1"]),
        (vote, [channel, SITE, "0.voted", "epoch-1"]),
    ):
        synced.clear()
        call(consortium)
        assert synced[: len(expected)] == expected


def test_journal_of_no_epoch_has_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "none")
    assert journal.newest_epoch() is None
    assert journal.last_masked(1) == -1
    assert journal.voted(1, 0) is None
    journal.forget_older_than(0.0)
    for call in (
        lambda: journal.own(1),
        lambda: journal.dealt(1),
        lambda: journal.accepted(1),
        lambda: journal.secret(1, 0),
    ):
        with pytest.raises(SecureAggregationError):
            call()
