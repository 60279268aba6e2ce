"""What ``medfed server run`` and ``resume`` do: a run folder, a status board, a live table, the result."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.live import Live

from medfed.errors import CheckpointError
from medfed.study import StudyConfig, parse_study
from server.checkpoint import write_durably
from server.consortium_folder import ConsortiumFolder, open_consortium
from server.metrics_endpoint import serve_metrics
from server.results import read_results, rows_of
from server.run_status import StatusBoard, read_status
from server.service import log_to_stderr, superlink_of
from server.status_table import status_view
from server.study_run import Patience, first_status, node_keys, run_study

_STUDY = "study.json"


def run_signed_study(
    consortium: Path,
    study_file: Path,
    *,
    wait_s: float,
    tries: int,
    superlink: str | None,
    metrics: tuple[str, int | None],
    as_json: bool,
) -> None:
    """Begin a run of a signed study.

    Raises:
        MedfedError: with one line that says what to change.
    """
    folder = open_consortium(consortium)
    study = folder.signed_study(study_file).study
    run_dir = _new_run_folder(folder.runs, study.name)
    write_durably(run_dir / _STUDY, study.canonical)
    board = StatusBoard(run_dir, first_status(study, folder.config.name))
    _run(folder, study, run_dir, board, wait_s, tries, superlink, metrics, as_json)


def resume_run(
    consortium: Path,
    run_dir: Path,
    *,
    wait_s: float,
    tries: int,
    superlink: str | None,
    metrics: tuple[str, int | None],
    as_json: bool,
) -> None:
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
    _run(folder, study, run_dir, StatusBoard(run_dir, status), wait_s, tries, superlink, metrics, as_json)


def _run(
    folder: ConsortiumFolder,
    study: StudyConfig,
    run_dir: Path,
    board: StatusBoard,
    wait_s: float,
    tries: int,
    superlink: str | None,
    metrics: tuple[str, int | None],
    as_json: bool,
) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        log_to_stderr()
    host, port = metrics
    if port is not None:
        serve_metrics(board.snapshot, host=host, port=port)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, _interrupt)
    if not as_json:
        typer.echo(f"run {run_dir}")
    with _live(console, board):
        run_study(
            study,
            node_keys(study, folder.roster()),
            superlink_of(folder, superlink),
            board,
            folder=run_dir,
            patience=Patience(sites_s=wait_s, tries=tries),
            stop=stop,
        )
    if as_json:
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


def _new_run_folder(parent: Path, study_name: str) -> Path:
    """A new, empty folder ``<parent>/<study>-<local time>``, with a suffix if that exists."""
    while True:
        folder = parent / f"{study_name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.2)
            continue
        return folder.resolve()


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
