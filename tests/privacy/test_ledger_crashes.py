"""Real processes that are killed, race, or run out of disk: what was reserved is never forgotten.

A process is killed before its first, second, third, ... system call: between two of them it changes nothing
that outlives it, so these are all the points at which a kill can make a difference.
"""

import ctypes
import dataclasses
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfed.errors import BudgetError, LedgerError
from privacy.accounting import Epsilon, Mechanism
from privacy.ledger import PrivacyLedger, Reservation
from privacy.ledger_entry import Cap, Charge
from privacy.ledger_view import LedgerView

pytestmark = pytest.mark.process

MakeCharge = Callable[..., Charge]
Report = Callable[[str], None]

PTRACE_TRACEME, PTRACE_SYSCALL = 0, 24
_libc = ctypes.CDLL(None, use_errno=True)

REFUSED, UNSOUND, UNEXPECTED = 3, 4, 5


def in_child(work: Callable[[Report], None], *, traced: bool = False) -> tuple[int, int]:
    """Forks; the child runs ``work`` and exits 0, or with a code of ours. Returns its id and a pipe of reports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = UNEXPECTED
    try:
        if traced:
            assert _libc.ptrace(PTRACE_TRACEME, 0, None, None) == 0
        work(lambda word: os.write(writing, word.encode() + b"\n") and None)
        code = 0
    except BudgetError:
        code = REFUSED
    except LedgerError:
        code = UNSOUND
    finally:
        os._exit(code)


def reports(reading: int) -> list[str]:
    """What a child that has ended had reported."""
    with os.fdopen(reading) as pipe:
        return pipe.read().split()


def ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_before_call(number: int, work: Callable[[Report], None]) -> tuple[list[str], bool]:
    """Runs ``work``, which stops itself when it is ready, and kills it before its ``number``-th system call.

    Returns what it had reported, and whether it had ended first.
    """
    child, reading = in_child(work, traced=True)
    _, status = os.waitpid(child, 0)
    assert os.WIFSTOPPED(status), "the child did not get ready"
    finished = False
    for _ in range(2 * number):  # it stops before each call and after
        assert _libc.ptrace(PTRACE_SYSCALL, child, None, None) == 0
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            finished = True
            break
    if not finished:
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
    return reports(reading), finished


def ready() -> None:
    """Stops this process until the one that traces it goes on."""
    os.kill(os.getpid(), signal.SIGSTOP)


EVERY_CALL = pytest.mark.parametrize(
    "stride",
    [pytest.param(1, marks=[pytest.mark.exhaustive, pytest.mark.timeout(900)]), 29],
    ids=["every call", "some"],
)


@EVERY_CALL
def test_kill_at_any_point_of_a_round_never_undercounts(
    ledger: PrivacyLedger, path: Path, tmp_path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap,
    stride: int,
) -> None:  # fmt: skip
    ledger.settle(ledger.reserve(make_charge(1, steps=1), cap), "sent", b"first", {})
    charge, reply = make_charge(2, steps=3), b"second" * 2000
    copy = tmp_path / "copy" / path.name
    seen = set()
    finished, number = False, 1 - stride
    while not finished:
        number += stride
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(path.parent, copy.parent)

        def one_round(report: Report) -> None:
            ledger = PrivacyLedger.open(copy, key)
            ready()
            reservation = ledger.reserve(charge, cap)
            report("trained")
            ledger.settle(reservation, "sent", reply, {})
            report("sent")

        said, finished = killed_before_call(number, one_round)
        if number % 2:  # whoever comes first finds what the dead process left, even one that only reads
            LedgerView(copy, key.public_key()).verify()
        after = PrivacyLedger.open(copy, key)
        after.verify()
        spendings = after.charges("chest-2024")[1:]
        stored = after.stored_reply("chest-2024", charge.request_digest)
        assert len(spendings) <= 1
        assert "trained" not in said or len(spendings) == 1, f"forgotten when killed at {number}"
        assert "sent" not in said or stored == reply, f"reply lost when killed at {number}"
        assert (stored == reply) == any(s.settled is not None for s in spendings)
        assert stored in (reply, None)
        if stored is None:  # the retry takes up what the crash left open: nothing of it has left
            assert after.stored_reply("chest-2024", make_charge(1).request_digest) == b"first"
            after.settle(after.reserve(charge, cap), "sent", reply, {})
        counted = 1 + 3
        assert after.spent("chest-2024", 1e-5).value == counted
        assert len(after.charges("chest-2024")) == 2
        with pytest.raises(BudgetError):
            after.reserve(make_charge(3, steps=10 - counted + 1), cap)
        assert sorted(file.name for file in copy.parent.iterdir()) == ["north.head", "north.pub", "north.sqlite"]
        seen.add((len(spendings), "trained" in said, stored is not None, "sent" in said))
    assert stride > 1 or seen == {
        (0, False, False, False),
        (1, False, False, False),
        (1, True, False, False),
        (1, True, True, False),
        (1, True, True, True),
    }


@EVERY_CALL
def test_kill_at_any_point_of_making_a_ledger_leaves_one_that_works(
    tmp_path: Path, key: Ed25519PrivateKey, count_steps: None, make_charge: MakeCharge, cap: Cap, stride: int
) -> None:
    path = tmp_path / "new" / "ledgers" / "north.sqlite"
    finished, number = False, 1 - stride
    while not finished:
        number += stride
        shutil.rmtree(path.parent.parent, ignore_errors=True)

        def make(_: Report) -> None:
            ready()
            PrivacyLedger.open(path, key)

        _, finished = killed_before_call(number, make)
        ledger = PrivacyLedger.open(path, key)
        assert len(ledger.entries()) == 1
        ledger.reserve(make_charge(), cap)
        PrivacyLedger.open(path, key).verify()


def slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epsilon counts steps, and takes a while: time enough for two processes to be in each other's way."""

    def epsilon_spent(mechanisms: Sequence[Mechanism], delta: float) -> Epsilon:
        time.sleep(0.05)
        steps = float(sum(mechanism.steps for mechanism in mechanisms))
        return Epsilon(prv=steps, pld=steps)

    monkeypatch.setattr("privacy.ledger_cap.epsilon_spent", epsilon_spent)
    monkeypatch.setattr("privacy.ledger_view.epsilon_spent", epsilon_spent)


