"""What a simulation measures once training is over, looking at every virtual site directly.

Only somebody who holds all sites can: intervals need cases, and a consortium releases sums. Nothing is measured where
the study withholds or noises held-out metrics, even from whoever simulates.

Legend: R rows of weights (the cohort and its resamples), U patients of a site.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from client.case_scores import CaseScores
from client.site import Site
from medfed.canonical import derive_seed
from medfed.metrics.calibration import ReliabilityBins, reliability_bins
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.embedding import effective_rank
from medfed.metrics.outline_scores import OutlineScores
from medfed.metrics.resampling import NUM_RESAMPLES, Values, Weights, patient_weights
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
    Forgetting,
    Measured,
    NotMeasured,
    OverSites,
    Reliability,
    SiteEvaluation,
)
from server.few_shot import FewShot
from simulation.few_shot import few_shot_curve
from simulation.forgetting import BeforeAndAfter, flips_of, forgetting_of
from simulation.group_fairness import group_fairness
from simulation.measured import measured
from simulation.saliency import saliency_of
from simulation.site_scores import Scoring, SiteScores, StateOf, score_sites
from simulation.untrained import UntrainedOutlines

LOWER_IS_BETTER = ("hd95", "surface-distance", "missed", "ece", "ece-scaled")
"""Metrics of which the largest is the worst; of all others the smallest is."""


@dataclass(frozen=True)
class Measurements:
    """What was measured after training.

    Attributes:
        evaluation: intervals, calibration and what else.
        few_shot: the curve over training patients; None where it was not asked for.
    """

    evaluation: Evaluation
    few_shot: FewShot | None


def evaluate_run(
    folder: Path,
    study: StudyConfig,
    sites: Sequence[Site],
    model: AdaptedModel,
    state_of: StateOf,
    *,
    untrained: UntrainedOutlines | NotMeasured,
    shots: tuple[int, ...] = (),
    num_workers: int = 0,
) -> Measurements | None:
    """Evaluate every arm at every site of the study, and write ``evaluation.json``, and ``few_shot.json`` if asked to.

    Args:
        folder: the run folder.
        study: resolved.
        sites: as opened; only those of the study are looked at.
        model: its adapter is put back afterwards.
        state_of: the model of each arm after its last round.
        untrained: outlines of structures that the study does not train, or why there are none.
        shots: numbers of training patients of each site with which the arms ran once more.
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
        outlines = untrained if isinstance(untrained, UntrainedOutlines) else None
        scored = score_sites(Scoring(study, own, model, state_of, shots, outlines), num_workers)
        weights = {
            name: patient_weights(of.scores["federated"].num_patients, derive_seed(study.seed, name, "bootstrap"))
            for name, of in scored.items()
        }
        evaluated = {site.name: _evaluated(study, site, model, scored[site.name], weights[site.name]) for site in own}
        evaluation = Evaluation(
            resamples=NUM_RESAMPLES,
            sites=evaluated,
            over_sites=_over_sites(evaluated),
            groups=group_fairness([found.scores["federated"] for found in scored.values()]),
            embedding=_embedding(list(scored.values())),
            saliency=saliency_of(study, own, model, state_of),
            forgetting=_forgetting(scored, weights, untrained),
            seconds=round(time.monotonic() - started_s, 1),
        )
    finally:
        model.put(ModelState(before_P))
    write_durably(folder / EVALUATION, evaluation.model_dump_json(indent=2).encode())
    few_shot = None
    if shots:
        patients_at = {site.name: site.cohort(study, model.pixels).num_train_patients for site in own}
        few_shot = few_shot_curve(folder, scored, weights, task_of(study.task).primary, patients_at)
    return Measurements(evaluation, few_shot)


def _forgetting(
    scored: Mapping[str, SiteScores], weights: Mapping[str, Weights], untrained: UntrainedOutlines | NotMeasured
) -> Forgetting | NotMeasured:
    if isinstance(untrained, NotMeasured):
        return untrained
    sites = [
        BeforeAndAfter(of.untrained["zero_shot"], of.untrained["federated"], weights[name])
        for name, of in scored.items()
    ]
    return forgetting_of(sites, untrained.other_sides)


def _evaluated(
    study: StudyConfig, site: Site, model: AdaptedModel, found: SiteScores, weight_RU: Weights
) -> SiteEvaluation:
    federated = found.scores["federated"]
    values = {column: _metrics(scores, weight_RU, found, column) for column, scores in found.scores.items()}
    metrics: dict[str, dict[EvaluatedColumn, Measured]] = {}
    for column, of_column in values.items():
        for name, value_R in of_column.items():
            if (found_value := measured(value_R)) is not None:
                metrics.setdefault(name, {})[column] = found_value
    primary = task_of(study.task).primary
    differences = {}
    for comparison, (after, before) in COMPARISONS.items():
        if primary in values.get(after, {}) and primary in values.get(before, {}):
            difference = measured(values[after][primary] - values[before][primary])
            if difference is not None:
                differences[comparison] = difference
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
    return flips_of(before, after)


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
