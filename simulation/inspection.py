"""What a simulation may look at and a consortium may not: each site's own scores under secure aggregation.

The server of a run with secure aggregation sees sums. Whoever simulates holds every virtual site anyway and wants
to know how each fares, so its scores are computed beside the run, without a message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from client.site import Site
from client.trainer import evaluate_locally
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import task_of
from server.checkpoint import write_durably

INSPECTION = "inspection.jsonl"

SiteState = Callable[[Site], ModelState]
"""A site's model: the shared one, unless the strategy lets sites differ."""


def inspect_sites(
    folder: Path, study: StudyConfig, sites: Sequence[Site], model: AdaptedModel, final: SiteState
) -> list[dict[str, Any]]:
    """Every site's scores before the first round and after the last, as lines of metrics; kept in the run folder.

    Empty where held-out metrics are withheld or noised, even from whoever simulates.
    """
    if not study.shows_held_out:
        return []
    task, last = task_of(study.task), study.rounds.num_rounds
    lines: list[dict[str, Any]] = []
    for site in (site for site in sites if site.name in study.site_names):
        held_out = site.cohort(study, model.pixels).test
        for round_number, state in ((0, ModelState(model.initial_P)), (last, final(site))):
            scores = evaluate_locally(
                model,
                task,
                held_out,
                state=state,
                features=site.features,
                batch_size=study.training.batch_size,
            )
            facts = {"event": "evaluate", "scope": "federated", "round": round_number, "site": site.name}
            lines.append({**facts, "num_examples": len(held_out), **scores})
    write_durably(folder / INSPECTION, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return lines
