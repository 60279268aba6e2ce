"""``medfed audit``: one table of lower bounds beside the claim."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from server.audit_result import AuditResult

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

REFUTED = 1
"""Exit code if a bound exceeds what is claimed."""


@app.command(no_args_is_help=True)
def audit(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Run folder of a finished run.", show_default=False)
    ],
    site: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose training is run again; the study's first by default.")
    ] = None,
    runs: Annotated[int, typer.Option(min=20, metavar="N", help="Short runs with one canary or none.")] = 1000,
    canaries: Annotated[int, typer.Option(min=10, metavar="M", help="Mislabelled images in one run.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Attack a run, and set what the attacks show beside the claimed epsilon.

    Runs one site's private training again with canaries, through the code that real patients go through.
    Tells members from others by the released adapter, and inverts a gradient with and without protection.

    Writes audit.json and figures into the run folder; takes minutes.
    Ends with exit code 1 if a lower bound exceeds what is claimed.
    A bound below the claim is a test passed, not a proof.

    [bold]Examples[/bold]

      medfed audit runs/brain-structures-private-20260101-120000

      medfed audit runs/brain-structures-private-20260101-120000 --runs 5000 --site north --json
    """
    from rich.console import Console

    from simulation.audit.run import Effort, audit_run
    from simulation.progress import bar

    with (
        contextlib.redirect_stdout(sys.stderr),
        bar(Console(stderr=True, quiet=as_json)) as reporter,
    ):
        result = audit_run(run_dir.resolve(), site=site, effort=Effort(runs, canaries), reporter=reporter)
    if as_json:
        typer.echo(result.model_dump_json())
    else:
        _show(result, Console())
    if result.refuted:
        sys.exit(REFUTED)


def _show(result: AuditResult, console: object) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    console.print(_bounds(result))
    if result.membership:
        console.print(_membership(result))
    for one in result.inversion:
        console.print(
            f"inversion, {one.protection:<18} PSNR {one.psnr_db:5.1f} dB   SSIM {one.ssim:.2f}", highlight=False
        )
    console.print()
    console.print(result.sentence, style="bold red" if result.refuted else "bold", markup=False, highlight=False)
    for note in result.notes:
        console.print(f"- {note}", style="dim", markup=False, highlight=False)


def _bounds(result: AuditResult) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from server.audit_result import ATTACKS

    promise = "nothing is claimed"
    if result.claimed is not None:
        promise = f"epsilon {result.claimed:.2f} at delta {result.delta:g}, add/remove one {result.unit}"
    table = Table(
        title=f"{result.study}, site {result.site}: {promise}; bounds together at {result.confidence:.0%}",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("attack")
    for name in ("delta", "claimed", "lower bound", "guessed right"):
        table.add_column(name, justify="right")
    for bound in result.bounds:
        table.add_row(
            ATTACKS[bound.attack],
            f"{bound.delta:g}",
            "none" if bound.claimed is None else f"{bound.claimed:.2f}",
            Text(f"{bound.epsilon:.2f}", style="bold red" if bound.exceeds else "bold"),
            f"{bound.num_correct} of {bound.num_guessed}",
        )
    return table


def _membership(result: AuditResult) -> Table:
    from rich import box
    from rich.table import Table

    from server.audit_fragment import MEMBERSHIP

    first = result.membership[0]
    table = Table(
        title=f"membership inference: {first.num_members} training and {first.num_others} held-out patients",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("score")
    table.add_column("AUROC", justify="right")
    for hit in first.hits:
        table.add_column(f"found at {hit.false_alarm_rate:g} false alarms", justify="right")
    for one in result.membership:
        hits = [f"{hit.share:.3f} ({hit.low:.3f}-{hit.high:.3f})" for hit in one.hits]
        table.add_row(MEMBERSHIP[one.attack], f"{one.auroc:.2f} ({one.low:.2f}-{one.high:.2f})", *hits)
    return table
