"""The Flower ServerApp: the same object in the simulator, under Ray and in a consortium.

Run configuration (Flower carries scalars only):

====================  =====================================================================
``study``             canonical JSON of the resolved study
``run-dir``           folder of the checkpoint and ``metrics.jsonl``
``scope``             name of the federation (default ``federated``)
``train-sites``       comma-separated (default: all sites of the study)
``evaluate-sites``    comma-separated (default: all sites of the study)
``evaluate-initial``  whether the adapter before round 1 is evaluated (default: true)
``nodes``             ``site=number,...``: who is who, where keys say so (default: sites are asked)
====================  =====================================================================
"""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from medfed.models.adapted import adapted_model
from medfed.study import parse_study
from server.rounds import Federation, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study of the run configuration to its end, from its checkpoint if there is one."""
    config = context.run_config
    study = parse_study(str(config["study"]).encode("utf-8"))
    train_sites = _names(config.get("train-sites"), study.site_names)
    federation = Federation(
        scope=str(config.get("scope", "federated")),
        train_sites=train_sites,
        evaluate_sites=_names(config.get("evaluate-sites"), study.site_names),
        quorum=min(study.quorum, len(train_sites)),
        evaluate_initial=bool(config.get("evaluate-initial", True)),
        node_of=_nodes(str(config.get("nodes", ""))),
    )
    # The server adapts nothing: it needs the manifest and the adapter that the study's seed starts from.
    initial_P = adapted_model(study, torch.device("cpu")).initial_P
    run_rounds(grid, study, federation, initial_P=initial_P, folder=Path(str(config["run-dir"])))


def _names(value: object, default: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return default
    return tuple(name for name in str(value).split(",") if name)


def _nodes(value: str) -> dict[str, int]:
    pairs = (pair.partition("=") for pair in value.split(",") if pair)
    return {site: int(number) for site, _, number in pairs}
