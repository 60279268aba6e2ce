"""What a round costs when nothing is computed: the product's site worker beside the stock ``flower-supernode``.

    python benchmarks/deployment_latency.py FOLDER [--repeats 7] [--stock-repeats 5] [--json]

One real SuperLink with TLS and node authentication on loopback, two nodes of each kind, one run. The same messages go
to both kinds, in turns, through the product's grid, which polls alike for both, so that only the node differs; some
go to the stock nodes through Flower's own grid. The stock nodes run the app as Flower does by default, in a process
for each message; it imports torch, as ours does once. A round is over when both nodes have answered.

Then: bytes on the wire for 1M floats each way, counted by a proxy; what killing a worker at work adds; seconds from
``medfed site start`` to its first answer about a study. Exits with 0 only when the targets hold. FOLDER must not exist.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

from counting_proxy import CountingProxy
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid
from local_consortium import ENVIRONMENT, REPOSITORY, LocalConsortium, free_port, tiny_study

import server.flower_link
from medfed.messages import RECORD_KEY, RoundInstruction
from medfed.study import FEDERATED
from server.flower_link import StudyRun, register_sites
from server.service import superlink_of
from simulation.bench.rows import Row, show, this_machine

OURS, STOCK, COUNTED = ("ours-1", "ours-2"), ("stock-1", "stock-2"), "counted"
SIZES = {"1k floats": 4_000, "1M floats": 4_000_000}
ROUND_S, RATIO = 1.0, 8.0
"""Goals: a no-op round of ours, and how much longer the stock node takes."""
WORK_S = 3
TIMEOUT_S = 180.0
STOCK_APP = b"""import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    record = message.content["KEY"]
    reply = ConfigRecord({"header": record["header"], "adapter": record["adapter"]})
    return Message(RecordDict({"KEY": reply}), reply_to=message)
""".replace(b"KEY", RECORD_KEY.encode())


def stock_fab() -> dict[str, bytes]:
    """The run's bundle with the app of the stock nodes; ours never ask for it."""
    files = dict(server.flower_link._CODELESS_FAB)
    text = files["pyproject.toml"].decode()
    text = text.replace('["LICENSE"]', '["LICENSE", "noop_app.py"]').replace("client.app:app", "noop_app:app")
    return {
        **files,
        "pyproject.toml": text.replace("server.app:app", "noop_app:app").encode(),
        "noop_app.py": STOCK_APP,
    }


def start_stock(consortium: LocalConsortium, name: str) -> None:
    """A stock node with the key of a site."""
    scripts = Path(str(distribution("flwr").locate_file("../../../bin"))).resolve()
    home = consortium.root / f"{name}-home"
    environment = {**ENVIRONMENT, "PATH": f"{scripts}:{os.environ['PATH']}", "FLWR_HOME": str(home)}
    environment.pop("PYTHONPATH")
    with (consortium.root / f"{name}.log").open("ab") as log:
        consortium.processes[name] = subprocess.Popen(
            [
                *(str(scripts / "flower-supernode"), "--superlink", consortium.address),
                *("--root-certificates", str(consortium.coordinator.ca_certificate)),
                *("--auth-supernode-private-key", str(consortium.sites[name].node_key)),
                *("--port", str(free_port())),
            ],
            env=environment,
            stdout=log,
            stderr=log,
        )


class Rounds:
    """No-op rounds of one run, numbered."""

    def __init__(self, nodes: Mapping[str, int]) -> None:
        self._nodes = nodes
        self._number = 0

    def messages(self, sites: Sequence[str], payload: bytes, *, work_s: int = 0) -> list[Message]:
        """One for each site."""
        self._number += 1
        asked = RoundInstruction(study_digest="0" * 64, round=self._number, scope=FEDERATED, attempt=1 + work_s)
        fields = asked.to_fields(study=b"", adapter=payload, broadcast=b"", secure=b"")
        content = RecordDict({RECORD_KEY: ConfigRecord(dict(fields))})
        return [Message(content, self._nodes[site], "train", ttl=TIMEOUT_S) for site in sites]

    def seconds(self, grid: Grid, sites: Sequence[str], payload: bytes) -> float:
        """Of one round.

        Raises:
            SystemExit: if a site did not send the payload back.
        """
        messages = self.messages(sites, payload)
        began_s = time.perf_counter()
        replies = list(grid.send_and_receive(messages, timeout=TIMEOUT_S))
        took_s = time.perf_counter() - began_s
        require_echoes(replies, len(sites), payload)
        return took_s


