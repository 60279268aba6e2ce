"""``medfed bench``: what the product costs, beside the same work without it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure what the product costs on this machine, beside the same work without it."""


@app.command()
def dp(
    gate: Annotated[
        bool, typer.Option("--gate", help="A minute instead of ten: the default engine on half the model, bound 1.25.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Private training steps beside non-private ones, and beside Opacus.

    A ViT-S with LoRA of rank 8, 32 images, one thread: time, peak memory, and what the feature cache saves.
    Takes ten minutes; run it on a machine that does nothing else. Ends with exit code 1 if a target is missed.

    [bold]Examples[/bold]

      medfed bench dp

      medfed bench dp --json > dp.json
    """
    from rich.console import Console

    from simulation.bench.dp import FULL, GATE, measure
    from simulation.bench.rows import printed, table, this_machine
    from simulation.progress import bar

    machine = this_machine()
    with bar(Console(stderr=True, quiet=as_json)) as reporter:
        rows = measure(GATE if gate else FULL, reporter)
    if as_json:
        typer.echo(json.dumps(printed(rows, machine)))
    else:
        Console().print(table(rows))
    if not all(row.holds for row in rows):
        sys.exit(1)
