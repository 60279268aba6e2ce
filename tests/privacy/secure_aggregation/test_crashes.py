"""Sites that are killed, run twice, or lose their journal: no second vector, no second set of survivors."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfed.errors import SecureAggregationError, SiteError
from privacy.secure_aggregation.framing import names
from privacy.secure_aggregation.journal import Journal
from privacy.secure_aggregation.messages import Masked, OpenRequest, Upload, Vote, VoteRequest
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
        noted = journal.voted(1, 0) is not None
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
        assert refused(lambda: consortium.client(SITE).setup(2)) == begun
        consortium.client(SITE).setup(3)
        assert not list((consortium.folder / SITE).glob("epoch-[12]/*.secret"))
        assert not list((consortium.folder / SITE).glob("epoch-[12]/own"))

    assert every_kill(consortium, SITE, lambda some: some.client(SITE).setup(2).to_bytes(), then) > 8


@pytest.mark.process
def test_kill_while_accepting_lets_one_view_be_accepted(make_consortium: Callable[..., Any]) -> None:
    consortium = make_consortium()
    phase = SetupPhase(consortium.plan, 1)
    for site in ALL:
        phase.add(consortium.client(site).setup(1))
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
    phase = SetupPhase(consortium.plan, 1)
    shutil.rmtree(consortium.folder / SITE)
    consortium.client(SITE).setup(1)
    for call in (mask, vote, open_all):
        with pytest.raises(SecureAggregationError, match="accepted setups of epoch 1, got none at this site"):
            call(consortium)
    assert refused(lambda: phase.relay_to(SITE))


@pytest.mark.xfail(strict=True, reason="a site that lost its journal may set up the same epoch again")
def test_site_that_lost_its_journal_in_an_epoch_does_not_count_twice(
    make_consortium: Callable[..., Any], adversary_of: Callable[..., Any]
) -> None:
    """It begins the epoch anew, with a server that has waited for it, and answers in both lives.

    Its box key is the same, so both lives hold the shares that D dealt. The first opens D's own mask with D itself;
    the second opens D's round key with J, who was shown no setup before. D's vector is read.
    """
    consortium = make_consortium(4, 1)
    (c, d, j, loser), plain = ALL, np.arange(3, dtype=np.uint32)
    setups = {site: consortium.client(site).setup(1) for site in ALL}
    first, second = SetupPhase(consortium.plan, 1), SetupPhase(consortium.plan, 1)
    for site in (c, d, loser):
        first.add(setups[site])
    acceptances = {site: consortium.client(site).accept(first.relay_to(site)) for site in (c, d, loser)}
    for acceptance in acceptances.values():
        first.accept(acceptance)
    consortium.epoch = epoch = first.finish()
    adversary = adversary_of(consortium, (c,))
    adversary.join(1, [0])
    start = consortium.start(0)
    adversary.hear_masked(start, consortium.mask(d, start, plain))
    for site in (d, loser):
        request = OpenRequest(start, start.sites)
        adversary.hear_shares(request, consortium.client(site).open(request))

    shutil.rmtree(consortium.folder / loser)
    try:
        setups[loser] = consortium.client(loser).setup(1)
    except SecureAggregationError:
        return
    for site in ALL:
        second.add(setups[site])
    for site in ALL:
        again = acceptances[site] if site in (c, d) else consortium.client(site).accept(second.relay_to(site))
        second.accept(again)
    consortium.epoch = second.finish()
    start, survivors = consortium.start(0), (c, j, loser)
    round_id = consortium.round_id(start)
    signed = {"vote": (names(survivors),), "masked": (bytes(32),)}
    by_c = {label: consortium.identities[c].sign(label, round_id, *fields) for label, fields in signed.items()}
    uploads = [consortium.upload(consortium.mask(site, start, VECTOR)) for site in (j, loser)]
    votes = [consortium.client(site).vote(VoteRequest(start, survivors)) for site in (j, loser)]
    request = OpenRequest(
        start, survivors, (Vote(c, round_id, by_c["vote"]), *votes), (Upload(c, bytes(32), by_c["masked"]), *uploads)
    )
    for site in (j, loser):
        adversary.hear_shares(request, consortium.client(site).open(request))
    consortium.epoch = epoch
    sums = adversary.sums()
    assert frozenset([d]) not in sums or not np.array_equal(sums[frozenset([d])], plain)


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
    for survivors in (ALL, WITHOUT_1):
        with pytest.raises(SecureAggregationError, match="it agrees to one set, once"):
            vote(consortium, survivors)
    (folder / "0.voted").unlink()
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
        assert not list((consortium.folder / site).glob("epoch-*/own"))


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
        consortium.client(SITE).setup(2)


def test_marker_is_durable_before_the_answer_is_made_known(consortium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and then its name are synced within the call."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    for call, marker in ((mask, "0.masked"), (vote, "0.voted")):
        synced.clear()
        call(consortium)
        assert synced[:2] == [marker, "epoch-1"]


def test_journal_of_no_epoch_has_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "none")
    assert journal.newest_epoch() is None
    assert journal.last_masked(1) == -1
    assert journal.voted(1, 0) is None
    journal.forget_older_than(0.0)
    for call in (lambda: journal.own(1), lambda: journal.accepted(1), lambda: journal.secret(1, 0)):
        with pytest.raises(SecureAggregationError):
            call()
