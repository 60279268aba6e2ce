"""Preflight of the machine: policy, ledger, keys, weights, room."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import preflight_site
from client.preflight import preflight
from client.preflight_check import Check, PreflightInputs
from medfed.study import StudyConfig
from privacy.accounting import Mechanism
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge

POLICY = """
minimum_patients = 2
approved_studies = []
allow_unprotected = false
[budget]
epsilon = 4.0
delta = 1e-6
unit = "patient"
"""


def looked_at(**inputs: object) -> dict[str, Check]:
    given = {"site_name": "north", "manifests": (), **inputs}
    checks = preflight(PreflightInputs(**given))  # type: ignore[arg-type]
    return {check.name: check for check in checks if check.part == "set-up"}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


def test_policy_is_told_in_numbers(policy: Path) -> None:
    check = looked_at(policy=policy)["policy"]
    assert (check.outcome, check.found) == (
        "ok",
        "at least 2 patients; all studies together may spend epsilon 4 at delta 1e-06 per patient",
    )


def test_policy_that_cannot_be_read_is_a_failure(policy: Path) -> None:
    policy.write_text(POLICY.replace("epsilon = 4.0", "epsilon = -4.0"))
    check = looked_at(policy=policy)["policy"]
    assert check.outcome == "fail"
    assert "budget.epsilon" in check.found


def test_policy_without_budget_or_with_unprotected_studies_is_pointed_out(policy: Path) -> None:
    policy.write_text(POLICY.split("[budget]")[0].replace("false", "true"))
    checks = looked_at(policy=policy)
    assert (checks["policy"].outcome, checks["unprotected studies"].outcome) == ("warn", "warn")


def test_study_that_the_policys_rules_forbid_is_a_failure(
    policy: Path, make_study: Callable[..., StudyConfig], make_private_study: Callable[..., StudyConfig]
) -> None:
    plain = make_study(("north",))
    checks = looked_at(policy=policy, study=plain)
    assert checks["policy"].outcome == "ok"
    assert "which protects nobody" in checks["study and policy"].found
    shutil.rmtree(plain.sites[0].data.parent)  # type: ignore[union-attr]
    checks = looked_at(policy=policy, study=make_private_study(("north",)))
    assert checks["study and policy"].outcome == "ok"


def test_site_that_is_not_in_the_study_is_a_failure(make_study: Callable[..., StudyConfig]) -> None:
    assert "not west" in looked_at(site_name="west", study=make_study(("north",)))["study"].found


def ledger_with(path: Path, rounds: int) -> Path:
    ledger = PrivacyLedger.open(path, Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    for number in range(1, rounds + 1):
        charge = Charge(
            cohort="chest",
            study="lesions",
            study_digest="ab" * 32,
            scope="federated",
            round=number,
            mechanism=Mechanism(4.0, 1.0, 2),
            clip_norm=1.0,
            delta=1e-5,
            unit="patient",
            adjacency="add-remove",
            request_digest=f"{number:064x}",
        )
        ledger.settle(ledger.reserve(charge, Cap(epsilon=50.0, delta=1e-6, unit="patient")), "sent", b"x", {})
    return path


def test_ledger_is_verified_and_what_is_left_is_told(policy: Path, tmp_path: Path) -> None:
    assert looked_at(policy=policy, ledger=tmp_path / "none.sqlite")["ledger"].outcome == "ok"
    path = ledger_with(tmp_path / "ledgers" / "l.sqlite", 1)
    checks = looked_at(policy=policy, ledger=path)
    assert checks["ledger"].found == "chain of 3 entries verified"
    assert checks["budget"].outcome == "ok"
    spent, left = (
        float(part.split()[-2 if "left" in part else 1]) for part in (checks["budget"].found.split(": ")[1].split(", "))
    )
    assert spent + left == pytest.approx(4.0, abs=2e-3)


def test_budget_that_is_spent_is_a_failure(policy: Path, tmp_path: Path) -> None:
    path = ledger_with(tmp_path / "ledgers" / "l.sqlite", 1)
    policy.write_text(POLICY.replace("epsilon = 4.0", "epsilon = 0.5"))
    check = looked_at(policy=policy, ledger=path)["budget"]
    assert (check.outcome, "0.000 left" in check.found) == ("fail", True)


def test_ledger_that_was_changed_is_a_failure(policy: Path, tmp_path: Path) -> None:
    path = ledger_with(tmp_path / "ledgers" / "l.sqlite", 2)
    with closing(sqlite3.connect(path)) as connection, connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE entries SET body = x'00' WHERE sequence = 3")
        for _, sql in triggers:
            connection.execute(sql)
    check = looked_at(policy=policy, ledger=path)["ledger"]
    assert check.outcome == "fail"
    assert "only 2 entries verified" in check.found


def test_key_that_others_may_read_or_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.touch(mode=0o600)
    assert looked_at(private_files=(key,))["private files"].found == "1 path for their owner alone"
    key.chmod(0o640)
    check = looked_at(private_files=(key,))["private files"]
    assert (check.outcome, "mode 0640" in check.found, "chmod 0600" in check.what_to_do) == ("fail", True, True)
    assert "not there" in looked_at(private_files=(tmp_path / "none.key",))["private files"].found


def test_weights_that_are_not_the_studys_are_a_failure(make_study: Callable[..., StudyConfig]) -> None:
    study = make_study(("north",))
    assert "made from scratch" in looked_at(study=study)["backbone weights"].found
    other = study.replace(backbone={"name": "lite-medsam", "sha256": "1" * 64})
    assert looked_at(study=other)["backbone weights"].outcome == "fail"


@pytest.mark.parametrize(("free_gib", "outcome"), [(8, "ok"), (3, "warn"), (0.5, "fail")])
def test_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, outcome: str) -> None:
    free = int(free_gib * 2**30)
    monkeypatch.setattr(preflight_site.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    monkeypatch.setattr(preflight_site, "available_memory_bytes", lambda: free)
    checks = looked_at(state=tmp_path)
    assert (checks["disk"].outcome, checks["memory"].outcome) == (outcome, outcome)


def test_available_memory_is_at_most_what_the_machine_has() -> None:
    free = preflight_site.available_memory_bytes()
    if free is None:
        assert not Path("/proc/meminfo").exists()
    else:
        assert 0 <= free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_device_that_is_not_there_is_a_failure() -> None:
    assert looked_at(device="mps")["device"].outcome == "fail"
    assert looked_at(device="cpu")["device"].found.startswith("cpu, ")


def test_other_flower_is_refused_with_the_version_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked_at()["Flower"].outcome == "ok"
    monkeypatch.setattr(preflight_site, "version", lambda name: "1.42.0")
    check = looked_at()["Flower"]
    assert (check.outcome, check.what_to_do) == ("fail", "pip install 'flwr==1.41.*'")


def test_flower_series_is_the_one_that_is_required() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"flwr>={preflight_site.FLOWER_SERIES},<' in text
