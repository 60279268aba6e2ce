"""The server's connection to its SuperLink: the only file of ``server`` with Flower's private names.

A consortium has one SuperLink, a long-lived service that keeps messages, and for each study one server process, which
claims the run's only task and exchanges messages with sites through it. Either may be killed and started again.

::

    serve_superlink(...)     the service, in this process, with its administration behind a secret
    register_sites(...)      the sites of the roster and nobody else
    StudyRun                 one run: claimed, kept alive, ended; its grid is the transport of the round loop

A run's application bundle holds no code: sites and server run what is installed. When Flower moves a name below,
``tests/contracts/test_flower_private_names.py`` says which.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import hashlib
import hmac
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import fab_to_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from medfed.errors import LinkDownError, LinkError, MessageError
from medfed.flower_version import require_flower
from medfed.messages import MAX_MESSAGE_BYTES, MAX_MESSAGE_PARTS
from medfed.polling import pause_s
from server.bounded_request import refusal_of_body

_log = logging.getLogger("medfed.server.flower_link")

T = TypeVar("T")

CONTROL_HEADER = "medfed-control"
"""Carries proof of the SuperLink's secret in requests that administer it."""

_OPEN_PATHS = ("/v1/fleet/", "/health")
"""What a site may reach: its mail, which Flower authenticates by the site's key, and whether the service is up."""

_VERSION_PATH = "/openapi.json"
"""Where a site's preflight looks for the version of Flower; nothing else of the description is told."""

_CODELESS_FAB = {
    "LICENSE": b"This bundle holds no code: sites and server run what is installed.\n",
    "pyproject.toml": b"""[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "medfed-run"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "medfed"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
""",
}

_LONGEST_POLL_S = 0.5
"""Between two looks for replies, where none came for long."""

_HEARTBEAT_S = 15.0
"""The SuperLink gives a task up after 60 s without a sign."""


def control_proof(secret: bytes) -> str:
    """What the header of an administrative request must hold: derived from the secret, which is never sent."""
    return hmac.new(secret, b"medfed: administer this SuperLink", hashlib.sha256).hexdigest()


