"""``medfed site preflight``: one table that a hospital can act on, and an exit code that a script can."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfed.errors import SiteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from client.preflight_check import Check, PreflightInputs

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_STYLES = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
_MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
_TITLES = {
    "data": "Images and labels",
    "identity": "People in DICOM headers",
    "set-up": "This machine",
    "network": "The way to the server",
}


@app.command(no_args_is_help=True)
def preflight(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="PLACE", help="A site's folder, or a manifest of images (CSV or JSON).", show_default=False
        ),
    ],
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="Check labels, weights and numbers against it.")
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Of a manifest: the site's name in the study.")
    ] = "this site",
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Beside a manifest: the hospital's policy.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Beside a manifest: the consortium's server.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Beside a manifest: the consortium's authority.")
    ] = None,
    identified_data_allowed: Annotated[
        bool, typer.Option("--identified-data-allowed", help="Warn of named patients in DICOM headers, do not fail.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check data, machine and the way to the server before a study, and say what to do about each fault.

    Opens every image once and changes nothing; nothing about the site is sent anywhere.

    Ends with exit code 11 if anything failed; warnings are for a person to look at.

    The table may name rows and files, and counts DICOM attributes; it never shows what stands in them.

    [bold]Examples[/bold]

      medfed site preflight /srv/medfed --study lesions.study

      medfed site preflight /data/manifest.csv --study lesions.toml --name north
    """
    from client.preflight_check import PreflightInputs
    from medfed.study import read_study

    if place.is_dir():
        from client.preflight_inputs import inputs_of_site

        inputs = inputs_of_site(place, study, identified_data_allowed=identified_data_allowed)
        run_preflight(inputs, as_json=as_json)
        return
    run_preflight(
        PreflightInputs(
            site_name=name,
            manifests=(place,),
            study=None if study is None else read_study(study),
            policy=policy,
            state=place.parent if place.parent.is_dir() else None,
            server=server,
            ca_certificate=None if ca is None else ca.read_text(encoding="utf-8", errors="replace"),
            identified_data_allowed=identified_data_allowed,
        ),
        as_json=as_json,
    )


def run_preflight(inputs: PreflightInputs, *, as_json: bool) -> None:
    """Look at everything and show it.

    Raises:
        SiteError: if anything failed; with ``as_json`` the process ends with its exit code instead, since the
            object says what.
    """
    from rich.console import Console

    checks = _with_progress(inputs)
    failed = [check for check in checks if check.outcome == "fail"]
    if as_json:
        typer.echo(json.dumps(as_object(inputs.site_name, checks)))
        if failed:
            sys.exit(SiteError.exit_code)
        return
    show(inputs.site_name, checks, Console())
    if failed:
        names = ", ".join(dict.fromkeys(check.name for check in failed))
        raise SiteError(f"Expected a site without faults, got {len(failed)}: {names}; mend them and look again.")


def as_object(site_name: str, checks: Sequence[Check]) -> dict[str, Any]:
    """What ``--json`` prints."""
    counted = Counter(check.outcome for check in checks)
    return {
        "site": site_name,
        "passed": not counted["fail"],
        "counts": {outcome: counted[outcome] for outcome in ("ok", "warn", "fail")},
        "checks": [
            {
                "part": check.part,
                "name": check.name,
                "outcome": check.outcome,
                "found": check.found,
                "what_to_do": check.what_to_do,
            }
            for check in checks
        ],
    }


def show(site_name: str, checks: Sequence[Check], console: Console) -> None:
    """One table: what was found, and below it what to do; faults also read without colour."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"Preflight of {site_name}", style="bold"))
    for part, title in _TITLES.items():
        of_part = [check for check in checks if check.part == part]
        if not of_part:
            continue
        console.print(Text(f"\n{title}", style="bold underline"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=4)
        table.add_column(width=20 if console.width < 100 else 28)
        table.add_column(overflow="fold")
        for check, following in zip_longest(of_part, of_part[1:]):
            found = Text(check.found)
            if check.what_to_do and not (
                following and following.what_to_do == check.what_to_do
            ):  # once for all of them
                found.append(f"\ndo: {check.what_to_do}", style="bold")
            table.add_row(Text(_MARKS[check.outcome], style=_STYLES[check.outcome]), Text(check.name), found)
        console.print(table)
    counted = Counter(check.outcome for check in checks)
    verdict, style = ("not ready", "bold red") if counted["fail"] else ("ready", "bold green")
    console.print()
    console.print(
        Text(f"{verdict}: ", style=style)
        + Text(f"{counted['ok']} ok, {counted['warn']} to look at, {counted['fail']} to mend")
    )


def _with_progress(inputs: PreflightInputs) -> tuple[Check, ...]:
    """The checks; on a terminal, with a bar on standard error while images are opened."""
    from rich.console import Console
    from rich.progress import Progress

    from client.preflight import preflight as look

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("opening images", total=None)
        return look(inputs, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
