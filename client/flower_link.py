"""A site's connection to the consortium's SuperLink: the only file of ``client`` with Flower's private names.

The site calls out over one TLS port and is never called; proxies are taken from ``HTTPS_PROXY``. What is fetched are
messages alone: the application bundle of a run, which would be code, is never asked for.

::

    receive() -> Delivery    what waits for this site, pulled whole, not yet confirmed
    confirm(delivery)        from here on the server will not send it again: write it down first
    send(delivery, reply)    may be repeated: the server takes the first

When Flower moves a name below, ``tests/contracts/test_flower_private_names.py`` says which.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.bounded_answer import bound_answers
from medfed.errors import LinkDownError, LinkError, MessageError
from medfed.flower_version import require_flower
from medfed.messages import MAX_MESSAGE_BYTES, MAX_MESSAGE_PARTS, told

_log = logging.getLogger("medfed.client.flower_link")

T = TypeVar("T")

_OBJECT_WAIT_S = 0.05
"""Between two looks for a part of a message that is announced before it is there."""

_OBJECT_DEADLINE_S = 120.0
"""A message that is not whole by then was abandoned by its sender."""

_HEARTBEAT_S = HEARTBEAT_DEFAULT_INTERVAL / 3
"""The server calls a site gone after twice its interval without a sign."""

_HALF_SECOND = 0.5
"""A ``Date`` is cut off to whole seconds: on average it is this much earlier than it was."""

_FINISHED = "finished"
"""Status of a run that is over, for whatever reason."""


@dataclass(frozen=True)
class Delivery:
    """A message from the server, whole, as bytes that can be written down.

    Attributes:
        message_id: by which a reply refers to it.
        run_id: of the run that asks.
        created_at: seconds since 1970 by the sender's clock.
        ttl_s: seconds after which nobody waits for a reply any more.
        objects: its parts by their digest, as they came.

    Raises:
        MessageError: for a time that is no finite number, which could not be written down.
    """

    message_id: str
    run_id: int
    created_at: float
    ttl_s: float
    objects: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.created_at) and math.isfinite(self.ttl_s)):
            raise MessageError(f"Expected a message with a time, got {self.created_at} and {self.ttl_s}; ask again.")

    def message(self) -> Message:
        """The message; a new object at every call.

        Raises:
            MessageError: if the parts do not make one, or a part is not what its digest says: damaged, or exchanged.
        """
        if any(hashlib.sha256(part).hexdigest() != digest for digest, part in self.objects.items()):
            raise MessageError("Expected the parts of a message as their digests say, got others; ask again.")
        try:
            message = inflate_object_from_contents(self.message_id, dict(self.objects))
        except Exception as error:  # parts come from the network: whatever they do, they are no message
            raise MessageError(f"Expected the parts of a message, got {type(error).__name__}; ask again.") from None
        if not isinstance(message, Message):
            raise MessageError(f"Expected a message, got a {type(message).__name__}; ask again.")
        message.metadata.__dict__["_message_id"] = self.message_id
        return message


def error_reply(message: Message, kind: str) -> Message:
    """The reply to a message whose answering failed: the kind of error, and nothing of its text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, kind), reply_to=message)


