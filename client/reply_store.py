"""What a site answered, so that the same question gets the same bytes without training or spending again.

A question is what was asked and what was sent along: action, study, round, attempt, scope, adapter, and the message of
secure aggregation. A few answers are kept, the newest; they hold what has left the site already, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import SiteError
from medfed.framed_file import DamagedFileError, pack, unpack
from medfed.messages import Fields

_log = logging.getLogger("medfed.client.reply_store")

_KEPT = 12
"""Answers kept: a round has at most twelve questions, and a server that was set back asks for its last round again.

An update under masks takes three for keys, and one each for its vector, the vote and the shares; so do scores."""

_SUFFIX = ".reply"


def question_digest(action: str, fields: Fields) -> str:
    """SHA-256 of what was asked, hexadecimal: equal for equal questions, whenever and by whatever run they come."""
    digest = hashlib.sha256(hashlib.sha256(action.encode()).digest())
    for name in sorted(fields):
        value = fields[name]
        content = value.encode() if isinstance(value, str) else value
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return digest.hexdigest()


class ReplyStore:
    """Answers of one site.

    Args:
        folder: where they lie; made for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        make_private_folder(folder)
        self._folder = folder

    def stored(self, question: str) -> Fields | None:
        """The answer to a question, or None. A damaged one counts as none, and is asked for anew."""
        try:
            facts, blobs = unpack(self._path(question).read_bytes())
            header = facts["header"]
        except FileNotFoundError:
            return None
        except (DamagedFileError, KeyError):
            _log.warning("event=damaged_reply question=%s", question[:16])
            return None
        return {"header": str(header), **blobs}

    def keep(self, question: str, reply: Fields) -> None:
        """Keep an answer, durably; forget the oldest ones.

        Raises:
            SiteError: if it cannot be written: then it must not be sent.
        """
        blobs = {name: value for name, value in reply.items() if isinstance(value, bytes)}
        try:
            replace_durably(self._path(question), pack({"header": reply["header"]}, blobs), mode=0o600)
        except OSError as error:
            raise SiteError(f"Expected to keep a reply in {self._folder}, got: {error}; make room.") from None
        kept = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-_KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, question: str) -> Path:
        return self._folder / f"{question}{_SUFFIX}"