@pytest.mark.parametrize(("steps", "fitting"), [(6, 1), (5, 2), (3, 3)])
def test_processes_that_race_are_all_counted_and_the_cap_holds(
    path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap, monkeypatch: pytest.MonkeyPatch,
    steps: int, fitting: int,
) -> None:  # fmt: skip
    slowed_down(monkeypatch)
    starting, start = os.pipe()

    def race(report: Report) -> None:
        ledger = PrivacyLedger.open(path, key)
        report("ready")
        os.close(start)
        os.read(starting, 1)  # ends when the last writing end is closed
        ledger.reserve(make_charge(os.getpid(), steps=steps), cap)

    children = [in_child(race) for _ in range(4)]
    for _, reading in children:
        assert os.read(reading, 6) == b"ready\n"
    os.close(start)
    codes = sorted(ended(child) for child, _ in children)
    os.close(starting)
    for _, reading in children:
        os.close(reading)
    assert codes == [0] * fitting + [REFUSED] * (4 - fitting)
    after = PrivacyLedger.open(path, key)
    after.verify()
    assert after.spent("chest-2024", 1e-5).value == fitting * steps


def test_processes_that_make_the_same_ledger_share_it(
    path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap, count_steps: None
) -> None:
    def make(_: Report) -> None:
        PrivacyLedger.open(path, key).reserve(make_charge(os.getpid(), steps=1), cap)

    children = [in_child(make) for _ in range(5)]
    assert [ended(child) for child, _ in children] == [0] * 5
    for _, reading in children:
        os.close(reading)
    assert PrivacyLedger.open(path, key).spent("chest-2024", 1e-5).value == 5


