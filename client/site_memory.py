"""What a site remembers between the rounds of a study: its own tensors, and what its local method keeps.

One file per round and federation, and the last two are kept: a run that was killed and resumed asks for a round a
second time, and must find what the site remembered before the first. Files hold what training made of patients'
images. They never leave the site, and are for the owner alone. A file is the SHA-256 of what follows, and tensors
(safetensors).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import SiteError

_KEPT_ROUNDS = 2
_FILE = re.compile(r"round-(\d{6})\.memory")
_DIGEST_BYTES = 32


class SiteMemory:
    """The memory of one site for one federation of one study.

    Args:
        folder: of this federation; made when the first round is remembered.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, round_number: int) -> dict[str, Tensor]:
        """What was remembered last before a round; empty if nothing was.

        Raises:
            SiteError: if the file is damaged, or what was remembered is forgotten already.
        """
        rounds = self._rounds()
        found = max((number for number in rounds if number < round_number), default=None)
        if found is None and round_number > 1 and len(rounds) >= _KEPT_ROUNDS:
            raise SiteError(
                f"Expected what the site remembered before round {round_number} in {self._folder}, got rounds "
                f"{min(rounds)} to {max(rounds)} alone: the server was set back too far. Start the study anew."
            )
        return self._read(found)

    def after(self, round_number: int) -> dict[str, Tensor]:
        """What was remembered last up to and including a round; empty if nothing was.

        Raises:
            SiteError: if the file is damaged.
        """
        return self.before(round_number + 1)

    def remember(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors after a round, durably, in place of what an earlier try of it left; forget old rounds."""
        make_private_folder(self._folder)
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        replace_durably(self._path(round_number), hashlib.sha256(data).digest() + data, mode=0o600)
        for number in sorted(self._rounds()):
            if number > round_number:  # of a run that went further, and was set back
                self._path(number).unlink()
        for number in sorted(self._rounds())[:-_KEPT_ROUNDS]:
            self._path(number).unlink()

    def _read(self, round_number: int | None) -> dict[str, Tensor]:
        if round_number is None:
            return {}
        path = self._path(round_number)
        try:
            stored = path.read_bytes()
            digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
            if hashlib.sha256(data).digest() == digest:
                return load(data)
            why: object = "other bytes"
        except (OSError, SafetensorError, KeyError) as error:  # the last for dtypes that torch has and its reader not
            why = error
        raise SiteError(f"Expected what the site remembers at {path}, got: {why}; restore the file.")

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return [int(match[1]) for path in self._folder.iterdir() if (match := _FILE.fullmatch(path.name))]

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:06d}.memory"