def require_echoes(replies: Sequence[Message], count: int, payload: bytes) -> None:
    """Refuses to time rounds in which something else happened."""
    good = [reply for reply in replies if reply.has_content() and reply.content[RECORD_KEY]["adapter"] == payload]  # type: ignore[index]
    if len(good) != count:
        errors = [str(reply.error) for reply in replies if reply.has_error()]
        raise SystemExit(f"Expected {count} echoes, got {len(good)} and {errors}; see the logs.")


def measure(consortium: LocalConsortium, repeats: int, stock_repeats: int) -> Iterator[Row]:
    """All rows."""
    consortium.start("superlink", "server", "start", consortium.coordinator.root)
    for name in OURS:
        consortium.start(name, consortium.sites[name].root, command=[str(REPOSITORY / "benchmarks" / "noop_site.py")])
    while "event=roster" not in consortium.log("superlink"):  # the service registers its sites itself
        time.sleep(0.5)
    superlink = superlink_of(consortium.coordinator)
    members = {name: consortium.coordinator.roster().member(name) for name in consortium.sites}
    keys = {name: load_ssh_public_key(member.node_key.encode()) for name, member in members.items() if member}
    for name in STOCK:
        start_stock(consortium, name)
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        if time.monotonic() > end_s:
            raise SystemExit(f"Expected four nodes online within {TIMEOUT_S:g} s; see the logs in {consortium.root}.")
        found = register_sites(superlink, keys)  # type: ignore[arg-type]
        if all(found[name].is_online for name in (*OURS, *STOCK)):
            break
        time.sleep(0.5)
    nodes = {name: node.node_id for name, node in found.items()}
    server.flower_link._CODELESS_FAB = stock_fab()
    rounds = Rounds(nodes)
    with StudyRun(superlink) as run:
        stock_grid = HttpGrid(superlink.address, False, superlink.ca_certificate, token="unused")
        stock_grid._client = run._client
        stock_grid.set_run(run.grid.run)
        took: dict[tuple[str, str], list[float]] = {}
        load: dict[tuple[str, str], list[float]] = {}
        payloads = {size: os.urandom(count) for size, count in SIZES.items()}
        kinds: list[tuple[str, Sequence[str], Grid, int]] = [
            ("ours", OURS, run.grid, repeats),
            ("stock node", STOCK, run.grid, stock_repeats),
            ("ours", OURS, run.grid, repeats),
            ("stock node and stock grid", STOCK, stock_grid, min(2, stock_repeats)),
        ]
        for sites in (OURS, STOCK):
            rounds.seconds(run.grid, sites, payloads["1k floats"])  # starts everything
        for repeat in range(max(repeats, stock_repeats)):
            for size, payload in payloads.items():
                for kind, sites, grid, times in kinds:
                    if repeat >= times:
                        continue
                    load.setdefault((kind, size), []).append(os.getloadavg()[0])
                    took.setdefault((kind, size), []).append(rounds.seconds(grid, sites, payload))
                    print(kind, size, f"{took[kind, size][-1]:.2f} s", file=sys.stderr)
        for (kind, size), seconds in took.items():
            name = f"{kind}, {size}"
            yield Row(name, statistics.median(seconds), "s", ROUND_S if kind == "ours" else None)
            yield Row(f"{name}, least", min(seconds), "s")
            yield Row(f"{name}, most", max(seconds), "s")
            yield Row(f"{name}, rounds", float(len(seconds)), "")
            yield Row(f"{name}, mean load average", statistics.mean(load[kind, size]), "")
        for size in SIZES:
            ratio = statistics.median(took["stock node", size]) / statistics.median(took["ours", size])
            yield Row(f"stock node / ours, {size}", ratio, "x", RATIO, at_least=True)
        for name in STOCK:
            consortium.processes[name].terminate()
        yield from _wire(consortium, rounds, run.grid, payloads["1M floats"])
        yield from _killed(consortium, rounds, run.grid, payloads["1k floats"])
        yield from _first_answer(consortium, run.grid, nodes[OURS[1]])


