"""``medfed simulate``: one progress bar, one table, one report."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from server.evaluation import Measured
    from server.few_shot import FewShot
    from server.results import Column, Results
    from simulation.harness import Run
    from simulation.progress import Reporter

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

_Device = Literal["auto", "cpu", "cuda", "mps"]


@app.command(no_args_is_help=True)
def simulate(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY.toml", help="Study file.", show_default=False)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Go on with a run that was stopped, in place of a study file."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the run folder is made.")] = Path("runs"),
    engine: Annotated[
        Literal["in-process", "ray"] | None,
        typer.Option(help="ray runs the federated arm on Flower's Ray engine; in-process by default."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Processes that train sites; 0 for none; one per core by default."),
    ] = None,
    device: Annotated[_Device | None, typer.Option(help="Where sites compute; auto by default.")] = None,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out the local-only and pooled arms.")
    ] = False,
    show_cohort: Annotated[
        bool,
        typer.Option("--show-cohort", help="Draw what the sites hold, measure how far apart they are, train nothing."),
    ] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Also train a federation without each site, and try it on that site."),
    ] = False,
    few_shot: Annotated[
        str | None,
        typer.Option(
            "--few-shot",
            metavar="1,2,4",
            help="Also train every arm with so many training patients of each site, on the same held-out patients.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder and nothing else.")] = False,
) -> None:
    """Simulate a federated study on virtual hospitals in this machine.

    Trains one adapter over all sites, and for comparison one at each site alone and one on all data pooled.
    Leaves a run folder with the adapter, the metrics and report.html.

    [bold]Examples[/bold]

      medfed simulate examples/brain-structures.toml

      medfed simulate study.toml --no-baselines --json > result.json

      medfed simulate study.toml --show-cohort

      medfed simulate study.toml --few-shot 1,2,4

      medfed simulate --resume runs/brain-structures-20260101-120000
    """
    from rich.console import Console

    if show_cohort:
        if study is None:
            raise typer.BadParameter("needs a study file", param_hint="--show-cohort")
        _show_cohort(study, out, device or "auto", as_json=as_json, quiet=quiet)
        return

    shots = None if few_shot is None else _shots(few_shot)
    from simulation.harness import simulate as run_study

    def work(reporter: Reporter) -> Run:
        return run_study(
            study,
            resume=resume,
            out=out,
            engine=engine,
            workers=workers,
            device=device,
            baselines=False if no_baselines else None,
            leave_one_out=True if leave_one_out else None,
            few_shot=shots,
            reporter=reporter,
        )

    # Standard output carries the result and nothing else: whatever a library prints meanwhile goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        run = _run(work, Console(stderr=True, quiet=quiet or as_json))
    if as_json:
        typer.echo(_as_json(run))
    elif quiet:
        typer.echo(str(run.folder))
    else:
        _show(run, Console())


def _run(work: Callable[[Reporter], Run], console: Console) -> Run:
    """Run under a progress bar; Ctrl-C ends the process with one line that says how to go on."""
    from simulation.progress import bar

    with bar(console) as reporter:
        try:
            return work(reporter)
        except KeyboardInterrupt:
            folder = reporter.run_dir
    how = f"go on with: medfed simulate --resume {folder}" if folder else "nothing was trained yet"
    typer.echo(f"medfed: stopped; {how}", err=True)
    sys.exit(INTERRUPTED)


def _shots(text: str) -> tuple[int, ...]:
    from simulation.few_shot import shots_of

    try:
        return shots_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--few-shot") from None


def _as_json(run: Run) -> str:
    """The summary and, where it was asked for, the few-shot curve under ``few_shot``."""
    if run.few_shot is None:
        return run.summary.model_dump_json()
    both = {**run.summary.model_dump(mode="json"), "few_shot": run.few_shot.model_dump(mode="json")}
    return json.dumps(both, separators=(",", ":"))


def _show_cohort(study: Path, out: Path, device: _Device, *, as_json: bool, quiet: bool) -> None:
    """Draw and measure the cohorts, and say where that is."""
    from rich.console import Console

    from simulation.progress import bar
    from simulation.shift.cohort_view import show_cohort

    with contextlib.redirect_stdout(sys.stderr), bar(Console(stderr=True, quiet=quiet or as_json)) as reporter:
        view = show_cohort(study, out=out, device=device, reporter=reporter)
    if as_json:
        typer.echo(view.measured.read_text(encoding="utf-8"), nl=False)
        return
    if quiet:
        typer.echo(str(view.folder))
        return
    console = Console()
    for (first, second), found in view.pairs.items():
        console.print(
            f"{first} and {second}: MMD² {found.mmd_squared:.3f}, p {found.p_value:.3f}", markup=False, highlight=False
        )
    console.print(view.provenance, markup=False, highlight=False)
    for what, place in (("cohort", view.figure), ("shift", view.matrix), ("numbers", view.measured)):
        if place is not None:
            console.print(f"{what:<8} {place}", soft_wrap=True, markup=False, highlight=False)


def _show(run: Run, console: Console) -> None:
    """The table, the privacy sentence in red, where the images come from, and where the results are."""
    from server.report import REPORT
    from server.results import column_labels, read_results
    from simulation.run_folder import stored_study

    results, task = read_results(run.folder), stored_study(run.folder).task
    part = "structure" if task.kind == "segmentation" else "target"
    console.print(_table(results, column_labels(task.kind), part))
    if run.few_shot is not None:
        console.print(_few_shot_table(run.few_shot, results, column_labels(task.kind)))
    if results.privacy.promise:
        console.print(results.privacy.promise, markup=False, highlight=False)
    if results.privacy.confidentiality:
        console.print(results.privacy.confidentiality, markup=False, highlight=False)
    for warning in results.privacy.warnings:
        console.print(warning, style="bold red", markup=False, highlight=False)
    console.print(results.cohort, markup=False, highlight=False)
    for what, place in (("report", run.folder / REPORT), ("adapter", run.folder / "adapter")):
        console.print(f"{what:<8} {place}", soft_wrap=True, markup=False, highlight=False)


def _few_shot_table(few_shot: FewShot, results: Results, labels: Mapping[Column, str]) -> Table:
    """Training patients of each site by arms, and federated less local-only; each with its interval."""
    from rich import box
    from rich.table import Table

    from server.report_few_shot import rows_of_curve
    from server.results import DECIMALS

    def cell(measured: Measured | None, sign: str = "") -> str:
        if measured is None:
            return "-"
        value = f"{measured.value:{sign}.{DECIMALS}f}"
        if measured.low is None or measured.high is None:
            return value
        return f"{value}\n{measured.low:{sign}.{DECIMALS}f} to {measured.high:{sign}.{DECIMALS}f}"

    compared = "\nDifference: federated less local-only." if few_shot.has_joining else ""
    table = Table(
        title=f"{results.study}: {results.metric_name} by training patients at each site",
        title_style="",
        caption=f"Mean of sites; 95 % intervals over held-out patients; 0: before training.{compared}",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("patients", no_wrap=True)
    for column in few_shot.columns:
        table.add_column(labels[column], justify="right", no_wrap=True)
    if few_shot.has_joining:
        table.add_column("difference", justify="right", no_wrap=True)
    for row in rows_of_curve(few_shot):
        difference = [cell(row.joining, "+")] if few_shot.has_joining else []
        table.add_row(row.label, *(cell(measured) for measured in row.cells), *difference)
    return table


def _table(results: Results, labels: Mapping[Column, str], part: str) -> Table:
    """Sites by parts, one column for each arm that was run; the best trained arm in bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from server.results import DECIMALS, rows_of

    table = Table(
        title=f"{results.study}: {results.metric_name} on held-out patients",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("site")
    table.add_column(part)
    for column in results.columns:
        table.add_column(labels[column], justify="right")
    previous = None
    for row in rows_of(results):
        if row.kind == "mean":
            table.add_section()
        cells = [
            Text(
                f"{row.values[column]:.{DECIMALS}f}" if column in row.values else "-",
                style="bold" if column in row.best else "",
            )
            for column in results.columns
        ]
        table.add_row(Text(row.site if row.site != previous else ""), Text(row.part), *cells)
        previous = row.site
    return table