@pytest.mark.parametrize("dies", [False, True], ids=["error", "killed in the write"])
def test_full_disk_never_undercounts(
    ledger: PrivacyLedger, path: Path, tmp_path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap,
    dies: bool,
) -> None:  # fmt: skip
    """No file may grow past a limit, as on a full disk; the kernel refuses the write, or kills the writer in it."""
    ledger.settle(ledger.reserve(make_charge(1, steps=1), cap), "sent", b"first", {})
    charge, reply = make_charge(2, steps=3), b"second" * 4000
    copy = tmp_path / "copy" / path.name
    seen = set()
    for limit in [*range(0, 1024, 128), *range(1024, 64 * 1024, 4096)]:
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(path.parent, copy.parent)

        def one_round(report: Report, limit: int = limit) -> None:
            ledger = PrivacyLedger.open(copy, key)
            if dies:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            reservation = ledger.reserve(charge, cap)
            report("trained")
            ledger.settle(reservation, "sent", reply, {})
            report("sent")

        child, reading = in_child(one_round)
        code, said = ended(child), reports(reading)
        assert code in (0, -signal.SIGXFSZ if dies else UNSOUND)
        assert (code == 0) == ("sent" in said)
        after = PrivacyLedger.open(copy, key)
        after.verify()
        counted = len(after.charges("chest-2024")) - 1
        stored = after.stored_reply("chest-2024", charge.request_digest)
        assert "trained" not in said or counted == 1
        assert "sent" not in said or stored == reply
        assert stored in (reply, None)
        seen.add(tuple(said))
    assert seen == {(), ("trained",), ("trained", "sent")}


def test_ledger_that_may_only_be_read_is_read_and_nothing_trains(
    ledger: PrivacyLedger, path: Path, key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    ledger.settle(ledger.reserve(make_charge(1), cap), "sent", b"first", {})
    with tempfile.TemporaryDirectory() as name:  # not below a folder that only root may enter
        folder = Path(name)
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        for file in folder.iterdir():
            file.chmod(0o400)
        folder.chmod(0o500)
        if os.geteuid() == 0:
            for place in (folder, *folder.iterdir()):
                os.chown(place, 65534, 65534)

        def look_and_train(report: Report) -> None:
            if os.geteuid() == 0:  # nothing is read-only to root
                os.setgid(65534)
                os.setuid(65534)
            view = LedgerView(folder / path.name, key.public_key())
            view.verify()
            report(f"{view.spent('chest-2024', 1e-5).value:g}")
            report(view.stored_reply("chest-2024", make_charge(1).request_digest).decode())
            try:
                PrivacyLedger.open(folder / path.name, key).reserve(make_charge(2), cap)
            except LedgerError:
                report("refused")
            report("done")

        child, reading = in_child(look_and_train)
        assert ended(child) == 0
        assert reports(reading) == ["3", "first", "refused", "done"]
        folder.chmod(0o700)


def test_ledger_crosses_a_fork(ledger: PrivacyLedger, make_charge: MakeCharge, cap: Cap) -> None:
    reservation = ledger.reserve(make_charge(1), cap)

    def child_work(report: Report) -> None:
        ledger.settle(reservation, "sent", b"by the child", {})
        ledger.reserve(make_charge(2), cap)
        report("done")

    child, reading = in_child(child_work)
    assert (ended(child), reports(reading)) == (0, ["done"])
    assert ledger.stored_reply("chest-2024", make_charge(1).request_digest) == b"by the child"
    assert ledger.spent("chest-2024", 1e-5).value == 6
    ledger.reserve(make_charge(3), cap)
    with pytest.raises(LedgerError, match="open reservation"):
        ledger.settle(Reservation(reservation.sequence, reservation.charge), "failed", None, {})
    assert dataclasses.asdict(reservation.charge) == dataclasses.asdict(make_charge(1))
