"""``medfed server health``: whether the consortium's service answers; for containers and monitors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_PATIENCE_S = 5.0


@app.command(no_args_is_help=True)
def health(
    consortium: Annotated[
        Path, typer.Argument(metavar="CONSORTIUM_DIR", help="Folder that 'medfed provision' made.", show_default=False)
    ],
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where it is; by default on this machine.")
    ] = None,
) -> None:
    """Ask the service over TLS whether it is up; ends with exit code 18 if it is not.

    [bold]Example[/bold]

      medfed server health consortium
    """
    import ssl

    import httpx

    from medfed.errors import LinkDownError, LinkError
    from server.consortium_folder import ConsortiumFolder

    folder = ConsortiumFolder(consortium.resolve())
    address = superlink or f"127.0.0.1:{folder.config.server.port}"
    try:
        context = ssl.create_default_context(cafile=str(folder.ca_certificate))
        answer = httpx.get(f"https://{address}/health", verify=context, timeout=_PATIENCE_S, trust_env=False)
    except (OSError, httpx.TransportError) as error:
        raise LinkDownError(
            f"Expected the consortium's service at {address}, got {type(error).__name__}: {error}; start it with "
            "'medfed server start'."
        ) from None
    if not answer.is_success:
        raise LinkError(f"Expected the consortium's service at {address} to be up, got HTTP {answer.status_code}.")
    typer.echo(f"{address} answers")
