"""``medfed cohort``: a simulated cohort as the folders that hospitals would hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Write simulated cohorts to files.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)


@app.callback()
def _cohort() -> None:
    """Write simulated cohorts to files."""


@app.command(no_args_is_help=True)
def write(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", help="Study file with a \\[cohort].", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One folder for each site.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the cohort that a study simulates: a manifest and its images in DIR/<site>, for each site.

    So that a consortium on one machine has something to train on. Nobody's data: the patients are made up.

    [bold]Example[/bold]

      medfed cohort write examples/brain-structures-consortium.toml data
    """
    from medfed.errors import StudyError
    from medfed.study import read_study
    from simulation.cohort import write_cohort
    from simulation.harness import recipe_of
    from simulation.run_folder import cache_folder

    config = read_study(study)
    if config.cohort is None:
        raise StudyError(f"Expected a study with a [cohort] to write, got {config.name!r}, which simulates none.")
    if folder.exists() and any(folder.iterdir()):
        raise StudyError(f"Expected a new or empty folder at {folder}, got one with files; name another.")
    recipe = recipe_of(config)
    cached = cache_folder() / "cohorts" / recipe.digest[:32]
    write_cohort(recipe, cached)
    shutil.copytree(cached, folder, dirs_exist_ok=True)
    manifests = {site.name: folder / site.name / "manifest.csv" for site in recipe.sites}
    if as_json:
        typer.echo(json.dumps({site: str(path) for site, path in manifests.items()}))
        return
    for site, path in manifests.items():
        typer.echo(f"{site}: {path}")
