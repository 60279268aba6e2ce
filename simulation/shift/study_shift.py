"""The shifts of a study's sites: presets written out, and what does not fit the study refused at once."""

from __future__ import annotations

from collections.abc import Mapping

from medfed.errors import StudyError
from medfed.shift_presets import resolved_at
from medfed.shift_profile import ShiftProfile
from medfed.study import StudyConfig
from simulation.shift.availability import attendance
from simulation.shift.labels import prevalence_of


def shifts_of(study: StudyConfig) -> dict[str, ShiftProfile]:
    """The resolved shift of every site that has one.

    Raises:
        StudyError: names the site, and what of its shift does not fit the study.
    """
    shifts = {}
    for site in study.sites:
        shift = resolved_at(site)
        if shift is None:
            continue
        if study.cohort is None and (made := [name for name in shift.families if name != "availability"]):
            raise StudyError(
                f"site {site.name!r}: shift.{made[0]} changes images or labels as they are made, but the site brings "
                "its own; write changed copies with 'medfed cohort shift', or remove it."
            )
        if shift.drift is not None and shift.drift.from_round > study.rounds.num_rounds:
            raise StudyError(
                f"site {site.name!r}: shift.drift.from_round is {shift.drift.from_round}, but the study has "
                f"{study.rounds.num_rounds} rounds; lower it."
            )
        shifts[site.name] = shift
    _check_attendance(study, shifts)
    return shifts


def prevalence(study: StudyConfig, site_name: str, shift: ShiftProfile | None) -> float | None:
    """The prevalence of lesions at a site: its own, or that of the table which its shift names.

    Raises:
        StudyError: both, or neither although the cohort has lesions.
    """
    (site,) = (site for site in study.sites if site.name == site_name)
    given, labels = site.lesion_prevalence, None if shift is None else shift.labels
    named = None if labels is None or labels.finding is None or labels.source is None else labels
    if named is not None and given is not None:
        raise StudyError(
            f"site {site_name!r}: lesion_prevalence and shift.labels.finding both say how many have a lesion; "
            "remove one."
        )
    if named is not None:
        assert named.finding is not None
        assert named.source is not None
        try:
            return prevalence_of(named.finding, named.source)
        except ValueError as error:
            raise StudyError(f"site {site_name!r}: shift.labels: {error}") from None
    if given is None and study.cohort is not None and study.cohort.kind == "brain-lesions":
        raise StudyError(f"site {site_name!r}: lesion_prevalence is missing; its shift names no finding either.")
    return given


def _check_attendance(study: StudyConfig, shifts: Mapping[str, ShiftProfile]) -> None:
    """Refuse rounds that cannot reach their quorum: better than a run that ends there."""
    rounds = attendance(study, shifts)
    for number in range(1, study.rounds.num_rounds + 1):
        there = [site for site in study.site_names if (number, site) not in rounds]
        if len(there) < study.quorum:
            raise StudyError(
                f"Expected updates of {study.quorum} sites in round {number}, but shift.availability leaves "
                f"{len(there)} ({', '.join(there) or 'none'}); lower rounds.quorum, or let sites be there more often."
            )
