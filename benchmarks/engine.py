"""What the engine costs: the real apps on the in-process Grid beside a plain loop over the same work.

``python benchmarks/engine.py`` runs both on two workloads, in turn, every run in a process of its own, and
compares rounds: medians within a run, medians of ratios over repeats. It exits with 0 only when every row with a
target holds. ``--json`` prints the rows, machine and versions as one object; ``--quick`` takes a few sites and
rounds, enough to see that everything agrees and too little to time anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from simulation.bench.rows import Row, show, this_machine

HERE = Path(__file__).resolve().parent
PSS_INTERVAL_S = 0.1
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(HERE.parent),
}


@dataclass(frozen=True)
class Scale:
    """How much of a workload is run."""

    workload: str
    num_sites: int
    num_rounds: int


FULL = {"vit16q": Scale("vit16q", 16, 4), "tiny100": Scale("tiny100", 100, 40)}
QUICK = {"vit16q": Scale("vit16q", 2, 2), "tiny100": Scale("tiny100", 4, 3)}


@dataclass(frozen=True)
class Engine:
    """A way to run a workload: ``plain`` in 1 or more processes, ``federated`` with 0 or more workers."""

    script: str
    processes: int

    def run(self, scale: Scale, folder: Path, *, num_rounds: int | None = None, watch: bool = False) -> Timing:
        rounds = 1 + (num_rounds or scale.num_rounds)  # the first warms up and counts as startup
        return _run_script(
            f"{self.script}.py", scale.workload, scale.num_sites, rounds, self.processes, folder, watch=watch
        )

    def adapter(self, folder: Path) -> dict[str, object]:
        """What the last run ended with."""
        return load_file(folder / f"{self.script}-{self.processes}.safetensors")


@dataclass(frozen=True)
class Timing:
    """Seconds per round, without the first; peak memory of the process tree where it was watched."""

    startup_s: float
    wall_s: list[float]
    cpu_s: list[float]
    peak_pss_bytes: int = 0

    @property
    def round_s(self) -> float:
        return statistics.median(self.wall_s)

    @property
    def round_cpu_s(self) -> float:
        return statistics.median(self.cpu_s)


PLAIN, PLAIN_2 = Engine("plain", 1), Engine("plain", 2)
SERIAL, ONE_WORKER, TWO_WORKERS = (Engine("federated", workers) for workers in (0, 1, 2))


def measure(scales: dict[str, Scale], repeats: int, folder: Path) -> Iterator[Row]:
    """Run everything and give the rows as they are ready."""
    folders = {name: folder / name for name in scales}
    for name, scale in scales.items():
        folders[name].mkdir()
        _run_script("federated.py", "--prepare", scale.workload, scale.num_sites, folders[name])

    vit, tiny = scales["vit16q"], scales["tiny100"]
    yield from _compare("vit16q serial / plain", SERIAL, PLAIN, vit, folders["vit16q"], repeats, target=1.03)
    yield from _compare("tiny100 serial / plain", SERIAL, PLAIN, tiny, folders["tiny100"], repeats, target=2.0)
    yield from _compare(
        "vit16q 2 workers / 2 plain processes", TWO_WORKERS, PLAIN_2, vit, folders["vit16q"], repeats, target=1.05
    )
    # Watching memory disturbs the clock, so it has runs of its own.
    pss = {e: e.run(vit, folders["vit16q"], num_rounds=2, watch=True).peak_pss_bytes for e in (PLAIN, TWO_WORKERS)}
    yield Row("vit16q plain peak PSS", pss[PLAIN] / 2**20, "MiB", None)
    yield Row("vit16q peak PSS 2 workers / plain", pss[TWO_WORKERS] / pss[PLAIN], "ratio", 1.25)
    for name, scale in scales.items():
        yield from _agreement(name, scale, folders[name])


def _compare(
    name: str, engine: Engine, limit: Engine, scale: Scale, folder: Path, repeats: int, *, target: float
) -> Iterator[Row]:
    pairs = []
    for repeat in range(repeats):
        order = (engine, limit) if repeat % 2 else (limit, engine)
        timings = {each: each.run(scale, folder) for each in order}
        pairs.append((timings[engine], timings[limit]))
    yield Row(name, statistics.median(a.round_s / b.round_s for a, b in pairs), "wall ratio", target)
    yield Row(f"{name}, CPU", statistics.median(a.round_cpu_s / b.round_cpu_s for a, b in pairs), "CPU ratio", None)
    per_client_ms = [1e3 * (a.round_s - b.round_s) / scale.num_sites for a, b in pairs]
    yield Row(f"{name}, added per site", statistics.median(per_client_ms), "ms", None)
    yield Row(
        f"{name}, startup and first round",
        statistics.median(a.startup_s / b.startup_s for a, b in pairs),
        "wall ratio",
        None,
    )


def _agreement(name: str, scale: Scale, folder: Path) -> Iterator[Row]:
    """The same rounds in every engine, to the end: equal bits among ours, equal numbers with the plain loop."""
    engines = (PLAIN, SERIAL, ONE_WORKER, TWO_WORKERS)
    for engine in engines:
        engine.run(scale, folder, num_rounds=2)
    plain, *ours = [engine.adapter(folder) for engine in engines]
    identical = all((ours[0][key] == other[key]).all() for other in ours[1:] for key in ours[0])  # type: ignore[attr-defined]
    yield Row(f"{name} bit-identical for 0, 1, 2 workers", bool(identical), "", True)
    distance = sum(float(((ours[0][key] - plain[key]) ** 2).sum()) for key in plain) ** 0.5  # type: ignore[operator]
    norm = sum(float((plain[key] ** 2).sum()) for key in plain) ** 0.5  # type: ignore[operator]
    yield Row(f"{name} parameters, relative distance to plain", distance / norm, "L2 ratio", 1e-6)


def _run_script(script: str, *arguments: object, watch: bool = False) -> Timing:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    peak = [0]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            watcher = threading.Thread(target=_watch_pss, args=(process, peak), daemon=True)
            if watch:
                watcher.start()
            assert process.stdout is not None
            output = process.stdout.read()
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    measured = json.loads(output.splitlines()[-1]) if output else {"startup_s": 0.0, "wall_s": [], "cpu_s": []}
    return Timing(**measured, peak_pss_bytes=peak[0])


def _watch_pss(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keep the largest sum of proportional set sizes (shared pages counted once) of a process and its children."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for member in (root, *root.children(recursive=True)):
                total += member.memory_full_info().pss
        except psutil.Error:
            continue  # one of them has just ended
        peak[0] = max(peak[0], total)
        time.sleep(PSS_INTERVAL_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small workloads; timings and memory have no targets")
    parser.add_argument("--repeats", type=int, default=None, help="interleaved repeats of each comparison (5)")
    options = parser.parse_args()
    machine = this_machine()
    repeats = options.repeats or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(QUICK if options.quick else FULL, repeats, Path(folder)))
    if options.quick:
        untimed = ("", "L2 ratio")
        rows = [row if row.unit in untimed else Row(row.name, row.value, row.unit, None) for row in rows]
    return 0 if show(rows, machine, as_json=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())
