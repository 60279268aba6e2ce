"""``medfed site init``: join a consortium."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from client.policy import Budget

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
    minimum_patients: Annotated[
        int, typer.Option(metavar="N", help="Training patients below which nothing trains.", min=1)
    ] = 20,
    epsilon: Annotated[
        float | None,
        typer.Option(metavar="E", help="What all studies together may spend on each patient.", show_default=False),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(metavar="D", help="For which epsilon holds; well below 1 / patients.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Join a consortium: verify the coordinator's kit, and make this hospital's keys and settings.

    The private keys never leave SITE_DIR. Send SITE_DIR/enrolment.json to the coordinator.

    The hospital's rules are SITE_DIR/local/policy.toml, which nobody sends: --epsilon and --delta write its budget,
    or edit it later. Until a budget stands there and a study is approved, nothing trains.

    [bold]Examples[/bold]

      medfed site init kits/north /srv/medfed --data /data/manifest.csv --expect-fingerprint 93df-6b48-...

      medfed site init kits/north /srv/medfed --data /data/manifest.csv --epsilon 10 --delta 1e-5
    """
    from client.enrolment import init_site
    from medfed.signing import fingerprint

    budget = _budget(epsilon, delta)
    folder = init_site(
        kit,
        site,
        data=data,
        cohort=cohort,
        device=device,
        expected_fingerprint=expect_fingerprint,
        minimum_patients=minimum_patients,
        budget=budget,
    )
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
    if budget is None:
        typer.echo("budget: none, so that no private study trains")
    else:
        typer.echo(f"budget: epsilon {budget.epsilon:g} of all studies together, delta {budget.delta:g}, each patient")
    typer.echo(f"next: send {folder.enrolment_file} to the coordinator, and decide what may train:")
    typer.echo(f"      {folder.policy_file}")


def _budget(epsilon: float | None, delta: float | None) -> Budget | None:
    """The budget of the options; it protects whole patients. None if there are none."""
    from pydantic import ValidationError

    from client.policy import Budget

    if epsilon is None and delta is None:
        return None
    if epsilon is None or delta is None:
        raise typer.BadParameter("a budget is --epsilon and --delta together", param_hint="--epsilon")
    try:
        return Budget(epsilon=epsilon, delta=delta, unit="patient")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise typer.BadParameter(f"{first['msg']}, got {first['input']}", param_hint=f"--{name}") from None
