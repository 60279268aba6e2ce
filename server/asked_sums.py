"""Sums that were asked for since the last checkpoint: a server that was killed asks the very same again.

A site answers a question that it answered before with the bytes that it stored: nothing trains, nothing is drawn, and
nothing is charged. So a round is paid for once, as long as its question stays the same. With new keys it would be
another question, with a vector under new masks, new noise and, where noise is shared, a new charge.

Nothing here protects the sites. A server may ask what it likes as often as it likes; what it gets for the same question
it has already. The file holds what the server was told by all sites: public keys, digests and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.durable_file import replace_durably
from medfed.errors import CheckpointError, SecureAggregationError
from medfed.framed_file import DamagedFileError, pack, unpack
from privacy.secure_aggregation.messages import RoundStart, SetupBody
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.server import Epoch

ASKED_SUMS = "asked-sums"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class AskedSum:
    """A sum for which vectors were asked for, or are about to be.

    Attributes:
        round: of the study.
        epoch: whose keys serve it.
        start: as it was sent.
        survivors: the sites that were named as being in it; empty before that. Others cannot be named any more.
    """

    round: int
    epoch: Epoch
    start: RoundStart
    survivors: tuple[str, ...] = ()


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    round: Annotated[int, Field(ge=0)]
    survivors: list[str]


class AskedSums:
    """The sums of one run that are in no checkpoint yet, on disk before they are asked for.

    Args:
        path: of the file; it need not be there.
        plan: of the run. What was asked under another plan is not asked again.

    Raises:
        CheckpointError: if the file is damaged.
    """

    def __init__(self, path: Path, plan: SecureAggregationPlan) -> None:
        self._path = path
        self._plan = plan
        self._by_channel: dict[bytes, AskedSum] = {}
        try:
            facts, blobs = unpack(path.read_bytes())
            sums = _read(facts, blobs, plan)
        except FileNotFoundError:
            return
        except (DamagedFileError, KeyError, TypeError, ValidationError, SecureAggregationError) as error:
            raise CheckpointError(
                f"Expected the sums that were asked for at {path}, got {type(error).__name__}; restore the file, or "
                "remove it: then what was asked for since the last checkpoint is asked for anew, and charged again."
            ) from None
        self._by_channel = {one.start.channel: one for one in sums}

    def find(self, *, channel: bytes, model: bytes) -> AskedSum | None:
        """What was asked for these vectors of this model; None if nothing was."""
        asked = self._by_channel.get(channel)
        return asked if asked is not None and asked.start.model == model else None

    def note(self, asked: AskedSum) -> None:
        """Note durably what is about to be asked, or who is about to be named; forget earlier rounds.

        Raises:
            CheckpointError: if it cannot be written: then it must not be asked.
        """
        kept = {channel: one for channel, one in self._by_channel.items() if one.round >= asked.round}
        self._by_channel = {**kept, asked.start.channel: asked}
        self._write()

    def forget(self, *, channel: bytes, model: bytes) -> None:
        """Ask this no more, if it was asked: sites will not do their part in it."""
        if self.find(channel=channel, model=model) is not None:
            del self._by_channel[channel]
            self._write()

    def _write(self) -> None:
        sums = list(self._by_channel.values())
        facts = {"sums": [{"round": one.round, "survivors": list(one.survivors)} for one in sums]}
        blobs = {f"start:{place}": one.start.to_bytes() for place, one in enumerate(sums)}
        for one in sums:
            blobs |= {f"setup:{one.epoch.number}:{site}": body.to_bytes() for site, body in one.epoch.setups.items()}
        try:
            replace_durably(self._path, pack(facts, blobs), mode=0o600)
        except OSError as error:
            raise CheckpointError(
                f"Expected to note at {self._path} what is asked for, got: {error}; make room, and resume."
            ) from None


def _read(facts: Mapping[str, Any], blobs: Mapping[str, bytes], plan: SecureAggregationPlan) -> list[AskedSum]:
    sums = []
    for place, stored in enumerate(facts["sums"]):
        fact = _Fact.model_validate(stored)
        start = RoundStart.parse(blobs[f"start:{place}"])
        if start.plan != plan.digest:
            continue
        prefix = f"setup:{start.epoch}:"
        bodies = {name.removeprefix(prefix): body for name, body in blobs.items() if name.startswith(prefix)}
        setups = {site: SetupBody.parse(bodies[site]) for site in plan.in_order(set(bodies))}
        digests = {site: sha256(bodies[site]).digest() for site in setups}
        if not set(start.sites) <= set(setups):
            raise KeyError("setups of the sites of a sum")
        sums.append(AskedSum(fact.round, Epoch(plan, start.epoch, setups, digests, {}), start, tuple(fact.survivors)))
    return sums
