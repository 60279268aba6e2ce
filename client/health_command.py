"""``medfed site health``: whether a process serves the site; for containers and monitors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(no_args_is_help=True)
def health(
    site: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="Folder of this hospital's site.")],
) -> None:
    """Say whether 'medfed site start' serves this folder; ends with exit code 11 if it does not.

    Whether the server can be reached is not looked at: a site waits for a server that is away, and a restart would not
    mend that. 'medfed site preflight' looks.

    [bold]Example[/bold]

      medfed site health /srv/medfed
    """
    from client.site_lock import is_served
    from medfed.errors import SiteError

    if not is_served(site):
        raise SiteError(f"Expected a process that serves {site}, got none; start it with 'medfed site start'.")
    typer.echo("served")
