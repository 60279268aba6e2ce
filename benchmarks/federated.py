"""One run of the real apps: ``server.app:app`` and ``client.app:app``, unmodified, on the in-process Grid.

``python federated.py WORKLOAD SITES ROUNDS WORKERS FOLDER`` does all that a simulation does each round: study and
manifest checks, checksums, a synced checkpoint. Cohorts come from FOLDER/cohorts; the final adapter goes to
``federated-WORKERS.safetensors``. ``python federated.py --prepare WORKLOAD SITES FOLDER`` writes the cohorts, and
the adapter that everything starts from.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from clock import RoundClock
from safetensors.torch import save_file
from torch import Tensor, nn
from workload import Workload, workload

from client.site import SITES_VARIABLE, site_of_partition
from medfed.models.adapted import adapted_model, resolve
from medfed.models.pixels import PixelSpec
from medfed.models.registry import Backbone, register_backbone
from medfed.study import StudyConfig
from server.checkpoint import read_checkpoint

CPU = torch.device("cpu")


def resolved_study(work: Workload, num_rounds: int) -> StudyConfig:
    """Register the workload's module as a backbone, and resolve its study against it."""

    def build(_task: object, _generator: torch.Generator) -> nn.Module:
        module: nn.Module = work.module()
        return module

    register_backbone(
        f"benchmark-{work.name}",
        Backbone(
            build=build,
            weights=None,
            pixels=PixelSpec(image_size=None, intensity="raw"),
            task_kind="classification",
            heads=work.architecture.heads,  # type: ignore[attr-defined]
        ),
    )
    return resolve(StudyConfig.model_validate(work.study(num_rounds)), CPU)


def prepare(work: Workload, folder: Path) -> None:
    """Write what every engine starts from."""
    work.write_cohorts(folder / "cohorts")
    model = adapted_model(resolved_study(work, 1), CPU)
    store(model.manifest.unflatten(model.initial_P), folder / "initial.safetensors")


def run(work: Workload, num_rounds: int, num_workers: int, folder: Path) -> None:
    """Run the study and leave its final adapter in ``folder``."""
    study = resolved_study(work, num_rounds)
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        sites = [
            {"name": name, "manifests": [str(folder / "cohorts" / name / "manifest.csv")]} for name in work.site_names()
        ]
        sites_file = Path(run_folder) / "sites.json"
        described = {
            "device": "cpu",
            "policy": {"approved_studies": [study.digest], "minimum_patients": 1, "allow_unprotected": True},
            "cohorts": {"federated": "federated"},
            "ledgers": run_folder,
            "ledger_key": str(Path(run_folder) / "ledger.key"),
            "identities": str(Path(run_folder) / "identities"),
            "journals": str(Path(run_folder) / "journals"),
            "memories": str(Path(run_folder) / "memories"),
            "noise_seed": None,
            "sites": sites,
        }
        sites_file.write_text(json.dumps(described))
        os.environ[SITES_VARIABLE] = str(sites_file)
        _read_cohorts(study)
        _run_apps(study, len(sites), num_workers, Path(run_folder))
        final = read_checkpoint(Path(run_folder), study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert final is not None
    assert final.round == num_rounds
    store(study.resolved_manifest.unflatten(final.adapter_P), folder / f"federated-{num_workers}.safetensors")


def _read_cohorts(study: StudyConfig) -> None:
    """As the simulator does: before workers are forked, so that they share the images."""
    pixels = adapted_model(study, CPU).pixels
    for partition in range(len(study.sites)):
        site_of_partition(partition).cohort(study, pixels)


def _run_apps(study: StudyConfig, num_sites: int, num_workers: int, run_folder: Path) -> None:
    # As in the simulator: Flower is imported only after its switches are set.
    from simulation.grid import InProcessGrid

    # isort: split
    from client.app import app as client_app
    from server.app import app as server_app

    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = {"study": study.canonical.decode(), "run-dir": str(run_folder), "evaluate-sites": ""}
    with InProcessGrid(client_app, node_configs=[{}] * num_sites, run_config=config, workers=num_workers) as grid:
        grid.start()
        clock = RoundClock(grid.worker_pids)
        with RoundListener(clock):
            grid.run_server_app(server_app)
        clock.report()


class RoundListener(logging.Handler):
    """Marks the clock when the server logs that a round is done, its checkpoint written."""

    def __init__(self, clock: RoundClock) -> None:
        super().__init__()
        self._clock = clock
        self._logger = logging.getLogger("medfed.server.rounds")

    def emit(self, record: logging.LogRecord) -> None:
        if "event=round_done" in record.msg:
            self._clock.mark()

    def __enter__(self) -> None:
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)


def store(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def main(*arguments: str) -> None:
    if arguments[0] == "--prepare":
        name, sites, folder = arguments[1:]
        prepare(workload(name, int(sites)), Path(folder))
        return
    name, sites, rounds, workers, folder = arguments
    run(workload(name, int(sites)), int(rounds), int(workers), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
