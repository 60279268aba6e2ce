"""A secret in a file that only its owner may read: made once, refused if anybody else could have seen it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from medfed.durable_file import create_durably, make_private_folder
from medfed.errors import SiteError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_private(path: Path, data: bytes, what: str) -> None:
    """Store ``data`` at ``path`` with mode 0600, durably; the folder is made, with mode 0700, if there is none.

    Args:
        path: where.
        data: the secret.
        what: what it is, for messages.

    Raises:
        SiteError: if there is a file already (a secret is never overwritten), or it cannot be written.
    """
    try:
        make_private_folder(path.parent)
        try:
            create_durably(path, data, mode=0o600)
        except FileExistsError:
            raise SiteError(f"Expected no {what} at {path} yet, got one; use it, or name another place.") from None
    except OSError as error:
        raise SiteError(f"Expected to write a new {what} to {path}, got: {error}; mend it and try again.") from None


def read_private(path: Path, what: str) -> bytes:
    """The secret at ``path``.

    Raises:
        SiteError: if the file is missing, or may be read or written by anybody but its owner.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise SiteError(f"Expected the {what} at {path}, got: {error}; restore it, or name its place.") from None
    if mode & _OTHERS:
        raise SiteError(
            f"Expected the {what} for its owner alone (mode 0600), got mode {mode:04o} at {path}; run chmod 600, and "
            "make a new one if others could have read this one."
        )
    return data


def require_private(path: Path, mode: int) -> None:
    """Refuses a file or folder that anybody but its owner may use.

    Args:
        path: of it.
        mode: that it should have, for the message.

    Raises:
        SiteError: if others may.
    """
    got = stat.S_IMODE(path.stat().st_mode)
    if got & _OTHERS:
        raise SiteError(
            f"Expected {path} for its owner alone (mode {mode:04o}), got mode {got:04o}; run chmod {mode:o} on it."
        )
