"""The audit of a run: a site's training once more, attacked, beside what the study claims.

Steps that are real patients' at a hospital are audited as they would be there: draws and noise come from the operating
system, also where the run itself, on made-up patients, drew from the study's seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.private_round import engine_for
from client.private_trainer import units_of
from client.round_start import own_state
from client.site import Site
from medfed.errors import CheckpointError, StudyError
from medfed.models.folding import ModelState
from medfed.study import FEDERATED
from medfed.tasks import task_of
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from server.audit_result import AUDIT, AuditBound, AuditResult, Membership, ShadowAttack
from server.checkpoint import read_checkpoint, write_durably
from simulation.audit.adapter_inversion import NUM_SEARCHES, Pictures, Victim, invert_adapter
from simulation.audit.blackbox import Training, mislabelled, score_images
from simulation.audit.figures import draw_adapter_inversion, draw_bounds, draw_inversion
from simulation.audit.findings import Finding, game_findings, one_run_finding
from simulation.audit.inversion import invert
from simulation.audit.membership import losses_by_patient, membership
from simulation.audit.newcomers import newcomers, num_made
from simulation.audit.notes import Demonstration, notes
from simulation.audit.scene import Scene
from simulation.audit.shadows import FEWEST, Population, Shadows, scores_of, shadow_attack, train_shadows
from simulation.audit.steps import SiteTraining
from simulation.audit.whitebox import play, run_once
from simulation.overlays import displayable
from simulation.progress import Reporter, Silent
from strategies.registry import strategy_of
from strategies.shared_model import shared_state

CONFIDENCE = 0.99
"""Of all bounds together: each of the five attacks may be wrong with a fifth of the rest."""

_NUM_ATTACKS = 5
_GRADIENT_CANARIES = 4  # times as many as images: they cost next to nothing


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        runs: short runs with and without a canary; >= 20.
        canaries: mislabelled images of one run; >= 10.
        shadows: adapters that are trained for the likelihood-ratio attack; 0 for none, else >= 8.
        inversion_steps: of each search for an image behind an update of the adapter; 0 for none.

    Raises:
        StudyError: for too few shadows.
    """

    runs: int = 1000
    canaries: int = 100
    shadows: int = 0
    inversion_steps: int = 0

    def __post_init__(self) -> None:
        if 0 < self.shadows < FEWEST:
            raise StudyError(f"Expected --shadows 0, or at least {FEWEST}, got {self.shadows}: too few to fit to.")


def audit_run(
    folder: Path, *, site: str | None = None, effort: Effort | None = None, reporter: Reporter | None = None
) -> AuditResult:
    """Audits a finished run; writes ``audit.json`` and ``figures/audit-*.svg`` into its folder.

    Args:
        folder: of a run of ``medfed simulate``.
        site: whose training is run again; the first of the study by default.
        effort: how much is tried.
        reporter: is told of progress.

    Raises:
        MedfedError: with one line that says what to change.
    """
    started_s = time.monotonic()
    effort, reporter = effort or Effort(), reporter or Silent()
    reporter.stage("opening the run")
    scene = Scene.of(folder, site)
    study, plan = scene.study, scene.plan
    if effort.shadows and study.withholds_evaluation:
        raise StudyError(
            "Expected --shadows 0, as the study withholds its held-out patients, who are half of what shadows are "
            f"trained on; got {effort.shadows}."
        )

    bounds = lower_bounds(scene, effort, reporter)
    reporter.stage("membership inference")
    released = _released(scene)
    inferred = () if study.withholds_evaluation else _membership(scene, released)
    shadows = _shadows(scene, released(scene.site), effort.shadows, reporter) if effort.shadows else None
    reporter.stage("inverting a gradient")
    demonstrated = Demonstration.of(plan)
    original_HW, inverted = invert(
        displayable(scene.cohort.train[0].image_CHW, scene.model.pixels),
        clip_norm=demonstrated.clip_norm,
        noise_multiplier=demonstrated.noise_multiplier,
        stream=RandomStream.from_system(),
        seed=study.seed,
    )
    pictures = _adapter_inversion(scene, released(scene.site), effort, demonstrated, reporter)

    is_private = plan is not None and plan.is_private
    result = AuditResult(
        study=study.name,
        study_digest=study.digest,
        site=scene.site.name,
        unit=None if plan is None else plan.unit,
        trust=None if plan is None else plan.trust,
        claimed=plan.epsilon.value if plan is not None and is_private else None,
        delta=plan.delta if plan is not None and is_private else None,
        noise_multiplier=plan.noise_multiplier if plan is not None and is_private else None,
        steps=None if plan is None else plan.total_steps,
        confidence=CONFIDENCE,
        bounds=bounds,
        membership=inferred,
        shadows=shadows,
        inversion=tuple(one.result for one in inverted),
        adapter_inversion=None if pictures is None else pictures.result,
        notes=notes(
            study,
            plan,
            demonstrated,
            nothing_claimed=any(bound.claimed is None for bound in bounds),
            shadows=shadows,
            searched=None if pictures is None else pictures.result,
        ),
        wall_s=round(time.monotonic() - started_s, 1),
    )
    figures = folder / "figures"
    write_durably(figures / "audit-bounds.svg", draw_bounds(result).encode())
    write_durably(figures / "audit-inversion.svg", draw_inversion(original_HW, inverted).encode())
    (figures / "audit-adapter-inversion.svg").unlink(missing_ok=True)  # of an earlier audit, perhaps
    if pictures is not None:
        write_durably(figures / "audit-adapter-inversion.svg", draw_adapter_inversion(pictures).encode())
    write_durably(folder / AUDIT, result.model_dump_json(indent=2).encode())
    return result