class GuardedService:
    """An ASGI app that lets everybody reach a site's paths, and the rest only with proof of the secret.

    Flower's service answers administrative requests (register a site, start and stop runs) of whoever reaches its
    port; sites must be able to reach that port. Bodies longer than ours are refused unread
    (:mod:`server.bounded_request`).

    Args:
        service: what is guarded.
        secret: known to the coordinator's own processes alone.
    """

    def __init__(self, service: Callable[..., Any], secret: bytes) -> None:
        self._service = service
        self._proof = control_proof(secret).encode()
        self._version = json.dumps({"info": {"version": require_flower()}}).encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it: 404 as if there were nothing, or by the length of its body."""
        if scope["type"] == "lifespan":
            await self._service(scope, receive, send)
        elif scope["type"] != "http":
            return  # a web socket is refused by saying nothing
        elif (refusal := refusal_of_body(scope["path"], scope["headers"])) is not None:
            await _answer(send, refusal)
        elif self._may(scope):
            await self._service(scope, receive, send)
        elif scope["path"] == _VERSION_PATH:
            await _answer(send, HTTPStatus.OK, self._version)
        else:
            await _answer(send, HTTPStatus.NOT_FOUND)

    def _may(self, scope: Mapping[str, Any]) -> bool:
        path = str(scope["path"])
        if path == _OPEN_PATHS[1] or path.startswith(_OPEN_PATHS[0]):
            return True
        given = [value for name, value in scope["headers"] if name == CONTROL_HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._proof)


async def _answer(send: Any, status: HTTPStatus, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": int(status), "headers": []})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class SuperLinkFiles:
    """What a SuperLink needs on disk.

    Attributes:
        certificate: of the server, PEM.
        private_key: of the certificate.
        ca_certificate: that signed it.
        secret: that the server process must know.
        database: where messages and registrations survive a restart.
    """

    certificate: Path
    private_key: Path
    ca_certificate: Path
    secret: Path
    database: Path


def serve_superlink(files: SuperLinkFiles, *, host: str, port: int, health_address: str | None = None) -> None:
    """Run the SuperLink in this process until it is stopped.

    Args:
        files: on disk.
        host: to listen on.
        port: of the only open port.
        health_address: ``host:port`` of a gRPC health service without TLS, for the machine's own checks.

    Raises:
        LinkError: if another version of Flower is installed.
    """
    require_flower()
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    arguments = {
        "--host": host,
        "--port": str(port),
        "--ssl-certfile": str(files.certificate),
        "--ssl-keyfile": str(files.private_key),
        "--ssl-ca-certfile": str(files.ca_certificate),
        "--database": str(files.database),
        "--isolation": "process",
        "--superexec-auth-secret-file": str(files.secret),
    }
    if health_address is not None:
        arguments["--health-server-address"] = health_address
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    sys.argv = ["flower-superlink", *(word for pair in arguments.items() for word in pair), *flags]
    config = _parse_superlink_lifespan_config()
    logging.getLogger("flwr").propagate = False  # it prints warnings itself
    service = GuardedService(create_app(config, SuperLinkLifespan), files.secret.read_bytes().strip())
    uvicorn.run(
        service,
        host=host,
        port=port,
        ssl_certfile=str(files.certificate),
        ssl_keyfile=str(files.private_key),
        access_log=False,  # every site asks for mail several times a second
        log_level="warning",
        workers=1,
        ws="none",
    )


class _Proof:
    """Adds the proof of the secret to a request."""

    def __init__(self, secret: bytes) -> None:
        self._proof = control_proof(secret)

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self._proof
        return call_next(context)


@dataclass(frozen=True)
class SuperLinkAddress:
    """Where a SuperLink is, and how its own server processes are known there.

    Attributes:
        address: ``host:port``.
        ca_certificate: PEM that its certificate must be signed by.
        secret: as in :class:`SuperLinkFiles`.
        patience_s: how long a request is tried again while the service is away.
    """

    address: str
    ca_certificate: bytes
    secret: bytes = field(repr=False)
    patience_s: float = 120.0

    def call(self, method: Callable[[Any], T], request: Any) -> T:
        """One request; tried again while the service cannot be reached.

        Raises:
            LinkDownError: if it could not be reached for ``patience_s``.
            LinkError: if it refuses.
        """
        deadline, pause_s = time.monotonic() + self.patience_s, 0.1
        while True:
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status < httpx.codes.INTERNAL_SERVER_ERROR:
                    raise LinkError(
                        f"Expected the SuperLink at {self.address} to take a request, got HTTP {status}: "
                        f"{error.response.text[:200] or 'no reason'}; check that it is this consortium's."
                    ) from None
                problem: Exception = error
            except httpx.TransportError as error:
                problem = error
            except SystemExit:  # Flower ends the process when the other side's version is another
                raise LinkError(
                    f"Expected Flower of this version at {self.address}, got another; run both from one installation."
                ) from None
            if time.monotonic() > deadline:
                raise LinkDownError(
                    f"Expected the SuperLink at {self.address}, got {type(problem).__name__}: {problem}; start it with "
                    "'medfed server start'."
                ) from None
            time.sleep(pause_s)
            pause_s = min(2.0, 2 * pause_s)

    def control(self) -> ControlHttpClient:
        """A client of its administration; close it."""
        return ControlHttpClient.from_server_address(
            self.address,
            False,
            self.ca_certificate,
            interceptors=[_Proof(self.secret), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def runtime(self, token: str | None = None) -> RuntimeHttpClient:
        """A client of its mail, with a task's token or to claim one; close it."""
        known_by = (
            SuperExecAuthHttpInterceptor(
                master_secret=self.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            )
            if token is None
            else RuntimeTokenHttpInterceptor(token=token)
        )
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        return RuntimeHttpClient.from_server_address(
            self.address, False, self.ca_certificate, interceptors=[_Proof(self.secret), version, known_by]
        )


@dataclass(frozen=True)
class SiteNode:
    """A registered site.

    Attributes:
        node_id: its number at the SuperLink; the same after restarts of either.
        is_online: whether it gave a sign in the last minute.
    """

    node_id: int
    is_online: bool


def register_sites(
    superlink: SuperLinkAddress,
    keys: Mapping[str, EllipticCurvePublicKey],
    *,
    and_no_others: bool = False,
    _again: bool = True,
) -> dict[str, SiteNode]:
    """Register what is not registered yet; the sites by name.

    Args:
        superlink: where.
        keys: site -> public key of its node, from the roster.
        and_no_others: take every other registration back: whoever left the roster is no longer let in.

    Raises:
        LinkError: if the SuperLink refuses.
        LinkDownError: if it is away.
    """
    with closing(superlink.control()) as control:
        by_key = {public_key_to_bytes(key): site for site, key in keys.items()}
        nodes = [
            node
            for node in superlink.call(control.ListNodes, ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        ]
        known = {
            by_key[node.public_key]: SiteNode(node.node_id, node.status == "online")
            for node in nodes
            if node.public_key in by_key
        }
        for node in nodes if and_no_others else ():
            if node.public_key not in by_key:
                superlink.call(control.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))
                _log.info("event=unregistered name=%s", node.name)
        for key, site in by_key.items():
            if site not in known:
                request = RegisterNodeRequest(public_key=key, name=site)
                try:
                    known[site] = SiteNode(superlink.call(control.RegisterNode, request).node_id, is_online=False)
                except LinkDownError:
                    raise
                except LinkError:
                    if not _again:
                        raise
                    # another process of this consortium registered it in between
                    return register_sites(superlink, keys, and_no_others=and_no_others, _again=False)
                _log.info("event=registered site=%s", site)
    return known


