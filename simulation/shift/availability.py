"""Sites that are not always there, or not in time: which, and in which rounds.

Decided before the run, from the seed, for every round and site: so the same study loses the same sites however it is
run, and a study that cannot reach its quorum is refused before it starts. Deadlines are not waited for: an update that
comes late is made and then not handed to the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from medfed.shift_profile import AvailabilityShift, ShiftProfile
from medfed.study import StudyConfig
from simulation.shift.draws import Drawn

Absence = Literal["away", "late"]
"""``away``: the site is not asked. ``late``: it trains, and its update is not used."""

Attendance = Mapping[tuple[int, str], Absence]
"""Who is missing, by round and site."""


def attendance(study: StudyConfig, shifts: Mapping[str, ShiftProfile]) -> dict[tuple[int, str], Absence]:
    """Who is missing from which round of training.

    Args:
        study: its seed, and how many rounds it has.
        shifts: resolved, by site.
    """
    missing = {}
    for site, shift in shifts.items():
        if shift.availability is None:
            continue
        for number in range(1, study.rounds.num_rounds + 1):
            absence = _absence(shift.availability, number, Drawn(study.seed, (site, "round", number)))
            if absence is not None:
                missing[number, site] = absence
    return missing


def _absence(shift: AvailabilityShift, number: int, draws: Drawn) -> Absence | None:
    if number in shift.absent_rounds:
        return "away"
    generator = draws("availability")
    away, late = generator.random() < shift.dropout, generator.random() < shift.late
    return "away" if away else "late" if late else None
