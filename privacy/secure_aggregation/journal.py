"""What a site remembers of secure aggregation, on disk: what it has answered for good, and secrets until used.

A marker is made with ``O_EXCL`` and synced before the answer that it stands for is sent: of two processes, or of
one before a crash and one after, only one ever gives that answer. Secrets are files of their own, overwritten
and removed when their round is over; a secret that is lost ends its epoch, and the next begins with new ones.

::

    epoch-<number>/own            private key of the epoch, until the setups of all are accepted
    epoch-<number>/dealt          this site's secrets of all slots, from its setup until then
    epoch-<number>/accepted       marker: digests of the accepted setups
    epoch-<number>/<slot>.secret  what a round needs, until it is answered, abandoned or too old
    epoch-<number>/<slot>.masked  marker: id of the round for which a vector was masked
    epoch-<number>/<slot>.voted   marker: the round and the only survivors this site agreed to
    channel-<digest>              marker: the only survivors in any sum of this channel, in whatever slot

A journal that is lost opens nothing that was masked before: its secrets are gone with it. But so is what this site
agreed to: a sum of the same channel over other sites is then one honest site easier to get.

Not defended: whoever restores an older copy of this folder brings back secrets without what was answered with
them, so it belongs in no backup and no snapshot; and a disk that keeps what was overwritten (any SSD may).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medfed.durable_file import create_durably, make_private_folder, sync_folder
from medfed.errors import SecureAggregationError, SiteError

_CHECKSUM_BYTES = 32


class Journal:
    """The journal of one site for one plan. Any number of processes may use it at once.

    Args:
        folder: of this plan alone; made, with mode 0700, when the first epoch begins.

    Raises:
        SiteError: from every method, if the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin_epoch(self, epoch: int, own: bytes) -> None:
        """Begin an epoch newer than every other, and forget the secrets of those.

        Raises:
            SecureAggregationError: if there is one as new.
        """
        newest = self.newest_epoch()
        if newest is not None and epoch <= newest:
            raise SecureAggregationError(
                f"Expected an epoch newer than {newest}, got {epoch}: its keys are made once; begin a newer one."
            )
        folder = self._epoch(epoch)
        with _writing(folder):
            make_private_folder(self._folder)
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                raise SecureAggregationError(f"Expected a new epoch, got {epoch} again; begin a newer one.") from None
            sync_folder(self._folder)
            _write_secret(folder / "own", own)
            for earlier in self._epochs():
                if earlier < epoch:
                    old = self._epoch(earlier)
                    for secret in (*old.glob("*.secret"), old / "own", old / "dealt"):
                        _destroy(secret)

    def newest_epoch(self) -> int | None:
        """Number of the newest epoch that ever began here; None if none did."""
        return max(self._epochs(), default=None)

    def own(self, epoch: int) -> bytes:
        """This site's private key of an epoch that it has not accepted yet.

        Raises:
            SecureAggregationError: if they are not there.
        """
        return _read_secret(self._epoch(epoch) / "own", f"epoch {epoch}")

    def deal(self, epoch: int, secrets: bytes) -> None:
        """Keep the secrets that this site is about to share out, once in an epoch.

        Raises:
            SecureAggregationError: if it shared out some before.
        """
        path = self._epoch(epoch) / "dealt"
        with _writing(path.parent):
            try:
                _write_secret(path, secrets)
            except FileExistsError:
                raise SecureAggregationError(
                    f"Expected one setup of this site in epoch {epoch}, got asked again; begin a newer epoch."
                ) from None
            for made in (path, path.parent):
                sync_folder(made)  # lost, others would be sealed under the same keys and nonces

    def dealt(self, epoch: int) -> bytes:
        """What :meth:`deal` kept.

        Raises:
            SecureAggregationError: if it is not there.
        """
        return _read_secret(self._epoch(epoch) / "dealt", f"epoch {epoch}")

    def accept(self, epoch: int, digests: bytes, secrets: dict[int, bytes]) -> None:
        """Note what was accepted, once, and keep the secrets of each slot.

        Raises:
            SecureAggregationError: if setups were accepted before.
        """
        folder = self._epoch(epoch)
        with _writing(folder):
            if not _mark(folder / "accepted", digests):
                raise SecureAggregationError(
                    f"Expected setups of epoch {epoch} once, got them again: there is one view of them; begin a newer "
                    "epoch."
                )
            for slot, secret in secrets.items():
                _write_secret(self._slot(epoch, slot, "secret"), secret)
            for done in ("own", "dealt"):
                _destroy(folder / done)

    def accepted(self, epoch: int) -> bytes:
        """What :meth:`accept` noted.

        Raises:
            SecureAggregationError: if nothing was accepted.
        """
        path = self._epoch(epoch) / "accepted"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise SecureAggregationError(
                f"Expected accepted setups of epoch {epoch}, got none at this site; begin a newer epoch."
            ) from None

    def secret(self, epoch: int, slot: int) -> bytes:
        """The secrets of a slot.

        Raises:
            SecureAggregationError: if they are used up, closed by a later round, or lost.
        """
        return _read_secret(self._slot(epoch, slot, "secret"), f"slot {slot} of epoch {epoch}")

    def destroy(self, epoch: int, slot: int) -> None:
        """Forget the secrets of a slot."""
        with _writing(self._folder):
            _destroy(self._slot(epoch, slot, "secret"))

    def mark_masked(self, epoch: int, slot: int, round_id: bytes) -> None:
        """Note that a vector is about to leave under the masks of this slot; all earlier slots are closed.

        Raises:
            SecureAggregationError: if one left before: two vectors under one mask would open their difference.
        """
        with _writing(self._folder):
            if not _mark(self._slot(epoch, slot, "masked"), round_id):
                raise SecureAggregationError(
                    f"Expected slot {slot} of epoch {epoch} unused, got it again; a retry needs a new slot."
                )
            for earlier in range(slot):
                _destroy(self._slot(epoch, earlier, "secret"))

    def masked(self, epoch: int, slot: int) -> bytes | None:
        """The round for which a vector was masked in this slot; None if none was."""
        return _read(self._slot(epoch, slot, "masked"))

    def last_masked(self, epoch: int) -> int:
        """The latest slot in which a vector was masked; -1 if none was."""
        return max((int(path.stem) for path in self._epoch(epoch).glob("*.masked")), default=-1)

    def mark_voted(self, epoch: int, slot: int, vote: bytes) -> bool:
        """Note this site's only vote in a slot; False if there is one already, whatever it says."""
        with _writing(self._folder):
            return _mark(self._slot(epoch, slot, "voted"), vote)

    def agree(self, channel: bytes, survivors: bytes) -> bool:
        """Note who is in the sum of a channel, now and for ever; False if others were noted before."""
        with _writing(self._folder):
            path = self._folder / f"channel-{channel.hex()}"
            return _mark(path, survivors) or _read(path) == survivors

    def voted(self, epoch: int, slot: int) -> bytes | None:
        """This site's vote in a slot; None if it has not voted. Empty if a crash came while it was noted."""
        return _read(self._slot(epoch, slot, "voted"))

    def forget_older_than(self, age_s: float) -> None:
        """Destroy the secrets of rounds that were answered longer ago than this: nobody will open them any more."""
        with _writing(self._folder):
            for answered in (*self._folder.glob("epoch-*/*.masked"), *self._folder.glob("epoch-*/*.voted")):
                if time.time() - answered.stat().st_mtime > age_s:
                    _destroy(answered.with_suffix(".secret"))

    def _epochs(self) -> list[int]:
        names = (path.name.removeprefix("epoch-") for path in self._folder.glob("epoch-*"))
        return [int(name) for name in names if name.isdecimal()]

    def _epoch(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch}"

    def _slot(self, epoch: int, slot: int, what: str) -> Path:
        return self._epoch(epoch) / f"{slot}.{what}"


def _mark(path: Path, content: bytes) -> bool:
    """Make a file that was not there, durably; False if it was."""
    try:
        create_durably(path, content, mode=0o600)
    except FileExistsError:
        for made in (path, path.parent):
            sync_folder(made)  # whoever made it may have died before that, and the same answer may be given again
        return False
    return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write_secret(path: Path, content: bytes) -> None:
    """Not synced: a secret that a crash takes ends its epoch, and nothing else."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(hashlib.sha256(content).digest() + content)


def _read_secret(path: Path, what: str) -> bytes:
    data = _read(path)
    if data is None:
        raise SecureAggregationError(
            f"Expected the secrets of {what}, got none: they were used, closed by a later round, or lost; begin a "
            "newer round or epoch."
        )
    content = data[_CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != data[:_CHECKSUM_BYTES]:
        raise SecureAggregationError(f"Expected the secrets of {what} whole, got damaged ones; begin a newer epoch.")
    return content


def _destroy(path: Path) -> None:
    """Overwrite and remove a secret; nothing if it is gone."""
    try:
        with path.open("r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiteError(
            f"Expected to write the journal of secure aggregation in {folder}, got: {error}; mend it and begin a new "
            "epoch."
        ) from None