def lower_bounds(scene: Scene, effort: Effort, reporter: Reporter) -> tuple[AuditBound, ...]:
    """The lower bounds of all attacks; together they hold with :data:`CONFIDENCE`."""
    bounds: tuple[AuditBound, ...] = ()
    if scene.plan is not None:
        bounds = game_bounds(scene, scene.plan, effort, reporter)
        bounds += (_gradients(scene, scene.plan, effort, reporter),)
    return (*bounds, _bound(_images(scene, effort, reporter)))


def game_bounds(scene: Scene, plan: PrivacyPlan, effort: Effort, reporter: Reporter) -> tuple[AuditBound, ...]:
    """The lower bounds of many short runs."""
    training, engine = _training(scene, plan)
    reporter.start("many short runs", effort.runs)
    scores = play(
        training,
        engine,
        like=scene.cohort.train[0],
        num_runs=effort.runs,
        streams=scene.streams,
        guessed=scene.guessed,
        coins=RandomStream.from_system(),
        done=reporter.step,
    )
    reporter.stage("bounds")
    return tuple(_bound(finding) for finding in game_findings(scores, plan, confidence=_each()))


def _gradients(scene: Scene, plan: PrivacyPlan, effort: Effort, reporter: Reporter) -> AuditBound:
    training, engine = _training(scene, plan)
    reporter.start("one run with canaries in its gradients", plan.num_rounds)
    once = run_once(
        training,
        engine,
        patients=units_of(scene.cohort.train, plan.unit),
        features=scene.site.features,
        num_canaries=min(_GRADIENT_CANARIES * effort.canaries, scene.trainable.manifest.num_elements),
        streams=scene.streams,
        coins=RandomStream.from_system(),
        done=reporter.step,
    )
    return _bound(one_run_finding("one-run-gradients", once.scores_M, once.included_M, plan, confidence=_each()))


def _training(scene: Scene, plan: PrivacyPlan) -> tuple[SiteTraining, Engine]:
    declared = scene.study.declared_units(scene.site.name)
    assert declared is not None
    task, initial_P = task_of(scene.study.task), scene.model.initial_P
    training = SiteTraining(
        scene.model, task, plan, scene.study.training, scene.trainable, initial_P, declared_units=declared
    )
    return training, engine_for(scene.study, scene.model, scene.trainable, scene.site)


def _images(scene: Scene, effort: Effort, reporter: Reporter) -> Finding:
    """The black-box attack on mislabelled images."""
    training = _alone(scene)
    coins = RandomStream.from_system()
    reporter.start("one run with mislabelled images", scene.study.rounds.num_rounds)
    scores = score_images(
        training,
        patients=units_of(scene.cohort.train, "patient" if training.plan is None else training.plan.unit),
        canaries=mislabelled(scene.cohort.items, effort.canaries, coins),
        streams=scene.streams,
        coins=coins,
        done=reporter.step,
    )
    return one_run_finding("one-run-images", scores.scores_M, scores.included_M, scene.plan, confidence=_each())


