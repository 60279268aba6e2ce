"""What a simulation measures once training is over, looking at every virtual site directly.

Only somebody who holds all sites can: intervals need cases, and a consortium releases sums. Nothing is measured where
the study withholds or noises held-out metrics, even from whoever simulates.

Legend: R rows of weights (the cohort and its resamples), U patients of a site.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from client.case_scores import CaseScores, case_scores
from client.data import Item
from client.site import Site
from medfed.canonical import derive_seed
from medfed.metrics.calibration import ReliabilityBins, fitted_temperature, reliability_bins
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.embedding import effective_rank
from medfed.metrics.outline_scores import OutlineScores
from medfed.metrics.resampling import NUM_RESAMPLES, Values, Weights, estimate, patient_weights
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import task_of
from server.checkpoint import write_durably
from server.evaluation import (
    COMPARISONS,
    EVALUATION,
    Calibration,
    Embedding,
    EvaluatedColumn,
    Evaluation,
    Flips,
    Measured,
    OverSites,
    Reliability,
    SiteEvaluation,
)
from simulation.group_fairness import group_fairness
from simulation.saliency import saliency_of

LOWER_IS_BETTER = ("hd95", "surface-distance", "missed", "ece", "ece-scaled")
"""Metrics of which the largest is the worst; of all others the smallest is."""

CLEARLY = 0.05
"""Difference in Dice from which a case counts as lost or gained: about what two experts differ by."""

StateOf = Callable[[EvaluatedColumn, Site], ModelState | None]
"""The model of a column at a site; None if that arm was not run."""


@dataclass(frozen=True)
class SiteScores:
    """The cases of one site in every column.

    Attributes:
        scores: column -> cases, the same cases in the same order.
        temperatures: target -> temperature of the federated arm, from the site's training patients.
    """

    scores: Mapping[EvaluatedColumn, CaseScores]
    temperatures: Mapping[str, float]


def evaluate_run(
    folder: Path,
    study: StudyConfig,
    sites: Sequence[Site],
    model: AdaptedModel,
    state_of: StateOf,
    *,
    num_workers: int = 0,
) -> Evaluation | None:
    """Evaluate every arm at every site of the study, and write ``evaluation.json``.

    Args:
        folder: the run folder.
        study: resolved.
        sites: as opened; only those of the study are looked at.
        model: its adapter is put back afterwards.
        state_of: the model of each arm after its last round.
        num_workers: processes that predict, forked from this one; 0 for this process. The result is the same.

    Returns:
        None, and no file, where the study withholds or noises held-out metrics.
    """
    if not study.shows_held_out:
        return None
    started_s = time.monotonic()
    before_P = model.read()
    try:
        own = [site for site in sites if site.name in study.site_names]
        scored = _scored(_Work(study, own, model, state_of), num_workers)
        evaluated = {site.name: _evaluated(study, site, model, scored[site.name]) for site in own}
        evaluation = Evaluation(
            resamples=NUM_RESAMPLES,
            sites=evaluated,
            over_sites=_over_sites(evaluated),
            groups=group_fairness([found.scores["federated"] for found in scored.values()]),
            embedding=_embedding(list(scored.values())),
            saliency=saliency_of(study, own, model, state_of),
            seconds=round(time.monotonic() - started_s, 1),
        )
    finally:
        model.put(ModelState(before_P))
    write_durably(folder / EVALUATION, evaluation.model_dump_json(indent=2).encode())
    return evaluation


@dataclass(frozen=True)
class _Work:
    study: StudyConfig
    sites: Sequence[Site]
    model: AdaptedModel
    state_of: StateOf


def _scored(work: _Work, num_workers: int) -> dict[str, SiteScores]:
    """Scores of every site. Forked processes share the loaded model and cohorts, and send back arrays alone."""
    names = [site.name for site in work.sites]
    if num_workers == 0:
        return dict(zip(names, (_scores_of(work, index) for index in range(len(names))), strict=True))
    with ProcessPoolExecutor(
        min(num_workers, len(names)), get_context("fork"), initializer=_inherit, initargs=(work,)
    ) as pool:
        return dict(zip(names, pool.map(_inherited_scores, range(len(names))), strict=True))


_inherited: list[_Work] = []
"""In a forked process, what it was forked to work on: models do not travel to it."""


def _inherit(work: _Work) -> None:
    _inherited.append(work)


def _inherited_scores(index: int) -> SiteScores:
    return _scores_of(_inherited[0], index)


def _scores_of(work: _Work, index: int) -> SiteScores:
    study, site, model, state_of = work.study, work.sites[index], work.model, work.state_of
    cohort = site.cohort(study, model.pixels)

    def scores(items: Sequence[Item], state: ModelState) -> CaseScores:
        return case_scores(
            model, study.task, items, state=state, features=site.features, batch_size=study.training.batch_size
        )

    columns: tuple[EvaluatedColumn, ...] = ("zero_shot", "local_only", "federated", "pooled", "left_out")
    states = {column: state for column in columns if (state := state_of(column, site)) is not None}
    found = {column: scores(cohort.test, state) for column, state in states.items()}
    temperatures: dict[str, float] = {}
    if study.task.kind == "classification":
        trained_on = scores(cohort.train, states["federated"])
        assert isinstance(trained_on, ClassScores)
        for target in trained_on.num_classes:
            fitted = fitted_temperature(trained_on.logits[target], trained_on.truth[target])
            assert fitted is not None  # a cohort has training patients
            temperatures[target] = fitted
    return SiteScores(found, temperatures)


def _evaluated(study: StudyConfig, site: Site, model: AdaptedModel, found: SiteScores) -> SiteEvaluation:
    federated = found.scores["federated"]
    weight_RU = patient_weights(federated.num_patients, derive_seed(study.seed, site.name, "bootstrap"))
    values = {column: _metrics(scores, weight_RU, found, column) for column, scores in found.scores.items()}
    metrics: dict[str, dict[EvaluatedColumn, Measured]] = {}
    for column, of_column in values.items():
        for name, value_R in of_column.items():
            if (measured := _measured(value_R)) is not None:
                metrics.setdefault(name, {})[column] = measured
    primary = task_of(study.task).primary
    differences = {}
    for comparison, (after, before) in COMPARISONS.items():
        if primary in values.get(after, {}) and primary in values.get(before, {}):
            measured = _measured(values[after][primary] - values[before][primary])
            if measured is not None:
                differences[comparison] = measured
    return SiteEvaluation(
        patients=federated.num_patients,
        images=len(site.cohort(study, model.pixels).test),
        distance_unit=federated.unit if isinstance(federated, OutlineScores) else None,
        metrics=metrics,
        differences=differences,
        calibration=_calibration(federated, found.temperatures),
        flips=_flips(found.scores["zero_shot"], federated),
    )


def _metrics(scores: CaseScores, weight_RU: Weights, found: SiteScores, column: EvaluatedColumn) -> dict[str, Values]:
    if isinstance(scores, OutlineScores):
        return scores.metrics(weight_RU)
    return scores.metrics(weight_RU, found.temperatures if column == "federated" else None)


def _measured(value_R: Values) -> Measured | None:
    found = estimate(value_R)
    return None if found is None else Measured(value=found.value, low=found.low, high=found.high)


def _calibration(scores: CaseScores, temperatures: Mapping[str, float]) -> dict[str, Calibration]:
    if isinstance(scores, OutlineScores):
        return {}
    return {
        target: Calibration(
            temperature=temperature,
            before=_reliability(reliability_bins(scores.probabilities(target), scores.truth[target])),
            after=_reliability(reliability_bins(scores.probabilities(target, temperature), scores.truth[target])),
        )
        for target, temperature in temperatures.items()
    }


def _reliability(bins: ReliabilityBins) -> Reliability:
    return Reliability(
        count=tuple(int(count) for count in bins.count_B),
        confidence=tuple(float(confidence) for confidence in bins.confidence_B),
        correct=tuple(int(correct) for correct in bins.correct_B),
    )


def _flips(before: CaseScores, after: CaseScores) -> Flips | None:
    """None for a classifier, whose head is fresh: before training it has no skill to forget."""
    if isinstance(before, ClassScores) or isinstance(after, ClassScores):
        return None
    change_N = after.dice_N - before.dice_N
    return Flips(cases=len(change_N), lost=int((change_N < -CLEARLY).sum()), gained=int((change_N > CLEARLY).sum()))


def _over_sites(sites: Mapping[str, SiteEvaluation]) -> dict[str, dict[EvaluatedColumn, OverSites]]:
    found: dict[str, dict[EvaluatedColumn, OverSites]] = {}
    names = dict.fromkeys(name for site in sites.values() for name in site.metrics)
    columns = dict.fromkeys(column for site in sites.values() for metric in site.metrics.values() for column in metric)
    for name, column in product(names, columns):
        value_of = {
            site: evaluated.metrics[name][column].value
            for site, evaluated in sites.items()
            if column in evaluated.metrics.get(name, {})
        }
        if not value_of:
            continue
        pick = max if name.split("/")[0] in LOWER_IS_BETTER else min
        worst_site = pick(value_of, key=lambda site: value_of[site])
        found.setdefault(name, {})[column] = OverSites(
            mean=float(np.mean(list(value_of.values()))),
            worst=value_of[worst_site],
            worst_site=worst_site,
            gap=max(value_of.values()) - min(value_of.values()),
        )
    return found


def _embedding(scored: Sequence[SiteScores]) -> Embedding | None:
    """Effective rank over the held-out images of all sites; of each site's own model where sites differ."""
    columns: tuple[EvaluatedColumn, ...] = ("zero_shot", "federated", "pooled")
    rank: dict[EvaluatedColumn, float] = {}
    for column in columns:
        if all(column in found.scores for found in scored):
            feature_ND = np.concatenate([found.scores[column].embedding_BD for found in scored])
            if not math.isnan(value := effective_rank(feature_ND)):
                rank[column] = value
    images, features = np.concatenate([found.scores["federated"].embedding_BD for found in scored]).shape
    return Embedding(images=images, features=features, effective_rank=rank) if rank else None