@dataclass
class _Arriving:
    """A reply that was announced; its parts may still be on their way."""

    message_id: str
    reply_to: str
    missing: list[str]
    parts: dict[str, bytes] = field(default_factory=dict)


class LinkGrid(Grid):
    """Flower's Grid over a SuperLink: polls quickly, survives its restarts, waits for no one reply alone.

    Args:
        superlink: where.
        client: of its mail, with the run's token.
        run: the run.
        on_sent: is told of every message that was handed over.
        on_reply: is told of every reply as it comes.
    """

    def __init__(
        self,
        superlink: SuperLinkAddress,
        client: RuntimeHttpClient,
        run: Run,
        *,
        on_sent: Callable[[Message], None],
        on_reply: Callable[[Message], None],
    ) -> None:
        self._superlink = superlink
        self._client = client
        self._run = run
        self._on_sent = on_sent
        self._on_reply = on_reply
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._answered: set[str] = set()
        self._incomplete: list[_Arriving] = []

    def set_run(self, run: Run) -> None:
        """Make ``run`` the run of what is sent from now on."""
        self._run = run

    @property
    def run(self) -> Run:
        """A copy of the run's description."""
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's deprecated way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Numbers of the sites that are there now."""
        return [node.node_id for node in self._superlink.call(self._client.GetNodes, GetNodesRequest()).nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the SuperLink; their ids, empty for one that it did not take.

        All are announced at once, so that a part that they share travels once, whatever the number of sites.
        """
        asked = list(messages)
        if not asked:
            return []
        parts: dict[str, bytes] = {}
        with no_object_id_recompute():
            for message in asked:
                message.metadata.__dict__["_message_id"] = message.object_id
                parts |= {digest: part.deflate() for digest, part in get_all_nested_objects(message).items()}
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message)) for message in asked],
                message_object_trees=[get_object_tree(message) for message in asked],
            )
        response = self._superlink.call(self._client.PushMessages, request)
        for digest in response.objects_to_push:
            part = PushObjectRequest(
                node=self._node,
                run_id=self._run.run_id,
                object_id=digest,
                object_content=parts[digest],
                session_id=response.session_id,
            )
            self._superlink.call(self._client.PushObject, part)
        for message in asked:
            self._on_sent(message)
        return [str(message_id) for message_id in response.message_ids]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that are there whole by now, each once.

        A reply is announced once, and may be so before its parts are there: it is then among those of a later call.
        """
        unanswered = [message_id for message_id in message_ids if message_id not in self._answered]
        if unanswered:  # the SuperLink calls a message lost whose reply it has announced
            announced = self._announced(unanswered)
            self._answered |= {one.reply_to for one in announced}
            self._incomplete += announced
        return list(self._taken(self._incomplete))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, and take what comes back in time, in the order in which it comes."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        arriving: list[_Arriving] = []
        replies: list[Message] = []
        last_reply_s = time.monotonic()
        while (waiting or arriving) and time.monotonic() < end:
            if waiting and (announced := self._announced(waiting)):
                arriving += announced
                waiting -= {one.reply_to for one in announced}
                last_reply_s = time.monotonic()
            for reply in self._taken(arriving):
                replies.append(reply)
                self._on_reply(reply)
            if waiting or arriving:
                now_s = time.monotonic()
                time.sleep(max(0.0, min(pause_s(now_s - last_reply_s, _LONGEST_POLL_S), end - now_s)))
        return replies

    def _announced(self, message_ids: Iterable[str]) -> list[_Arriving]:
        request = PullAppMessagesRequest(message_ids=list(message_ids))
        response = self._superlink.call(self._client.PullMessages, request)
        return [
            _Arriving(
                proto.metadata.message_id,
                proto.metadata.reply_to_message_id,
                [part.object_id for part in iterate_object_tree(tree)],
            )
            for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True)
        ]

    def _taken(self, arriving: list[_Arriving]) -> Iterator[Message]:
        """The replies that are there whole by now; they leave the list, as do those whose parts make no message."""
        for one in tuple(arriving):
            try:
                reply = self._whole(one)
            except MessageError as error:
                arriving.remove(one)
                _log.warning("event=unreadable_reply why=%s", error)
                continue
            if reply is not None:
                arriving.remove(one)
                yield reply

    def _whole(self, arriving: _Arriving) -> Message | None:
        """The reply, if its last parts are there now; each part is asked for once.

        Raises:
            MessageError: if all parts are there and make no message, or are more than ours are; it counts as no reply.
        """
        if (num_parts := len(arriving.parts) + len(arriving.missing)) > MAX_MESSAGE_PARTS:
            raise MessageError(f"Expected a reply of at most {MAX_MESSAGE_PARTS} parts, got one of {num_parts}.")
        for digest in tuple(arriving.missing):
            request = PullObjectRequest(node=self._node, run_id=self._run.run_id, object_id=digest)
            response = self._superlink.call(self._client.PullObject, request)
            if not (response.object_found and response.object_available):
                return None
            arriving.parts[digest] = bytes(response.object_content)
            arriving.missing.remove(digest)
            if sum(map(len, arriving.parts.values())) > MAX_MESSAGE_BYTES:
                raise MessageError(f"Expected a reply of at most {MAX_MESSAGE_BYTES} bytes, got a longer one.")
        confirmed = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run.run_id, message_object_id=arriving.message_id
        )
        self._superlink.call(self._client.ConfirmMessageReceived, confirmed)
        try:
            message = inflate_object_from_contents(arriving.message_id, dict(arriving.parts))
        except Exception as error:  # parts come from a site: whatever they do, they are no message
            raise MessageError(f"Expected the parts of a reply, got {type(error).__name__}.") from None
        if not isinstance(message, Message):
            raise MessageError(f"Expected a reply, got a {type(message).__name__}.")
        message.metadata.__dict__["_message_id"] = arriving.message_id
        return message


