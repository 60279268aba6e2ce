"""The guard of the service, and the refusal of another Flower."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree

import medfed.flower_version
import server.flower_link
from client.flower_link import FleetLink
from medfed.errors import LinkError
from medfed.flower_version import WORKS_WITH, require_flower
from medfed.messages import MAX_MESSAGE_PARTS
from server.flower_link import CONTROL_HEADER, GuardedService, LinkGrid, StudyRun, SuperLinkAddress, control_proof

SECRET = b"a secret of this test"
PROOF = (CONTROL_HEADER.encode(), control_proof(SECRET).encode())


def status_of(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> int | None:
    """What the guarded service answers; 200 is the service itself."""
    sent: list[dict[str, Any]] = []

    async def service(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    scope = {"type": kind, "path": path, "headers": list(headers)}
    asyncio.run(GuardedService(service, SECRET)(scope, None, send))
    return sent[0]["status"] if sent else None


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
def test_a_site_reaches_its_mail_and_the_health_check_without_proof(path: str) -> None:
    assert status_of(path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/", "", "/docs",
        "/health/", "/v1/fleet", "/v1/Fleet/pull", "//v1/fleet/x", "/v1/fleetcontrol/x", "/x/v1/fleet/y",
    ],
)  # fmt: skip
def test_everything_else_is_not_there_without_proof(path: str) -> None:
    assert status_of(path) == 404
    assert status_of(path, PROOF) == 200


def test_wrong_doubled_or_other_proofs_open_nothing() -> None:
    path = "/v1/control/start-run"
    wrong = (PROOF[0], control_proof(b"another").encode())
    for headers in (
        [wrong],
        [wrong, PROOF],
        [PROOF, PROOF],
        [(PROOF[0], b"")],
        [(PROOF[0], SECRET)],
        [(b"x", PROOF[1])],
    ):
        assert status_of(path, *headers) == 404


def test_a_web_socket_is_told_nothing_and_the_service_may_begin_and_end() -> None:
    assert status_of("/v1/fleet/x", PROOF, kind="websocket") is None
    assert status_of("", kind="lifespan") == 200


@pytest.mark.parametrize("installed", ["1.42.0", "1.40.9", "2.41.0", "1.4", "0"])
def test_another_minor_version_of_flower_is_refused_with_the_one_that_works(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medfed.flower_version, "version", lambda _: installed)
    with pytest.raises(LinkError, match=rf"Expected Flower {WORKS_WITH}.x, got {installed}; install it with"):
        require_flower()
    with pytest.raises(LinkError, match=installed):
        FleetLink("127.0.0.1:1", b"", None)  # type: ignore[arg-type]
    with pytest.raises(LinkError, match=installed):
        StudyRun(SuperLinkAddress("127.0.0.1:1", b"", SECRET))


@pytest.mark.parametrize("installed", ["1.41.0", "1.41.7", "1.41.0rc1"])
def test_patch_versions_are_taken(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medfed.flower_version, "version", lambda _: installed)
    assert require_flower() == installed


def test_the_secret_is_in_no_representation() -> None:
    assert SECRET.decode() not in repr(SuperLinkAddress("127.0.0.1:1", b"", SECRET))


def test_a_part_that_messages_share_travels_once() -> None:
    adapter, pushed, announced = os.urandom(1000), [], []

    def call(_: object, request: Any) -> Any:
        if hasattr(request, "messages_list"):
            announced.append(request)
            digests = [part.object_id for tree in request.message_object_trees for part in iterate_object_tree(tree)]
            ids = [message.metadata.message_id for message in request.messages_list]
            return SimpleNamespace(message_ids=ids, objects_to_push=list(dict.fromkeys(digests)), session_id="s")
        pushed.append(request.object_content)
        return None

    sent: list[Message] = []
    grid = LinkGrid(
        SimpleNamespace(call=call),  # type: ignore[arg-type]
        SimpleNamespace(PushMessages=None, PushObject=None),  # type: ignore[arg-type]
        SimpleNamespace(run_id=1),  # type: ignore[arg-type]
        on_sent=sent.append,
        on_reply=lambda _: None,
    )
    messages = [
        make_message(
            Metadata(1, "", 1, node, "", "3", 1.0, 60.0, "train"),
            content=RecordDict({"r": ConfigRecord({"adapter": adapter})}),
        )
        for node in (7, 8, 9)
    ]
    assert grid.push_messages(messages) == [message.object_id for message in messages]
    assert sent == messages
    assert len(announced) == 1
    assert len([content for content in pushed if adapter in content]) == 1
    assert grid.push_messages([]) == []


def test_a_reply_that_is_announced_before_it_is_there_is_not_lost() -> None:
    reply = make_message(
        Metadata(1, "", 7, 1, "asked", "3", 1.0, 60.0, "train"), content=RecordDict({"r": ConfigRecord({"a": b"x"})})
    )
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts = {digest: part.deflate() for digest, part in get_all_nested_objects(reply).items()}
    asked: list[list[str]] = []
    looks = 0

    def call(_: object, request: Any) -> Any:
        nonlocal looks
        if hasattr(request, "message_ids"):
            asked.append(list(request.message_ids))
            proto = message_to_proto(remove_content_from_message(reply))
            return SimpleNamespace(messages_list=[proto], message_object_trees=[get_object_tree(reply)])
        if hasattr(request, "object_id"):
            looks += 1
            is_there = looks > 1
            return SimpleNamespace(
                object_found=True, object_available=is_there, object_content=parts[request.object_id]
            )
        return None

    grid = LinkGrid(
        SimpleNamespace(call=call),  # type: ignore[arg-type]
        SimpleNamespace(PullMessages=None, PullObject=None, ConfirmMessageReceived=None),  # type: ignore[arg-type]
        SimpleNamespace(run_id=1),  # type: ignore[arg-type]
        on_sent=lambda _: None,
        on_reply=lambda _: None,
    )
    assert grid.pull_messages(["asked"]) == []
    (found,) = grid.pull_messages(["asked"])
    assert found.metadata.reply_to_message_id == "asked"
    assert asked == [["asked"]]
    assert grid.pull_messages(["asked"]) == []


@pytest.mark.parametrize(("num_parts", "num_bytes"), [(MAX_MESSAGE_PARTS + 1, 1), (3, 1000)])
def test_a_reply_of_more_than_ours_are_counts_as_none_and_the_rest_of_it_is_not_asked_for(
    num_parts: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.flower_link, "MAX_MESSAGE_BYTES", 1500)
    proto = message_to_proto(
        make_message(Metadata(1, "huge", 7, 1, "asked", "3", 1.0, 60.0, "train"), content=RecordDict())
    )
    tree = ObjectTree(object_id="0", children=[ObjectTree(object_id=str(part)) for part in range(1, num_parts)])
    looks = 0

    def call(_: object, request: Any) -> Any:
        nonlocal looks
        if hasattr(request, "message_ids"):
            return SimpleNamespace(messages_list=[proto], message_object_trees=[tree])
        looks += 1
        return SimpleNamespace(object_found=True, object_available=True, object_content=bytes(num_bytes))

    grid = LinkGrid(
        SimpleNamespace(call=call),  # type: ignore[arg-type]
        SimpleNamespace(PullMessages=None, PullObject=None),  # type: ignore[arg-type]
        SimpleNamespace(run_id=1),  # type: ignore[arg-type]
        on_sent=lambda _: None,
        on_reply=lambda _: pytest.fail("a reply"),
    )
    assert grid.pull_messages(["asked"]) == []
    assert grid.pull_messages(["asked"]) == []
    assert looks == (0 if num_parts > MAX_MESSAGE_PARTS else 2)
    assert "event=unreadable_reply why=Expected a reply of at most" in caplog.text