def _alone(scene: Scene) -> Training:
    """The site's training with nobody to average with. A site that shares its noise then adds all of it."""
    alone = None if scene.plan is None else scene.plan.alone
    return Training(
        scene.study,
        scene.model,
        task_of(scene.study.task),
        alone,
        None if alone is None else engine_for(scene.study, scene.model, scene.trainable, scene.site),
        scene.trainable,
        scene.site.features,
        scene.site.name,
        None if alone is None else scene.study.declared_units(scene.site.name),
    )


def _released(scene: Scene) -> Callable[[Site], ModelState]:
    """What the run ended with at each site.

    Raises:
        CheckpointError: if the run has not ended.
    """
    study, strategy = scene.study, strategy_of(scene.study)
    final = read_checkpoint(scene.folder, study.resolved_manifest, study_digest=study.digest, scope=FEDERATED)
    if final is None:
        raise CheckpointError(f"Expected a finished run at {scene.folder}, got no checkpoint; resume the run.")
    shared = shared_state(strategy, final.adapter_P, final.broadcast)
    return lambda site: own_state(shared, strategy, final.round, study, FEDERATED, site)


def _membership(scene: Scene, released: Callable[[Site], ModelState]) -> tuple[Membership, ...]:
    study, model = scene.study, scene.model
    task, before = task_of(study.task), ModelState(model.initial_P)
    scores: dict[str, list[list[float]]] = {"loss": [[], []], "calibrated": [[], []]}
    for site in scene.sites:
        after, cohort = released(site), site.cohort(study, model.pixels)
        for split, items in enumerate((cohort.train, cohort.test)):
            at_start, at_end = (
                losses_by_patient(model, task, items, state=state, features=site.features) for state in (before, after)
            )
            scores["loss"][split] += [-loss for loss in at_end.values()]
            scores["calibrated"][split] += [at_start[patient] - loss for patient, loss in at_end.items()]
    generator = np.random.default_rng(study.seed)
    return tuple(
        membership(attack, np.array(members), np.array(others), generator=generator)
        for attack, (members, others) in scores.items()
    )


def site_shadows(scene: Scene, num_shadows: int, reporter: Reporter) -> tuple[Training, Population, Shadows]:
    """Shadows of the site alone. Made-up cohorts are filled up with as many non-members as there are members."""
    members = {item.patient_id for item in scene.cohort.train}
    held_out = {item.patient_id for item in scene.cohort.test}
    count = max(0, len(members) - len(held_out)) if scene.is_made_up else 0
    reporter.start("making virtual patients", num_made(scene, count))
    made = newcomers(scene, count, done=reporter.step)
    training, population = _alone(scene), Population(scene.cohort.train, (*scene.cohort.test, *made), count)
    reporter.start("shadow adapters", num_shadows * scene.study.rounds.num_rounds)
    shadows = train_shadows(
        training, population, num_shadows=num_shadows, coins=RandomStream.from_system(), done=reporter.step
    )
    return training, population, shadows


def _shadows(scene: Scene, released: ModelState, num_shadows: int, reporter: Reporter) -> ShadowAttack:
    training, population, shadows = site_shadows(scene, num_shadows, reporter)
    return shadow_attack(
        shadows,
        population,
        released_N=scores_of(training, population.items, released),
        generator=np.random.default_rng(scene.study.seed),
    )


def _adapter_inversion(
    scene: Scene, released: ModelState, effort: Effort, shown: Demonstration, reporter: Reporter
) -> Pictures | None:
    if not effort.inversion_steps:
        return None
    victim = Victim(scene.model, task_of(scene.study.task), scene.trainable, released)
    reporter.start("searching an image behind an update", NUM_SEARCHES * effort.inversion_steps)
    return invert_adapter(
        victim,
        scene.cohort.train,
        shown=shown,
        steps=effort.inversion_steps,
        stream=RandomStream.from_system(),
        seed=scene.study.seed,
        done=reporter.step,
    )


def _each() -> float:
    return 1 - (1 - CONFIDENCE) / _NUM_ATTACKS


def _bound(finding: Finding) -> AuditBound:
    return AuditBound.model_validate(
        {
            "attack": finding.attack,
            "epsilon": finding.epsilon,
            "claimed": finding.claimed if math.isfinite(finding.claimed) else None,
            "delta": finding.delta,
            "confidence": finding.confidence,
            "num_trials": finding.num_trials,
            "num_guessed": finding.num_guessed,
            "num_correct": finding.num_correct,
        }
    )
