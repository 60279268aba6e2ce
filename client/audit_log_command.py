"""``medfed site audit-log``: everything that left the site, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from client.audit_log import Line

_DIGITS = 8
"""Of a digest that are shown: enough to find it with --json."""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command("audit-log", no_args_is_help=True)
def audit_log(
    site: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="Folder of this hospital's site.")],
    last: Annotated[int, typer.Option(help="Lines to show, from the end; 0 shows all.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what left this site, and verify that the log is as it was written.

    Each line is one answer to the server: when, for which round of which study, how many bytes, their SHA-256, and the
    epsilon that was spent on the cohort after it. Ends with exit code 19 if a line was changed or is missing.

    The log and its head file can be removed together: note the last digest elsewhere.

    [bold]Example[/bold]

      medfed site audit-log /srv/medfed --last 100
    """
    from rich.console import Console

    from client.audit_log import read_audit_log
    from client.site_folder import existing_site
    from medfed.canonical import sha256_hex
    from medfed.signing import read_key

    folder = existing_site(site)
    if not folder.audit_log.exists():
        typer.echo(json.dumps({"lines": [], "last_digest": None}) if as_json else "nothing left this site yet")
        return
    lines = read_audit_log(folder.audit_log, read_key(folder.ledger_key).public_key())
    shown = lines[-last:] if last else lines
    digest = sha256_hex(lines[-1].canonical) if lines else None
    if as_json:
        typer.echo(json.dumps({"lines": [line.model_dump(mode="json") for line in shown], "last_digest": digest}))
        return
    console = Console()
    console.print(_table(shown))
    total = sum(line.departure.payload_bytes for line in lines)
    console.print(f"{len(lines)} answers, {total:,} bytes in all; the log is as it was written", style="green")
    console.print(f"last digest {digest or '-'}", soft_wrap=True, highlight=False)


def _table(lines: Sequence[Line]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Eighty columns hold a line: what comes of an answer may be folded, everything else is as wide as it is.
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in ("UTC", "study", "asked for"):
        table.add_column(name, no_wrap=True)
    for name in ("round", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("SHA-256", no_wrap=True, min_width=_DIGITS)
    table.add_column("epsilon", justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold", min_width=len("outcome"))
    for line in lines:
        left = line.departure
        epsilon = "" if left.epsilon_after is None else f"{left.epsilon_after:.3f}"
        style = "" if left.outcome == "reply" else "yellow"
        again = ", again" if left.again else ""
        outcome = Text(f"{left.kind or left.outcome}{again}", style=style)
        table.add_row(
            left.time[2:19].replace("T", " "),
            left.study_digest[:_DIGITS],
            Text(left.action.removeprefix("query.").removeprefix("secure_")),  # the server chose it: no markup
            str(left.round),
            f"{left.payload_bytes:,}",
            left.payload_digest[:_DIGITS],
            epsilon,
            outcome,
        )
    return table
