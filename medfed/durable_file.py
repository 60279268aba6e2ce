"""Small private files that survive a crash whole, and the folders they lie in."""

from __future__ import annotations

import os
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Make ``folder`` with mode 0700 if it does not exist; its missing parents get the usual mode."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def replace_durably(path: Path, data: bytes, *, mode: int) -> None:
    """Make ``data`` the content of ``path``: a crash at any point leaves the old content or the new, whole.

    Durable when it returns: the bytes are synced before they get their name, and the folder after.
    Only one process at a time may replace a path; the partial file of one that died is overwritten.

    Raises:
        OSError: if the operating system refuses; then the old content still stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    _write_new(partial, data, mode)
    partial.replace(path)
    sync_folder(path.parent)


def create_durably(path: Path, data: bytes, *, mode: int) -> None:
    """Make a file that was not there. Durable when it returns; a crash before may leave it empty or cut short.

    Of any number of processes exactly one makes it.

    Raises:
        FileExistsError: if it is there; it is left as it is.
        OSError: if the operating system refuses.
    """
    _write_new(path, data, mode)
    sync_folder(path.parent)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
