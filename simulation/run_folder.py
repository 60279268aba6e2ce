"""A run folder: everything a run leaves behind, and all that ``--resume`` needs.

::

    runs/<study>-<time>/
        study.json                 the resolved study, canonical
        options.json               how it was run, and digests of the data it was run on
        sites.json                 the virtual sites and where their data is
        checkpoint.safetensors     the federated arm after its last round
        metrics.jsonl              its metrics, one JSON object per line
        arms/<scope>/              the same for every other arm
        ledgers/                   privacy ledger of every virtual site, and the key that signs them
        adapter/                   the final adapter, a standard PEFT folder
        adapters/<site>/           each site's own, under strategies that let sites differ: what scores are of
        memories/                  what such sites remember between rounds
        evaluation.json            intervals, calibration, surface distances and what else was measured
        few_shot.json              scores by the number of training patients of each site, where that was asked for
        summary.json  report.html  figures/
        audit.json                 what `medfed audit` found, with figures/audit-*.svg
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.device import DeviceChoice
from medfed.errors import CheckpointError
from medfed.study import StudyConfig, parse_study
from server.checkpoint import write_durably


def store_study(folder: Path, study: StudyConfig) -> None:
    """Write the resolved study."""
    write_durably(folder / "study.json", study.canonical)


def stored_study(folder: Path) -> StudyConfig:
    """The resolved study of a run.

    Raises:
        CheckpointError: if the folder is not one of a run.
        StudyError: if its study was changed.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise CheckpointError(f"Expected a run folder with study.json, got {folder}; check the path.")
    return parse_study(path.read_bytes())


class RunOptions(BaseModel):
    """How a run was started; a resumed run goes on in the same way.

    Attributes:
        device: where sites compute, as asked for.
        engine: where the federated arm runs.
        baselines: whether the other arms run.
        leave_one_out: whether a federation without each site runs as well.
        few_shot: numbers of training patients of each site with which the arms run once more.
        cohorts: digest of every site's data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: DeviceChoice
    engine: Literal["in-process", "ray"]
    baselines: bool
    leave_one_out: bool = False
    few_shot: tuple[int, ...] = ()
    cohorts: dict[str, str] = {}


def store_options(folder: Path, options: RunOptions) -> None:
    """Write how the run was started."""
    write_durably(folder / "options.json", options.model_dump_json(indent=2).encode())


def stored_options(folder: Path) -> RunOptions | None:
    """How the run was started; None if it was stopped before that was known.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / "options.json"
    try:
        return RunOptions.model_validate_json(path.read_bytes()) if path.exists() else None
    except ValidationError:
        raise CheckpointError(
            f"Expected the options of a run at {path}, got something else; start a new run."
        ) from None


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the folder's ``metrics.jsonl``; empty if there is none yet."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cache_folder() -> Path:
    """Where cohorts and encrypted features are kept: ``MEDFED_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("MEDFED_CACHE") or Path.home() / ".cache" / "medfed").resolve()


def config_folder() -> Path:
    """Where keys are kept: ``MEDFED_CONFIG``, else the user's configuration folder."""
    return Path(os.environ.get("MEDFED_CONFIG") or Path.home() / ".config" / "medfed").resolve()
