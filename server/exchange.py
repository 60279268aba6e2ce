"""One exchange with named sites over a Grid: instructions out, replies of known sites back.

The only file of the round loop that knows what a Flower message is. Whatever a site sends that is not a
well-formed reply to what it was asked counts as no reply, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from medfed.errors import MedfedError, MessageError
from medfed.messages import (
    RECORD_KEY,
    REPLY_FIELDS,
    Action,
    RoundInstruction,
    RoundReply,
    bytes_field,
    exact_fields,
    model_digest,
    told,
)

_log = logging.getLogger("medfed.server.exchange")

_MESSAGE_TYPES: dict[Action, str] = {
    "describe": "query.describe",
    "train": "train",
    "evaluate": "evaluate",
    "secure_advertise": "query.secure_advertise",
    "secure_setup": "query.secure_setup",
    "secure_accept": "query.secure_accept",
    "secure_vote": "query.secure_vote",
    "secure_open": "query.secure_open",
}


@dataclass(frozen=True)
class ModelPayload:
    """What sites put into the model: nothing, for requests that are not about one.

    Attributes:
        adapter: payload of the global adapter.
        broadcast: payload of what the strategy tells beside it.
    """

    adapter: bytes = b""
    broadcast: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 of both: what sites that mask for one sum must all have been sent."""
        return model_digest(self.adapter, self.broadcast)


@dataclass(frozen=True)
class SiteReply:
    """A well-formed reply.

    Attributes:
        reply: its header.
        payload: the adapter payload, still encoded.
        secure: the secure-aggregation message, still encoded.
    """

    reply: RoundReply
    payload: bytes
    secure: bytes


@dataclass(frozen=True)
class Exchange:
    """What came back.

    Attributes:
        replies: well-formed replies by site.
        node_of: node id of each site that replied.
        failures: reason by site (or ``node <id>``) for everything else, sites that kept silent included.
        refused: kind of the refusal, by site that refused; each is in ``failures`` too.
    """

    replies: dict[str, SiteReply]
    node_of: dict[str, int]
    failures: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)


def exchange(
    grid: Grid,
    action: Action,
    nodes: Mapping[int, str | None],
    instruction: RoundInstruction,
    *,
    study: bytes,
    model: ModelPayload,
    deadline_s: float,
    metric_names: frozenset[str],
    secure: Mapping[int, bytes] | bytes = b"",
) -> Exchange:
    """Ask every node to act, and take what comes back before the deadline.

    Args:
        grid: the transport.
        action: ``describe``, ``train`` or ``evaluate``.
        nodes: node id -> the site expected there, or None if unknown (``describe``).
        instruction: the header.
        study: canonical study bytes.
        model: what sites put into the model.
        deadline_s: seconds to wait.
        metric_names: the only names under which a site may report a number.
        secure: secure-aggregation message, for all or by node id.
    """

    def content_with(secure: bytes) -> RecordDict:
        fields = instruction.to_fields(study=study, adapter=model.adapter, broadcast=model.broadcast, secure=secure)
        return RecordDict({RECORD_KEY: ConfigRecord(dict(fields))})

    # One content for all that get the same: a grid copies or serialises each message before anybody can change it.
    if isinstance(secure, bytes):
        contents = dict.fromkeys(nodes, content_with(secure))
    else:
        contents = {node_id: content_with(secure[node_id]) for node_id in nodes}
    messages = [
        Message(
            contents[node_id],
            dst_node_id=node_id,
            message_type=_MESSAGE_TYPES[action],
            group_id=str(instruction.round),
            ttl=deadline_s,
        )
        for node_id in nodes
    ]
    replies: dict[str, SiteReply] = {}
    node_of: dict[str, int] = {}
    failures: dict[str, str] = {}
    refused: dict[str, str] = {}
    for message in grid.send_and_receive(messages, timeout=deadline_s):
        node_id = message.metadata.src_node_id
        where = nodes.get(node_id) or f"node {node_id}"
        try:
            answer = _read(message, instruction, nodes.get(node_id), metric_names)
        except MedfedError as error:
            failures[where] = str(error)
            _log.warning("event=bad_reply round=%d where=%s kind=%s", instruction.round, where, type(error).__name__)
            continue
        if answer.reply.refusal is not None:
            refusal = answer.reply.refusal
            failures[answer.reply.site] = f"{refusal.kind}: {refusal.reason}"
            refused[answer.reply.site] = refusal.kind
        elif answer.reply.site in replies:
            failures[where] = f"a second reply for site {answer.reply.site!r}"
        else:
            replies[answer.reply.site] = answer
            node_of[answer.reply.site] = node_id
    for site in nodes.values():
        if site is not None and site not in replies and site not in failures:
            failures[site] = f"no reply within {deadline_s:g} s"
    return Exchange(replies, node_of, failures, refused)


def _read(
    message: Message, instruction: RoundInstruction, expected_site: str | None, metric_names: frozenset[str]
) -> SiteReply:
    """The reply in a message.

    Raises:
        MessageError: if the site failed, or did not answer what it was asked.
    """
    if message.has_error():
        raise MessageError(f"the site failed with {told(str(message.error.reason))}")
    record = message.content.get(RECORD_KEY) if message.has_content() else None
    if not isinstance(record, ConfigRecord) or set(message.content) != {RECORD_KEY}:
        raise MessageError("Expected one record of ours in a reply, got something else.")
    fields = exact_fields(record, REPLY_FIELDS)
    reply = RoundReply.parse(fields)
    asked = (instruction.study_digest, instruction.round, instruction.attempt)
    if (reply.study_digest, reply.round, reply.attempt) != asked:
        raise MessageError(f"Expected a reply to round {asked[1]}, attempt {asked[2]}, got another.")
    if strange := sorted(set(reply.metrics) - metric_names):
        raise MessageError(f"Expected metrics of the study's task, got {told(strange[0])!r}.")
    if expected_site is not None and reply.site != expected_site:
        raise MessageError(f"Expected a reply of site {expected_site!r}, got one of {reply.site!r}.")
    return SiteReply(reply, bytes_field(fields, "adapter"), bytes_field(fields, "secure"))
