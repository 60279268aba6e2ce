"""The same two apps on Flower's Ray simulation engine, for clusters and for checking one engine by another."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medfed.errors import MissingExtraError, RoundError
from simulation.client_call import GuardedClientApp
from simulation.flower_private import SERVER_NODE_ID, run_on_simulation_engine

# isort: split
from flwr.app import Context, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["run_on_ray"]

# What Flower demands of a pyproject.toml before it reads the table that follows, in which our run-config stands.
_APP_FILE_HEAD = """\
[project]
name = "medfed-simulation"
version = "0"
[tool.flwr.app]
publisher = "medfed"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
"""

# With "0", Ray listens on loopback alone, on Linux as well; it turns _node_ip_address="127.0.0.1" into the
# machine's public address otherwise. Ray reads the switch when it is first imported.
_RAY_CLUSTER_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

_RUN_ID_BITS = 62
_NODES_TIMEOUT_S = 60.0
_NODES_POLL_S = 0.05
_RAY_GRACE_S = 10.0


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_nodes: int,
    run_config: UserConfig,
    num_workers: int,
    gpus_per_worker: float = 0.0,
) -> Context:
    """Run both apps, unmodified, on Flower's Ray engine and return the server's context.

    A local Ray is started on loopback (unless this process imported Ray before), without dashboard or usage
    report, and is stopped on return (a worker may need a moment more); its logs stay in ``/tmp/ray``.

    For a cluster call ``ray.init(address=...)`` first: it is used as it is, with as many actors as it has CPUs,
    and disconnected on return (not tested).

    Every node has
    ``Context.node_config`` ``{"partition-id": i, "num-partitions": num_nodes}`` and nothing else. Ray pickles
    the client app with every message: let it load its model on first use and keep it in its module.

    Not guaranteed: node ids are random, so sums in the order of node ids differ between two runs in the last
    bit; a server app that wants equal bits sums by partition.

    Args:
        server_app: the app to run here, in a thread of its own.
        client_app: the app every node runs; its errors reach the server as the exception's type alone.
        num_nodes: virtual sites, >= 1.
        run_config: scalars that both the server's and every node's ``Context.run_config`` hold.
        num_workers: Ray actors of one CPU each, >= 1.
        gpus_per_worker: GPU share of each actor.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: a number is out of range, or a value of ``run_config`` is not a bool, int, float or str.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(
            'Expected the package "ray", got none: run `pip install "flwr[simulation]==1.41.0"`, '
            "or use the in-process engine, which needs no extra."
        )
    if num_nodes < 1 or num_workers < 1:
        raise ValueError(f"Expected num_nodes >= 1 and num_workers >= 1, got {num_nodes} and {num_workers}.")
    app_file = _APP_FILE_HEAD + _toml_lines(run_config)
    context = Context(
        run_id=secrets.randbits(_RUN_ID_BITS),
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    with (
        tempfile.TemporaryDirectory(prefix="medfed-ray-") as directory,
        _quiet_environment(directory),
        _ray_ended_on_leaving(),
    ):
        Path(directory, "pyproject.toml").write_text(app_file, encoding="utf-8")
        return run_on_simulation_engine(
            _PatientServerApp(server_app, num_nodes=num_nodes),
            GuardedClientApp(client_app),
            num_nodes=num_nodes,
            server_context=context,
            app_directory=directory,
            backend_config={
                "init_args": {
                    "include_dashboard": False,
                    "log_to_driver": False,
                    "logging_level": "WARNING",
                    "num_cpus": num_workers,
                },
                "client_resources": {"num_cpus": 1, "num_gpus": gpus_per_worker},
            },
        )


class _PatientServerApp(ServerApp):
    """A server app that starts when all nodes are there; Flower's engine starts it before it adds any.

    Args:
        inner: the server app to call.
        num_nodes: nodes to wait for.
    """

    def __init__(self, inner: ServerApp, *, num_nodes: int) -> None:
        super().__init__()
        self._inner = inner
        self._num_nodes = num_nodes

    def __call__(self, grid: Grid, context: Context) -> None:
        """Wait for the nodes, then run the inner app.

        Raises:
            RoundError: the nodes are not there after a minute.
        """
        deadline_s = time.monotonic() + _NODES_TIMEOUT_S
        while (num_present := len(list(grid.get_node_ids()))) < self._num_nodes:
            if time.monotonic() > deadline_s:
                raise RoundError(
                    f"Expected {self._num_nodes} nodes after {_NODES_TIMEOUT_S:.0f} s, got {num_present}: "
                    "see Ray's log for why its engine did not start."
                )
            time.sleep(_NODES_POLL_S)
        self._inner(grid=grid, context=context)


def _toml_lines(run_config: UserConfig) -> str:
    """Return ``run_config`` as the lines of a TOML table that reads back equal.

    A JSON string, ASCII only, is a TOML basic string with the same value, surrogate pairs excepted: what lies
    outside the Basic Multilingual Plane stays itself.

    Raises:
        ValueError: a value is not a bool, int, float or str.
    """
    return "".join(f"{_toml_string(key)} = {_toml_value(key, value)}\n" for key, value in run_config.items())


def _toml_value(key: str, value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _toml_string(value)
        case int() | float():
            return repr(value)
    raise ValueError(f"Expected a bool, int, float or str in run_config[{key!r}], got {type(value).__name__}.")


def _toml_string(text: str) -> str:
    # TOML forbids raw DEL; JSON leaves it alone.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def _quiet_environment(flower_home: str) -> Iterator[None]:
    """Set what Ray and Flower read from the environment, and put back what they change there.

    Flower's engine writes an installation id to its home even when telemetry is off: give it one that goes.
    """
    before = dict(os.environ)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[_RAY_CLUSTER_SWITCH] = "0"
    os.environ["FLWR_HOME"] = flower_home
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _ray_ended_on_leaving() -> Iterator[None]:
    """Stop Ray on leaving, and wait until what it started here has ended: Ray itself only sends the signals."""
    import ray
    import psutil  # type: ignore[import-untyped]  # isort: skip  # Ray brings its own

    others = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        ray.shutdown()
        deadline_s = time.monotonic() + _RAY_GRACE_S
        while (started := set(psutil.Process().children(recursive=True)) - others) and (time.monotonic() < deadline_s):
            psutil.wait_procs(started, timeout=_NODES_POLL_S)
        late = list(filter(_belongs_to_ray, started))
        for process in late:
            process.kill()
        psutil.wait_procs(late, timeout=_RAY_GRACE_S)


def _belongs_to_ray(process: Any) -> bool:
    import psutil

    try:
        words = process.cmdline()
    except psutil.ZombieProcess:
        return True  # ended, and nobody has looked yet
    except psutil.NoSuchProcess:
        return False
    # A process that is just ending has no command line; waiting for it costs nothing.
    return not words or any("/ray/" in word or word.startswith("ray::") for word in words)
