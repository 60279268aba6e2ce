"""A site's side of a round whose updates are summed under masks.

What this site knows of the round (who takes part, what is summed, how it is weighed and encoded) follows from the
study that its hospital approved; the server's word counts for the order of things only. The order is the safe one:

1. A round that this site would not mask for is refused before anything trains.
2. What it may cost in privacy is reserved in the ledger before it trains, and so before a masked vector leaves.
   Charging later, when the sum is opened, would miss a site that was cut off in between: the others can open a sum
   without it.
3. The vector leaves under masks, once. Who asks for the very same round again gets the bytes that were stored
   (:mod:`client.reply_store`); under other keys it is another round, with new masks, new noise and a new charge.
"""

from __future__ import annotations

import logging

from client.request import approved_study, reply_to
from client.site import Site
from medfed.errors import SecureAggregationError
from medfed.messages import Fields, RoundInstruction, bytes_field, model_digest
from medfed.study import FEDERATED, StudyConfig
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.encoding import Ring
from privacy.secure_aggregation.framing import read_number
from privacy.secure_aggregation.messages import OpenRequest, Relay, Roster, RoundStart, VoteRequest
from privacy.secure_aggregation.plan import SecureAggregationPlan
from strategies.secure_channel import SecureChannel

_log = logging.getLogger("medfed.client.secure_round")


def advertise(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """A key for an epoch of secure sums, made anew; nothing trains."""
    client = _client(instruction, fields, site)
    advertised = client.advertise(read_number(bytes_field(fields, "secure")))
    return reply_to(instruction, site).to_fields(secure=advertised.to_bytes())


def setup(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Secrets for an epoch of secure sums, shared out in sealed boxes; nothing trains."""
    client = _client(instruction, fields, site)
    made = client.setup(Roster.parse(bytes_field(fields, "secure")))
    return reply_to(instruction, site).to_fields(secure=made.to_bytes())


def accept(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Whether the keys of all sites are in order."""
    client = _client(instruction, fields, site)
    accepted = client.accept(Relay.parse(bytes_field(fields, "secure")))
    if accepted.complaints:
        _log.warning("event=complaint epoch=%d about=%s", accepted.epoch, ",".join(accepted.complaints))
    return reply_to(instruction, site).to_fields(secure=accepted.to_bytes())


def vote(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """This site's only vote on who is in a sum."""
    client = _client(instruction, fields, site)
    given = client.vote(VoteRequest.parse(bytes_field(fields, "secure")))
    return reply_to(instruction, site).to_fields(secure=given.to_bytes())


def open_sum(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Shares that open the sum over the survivors, and nothing else."""
    client = _client(instruction, fields, site)
    request = OpenRequest.parse(bytes_field(fields, "secure"))
    shares = client.open(request)
    _log.info("event=opened round=%d sites=%d", instruction.round, len(request.survivors))
    return reply_to(instruction, site).to_fields(secure=shares.to_bytes())


class MaskedRound:
    """One round in which this site's vector leaves under masks, or not at all.

    Args:
        study: resolved and approved, with secure aggregation.
        scope: the federation.
        channel: of the round, derived from the study.
        fields: of the instruction: the round's start, and the adapter that everybody was sent.
        site: this one.

    Raises:
        SecureAggregationError: if this site will not mask for the round; nothing has trained or been spent.
    """

    def __init__(self, study: StudyConfig, scope: str, channel: SecureChannel, fields: Fields, site: Site) -> None:
        self._client = site.secure_client(SecureAggregationPlan.of_study(study, scope))
        self._start = RoundStart.parse(bytes_field(fields, "secure"))
        self._agreed = {
            "channel": channel.digest,
            "model": model_digest(bytes_field(fields, "adapter"), bytes_field(fields, "broadcast")),
        }
        self._client.check_start(self._start, **self._agreed)

    @property
    def id(self) -> bytes:
        """The start of the round in bytes: no two rounds have the same."""
        return self._start.to_bytes()

    def masked(self, vector_P: Ring) -> bytes:
        """The vector under masks, ready to be sent. Once.

        Raises:
            SecureAggregationError: if the round was closed in the meantime.
        """
        return self._client.mask(self._start, vector_P, **self._agreed).to_bytes()


def _client(instruction: RoundInstruction, fields: Fields, site: Site) -> SecureClient:
    """This site's side of secure aggregation in the study that was asked for."""
    study = approved_study(instruction, fields, site)
    if not study.sums_securely_in(instruction.scope):
        raise SecureAggregationError(
            f"Expected a study with [secure_aggregation] in scope {FEDERATED!r}, got {study.name!r} in "
            f"{instruction.scope!r}; there is nothing to mask."
        )
    return site.secure_client(SecureAggregationPlan.of_study(study, instruction.scope))
