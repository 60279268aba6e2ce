"""What a preflight finds: one line for each thing looked at, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medfed.device import DeviceChoice
from medfed.errors import MedfedError
from medfed.study import StudyConfig

Outcome = Literal["ok", "warn", "fail"]
Part = Literal["data", "identity", "set-up", "network"]
"""Of the site: its cohort, what its files say of people, this machine, the way to the server."""

_SHOWN = 4
"""Places or values that are named one by one; the rest is counted."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        part: what it belongs to.
        name: what was looked at.
        outcome: ``fail`` for what would stop a round or break a promise, ``warn`` for what a person should look at.
        found: what is the case; may name rows and files of the site, never a value from an image's header.
        what_to_do: empty for ``ok``.
    """

    part: Part
    name: str
    outcome: Outcome
    found: str
    what_to_do: str = ""


@dataclass(frozen=True, kw_only=True)
class PreflightInputs:
    """Everything a preflight looks at; None leaves out what it would be needed for.

    Attributes:
        site_name: as in the study.
        manifests: the site's data.
        study: what the site wants to take part in; labels, weights and declared numbers are checked against it.
        policy: the hospital's policy file.
        ledger: the privacy ledger's file; it need not be there before the first private round.
        ledger_public_key: file of the key to verify it with; None takes the one beside it.
        private_files: keys and other files that only their owner may read.
        state: folder on the disk that the site writes to.
        device: what the site is to compute on.
        server: ``host:port``, as the worker will be given it.
        ca_certificate: the consortium's certificate authority, PEM.
        identified_data_allowed: whether the hospital accepts images that name their patients; what would be
            a failure is then a warning.
    """

    site_name: str
    manifests: tuple[Path, ...]
    study: StudyConfig | None = None
    policy: Path | None = None
    ledger: Path | None = None
    ledger_public_key: Path | None = None
    private_files: tuple[Path, ...] = ()
    state: Path | None = None
    device: DeviceChoice = "auto"
    server: str | None = None
    ca_certificate: str | None = None
    identified_data_allowed: bool = False


def guarded(part: Part, name: str, check: Callable[[], Check | Iterable[Check]]) -> list[Check]:
    """The outcome of a check; what it found so far and a failure where it could not be carried out to its end."""
    found: list[Check] = []
    try:
        outcome = check()
        for one in (outcome,) if isinstance(outcome, Check) else outcome:
            found.append(one)  # noqa: PERF402 - one by one: what came before a fault is kept
    except MedfedError as error:
        expected, _, what_to_do = str(error).partition("; ")
        found.append(Check(part, name, "fail", expected, what_to_do or "see the line beside it."))
    except OSError as error:
        found.append(Check(part, name, "fail", f"the system says: {error}.", "check the path, its owner and its mode."))
    except Exception as error:  # a preflight tells of every fault, its own included, and ends
        told = f"the check itself ended with {type(error).__name__}."
        found.append(Check(part, name, "fail", told, "report it to the project, with this line."))
    return found


def count(number: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(places: Sequence[str]) -> str:
    """The first places by name, and how many more there are."""
    more = len(places) - _SHOWN
    return ", ".join(places[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def distribution(values: Iterable[str]) -> str:
    """``128 x 128 (40), 64 x 64 (2)``: values by how often they occur."""
    counted = Counter(values).most_common()
    shown = ", ".join(f"{value} ({number})" for value, number in counted[:_SHOWN])
    rest = sum(number for _, number in counted[_SHOWN:])
    return shown + (f" and {count(len(counted) - _SHOWN, 'other value')} ({rest})" if rest else "")
