"""``medfed site ledger``: what was spent, in words a hospital can check, and whether the chain is whole."""

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.site_command import _ranges
from medfed.cli import main
from medfed.signing import public_pem
from privacy.accounting import Mechanism, epsilon_spent
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge
from privacy.skellam_accounting import SkellamMechanism

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CAP = Cap(epsilon=20.0, delta=1e-6, unit="patient")
LESIONS, NODULES = Mechanism(4.0, 1.0, 2), Mechanism(8.0, 1.0, 4)

Run = Callable[..., str]


def charge(round: int, *, study: str = "lesions", cohort: str = "chest-2024") -> Charge:
    return Charge(
        cohort=cohort,
        study=study,
        study_digest=("ab" if study == "lesions" else "cd") * 32,
        scope="federated",
        round=round,
        mechanism=LESIONS if study == "lesions" else NODULES,
        clip_norm=1.0,
        delta=1e-5,
        unit="patient",
        adjacency="add-remove",
        request_digest=f"{round:064x}",
    )


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies on one cohort: rounds 1, 2 and 2 again, 4; the second and the last not settled, one failed."""
    path = tmp_path_factory.mktemp("site") / "ledgers" / "north.sqlite"
    ledger = PrivacyLedger.open(path, KEY, clock=lambda: 1_767_225_600.0)
    ledger.settle(ledger.reserve(charge(1), CAP), "sent", b"x", {"clip_fraction": 0.123456})
    ledger.reserve(charge(2), CAP)
    asked_again = dataclasses.replace(charge(2), request_digest="ff" * 32)  # from another adapter
    ledger.settle(ledger.reserve(asked_again, CAP), "failed", None, {})
    ledger.settle(ledger.reserve(charge(4), CAP), "sent", b"y", {})
    ledger.reserve(charge(1, study="nodules"), CAP)
    return path


@pytest.fixture
def ledgers(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written.parent, tmp_path / "ledgers")
    return tmp_path / "ledgers"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``medfed site ledger``; returns standard output if it ends with the exit code that is expected."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object, code: int = 0) -> str:
        try:
            main(["site", "ledger", *map(str, arguments)])
            ended = 0
        except SystemExit as error:
            ended = error.code
        streams = capfd.readouterr()
        assert ended == code, streams.err
        return streams.out if code == 0 else streams.out + streams.err

    return call


def forge(path: Path) -> None:
    """Makes the fourth reservation, of round 4, cheaper."""
    connection = sqlite3.connect(path, isolation_level=None)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    changed = "CAST(replace(CAST(body AS TEXT), '\"steps\":2', '\"steps\":1') AS BLOB)"
    connection.execute(f"UPDATE entries SET body = {changed} WHERE sequence = 7")
    for _, sql in triggers:
        connection.execute(sql)
    connection.close()


def test_table_shows_each_study_and_that_the_chain_is_whole(ledgers: Path, run: Run) -> None:
    shown = run(ledgers / "north.sqlite")
    lesions = Mechanism(4.0, 1.0, 8)
    alone, other, together = (epsilon_spent(runs, 1e-6).value for runs in ([lesions], [NODULES], [lesions, NODULES]))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert (
        f"cohort chest-2024: epsilon {together:.3f} of 20 spent (delta 1e-06, unit patient, adjacency add-remove)"
        in lines
    )
    assert f"lesions 1-2, 4 8 4 1 {alone:.3f} {alone:.3f} 2 sent" in lines
    assert f"nodules 1 4 8 1 {other:.3f} {together:.3f} unsettled" in lines
    assert "abababab federated 1 failed" in lines
    assert "gaussian 1 unsettled" in lines
    assert lines.count("gaussian") == 1
    assert any(line.startswith("chain of 9 entries verified, ends with ") for line in lines)
    assert "0.123456" not in shown


def test_every_charge_can_be_listed(ledgers: Path, run: Run) -> None:
    lines = [" ".join(line.split()) for line in run(ledgers / "north.sqlite", "--rounds").splitlines()]
    assert [line for line in lines if "2026-01-01 00:00" in line] == [
        "2 2026-01-01 00:00 lesions 1 2 4 1 sent",
        "4 2026-01-01 00:00 lesions 2 2 4 1 unsettled",
        "5 2026-01-01 00:00 lesions 2 2 4 1 failed",
        "7 2026-01-01 00:00 lesions 4 2 4 1 sent",
        "9 2026-01-01 00:00 nodules 1 4 8 1 unsettled",
    ]


def test_shared_noise_is_told_from_a_sites_own(tmp_path: Path, run: Run) -> None:
    ledger = PrivacyLedger.open(tmp_path / "ledgers" / "north.sqlite", KEY, clock=lambda: 1_767_225_600.0)
    shared = SkellamMechanism(6.2244, 0.2, 1, 10528, 50_000)
    ledger.reserve(charge(1), CAP)
    for round in (1, 2):
        ledger.reserve(dataclasses.replace(charge(round, study="nodules"), mechanism=shared), CAP)
    together = epsilon_spent([LESIONS, dataclasses.replace(shared, steps=2)], 1e-6).value
    lines = [" ".join(line.split()) for line in run(tmp_path).splitlines()]
    assert any(line.startswith(f"cohort chest-2024: epsilon {together:.3f} of 20 spent") for line in lines)
    assert any(line.startswith("nodules 1-2 2 6.2244 0.2 ") for line in lines)
    assert [line for line in lines if line in ("gaussian", "skellam, shared")] == ["gaussian", "skellam, shared"]
    listed = [" ".join(line.split()) for line in run(tmp_path, "--rounds").splitlines()]
    assert "3 2026-01-01 00:00 nodules 1 1 6.2244 0.2 unsettled" in listed
    assert listed.count("skellam, shared") == 2
    (cohort,) = json.loads(run(tmp_path, "--json"))["ledgers"][0]["cohorts"]
    assert cohort["epsilon"] == together
    assert [one["noise"] for study in cohort["studies"] for one in study["charges"]] == [
        "gaussian", "skellam, shared", "skellam, shared"
    ]  # fmt: skip


def test_json_is_one_object_with_everything(ledgers: Path, run: Run) -> None:
    result = json.loads(run(ledgers / "north.sqlite", "--json"))
    (ledger,) = result["ledgers"]
    assert result["verified"] is True
    assert (ledger["error"], ledger["entries"]) == (None, 9)
    (cohort,) = ledger["cohorts"]
    assert {name: cohort[name] for name in ("cohort", "unit", "adjacency", "cap", "delta")} == {
        "cohort": "chest-2024", "unit": "patient", "adjacency": "add-remove", "cap": 20.0, "delta": 1e-6,
    }  # fmt: skip
    lesions, nodules = cohort["studies"]
    assert cohort["epsilon"] == nodules["epsilon_after"] > lesions["epsilon_after"] == lesions["epsilon_alone"]
    assert [one["outcome"] for one in lesions["charges"]] == ["sent", "unsettled", "failed", "sent"]
    assert lesions["charges"][0] == {
        "entry": 2, "time": "2026-01-01T00:00:00+00:00", "round": 1, "steps": 2, "noise": "gaussian",
        "noise_multiplier": 4.0, "sampling_rate": 1.0, "clip_norm": 1.0, "delta": 1e-5, "outcome": "sent",
    }  # fmt: skip


def test_tampered_entry_is_named_and_ends_with_its_exit_code(ledgers: Path, run: Run) -> None:
    forge(ledgers / "north.sqlite")
    shown = run(ledgers / "north.sqlite", code=14)
    assert "at least epsilon" in shown
    assert "only 6 entries verified; what comes after is not shown" in shown
    assert "verified, ends with" not in shown
    assert f"medfed: {ledgers / 'north.sqlite'}: Expected ledger entry 7 (study 'lesions', round 4)" in shown
    result = json.loads(run(ledgers / "north.sqlite", "--json", code=14))
    assert result["verified"] is False
    assert "entry 7 (study 'lesions', round 4)" in result["ledgers"][0]["error"]


@pytest.mark.parametrize("inside", [True, False], ids=["folder of ledgers", "run folder"])
def test_folder_shows_each_ledger_and_whichever_is_not_whole(ledgers: Path, run: Run, inside: bool) -> None:
    for name in ("sqlite", "head", "pub"):
        shutil.copy2(ledgers / f"north.{name}", ledgers / f"south.{name}")
    shown = run(ledgers if inside else ledgers.parent)
    assert shown.index("north.sqlite") < shown.index("south.sqlite")
    assert shown.count("chain of 9 entries verified") == 2
    forge(ledgers / "north.sqlite")
    shown = run(ledgers, code=14)
    assert shown.count("chain of 9 entries verified") == 1
    assert "north.sqlite: Expected ledger entry 7" in shown
    assert "south.sqlite: Expected" not in shown


def test_ledger_of_a_site_is_found_in_its_folder(ledgers: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(ledgers, tmp_path / "site" / "state")
    assert "chain of 9 entries verified" in run(tmp_path / "site")


def test_public_key_kept_elsewhere_is_the_one_that_counts(ledgers: Path, run: Run, tmp_path: Path) -> None:
    kept, other = tmp_path / "kept.pub", tmp_path / "other.pub"
    kept.write_bytes(public_pem(KEY.public_key()))
    other.write_bytes(public_pem(Ed25519PrivateKey.generate().public_key()))
    path = ledgers / "north.sqlite"
    (ledgers / "north.pub").unlink()
    assert "Expected a public key at" in run(path, code=11)
    assert "chain of 9 entries verified" in run(path, "--public-key", kept)
    assert "entry 1 (opens the ledger) to be signed with this ledger's key" in run(path, "--public-key", other, code=14)
    shutil.copy2(path, ledgers / "south.sqlite")
    assert "name one ledger" in run(ledgers, "--public-key", kept, code=2)


def test_place_without_a_ledger_is_explained(tmp_path: Path, run: Run) -> None:
    assert "Expected a ledger, or a folder of ledgers" in run(tmp_path, code=11)
    (tmp_path / "north.pub").write_bytes(public_pem(KEY.public_key()))
    (tmp_path / "north.sqlite").touch()
    assert "got an empty database" in run(tmp_path, code=14)
    (tmp_path / "north.sqlite").write_bytes(b"something else" * 100)
    assert "file is not a database" in run(tmp_path, code=14)


def test_ledger_without_charges_is_shown(tmp_path: Path, run: Run) -> None:
    PrivacyLedger.open(tmp_path / "ledgers" / "north.sqlite", KEY)
    shown = run(tmp_path)
    assert "nothing was charged yet" in shown
    assert "chain of 1 entry verified" in shown


def test_rounds_are_written_short() -> None:
    assert _ranges([3, 1, 2, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert _ranges([0]) == "0"
