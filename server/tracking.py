"""Metrics of every round in TensorBoard or MLflow, for whoever watches studies there; ``metrics.jsonl`` is the record.

A study names one tracker (``tracking = "tensorboard"``). Only lines that the checkpoint holds are told, once each, so a
run that was killed and resumed shows every round once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from medfed.errors import MissingExtraError
from medfed.study import StudyConfig

_FACTS = frozenset({"event", "scope", "round", "site"})
_TOLD = ".tracked"
"""File in the run folder with the number of lines that were told."""


class Tracker(Protocol):
    """Takes numbers by name and round."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number of one round."""

    def close(self) -> None:
        """What was told is written."""


class TensorBoard:
    """Event files in the run folder; ``tensorboard --logdir runs`` shows them.

    Args:
        folder: of the run.

    Raises:
        MissingExtraError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number of one round."""
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """What was told is written."""
        self._writer.close()


class MlFlow:
    """One MLflow run for the run folder, at ``MLFLOW_TRACKING_URI`` or in files below the folder.

    Args:
        folder: of the run; remembers the number of its MLflow run.
        study: names the experiment.

    Raises:
        MissingExtraError: if MLflow is not installed.
    """

    def __init__(self, folder: Path, study: StudyConfig) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing("mlflow") from None
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        remembered = folder / ".mlflow-run"
        if remembered.exists():
            self._run = remembered.read_text()
            return
        experiment = self._client.get_experiment_by_name(study.name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(study.name)
        run = self._client.create_run(number, run_name=folder.name, tags={"medfed.study_digest": study.digest})
        self._run = str(run.info.run_id)
        remembered.write_text(self._run)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number of one round."""
        self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        """Nothing is kept back."""


def tracker_of(study: StudyConfig, folder: Path) -> Tracker | None:
    """The tracker that a study names, or None.

    Raises:
        MissingExtraError: if it is not installed.
    """
    match study.tracking:
        case "tensorboard":
            return TensorBoard(folder)
        case "mlflow":
            return MlFlow(folder, study)
        case _:
            return None


def tell(tracker: Tracker, folder: Path, lines: Sequence[str]) -> None:
    """Tell a tracker the lines of a checkpoint that it was not told yet.

    Args:
        tracker: is told ``<site>/<metric>`` for every number of every line.
        folder: of the run; remembers how many lines were told.
        lines: of ``metrics.jsonl``, all so far.
    """
    path = folder / _TOLD
    told = int(path.read_text()) if path.exists() else 0
    for line in lines[told:]:
        facts = json.loads(line)
        for name, value in _numbers(facts):
            tracker.scalar(f"{facts['event']}/{facts['site']}/{name}", value, facts["round"])
    path.write_text(str(len(lines)))


def _numbers(facts: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in facts.items():
        if name not in _FACTS and isinstance(value, (int, float)):
            yield name, float(value)


def _missing(extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"Expected {extra} for tracking = {extra!r}, got none; install it with: pip install 'medfed[{extra}]', or "
        "remove the line from the study."
    )
