"""One private round: nothing trains before its charge is durable, nothing is sent before its reply is kept."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import client.private_round as private_round
import client.private_trainer as private_trainer
from client import serve
from client.private_trainer import PrivateTrainResult, train_privately
from client.site import forget_sites, site_of_partition
from medfed.errors import (
    AdapterMismatchError,
    BudgetError,
    DataError,
    DivergedError,
    EngineError,
    LedgerError,
    MedfedError,
    PayloadError,
    PolicyError,
    PrivacyError,
    SiteError,
)
from medfed.messages import Fields, RoundInstruction, RoundReply
from medfed.models.adapted import adapted_model, resolve
from medfed.payload import decode_adapter, encode_adapter
from medfed.signing import read_public_key
from medfed.study import StudyConfig
from privacy.accounting import epsilon_spent
from privacy.ledger import PrivacyLedger
from privacy.ledger_chain import Spending
from privacy.ledger_view import LedgerView, public_key_path
from privacy.plan import PrivacyPlan

MakeStudy = Callable[..., StudyConfig]
OpenSites = Callable[..., Path]

COHORT = "federated"


@dataclass(frozen=True)
class Asked:
    """A site called north, seen from the server's side and from the ledger's file."""

    study: StudyConfig
    folder: Path

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledgers" / "north.sqlite"

    def adapter(self, shift: float = 0.0) -> bytes:
        """The payload of a global adapter."""
        initial_P = adapted_model(self.study, torch.device("cpu")).initial_P
        return encode_adapter(initial_P + shift, self.study.resolved_manifest)

    def train(self, round: int = 1, *, adapter: bytes | None = None, attempt: int = 1, **other: Any) -> Fields:
        """What the site answers; raises what the site raises."""
        study = other.pop("study", self.study)
        instruction = RoundInstruction(study_digest=study.digest, round=round, attempt=attempt, **other)
        adapter = self.adapter() if adapter is None else adapter
        fields = instruction.to_fields(study=study.canonical, adapter=adapter)
        return serve.train(instruction, fields, site_of_partition(0))

    def charges(self) -> tuple[Spending, ...]:
        """As a reader of the file finds them who knows nothing of this process."""
        if not self.ledger_path.exists():
            return ()
        view = LedgerView(self.ledger_path, read_public_key(public_key_path(self.ledger_path)))
        view.verify()
        return view.charges(COHORT)

    def outcomes(self) -> list[str | None]:
        return [spending.settled.outcome if spending.settled else None for spending in self.charges()]

    def epsilon_of(self, rounds: int) -> float:
        assert self.study.privacy is not None
        plan = PrivacyPlan.of(self.study.privacy, num_rounds=10)
        return epsilon_spent([plan.mechanism(rounds)], plan.delta).value


@pytest.fixture
def asked(make_private_study: MakeStudy, open_sites: OpenSites, tmp_path: Path) -> Asked:
    study = resolve(make_private_study(("north",)), torch.device("cpu"))
    open_sites(study)
    return Asked(study, tmp_path)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the training itself."""
    called: list[int] = []

    def train(*arguments: Any, **options: Any) -> PrivateTrainResult:
        called.append(len(called))
        return train_privately(*arguments, **options)

    monkeypatch.setattr(private_round, "train_privately", train)
    return called


