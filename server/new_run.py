"""A folder of its own for every run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from medfed.errors import CheckpointError


def new_run_folder(parent: Path, study_name: str) -> Path:
    """A new, empty folder ``<parent>/<study>-<local time>``, with a suffix if that exists.

    Raises:
        CheckpointError: if there are too many of that name.
    """
    stem = f"{study_name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = parent / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder.resolve()
    raise CheckpointError(f"Expected to make a run folder {parent / stem}, got too many of that name.")
