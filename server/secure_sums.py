"""Secure sums over a Grid: setup of an epoch, one masked vector per site, agreement on who is missing, opening.

The protocol is in :mod:`privacy.secure_aggregation`; here are its messages, sent to named sites and taken back.
A round in which nobody is missing costs each site two messages, the vector and its shares; otherwise a vote more.
An epoch's keys are made once for many rounds, and anew when a site was missing, so that it can come back. What was
asked is written down (:mod:`server.asked_sums`), so that a server that was killed asks the same again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from medfed.errors import LostRoundError, RoundError, SecureAggregationError
from medfed.messages import Action
from medfed.study import StudyConfig
from privacy.secure_aggregation.framing import number
from privacy.secure_aggregation.messages import Acceptance, Advertised, Masked, Setup, Shares, Vote
from privacy.secure_aggregation.plan import SecureAggregationPlan
from privacy.secure_aggregation.server import Epoch, SecureSum, SetupPhase
from server.asked_sums import AskedSum, AskedSums
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


@dataclass
class _Try:
    """What came of one try to open a sum.

    Attributes:
        failures: why a site did not do its part, by site.
        was_asked_before: whether its vectors were asked for in an earlier try, and asked for again.
        named_survivors: whether sites were told who is in the sum: another try must find the same ones.
        is_hopeless: whether a site gave an answer to which it will hold, however often it is asked.
    """

    failures: dict[str, str] = field(default_factory=dict)
    was_asked_before: bool = False
    named_survivors: bool = False
    is_hopeless: bool = False


class SecureSums:
    """The secure sums of one run.

    Args:
        study: resolved, with secure aggregation.
        scope: the federation.
        ask: reaches the sites.
        quorum: vectors without which a round is given up before it is opened.
        asked_sums: file of what was asked since the last checkpoint, for sites that answer the same question with the
            same bytes. None if they do not, as in simulations: then every try makes new keys.
    """

    def __init__(
        self, study: StudyConfig, scope: str, ask: Ask, *, quorum: int, asked_sums: Path | None = None
    ) -> None:
        self._plan = SecureAggregationPlan.of_study(study, scope)
        self._ask = ask
        self._quorum = max(quorum, self._plan.min_sites)
        self._asked_sums = None if asked_sums is None else AskedSums(asked_sums, self._plan)
        self._epoch: Epoch | None = None
        self._next_slot = 0

    def sum(self, action: Action, channel: SecureChannel, model: ModelPayload) -> SummedRound:
        """Have every site act on ``model`` and open the sum of their vectors.

        Args:
            action: ``train`` or ``evaluate``.
            channel: what is summed.
            model: what they put into it.

        Sites agree to one set of survivors in a round, however often it is tried: the difference of two sums would
        be one site's part. So once survivors were named, another try must find the same ones.

        What was asked before, by this process or one that was killed, is asked again in the same words, once more for
        each time that it failed: sites answer from what they stored, at no cost. It is given up when a site refuses it
        for good, or when it failed for the second time. Then keys are made anew, and sites are asked for new vectors.

        Raises:
            RoundError: if too few sites sent a vector; nothing was opened, and the run can be resumed. Names who
                failed and why.
            LostRoundError: if survivors were named and twice too few of them helped to open the sum: this round's
                sum is lost, and the next round can begin.
            CheckpointError: if what is about to be asked cannot be written down; it was not asked.
        """
        is_last = False
        while True:
            this = _Try()
            try:
                return self._summed(action, channel, model, this)
            except SecureAggregationError as error:
                self._epoch = None
                reasons = "; ".join(f"{site}: {why}" for site, why in this.failures.items())
                told = f"Round {channel.round}: {error}{f' [{reasons}]' if reasons else ''}"
                if this.is_hopeless or (this.was_asked_before and not this.named_survivors):
                    self._forget(channel, model)
                if this.named_survivors:
                    if is_last:
                        raise LostRoundError(f"{told} Correct that before the next round.") from None
                    is_last = True
                    _log.warning("event=opened_too_little round=%d", channel.round)
                elif this.was_asked_before and this.is_hopeless:
                    _log.warning("event=asked_anew round=%d", channel.round)
                else:
                    raise RoundError(f"{told} Correct that and resume.") from None

    def _summed(self, action: Action, channel: SecureChannel, model: ModelPayload, this: _Try) -> SummedRound:
        asked = self._asked(channel, model, this)
        epoch, start = asked.epoch, asked.start
        summing = SecureSum(epoch, start, num_elements=channel.num_elements)
        begin, wanted = start.to_bytes(), asked.survivors or start.sites
        self._collect(action, wanted, channel.round, begin, Masked.parse, summing.add, this, model)
        if asked.survivors and summing.survivors != asked.survivors:
            raise SecureAggregationError(
                f"Expected the vectors of {', '.join(asked.survivors)}, who were named as being in the sum, got those "
                f"of {', '.join(summing.survivors) or 'nobody'}."
            )
        if len(summing.survivors) < self._quorum:
            raise SecureAggregationError(
                f"Expected vectors of at least {self._quorum} sites, got {len(summing.survivors)}; the round is given "
                "up, and nothing of it was opened."
            )
        summing.close()
        self._note(replace(asked, survivors=summing.survivors))
        this.named_survivors = True
        if summing.needs_votes:
            request = summing.vote_request().to_bytes()
            self._collect("secure_vote", start.sites, channel.round, request, Vote.parse, summing.add_vote, this)
        request = summing.open_request().to_bytes()
        self._collect("secure_open", start.sites, channel.round, request, Shares.parse, summing.add_shares, this)
        total_P, blamed = summing.opened()
        for site in blamed:
            this.failures[site] = "it sent shares that do not fit what it was dealt"
            _log.warning("event=bad_share round=%d site=%s", channel.round, site)
        if this.failures:
            self._epoch = None  # keys are made anew, so that whoever was missing can come back
        return SummedRound(channel.opened(total_P, summing.survivors), summing.survivors, this.failures)

    def _asked(self, channel: SecureChannel, model: ModelPayload, this: _Try) -> AskedSum:
        """What is asked in this try: what was asked before, or a slot of an epoch that was not used yet."""
        if self._asked_sums is not None:
            before = self._asked_sums.find(channel=channel.digest, model=model.digest)
            if before is not None:
                this.was_asked_before, this.named_survivors = True, bool(before.survivors)
                self._epoch = None  # what comes after has keys of its own
                _log.info("event=asked_again round=%d named=%s", channel.round, this.named_survivors)
                return before
        if self._epoch is None or self._next_slot == self._plan.rounds_per_epoch:
            self._epoch = self._begin_epoch(channel.round, this)
        epoch = self._epoch
        start = epoch.start(self._next_slot, channel=channel.digest, model=model.digest, sites=tuple(epoch.setups))
        asked = AskedSum(channel.round, epoch, start)
        self._note(asked)
        self._next_slot += 1
        return asked

    def _note(self, asked: AskedSum) -> None:
        if self._asked_sums is not None:
            self._asked_sums.note(asked)

    def _forget(self, channel: SecureChannel, model: ModelPayload) -> None:
        if self._asked_sums is not None:
            self._asked_sums.forget(channel=channel.digest, model=model.digest)

    def _begin_epoch(self, round_number: int, this: _Try) -> Epoch:
        """Keys of all sites that are there, for ``rounds_per_epoch`` sums."""
        # Sites take an epoch newer than any before; a server that lost its state need not know which that was.
        epoch = time.time_ns() // 1_000_000
        phase = SetupPhase(self._plan, epoch)
        sites, asked = self._plan.sites, number(epoch)
        self._collect("secure_advertise", sites, round_number, asked, Advertised.parse, phase.advertise, this)
        roster = phase.roster
        self._collect("secure_setup", roster.sites, round_number, roster.to_bytes(), Setup.parse, phase.add, this)
        there = [site for site in roster.sites if site not in this.failures]
        relays = {site: phase.relay_to(site).to_bytes() for site in there}
        self._collect("secure_accept", there, round_number, relays, Acceptance.parse, phase.accept, this)
        self._next_slot = 0
        begun = phase.finish()
        for site, by in begun.complaints.items():
            this.failures[site] = f"its keys were refused by {', '.join(by)}"
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
        this: _Try,
        model: ModelPayload = _NO_MODEL,
    ) -> None:
        """Send one message of the protocol to each site, and take what comes back; note whose does not."""
        by_site = dict.fromkeys(sites, secure) if isinstance(secure, bytes) else dict(secure)
        answered = self._ask(action, sites, round_number, model, by_site)
        for site in sites:
            if site not in answered.replies:
                this.failures[site] = answered.failures.get(site, "no such node")
                this.is_hopeless |= answered.refused.get(site) == SecureAggregationError.__name__
                continue
            try:
                take(parse(answered.replies[site].secure))
            except SecureAggregationError as error:
                this.failures[site], this.is_hopeless = str(error), True
