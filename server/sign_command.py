"""``medfed study sign``: make the file that hospitals approve."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(no_args_is_help=True)
def sign(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Study file.", show_default=False)],
    consortium: Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's folder.")] = Path("consortium"),
    as_consortium: Annotated[
        bool,
        typer.Option("--as-consortium", help="Leave out what the study simulates; sites hold the data themselves."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sign a study for the hospitals of a consortium, and print the file to send to them.

    Checks that all its sites have enrolled, resolves it against the real backbone, fixes its noise, and signs the
    names of every tensor that may leave a hospital. Nothing runs until each hospital has approved exactly this file.

    [bold]Examples[/bold]

      medfed study sign study.toml

      medfed study sign examples/brain-structures-consortium.toml --as-consortium --json
    """
    from medfed.study import read_study
    from server.consortium_folder import open_consortium
    from server.study_signing import for_hospitals, sign_study

    folder, config = open_consortium(consortium), read_study(study)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints meanwhile
        signed = sign_study(for_hospitals(config) if as_consortium else config, folder)
    if as_json:
        facts = {"path": str(signed.path), "study": signed.study.name, "digest": signed.study.digest}
        typer.echo(
            json.dumps({**facts, "sites": list(signed.study.site_names), "warnings": list(signed.plan.warnings)})
        )
        return
    typer.echo(f"{signed.study.name}: signed for {', '.join(signed.study.site_names)}")
    typer.echo(f"digest {signed.study.digest}")
    for warning in signed.plan.warnings:
        typer.secho(warning, fg="red", bold=True)
    typer.echo(f"next: send this file to each hospital, for 'medfed site approve SITE_DIR FILE':\n{signed.path}")
