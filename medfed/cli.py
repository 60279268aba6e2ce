"""The command line: composes what the roles register under the entry-point group ``medfed.commands``.

A command's module is loaded when it is needed and imports what is heavy when it runs, so ``--help`` is
instant. A :class:`~medfed.errors.MedfedError` ends a command with one line and its exit code.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click
import typer

from medfed import __version__
from medfed.errors import MedfedError

_ORDER = ("simulate", "study", "report")
"""The order of commands in the help; others follow by name."""


class _Commands(click.Group):
    """A group whose commands are entry points; one named ``study.plan`` is a command of the group ``study``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._entries: dict[str, EntryPoint] = {e.name: e for e in entry_points(group="medfed.commands")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = {name for name in self._entries if "." not in name}
        known = [name for name in _ORDER if name in own]
        return known + sorted(own - set(known))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._entries or "." in cmd_name:
            return None
        command = self._loaded(cmd_name, cmd_name)
        if isinstance(command, click.Group):
            for name in sorted(self._entries):
                group, _, inner = name.partition(".")
                if inner and group == cmd_name:
                    command.add_command(self._loaded(name, inner))
        return command

    def _loaded(self, entry: str, name: str) -> click.Command:
        command: click.Command = typer.main.get_command(self._entries[entry].load())
        command.name = name
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt medical-imaging foundation models across hospitals that may not share images.",
)
@click.version_option(__version__, prog_name="medfed")
def root() -> None:
    """The ``medfed`` command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the process ends with the exit code of what happened.

    Exit codes: 0 done; 2 wrong usage or wrong study; 74 the operating system refused to read or write;
    130 stopped by the user; others as in :mod:`medfed.errors`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        root.main(args=arguments, prog_name="medfed", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except MedfedError as error:
        if "--json" in arguments:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"medfed: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that cannot be written: the machine's business, not a bug
        if "--json" in arguments:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"medfed: {error}; mend it and try again; a run that had begun can be resumed.", file=sys.stderr)
        sys.exit(os.EX_IOERR)