class StudyRun:
    """One run at the SuperLink, claimed by this process and kept alive until the body ends.

    A run that is over makes sites drop what is left of it. A killed process leaves a run that ends by itself after
    a minute; whoever goes on starts another, and sites answer from what they stored.

    Args:
        superlink: where.
        on_sent: is told of every message that was handed over.
        on_reply: is told of every reply as it comes.

    Raises:
        LinkError: if another version of Flower is installed, or the SuperLink refuses.
        LinkDownError: if it is away.
    """

    def __init__(
        self,
        superlink: SuperLinkAddress,
        *,
        on_sent: Callable[[Message], None] = lambda _: None,
        on_reply: Callable[[Message], None] = lambda _: None,
    ) -> None:
        require_flower()
        self._superlink = superlink
        content = build_fab_from_files(dict(_CODELESS_FAB))[0]
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        with closing(superlink.control()) as control:
            self._run_id = superlink.call(control.StartRun, StartRunRequest(fab=fab)).run_id
        token = self._claimed()
        self._client = superlink.runtime(token)
        task = superlink.call(self._client.PullTaskInput, PullTaskInputRequest())
        TaskIdentity.run_id, TaskIdentity.task_id = self._run_id, task.task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        run = run_from_proto(task.run)
        self.grid = LinkGrid(superlink, self._client, run, on_sent=on_sent, on_reply=on_reply)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        _log.info("event=run_started run=%d", self._run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run, so that sites drop what is left of it."""
        self._ended.set()
        status = SubStatus.COMPLETED if kind is None else SubStatus.FAILED
        details = "" if kind is None else kind.__name__
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        except (httpx.HTTPError, SystemExit) as problem:
            _log.warning("event=run_not_ended run=%d why=%s", self._run_id, type(problem).__name__)
        self._heart.join()
        self._client.close()

    def _claimed(self) -> str:
        """The token of this run's task; tasks of runs that died unclaimed are claimed too, and dropped."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        with closing(self._superlink.runtime()) as client:
            for _ in range(100):
                response = self._superlink.call(client.AcquireTask, request)
                if response.token and response.task.run_id == self._run_id:
                    return str(response.token)
                if not response.token:
                    time.sleep(0.1)
        raise LinkError(
            f"Expected to claim run {self._run_id}, got none or others; another server process of this consortium may "
            "be starting: try again."
        )

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S):
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, SystemExit) as problem:
                _log.debug("event=no_heartbeat why=%s", type(problem).__name__)
