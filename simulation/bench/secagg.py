"""What secure aggregation costs: Flower's SecAgg+ beside ours, each by its own unchanged code.

What each part of a round takes in is told in :mod:`simulation.bench.secagg_steps`. The two run in turn in one process
of one thread, and a ratio is the median over repeats of the ratio within a repeat. Processor time, not wall time:
Flower's Shamir sharing runs on several threads, and a machine that is busy with something else changes little.

Ratios are Flower's value over ours, so larger is better for us, but for bytes, where it is ours over Flower's.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simulation.bench.one_thread import answers
from simulation.bench.rows import Row
from simulation.bench.secagg_steps import ROUNDS_PER_EPOCH, Workload
from simulation.progress import Reporter

FLOWER, OURS = "flwr", "medfed"
PARTS = ("client", "server adds", "server opens")

BYTES_TARGET = 0.51
"""Ours are 4 bytes for a parameter, Flower's 8; the rest is what shares and signatures may take."""

ERROR_TARGET = 2.0**-24
"""Half a unit of a clip norm of 1 in 24 bits: what rounding to the nearest may lose."""


@dataclass(frozen=True)
class Case:
    """A workload and what is promised of it.

    Attributes:
        work: the workload.
        client: least ratio of the client's time; None where nothing is promised.
        server: least ratio of the time to open the sum.
        client_s: most that our client may take.
    """

    work: Workload
    client: float | None = None
    server: float | None = None
    client_s: float | None = None


Scale = tuple[Case, ...]

FULL: Scale = (
    Case(Workload(num_sites=8, num_parameters=1_000_000, repeats=5)),
    Case(Workload(num_sites=32, num_parameters=1_000_000, repeats=5), client=10.0, server=50.0),
    # Flower's server takes a minute to open this sum.
    Case(Workload(num_sites=100, num_parameters=1_000_000, repeats=1)),
    Case(Workload(num_sites=32, num_parameters=10_000_000, repeats=3, ours_alone=True), client_s=0.6),
)
GATE: Scale = (Case(Workload(num_sites=8, num_parameters=1_000_000, repeats=3), client=3.0, server=5.0),)


def measure(scale: Scale, reporter: Reporter) -> list[Row]:
    """Run everything; about four minutes for :data:`FULL`, ten seconds for :data:`GATE`."""
    return [row for case in scale for row in _rows(case, reporter)]


@dataclass
class _Measured:
    """What a process of :mod:`simulation.bench.secagg_steps` answered."""

    cpu_s: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Workload, reporter: Reporter) -> _Measured:
        parts = 1 if work.ours_alone else 2 * len(PARTS)
        reporter.start(_title(work), work.repeats * parts)
        measured = cls()
        for line in answers("simulation.bench.secagg_steps", json.dumps(dataclasses.asdict(work))):
            if "part" in line:
                measured.cpu_s[line["arm"], line["part"]].append(line["cpu_s"])
                reporter.step()
            else:
                measured.facts[line["arm"]] = line
        return measured

    def median_s(self, arm: str, part: str) -> float:
        return statistics.median(self.cpu_s[arm, part])

    def ratio(self, part: str) -> float:
        both = zip(self.cpu_s[FLOWER, part], self.cpu_s[OURS, part], strict=True)
        return statistics.median(theirs / ours for theirs, ours in both)


def _rows(case: Case, reporter: Reporter) -> Iterator[Row]:
    work, title = case.work, _title(case.work)
    measured = _Measured.of(work, reporter)
    ours = measured.facts[OURS]
    if work.ours_alone:
        yield Row(f"{title}: client, {OURS}", measured.median_s(OURS, "client"), "CPU s", case.client_s)
        return
    theirs = measured.facts[FLOWER]
    for part, target in zip(PARTS, (case.client, None, case.server), strict=True):
        for arm in (FLOWER, OURS):
            yield Row(f"{title}: {part}, {arm}", measured.median_s(arm, part), "CPU s")
        yield Row(f"{title}: {part}, {FLOWER} / {OURS}", measured.ratio(part), "CPU ratio", target, at_least=True)
    yield Row(
        f"{title}: upload, {OURS} / {FLOWER}", ours["upload_bytes"] / theirs["upload_bytes"], "bytes", BYTES_TARGET
    )
    yield Row(f"{title}: client messages, {FLOWER}", theirs["num_messages"], "a round")
    yield Row(f"{title}: client messages, {OURS}", ours["num_messages"], "a round", 2)
    yield Row(f"{title}: setup for {ROUNDS_PER_EPOCH} rounds, {OURS}", ours["setup_s"], "CPU s")
    yield Row(f"{title}: setup for {ROUNDS_PER_EPOCH} rounds, {OURS}", ours["setup_bytes"], "bytes")
    yield Row(f"{title}: largest error of the mean, {FLOWER}", theirs["error"], "")
    yield Row(f"{title}: largest error of the mean, {OURS}", ours["error"], "", ERROR_TARGET)


def _title(work: Workload) -> str:
    return f"{work.num_sites} sites, {work.num_parameters / 1e6:g} M"
