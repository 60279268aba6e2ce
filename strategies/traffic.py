"""Bytes that a study moves between its server and a site, from its numbers alone."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from medfed.payload import HEADER_BYTES
from medfed.study import StudyConfig
from privacy.secure_aggregation.framing import number
from privacy.secure_aggregation.messages import (
    SHARE_BYTES,
    Acceptance,
    Advertised,
    Masked,
    OpenRequest,
    Relay,
    RelayedSetup,
    Roster,
    RoundStart,
    Setup,
    SetupBody,
    Shares,
)
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel

_ELEMENT_BYTES = 4  # float32 in an adapter, uint32 under masks
_DIGEST, _KEY, _SIGNATURE, _BOX_TAG = bytes(32), bytes(32), bytes(64), bytes(16)


class Traffic(BaseModel):
    """Bytes between the server and a site: adapter, study and what is said under masks; for the longest name.

    Not counted: headers of some hundred bytes, and the transport's envelopes. A round in which nobody is missing.

    Attributes:
        round_up: site to server, each training round.
        round_down: server to site, likewise; in the last round, as rules with fresh frames tell more and more.
        keys_up: site to server, once for so many sums as ``sums_per_keys``; 0 without secure aggregation.
        keys_down: server to site, likewise.
        sums_per_keys: training rounds and evaluations that one exchange of keys serves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_up: int
    round_down: int
    keys_up: int
    keys_down: int
    sums_per_keys: int


def traffic_of(study: StudyConfig) -> Traffic:
    """Bytes of a training round and of an exchange of keys.

    Args:
        study: resolved, with its noise; where it names no keys, as long as if it did.
    """
    phase = strategy_of(study).plan(1)
    adapter = HEADER_BYTES + _ELEMENT_BYTES * study.resolved_manifest.num_elements
    told = strategy_of(study).plan(study.rounds.num_rounds).broadcast
    if told is not None:
        adapter += HEADER_BYTES + _ELEMENT_BYTES * told.num_elements
    if not study.sums_securely:
        up = HEADER_BYTES + _ELEMENT_BYTES * strategy_of(study).num_uploaded
        return Traffic(round_up=up, round_down=adapter + len(study.canonical), keys_up=0, keys_down=0, sums_per_keys=0)
    some_key = "0" * 64
    keyed = [site.model_copy(update={"signing_key": site.signing_key or some_key}) for site in study.sites]
    described = len(study.replace(sites=tuple(keyed)).canonical)
    assert study.secure_aggregation is not None
    channel, sums = SecureChannel.training(study, 1, phase), study.secure_aggregation.rounds_per_epoch
    if channel.study.privacy is not None and channel.study.privacy.trust == "consortium":
        channel.fitting(np.empty(0, dtype=np.int64))  # refuses noise that 32 bits do not hold
    sites, longest = study.site_names, max(study.site_names, key=len)
    start = RoundStart(_DIGEST, 0, 0, _DIGEST, _DIGEST, sites)
    masked = len(Masked(longest, _DIGEST, _SIGNATURE, b"").to_bytes()) + _ELEMENT_BYTES * channel.num_elements
    shares = len(Shares(longest, _DIGEST, (bytes(SHARE_BYTES),) * len(sites), _SIGNATURE).to_bytes())
    advertised = {site: Advertised(site, _DIGEST, 0, _KEY, _SIGNATURE) for site in sites}
    roster = Roster(_DIGEST, 0, tuple(advertised.values())).to_bytes()
    box = bytes(2 * SHARE_BYTES * sums) + _BOX_TAG
    bodies = {
        site: SetupBody(
            site, _DIGEST, 0, _DIGEST, (_KEY,) * sums, (_DIGEST,) * sums, (_DIGEST,) * len(sites)
        ).to_bytes()
        for site in sites
    }
    setup = Setup(bodies[longest], _SIGNATURE, (box,) * len(sites)).to_bytes()
    relay = Relay(_DIGEST, 0, tuple(RelayedSetup(bodies[site], _SIGNATURE, box) for site in sites)).to_bytes()
    acceptance = Acceptance(longest, 0, (), _SIGNATURE).to_bytes()
    return Traffic(
        round_up=masked + shares,
        round_down=adapter + 2 * described + len(start.to_bytes()) + len(OpenRequest(start, sites).to_bytes()),
        keys_up=len(advertised[longest].to_bytes()) + len(setup) + len(acceptance),
        keys_down=3 * described + len(number(0)) + len(roster) + len(relay),
        sums_per_keys=sums,
    )
