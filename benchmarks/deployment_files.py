"""What the SuperLink's open files are, over very many rounds in which nothing is computed.

    python benchmarks/deployment_files.py FOLDER [--rounds 1000] [--sites 4] [--json]

Real processes as in ``deployment_latency.py``: ``medfed server start`` and no-op sites, one run, 1k floats each way.
After each round every descriptor of the service is looked at: is it the database, the log that is written ahead of
it, a socket, or something else? The rounds are cut into ten parts; a leak shows as a least that rises from part to
part and ever on, a pool of connections as a count that reaches a bound and stays below it. The service's memory is
fitted as in ``deployment_soak.py``. FOLDER must not exist.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from deployment_latency import TIMEOUT_S, Rounds
from deployment_soak import KIB, Sample, judge, sample_of
from local_consortium import REPOSITORY, LocalConsortium

from server.flower_link import StudyRun, register_sites
from server.service import superlink_of
from simulation.bench.rows import Row, show, this_machine

PAYLOAD_BYTES = 4_000
NUM_PARTS = 10
WARM_UP = 0.1
KINDS = ("database", "write-ahead log", "socket", "other")


def kind_of(target: str) -> str:
    """Of an open file of the service, by what its descriptor points to."""
    if target.startswith("socket:"):
        return "socket"
    name = target.removesuffix(" (deleted)")
    if name.endswith("-wal"):
        return "write-ahead log"
    return "database" if name.endswith(".db") else "other"


def open_kinds(pid: int) -> Counter[str]:
    """Number of open files of each kind."""
    kinds: Counter[str] = Counter()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[kind_of(str(descriptor.readlink()))] += 1
        except OSError:
            continue  # closed meanwhile
    return kinds


def soak(consortium: LocalConsortium, num_rounds: int) -> tuple[list[Sample], list[Counter[str]]]:
    """Rounds, and what was seen of the service after each."""
    consortium.start("superlink", "server", "start", consortium.coordinator.root)
    script = str(REPOSITORY / "benchmarks" / "noop_site.py")
    for name, site in consortium.sites.items():
        consortium.start(name, site.root, command=[script])
    while "event=roster" not in consortium.log("superlink"):  # the service registers its sites itself
        time.sleep(0.5)
    superlink = superlink_of(consortium.coordinator)
    keys: dict[str, EllipticCurvePublicKey] = {}
    for name in consortium.sites:
        member = consortium.coordinator.roster().member(name)
        assert member is not None
        key = load_ssh_public_key(member.node_key.encode())
        assert isinstance(key, EllipticCurvePublicKey)
        keys[name] = key
    end_s = time.monotonic() + TIMEOUT_S
    found = register_sites(superlink, keys)
    while not all(node.is_online for node in found.values()):
        if time.monotonic() > end_s:
            raise SystemExit(f"Expected all sites online within {TIMEOUT_S:g} s; see the logs in {consortium.root}.")
        time.sleep(0.5)
        found = register_sites(superlink, keys)
    rounds = Rounds({name: node.node_id for name, node in found.items()})
    pid, payload = consortium.processes["superlink"].pid, os.urandom(PAYLOAD_BYTES)
    samples: list[Sample] = []
    kinds: list[Counter[str]] = []
    with StudyRun(superlink) as run:
        for number in range(1, num_rounds + 1):
            rounds.seconds(run.grid, tuple(consortium.sites), payload)
            sample = sample_of(pid, number)
            assert sample is not None
            samples.append(sample)
            kinds.append(open_kinds(pid))
            if number % max(1, num_rounds // 100) == 0:
                print(number, f"{sample.private_bytes / KIB:.0f} KiB", dict(kinds[-1]), file=sys.stderr)
    return samples, kinds


def judged(samples: list[Sample], kinds: list[Counter[str]]) -> Iterator[Row]:
    """All rows."""
    size = max(1, len(kinds) // NUM_PARTS)
    for kind in KINDS:
        for part, start in enumerate(range(0, size * NUM_PARTS, size), 1):
            counts = [seen[kind] for seen in kinds[start : start + size]]
            if counts:
                yield Row(f"{kind}: least in part {part}", float(min(counts)), "")
                yield Row(f"{kind}: most in part {part}", float(max(counts)), "")
    yield from judge("superlink", samples, warm_up=round(WARM_UP * len(samples)), long=True)


def main() -> int:
    """Soak, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    machine = this_machine()
    names = [f"site-{number}" for number in range(1, asked.sites + 1)]
    with LocalConsortium.make(asked.folder.resolve(), names) as consortium:
        samples, kinds = soak(consortium, asked.rounds)
    rows = list(judged(samples, kinds))
    return 0 if show(rows, machine, as_json=asked.json) else 1


if __name__ == "__main__":
    sys.exit(main())
