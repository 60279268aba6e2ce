"""A network that is cut, flips bits or leads elsewhere, proxies, and clocks that are wrong; real processes."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from server.consortium_folder import open_consortium
from server.provisioning import provision

pytestmark = [pytest.mark.process, pytest.mark.slow]

SKEW = '''
"""Shifts the clock of this process."""
import datetime, os, time
_AHEAD_S = float(os.environ["SKEW_S"])
_time = time.time
time.time = lambda: _time() + _AHEAD_S
_Real = datetime.datetime
class _Kind(type(_Real)):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _Real)
    def __subclasscheck__(cls, other):
        return issubclass(other, _Real)
class datetime_(_Real, metaclass=_Kind):
    @classmethod
    def now(cls, tz=None):
        return _Real.now(tz) + datetime.timedelta(seconds=_AHEAD_S)
    @classmethod
    def utcnow(cls):
        return _Real.utcnow() + datetime.timedelta(seconds=_AHEAD_S)
datetime.datetime = datetime_
'''


def test_network_cut_for_a_round_costs_time_alone(deployment, undisturbed: bytes, until: Callable) -> None:
    run = deployment.begin(deployment.sign("cut"))
    until(lambda: deployment.in_work("north") == "train 2", what="round 2")
    deployment.proxy.cut()
    until(lambda: deployment.proxy.refused > 2, what="attempts to get through")
    assert run.is_alive
    deployment.proxy.heal()
    assert run.finishes() == undisturbed


def test_site_reaches_the_server_through_its_proxy_alone(deployment) -> None:
    asked = len(deployment.proxy.asked)
    deployment.sites["north"].stop()
    north = deployment.start_site("north")
    north.says("event=connected")
    assert deployment.proxy.asked[asked:]
    assert set(deployment.proxy.asked) == {f"127.0.0.1:{deployment.port}"}


def test_a_body_longer_than_ours_are_is_refused_before_it_comes(deployment) -> None:
    context = ssl.create_default_context(cafile=deployment.coordinator.ca_certificate)
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {2**30}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", deployment.port), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as wrapped,
    ):
        wrapped.sendall(head.encode())
        assert wrapped.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_grpc_health_check_answers_while_the_superlink_serves(deployment) -> None:
    with grpc.insecure_channel(deployment.health_address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=10) == bytes([1 << 3, 1])  # field 1 of HealthCheckResponse is 1: SERVING


def test_flipped_bits_are_refused_by_tls_and_sent_again(deployment, undisturbed: bytes, until: Callable) -> None:
    run = deployment.begin(deployment.sign("flipped"))
    until(lambda: deployment.in_work("north") == "train 1", what="round 1")
    deployment.proxy.flips = 3
    assert run.finishes() == undisturbed
    assert deployment.proxy.flips == 0


def test_server_with_another_ca_is_told_nothing(deployment, tmp_path: Path) -> None:
    north, heard = deployment.sites["north"], []
    with _other_server(tmp_path, heard) as port:
        deployment.proxy.leads_to = port
        deployment.proxy.drop_all()
        north.says("event=link_down .*CERTIFICATE_VERIFY_FAILED")
        deployment.proxy.leads_to = None
    assert heard
    assert not any(heard)  # every handshake failed before a byte of ours was sent


@pytest.fixture
def skewed(tmp_path: Path) -> Callable[[float], dict[str, str]]:
    """Environment of a process whose clock is ahead."""
    (tmp_path / "sitecustomize.py").write_text(SKEW)
    return lambda seconds: {"PYTHONPATH": str(tmp_path), "SKEW_S": str(seconds)}


def test_clock_two_minutes_behind_changes_nothing(deployment, undisturbed: bytes, skewed: Callable) -> None:
    deployment.sites["east"].stop()
    deployment.start_site("east", skewed(-120)).says("event=connected")
    assert deployment.begin(deployment.sign("two-minutes")).finishes() == undisturbed
    deployment.sites["east"].stop()


def test_clock_an_hour_ahead_is_refused_and_the_site_says_so(deployment, skewed: Callable) -> None:
    deployment.sites["east"].stop()
    east = deployment.start_site("east", skewed(3600))
    east.says(r"event=link_down .*this clock may be 5 s ahead or 5 minutes behind \(the server's is -3[56]\d\d s ahead")
    assert east.is_alive
    assert "event=connected" not in east.said
    east.stop()
    deployment.start_site("east").says("event=connected")


@contextmanager
def _other_server(folder: Path, heard: list[bytes]) -> Iterator[int]:
    """A server at this consortium's address whose certificate another authority signed; what it is told."""
    file = folder / "CONSORTIUM.toml"
    file.write_text('name = "brains"\n[server]\nhost = "127.0.0.1"\nport = 8443\n[[sites]]\nname = "north"\n')
    provision(file, folder / "coordinator")
    other = open_consortium(folder / "coordinator")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(other.server_certificate, other.server_key)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    heard.append(context.wrap_socket(connection, server_side=True).recv(1))
                except OSError:  # the other side ended the handshake
                    heard.append(b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
