"""What a site's ledgers say about its cohorts, ready to be shown: spending by cohort, study and round."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medfed.errors import LedgerError, SiteError
from medfed.signing import read_public_key
from privacy.accounting import epsilon_spent
from privacy.ledger import SUFFIX
from privacy.ledger_chain import Chain, Spending, raw_hex
from privacy.ledger_entry import Adjacency, Cap, Unit
from privacy.ledger_view import inspect_ledger, public_key_path

UNSETTLED = "unsettled"
"""Outcome of a reservation that was never settled: training goes on, or ended in a crash. It counts."""


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShownCharge(_Shown):
    """One charge: a round, or an attempt at one.

    Attributes:
        entry: sequence in the ledger.
        time: of the reservation, ISO 8601 in UTC.
        noise: ``gaussian``, added by the site alone, or ``skellam, shared`` between sites; epsilon with shared noise
            holds against those only who do not know the other sites' shares.
        outcome: ``sent``, ``failed`` or :data:`UNSETTLED`; it counts in any case.
    """

    entry: int
    time: str
    round: int
    steps: int
    noise: str
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    delta: float
    outcome: str


class ShownStudy(_Shown):
    """What one study spent on a cohort.

    Attributes:
        epsilon_alone: of this study's charges, at the cohort's delta.
        epsilon_after: of these and those of the studies before it, composed.
    """

    study: str
    study_digest: str
    scope: str
    steps: int
    epsilon_alone: float
    epsilon_after: float
    charges: tuple[ShownCharge, ...]


class ShownCohort(_Shown):
    """What was spent on a cohort.

    Attributes:
        cap: the one that the last charge was held against.
        delta: of the cap; every epsilon here is computed at it.
        epsilon: of all charges, composed.
        studies: in the order of their first charge.
    """

    cohort: str
    unit: Unit
    adjacency: Adjacency
    cap: float
    delta: float
    epsilon: float
    studies: tuple[ShownStudy, ...]


class ShownLedger(_Shown):
    """One ledger, as far as it could be verified.

    Attributes:
        public_key: with which it was verified, raw, hexadecimal.
        error: what is wrong with the first entry that is not as it was written; None for a sound ledger.
            Cohorts then cover only the entries before it.
        entries: number of verified entries.
        last_digest: of the last verified entry; a copy of it kept elsewhere shows if the end is cut off.
    """

    path: Path
    public_key: str
    error: str | None
    entries: int
    last_digest: str
    cohorts: tuple[ShownCohort, ...]


def ledgers_in(place: Path) -> tuple[Path, ...]:
    """The ledger at ``place``, or the ledgers in that folder, a run's or a site's, by name.

    Raises:
        SiteError: if there is none.
    """
    if place.is_file():
        return (place,)
    for folder in (place, place / "ledgers", place / "state"):
        if found := tuple(sorted(folder.glob(f"*{SUFFIX}"))):
            return found
    raise SiteError(
        f"Expected a ledger, or a folder of ledgers named *{SUFFIX}, at {place}, got none; name its place. A site's is "
        "made when its first private round comes."
    )


def read_spending(path: Path, public_key: Path | None = None) -> ShownLedger:
    """Verify a ledger and sum up what it says.

    Args:
        path: of the database.
        public_key: file of the key that signed it; None takes the one that lies beside it.

    Raises:
        SiteError: if there is no public key.
        LedgerError: if there is nothing to read at all.
    """
    key = read_public_key(public_key or public_key_path(path))
    chain, error = inspect_ledger(path, key)
    if error is not None and not len(chain):
        raise LedgerError(f"{path}: {error}") from error
    return ShownLedger(
        path=path,
        public_key=raw_hex(key),
        error=None if error is None else str(error),
        entries=len(chain),
        last_digest=chain.last_digest.hex(),
        cohorts=tuple(_shown_cohort(cohort, chain) for cohort in chain.cohorts),
    )


def _shown_cohort(cohort: str, chain: Chain) -> ShownCohort:
    spendings = chain.spendings(cohort)
    first, cap = spendings[0].charge, spendings[-1].reserved.cap
    by_study: dict[tuple[str, str, str], list[Spending]] = {}
    for spending in spendings:
        charge = spending.charge
        by_study.setdefault((charge.study, charge.study_digest, charge.scope), []).append(spending)
    studies: list[ShownStudy] = []
    so_far: list[Spending] = []
    for (study, digest, scope), of_study in by_study.items():
        so_far += of_study
        studies.append(
            ShownStudy(
                study=study,
                study_digest=digest,
                scope=scope,
                steps=sum(spending.charge.mechanism.steps for spending in of_study),
                epsilon_alone=_epsilon(of_study, cap),
                epsilon_after=_epsilon(so_far, cap),
                charges=tuple(map(_shown_charge, of_study)),
            )
        )
    return ShownCohort(
        cohort=cohort,
        unit=first.unit,
        adjacency=first.adjacency,
        cap=cap.epsilon,
        delta=cap.delta,
        epsilon=_epsilon(spendings, cap),
        studies=tuple(studies),
    )


def _shown_charge(spending: Spending) -> ShownCharge:
    charge = spending.charge
    return ShownCharge(
        entry=spending.reserved.sequence,
        time=datetime.fromtimestamp(spending.reserved.time_ms / 1000, UTC).isoformat(timespec="seconds"),
        round=charge.round,
        steps=charge.mechanism.steps,
        noise=charge.mechanism.noise,
        noise_multiplier=charge.mechanism.noise_multiplier,
        sampling_rate=charge.mechanism.sampling_rate,
        clip_norm=charge.clip_norm,
        delta=charge.delta,
        outcome=UNSETTLED if spending.settled is None else spending.settled.outcome,
    )


def _epsilon(spendings: Sequence[Spending], cap: Cap) -> float:
    return epsilon_spent([spending.charge.mechanism for spending in spendings], cap.delta).value
