"""Does anything grow while a consortium works? Real processes, a tiny study, many rounds.

    python benchmarks/deployment_soak.py FOLDER [--rounds 200] [--sites 8] [--private] [--again] [--json]

Starts ``medfed server start``, ``medfed server run`` and a ``medfed site start`` for each site, and looks at each
process every two seconds: private and resident memory, open files, sockets, threads. After a warm-up of a tenth of
the rounds, each process's private memory is fitted against rounds: Theil-Sen on the least of each of twenty blocks,
with a 95 % interval. What is at work comes and goes, a leak stays, and neighbouring samples do not count as many.
Exits with 0 only when every bound holds.

FOLDER must not exist; everything is written into it and stays there, and ``--again`` judges it once more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from local_consortium import LocalConsortium, tiny_study
from scipy.stats import theilslopes

from server.run_status import read_status
from simulation.bench.rows import Row, show, this_machine

LOOK_EVERY_S = 2.0
WARM_UP = 0.1
HEARTBEAT_S = 12.0
"""Heartbeats come every ten seconds over a second connection that idles for five: no part looked at may be shorter."""
NUM_BLOCKS = 20
SLOPE_KIB = 16.0
"""Private memory that a process may gain in a round: 1,000 rounds are 16 MiB."""
GROWTH_MIB = 8.0
"""Private memory that a process may gain after the warm-up: what a slope says little about in a short run."""
GIVE_UP_S = 3600.0
KIB, MIB = 1024.0, 1024.0**2


@dataclass(frozen=True)
class Sample:
    """One look at one process."""

    round: int
    private_bytes: int
    rss_bytes: int
    files: int
    sockets: int
    threads: int


@dataclass(frozen=True)
class Look:
    """One look at what lies on the disk."""

    round: int
    at_s: float
    database_bytes: int
    checkpoint_bytes: int
    site_state_bytes: int


def soak(consortium: LocalConsortium, *, num_rounds: int, private: bool) -> tuple[dict[str, list[Sample]], list[Look]]:
    """Run the study, and what was seen meanwhile."""
    every = max(1, num_rounds // 10)
    study = tiny_study(tuple(consortium.sites), num_rounds=num_rounds, evaluate_every=every, private=private)
    signed = consortium.approved(study)
    consortium.start("superlink", "server", "start", consortium.coordinator.root)
    for name, site in consortium.sites.items():
        consortium.start(name, "site", "start", site.root)
    consortium.start("server", "server", "run", consortium.coordinator.root, signed.path, "--json")
    samples: dict[str, list[Sample]] = {name: [] for name in consortium.processes}
    looks: list[Look] = []
    began_s = time.monotonic()
    server = consortium.processes["server"]
    while server.poll() is None:
        time.sleep(LOOK_EVERY_S)
        if time.monotonic() - began_s > GIVE_UP_S:
            raise SystemExit(f"Expected {num_rounds} rounds within {GIVE_UP_S:g} s; see the logs in {consortium.root}.")
        number = _round(consortium)
        if number < 1:
            continue
        for name, process in consortium.processes.items():
            if (sample := sample_of(process.pid, number)) is not None:
                samples[name].append(sample)
        looks.append(_look(consortium, number, time.monotonic() - began_s))
    if server.returncode:
        raise SystemExit(f"The server ended with {server.returncode}: {consortium.log('server')[-2000:]}")
    return samples, looks


def _round(consortium: LocalConsortium) -> int:
    runs = list(consortium.coordinator.runs.glob("*/status.json"))
    return read_status(runs[0].parent).round if runs else 0


def sample_of(pid: int, number: int) -> Sample | None:
    """One look at a process; None if it has just ended."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            memory = process.memory_full_info()
            files = [Path(f"/proc/{pid}/fd") / name.name for name in Path(f"/proc/{pid}/fd").iterdir()]
            sockets = sum(_is_socket(file) for file in files)
            return Sample(number, memory.uss, memory.rss, len(files), sockets, process.num_threads())
    except (psutil.Error, OSError):
        return None  # it has just ended


