"""A simulation from study file to report: virtual hospitals, the real apps, every arm.

The steps, in the order in which they happen and fail: the study is read and resolved against the real
backbone; cohorts are made or found, read and checked; the arms run; results, adapter and report are written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from client.data import refuse_shared_patients
from client.manifest import read_manifest
from client.policy import Budget, SitePolicy
from client.round_start import own_state
from client.site import SITES_VARIABLE, LaterData, Site, VirtualSite, VirtualSites, forget_sites, site_of_partition
from medfed.device import DeviceChoice, choose_device
from medfed.errors import CheckpointError, StudyError
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.models.adapted import resolve as resolve_study
from medfed.models.folding import ModelState
from medfed.shift_profile import ShiftProfile
from medfed.signing import create_key
from medfed.study import FEDERATED, POOLED_SITE, StudyConfig, read_study
from medfed.tasks import task_of
from privacy.accounting import epsilon_spent
from privacy.plan import PrivacyPlan, calibrated
from server.checkpoint import read_checkpoint, write_durably
from server.evaluation import EvaluatedColumn
from server.few_shot import FewShot
from server.new_run import new_run_folder
from server.report import write_report
from server.results import Results
from simulation.arms import Arm, arms_of, few_shot_scope, without
from simulation.cohort import STATEMENT, CohortRecipe, SiteRecipe, drifted, write_cohort
from simulation.evaluation import evaluate_run
from simulation.few_shot import refuse_shots, refuse_too_many
from simulation.identities import store_identities, with_identities
from simulation.inspection import SiteState, inspect_sites
from simulation.overlays import draw_overlays
from simulation.privacy_summary import simulated_privacy
from simulation.progress import Reporter, Silent
from simulation.run_arms import Engine, run_arms, worker_count
from simulation.run_folder import (
    RunOptions,
    cache_folder,
    config_folder,
    metrics_of,
    store_options,
    store_study,
    stored_options,
    stored_study,
)
from simulation.shift.availability import attendance
from simulation.shift.study_shift import prevalence, shifts_of
from simulation.site_scores import StateOf
from simulation.summary import compare
from simulation.untrained import untrained_outlines
from strategies.registry import check_name, strategy_of
from strategies.shared_model import shared_state

OWN_DATA = "Images of the user's own manifests."


@dataclass(frozen=True)
class Run:
    """A finished simulation.

    Attributes:
        folder: the run folder.
        summary: its result.
        few_shot: scores by the number of training patients of each site; None where that was not asked for.
    """

    folder: Path
    summary: Results
    few_shot: FewShot | None = None


def simulate(
    study: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    out: str | Path = "runs",
    engine: Engine | None = None,
    workers: int | None = None,
    device: DeviceChoice | None = None,
    baselines: bool | None = None,
    leave_one_out: bool | None = None,
    few_shot: Sequence[int] | None = None,
    reporter: Reporter | None = None,
) -> Run:
    """Run a federated study on virtual hospitals in this machine.

    Args:
        study: study file; or give ``resume``.
        resume: run folder of a run that was stopped; its arms go on from their last checkpoints.
        out: where run folders are made.
        engine: ``in-process`` (the default), or ``ray`` for the federated arm on Flower's Ray simulation engine.
        workers: processes that train sites; None means one per core, 0 means this process. The result does
            not depend on it. On a GPU there is always one.
        device: ``auto`` (the default), ``cpu``, ``cuda`` or ``mps``.
        baselines: whether the local-only and pooled arms run as well; by default they do.
        leave_one_out: whether a federation without each site runs too, and is tried on that site; by default not.
        few_shot: numbers of training patients of each site with which the arms run once more; by default none.
        reporter: is told of progress.

    A resumed run has the engine, device and arms that it was started with, and refuses others, or other data.

    Raises:
        MedfedError: with one line that says what to change.
    """
    if (study is None) == (resume is None):
        raise StudyError("Expected a study file or a run folder to resume, not both; give one of them.")
    started_s = time.monotonic()
    reporter = reporter or Silent()
    asked = {
        "engine": engine,
        "device": device,
        "baselines": baselines,
        "leave_one_out": leave_one_out,
        "few_shot": None if few_shot is None else tuple(sorted(set(few_shot))),
    }
    options = _options(asked, None if resume is None else stored_options(Path(resume)))
    chosen = choose_device(options.device)
    _quieten_libraries()

    reporter.stage("loading backbone")
    if resume is not None:
        folder = Path(resume).resolve()
        resolved = stored_study(folder)
    else:
        config = read_study(Path(str(study)))
        check_name(config.strategy)
        resolved, identities = with_identities(calibrated(resolve_study(config, chosen)))
    refuse_shots(resolved, options.few_shot)
    model = adapted_model(resolved, chosen)
    strategy_of(resolved)  # what does not go together is refused before anything is made

    shifts = shifts_of(resolved)
    missing = attendance(resolved, shifts)
    if missing and options.engine == "ray":
        raise StudyError("Expected engine in-process for a study with shift.availability, got ray; change the engine.")
    manifests, provenance = cohort_manifests(resolved, reporter)
    if options.few_shot:
        refuse_too_many(options.few_shot, _training_patients(resolved, manifests))
    if resume is None:
        folder = new_run_folder(Path(out), resolved.name)
        store_study(folder, resolved)
        store_identities(folder / "identities", identities)
    reporter.folder(folder)
    sites = _open_sites(folder, resolved, manifests, shifts, options)
    reporter.stage("reading cohorts")
    stages = sorted({0, *(shift.drift.from_round for shift in shifts.values() if shift.drift)}, reverse=True)
    digests: dict[str, str] = {}
    for stage in stages:  # the first last: it is what the round loop begins with
        for site in sites:
            site.turn_to(stage)
        cohorts = {site.name: site.cohort(resolved, model.pixels) for site in sites}
        refuse_shared_patients({name: cohort for name, cohort in cohorts.items() if name != POOLED_SITE})
        suffix = f":{stage}" if stage else ""
        digests |= {f"{name}{suffix}": cohort.digest for name, cohort in cohorts.items()}
    if changed := [name for name, digest in options.cohorts.items() if digests.get(name) != digest]:
        raise CheckpointError(
            f"Expected the data that the run was started on, got other data at {changed[0]!r}; "
            "restore it, or start a new run."
        )
    store_options(folder, options.model_copy(update={"cohorts": digests}))

    arms = arms_of(resolved, baselines=options.baselines, leave_one_out=options.leave_one_out, shots=options.few_shot)
    num_workers = worker_count(workers, chosen.type, len(sites))
    run_arms(
        arms,
        resolved,
        folder,
        cohorts,
        num_workers=num_workers,
        engine=options.engine,
        reporter=reporter,
        missing=missing,
    )

    reporter.stage("writing report")
    for site in sites:
        site.turn_to(resolved.rounds.num_rounds)
    return _write_results(folder, resolved, arms, sites, model, provenance, started_s, num_workers, options.few_shot)


def _options(asked: Mapping[str, Any], stored: RunOptions | None) -> RunOptions:
    """How to run: as asked, or as the run was started."""
    given = {name: value for name, value in asked.items() if value is not None}
    if stored is None:
        return RunOptions.model_validate({"engine": "in-process", "device": "auto", "baselines": True, **given})
    for name, value in given.items():
        if value != getattr(stored, name):
            raise CheckpointError(
                f"Expected {name} = {getattr(stored, name)}, with which the run was started, got {value}; "
                "leave the option out, or start a new run."
            )
    return stored


def cohort_manifests(study: StudyConfig, reporter: Reporter) -> tuple[dict[str, Path], str]:
    """Manifest of every site, and where the images come from; makes a simulated cohort if needed."""
    if study.is_for_hospitals:
        raise StudyError(
            f"Expected a study with data to simulate, got {study.name!r}, which names none and is for real hospitals; "
            "add a [cohort], or 'data' to each site."
        )
    if study.cohort is None:
        found = {site.name: site.data for site in study.sites if site.data is not None}
        return found, OWN_DATA
    recipe = recipe_of(study)
    reporter.start("making virtual patients", recipe.num_patients)
    manifests = write_cohort(
        recipe, cache_folder() / "cohorts" / recipe.digest[:32], progress=lambda _done: reporter.step()
    )
    return manifests, STATEMENT


def _training_patients(study: StudyConfig, manifests: Mapping[str, Path]) -> dict[str, int]:
    """Site -> patients that it trains on."""
    return {
        site: len({row.patient_id for row in read_manifest(manifest, study.task) if row.split == "train"})
        for site, manifest in manifests.items()
    }


def recipe_of(study: StudyConfig) -> CohortRecipe:
    """The recipe of a simulated study's cohort."""
    assert study.cohort is not None
    shifts = shifts_of(study)
    try:
        return CohortRecipe(
            kind=study.cohort.kind,
            seed=study.seed,
            structures=study.task.classes if study.task.kind == "segmentation" else (),
            images_per_patient=study.cohort.images_per_patient,
            sites=tuple(
                SiteRecipe(
                    name=site.name,
                    scanner=site.scanner or "",
                    train_patients=site.train_patients or 0,
                    test_patients=site.test_patients or 0,
                    lesion_prevalence=prevalence(study, site.name, shifts.get(site.name)),
                    shift=shifts.get(site.name),
                )
                for site in study.sites
            ),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StudyError(f"sites: {str(first['msg']).removeprefix('Value error, ')}") from None


def _virtual(
    study: StudyConfig, manifests: Mapping[str, Path], shifts: Mapping[str, ShiftProfile]
) -> list[VirtualSite]:
    """The virtual sites and, if there are several, the pooled one; with what they hold once scanners are replaced."""
    drifts = {name: shift.drift.from_round for name, shift in shifts.items() if shift.drift}

    def held(names: tuple[str, ...], round_number: int) -> tuple[Path, ...]:
        return tuple(
            drifted(manifests[name]) if round_number >= drifts.get(name, round_number + 1) else manifests[name]
            for name in names
        )

    def site(name: str, names: tuple[str, ...]) -> VirtualSite:
        rounds = sorted({drifts[one] for one in names if one in drifts})
        later = tuple(LaterData(from_round=number, manifests=held(names, number)) for number in rounds)
        return VirtualSite(name=name, manifests=held(names, 0), later=later)

    virtual = [site(name, (name,)) for name in study.site_names]
    return [*virtual, site(POOLED_SITE, study.site_names)] if len(virtual) > 1 else virtual


def _open_sites(
    folder: Path,
    study: StudyConfig,
    manifests: Mapping[str, Path],
    shifts: Mapping[str, ShiftProfile],
    options: RunOptions,
) -> list[Site]:
    """Describe the virtual sites in the run folder, and open them in this process."""
    virtual = _virtual(study, manifests, shifts)
    arms = arms_of(study, baselines=True, leave_one_out=True, shots=options.few_shot)
    described = VirtualSites.model_validate(
        {
            "device": options.device,
            "feature_cache": cache_folder() / "features",
            "feature_key": config_folder() / "feature-cache.key",
            "policy": _policy(study),
            "cohorts": {arm.scope: arm.scope for arm in arms},
            "ledgers": folder / "ledgers",
            "ledger_key": _ledger_key(folder / "ledgers" / "ledger.key"),
            "identities": folder / "identities",
            "journals": folder / "journals",
            "memories": folder / "memories",
            # Draws may be repeated where the patients are made up, and nowhere else.
            "noise_seed": None if study.cohort is None else study.seed,
            "few_patients": {arm.scope: arm.patients for arm in arms if arm.patients is not None},
            "few_patients_seed": study.seed,
            "sites": tuple(virtual),
        }
    )
    path = folder / "sites.json"
    write_durably(path, described.model_dump_json(indent=2).encode())
    os.environ[SITES_VARIABLE] = str(path)
    forget_sites()
    return [site_of_partition(index) for index in range(len(virtual))]


def _policy(study: StudyConfig) -> SitePolicy:
    """What a virtual hospital allows: this study as it is, and every round once more if it is interrupted.

    An interrupted round is spent, and the report says so; a cap of one study alone would end the run there.
    """
    plan = None if study.privacy is None else PrivacyPlan.of_study(study)
    budget = None
    if plan is not None and plan.is_private:
        twice = [plan.mechanism(study.rounds.num_rounds), *plan.evaluations] * 2
        budget = Budget(epsilon=epsilon_spent(twice, plan.delta).value, delta=plan.delta, unit=plan.unit)
    return SitePolicy(approved_studies=(study.digest,), minimum_patients=1, allow_unprotected=True, budget=budget)


def _ledger_key(path: Path) -> Path:
    if not path.exists():
        create_key(path)
    return path


def _write_results(
    folder: Path,
    study: StudyConfig,
    arms: list[Arm],
    sites: list[Site],
    model: AdaptedModel,
    provenance: str,
    started_s: float,
    num_workers: int,
    shots: tuple[int, ...],
) -> Run:
    final = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert final is not None
    strategy = strategy_of(study)
    shared = shared_state(strategy, final.adapter_P, final.broadcast)

    def state_of(site: Site) -> ModelState:
        return own_state(shared, strategy, final.round, study, FEDERATED, site)

    model.save(folder / "adapter", shared)
    if strategy.remembers_at_sites:
        for site in sites:
            if site.name in study.site_names:
                model.save(folder / "adapters" / site.name, state_of(site))
    if study.shows_held_out:  # pictures show held-out patients
        draw_overlays(folder / "figures", study, sites, model, state_of)
    states = _states_of_arms(folder, study, arms, model, state_of)
    recipe = None if study.cohort is None else recipe_of(study)
    measurements = evaluate_run(
        folder,
        study,
        sites,
        model,
        states,
        untrained=untrained_outlines(study, recipe, cache_folder() / "untrained"),
        shots=shots,
        num_workers=num_workers,
    )
    task = task_of(study.task)
    metrics = {arm.scope: metrics_of(arm.folder(folder)) for arm in arms}
    if study.sums_securely:
        metrics["federated"] = inspect_sites(folder, study, sites, model, state_of)
    table, mean, worst = compare(study, metrics, task.primary)
    summary = Results(
        run_dir=str(folder),
        study=study.name,
        rounds=final.round,
        wall_s=round(time.monotonic() - started_s, 1),
        primary=task.primary,
        sites=table,
        mean=mean,
        worst_site=worst,
        privacy=simulated_privacy(study, sites),
        cohort=provenance,
    )
    write_durably(folder / "summary.json", summary.model_dump_json(indent=2).encode())
    write_report(folder)
    return Run(folder, summary, None if measurements is None else measurements.few_shot)


def _states_of_arms(
    folder: Path, study: StudyConfig, arms: list[Arm], model: AdaptedModel, federated: SiteState
) -> StateOf:
    """The model of every arm at every site after the arm's last round; of the ``left_out`` site too, if it ran."""
    by_scope = {arm.scope: arm for arm in arms}
    shared: dict[str, ModelState] = {}

    def state_of(column: EvaluatedColumn, site: Site, patients: int | None = None) -> ModelState | None:
        if column == "zero_shot":
            return ModelState(model.initial_P)
        if column == "federated" and patients is None:
            return federated(site)
        scope = {
            "federated": FEDERATED,
            "local_only": f"local-{site.name}",
            "pooled": "pooled",
            "left_out": without(site.name),
        }[column]
        if patients is not None:
            scope = few_shot_scope(scope, patients)
        if scope not in by_scope:
            return None
        strategy = strategy_of(study, scope)
        if scope not in shared:
            place = by_scope[scope].folder(folder)
            final = read_checkpoint(place, study.resolved_manifest, study_digest=study.digest, scope=scope)
            assert final is not None
            shared[scope] = shared_state(strategy, final.adapter_P, final.broadcast)
        return own_state(shared[scope], strategy, study.rounds.num_rounds, study, scope, site)

    return state_of


def _quieten_libraries() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
