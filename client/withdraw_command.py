"""``medfed site withdraw``: take an approval back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(no_args_is_help=True)
def withdraw(
    site: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="This hospital's folder.", show_default=False)],
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", help="Of the study; its first digits are enough.", show_default=False)
    ],
) -> None:
    """Take an approval back: from the next request on, the study is refused here.

    What has left the hospital stays with whom it was sent to, and what was spent stays spent.

    [bold]Example[/bold]

      medfed site withdraw /srv/medfed 0f3a6d1b2c4e
    """
    from client.approvals import remove_approval
    from client.site_folder import existing_site
    from medfed.errors import PolicyError

    folder = existing_site(site)
    removed = remove_approval(folder, digest)
    if removed in folder.written_policy().approved_studies:
        raise PolicyError(
            f"Expected study {removed[:12]} to be refused from now on, got it in approved_studies of "
            f"{folder.policy_file}; remove it there too."
        )
    typer.echo(f"withdrawn: study {removed[:12]} is refused from the next request on")