class _ServerClock:
    """Notes how far the server's clock is ahead of this one, from the ``Date`` of its answers."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        response = call_next(context)
        try:
            server_s = parsedate_to_datetime(response.headers["date"]).timestamp()
            self.ahead_s = server_s + _HALF_SECOND - time.time()
        except (KeyError, ValueError, TypeError):
            pass
        return response


class FleetLink:
    """One site's connection, from :meth:`open` to :meth:`close`; usable again after the server was away.

    Args:
        server: ``host:port``.
        ca_certificate: PEM; what the server's certificate must be signed by.
        node_key: by which the server knows this site.
        timeout_s: for one request.

    Raises:
        LinkError: if another version of Flower is installed.
    """

    def __init__(
        self, server: str, ca_certificate: bytes, node_key: EllipticCurvePrivateKey, *, timeout_s: float = 60.0
    ) -> None:
        require_flower()
        self._server = server
        self._public_key = public_key_to_bytes(node_key.public_key())
        self._clock = _ServerClock()
        self._client = FleetHttpClient.from_server_address(
            server,
            False,
            ca_certificate,
            interceptors=[
                self._clock,
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(node_key, node_key.public_key()),
            ],
        )
        self._client._client.timeout = httpx.Timeout(timeout_s)
        bound_answers(self._client._client)
        self._client._client.follow_redirects = False  # a signed request is for the server of the kit alone
        self._node: Node | None = None
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def node_id(self) -> int:
        """This site's number at the server; 0 before it is known."""
        return 0 if self._node is None else self._node.node_id

    @property
    def is_open(self) -> bool:
        """Whether the server knows that this site is there."""
        return self._node is not None

    def age_s(self, delivery: Delivery) -> float:
        """Seconds since a message was made, by the server's clock: this site's own may be wrong."""
        return time.time() + self._clock.ahead_s - delivery.created_at

    def open(self, stale_node_id: int | None = None) -> int:
        """Tell the server that this site is there; its number.

        Args:
            stale_node_id: number of a session that this site did not end. It is ended first: otherwise the server
                refuses a second one for about a minute.

        Raises:
            LinkError: if the server refuses this site.
            LinkDownError: if it cannot be reached.
        """
        if stale_node_id:
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=stale_node_id))
                _log.info("event=stale_session_ended")
            except LinkDownError:
                raise
            except LinkError:
                _log.debug("event=no_stale_session")
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()
        return self.node_id

    def lost(self) -> None:
        """Forget the session: the server no longer knows it, and :meth:`open` begins another."""
        self._node = None

    def receive(self) -> Delivery | None:
        """The next message for this site, whole; None if there is none.

        Raises:
            LinkError: if the server does not know this site any more.
            LinkDownError: if it cannot be reached, or a message never came whole, or is larger than ours are.
        """
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        try:
            metadata = message_from_proto(response.messages_list[0]).metadata
            tree = response.message_object_trees[0]
            parts = [part.object_id for part in iterate_object_tree(tree)]
            announced = Delivery(tree.object_id, metadata.run_id, metadata.created_at, metadata.ttl, {})
        except Exception as error:  # it comes from the network: whatever it is, it is no message
            raise LinkDownError(
                f"Expected a message from {self._server}, got {type(error).__name__}; it is asked for again."
            ) from None
        if len(parts) > MAX_MESSAGE_PARTS:
            raise self._too_large(f"one of {len(parts)} parts, more than {MAX_MESSAGE_PARTS}")
        objects: dict[str, bytes] = {}
        for part in parts:
            objects[part] = self._pulled(announced.run_id, part)
            if sum(map(len, objects.values())) > MAX_MESSAGE_BYTES:
                raise self._too_large(f"one of more than {MAX_MESSAGE_BYTES} bytes")
        return replace(announced, objects=objects)

    def confirm(self, delivery: Delivery) -> None:
        """Tell the server that a message arrived; it is not sent again, whatever becomes of this process."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=delivery.run_id, message_object_id=delivery.message_id
        )
        self._call(self._client.ConfirmMessageReceived, request)

    def run_is_over(self, delivery: Delivery) -> bool:
        """Whether the run that asked has ended, so that nobody waits for a reply.

        Raises:
            LinkError: as :meth:`receive`.
        """
        try:
            response = self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=delivery.run_id))
        except _RunOverError:
            return True
        return bool(response.run.status.status == _FINISHED)

    def send(self, delivery: Delivery, reply: Message, *, runtime_s: float) -> bool:
        """Send the reply to a message; False if the run was over and nobody wanted it.

        Raises:
            LinkError: as :meth:`receive`.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            parts = {digest: part.deflate() for digest, part in get_all_nested_objects(reply).items()}
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[runtime_s],
            )
            try:
                response = self._call(self._client.PushMessages, request)
                for digest in response.objects_to_push:
                    self._push(delivery.run_id, response.session_id, digest, parts[digest])
            except _RunOverError:
                return False
        return True

    def close(self) -> None:
        """Say goodbye, so that the server need not find out; never raises."""
        self._closed.set()
        if self._node is not None:
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
            except LinkError:
                _log.debug("event=no_goodbye")
        self._node = None
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pulled(self, run_id: int, digest: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=digest)
        deadline = time.monotonic() + _OBJECT_DEADLINE_S
        while time.monotonic() < deadline:
            response = self._call(self._client.PullObject, request)
            if not response.object_found:
                break
            if response.object_available:
                return bytes(response.object_content)
            if self._closed.wait(_OBJECT_WAIT_S):
                break
        raise LinkDownError(f"Expected a whole message from {self._server}, got a part of one; it is asked for again.")

    def _too_large(self, what: str) -> LinkDownError:
        return LinkDownError(
            f"Expected a message of medfed from {self._server}, got {what}; nothing of it is kept, and it stays "
            "there until nobody waits for an answer: ask the coordinator who sent it."
        )

    def _push(self, run_id: int, session_id: str, digest: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run_id, object_id=digest, object_content=content, session_id=session_id
        )
        if not self._call(self._client.PushObject, request).stored:
            raise LinkDownError(f"Expected {self._server} to store a part of a reply, got a refusal; it is sent again.")

    def _beat(self) -> None:
        """Tell the server again and again that this site is there, in a thread of its own."""
        while not self._closed.wait(_HEARTBEAT_S):
            if (node := self._node) is None:
                continue
            request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            try:
                if not self._call(self._client.SendNodeHeartbeat, request).success:
                    self.lost()
            except LinkError as error:
                _log.debug("event=no_heartbeat why=%s", type(error).__name__)

    def _call(self, method: Callable[[Any], T], request: Any) -> T:
        """One request, with every way in which it can fail as one of ours.

        Raises:
            LinkError: if the server refuses.
            LinkDownError: if it cannot be reached or is not well.
        """
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise self._refusal(error.response) from None
        except httpx.TransportError as error:
            raise LinkDownError(
                f"Expected an answer of {self._server}, got {type(error).__name__}: {error}; check network, proxy "
                "(HTTPS_PROXY) and certificate with 'medfed site preflight'."
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # an answer that no SuperLink gives
            raise LinkDownError(
                f"Expected an answer of a SuperLink at {self._server}, got {type(error).__name__}; check who answers "
                "there with 'medfed site preflight'."
            ) from None
        except SystemExit:  # Flower ends the process when the server's version is another
            raise LinkError(
                f"Expected Flower of this site's minor version at {self._server}, got another; agree with the "
                "coordinator on one version of medfed."
            ) from None

    def _refusal(self, response: httpx.Response) -> LinkError:
        status = response.status_code
        if status == httpx.codes.FORBIDDEN:
            return _RunOverError("the run is over")
        if status == httpx.codes.UNAUTHORIZED:
            return LinkError(
                f"Expected {self._server} to know this site's key, got 401: this clock may be 5 s ahead or 5 minutes "
                f"behind (the server's is {self._clock.ahead_s:+.0f} s ahead: synchronise it), or the coordinator has "
                "not enrolled this site."
            )
        if status == httpx.codes.PRECONDITION_FAILED:
            return LinkError(
                f"Expected {self._server} to begin a session with this site, got a refusal: the coordinator has not "
                "enrolled it yet ('medfed provision --enrol'), or its last session ended less than a minute ago "
                "without a goodbye; it is tried again."
            )
        if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
            return LinkDownError(f"Expected {self._server} to be well, got HTTP {status}; it is tried again.")
        return LinkError(f"Expected {self._server} to take a request, got HTTP {status}: {told(response.text)}")


class _RunOverError(LinkError):
    """The server says that the run is not running."""
