"""How many training patients each site needs: every arm again with a few of them, on the same held-out patients.

The few are nested (:mod:`client.few_patients`). Each number is a training of its own with the study's rounds and
passes, so fewer patients are also fewer steps.

Legend: R rows of weights (the cohort and its resamples), S sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from client.case_scores import CaseScores
from medfed.errors import StudyError
from medfed.metrics.resampling import NUM_RESAMPLES, Values, Weights
from medfed.study import StudyConfig
from server.checkpoint import write_durably
from server.evaluation import EvaluatedColumn, Measured
from server.few_shot import FEW_SHOT_FILE, FewShot, FewShotPoint
from server.results import Column
from simulation.measured import measured
from simulation.site_scores import SiteScores


def shots_of(text: str) -> tuple[int, ...]:
    """Numbers of patients as a user writes them, such as ``1,2,4``; in ascending order.

    Raises:
        ValueError: one line that says what was expected.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"Expected numbers of patients from 1 on, such as 1,2,4, got {text!r}.")
    if len(set(map(int, parts))) < len(parts):
        raise ValueError(f"Expected each number of patients once, got {text!r}.")
    return tuple(sorted(map(int, parts)))


def refuse_shots(study: StudyConfig, shots: Sequence[int]) -> None:
    """Refuse repetitions of a study whose trainings are charged, or whose sums are weighed by what sites declared.

    Raises:
        StudyError: one line.
    """
    if not shots:
        return
    if min(shots) < 1:
        raise StudyError(f"Expected numbers of patients from 1 on for --few-shot, got {min(shots)}.")
    if study.privacy is not None:
        raise StudyError(
            f"Expected a study without [privacy] for --few-shot, got {study.name!r}: each of the {len(shots)} numbers "
            "of patients is another training, which its patients would have to pay for; leave --few-shot out, or look "
            "at the curve of the study without [privacy] on patients who are made up."
        )
    if study.sums_securely:
        raise StudyError(
            f"Expected a study without [secure_aggregation] for --few-shot, got {study.name!r}, whose sums weigh each "
            "site by the patients it declared, not by the few it trains on; set enabled = false."
        )


def refuse_too_many(shots: Sequence[int], patients_at: Mapping[str, int]) -> None:
    """Refuse numbers that no site exceeds: with all patients the arms run anyway.

    Raises:
        StudyError: one line.
    """
    most = max(patients_at.values())
    if shots and max(shots) >= most:
        raise StudyError(
            f"Expected --few-shot numbers below {most}, the training patients of the largest site, got {max(shots)}; "
            "leave it out: the run measures all patients anyway."
        )


def few_shot_curve(
    folder: Path,
    scored: Mapping[str, SiteScores],
    weights: Mapping[str, Weights],
    primary: str,
    patients_at: Mapping[str, int],
) -> FewShot:
    """The curve of a run, from the scores of its sites; written to ``few_shot.json``.

    Args:
        folder: the run folder.
        scored: site -> scores, with those of the few.
        weights: site -> multiplicities of its held-out patients, [R, patients].
        primary: the metric.
        patients_at: site -> training patients, all of them.
    """
    counts = next(iter(scored.values())).few

    def rows(pick: Mapping[str, Mapping[Column, CaseScores]]) -> dict[str, dict[Column, Values]]:
        """Site -> column -> the metric in every row; a site without a held-out case has none."""
        found: dict[str, dict[Column, Values]] = {site: {} for site in pick}
        for site, columns in pick.items():
            for column, scores in columns.items():
                value_R = scores.metrics(weights[site]).get(primary)
                if value_R is not None and np.isfinite(value_R[0]):
                    found[site][column] = value_R
        return {site: columns for site, columns in found.items() if columns}

    before = {site: _only(of.scores, ("zero_shot",)) for site, of in scored.items()}
    last = {site: _only(of.scores, ("local_only", "federated", "pooled")) for site, of in scored.items()}
    points = [_point(0, dict.fromkeys(patients_at, 0), rows(before))]
    for count in sorted(counts):
        few = {site: dict(of.few[count]) for site, of in scored.items()}
        points.append(_point(count, {site: min(count, held) for site, held in patients_at.items()}, rows(few)))
    points.append(_point(max(patients_at.values()), dict(patients_at), rows(last)))
    curve = FewShot(resamples=NUM_RESAMPLES, metric=primary, points=tuple(points))
    write_durably(folder / FEW_SHOT_FILE, curve.model_dump_json(indent=2).encode())
    return curve


def _only(scores: Mapping[EvaluatedColumn, CaseScores], columns: Sequence[Column]) -> dict[Column, CaseScores]:
    return {column: scores[column] for column in columns if column in scores}


def _point(patients: int, patients_at: Mapping[str, int], rows: Mapping[str, Mapping[Column, Values]]) -> FewShotPoint:
    columns = list(dict.fromkeys(column for of_site in rows.values() for column in of_site))
    joining = {
        site: of_site["federated"] - of_site["local_only"]
        for site, of_site in rows.items()
        if {"federated", "local_only"} <= set(of_site)
    }
    return FewShotPoint(
        patients=patients,
        patients_at=dict(patients_at),
        mean=_present({column: _mean([of[column] for of in rows.values() if column in of]) for column in columns}),
        sites={site: _present({column: measured(of[column]) for column in of}) for site, of in rows.items()},
        joining=_mean(list(joining.values())) if joining else None,
        joining_at=_present({site: measured(value_R) for site, value_R in joining.items()}),
    )


def _mean(value_SR: Sequence[Values]) -> Measured | None:
    """Mean over sites; patients are resampled at each site by themselves."""
    return measured(np.mean(np.array(value_SR), axis=0))


_Key = TypeVar("_Key")


def _present(values: Mapping[_Key, Measured | None]) -> dict[_Key, Measured]:
    return {key: value for key, value in values.items() if value is not None}
