"""The message a site is working on, on disk before the server hears that it arrived.

From then on the server does not send it again. So a site that is killed finds it here when it starts, does it once
more, and answers the same message: a crash costs time and nothing else. A message that ended the process twice is
answered with an error instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.durable_file import make_private_folder, replace_durably, sync_folder
from medfed.errors import MessageError, SiteError
from medfed.framed_file import DamagedFileError, pack, unpack

if TYPE_CHECKING:
    from client.flower_link import Delivery

MAX_TRIES = 2
"""A message that was begun this often and never answered is not begun again."""


@dataclass(frozen=True)
class Pending:
    """A message that was begun.

    Attributes:
        delivery: the message.
        tries: how often it was begun, this time included.
    """

    delivery: Delivery
    tries: int


class Inbox:
    """One file: a site works on one message at a time.

    Args:
        folder: where it lies; made for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        make_private_folder(folder)
        self._path = folder / "message"

    def begin(self, delivery: Delivery, tries: int = 1) -> Pending:
        """Note durably that work on a message begins.

        Raises:
            SiteError: if it cannot be written: then it must not be confirmed.
        """
        facts = {
            "message_id": delivery.message_id,
            "run_id": delivery.run_id,
            "created_at": delivery.created_at,
            "ttl_s": delivery.ttl_s,
            "tries": tries,
        }
        try:
            replace_durably(self._path, pack(facts, delivery.objects), mode=0o600)
        except OSError as error:
            raise SiteError(f"Expected to write {self._path}, got: {error}; make room, nothing is lost.") from None
        return Pending(delivery, tries)

    def pending(self) -> Pending | None:
        """The message that was begun and not finished, begun once more; None if there is none.

        A file that is not whole was never confirmed to the server, which sends its message again: it is dropped.
        """
        from client.flower_link import Delivery

        try:
            facts, objects = unpack(self._path.read_bytes())
            delivery = Delivery(
                message_id=str(facts["message_id"]),
                run_id=int(facts["run_id"]),
                created_at=float(facts["created_at"]),
                ttl_s=float(facts["ttl_s"]),
                objects=objects,
            )
            tries = int(facts["tries"]) + 1
        except FileNotFoundError:
            return None
        except (DamagedFileError, KeyError, TypeError, ValueError, OverflowError, MessageError):
            self.finish()
            return None
        return self.begin(delivery, tries)

    def finish(self) -> None:
        """Forget the message: it was answered, or nobody waits for an answer."""
        self._path.unlink(missing_ok=True)
        sync_folder(self._path.parent)
