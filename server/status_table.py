"""The status of a run as a table: once, live, or as JSON."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.run_status import RunStatus, SiteStatus, read_status

_STYLES = {"waiting": "yellow", "running": "cyan", "paused": "yellow", "finished": "green", "failed": "bold red"}


def show_status(place: Path, *, watch: bool, as_json: bool) -> None:
    """Print the status of a run, or show it live until the run ends.

    Raises:
        CheckpointError: if there is no run.
    """
    from server.run_command import newest_run

    folder = newest_run(place)
    if as_json:
        typer.echo(read_status(folder).model_dump_json())
        return
    console = Console()
    if not watch:
        console.print(status_view(read_status(folder)))
        return
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            status = read_status(folder)
            live.update(status_view(status))
            if status.phase in ("finished", "failed"):
                return
            time.sleep(0.5)


def status_view(status: RunStatus) -> RenderableType:
    """One line, a bar, and a row for each site."""
    head = Text.assemble(
        (f"{status.study} ", "bold"),
        (status.phase, _STYLES[status.phase]),
        f"  round {status.round}/{status.num_rounds}",
        "" if status.round_seconds is None else f"  {status.round_seconds:.1f} s a round",
        "" if status.tries <= 1 else f"  {status.tries} tries",
    )
    if status.epsilon_planned is not None:
        head.append(f"  epsilon {status.epsilon_planned:.2f} planned at delta {status.delta:g}")
    parts: list[RenderableType] = [head, ProgressBar(total=status.num_rounds, completed=status.round, width=60)]
    if status.reason:
        parts.append(Text(status.reason, style="red" if status.phase == "failed" else "yellow"))
    return Group(*parts, _sites(status))


def _sites(status: RunStatus) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    refused = any(site.refusals for site in status.sites.values())
    for name in ("site", "", "last seen"):
        table.add_column(name, no_wrap=True)
    for name in ("round", "sent", "received", "epsilon", *(("refusals",) if refused else ())):
        table.add_column(name, justify="right", no_wrap=True)
    if refused:
        table.add_column("last refusal", overflow="fold")
    for name, site in status.sites.items():
        table.add_row(
            name,
            Text("online", style="green") if site.is_online else Text("away", style="yellow"),
            _ago(site),
            str(site.round),
            _bytes(site.bytes_sent),
            _bytes(site.bytes_received),
            "-" if site.epsilon is None else f"{site.epsilon:.3f}",
            *((str(site.refusals), Text(site.last_refusal)) if refused else ()),
        )
    return table


def _ago(site: SiteStatus) -> str:
    if site.last_seen is None:
        return "never"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(site.last_seen)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
