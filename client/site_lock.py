"""One process for a site's folder: two would answer one message twice. Imports nothing heavy: a monitor asks often."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medfed.errors import SiteError


@contextmanager
def only_process(site: Path) -> Iterator[None]:
    """Hold a site's folder for this process alone.

    Raises:
        SiteError: if another process holds it.
    """
    with open(os.open(_lock_file(site), os.O_RDWR | os.O_CREAT, 0o600), "rb+", buffering=0) as file:  # noqa: PTH123 - a descriptor
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SiteError(
                f"Expected that nobody serves {site}, got another process that does; stop it first."
            ) from None
        yield


def is_served(site: Path) -> bool:
    """Whether a process holds a site's folder at this moment. Changes nothing, and needs no key."""
    try:
        with _lock_file(site).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _lock_file(site: Path) -> Path:
    return site / "state" / "lock"
