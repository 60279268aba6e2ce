"""What a finished run of a consortium leaves: the adapter, the numbers, the promise, and a report.

The server has no images: there are no pictures, no pooled bound and no site alone to compare with. It writes what sites
told, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from medfed.errors import CheckpointError
from medfed.models.adapted import adapted_model
from medfed.study import ALL_SITES, FEDERATED, StudyConfig
from medfed.tasks import task_of
from privacy.plan import PrivacyPlan
from server.checkpoint import METRICS, read_checkpoint, write_durably
from server.privacy_statement import expected_noise_to_signal, privacy_statement
from server.report import write_report
from server.results import Column, Results, SitePrivacy
from server.run_status import RunStatus
from strategies.registry import strategy_of
from strategies.shared_model import shared_state

HOSPITALS = "Images of hospitals, which have not left them; the numbers are as the sites told them."


def write_run_results(folder: Path, study: StudyConfig, status: RunStatus) -> Results:
    """Write ``adapter/``, ``summary.json`` and ``report.html`` of a run that completed its rounds.

    Args:
        folder: of the run.
        study: resolved.
        status: with the epsilons that sites told.

    Raises:
        CheckpointError: if the run has no checkpoint.
    """
    final = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope=FEDERATED)
    if final is None:
        raise CheckpointError(f"Expected the checkpoint of a finished run in {folder}, got none; resume the run.")
    model = adapted_model(study, torch.device("cpu"))
    model.save(folder / "adapter", shared_state(strategy_of(study), final.adapter_P, final.broadcast))
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    primary = task_of(study.task).primary
    sites = _table(study, lines, final.round)
    columns: list[Column] = ["zero_shot", "federated"]
    whole = [one[primary] for one in sites.values() if set(columns) <= set(one.get(primary, {}))]
    seconds = datetime.fromisoformat(status.updated_at) - datetime.fromisoformat(status.started_at)
    results = Results(
        run_dir=str(folder),
        study=study.name,
        rounds=final.round,
        wall_s=seconds.total_seconds(),
        primary=primary,
        sites=sites,
        mean={column: sum(one[column] for one in whole) / len(whole) for column in columns} if whole else {},
        worst_site={column: min(one[column] for one in whole) for column in columns} if whole else {},
        privacy=privacy_statement(study, _spent(study, status), is_simulation=False),
        cohort=HOSPITALS,
    )
    write_durably(folder / "summary.json", results.model_dump_json(indent=2).encode())
    write_report(folder)
    return results


def _table(
    study: StudyConfig, lines: list[dict[str, Any]], last_round: int
) -> dict[str, dict[str, dict[Column, float]]]:
    """Site -> metric -> column -> value; one line for all sites where sums are masked."""
    names = (ALL_SITES,) if study.sums_securely else study.site_names
    table: dict[str, dict[str, dict[Column, float]]] = {name: {} for name in names}
    facts = {"event", "scope", "round", "site", "num_examples", "num_sites"}
    for column, number in (("zero_shot", 0), ("federated", last_round)):
        for line in lines:
            if (line["event"], line["round"]) != ("evaluate", number) or line["site"] not in table:
                continue
            for metric, value in line.items():
                if metric not in facts:
                    table[line["site"]].setdefault(metric, {})[column] = value  # type: ignore[index]
    return table


def _spent(study: StudyConfig, status: RunStatus) -> Mapping[str, SitePrivacy]:
    """What each site told that it spent; what it did not tell is what the study may spend in all."""
    if study.privacy is None or not (plan := PrivacyPlan.of_study(study)).is_private:
        return {}
    spent = {}
    for site in study.site_names:
        declared = study.declared_units(site)
        assert declared is not None
        told = status.sites[site].epsilon
        spent[site] = SitePrivacy(
            epsilon=plan.epsilon.value if told is None else told,
            delta=plan.delta,
            noise_multiplier=plan.noise_multiplier,
            clip_norm=plan.clip_norm,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps_per_round * study.rounds.num_rounds,
            rounds=study.rounds.num_rounds,
            declared_units=declared,
            clip_fraction=None,
            signal_to_noise=None,
            noise_to_signal_expected=expected_noise_to_signal(study, plan, declared),
        )
    return spent
