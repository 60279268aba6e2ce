"""A site in a network of its own, whose cable is pulled for a round: nothing is refused, packets just do not arrive.

The site runs in a network namespace with one virtual cable to this machine, and an HTTP CONNECT proxy at its other end
as the only way out, as hospitals have it. Linux makes namespaces for root alone, or for whoever has CAP_NET_ADMIN.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

OURS, THEIRS = "198.18.77.1", "198.18.77.2"
"""Both ends of the cable, in the addresses that are set aside for benchmarks (RFC 2544)."""


class Cable:
    """A network namespace and its only link."""

    def __init__(self) -> None:
        self.name = f"medfed{os.getpid()}"
        self._near, self._far = f"mf{os.getpid()}a", f"mf{os.getpid()}b"
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
            ip("address", "add", f"{OURS}/30", "dev", self._near)
            self._inside("address", "add", f"{THEIRS}/30", "dev", self._far)
            self._inside("link", "set", "lo", "up")
            self._inside("link", "set", self._far, "up")
            self.plug()
        except OSError:
            self.remove()
            raise

    def pull(self) -> None:
        """Both ends lose their carrier; what is sent from now on is lost without a word."""
        ip("link", "set", self._near, "down")

    def plug(self) -> None:
        ip("link", "set", self._near, "up")

    def sent(self) -> int:
        """Bytes that the site's end has sent so far."""
        statistics = self._inside("-o", "-s", "link", "show", "dev", self._far).split("TX:")[1].split("\\")[1]
        return int(statistics.split()[0])

    def remove(self) -> None:
        ip("netns", "delete", self.name)  # and with it the link

    def _inside(self, *arguments: str) -> str:
        return ip("-n", self.name, *arguments)


def ip(*arguments: str) -> str:
    """Iproute2's command."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None:
        pytest.skip("no 'ip' here: install Debian's package iproute2")
    try:
        made = Cable()
    except OSError as error:
        if os.geteuid() == 0 and "not permitted" not in str(error):
            raise
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        yield made
    finally:
        made.remove()


def test_cable_pulled_for_a_round_costs_time_alone(
    deployment, undisturbed: bytes, cable: Cable, proxy_at: Callable, until: Callable
) -> None:
    proxy = proxy_at(OURS)
    deployment.sites["east"].stop()
    east = deployment.start_site("east", proxy.environment, inside=("ip", "netns", "exec", cable.name))
    east.says("event=connected")
    try:
        run = deployment.begin(deployment.sign("cable", rounds={"num_rounds": 3, "deadline_s": 60}))
        until(lambda: deployment.in_work("east") == "train 2", what="round 2", seconds=120.0)  # it has to warm up first
        cable.pull()
        before = cable.sent()
        with pytest.raises(AssertionError, match="waited"):
            until(lambda: run.trained().get(2), seconds=4.0, what="round 2 without the site")
        assert cable.sent() == before
        assert run.is_alive
        assert east.is_alive
        cable.plug()
        assert run.finishes() == undisturbed
        assert run.trained() == {number: ["north", "east", "few"] for number in (1, 2, 3)}
        assert proxy.asked
    finally:
        east.stop()
