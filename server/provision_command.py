"""``medfed provision``: what a consortium needs before its first study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from server.provisioning import Provisioned

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(no_args_is_help=True)
def provision(
    consortium: Annotated[
        Path, typer.Argument(metavar="CONSORTIUM.toml", help="Its name, its server, its sites.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's folder.")] = Path("consortium"),
    enrol: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What a hospital sent back; may be given several times.", show_default=False),
    ] = None,
    renew_server_certificate: Annotated[
        bool, typer.Option("--renew-server-certificate", help="Replace the server's certificate and key.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make what a consortium needs: a certificate authority, the server's certificate, and a kit for each hospital.

    Hand out DIR/kits/<site>: nothing in it is secret. The hospital makes its own keys with 'medfed site init' and
    sends back one file, which --enrol takes in. Compare fingerprints by telephone, both ways.

    Run it as often as you like, also with more sites: keys and certificates that are there are kept.

    [bold]Examples[/bold]

      medfed provision CONSORTIUM.toml

      medfed provision CONSORTIUM.toml --enrol north.json --enrol south.json
    """
    from rich.console import Console

    from server.provisioning import provision as made

    provisioned = made(
        consortium, out, enrolments=tuple(enrol or ()), renew_server_certificate=renew_server_certificate
    )
    if as_json:
        typer.echo(provisioned.model_dump_json())
    else:
        _show(provisioned, Console())


def _show(provisioned: Provisioned, console: Console) -> None:
    """The consortium, its sites, and what to do next."""
    from rich import box
    from rich.table import Table

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    line(f"{provisioned.consortium}: {provisioned.server}, {len(provisioned.sites)} sites", "bold")
    line(f"folder of the coordinator: {provisioned.folder}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("site", "kit", "enrolled with key"):
        table.add_column(name, overflow="fold")
    for site in provisioned.sites:
        kit = f"kits/{site.site}" + (" (new)" if site.is_new else "")
        table.add_row(site.site, kit, site.fingerprint or "[yellow]not yet[/]")
    console.print(table)
    line(f"fingerprint of the coordinator's key: {provisioned.fingerprint}", "bold")
    line("  read it out to each hospital by telephone, and let them read out theirs as it stands above")
    line(
        f"server certificate until {provisioned.server_certificate_until:%Y-%m-%d}, "
        f"authority until {provisioned.authority_until:%Y-%m-%d}"
    )
    if provisioned.renew_server_certificate:
        line("the server certificate ends soon: run with --renew-server-certificate", "bold red")
    if provisioned.left:
        line(f"invited no more, and not in the roster: {', '.join(provisioned.left)}", "yellow")
    missing = [site.site for site in provisioned.sites if site.fingerprint is None]
    if missing:
        line(f"next: hand out the kits; then 'medfed provision ... --enrol FILE' for {', '.join(missing)}")
    else:
        line("all sites have enrolled; next: 'medfed study sign STUDY.toml'")
