"""What privacy costs: a private training step beside the same step without privacy.

Each step runs on one thread. Steps of different arms take turns in one process, and a ratio is the median over
repeats of the ratio within a repeat, so that a machine that slows down slows both sides. Wall time is what a site
waits for; processor time stands beside it, because it says the same on a machine that is busy with something else.
Memory is measured in a process for each arm, all with the allocator settings of the client app.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from simulation.bench.one_thread import answers
from simulation.bench.rows import Row
from simulation.progress import Reporter

_BESIDE = ("opacus-hooks", "opacus-ghost")
"""Arms that are shown and promised nothing."""

FLOAT32_BYTES = 4
MIB = 2**20


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        batch_size: images of a step.
        num_blocks: transformer blocks of width 384.
        repeats: steps of each arm that count; one more warms up.
        gate: the default engine alone, with the bound that continuous integration keeps.
    """

    batch_size: int
    num_blocks: int
    repeats: int
    gate: bool = False


FULL = Scale(batch_size=32, num_blocks=12, repeats=5)
GATE = Scale(batch_size=16, num_blocks=6, repeats=3, gate=True)

_CHECKED_IMAGES = 4
"""Images whose gradients are compared; a loop over a whole batch would take as long as a step of each arm."""


def measure(scale: Scale, reporter: Reporter) -> list[Row]:
    """Run everything; about ten minutes for :data:`FULL`, one for :data:`GATE`."""
    return list(_gate(scale, reporter) if scale.gate else _full(scale, reporter))


def _gate(scale: Scale, reporter: Reporter) -> Iterator[Row]:
    steps = _Steps.run(scale, ("non-private", "lora-exact"), reporter)
    # Continuous integration shares its machine: a bound on wall time would judge its neighbours.
    yield from steps.ratio("lora-exact", cpu_target=1.25)
    yield from _Gradients.of(scale, reporter).rows()


def _full(scale: Scale, reporter: Reporter) -> Iterator[Row]:
    steps = _Steps.run(scale, ("non-private", "lora-exact", "vmap", "cached", *_BESIDE), reporter)
    yield Row("non-private step", steps.median_s("non-private"), "s")
    yield from steps.ratio("lora-exact", wall_target=1.10)
    yield from steps.ratio("vmap", wall_target=1.30)
    for arm in _BESIDE:
        yield from steps.ratio(arm)
    yield from steps.speed_up("cached", over="lora-exact", target=4.0)
    gradients = _Gradients.of(scale, reporter)
    yield from _memory(scale, gradients.num_bytes, reporter)
    yield from gradients.rows()


@dataclass(frozen=True)
class _Steps:
    """Seconds of the steps of each arm, repeat by repeat."""

    wall_s: dict[str, list[float]]
    cpu_s: dict[str, list[float]]

    @classmethod
    def run(cls, scale: Scale, arms: tuple[str, ...], reporter: Reporter) -> _Steps:
        reporter.start("steps", len(arms) * (scale.repeats + 1))
        steps = cls({arm: [] for arm in arms}, {arm: [] for arm in arms})
        for line in _answers(scale, "times", str(scale.repeats), *arms):
            reporter.step()
            if line["repeat"] > 0:
                steps.wall_s[line["arm"]].append(line["wall_s"])
                steps.cpu_s[line["arm"]].append(line["cpu_s"])
        return steps

    def median_s(self, arm: str) -> float:
        return statistics.median(self.wall_s[arm])

    def ratio(self, arm: str, *, wall_target: float | None = None, cpu_target: float | None = None) -> tuple[Row, Row]:
        name = f"{arm} step / non-private"
        return (
            Row(name, _median_ratio(self.wall_s[arm], self.wall_s["non-private"]), "wall ratio", wall_target),
            Row(f"{name}, CPU", _median_ratio(self.cpu_s[arm], self.cpu_s["non-private"]), "CPU ratio", cpu_target),
        )

    def speed_up(self, arm: str, *, over: str, target: float) -> tuple[Row, Row]:
        name = f"{over} step / {arm}: prefix cached, LoRA in the last quarter"
        return (
            Row(name, _median_ratio(self.wall_s[over], self.wall_s[arm]), "wall ratio", target, at_least=True),
            Row(f"{name}, CPU", _median_ratio(self.cpu_s[over], self.cpu_s[arm]), "CPU ratio"),
        )


def _memory(scale: Scale, gradient_bytes: int, reporter: Reporter) -> Iterator[Row]:
    arms = ("non-private", "lora-exact", "vmap", *_BESIDE)
    reporter.start("memory", len(arms))
    peak_bytes = {}
    for arm in arms:
        (answer,) = _answers(scale, "memory", arm)
        peak_bytes[arm] = answer["peak_bytes"]
        reporter.step()
    plain_bytes = peak_bytes["non-private"]
    yield Row("non-private peak memory of a step", plain_bytes / MIB, "MiB")
    yield Row("per-sample gradients, 4 B P bytes", gradient_bytes / MIB, "MiB")
    for arm in arms[1:]:
        yield Row(
            f"{arm} (peak memory - 4 B P) / non-private",
            (peak_bytes[arm] - gradient_bytes) / plain_bytes,
            "ratio",
            1.05 if arm == "lora-exact" else None,
        )


@dataclass(frozen=True)
class _Gradients:
    """How right the engines are: what is fast must also be that. And how much memory the gradients take."""

    errors: dict[str, float]
    num_bytes: int

    @classmethod
    def of(cls, scale: Scale, reporter: Reporter) -> _Gradients:
        reporter.start("gradients", 1)
        (answer,) = _answers(replace(scale, batch_size=_CHECKED_IMAGES), "gradients")
        reporter.step()
        return cls(answer["errors"], FLOAT32_BYTES * scale.batch_size * answer["num_parameters"])

    def rows(self) -> Iterator[Row]:
        for engine, error in self.errors.items():
            yield Row(f"{engine} gradients, distance to a batch-of-1 loop", error, "L2 ratio", 1e-3)


def _median_ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _answers(scale: Scale, *question: str) -> Iterator[dict[str, Any]]:
    """The lines that a process of :mod:`simulation.bench.dp_steps` prints, as it prints them."""
    work = json.dumps({"batch_size": scale.batch_size, "num_blocks": scale.num_blocks})
    return answers("simulation.bench.dp_steps", work, *question)
