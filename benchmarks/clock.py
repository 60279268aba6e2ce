"""Wall and processor time of rounds, measured alike in the plain loop and around the apps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil


@dataclass
class RoundClock:
    """Call :meth:`mark` at the end of every round; the first, which warms up, counts as startup.

    Attributes:
        workers: process ids of the processes that work for this one.
    """

    workers: Callable[[], Sequence[int]] = tuple
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    _started: tuple[float, float] | None = None
    _startup_s: float = 0.0

    def mark(self) -> None:
        wall_s, cpu_s = time.perf_counter(), self._cpu_s()
        if self._started is None:
            self._startup_s = time.time() - psutil.Process().create_time()
        else:
            self.wall_s.append(wall_s - self._started[0])
            self.cpu_s.append(cpu_s - self._started[1])
        self._started = (time.perf_counter(), cpu_s)

    def _cpu_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.workers()]
        return time.process_time() + sum(t.user + t.system for t in times)

    def report(self) -> None:
        """Print what was measured as the last line of output."""
        print(json.dumps({"startup_s": self._startup_s, "wall_s": self.wall_s, "cpu_s": self.cpu_s}), flush=True)
