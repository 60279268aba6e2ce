"""Strategies beside each other on digits: accuracy at equal privacy, bytes, and whether the aggregate is exact.

Every rule trains the same network from the same start on the same draws of the same eight hospitals
(:mod:`simulation.bench.digits`), with settings that were tuned for it on other seeds
(:mod:`simulation.bench.strategy_settings`). Differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from simulation.bench.digits import accuracy
from simulation.bench.rows import Row
from simulation.bench.strategy_bytes import Traffic
from simulation.bench.strategy_network import adapter_manifest
from simulation.bench.strategy_rounds import ROUNDS, Arm, Rounds, Scores, Training, cached_federation, strategy_for
from simulation.bench.strategy_settings import ARMS, CHOSEN, EPSILONS, TEST_SEEDS
from simulation.progress import Reporter

if TYPE_CHECKING:
    from rich.table import Table

REFERENCES = ("fedit", "twin-fresh")
"""Arms that the others are compared to, by seed: naive averaging, and the default with privacy."""

EXACT = 1e-5
"""Largest distance of an exact rule from the mean of the sites' products, beside the length of its change: float32."""

INEXACT = 1e-2
"""Smallest such distance of naive averaging: were it less, nothing would have been measured."""

STUDENT_T = {2: 12.706, 5: 2.776}
"""97.5 % points of Student's t, by number of seeds: half a 95 % interval of paired differences, in standard errors."""

UPLOAD_MB = {
    "fedit": 1.18,
    "ffa-lora": 0.59,
    "rolora": 0.59,
    "alt-gauge": 0.59,
    "twin": 1.18,
    "ffa-fresh": 0.59,
    "twin-fresh": 1.18,
    "fed-sb": 0.10,
    "fedsa": 0.59,
    "fedex": 1.18,
    "flora": 1.18,
    "flexlora": 1.18,
    "lora-fair": 1.18,
}
"""What the rules are said to upload for a ViT-B, LoRA of rank 8 on queries and values, by :attr:`Arm.rule`."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        seeds: of the federations.
        epsilons: columns.
        num_rounds: of each run.
        gain: points over the start that training without noise must be worth.
    """

    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]
    num_rounds: int
    gain: float


FULL = Scale(seeds=TEST_SEEDS, epsilons=EPSILONS, num_rounds=ROUNDS, gain=3.0)
GATE = Scale(seeds=TEST_SEEDS[:2], epsilons=(math.inf, 8.0), num_rounds=4, gain=1.0)


@dataclass(frozen=True)
class Measured:
    """One arm at one epsilon.

    Attributes:
        arm: who trained what.
        training: how.
        scores: of each seed.
    """

    arm: Arm
    training: Training
    scores: tuple[Scores, ...]

    @property
    def label(self) -> str:
        """For a row."""
        return f"{self.arm.name}, {epsilon_text(self.training.epsilon)}"

    def mean(self, measure: str) -> float:
        """Of a score over seeds."""
        return fmean(getattr(score, measure) for score in self.scores)

    def difference(self, other: Measured) -> tuple[float, float]:
        """Mean paired difference of the overall accuracy, and half of its 95 % interval, in points."""
        pairs = zip(self.scores, other.scores, strict=True)
        found = [mine.overall - others.overall for mine, others in pairs]
        return fmean(found), STUDENT_T[len(found)] * stdev(found) / math.sqrt(len(found))


def epsilon_text(epsilon: float) -> str:
    """As the tables say it."""
    return "no noise" if math.isinf(epsilon) else f"epsilon {epsilon:g}"


def measure(scale: Scale, reporter: Reporter) -> tuple[list[Row], list[Measured]]:
    """Rows with targets, and the table: five minutes for :data:`FULL`, less than one for :data:`GATE`."""
    found = []
    reporter.start("strategies", len(ARMS) * len(scale.epsilons))
    for epsilon in scale.epsilons:
        for arm in ARMS:
            training = CHOSEN[arm.name, epsilon]
            found.append(Measured(arm, training, tuple(Rounds(arm, training, scale.seeds, scale.num_rounds).run())))
            reporter.step()
    return list(_rows(scale, found)), found


def start_accuracy(seeds: Sequence[int]) -> float:
    """Accuracy before training, in percent."""
    federations = [cached_federation(seed) for seed in seeds]
    tables = [accuracy([layer.double() for layer in data.start], data) for data in federations]
    return 100 * fmean(float(table.mean()) for table in tables)


