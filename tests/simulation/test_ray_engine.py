from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from medfed.errors import MissingExtraError
from simulation.ray_engine import _toml_lines, run_on_ray

# isort: split
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

ROOT = Path(__file__).parents[2]

# In a process of its own: Ray and Flower's engine leave threads, signal handlers and warnings behind.
SCRIPT = """
import os, psutil, threading
from simulation.grid import InProcessGrid
from simulation.ray_engine import run_on_ray
import ray_apps

config = {"study": 'a "quoted"\\\\ line\\n\\u00e9', "lr": 1e-5, "rounds": 3, "dp": True}
addresses, done = set(), threading.Event()

def watch_listening_sockets():
    while not done.wait(0.2):
        for process in psutil.Process().children(recursive=True):
            try:
                sockets = process.net_connections("inet")
            except psutil.Error:
                continue
            addresses.update(s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN)

watcher = threading.Thread(target=watch_listening_sockets)
watcher.start()
before = dict(os.environ)
on_ray = run_on_ray(ray_apps.server_app, ray_apps.client_app, num_nodes=3, run_config=config, num_workers=2)
done.set()
watcher.join()
assert addresses, "no listening socket was seen"
assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses
assert dict(os.environ) == before, "the environment was changed"
with InProcessGrid(ray_apps.client_app, node_configs=[{}] * 3, run_config=config) as grid:
    here = grid.run_server_app(ray_apps.server_app)
assert dict(on_ray.state["seen"]) == dict(here.state["seen"]), (on_ray.state["seen"], here.state["seen"])
assert len(here.state["seen"]["replies"]) == 9
# Flower's event() runs `file -b python` for a moment in a thread of its own, whether or not telemetry is on.
psutil.wait_procs(psutil.Process().children(recursive=True), timeout=3)
left = psutil.Process().children(recursive=True)
assert left == [], f"Ray left processes behind: {left}"
print("ENGINES AGREE")
"""


def ray_pids() -> set[int]:
    names = ("raylet", "gcs_server", "ray::")
    return {p.pid for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith(names)}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs pip install "flwr[simulation]==1.41.0"')
def test_ray_and_the_in_process_grid_agree_and_ray_leaves_nothing_behind() -> None:
    before = ray_pids()
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "ENGINES AGREE" in done.stdout, done.stdout + done.stderr
    assert "patient_0042" not in done.stdout + done.stderr
    # Workers that outlive Ray's raylet for a moment are no longer children of the process that started it.
    give_up = time.monotonic() + 10
    while left := ray_pids() - before:
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def test_missing_ray_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"pip install .flwr\[simulation\]==1\.41\.0"):
        run_on_ray(ServerApp(), ClientApp(), num_nodes=1, run_config={}, num_workers=1)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs pip install "flwr[simulation]==1.41.0"')
@pytest.mark.parametrize(("num_nodes", "num_workers"), [(0, 1), (1, 0)])
def test_nothing_to_run_on_is_refused(num_nodes: int, num_workers: int) -> None:
    with pytest.raises(ValueError, match="num_nodes >= 1 and num_workers >= 1"):
        run_on_ray(ServerApp(), ClientApp(), num_nodes=num_nodes, run_config={}, num_workers=num_workers)


def test_run_config_holds_scalars_only() -> None:
    with pytest.raises(ValueError, match=r"run_config\['study'\], got bytes"):
        _toml_lines({"study": b"x"})  # type: ignore[dict-item]
