"""A round of secure aggregation by Flower's code and by ours: one process per size, the two in turn.

``python -m simulation.bench.secagg_steps WORKLOAD`` prints a line of JSON for every part that was run, with its
processor time, and one for each arm: its bytes, its messages, and how far its mean is from the right one. WORKLOAD
is JSON, the fields of :class:`Workload`. The parts are:

* ``client``: what one site does in a round in which nobody drops out, beyond training: from its update as a float32
  vector, and the server's messages, to its own messages. Ours includes the check of the norm, all parsing and
  signatures, the journal on disk, and a share of the setup, which serves 32 rounds.
* ``server adds``: one masked vector is taken into the sum; ours with its hash and signature checked.
* ``server opens``: from the last masked vector to the mean as floats; ours with every site's signature and every
  secret checked.

Both arms use the complete graph and the same threshold. See :mod:`simulation.bench.secagg_flower` for the other.

Legend: P parameters.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from medfed.consortium import Quorum
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.encoding import FixedPoint
from privacy.secure_aggregation.identity import Identity
from privacy.secure_aggregation.messages import Masked, OpenRequest, Relay, Roster, RoundStart, Shares
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.server import Epoch, SecureSum, SetupPhase
from simulation.bench.cpu_clock import CpuClock
from simulation.bench.secagg_flower import FlowerArm

ROUNDS_PER_EPOCH: Final = 32
CLIP_NORM: Final = 1.0
UPDATE_NORM: Final = 0.5
_EPOCH: Final = 1
_MODEL: Final = bytes(32)


@dataclass(frozen=True)
class Workload:
    """What one process measures.

    Attributes:
        num_sites: n; a third of them may collude, and the threshold is the smallest that then holds.
        num_parameters: P.
        repeats: rounds of each arm.
        ours_alone: only our client.
    """

    num_sites: int
    num_parameters: int
    repeats: int
    ours_alone: bool = False


class Arm(Protocol):
    """One implementation."""

    name: str
    upload_bytes: float
    num_messages: int

    def client(self) -> CpuClock:
        """One site's round."""

    def server_adds(self) -> CpuClock:
        """One vector of the round that :meth:`client` was in."""

    def server_opens(self) -> tuple[CpuClock, NDArray[np.float64]]:
        """The end of that round, and the mean update."""