def test_reserve_train_settle_reply_is_the_only_order(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is held against the file, as another process would find it at that moment."""
    seen: list[tuple[str, list[str | None]]] = []
    reserve, settle = PrivacyLedger.reserve, PrivacyLedger.settle

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((f"{name} begins", asked.outcomes()))
            result = function(*arguments, **options)
            seen.append((f"{name} ends", asked.outcomes()))
            return result

        return call

    monkeypatch.setattr(PrivacyLedger, "reserve", noting("reserve", reserve))
    monkeypatch.setattr(PrivacyLedger, "settle", noting("settle", settle))
    monkeypatch.setattr(private_round, "train_privately", noting("train", train_privately))
    reply = asked.train()
    assert seen == [
        ("reserve begins", []),
        ("reserve ends", [None]),
        ("train begins", [None]),
        ("train ends", [None]),
        ("settle begins", [None]),
        ("settle ends", ["sent"]),
    ]
    (spending,) = asked.charges()
    charge = spending.charge
    assert (charge.study_digest, charge.scope, charge.round) == (asked.study.digest, "federated", 1)
    assert (charge.clip_norm, charge.delta, charge.unit, charge.adjacency) == (1.0, 0.01, "patient", "add-remove")
    mechanism = charge.mechanism
    assert (mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps) == (1.0, 0.5, 2)
    assert site_of_partition(0).ledger.stored_reply(COHORT, charge.request_digest) == reply["adapter"]


def test_reply_is_a_change_of_the_adapter_and_a_public_number(asked: Asked) -> None:
    reply = asked.train()
    header = RoundReply.parse(reply)
    assert (header.num_examples, header.metrics, header.refusal) == (3, {}, None)
    assert isinstance(reply["adapter"], bytes)
    assert bool(decode_adapter(reply["adapter"], asked.study.resolved_manifest).any())


def unapproved(asked: Asked, open_sites: OpenSites) -> None:
    open_sites(asked.study, approved_studies=["0" * 64])


def without_budget(asked: Asked, open_sites: OpenSites) -> None:
    open_sites(asked.study, budget=None)


def with_a_budget_for_records(asked: Asked, open_sites: OpenSites) -> None:
    open_sites(asked.study, budget={"epsilon": 1e6, "delta": 0.01, "unit": "record"})


def with_too_few_patients(asked: Asked, open_sites: OpenSites) -> None:
    open_sites(asked.study, minimum_patients=4)


def with_a_broken_manifest(asked: Asked, _: OpenSites) -> None:
    (asked.folder / "cohorts" / "north" / "manifest.csv").write_text("image,label\n")
    forget_sites()


def with_fewer_patients_than_declared(asked: Asked, _: OpenSites) -> None:
    manifest = asked.folder / "cohorts" / "north" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("north-0,train", "north-0,test"))
    forget_sites()


def with_a_ledger_key_that_others_may_read(asked: Asked, _: OpenSites) -> None:
    (asked.folder / "ledgers" / "ledger.key").chmod(0o644)
    forget_sites()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (unapproved, PolicyError, "approved studies"),
        (without_budget, PolicyError, r"Expected a \[budget\]"),
        (with_a_budget_for_records, PolicyError, "protection of each record"),
        (with_too_few_patients, PolicyError, "at least 4 training patients, got 3"),
        (with_fewer_patients_than_declared, PolicyError, "declared_patients of at most 2.* got 3"),
        (with_a_broken_manifest, DataError, "expected a column"),
        (with_a_ledger_key_that_others_may_read, SiteError, "ledger.key"),
    ],
)
def test_site_that_is_not_in_order_trains_nothing_and_charges_nothing(
    asked: Asked,
    open_sites: OpenSites,
    trainings: list[int],
    prepare: Callable[[Asked, OpenSites], None],
    error: type[MedfedError],
    message: str,
) -> None:
    prepare(asked, open_sites)
    with pytest.raises(error, match=message):
        asked.train()
    assert asked.charges() == ()
    assert trainings == []


def test_cohort_for_which_delta_is_too_large_trains_nothing(
    make_private_study: MakeStudy, open_sites: OpenSites, tmp_path: Path, trainings: list[int]
) -> None:
    study = resolve(make_private_study(("north",), delta=0.4), torch.device("cpu"))
    open_sites(study)
    asked = Asked(study, tmp_path)
    with pytest.raises(PrivacyError, match=r"delta below 1/3 = 0.333, .* got 0.4"):
        asked.train()
    assert (asked.charges(), trainings) == ((), [])


def test_engine_that_fails_its_self_check_spends_nothing(
    asked: Asked, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise EngineError("not this model")

    private_trainer._engines.clear()
    monkeypatch.setattr(private_trainer, "choose_engine", refuse)
    for ask in (asked.train, lambda: serve.describe(*described(asked))):
        with pytest.raises(EngineError, match="not this model"):
            ask()
    assert (asked.charges(), trainings) == ((), [])


def described(asked: Asked) -> tuple[Any, ...]:
    instruction = RoundInstruction(study_digest=asked.study.digest, round=0)
    return instruction, instruction.to_fields(study=asked.study.canonical, adapter=b""), site_of_partition(0)


def damaged(adapter: bytes) -> bytes:
    return adapter[:-1] + bytes([adapter[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda _: b"", PayloadError),
        (lambda adapter: adapter[:-4], PayloadError),
        (damaged, PayloadError),
    ],
)
def test_adapter_that_cannot_be_read_spends_nothing(
    asked: Asked, trainings: list[int], change: Callable[[bytes], bytes], error: type[MedfedError]
) -> None:
    with pytest.raises(error):
        asked.train(adapter=change(asked.adapter()))
    assert (asked.charges(), trainings) == ((), [])


def test_adapter_that_is_not_finite_spends_nothing(asked: Asked, trainings: list[int]) -> None:
    nan = bytearray(asked.adapter())
    nan[64:68] = b"\x00\x00\xc0\x7f"
    import struct
    import zlib

    struct.pack_into("<I", nan, 48, zlib.crc32(nan[64:]))
    with pytest.raises(AdapterMismatchError, match="lora"):
        asked.train(adapter=bytes(nan))
    assert (asked.charges(), trainings) == ((), [])


def test_round_beyond_the_budget_trains_nothing_and_the_message_has_the_numbers(
    asked: Asked, open_sites: OpenSites, trainings: list[int]
) -> None:
    one, two, cap = asked.epsilon_of(1), asked.epsilon_of(2), asked.epsilon_of(1) + 0.05
    assert cap < two
    open_sites(asked.study, epsilon=cap)
    asked.train(1)
    with pytest.raises(BudgetError) as refused:
        asked.train(2)
    for number in (
        f"epsilon {cap:.6g}",
        f"got {two:.6g}",
        f"Spent so far: {one:.6g}",
        "delta 0.01",
        "round 2",
        "2 steps",
    ):
        assert number in str(refused.value)
    assert trainings == [0]
    assert asked.outcomes() == ["sent"]


def test_budget_is_one_for_all_studies_on_the_cohort(asked: Asked, open_sites: OpenSites, trainings: list[int]) -> None:
    other = asked.study.replace(name="another", training={"batch_size": 1, "learning_rate": 0.02})
    open_sites(asked.study, epsilon=asked.epsilon_of(1) + 0.05, approved_studies=[asked.study.digest, other.digest])
    asked.train(1)
    with pytest.raises(BudgetError, match="of study 'another'"):
        asked.train(1, study=other)
    assert trainings == [0]
    assert asked.outcomes() == ["sent"]


@pytest.mark.parametrize("error", [DivergedError("NaN"), RuntimeError("no memory"), KeyboardInterrupt()])
def test_training_that_fails_stays_charged_and_a_retry_is_charged_again(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(private_round, "train_privately", fail)
        with pytest.raises(type(error)):
            asked.train()
    assert asked.outcomes() == ["failed"]
    asked.train()
    assert asked.outcomes() == ["failed", "sent"]
    spent = site_of_partition(0).ledger.spent(COHORT, 0.01).value
    assert spent == pytest.approx(asked.epsilon_of(2), abs=1e-9)


def test_reply_that_could_not_be_kept_is_not_sent_and_counts(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("privacy.ledger.replace_reply", full)
        with pytest.raises(LedgerError, match="disk is full"):
            asked.train()
    assert asked.outcomes() == [None]
    asked.train()
    assert asked.outcomes() == ["sent"]  # the open reservation was taken up: nothing of the first try has left


def in_child(work: Callable[[], bytes]) -> tuple[int, int]:
    """Forks; the child opens the sites anew, runs ``work`` and writes what it returns into the pipe."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: torch's are idle
        child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        forget_sites()
        os.write(writing, work())
    except (BudgetError, LedgerError):  # over the cap, or another process settled the one reservation first
        os.write(writing, b"refused")
    finally:
        os._exit(0)


def result_of(child: int, reading: int) -> bytes:
    with os.fdopen(reading, "rb") as pipe:
        result = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return result


@pytest.mark.process
def test_same_request_gets_the_same_bytes_without_training_or_charge(
    asked: Asked, open_sites: OpenSites, trainings: list[int]
) -> None:
    """In the process that answered, after reopening the ledger, in another process, and in another attempt."""
    open_sites(asked.study, epsilon=asked.epsilon_of(1) + 0.01)
    first = asked.train()["adapter"]
    again = asked.train()["adapter"]
    forget_sites()
    reopened = asked.train(attempt=2)["adapter"]
    elsewhere = result_of(*in_child(lambda: bytes(asked.train()["adapter"])))  # type: ignore[arg-type]
    assert first == again == reopened == elsewhere
    assert trainings == [0]
    assert asked.outcomes() == ["sent"]


def test_another_adapter_or_round_is_a_new_charge(asked: Asked, trainings: list[int]) -> None:
    replies = [
        asked.train(1)["adapter"],
        asked.train(1, adapter=asked.adapter(0.25))["adapter"],
        asked.train(2)["adapter"],
        asked.train(1)["adapter"],  # only the last reply is kept: this one is charged again
    ]
    assert len(set(replies)) == 4
    assert trainings == [0, 1, 2, 3]
    assert asked.outcomes() == ["sent"] * 4


def changed(asked: Asked) -> None:
    """The noise of the reservation made larger, so that it seems cheaper, behind the ledger's back."""
    connection = sqlite3.connect(asked.ledger_path, isolation_level=None)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    cheaper = "CAST(replace(CAST(body AS TEXT), '\"noise_multiplier\":1.0', '\"noise_multiplier\":9.0') AS BLOB)"
    assert connection.execute(f"UPDATE entries SET body = {cheaper} WHERE sequence = 2").rowcount == 1
    for _, sql in triggers:
        connection.execute(sql)
    connection.close()


def removed(asked: Asked) -> None:
    asked.ledger_path.unlink()


def emptied(asked: Asked) -> None:
    asked.ledger_path.write_bytes(b"")


def replaced_by_something_else(asked: Asked) -> None:
    asked.ledger_path.write_bytes(b"not a database" * 1000)


@pytest.mark.parametrize(
    ("tamper", "reopened"),
    [
        (changed, True),  # an open ledger remembers what it has verified
        *(
            (tamper, reopened)
            for tamper in (removed, emptied, replaced_by_something_else)
            for reopened in (True, False)
        ),
    ],
)
def test_ledger_that_is_not_as_it_was_written_lets_nothing_train(
    asked: Asked, trainings: list[int], tamper: Callable[[Asked], None], reopened: bool
) -> None:
    asked.train(1)
    tamper(asked)
    if reopened:
        forget_sites()
    with pytest.raises(LedgerError):
        asked.train(2)
    assert trainings == [0]


def test_ledger_that_cannot_be_written_lets_nothing_train(
    asked: Asked, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.train(1)
    monkeypatch.setattr("privacy.ledger_store.BUSY_TIMEOUT_S", 0.05)
    other = sqlite3.connect(asked.ledger_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        asked.train(2)
    other.execute("ROLLBACK")
    other.close()
    assert trainings == [0]
    assert asked.outcomes() == ["sent"]


def test_round_without_noise_is_neither_charged_nor_remembered(
    make_private_study: MakeStudy, open_sites: OpenSites, tmp_path: Path, trainings: list[int]
) -> None:
    study = resolve(make_private_study(("north",), trust="none", noise_multiplier=None), torch.device("cpu"))
    open_sites(study, budget=None)
    asked = Asked(study, tmp_path)
    header = RoundReply.parse(asked.train())
    asked.train()
    assert header.metrics == {}
    assert trainings == [0, 1]
    assert not asked.ledger_path.exists()


def test_evaluation_that_is_withheld_is_refused(
    make_private_study: MakeStudy, open_sites: OpenSites, tmp_path: Path
) -> None:
    study = resolve(make_private_study(("north",), evaluation="withheld"), torch.device("cpu"))
    open_sites(study)
    instruction = RoundInstruction(study_digest=study.digest, round=1)
    fields = instruction.to_fields(study=study.canonical, adapter=Asked(study, tmp_path).adapter())
    with pytest.raises(PolicyError, match="withholds metrics"):
        serve.evaluate(instruction, fields, site_of_partition(0))


KILLED_WHILE_TRAINING = """
import sys, time
from pathlib import Path
import client.private_round as private_round
from client import serve
from client.site import site_of_partition
from medfed.messages import RoundInstruction
from medfed.study import parse_study

folder = Path(sys.argv[1])

def train_for_ever(*_, **__):
    (folder / "training").touch()
    time.sleep(600)

private_round.train_privately = train_for_ever
study = parse_study((folder / "study.json").read_bytes())
instruction = RoundInstruction(study_digest=study.digest, round=1)
fields = instruction.to_fields(study=study.canonical, adapter=(folder / "adapter.bin").read_bytes())
serve.train(instruction, fields, site_of_partition(0))
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("rounds_in_cap", [2, 1])
def test_process_killed_while_it_trains_has_spent_the_round_once(
    asked: Asked, open_sites: OpenSites, trainings: list[int], rounds_in_cap: int
) -> None:
    open_sites(asked.study, epsilon=asked.epsilon_of(rounds_in_cap) + 0.01)
    (asked.folder / "study.json").write_bytes(asked.study.canonical)
    (asked.folder / "adapter.bin").write_bytes(asked.adapter())
    command = [sys.executable, "-c", KILLED_WHILE_TRAINING, str(asked.folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not (asked.folder / "training").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < end, "training did not begin"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert asked.outcomes() == [None]
    asked.train()
    assert (trainings, asked.outcomes()) == ([0], ["sent"]), "the reservation of the dead process is taken up"
    if rounds_in_cap == 1:
        with pytest.raises(BudgetError, match=f"Spent so far: {asked.epsilon_of(1):.6g}"):
            asked.train(2)
    else:
        asked.train(2)


@pytest.mark.process
@pytest.mark.parametrize("same_request", [False, True], ids=["different requests", "one request"])
def test_processes_that_are_asked_at_once_never_pass_the_cap_together(
    asked: Asked, open_sites: OpenSites, same_request: bool
) -> None:
    """Three processes, a cap for two rounds: never three charges, and no reply without one."""
    open_sites(asked.study, epsilon=asked.epsilon_of(2) + 0.01)
    asked.adapter()  # the backbone is loaded once, before the forks
    starting, start = os.pipe()
    adapters = [asked.adapter(0.0 if same_request else 0.1 * number) for number in range(3)]

    def work(adapter: bytes) -> Callable[[], bytes]:
        def run() -> bytes:
            os.close(start)
            os.read(starting, 1)  # ends when the last writing end is closed
            return bytes(asked.train(adapter=adapter)["adapter"])  # type: ignore[arg-type]

        return run

    children = [in_child(work(adapter)) for adapter in adapters]
    os.close(start)
    results = [result_of(*child) for child in children]
    os.close(starting)
    sent = [result for result in results if result != b"refused"]
    assert all(sent), "a child ended without a word"
    charges = asked.charges()
    assert len(charges) <= 2
    assert {"sent"} == set(asked.outcomes())
    assert len(set(sent)) == len(charges)
    if not same_request:
        assert (len(sent), len(charges)) == (2, 2)


def test_scope_that_the_site_does_not_serve_gets_no_budget_of_its_own(
    make_private_study: MakeStudy, open_sites: OpenSites
) -> None:
    """A server that could name scopes freely would get a new budget with each."""
    study = resolve(make_private_study(("north",)), torch.device("cpu"))
    open_sites(study)
    site = site_of_partition(0)
    instruction = RoundInstruction(study_digest=study.digest, round=1, scope="x1")
    adapter = encode_adapter(adapted_model(study, torch.device("cpu")).initial_P, study.resolved_manifest)
    with pytest.raises(PolicyError, match="Expected a scope of federated, got 'x1'"):
        serve.train(instruction, instruction.to_fields(study=study.canonical, adapter=adapter), site)
    assert site.ledger.cohorts() == ()