def _rows(scale: Scale, found: Sequence[Measured]) -> Iterator[Row]:
    start = start_accuracy(scale.seeds)
    yield Row("before training: accuracy", start, "%")
    for one in found:
        yield Row(f"{one.label}: accuracy", one.mean("overall"), "%")
    for one in found:
        if math.isinf(one.training.epsilon) and one.arm.measure == "overall":
            yield Row(
                f"{one.arm.name}: gained without noise",
                one.mean("overall") - start,
                "points",
                scale.gain,
                at_least=True,
            )
    yield from _exactness(found)
    for arm in ARMS:
        traffic, said = Traffic.of(arm), UPLOAD_MB.get(arm.rule) if arm.rank else None
        if traffic is not None:
            yield Row(f"{arm.name}: upload, ViT-B", traffic.up, "MB")
            if said is not None:
                yield Row(f"{arm.name}: upload is as said", round(traffic.up, 2) == said, "", True)


def _exactness(found: Sequence[Measured]) -> Iterator[Row]:
    """How far the new layers are from the mean of the sites' layers, at the worst."""
    for one in found:
        distance = max(score.inexact for score in one.scores)
        if math.isnan(distance) or one.arm.pooled:
            continue
        name = f"{one.label}: distance from the mean of products"
        if is_exact(one.arm):
            yield Row(name, distance, "ratio", EXACT)
        elif one.arm.rule == "fedit":
            yield Row(name, distance, "ratio", INEXACT, at_least=True)
        else:
            yield Row(name, distance, "ratio")


def is_exact(arm: Arm) -> bool:
    """Whether the arm promises the mean of the sites' products; naive averaging does for whole weights."""
    return strategy_for(arm, adapter_manifest(arm.rank), seed=0).rule.exact or arm.rank is None


def accuracies(found: Sequence[Measured]) -> Table:
    """The table for people: accuracy and the paired difference to :data:`REFERENCES` ``[0]``."""
    from rich import box
    from rich.table import Table

    epsilons = list(dict.fromkeys(one.training.epsilon for one in found))
    at = {(one.arm.name, one.training.epsilon): one for one in found}
    shown = Table("accuracy, %", *map(epsilon_text, epsilons), "down, MB", "secure sum", box=box.SIMPLE_HEAD)
    for arm in ARMS:
        cells = []
        for epsilon in epsilons:
            one = at[arm.name, epsilon]
            mean, half_interval = one.difference(at[REFERENCES[0], epsilon])
            cells.append(f"{one.mean('overall'):.1f} ({mean:+.1f} ± {half_interval:.1f})")
        traffic = Traffic.of(arm)
        individuals = strategy_for(arm, adapter_manifest(arm.rank), seed=0).needs_individuals
        secure = "" if traffic is None else "no" if individuals else "yes"
        shown.add_row(arm.name, *cells, "" if traffic is None else f"{traffic.down:.2f}", secure)
    return shown


def printed_arms(found: Sequence[Measured]) -> list[dict[str, object]]:
    """The table as ``--json`` prints it: an object for each arm and epsilon."""
    at = {(one.arm.name, one.training.epsilon): one for one in found}
    return [_facts(one, {name: at[name, one.training.epsilon] for name in REFERENCES}) for one in found]


def _facts(one: Measured, references: dict[str, Measured]) -> dict[str, object]:
    arm, traffic = one.arm, Traffic.of(one.arm)
    strategy = strategy_for(arm, adapter_manifest(arm.rank), seed=0)
    federated = not (arm.alone or arm.pooled)
    exactness = None if math.isnan(one.mean("inexact")) else max(score.inexact for score in one.scores)
    return {
        "name": arm.name,
        "rule": arm.rule,
        "rank": arm.rank,
        "epsilon": None if math.isinf(one.training.epsilon) else one.training.epsilon,
        "training": {
            **asdict(one.training),
            "epsilon": None if math.isinf(one.training.epsilon) else one.training.epsilon,
        },
        "noise_std": one.training.noise_std(ROUNDS),
        "num_parameters": strategy.plan(1).trainable.manifest.num_elements,
        "accuracy": one.mean("overall"),
        "worst_site": one.mean("worst"),
        "own_mix": one.mean("own"),
        "calibration_error": one.mean("calibration_error"),
        "seeds": [score.overall for score in one.scores],
        "own_seeds": [score.own for score in one.scores],
        "difference": {
            name: dict(zip(("mean", "half_interval"), one.difference(other), strict=True))
            for name, other in references.items()
        },
        "promises_exactness": federated and is_exact(arm),
        "inexact": exactness,
        "inexact_mean": None if exactness is None else one.mean("inexact_mean"),
        "needs_individuals": strategy.needs_individuals,
        "traffic_MB": None if traffic is None else asdict(traffic),
    }
