"""``medfed study``: check a study file without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check study files, and say what they would cost.", no_args_is_help=True, add_completion=False)

_Study = Annotated[Path, typer.Argument(help="Study file (TOML).", show_default=False)]


@app.command()
def validate(
    study: _Study, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Check every key and value, shift presets, the backbone's digest and the paths; say what the study is."""
    from medfed.models.registry import backbone_of
    from medfed.shift_presets import resolved_at
    from medfed.study import read_study
    from medfed.study_sections import LoraAdapterConfig

    config = read_study(study)
    backbone = backbone_of(config.backbone)
    if isinstance(config.adapter, LoraAdapterConfig):
        backbone.target_expression(config.adapter.targets)
    for site in config.sites:
        resolved_at(site)
    facts = {"name": config.name, "sites": list(config.site_names), "rounds": config.rounds.num_rounds}
    if as_json:
        typer.echo(json.dumps({**facts, "digest": config.digest}))
    else:
        typer.echo(
            f"{study}: valid. {len(config.sites)} sites, {config.rounds.num_rounds} rounds, "
            f"{config.backbone.name} with {config.adapter.in_words}."
        )


@app.command()
def digest(study: _Study) -> None:
    """Print the study's digest as written; the resolved study of a run also covers the adapter's tensors."""
    from medfed.study import read_study

    typer.echo(read_study(study).digest)
