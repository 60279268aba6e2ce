"""Runs the arms of a simulation on an engine: in this process and its workers, or on Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from client.app import app as client_app
from client.data import Cohort
from client.few_patients import FewPatients, training_on
from medfed.messages import RECORD_KEY, RoundReply
from medfed.study import POOLED_SITE, StudyConfig, is_of_all_sites
from server.app import app as server_app
from server.checkpoint import read_checkpoint
from simulation.arms import Arm
from simulation.grid import FIRST_NODE_ID, InProcessGrid
from simulation.progress import Reporter
from simulation.shift.availability import Attendance
from simulation.shift.unreliable_grid import UnreliableGrid

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

Engine = Literal["in-process", "ray"]


def worker_count(asked: int | None, device_type: str, num_sites: int) -> int:
    """Worker processes: one per core on a CPU unless told otherwise; none on a GPU, which has one queue."""
    if device_type != "cpu":
        return 0
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, num_sites) if cores > 1 else 0


def run_arms(
    arms: list[Arm],
    study: StudyConfig,
    folder: Path,
    cohorts: Mapping[str, Cohort],
    *,
    num_workers: int,
    engine: Engine,
    reporter: Reporter,
    missing: Attendance = MappingProxyType({}),
) -> None:
    """Run every arm to its end, from its checkpoint if it has one.

    With workers the arms run side by side and share them; without, one after the other, as they share one
    model. On Ray only the federated arm runs; the others are the same code in the same place either way.

    Args:
        arms: what to run, longest first.
        study: resolved.
        folder: the run folder.
        cohorts: by site in partition order; read already, so that forked workers share them.
        num_workers: 0 for this process.
        engine: where the federated arm runs.
        reporter: is told of every image a site reports.
        missing: who is missing from which round of the federated arm, and of its repetitions; not on Ray.

    Raises:
        RoundError: of the first arm that fails; the others are stopped after their running messages, and
            all can be resumed.
    """
    reporter.start("encoding and training", _images_to_go(arms, study, folder, cohorts, missing))
    _warm_up_optimizers()
    here = [arm for arm in arms if engine == "in-process" or arm.scope != "federated"]
    _run_in_process(here, study, folder, tuple(cohorts), num_workers, reporter, missing)
    for arm in (arm for arm in arms if arm not in here):
        from simulation.ray_engine import run_on_ray

        reporter.stage(f"{arm.scope} on Ray")
        config = arm.run_config(study, folder)
        run_on_ray(
            server_app,
            client_app,
            num_nodes=len(study.sites),
            run_config=config,
            num_workers=max(1, num_workers),
        )


def _run_in_process(
    arms: list[Arm],
    study: StudyConfig,
    folder: Path,
    site_names: tuple[str, ...],
    num_workers: int,
    reporter: Reporter,
    missing: Attendance,
) -> None:
    def count(reply: Message) -> None:
        if not reply.has_error():
            header = RoundReply.parse({"header": str(reply.content[RECORD_KEY]["header"])})
            reporter.step(header.num_examples)

    def run(arm: Arm) -> None:
        config = arm.run_config(study, folder)
        server_app(
            grid=_seen_by(arm),
            context=Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config),
        )

    def _seen_by(arm: Arm) -> Grid:
        if not missing or not is_of_all_sites(arm.scope):
            return grid
        return UnreliableGrid(grid, site_of=dict(enumerate(site_names, start=FIRST_NODE_ID)), missing=missing)

    with InProcessGrid(
        client_app, node_configs=[{}] * len(site_names), run_config={}, workers=num_workers, on_reply=count
    ) as grid:
        grid.start()
        if num_workers == 0:
            for arm in arms:
                run(arm)
            return
        with ThreadPoolExecutor(max_workers=max(1, len(arms))) as threads:
            running = [threads.submit(run, arm) for arm in arms]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
                for outcome in done:
                    outcome.result()
            except BaseException:  # the user's Ctrl-C included: end the other arms, then let it through
                grid.close()
                raise


def _images_to_go(
    arms: list[Arm], study: StudyConfig, folder: Path, cohorts: Mapping[str, Cohort], missing: Attendance
) -> int:
    """Images that sites will still report, for the progress bar."""
    every = study.rounds.evaluate_every
    total = 0
    for arm in arms:
        state = read_checkpoint(arm.folder(folder), study.resolved_manifest, study_digest=study.digest, scope=arm.scope)
        first = state.round if state else 0
        rounds = range(first + 1, study.rounds.num_rounds + 1)
        evaluations = sum(1 for r in rounds if r == study.rounds.num_rounds or (every and r % every == 0))
        evaluations += 1 if state is None and arm.evaluate_initial else 0
        if study.withholds_evaluation:
            evaluations = 0
        weights = {
            name: study.declared_units(name) or len(_trained_on(arm, cohort, study).train)
            for name, cohort in cohorts.items()
        }
        if arm.patients is not None and POOLED_SITE in weights:
            weights[POOLED_SITE] = sum(weights[name] for name in study.site_names)
        total += sum(weights.values())  # every node describes itself
        total += len(rounds) * sum(weights[name] for name in arm.train_sites)
        if is_of_all_sites(arm.scope):
            total -= sum(weights[site] for (r, site), why in missing.items() if r in rounds and why == "away")
        total += evaluations * sum(len(cohorts[name].test) for name in arm.evaluate_sites)
    return total


def _trained_on(arm: Arm, cohort: Cohort, study: StudyConfig) -> Cohort:
    if arm.patients is None:
        return cohort
    few = FewPatients(arm.patients, study.seed)
    return training_on(cohort, few.of(item.patient_id for item in cohort.train))


def _warm_up_optimizers() -> None:
    """Import what the first optimiser step imports, once, before processes are forked."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()
