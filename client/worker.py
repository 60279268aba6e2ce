"""The site worker: one long-lived process that answers the server's messages, one after the other.

It executes nothing that comes over the network: messages are data for the client app that the hospital installed. The
backbone and the features stay in memory between rounds. The order in which a message is handled makes every crash
harmless::

    receive -> inbox (synced) -> confirm -> answer (trained, stored) -> audit log (synced) -> send -> inbox emptied

Killed before *confirm*, the server sends the message again. Killed after, it is found in the inbox. Killed after the
answer was stored, the stored bytes are sent, and nothing is trained or spent twice.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.audit_log import AuditLog, Departure
from client.flower_link import Delivery, error_reply
from client.inbox import MAX_TRIES, Inbox, Pending
from medfed.device import return_free_memory
from medfed.errors import LinkDownError, LinkError, MessageError
from medfed.messages import INSTRUCTION_FIELDS, RECORD_KEY, RoundInstruction, RoundReply, exact_fields, told
from medfed.polling import pause_s

_log = logging.getLogger("medfed.client.worker")

_LONGEST_POLL_S = 2.0
"""Between two looks for a message, where none came for long."""

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


class Link(Protocol):
    """What the worker needs of :class:`client.flower_link.FleetLink`."""

    @property
    def node_id(self) -> int:
        """Of this session."""

    @property
    def is_open(self) -> bool:
        """Whether there is one."""

    def open(self, stale_node_id: int | None = None) -> int:
        """Begin a session."""

    def lost(self) -> None:
        """Forget the session."""

    def receive(self) -> Delivery | None:
        """The next message."""

    def confirm(self, delivery: Delivery) -> None:
        """Take it."""

    def run_is_over(self, delivery: Delivery) -> bool:
        """Whether nobody waits."""

    def age_s(self, delivery: Delivery) -> float:
        """Since it was made."""

    def send(self, delivery: Delivery, reply: Message, *, runtime_s: float) -> bool:
        """Answer it."""


class Session(Protocol):
    """Remembers the number of a session that was not ended; see :class:`client.site_folder.SessionFile`."""

    def unended(self) -> int | None:
        """Of a process that died."""

    def begun(self, node_id: int) -> None:
        """A session began."""


class SiteWorker:
    """Answers messages until it is told to stop.

    Args:
        link: to the server.
        app: what answers; installed here, never received.
        inbox: the message in work.
        audit_log: of what leaves.
        session: remembers an unended session.
        epsilon_after: what the site's cohort has spent in all, by scope; asked after a reply that spent something.
        stop: set to end after the message in work.
    """

    def __init__(
        self,
        link: Link,
        app: ClientApp,
        *,
        inbox: Inbox,
        audit_log: AuditLog,
        session: Session,
        epsilon_after: Callable[[str], float],
        stop: threading.Event,
    ) -> None:
        self._link = link
        self._app = app
        self._inbox = inbox
        self._audit_log = audit_log
        self._session = session
        self._epsilon_after = epsilon_after
        self._stop = stop
        self._states: dict[int, RecordDict] = {}
        self._pending: Pending | None = None

    def run(self) -> None:
        """Serve until told to stop; a server that is away is waited for.

        Raises:
            AuditLogError: if what leaves cannot be noted; nothing left.
            SiteError: if a message cannot be written down; it was not confirmed.
        """
        retry_s = _FIRST_PAUSE_S
        problem = ""
        last_message_s = time.monotonic()
        while not self._stop.is_set():
            try:
                if not self._link.is_open:
                    self._session.begun(self._link.open(self._session.unended()))
                    _log.info("event=connected node=%d", self._link.node_id)
                if self._served_one():
                    last_message_s = time.monotonic()
                    continue
                retry_s, problem = _FIRST_PAUSE_S, ""
            except LinkError as error:
                if not isinstance(error, LinkDownError):
                    self._link.lost()
                if str(error) != problem:  # once, not every half minute for a night
                    problem = str(error)
                    _log.warning("event=link_down why=%s", problem)
                self._stop.wait(retry_s * random.uniform(0.8, 1.2))  # noqa: S311 - so that sites do not come back at once
                retry_s = min(_LONGEST_PAUSE_S, 2 * retry_s)
                continue
            self._stop.wait(pause_s(time.monotonic() - last_message_s, _LONGEST_POLL_S))

    def _served_one(self) -> bool:
        """Serve the message that was begun, or the next one; False if there is none."""
        pending = self._pending or self._inbox.pending()  # a link that failed is no try: only a process that died is
        if pending is None:
            delivery = self._link.receive()
            if delivery is None:
                return False
            pending = self._pending = self._inbox.begin(delivery)
            self._link.confirm(delivery)
        elif self._pending is None:
            self._pending = pending
            _log.info("event=taken_up_again tries=%d", pending.tries)
        self._serve(pending)
        self._inbox.finish()
        self._pending = None
        return True

    def _serve(self, pending: Pending) -> None:
        delivery = pending.delivery
        if (age_s := self._link.age_s(delivery)) > delivery.ttl_s:
            _log.warning("event=too_late age_s=%.0f", age_s)
            return
        if self._link.run_is_over(delivery):
            _log.info("event=run_over run=%d", delivery.run_id)
            return
        try:
            message = delivery.message()
        except MessageError:
            _log.error("event=unreadable run=%d", delivery.run_id)  # there is nothing to answer to
            return
        began_s = time.monotonic()
        if pending.tries > MAX_TRIES:
            reply = error_reply(message, "CrashedTwice")
        else:
            reply = self._answer(message, delivery)
        runtime_s = time.monotonic() - began_s
        departure = self._departure(message, reply)
        self._audit_log.append(departure)
        wanted = self._link.send(delivery, reply, runtime_s=runtime_s)
        _log.info(
            "event=%s action=%s round=%d kind=%s payload_bytes=%d seconds=%.2f wanted=%s",
            *(departure.outcome, departure.action, departure.round, departure.kind or "-", departure.payload_bytes),
            *(runtime_s, wanted),
        )
        if departure.epsilon_after is not None:  # the accountants work on grids that grow with epsilon
            return_free_memory()

    def _answer(self, message: Message, delivery: Delivery) -> Message:
        """What the app answers; whatever it raises travels as its kind alone."""
        state = self._states.setdefault(delivery.run_id, RecordDict())
        context = Context(
            run_id=delivery.run_id, node_id=self._link.node_id, node_config={}, state=state, run_config={}
        )
        try:
            reply = self._app(message=message, context=context)
        except (Exception, SystemExit) as error:
            _log.error("event=failed kind=%s", type(error).__name__)
            _log.debug("event=traceback", exc_info=True)
            return error_reply(message, type(error).__name__)
        self._states = {delivery.run_id: context.state}  # of the newest run alone
        return reply

    def _departure(self, message: Message, reply: Message) -> Departure:
        """What the audit log says of a reply; a question that is not one of ours is described as far as it can be."""
        action = told(message.metadata.message_type)
        about: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": str(message.metadata.run_id),
            "action": action,
        }
        try:
            asked = RoundInstruction.parse(exact_fields(_record(message), INSTRUCTION_FIELDS))
            about |= asked.model_dump(mode="json")
        except MessageError:
            _log.debug("event=question_unread")
        if reply.has_error():
            kind = str(reply.error.reason)
            return Departure(
                **about,
                outcome="error",
                kind=kind,
                payload_bytes=len(kind.encode()),
                payload_digest=hashlib.sha256(kind.encode()).hexdigest(),
            )
        values = [
            value.encode() if isinstance(value, str) else bytes(value)
            for value in _record(reply).values()
            if isinstance(value, (str, bytes))
        ]
        payload_digest = hashlib.sha256(b"".join(values)).hexdigest()
        said = RoundReply.parse({"header": str(_record(reply)["header"])})
        spends = said.epsilon is not None and said.refusal is None
        return Departure(
            **about,
            outcome="reply" if said.refusal is None else "refusal",
            kind="" if said.refusal is None else said.refusal.kind,
            payload_bytes=sum(map(len, values)),
            payload_digest=payload_digest,
            again=self._audit_log.has_left(payload_digest),
            metrics=tuple(sorted(said.metrics)),
            epsilon_after=self._epsilon_after(str(about["scope"])) if spends else None,
        )


def _record(message: Message) -> ConfigRecord:
    """Our record in a message.

    Raises:
        MessageError: if there is none.
    """
    record = message.content.get(RECORD_KEY) if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise MessageError("Expected one record of ours in a message, got something else.")
    return record