def _wire(consortium: LocalConsortium, rounds: Rounds, grid: Grid, payload: bytes) -> Iterator[Row]:
    proxy = CountingProxy(consortium.address)
    script = str(REPOSITORY / "benchmarks" / "noop_site.py")
    consortium.start(COUNTED, consortium.sites[COUNTED].root, proxy.address, command=[script])
    while "event=connected" not in consortium.log(COUNTED):
        time.sleep(0.2)
    rounds.seconds(grid, (COUNTED,), payload)
    idle = (proxy.up_bytes, proxy.down_bytes)
    time.sleep(5.0)
    idle_bytes = proxy.up_bytes + proxy.down_bytes - sum(idle)
    before = (proxy.up_bytes, proxy.down_bytes)
    for _ in range(3):
        rounds.seconds(grid, (COUNTED,), payload)
    yield Row("payload each way, 1M floats", float(len(payload)), "bytes")
    yield Row("on the wire to a site, a round of 1M floats", (proxy.down_bytes - before[1]) / 3, "bytes")
    yield Row("on the wire from a site, a round of 1M floats", (proxy.up_bytes - before[0]) / 3, "bytes")
    yield Row("on the wire, a site that waits, in the first 5 s", idle_bytes / 5, "bytes/s")
    consortium.processes[COUNTED].terminate()


def _killed(consortium: LocalConsortium, rounds: Rounds, grid: Grid, payload: bytes) -> Iterator[Row]:
    """Seconds that kill -9 in the middle of its work adds, where the process is started again at once."""
    name = OURS[0]
    took: list[float] = []
    for kill in (False, True):
        messages = rounds.messages([name], payload, work_s=WORK_S)
        began_s = time.perf_counter()
        waiting = list(grid.push_messages(messages))
        if kill:
            time.sleep(1.5)
            consortium.processes[name].kill()
            consortium.processes[name].wait()
            script = str(REPOSITORY / "benchmarks" / "noop_site.py")
            consortium.start(name, consortium.sites[name].root, command=[script])
        replies: list[Message] = []
        while not replies and time.perf_counter() - began_s < TIMEOUT_S:
            time.sleep(0.05)
            replies = list(grid.pull_messages(waiting))
        took.append(time.perf_counter() - began_s)
        require_echoes(replies, 1, payload)
    yield Row(f"a worker killed half-way through {WORK_S} s of work adds", took[1] - took[0], "s")


def _first_answer(consortium: LocalConsortium, grid: Grid, node: int) -> Iterator[Row]:
    """From ``medfed site start`` to its answer that it can serve a study."""
    name = OURS[1]
    study = consortium.approved(
        tiny_study(tuple(consortium.sites), num_rounds=2, evaluate_every=1, private=False)
    ).study
    consortium.processes[name].terminate()
    consortium.processes[name].wait()
    asked = RoundInstruction(study_digest=study.digest, round=0, scope=FEDERATED)
    fields = asked.to_fields(study=study.canonical, adapter=b"", broadcast=b"", secure=b"")
    message = Message(RecordDict({RECORD_KEY: ConfigRecord(dict(fields))}), node, "query.describe", ttl=TIMEOUT_S)
    began_s, connected = time.perf_counter(), consortium.log(name).count("event=connected")
    consortium.start(name, "site", "start", consortium.sites[name].root)
    while consortium.log(name).count("event=connected") == connected:  # before, the SuperLink takes no message for it
        time.sleep(0.05)
    replies = list(grid.send_and_receive([message], timeout=TIMEOUT_S))
    took_s = time.perf_counter() - began_s
    if len(replies) != 1 or replies[0].has_error():
        raise SystemExit(f"Expected an answer of {name}, got none; see the logs.")
    yield Row("'medfed site start' to its first answer", took_s, "s")


def main() -> int:
    """Measure, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--stock-repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    machine = this_machine()
    with LocalConsortium.make(asked.folder.resolve(), [*OURS, *STOCK, COUNTED]) as consortium:
        rows = list(measure(consortium, asked.repeats, asked.stock_repeats))
    return 0 if show(rows, machine, as_json=asked.json) else 1


if __name__ == "__main__":
    sys.exit(main())