class MedfedArm:
    """Rounds of :mod:`privacy.secure_aggregation` over sites whose update is ``update_P``, all the same.

    Attributes:
        upload_bytes: what one site sends in a round, with its share of the setup; set by :meth:`client`.
        num_messages: in a round in which nobody drops out; set by :meth:`client`.
        setup_s: processor time of one site's part in the setup of an epoch; set by :meth:`begin`.
        setup_bytes: what one site sends for it, in three messages; set by :meth:`begin`.
    """

    name = "medfed"

    def __init__(self, plan: SecureAggregationPlan, clients: dict[str, SecureClient], update_P: NDArray[np.float32]):
        self.upload_bytes = 0.0
        self.num_messages = 0
        self.setup_s = 0.0
        self.setup_bytes = 0
        self._plan = plan
        self._clients = clients
        self._update_P = update_P
        self._me = plan.sites[0]
        self._fixed_point = FixedPoint(CLIP_NORM, len(clients))
        self._phase = SetupPhase(plan, _EPOCH)
        self._start = RoundStart(plan.digest, _EPOCH, -1, bytes(32), _MODEL, plan.sites)
        self._masked = self._shares = b""
        self._epoch: Epoch | None = None
        self._server: SecureSum | None = None

    @classmethod
    def of(cls, num_sites: int, update_P: NDArray[np.float32], folder: Path) -> MedfedArm:
        """An arm with journals in ``folder``."""
        identities = {f"site-{number}": Identity(number.to_bytes(32, "big")) for number in range(num_sites)}
        quorum = quorum_of(num_sites)
        plan = SecureAggregationPlan(
            study_digest=bytes(32),
            scope="benchmark",
            members=tuple(identity.member(site) for site, identity in identities.items()),
            threshold=quorum.threshold,
            max_colluding=quorum.max_colluding,
            min_sites=quorum.min_sites,
            rounds_per_epoch=ROUNDS_PER_EPOCH,
        )
        clients = {site: SecureClient(site, identity, plan, folder / site) for site, identity in identities.items()}
        return cls(plan, clients, update_P)

    def begin(self) -> None:
        """The setup of an epoch, as far as the site under test is concerned: the others have yet to accept it."""
        clock = CpuClock()
        for site in self._plan.sites[1:]:
            self._phase.advertise(self._clients[site].advertise(_EPOCH))
        with clock:
            advertised = self._clients[self._me].advertise(_EPOCH)
            advertised_data = advertised.to_bytes()
        self._phase.advertise(advertised)
        roster = self._phase.roster.to_bytes()
        for site in self._plan.sites[1:]:
            self._phase.add(self._clients[site].setup(self._phase.roster))
        with clock:
            setup = self._clients[self._me].setup(Roster.parse(roster))
            setup_data = setup.to_bytes()
        self._phase.add(setup)
        relay = self._phase.relay_to(self._me).to_bytes()
        with clock:
            acceptance = self._clients[self._me].accept(Relay.parse(relay))
            acceptance_data = acceptance.to_bytes()
        self._phase.accept(acceptance)
        self.setup_s = clock.cpu_s
        self.setup_bytes = len(advertised_data) + len(setup_data) + len(acceptance_data)

    def everybody_accepts(self) -> None:
        """The rest of the setup; needed for :meth:`server_adds`."""
        for site in self._plan.sites[1:]:
            self._phase.accept(self._clients[site].accept(self._phase.relay_to(site)))
        self._epoch = self._phase.finish()

    def client(self) -> CpuClock:
        """One site in the next slot, with its share of the setup."""
        plan, me = self._plan, self._clients[self._me]
        slot = self._start.slot + 1
        channel = slot.to_bytes(32, "big")  # each round sums something else
        self._start = RoundStart(plan.digest, _EPOCH, slot, channel, _MODEL, plan.sites)
        start, request = self._start.to_bytes(), OpenRequest(self._start, plan.sites).to_bytes()
        clock = CpuClock()
        with clock:
            encoded_P = self._fixed_point.encode(self._update_P)
            masked = me.mask(RoundStart.parse(start), encoded_P, channel=channel, model=_MODEL)
            self._masked = masked.to_bytes()
        with clock:
            self._shares = me.open(OpenRequest.parse(request)).to_bytes()
        messages = (self._masked, self._shares)
        self.num_messages = len(messages)
        self.upload_bytes = sum(map(len, messages)) + self.setup_bytes / ROUNDS_PER_EPOCH
        clock.cpu_s += self.setup_s / ROUNDS_PER_EPOCH
        return clock

    def server_adds(self) -> CpuClock:
        """One vector, after those of all the others."""
        assert self._epoch is not None
        server = SecureSum(self._epoch, self._start, num_elements=len(self._update_P))
        encoded_P = self._fixed_point.encode(self._update_P)
        for site in self._plan.sites[1:]:
            server.add(self._clients[site].mask(self._start, encoded_P, channel=self._start.channel, model=_MODEL))
        clock = CpuClock()
        with clock:
            server.add(Masked.parse(self._masked))
        self._server = server
        return clock

    def server_opens(self) -> tuple[CpuClock, NDArray[np.float64]]:
        """From the vectors of :meth:`server_adds` to the mean."""
        assert self._server is not None
        clock = CpuClock()
        with clock:
            self._server.close()
            request = self._server.open_request().to_bytes()
        others = [self._clients[site].open(OpenRequest.parse(request)).to_bytes() for site in self._plan.sites[1:]]
        num_sites = len(self._plan.sites)
        with clock:
            for shares in (self._shares, *others):
                self._server.add_shares(Shares.parse(shares))
            sum_P, _ = self._server.opened()
            mean_P = self._fixed_point.decode(sum_P, num_summands=num_sites)
            mean_P /= num_sites
        return clock, mean_P


def quorum_of(num_sites: int) -> Quorum:
    """The numbers of both arms: a third of the sites may collude."""
    return Quorum.of(num_sites=num_sites, max_colluding=num_sites // 3)


def run(work: Workload) -> None:
    """Run the arms in turn, the first of each repeat the second of the next, and print what they took."""
    update_P = _update(work.num_parameters)
    with tempfile.TemporaryDirectory() as folder:
        ours = MedfedArm.of(work.num_sites, update_P, Path(folder))
        ours.begin()
        arms: list[Arm] = [ours]
        if not work.ours_alone:
            ours.everybody_accepts()
            arms.append(FlowerArm(work.num_sites, quorum_of(work.num_sites).threshold, update_P))
        errors = dict.fromkeys((arm.name for arm in arms), 0.0)
        for repeat in range(work.repeats):
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                _print({"arm": arm.name, "part": "client", "cpu_s": arm.client().cpu_s})
            if work.ours_alone:
                continue
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                _print({"arm": arm.name, "part": "server adds", "cpu_s": arm.server_adds().cpu_s})
                opened, mean_P = arm.server_opens()
                _print({"arm": arm.name, "part": "server opens", "cpu_s": opened.cpu_s})
                errors[arm.name] = max(errors[arm.name], float(np.abs(mean_P - update_P).max()))
        for arm in arms:
            facts = {"upload_bytes": arm.upload_bytes, "num_messages": arm.num_messages, "error": errors[arm.name]}
            _print({"arm": arm.name, "setup_s": ours.setup_s, "setup_bytes": ours.setup_bytes, **facts})


def _update(num_parameters: int) -> NDArray[np.float32]:
    vector_P = np.random.default_rng(0).standard_normal(num_parameters)
    return (vector_P * (UPDATE_NORM / np.linalg.norm(vector_P))).astype(np.float32)


def _print(facts: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run(Workload(**json.loads(sys.argv[1])))
