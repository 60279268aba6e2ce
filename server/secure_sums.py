"""Secure sums over a Grid: setup of an epoch, one masked vector per site, agreement on who is missing, opening.

The protocol is in :mod:`privacy.secure_aggregation`; here are its messages, sent to named sites and taken back.
A round in which nobody is missing costs each site two messages, the vector and its shares; otherwise a vote more.
An epoch's keys are made once for many rounds, and anew when a site was missing, so that it can come back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from medfed.errors import LostRoundError, RoundError, SecureAggregationError
from medfed.messages import Action
from medfed.study import StudyConfig
from privacy.secure_aggregation.framing import number
from privacy.secure_aggregation.messages import Acceptance, Advertised, Masked, Setup, Shares, Vote
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.server import Epoch, SecureSum, SetupPhase
from server.exchange import Exchange, ModelPayload
from strategies import secure_channel
from strategies.secure_channel import SecureChannel

_log = logging.getLogger("medfed.server.secure_sums")

T = TypeVar("T")

_NO_MODEL = ModelPayload()


class Ask(Protocol):
    """Sends an action to named sites and takes back what they reply."""

    def __call__(
        self, action: Action, sites: Sequence[str], number: int, model: ModelPayload, secure: Mapping[str, bytes]
    ) -> Exchange:
        """Replies that came before the deadline, and why the others did not."""


@dataclass(frozen=True)
class SummedRound:
    """A sum that was opened.

    Attributes:
        sum: what it says.
        sites: whose vectors are in it, in the order of the study.
        failures: why others are not, by site.
    """

    sum: secure_channel.SecureSum
    sites: tuple[str, ...]
    failures: dict[str, str]


class SecureSums:
    """The secure sums of one run.

    Args:
        study: resolved, with secure aggregation.
        scope: the federation.
        ask: reaches the sites.
        quorum: vectors without which a round is given up before it is opened.
    """

    def __init__(self, study: StudyConfig, scope: str, ask: Ask, *, quorum: int) -> None:
        self._plan = SecureAggregationPlan.of_study(study, scope)
        self._ask = ask
        self._quorum = max(quorum, self._plan.min_sites)
        self._epoch: Epoch | None = None
        self._next_slot = 0
        self._named_survivors = False

    def sum(self, action: Action, channel: SecureChannel, model: ModelPayload) -> SummedRound:
        """Have every site act on ``model`` and open the sum of their vectors.

        Args:
            action: ``train`` or ``evaluate``.
            channel: what is summed.
            model: what they put into it.

        Sites agree to one set of survivors in a round, however often it is tried: the difference of two sums would
        be one site's part. So once survivors were named, another try must find the same ones.

        Raises:
            RoundError: if too few sites sent a vector; nothing was opened, and the run can be resumed. Names who
                failed and why.
            LostRoundError: if survivors were named and twice too few of them helped to open the sum: this round's
                sum is lost, and the next round can begin.
        """
        for is_last in (False, True):
            failures: dict[str, str] = {}
            try:
                return self._summed(action, channel, model, failures)
            except SecureAggregationError as error:
                self._epoch = None
                reasons = "; ".join(f"{site}: {why}" for site, why in failures.items())
                told = f"Round {channel.round}: {error}{f' [{reasons}]' if reasons else ''}"
                if not self._named_survivors:
                    raise RoundError(f"{told} Correct that and resume.") from None
                if is_last:
                    raise LostRoundError(f"{told} Correct that before the next round.") from None
                _log.warning("event=opened_too_little round=%d", channel.round)
        raise AssertionError  # the last try returns or raises

    def _summed(
        self, action: Action, channel: SecureChannel, model: ModelPayload, failures: dict[str, str]
    ) -> SummedRound:
        self._named_survivors = False
        if self._epoch is None or self._next_slot == self._plan.rounds_per_epoch:
            self._epoch = self._begin_epoch(channel.round, failures)
        epoch = self._epoch
        start = epoch.start(self._next_slot, channel=channel.digest, model=model.digest, sites=tuple(epoch.setups))
        self._next_slot += 1
        summing = SecureSum(epoch, start, num_elements=channel.num_elements)
        begin = start.to_bytes()
        self._collect(action, start.sites, channel.round, begin, Masked.parse, summing.add, failures, model)
        if len(summing.survivors) < self._quorum:
            raise SecureAggregationError(
                f"Expected vectors of at least {self._quorum} sites, got {len(summing.survivors)}; the round is given "
                "up, and nothing of it was opened."
            )
        summing.close()
        self._named_survivors = True
        if summing.needs_votes:
            request = summing.vote_request().to_bytes()
            self._collect("secure_vote", start.sites, channel.round, request, Vote.parse, summing.add_vote, failures)
        request = summing.open_request().to_bytes()
        self._collect("secure_open", start.sites, channel.round, request, Shares.parse, summing.add_shares, failures)
        total_P, blamed = summing.opened()
        for site in blamed:
            failures[site] = "it sent shares that do not fit what it was dealt"
            _log.warning("event=bad_share round=%d site=%s", channel.round, site)
        if failures:
            self._epoch = None  # keys are made anew, so that whoever was missing can come back
        return SummedRound(channel.opened(total_P, summing.survivors), summing.survivors, failures)

    def _begin_epoch(self, round_number: int, failures: dict[str, str]) -> Epoch:
        """Keys of all sites that are there, for ``rounds_per_epoch`` sums."""
        # Sites take an epoch newer than any before; a server that lost its state need not know which that was.
        epoch = time.time_ns() // 1_000_000
        phase = SetupPhase(self._plan, epoch)
        sites, asked = self._plan.sites, number(epoch)
        self._collect("secure_advertise", sites, round_number, asked, Advertised.parse, phase.advertise, failures)
        roster = phase.roster
        self._collect("secure_setup", roster.sites, round_number, roster.to_bytes(), Setup.parse, phase.add, failures)
        there = [site for site in roster.sites if site not in failures]
        relays = {site: phase.relay_to(site).to_bytes() for site in there}
        self._collect("secure_accept", there, round_number, relays, Acceptance.parse, phase.accept, failures)
        self._next_slot = 0
        begun = phase.finish()
        for site, by in begun.complaints.items():
            failures[site] = f"its keys were refused by {', '.join(by)}"
        _log.info("event=epoch_begun epoch=%d sites=%d", epoch, len(begun.setups))
        return begun

    def _collect(
        self,
        action: Action,
        sites: Sequence[str],
        round_number: int,
        secure: bytes | Mapping[str, bytes],
        parse: Callable[[bytes], T],
        take: Callable[[T], object],
        failures: dict[str, str],
        model: ModelPayload = _NO_MODEL,
    ) -> None:
        """Send one message of the protocol to each site, and take what comes back; note whose does not."""
        by_site = dict.fromkeys(sites, secure) if isinstance(secure, bytes) else dict(secure)
        answered = self._ask(action, sites, round_number, model, by_site)
        for site in sites:
            if site not in answered.replies:
                failures[site] = answered.failures.get(site, "no such node")
                continue
            try:
                take(parse(answered.replies[site].secure))
            except SecureAggregationError as error:
                failures[site] = str(error)
