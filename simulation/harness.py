"""A simulation from study file to report: virtual hospitals, the real apps, every arm.

The steps, in the order in which they happen and fail: the study is read and resolved against the real
backbone; cohorts are made or found, read and checked; the arms run; results, adapter and report are written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from client.data import refuse_shared_patients
from client.site import SITES_VARIABLE, Site, VirtualSite, VirtualSites, site_of_partition
from medfed.device import choose_device
from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.models.adapted import resolve as resolve_study
from medfed.study import POOLED_SITE, StudyConfig, read_study
from medfed.tasks import task_of
from server.checkpoint import read_checkpoint, write_durably
from server.report import write_report
from simulation.arms import Arm, arms_of
from simulation.cohort import STATEMENT, CohortRecipe, SiteRecipe, write_cohort
from simulation.overlays import draw_overlays
from simulation.progress import Reporter, Silent
from simulation.run_folder import (
    cache_folder,
    config_folder,
    metrics_of,
    new_run_folder,
    store_study,
    stored_study,
)
from simulation.summary import NO_PRIVACY, Summary, compare
from strategies.registry import strategy_of

Engine = Literal["in-process", "ray"]

OWN_DATA = "Images of the user's own manifests."


@dataclass(frozen=True)
class Run:
    """A finished simulation.

    Attributes:
        folder: the run folder.
        summary: its result.
    """

    folder: Path
    summary: Summary


def simulate(
    study: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    out: str | Path = "runs",
    engine: Engine = "in-process",
    workers: int | None = None,
    device: str = "auto",
    baselines: bool = True,
    reporter: Reporter | None = None,
) -> Run:
    """Run a federated study on virtual hospitals in this machine.

    Args:
        study: study file; or give ``resume``.
        resume: run folder of a run that was stopped; its arms go on from their last checkpoints.
        out: where run folders are made.
        engine: ``in-process``, or ``ray`` for the federated arm on Flower's Ray simulation engine.
        workers: processes that train sites; None means one per core, 0 means this process. The result does
            not depend on it. On a GPU there is always one.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        baselines: whether the local-only and pooled arms run as well.
        reporter: is told of progress.

    Raises:
        MedfedError: with one line that says what to change.
    """
    if (study is None) == (resume is None):
        raise StudyError("Expected a study file or a run folder to resume, not both; give one of them.")
    started_s = time.monotonic()
    reporter = reporter or Silent()
    chosen = choose_device(device)
    _quieten_libraries()

    reporter.stage("loading backbone")
    if resume is not None:
        folder = Path(resume).resolve()
        resolved = stored_study(folder)
        model = adapted_model(resolved, chosen)
    else:
        config = read_study(Path(str(study)))
        strategy_of(config.strategy)
        resolved = resolve_study(config, chosen)
        model = adapted_model(resolved, chosen)

    manifests, provenance = _manifests(resolved, reporter)
    if resume is None:
        folder = new_run_folder(Path(out), resolved.name)
        store_study(folder, resolved)
    reporter.folder(folder)
    sites = _open_sites(folder, resolved, manifests, device)
    reporter.stage("reading cohorts")
    cohorts = {site.name: site.cohort(resolved, model.pixels) for site in sites}
    refuse_shared_patients({name: cohort for name, cohort in cohorts.items() if name != POOLED_SITE})

    arms = arms_of(resolved, baselines=baselines)
    num_workers = _num_workers(workers, chosen.type, len(sites))
    _run_arms(arms, resolved, folder, sites, model, num_workers, engine, reporter)

    reporter.stage("writing report")
    summary = _write_results(folder, resolved, arms, sites, model, provenance, started_s)
    return Run(folder, summary)


def _manifests(study: StudyConfig, reporter: Reporter) -> tuple[dict[str, Path], str]:
    """Manifest of every site, and where the images come from; makes a simulated cohort if needed."""
    if study.cohort is None:
        found = {site.name: site.data for site in study.sites if site.data is not None}
        return found, OWN_DATA
    recipe = _recipe(study)
    num_patients = sum(site.train_patients + site.test_patients for site in recipe.sites)
    reporter.start("making virtual patients", num_patients)
    manifests = write_cohort(
        recipe, cache_folder() / "cohorts" / recipe.digest[:32], progress=lambda _done: reporter.step()
    )
    return manifests, STATEMENT


def _recipe(study: StudyConfig) -> CohortRecipe:
    """The recipe of a simulated study's cohort."""
    assert study.cohort is not None
    try:
        return CohortRecipe(
            kind=study.cohort.kind,
            seed=study.seed,
            structures=study.task.classes if study.task.kind == "segmentation" else (),
            images_per_patient=study.cohort.images_per_patient,
            sites=tuple(
                SiteRecipe(**site.model_dump(exclude={"data"}, exclude_none=True)) for site in study.sites
            ),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StudyError(f"sites: {str(first['msg']).removeprefix('Value error, ')}") from None


def _open_sites(folder: Path, study: StudyConfig, manifests: Mapping[str, Path], device: str) -> list[Site]:
    """Describe the virtual sites in the run folder, and open them in this process."""
    virtual = [VirtualSite(name=name, manifests=(manifests[name],)) for name in study.site_names]
    if len(virtual) > 1:
        virtual.append(VirtualSite(name=POOLED_SITE, manifests=tuple(manifests[n] for n in study.site_names)))
    described = VirtualSites.model_validate(
        {
            "device": device,
            "feature_cache": cache_folder() / "features",
            "feature_key": config_folder() / "feature-cache.key",
            "sites": tuple(virtual),
        }
    )
    path = folder / "sites.json"
    write_durably(path, described.model_dump_json(indent=2).encode())
    os.environ[SITES_VARIABLE] = str(path)
    return [site_of_partition(index) for index in range(len(virtual))]


def _num_workers(asked: int | None, device_type: str, num_sites: int) -> int:
    """Worker processes: one per core on a CPU unless told otherwise; none on a GPU, which has one queue."""
    if device_type != "cpu":
        return 0
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, num_sites) if cores > 1 else 0


