"""``medfed site start``: the long-lived process of a hospital."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(no_args_is_help=True)
def start(
    site: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="Folder of this hospital's site.")],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details, tracebacks included.")] = False,
) -> None:
    """Connect to the consortium's server and serve approved studies until stopped.

    Calls out over one TLS port and is never called; honours HTTPS_PROXY. Executes no code from the network. Waits for
    a server that is away. May be killed at any moment and started again: run it under systemd or in a container that
    restarts it.

    [bold]Example[/bold]

      medfed site start /srv/medfed
    """
    from client.run_site import run_site

    run_site(site, verbose=verbose)
