"""``medfed site init``: join a consortium."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_Device = Literal["auto", "cpu", "cuda", "mps"]


@app.command(no_args_is_help=True)
def init(
    kit: Annotated[Path, typer.Argument(metavar="KIT_DIR", help="What the coordinator sent.", show_default=False)],
    site: Annotated[
        Path, typer.Argument(metavar="SITE_DIR", help="New folder of this hospital's site.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(metavar="MANIFEST", help="Lists the hospital's images.", show_default=False)],
    expect_fingerprint: Annotated[
        str | None,
        typer.Option(metavar="F", help="Of the coordinator's key, as heard by telephone.", show_default=False),
    ] = None,
    cohort: Annotated[
        str, typer.Option(metavar="NAME", help="Name of these patients in the privacy ledger.")
    ] = "patients",
    device: Annotated[_Device, typer.Option(help="Where the site computes.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Join a consortium: verify the coordinator's kit, and make this hospital's keys and settings.

    The private keys never leave SITE_DIR. Send SITE_DIR/enrolment.json to the coordinator.

    Then edit SITE_DIR/local/policy.toml: until a budget stands there and a study is approved, nothing trains.

    [bold]Example[/bold]

      medfed site init kits/north /srv/medfed --data /data/manifest.csv --expect-fingerprint 93df-6b48-...
    """
    from client.enrolment import init_site
    from medfed.signing import fingerprint

    folder = init_site(kit, site, data=data, cohort=cohort, device=device, expected_fingerprint=expect_fingerprint)
    own = fingerprint(folder.enrolment().signing_key)
    coordinator = fingerprint(folder.kit.coordinator_key)
    if as_json:
        facts = {
            "site": folder.kit.site,
            "consortium": folder.kit.consortium,
            "server": str(folder.kit.server),
            "folder": str(folder.root),
            "enrolment": str(folder.enrolment_file),
            "fingerprint": own,
            "coordinator_fingerprint": coordinator,
            "coordinator_verified": expect_fingerprint is not None,
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"site {folder.kit.site} of {folder.kit.consortium}, server {folder.kit.server}")
    compared = "as expected" if expect_fingerprint else "NOT COMPARED: ask the coordinator by telephone"
    typer.echo(f"fingerprint of the coordinator's key: {coordinator} ({compared})")
    typer.echo(f"fingerprint of this site's key:       {own} (read it out to the coordinator)")
    typer.echo(f"next: send {folder.enrolment_file} to the coordinator, and decide what may train:")
    typer.echo(f"      {folder.policy_file}")