def _is_socket(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("socket:")
    except OSError:
        return False


def _look(consortium: LocalConsortium, number: int, at_s: float) -> Look:
    database = consortium.coordinator.state_database
    first = next(iter(consortium.sites.values()))
    return Look(
        round=number,
        at_s=round(at_s, 1),
        database_bytes=sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*")),
        checkpoint_bytes=sum(p.stat().st_size for p in consortium.coordinator.runs.glob("*/checkpoint.safetensors")),
        site_state_bytes=_size(first.state),
    )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # replaced meanwhile
    return total


@dataclass(frozen=True)
class Slope:
    """Bytes per round with a 95 % interval."""

    bytes_per_round: float
    low: float
    high: float


def slope_of(rounds: list[int], values: list[int]) -> Slope:
    """Theil-Sen slope of the least of each block; as many blocks as there are samples, if those are few."""
    size = max(1, len(rounds) // NUM_BLOCKS)
    starts = range(0, len(rounds) - size + 1, size)
    x = [statistics.median(rounds[start : start + size]) for start in starts]
    y = [min(values[start : start + size]) for start in starts]
    if len(set(x)) < 3:
        return Slope(float("nan"), float("nan"), float("nan"))
    slope, _, low, high = theilslopes(y, x)
    return Slope(float(slope), float(low), float(high))


def judge(name: str, samples: list[Sample], *, warm_up: int, long: bool) -> Iterator[Row]:
    """What a process gained after the warm-up."""
    kept = [sample for sample in samples if sample.round > warm_up]
    if len(kept) < 3:
        raise SystemExit(f"Expected three looks at {name} after round {warm_up}, got {len(kept)}; run more rounds.")
    slope = slope_of([sample.round for sample in kept], [sample.private_bytes for sample in kept])
    part = max(round(HEARTBEAT_S / LOOK_EVERY_S), len(kept) // 5)
    first, last = kept[:part], kept[-part:]
    growth = min(s.private_bytes for s in last) - min(s.private_bytes for s in first)
    yield Row(f"{name}: private memory", slope.bytes_per_round / KIB, "KiB/round", SLOPE_KIB if long else None)
    yield Row(f"{name}: private memory, low end of 95 %", slope.low / KIB, "KiB/round")
    yield Row(f"{name}: private memory, high end of 95 %", slope.high / KIB, "KiB/round")
    yield Row(f"{name}: growth after warm-up", growth / MIB, "MiB", GROWTH_MIB)
    yield Row(f"{name}: resident memory, most", max(s.rss_bytes for s in samples) / MIB, "MiB")
    for what in ("files", "sockets", "threads"):
        # The least of each part: a file that is open while something is written comes and goes, a leak stays.
        gained = min(getattr(s, what) for s in last) - min(getattr(s, what) for s in first)
        yield Row(f"{name}: {what} gained", gained, "", 0.0)
        yield Row(f"{name}: {what}, most", max(getattr(s, what) for s in samples), "")


def judged(samples: dict[str, list[Sample]], looks: list[Look], *, num_rounds: int) -> Iterator[Row]:
    """All rows. Before the first and after the last round other work is done: models are built, a report is drawn."""
    for name, several in samples.items():
        within = [sample for sample in several if sample.round < num_rounds]
        yield from judge(name, within, warm_up=round(WARM_UP * num_rounds), long=num_rounds >= 100)
    for what in ("database", "checkpoint", "site_state"):
        sizes = [getattr(look, f"{what}_bytes") for look in looks]
        slope = slope_of([look.round for look in looks], sizes)
        yield Row(f"{what} on disk, at the end", sizes[-1] / MIB, "MiB")
        yield Row(f"{what} on disk", slope.bytes_per_round / KIB, "KiB/round")
    seconds = (looks[-1].at_s - looks[0].at_s) / max(1, looks[-1].round - looks[0].round)
    yield Row("rounds", float(num_rounds), "")
    yield Row("a round", seconds, "s")


def main() -> int:
    """Soak, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--private", action="store_true", help="noised steps, and a ledger that is charged")
    parser.add_argument("--again", action="store_true", help="judge what an earlier run left in FOLDER")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    machine = this_machine()
    kept = asked.folder / "samples.json"
    if asked.again:
        seen = json.loads(kept.read_text())
        machine = seen["machine"]
        samples = {name: [Sample(**one) for one in several] for name, several in seen["samples"].items()}
        looks = [Look(**one) for one in seen["disk"]]
    else:
        names = [f"site-{number}" for number in range(1, asked.sites + 1)]
        with LocalConsortium.make(asked.folder.resolve(), names) as consortium:
            samples, looks = soak(consortium, num_rounds=asked.rounds, private=asked.private)
        raw = {name: [asdict(sample) for sample in several] for name, several in samples.items()}
        disk = [asdict(look) for look in looks]
        kept.write_text(json.dumps({"samples": raw, "disk": disk, "machine": machine}))
    rows = list(judged(samples, looks, num_rounds=asked.rounds))
    return 0 if show(rows, machine, as_json=asked.json) else 1


if __name__ == "__main__":
    sys.exit(main())
