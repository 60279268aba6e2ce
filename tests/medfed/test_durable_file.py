"""A private file is there whole, old or new, whatever happens while it is replaced."""

import os
import stat
from pathlib import Path

import pytest

from medfed.durable_file import make_private_folder, replace_durably


def test_bytes_are_synced_before_they_get_their_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append(("named", None))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    replace_durably(tmp_path / "head", b"12345", mode=0o600)
    assert events == [("file", 5), ("named", None), ("folder", None)]
    assert (tmp_path / "head").read_bytes() == b"12345"


def test_partial_file_of_a_dead_process_is_no_obstacle_and_lends_no_mode(tmp_path: Path) -> None:
    (tmp_path / ".head.partial").write_bytes(b"half")
    (tmp_path / ".head.partial").chmod(0o666)
    replace_durably(tmp_path / "head", b"whole", mode=0o600)
    assert [file.name for file in tmp_path.iterdir()] == ["head"]
    assert stat.S_IMODE((tmp_path / "head").stat().st_mode) == 0o600


def test_old_content_stands_when_the_new_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_durably(tmp_path / "head", b"old", mode=0o600)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_durably(tmp_path / "head", b"new", mode=0o600)
    assert (tmp_path / "head").read_bytes() == b"old"


def test_folder_is_private_and_its_parents_are_not(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        make_private_folder(tmp_path / "run" / "ledgers")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "run" / "ledgers").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755
    (tmp_path / "run").chmod(0o750)
    make_private_folder(tmp_path / "run")
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o750
