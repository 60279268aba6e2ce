"""What every benchmark ends with: rows, the machine and the versions they were measured with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured value and what it should be.

    Attributes:
        name: what was measured.
        value: a number, or whether something is true.
        unit: of the value; empty for a truth.
        target: a bound on the value, or the truth it must be; None where nothing is promised.
        at_least: the target is a lower bound, not an upper one.
    """

    name: str
    value: float | bool
    unit: str
    target: float | bool | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """The target is kept, or there is none. NaN keeps no target."""
        if self.target is None:
            return True
        if isinstance(self.target, bool):
            return self.value is self.target
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def facts(self) -> dict[str, object]:
        """As ``--json`` prints it."""
        names = ("name", "value", "unit", "target", "holds")
        return {name: getattr(self, name) for name in names}


def printed(rows: Sequence[Row], machine: dict[str, object]) -> dict[str, object]:
    """The object that ``--json`` prints."""
    return {"rows": [row.facts for row in rows], "machine": machine, "versions": _versions()}


def show(rows: Sequence[Row], machine: dict[str, object], *, as_json: bool) -> bool:
    """Print the rows, as one JSON object or as a table; whether all of them hold."""
    if as_json:
        print(json.dumps(printed(rows, machine)))
    else:
        from rich.console import Console

        Console().print(table(rows))
    return all(row.holds for row in rows)


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    from rich import box
    from rich.table import Table

    shown = Table("", "value", "unit", "target", "", box=box.SIMPLE_HEAD)
    for row in rows:
        value = str(row.value) if isinstance(row.value, bool) else f"{row.value:.4g}"
        verdict = "[green]ok[/green]" if row.holds else "[bold red]MISSED[/bold red]"
        shown.add_row(row.name, value, row.unit, _bound(row), "" if row.target is None else verdict)
    return shown


def this_machine() -> dict[str, object]:
    """Where the rows are measured, and how busy it is before they are."""
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def _bound(row: Row) -> str:
    if row.target is None or isinstance(row.target, bool):
        return "" if row.target is None else str(row.target)
    return f"{'≥' if row.at_least else '≤'} {row.target:g}"


def _versions() -> dict[str, str]:
    packages = ("torch", "flwr", "opacus", "peft", "transformers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
