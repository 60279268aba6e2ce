"""``medfed bench``: what the product costs, beside the same work without it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from simulation.bench.rows import Row
    from simulation.progress import Reporter

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
    from simulation.bench.dp import FULL, GATE, measure

    _print(partial(measure, GATE if gate else FULL), as_json=as_json)


@app.command()
def secagg(
    gate: Annotated[
        bool, typer.Option("--gate", help="Seconds instead of minutes: eight sites, and bounds that any machine keeps.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Secure aggregation beside Flower's SecAgg+.

    Processor time of a client and of the server, bytes and messages, for 8, 32 and 100 sites and a million parameters.
    Takes four minutes. Ends with exit code 1 if a target is missed.

    [bold]Examples[/bold]

      medfed bench secagg

      medfed bench secagg --json > secagg.json
    """
    from simulation.bench.secagg import FULL, GATE, measure

    _print(partial(measure, GATE if gate else FULL), as_json=as_json)


@app.command()
def strategies(
    gate: Annotated[
        bool, typer.Option("--gate", help="Under a minute: four rounds, and the shapes that must hold.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Half an hour or more: print the settings that suit each rule.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Aggregation strategies beside each other, at equal privacy.

    Eight made-up hospitals with handwritten digits: accuracy of each rule with and without noise, what it sends, and
    whether the aggregate is the mean of what the sites made. Takes five minutes. Ends with exit code 1 if a target is
    missed.

    [bold]Examples[/bold]

      medfed bench strategies

      medfed bench strategies --json > strategies.json
    """
    import torch
    from rich.console import Console

    from simulation.bench.rows import printed, table, this_machine
    from simulation.bench.strategies import FULL, GATE, accuracies, measure, printed_arms
    from simulation.bench.strategy_settings import print_tuned
    from simulation.progress import bar

    torch.set_num_threads(1)  # the tensors are small
    if tune:
        print_tuned(typer.echo)
        return
    machine = this_machine()
    with bar(Console(stderr=True, quiet=as_json)) as reporter:
        rows, arms = measure(GATE if gate else FULL, reporter)
    if as_json:
        typer.echo(json.dumps({**printed(rows, machine), "arms": printed_arms(arms)}, indent=1))
    else:
        Console().print(accuracies(arms), table([row for row in rows if row.target is not None]))
    if not all(row.holds for row in rows):
        sys.exit(1)


def _print(measure: Callable[[Reporter], list[Row]], *, as_json: bool) -> None:
    """Measures under a bar, prints the rows, and ends with exit code 1 if a target is missed."""
    from rich.console import Console

    from simulation.bench.rows import show, this_machine
    from simulation.progress import bar

    machine = this_machine()
    with bar(Console(stderr=True, quiet=as_json)) as reporter:
        rows = measure(reporter)
    if not show(rows, machine, as_json=as_json):
        sys.exit(1)
