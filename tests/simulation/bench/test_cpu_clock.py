"""The clock adds up what runs inside its blocks, and nothing else."""

import time

import pytest

from simulation.bench.cpu_clock import CpuClock


def test_clock_counts_processor_time_inside_its_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([1.0, 1.5, 10.0, 10.25])
    monkeypatch.setattr(time, "process_time", lambda: next(now_s))
    clock = CpuClock()
    for _ in range(2):
        with clock:
            pass
    assert clock.cpu_s == 0.75


def test_sleep_costs_no_processor_time() -> None:
    with CpuClock() as clock:
        time.sleep(0.05)
    assert clock.cpu_s < 0.04
