"""Every held-out case of every site under every model that is compared, in this process or in forked ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Protocol

from client.case_scores import CaseScores, case_scores
from client.data import Item, resized_label
from client.site import Site
from medfed.errors import DataError
from medfed.metrics.calibration import fitted_temperature
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.outline_scores import OutlineScores
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.models.pixels import PixelSpec
from medfed.study import StudyConfig
from medfed.study_sections import SegmentationConfig, TaskConfig
from medfed.tasks.segmentation import annotate
from server.evaluation import EvaluatedColumn
from server.results import TRAINED, Column
from simulation.untrained import UntrainedOutlines

COLUMNS: tuple[EvaluatedColumn, ...] = ("zero_shot", "local_only", "federated", "pooled", "left_out")
BEFORE_AND_AFTER: tuple[Column, ...] = ("zero_shot", "federated")


class StateOf(Protocol):
    """The model of an arm at a site after its last round."""

    def __call__(self, column: EvaluatedColumn, site: Site, patients: int | None = None) -> ModelState | None:
        """With ``patients``, of the arm that trained on so many of each site; None if it was not run."""


@dataclass(frozen=True)
class Scoring:
    """What is scored, and with what.

    Attributes:
        study: resolved.
        sites: those of the study.
        model: is left with another adapter.
        state_of: the models.
        shots: numbers of training patients of each site for which there are arms of their own.
        untrained: outlines of structures that the study does not train; None if there are none.
    """

    study: StudyConfig
    sites: Sequence[Site]
    model: AdaptedModel
    state_of: StateOf
    shots: tuple[int, ...] = ()
    untrained: UntrainedOutlines | None = None


@dataclass(frozen=True)
class SiteScores:
    """The cases of one site, the same and in the same order in every column.

    Attributes:
        scores: column -> cases.
        temperatures: target -> temperature of the federated arm, from the site's training patients.
        few: training patients of each site -> column -> cases, without surface distances.
        untrained: column -> cases of structures that the study does not train, without surface distances.
    """

    scores: Mapping[EvaluatedColumn, CaseScores]
    temperatures: Mapping[str, float]
    few: Mapping[int, Mapping[Column, CaseScores]] = field(default_factory=dict)
    untrained: Mapping[Column, OutlineScores] = field(default_factory=dict)


def score_sites(work: Scoring, num_workers: int) -> dict[str, SiteScores]:
    """Scores of every site. Forked processes share the loaded model and cohorts, and send back arrays alone.

    Raises:
        DataError: outlines of other held-out patients than a site has.
    """
    names = [site.name for site in work.sites]
    if num_workers == 0:
        return dict(zip(names, (_scores_of(work, index) for index in range(len(names))), strict=True))
    with ProcessPoolExecutor(
        min(num_workers, len(names)), get_context("fork"), initializer=_inherit, initargs=(work,)
    ) as pool:
        return dict(zip(names, pool.map(_inherited_scores, range(len(names))), strict=True))


_inherited: list[Scoring] = []
"""In a forked process, what it was forked to work on: models do not travel to it."""


def _inherit(work: Scoring) -> None:
    _inherited.append(work)


def _inherited_scores(index: int) -> SiteScores:
    return _scores_of(_inherited[0], index)


def _scores_of(work: Scoring, index: int) -> SiteScores:
    study, site, model, state_of = work.study, work.sites[index], work.model, work.state_of
    cohort = site.cohort(study, model.pixels)

    def scores(
        items: Sequence[Item], state: ModelState, task: TaskConfig = study.task, *, with_distances: bool = True
    ) -> CaseScores:
        return case_scores(
            model,
            task,
            items,
            state=state,
            features=site.features,
            batch_size=study.training.batch_size,
            with_distances=with_distances,
        )

    states = {column: state for column in COLUMNS if (state := state_of(column, site)) is not None}
    found = {column: scores(cohort.test, state) for column, state in states.items()}
    few = {
        patients: {
            column: scores(cohort.test, state, with_distances=False)
            for column in TRAINED
            if (state := state_of(column, site, patients)) is not None
        }
        for patients in work.shots
    }
    temperatures: dict[str, float] = {}
    if study.task.kind == "classification":
        trained_on = scores(cohort.train, states["federated"])
        assert isinstance(trained_on, ClassScores)
        for target in trained_on.num_classes:
            fitted = fitted_temperature(trained_on.logits[target], trained_on.truth[target])
            assert fitted is not None  # a cohort has training patients
            temperatures[target] = fitted
    untrained: dict[Column, OutlineScores] = {}
    if work.untrained is not None:
        items = _outlined_anew(work.untrained, site.name, cohort.test, model.pixels)
        task = SegmentationConfig(kind="segmentation", classes=work.untrained.structures)
        for column in BEFORE_AND_AFTER:
            outlined = scores(items, states[column], task, with_distances=False)
            assert isinstance(outlined, OutlineScores)
            untrained[column] = outlined
    return SiteScores(found, temperatures, few, untrained)


def _outlined_anew(outlines: UntrainedOutlines, site_name: str, items: Sequence[Item], pixels: PixelSpec) -> list[Item]:
    """The held-out images with the outlines of other structures in place of those that were trained."""
    of_patient = outlines.label_maps.get(site_name, {})
    maps = [(patient, label_HW) for patient, label_maps in of_patient.items() for label_HW in label_maps]
    if [patient for patient, _ in maps] != [item.patient_id for item in items]:
        raise DataError(
            f"Expected outlines of the {len(items)} held-out images of site {site_name!r}, got those of {len(maps)} "
            "others; remove the folder 'untrained' from the cache."
        )
    classes = len(outlines.structures)
    return [
        replace(item, annotation=annotate(resized_label(label_HW, pixels), classes))
        for item, (_, label_HW) in zip(items, maps, strict=True)
    ]
