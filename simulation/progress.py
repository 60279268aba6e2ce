"""Progress of a simulation as a stream of small facts, and the one bar that shows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Reporter(ABC):
    """Is told what a simulation does; may be called from several threads.

    Attributes:
        run_dir: the run folder, once there is one.
    """

    run_dir: Path | None = None

    @abstractmethod
    def stage(self, text: str) -> None:
        """Something of unknown length starts."""

    @abstractmethod
    def start(self, text: str, total: int) -> None:
        """Something of ``total`` steps starts."""

    @abstractmethod
    def step(self, steps: int = 1) -> None:
        """Some of them are done."""

    def folder(self, path: Path) -> None:
        """The run folder is there: from now on the run can be resumed from it."""
        self.run_dir = path


class Silent(Reporter):
    """Says nothing: for notebooks, tests and ``--json``."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def start(self, text: str, total: int) -> None:
        """Nothing."""

    def step(self, steps: int = 1) -> None:
        """Nothing."""


class Bar(Reporter):
    """One Rich progress bar for the whole run."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def stage(self, text: str) -> None:
        """Show a spinner beside ``text``."""
        self._progress.update(self._task, description=text, total=None, completed=0)

    def start(self, text: str, total: int) -> None:
        """Show a bar from 0 to ``total``."""
        self._progress.update(self._task, description=text, total=total, completed=0)

    def step(self, steps: int = 1) -> None:
        """Advance the bar."""
        self._progress.advance(self._task, steps)


@contextmanager
def bar(console: Console) -> Iterator[Reporter]:
    """A bar on ``console`` that disappears at the end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)
