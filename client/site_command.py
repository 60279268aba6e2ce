"""``medfed site``: what a hospital looks at and decides on its own machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfed.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

    from client.spending import ShownCharge, ShownCohort, ShownLedger

app = typer.Typer(
    help="Look at and decide what a site does.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)


@app.callback()
def _site() -> None:
    """Look at and decide what a site does."""


@app.command()
def ledger(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Site's folder, ledger (.sqlite), or a folder of them.", show_default=False
        ),
    ],
    public_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key to verify with; by default the .pub file beside the ledger."),
    ] = None,
    rounds: Annotated[bool, typer.Option("--rounds", help="List every charge, not only every study.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what was spent on each cohort, by study and round, and verify the privacy ledger.

    Needs no private key and no right to write.

    Ends with exit code 14 if an entry is not as it was written, or entries are missing.

    The public key beside a ledger can be exchanged together with it: name a copy with --public-key.

    [bold]Examples[/bold]

      medfed site ledger /srv/medfed --public-key /etc/medfed/ledger.pub

      medfed site ledger runs/brain-structures-20260101-120000
    """
    from rich.console import Console

    from client.spending import ledgers_in, read_spending

    paths = ledgers_in(place)
    if public_key is not None and len(paths) > 1:
        raise typer.BadParameter(
            f"each site has a key of its own: name one ledger, not a folder of {len(paths)}", param_hint="--public-key"
        )
    shown = [read_spending(path, public_key) for path in paths]
    if as_json:
        ledgers = [one.model_dump(mode="json") for one in shown]
        typer.echo(json.dumps({"verified": not any(one.error for one in shown), "ledgers": ledgers}))
    else:
        console = Console()
        for one in shown:
            _show(one, console, rounds=rounds)
    faults = [f"{one.path}: {one.error}" for one in shown if one.error]
    if faults and as_json:  # the object says what is wrong; a second one on standard output would break it
        sys.exit(LedgerError.exit_code)
    if faults:
        raise LedgerError(" ".join(faults))


def _show(shown: ShownLedger, console: Console, *, rounds: bool) -> None:
    """A table for each cohort, and whether the chain is whole."""
    console.print(str(shown.path), style="bold", markup=False, highlight=False, soft_wrap=True)
    for cohort in shown.cohorts:
        at_least = "at least " if shown.error else ""
        console.print(
            f"cohort {cohort.cohort}: {at_least}epsilon {cohort.epsilon:.3f} of {cohort.cap:g} spent "
            f"(delta {cohort.delta:g}, unit {cohort.unit}, adjacency {cohort.adjacency})",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_charges(cohort) if rounds else _studies(cohort))
    if not shown.cohorts:
        console.print("nothing was charged yet", highlight=False)
    verified = f"{shown.entries} entries" if shown.entries != 1 else "1 entry"
    if shown.error:
        line, style = f"only {verified} verified; what comes after is not shown and may have spent more", "bold red"
    else:
        line, style = f"chain of {verified} verified, ends with {shown.last_digest}", "green"
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    console.print(f"key {shown.public_key}\n", style="dim", highlight=False, soft_wrap=True)


def _studies(cohort: ShownCohort) -> Table:
    """One row for each study and federation."""
    table = _table(("study",), ("rounds", "steps", "sigma", "q", "epsilon", "in all"), "charges")
    for study in cohort.studies:
        table.add_row(
            f"{study.study}\n[dim]{study.study_digest[:8]} {study.scope}\n{_noises(study.charges)}[/]",
            _ranges(charge.round for charge in study.charges),
            str(study.steps),
            _distinct(charge.noise_multiplier for charge in study.charges),
            _distinct(charge.sampling_rate for charge in study.charges),
            f"{study.epsilon_alone:.3f}",
            f"{study.epsilon_after:.3f}",
            _outcomes(study.charges),
        )
    return table


def _charges(cohort: ShownCohort) -> Table:
    """One row for each charge, in the order of the ledger."""
    table = _table(("#", "UTC", "study"), ("round", "steps", "sigma", "q"), "charge")
    rows = [(charge, study) for study in cohort.studies for charge in study.charges]
    for charge, study in sorted(rows, key=lambda row: row[0].entry):
        table.add_row(
            str(charge.entry),
            charge.time[: len("2026-01-31T23:59")].replace("T", " "),
            f"{study.study}\n[dim]{_noises([charge])}[/]",
            str(charge.round),
            str(charge.steps),
            f"{charge.noise_multiplier:g}",
            f"{charge.sampling_rate:g}",
            _outcomes([charge]),
        )
    return table


def _table(left: Sequence[str], right: Sequence[str], last: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    table.add_column(last)
    return table


def _outcomes(charges: Sequence[ShownCharge]) -> str:
    """``9 sent`` and, below it, ``1 unsettled``; the number is left out for a single charge."""
    from client.spending import UNSETTLED

    counted = []
    for outcome, style in (("sent", ""), ("failed", "yellow"), (UNSETTLED, "bold yellow")):
        number = sum(charge.outcome == outcome for charge in charges)
        text = outcome if len(charges) == 1 else f"{number} {outcome}"
        counted += [f"[{style}]{text}[/]" if style else text] if number else []
    return "\n".join(counted)


def _noises(charges: Iterable[ShownCharge]) -> str:
    """``gaussian``, or ``skellam, shared``; one below the other if there are both."""
    return "\n".join(dict.fromkeys(charge.noise for charge in charges))


def _ranges(numbers: Iterable[int]) -> str:
    """``1-3, 5`` for 1, 2, 3, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _distinct(values: Iterable[float]) -> str:
    return "\n".join(f"{value:g}" for value in dict.fromkeys(values))
