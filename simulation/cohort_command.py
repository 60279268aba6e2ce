"""``medfed cohort``: deal out real data to simulated hospitals, shift it, and see what a shift does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from simulation.shift.partition import Partition

app = typer.Typer(
    help="Make hospitals of data: deal out patients, apply a domain shift.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

_Manifest = Annotated[
    Path, typer.Argument(metavar="MANIFEST.csv", help="image, patient_id, split, labels.", show_default=False)
]
_Out = Annotated[Path, typer.Option(metavar="DIR", help="Where to write.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def _cohort() -> None:
    """Make hospitals of data: deal out patients, apply a domain shift."""


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


@app.command()
def partition(
    manifest: _Manifest,
    out: _Out,
    by: Annotated[
        Literal["dirichlet", "quantity", "uniform", "column"],
        typer.Option(help="dirichlet: skewed labels. quantity: skewed sizes. uniform: neither. column: by its values."),
    ] = "dirichlet",
    sites: Annotated[
        int | None, typer.Option(min=1, max=999, metavar="N", help="Sites; not for --by column.", show_default=False)
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The label (dirichlet), or the site (column).", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(min=1e-3, max=1e6, help="Concentration: small is extreme.")] = 0.5,
    least: Annotated[int, typer.Option(min=1, help="Patients per site and split at least.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal sites.")] = 0,
    as_json: _Json = False,
) -> None:
    """Deal out the patients of one manifest to sites, and write a manifest for each.

    Images stay where they are. All images of a patient go to one site, with the split they have.

    [bold]Examples[/bold]

      medfed cohort partition isic.csv --sites 6 --column diagnosis --alpha 0.3 --out sites/

      medfed cohort partition isic.csv --by quantity --sites 6 --out sites/

      medfed cohort partition isic.csv --by column --column centre --out sites/
    """
    from rich.console import Console

    from simulation.shift.partition import partition as deal_out
    from simulation.shift.partition import read_rows, write_partition

    if by == "column" and sites is not None:
        raise typer.BadParameter(
            "has no meaning with --by column, which has a site for each value", param_hint="--sites"
        )
    result = deal_out(
        read_rows(manifest), by, num_sites=sites, column=column, concentration=alpha, least=least, seed=seed
    )
    paths = write_partition(result, manifest, out)
    if as_json:
        facts = {
            site: {
                "manifest": str(path),
                "train_patients": result.patients(site, "train"),
                "test_patients": result.patients(site, "test"),
                "images": len(result.sites[site]),
                "labels": dict(result.labels(site)),
            }
            for site, path in paths.items()
        }
        typer.echo(json.dumps({"by": by, "column": column, "seed": seed, "sites": facts}))
        return
    console = Console()
    console.print(_table(result))
    console.print(f"manifests {out}/<site>/manifest.csv", markup=False, highlight=False)


@app.command()
def shift(
    manifest: _Manifest,
    out: _Out,
    preset: Annotated[
        list[str], typer.Option(metavar="NAME", help="From 'medfed cohort presets'; may be given again.")
    ],
    structure: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Structure of label value 1, then 2, ...")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal copies.")] = 0,
) -> None:
    """Write copies of a manifest's images and label maps as another hospital would have made them.

    Grey images take scanner physics, RGB images take stain, label maps take annotators.

    [bold]Example[/bold]

      medfed cohort shift sites/site-2/manifest.csv --preset low-field --preset hasty-annotator --out shifted/site-2
    """
    from rich.console import Console

    from medfed.errors import DataError
    from medfed.shift_presets import resolved
    from medfed.shift_profile import ShiftProfile
    from simulation.progress import bar
    from simulation.shift.partition import read_rows
    from simulation.shift.real_images import shift_images

    try:
        profile = resolved(ShiftProfile(presets=tuple(preset)))
    except ValueError as error:
        raise DataError(str(error).splitlines()[-1]) from None
    with bar(Console(stderr=True)) as reporter:
        reporter.start("changing images", len(read_rows(manifest)))
        written = shift_images(
            manifest, profile, out, structures=structure or (), seed=seed, progress=lambda _: reporter.step()
        )
    typer.echo(str(written))


@app.command()
def presets(
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw every family on one page, as FILE.svg and FILE.png."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the named shift profiles, and draw what every family does.

    [bold]Example[/bold]

      medfed cohort presets --sheet docs/figures/domain-shift
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from medfed.shift_presets import PRESETS

    if sheet is not None:
        from server.checkpoint import write_durably
        from simulation.shift.contact_sheet import draw_contact_sheet

        for suffix, content in draw_contact_sheet().items():
            write_durably(sheet.with_suffix(f".{suffix}"), content)
    if as_json:
        listed = {name: found.profile.model_dump(mode="json", exclude_none=True) for name, found in PRESETS.items()}
        typer.echo(json.dumps(listed))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("preset", "what it is", "families"):
        table.add_column(heading)
    for name, found in PRESETS.items():
        table.add_row(name, found.description, ", ".join(found.profile.families))
    console = Console()
    console.print(table)
    if sheet is not None:
        console.print(f"sheet    {sheet.with_suffix('.png')}", soft_wrap=True, markup=False, highlight=False)


def _table(result: Partition) -> Table:
    """Sites by patients, images and labels."""
    from rich import box
    from rich.table import Table

    values = result.values
    title = f"patients by {result.column}" if values else None
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="", title_justify="right")
    table.add_column("site")
    for heading in ("train patients", "test patients", "images", *values):
        table.add_column(heading, justify="right")
    for site, rows in result.sites.items():
        labels = result.labels(site)
        counts = (result.patients(site, "train"), result.patients(site, "test"), len(rows))
        table.add_row(site, *map(str, counts), *(str(labels.get(value, 0)) for value in values))
    return table