def _run_arms(
    arms: list[Arm],
    study: StudyConfig,
    folder: Path,
    sites: list[Site],
    model: AdaptedModel,
    num_workers: int,
    engine: Engine,
    reporter: Reporter,
) -> None:
    """Run every arm; with workers they run side by side and share them."""
    from flwr.app import Context, Message, RecordDict

    from client.app import app as client_app
    from medfed.messages import RECORD_KEY, RoundReply
    from server.app import app as server_app
    from simulation.grid import InProcessGrid

    def count(reply: Message) -> None:
        if not reply.has_error():
            header = RoundReply.parse({"header": str(reply.content[RECORD_KEY]["header"])})
            reporter.step(header.num_examples)

    def run(arm: Arm) -> None:
        config = arm.run_config(study, folder)
        if engine == "ray" and arm.scope == "federated":
            from simulation.ray_engine import run_on_ray

            run_on_ray(
                server_app,
                client_app,
                num_nodes=len(study.sites),
                run_config=config,
                num_workers=max(1, num_workers),
            )
            return
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
        server_app(grid=grid, context=context)

    _warm_up_optimizers()
    reporter.start("encoding and training", _images_to_go(arms, study, folder, sites, model))
    node_configs: list[dict[str, bool | float | int | str]] = [{} for _ in sites]
    with InProcessGrid(
        client_app, node_configs=node_configs, run_config={}, workers=num_workers, on_reply=count
    ) as grid:
        if num_workers == 0:
            for arm in arms:
                run(arm)
            return
        grid.start()
        with ThreadPoolExecutor(max_workers=len(arms)) as threads:
            for outcome in [threads.submit(run, arm) for arm in arms]:
                outcome.result()


def _images_to_go(
    arms: list[Arm], study: StudyConfig, folder: Path, sites: list[Site], model: AdaptedModel
) -> int:
    """Images that the arms will still report, for the progress bar."""
    cohorts = {site.name: site.cohort(study, model.pixels) for site in sites}
    every = study.rounds.evaluate_every
    total = 0
    for arm in arms:
        state = read_checkpoint(
            arm.folder(folder), study.resolved_manifest, study_digest=study.digest, scope=arm.scope
        )
        first = state.round if state else 0
        rounds = range(first + 1, study.rounds.num_rounds + 1)
        evaluations = sum(1 for r in rounds if r == study.rounds.num_rounds or (every and r % every == 0))
        evaluations += 1 if state is None and arm.evaluate_initial else 0
        total += sum(len(cohort.train) for cohort in cohorts.values())  # describe
        total += len(rounds) * sum(len(cohorts[name].train) for name in arm.train_sites)
        total += evaluations * sum(len(cohorts[name].test) for name in arm.evaluate_sites)
    return total


def _write_results(
    folder: Path,
    study: StudyConfig,
    arms: list[Arm],
    sites: list[Site],
    model: AdaptedModel,
    provenance: str,
    started_s: float,
) -> Summary:
    final = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert final is not None
    model.save(folder / "adapter", final.adapter_P)
    draw_overlays(folder / "figures", study, sites, model, final.adapter_P)
    task = task_of(study.task)
    table, mean, worst = compare(
        study, {arm.scope: metrics_of(arm.folder(folder)) for arm in arms}, task.primary
    )
    summary = Summary(
        run_dir=str(folder),
        study=study.name,
        rounds=final.round,
        wall_s=round(time.monotonic() - started_s, 1),
        primary=task.primary,
        sites=table,
        mean=mean,
        worst_site=worst,
        privacy=NO_PRIVACY,
        cohort=provenance,
    )
    write_durably(folder / "summary.json", summary.model_dump_json(indent=2).encode())
    write_report(folder)
    return summary


def _warm_up_optimizers() -> None:
    """Import what the first optimiser step imports, once, before processes are forked."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


def _quieten_libraries() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)

