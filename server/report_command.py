"""``medfed report``: render the report of a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a finished run.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Render a run's report.html again and print its path.

    Example: medfed report runs/brain-structures-20260101-120000
    """
    from server.report import write_report

    path = write_report(run_dir.resolve())
    typer.echo(json.dumps({"report": str(path)}) if as_json else str(path))
