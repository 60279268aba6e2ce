"""``medfed audit``: one table of lower bounds beside the claim."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from server.audit_result import AdapterInversion, AuditResult, Membership

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
    shadows: Annotated[
        int, typer.Option(min=0, metavar="K", help="Shadow adapters for the likelihood-ratio attack; 0 or at least 8.")
    ] = 0,
    inversion_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Steps of each search for an image behind the adapter's update.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Attack a run, and set what the attacks show beside the claimed epsilon.

    Runs one site's private training again with canaries, through the code that real patients go through.
    Tells members from others by the released adapter, and inverts a gradient with and without protection.
    Trains shadow adapters and searches images behind the study's own updates if asked to: minutes more.

    Writes audit.json and figures into the run folder; takes minutes.
    Ends with exit code 1 if a lower bound exceeds what is claimed.
    A bound below the claim is a test passed, not a proof.

    [bold]Examples[/bold]

      medfed audit runs/brain-structures-private-20260101-120000

      medfed audit runs/brain-structures-private-20260101-120000 --runs 5000 --site north --json

      medfed audit runs/brain-structures-private-20260101-120000 --shadows 16 --inversion-steps 60
    """
    from rich.console import Console

    from simulation.audit.run import Effort, audit_run
    from simulation.progress import bar

    effort = Effort(runs, canaries, shadows, inversion_steps)
    with (
        contextlib.redirect_stdout(sys.stderr),
        bar(Console(stderr=True, quiet=as_json)) as reporter,
    ):
        result = audit_run(run_dir.resolve(), site=site, effort=effort, reporter=reporter)
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
        first = result.membership[0]
        of = f"{first.num_members} training and {first.num_others} held-out patients of all sites"
        console.print(_membership(f"membership inference: {of}", result.membership))
    if (shadows := result.shadows) is not None:
        site, released = f"site {result.site}", shadows.released[0]
        of = f"{released.num_members} training and {released.num_others} other patients of {site}"
        console.print(_membership(f"{shadows.num_shadows} shadows on the released adapter: {of}", shadows.released))
        console.print(_membership(f"shadows on each other: adapters of {site} alone", shadows.alone))
    for one in result.inversion:
        console.print(
            f"inversion, {one.protection:<18} PSNR {one.psnr_db:5.1f} dB   SSIM {one.ssim:.2f}", highlight=False
        )
    if (searched := result.adapter_inversion) is not None:
        console.print(_searches(searched))
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


def _membership(title: str, attacks: tuple[Membership, ...]) -> Table:
    from rich import box
    from rich.table import Table

    from server.audit_fragment import MEMBERSHIP

    table = Table(title=title, title_style="", box=box.SIMPLE_HEAD)
    table.add_column("score")
    table.add_column("AUROC", justify="right")
    for hit in attacks[0].hits:
        table.add_column(f"found at {hit.false_alarm_rate:g} false alarms", justify="right")
    for one in attacks:
        hits = [f"{hit.share:.3f} ({hit.low:.3f}-{hit.high:.3f})" for hit in one.hits]
        table.add_row(MEMBERSHIP[one.attack], f"{one.auroc:.2f} ({one.low:.2f}-{one.high:.2f})", *hits)
    return table


def _searches(searched: AdapterInversion) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"inversion of the adapter's own update, {searched.steps} steps; the mean of the other images: "
        f"PSNR {searched.mean_psnr_db:.1f} dB, SSIM {searched.mean_ssim:.2f}",
        title_style="",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("update")
    table.add_column("search from")
    for name in ("match", "PSNR, dB", "SSIM", "place of the original"):
        table.add_column(name, justify="right")
    for one in searched.searches:
        table.add_row(
            one.protection,
            one.start,
            f"{one.cosine:.2f}",
            f"{one.psnr_db:.1f}",
            f"{one.ssim:.2f}",
            f"{one.rank} of {searched.num_images}",
        )
    return table
