"""What ``medfed server run`` and ``resume`` do: a run folder, a status board, a live table, the result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.live import Live

from medfed.errors import CheckpointError
from medfed.process_log import log_to_stderr
from medfed.study import StudyConfig, parse_study
from server.checkpoint import write_durably
from server.consortium_folder import ConsortiumFolder, open_consortium
from server.metrics_endpoint import serve_metrics
from server.new_run import new_run_folder
from server.results import read_results, rows_of
from server.run_status import StatusBoard, read_status
from server.service import superlink_of
from server.status_table import status_view
from server.study_run import Patience, first_status, node_keys, run_study

_STUDY = "study.json"


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """What the options of ``run`` and ``resume`` say.

    Attributes:
        wait_s: for a quorum of sites.
        tries: in a row without a completed round, before giving up.
        superlink: ``host:port``, if not where CONSORTIUM.toml says.
        metrics_host: of the Prometheus endpoint.
        metrics_port: of it; None for no endpoint.
        as_json: print one object at the end.
    """

    wait_s: float
    tries: int
    superlink: str | None
    metrics_host: str
    metrics_port: int | None
    as_json: bool


def run_signed_study(consortium: Path, study_file: Path, how: HowToRun) -> None:
    """Begin a run of a signed study.

    Raises:
        MedfedError: with one line that says what to change.
    """
    folder = open_consortium(consortium)
    study = folder.signed_study(study_file).study
    run_dir = new_run_folder(folder.runs, study.name)
    write_durably(run_dir / _STUDY, study.canonical)
    board = StatusBoard(run_dir, first_status(study, folder.config.name))
    _run(folder, study, run_dir, board, how)


def resume_run(consortium: Path, run_dir: Path, how: HowToRun) -> None:
    """Go on with a run.

    Raises:
        MedfedError: with one line that says what to change.
    """
    folder, run_dir = open_consortium(consortium), run_dir.resolve()
    path = run_dir / _STUDY
    if not path.is_file():
        raise CheckpointError(f"Expected a run folder with {_STUDY}, got {run_dir}; check the path.")
    study = parse_study(path.read_bytes())
    status = read_status(run_dir)
    if status.consortium != folder.config.name:
        raise CheckpointError(f"Expected a run of {folder.config.name!r}, got one of {status.consortium!r}.")
    _run(folder, study, run_dir, StatusBoard(run_dir, status), how)


def _run(folder: ConsortiumFolder, study: StudyConfig, run_dir: Path, board: StatusBoard, how: HowToRun) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        log_to_stderr()
    if how.metrics_port is not None:
        serve_metrics(board.snapshot, host=how.metrics_host, port=how.metrics_port)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, _interrupt)
    if not how.as_json:
        typer.echo(f"run {run_dir}")
    with _live(console, board):
        run_study(
            study,
            node_keys(study, folder.roster()),
            superlink_of(folder, how.superlink),
            board,
            folder=run_dir,
            patience=Patience(sites_s=how.wait_s, tries=how.tries),
            stop=stop,
        )
    if how.as_json:
        typer.echo((run_dir / "summary.json").read_text())
        return
    _show(run_dir)


def _show(run_dir: Path) -> None:
    results = read_results(run_dir)
    for row in rows_of(results):
        if row.kind != "part" and row.values:
            told = ", ".join(f"{column.replace('_', '-')} {value:.3f}" for column, value in row.values.items())
            typer.echo(f"{row.site:<14} {results.metric_name}: {told}")
    if results.privacy.promise:
        typer.echo(results.privacy.promise)
    for warning in results.privacy.warnings:
        typer.secho(warning, fg="red")
    typer.echo(f"report   {run_dir / 'report.html'}")
    typer.echo(f"adapter  {run_dir / 'adapter'}")


def _live(console: Console, board: StatusBoard) -> AbstractContextManager[object]:
    """A live table on a terminal; nothing elsewhere, where events are logged."""
    if not console.is_terminal:
        return nullcontext()
    view: Callable[[], object] = lambda: status_view(board.snapshot())  # noqa: E731 - one expression, given away
    return Live(get_renderable=view, console=console, refresh_per_second=4)  # type: ignore[arg-type]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def newest_run(place: Path) -> Path:
    """The run folder at ``place``, or the newest run of the consortium there.

    Raises:
        CheckpointError: if there is none.
    """
    if (place / _STUDY).is_file():
        return place.resolve()
    runs = sorted((place / "runs").glob(f"*/{_STUDY}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise CheckpointError(f"Expected a run folder, or a consortium with runs, at {place}, got none.")
    return runs[-1].parent.resolve()
