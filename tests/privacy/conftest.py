"""What the tests of the ledger share: a key, charges, and an accountant whose epsilon is a number of steps."""

import dataclasses
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.accounting import Epsilon, Mechanism
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge

MakeCharge = Callable[..., Charge]


@pytest.fixture(scope="session")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers" / "north.sqlite"


@pytest.fixture(scope="session")
def make_charge() -> MakeCharge:
    """A charge of one round; keyword arguments replace fields, ``steps`` the mechanism's."""
    usual = Charge(
        cohort="chest-2024",
        study="lesions",
        study_digest="ab" * 32,
        scope="federated",
        round=1,
        mechanism=Mechanism(noise_multiplier=1.1, sampling_rate=0.2, steps=3),
        clip_norm=1.0,
        delta=1e-5,
        unit="patient",
        adjacency="add-remove",
        request_digest="00" * 32,
    )

    def make(round: int = 1, *, steps: int = 3, **changes: Any) -> Charge:
        changes.setdefault("request_digest", f"{round:064x}")
        mechanism = dataclasses.replace(usual.mechanism, steps=steps)
        return dataclasses.replace(usual, **{"round": round, "mechanism": mechanism, **changes})

    return make


@pytest.fixture(scope="session")
def cap() -> Cap:
    """Ten steps, where steps are counted; see ``count_steps``."""
    return Cap(epsilon=10.0, delta=1e-5, unit="patient")


@pytest.fixture
def count_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes epsilon the number of steps: an oracle that a person can compute."""

    def epsilon_spent(mechanisms: Sequence[Mechanism], delta: float) -> Epsilon:
        steps = sum(mechanism.steps for mechanism in mechanisms)
        return Epsilon(prv=float(steps), pld=steps - 0.5)

    monkeypatch.setattr("privacy.ledger_cap.epsilon_spent", epsilon_spent)
    monkeypatch.setattr("privacy.ledger_view.epsilon_spent", epsilon_spent)


@pytest.fixture
def ledger(path: Path, key: Ed25519PrivateKey, count_steps: None) -> PrivacyLedger:
    return PrivacyLedger.open(path, key)


@pytest.fixture(scope="session")
def tamper() -> Callable[..., None]:
    """Runs SQL on a ledger's database as an intruder would: without its triggers, which are put back."""

    def run(path: Path, *statements: str | tuple[str, Sequence[object]]) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(*([statement] if isinstance(statement, str) else statement))
        for _, sql in triggers:
            connection.execute(sql)
        connection.close()

    return run
