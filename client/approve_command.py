"""``medfed site approve``: read what a study would do here, and allow it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from client.study_in_words import StudyInWords

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_WIDTH = 12


@app.command(no_args_is_help=True)
def approve(
    site: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="This hospital's folder.", show_default=False)],
    study: Annotated[Path, typer.Argument(metavar="STUDY_FILE", help="From the coordinator.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without being asked.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; approves only together with --yes.")
    ] = False,
) -> None:
    """Say what a study would do at this hospital, and allow it if you type its name.

    Shows what runs, which numbers leave, what protects patients and what does not, and what it would cost.

    The approval is signed with the site's key and holds for exactly this study. 'medfed site withdraw' takes it back.

    [bold]Example[/bold]

      medfed site approve /srv/medfed brain-structures-0f3a6d1b2c4e.study
    """
    from rich.console import Console

    from client.approvals import keep_study, store_approval
    from client.newest_roster import note_roster
    from client.site_folder import existing_site
    from client.study_in_words import study_in_words
    from medfed.signed_document import read_document
    from medfed.signed_study import parse_signed_study

    folder = existing_site(site)
    data = read_document(study)
    signed = parse_signed_study(data, public_key=folder.kit.coordinator_key, origin=str(study))
    words = study_in_words(signed, folder)
    note_roster(signed, folder)
    if not as_json:
        _show(words, Console())
    if not yes and not as_json:
        typed = typer.prompt(
            f"Type the study's name ({words.study}) to let it train here", default="", show_default=False
        )
        if typed.strip() != words.study:
            typer.echo("not approved; nothing of it trains here")
            sys.exit(1)
    if yes or not as_json:
        keep_study(folder, words.digest, data)
        store_approval(folder, words.study, words.digest)
    if as_json:
        typer.echo(json.dumps({**words.model_dump(mode="json"), "approved": yes}))
    else:
        typer.echo(f"approved; to take it back: medfed site withdraw {site} {words.digest[:12]}")


def _show(words: StudyInWords, console: Console) -> None:
    """One screen: what runs, what leaves, what is protected, what it costs."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", min_width=_WIDTH)
    table.add_column(overflow="fold")

    def row(name: str, *lines: str, style: str = "") -> None:
        from rich.text import Text

        table.add_row(name, Text("\n".join(lines), style=style))

    row(
        "study",
        f"{words.study}, for {words.site} in {words.consortium}, with {', '.join(words.others) or 'nobody else'}",
    )
    row("signed by", "the coordinator with fingerprint", words.coordinator)
    row("digest", words.digest)
    row("")
    rounds = f"{words.num_rounds} rounds; in each {words.local}"
    row("runs here", words.task, f"{words.backbone} (frozen), {words.adapter}", rounds)
    row("its weights", "have the SHA-256", words.backbone_sha256)
    row("on", words.patients)
    row("")
    for upload in words.uploads:
        row("leaves", f"{upload.rounds}: {upload.num_elements:,} numbers in {upload.num_tensors} tensors")
        for group in upload.tensors:
            row("", *_at_dots(group.name, console.width - _WIDTH - 2), f"  {_shapes(group.shapes)}")
    row("", f"{words.bytes_up:,} bytes a round, {words.bytes_up_total:,} in all; to {words.server}")
    row("told besides", *words.told)
    row("")
    row("protected", *words.protected)
    row("not", *words.not_protected, style="yellow")
    row("")
    if words.privacy is None:
        row("epsilon", "infinite: this study promises nothing about single patients", style="bold red")
    else:
        privacy = words.privacy
        row(
            "epsilon",
            f"{privacy.epsilon_round:.3f} in a round, {privacy.epsilon_study:.3f} in the whole study "
            f"(delta {privacy.delta:g}, unit {privacy.unit}, adjacency {privacy.adjacency})",
            f"against {privacy.against}",
        )
    console.print(table, highlight=False)
    _show_budget(words, console)


def _show_budget(words: StudyInWords, console: Console) -> None:
    budget = words.budget
    if budget is None:
        return
    line = (
        f"cohort {budget.cohort}: {budget.spent:.3f} of {budget.cap:g} spent so far, {budget.after:.3f} after this "
        f"study, {budget.left:.3f} left (delta {budget.delta:g})"
    )
    console.print(f"[bold]{'budget':<{_WIDTH}}[/]  {line}", highlight=False, soft_wrap=True)
    if budget.rounds_that_fit < words.num_rounds:
        console.print(
            f"{'':<{_WIDTH}}  does not fit: the ledger will refuse after {budget.rounds_that_fit} of "
            f"{words.num_rounds} rounds",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )


def _at_dots(name: str, width: int) -> list[str]:
    """A module's name in lines of at most this width, broken before dots; a part that is longer has its own line."""
    lines: list[str] = []
    for part in re.split(r"(?=\.)", name):
        if lines and len(lines[-1]) + len(part) <= width:
            lines[-1] += part
        else:
            lines.append(f"  {part}" if lines else part)
    return lines


def _shapes(shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> str:
    """``4 x [1, 256], 4 x [128, 1]``."""
    return ", ".join(f"{count} x {list(shape)}" for count, shape in shapes)
