"""What is sent to the SuperLink is refused by its length, before it is read and before anybody is asked who sent it."""

from __future__ import annotations

import inspect
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from medfed.messages import MAX_ENVELOPE_BYTES, MAX_MESSAGE_BYTES, MESSAGE_FRAME_BYTES
from server.bounded_request import _PART_PATH, refusal_of_body
from server.flower_link import GuardedService

PART = "/v1/fleet/push-object"
OTHER = "/v1/fleet/push-messages"


def length(num_bytes: int | str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"content-length", str(num_bytes).encode())]


@pytest.mark.parametrize(
    ("path", "limit"), [(PART, MAX_MESSAGE_BYTES + MESSAGE_FRAME_BYTES), (OTHER, MAX_ENVELOPE_BYTES)]
)
def test_a_body_may_be_as_long_as_its_limit(path: str, limit: int) -> None:
    assert refusal_of_body(path, length(limit)) is None
    assert refusal_of_body(path, length(limit + 1)) == 413
    assert refusal_of_body(path, length("9" * 5000)) == 413
    assert refusal_of_body(path, []) is None  # no body


@pytest.mark.parametrize("client", [FleetHttpClient, RuntimeHttpClient])
def test_parts_of_messages_go_where_long_bodies_are_let_through(client: type) -> None:
    assert f'{_PART_PATH}"' in inspect.getsource(client.PushObject)  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["", "-1", "+1", "1_0", " 1", "0x10", "1.5", "\u0661"])
def test_a_length_that_is_no_number_is_refused(value: str) -> None:
    assert refusal_of_body(OTHER, [(b"content-length", value.encode())]) == 400


def test_two_lengths_or_none_that_is_told_are_refused() -> None:
    assert refusal_of_body(OTHER, length(1) + length(1)) == 400
    assert refusal_of_body(OTHER, [(b"transfer-encoding", b"chunked")]) == 411
    assert refusal_of_body(OTHER, [*length(1), (b"transfer-encoding", b"gzip")]) == 411


@pytest.fixture
def service() -> Iterator[tuple[int, list[int]]]:
    """The guard behind the web server that the product uses: its port, and how many bytes came through."""
    came: list[int] = []

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while True:
            event = await receive()
            came.append(len(event.get("body", b"")))
            if not event.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        guarded = GuardedService(echo, b"secret")
        server = uvicorn.Server(uvicorn.Config(guarded, lifespan="off", ws="none", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1], came
        server.should_exit = True
        thread.join(10)


def said(port: int, head: str, body: bytes = b"") -> str:
    """The first line of the answer."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(f"POST {PART} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode() + body)
                return connection.recv(4096).decode().splitlines()[0]
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


@pytest.mark.process
def test_the_web_server_answers_before_a_body_comes_and_holds_one_to_its_length(
    service: tuple[int, list[int]],
) -> None:
    port, came = service
    assert said(port, f"content-length: {2**40}").endswith("413 Request Entity Too Large")
    assert said(port, "transfer-encoding: chunked", b"5\r\nhello\r\n").endswith("411 Length Required")
    assert came == []
    assert said(port, "content-length: 5", b"hello").endswith("200 OK")
    said(port, "content-length: 5", b"hello and much more than was said")  # the rest is another request, and a bad one
    assert max(came) == 5
