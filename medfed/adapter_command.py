"""``medfed adapter``: look at an adapter folder, or make a smaller one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at an adapter that a run left, or make a smaller one.", add_completion=False)


@app.callback()
def adapter() -> None:
    """Look at an adapter that a run left, or make a smaller one."""


@app.command()
def compress(
    folder: Annotated[Path, typer.Argument(help="Adapter folder (PEFT).", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Where to write; must not exist.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Largest rank to keep.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Keep the best approximation of a rank for each layer, and say what is lost.

    Rules with fresh frames end with an adapter of higher rank than the study's. The error is of the weights: the norm
    of what is lost over the norm of the update. Evaluate the smaller adapter before it is used.

    Example: medfed adapter compress runs/brain-structures-20260101-120000/adapter small --rank 4
    """
    from rich.console import Console
    from rich.table import Table

    from medfed.models.compressed_adapter import compress as compress_folder
    from medfed.models.compressed_adapter import relative_error

    layers = compress_folder(folder, out, rank)
    if as_json:
        facts = {"adapter": str(out), "relative_error": relative_error(layers), "layers": [asdict(x) for x in layers]}
        typer.echo(json.dumps(facts))
        return
    table = Table("layer", "rank", "kept", "lost")
    for layer in layers:
        lost = layer.lost / layer.norm if layer.norm else 0.0
        table.add_row(layer.layer.removeprefix("base_model.model."), str(layer.rank), str(layer.kept), f"{lost:.1%}")
    Console().print(table)
    typer.echo(f"{relative_error(layers):.1%} of the update is lost. Written to {out}")
