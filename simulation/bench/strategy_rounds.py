"""Federated rounds on digits with the project's strategies; the local steps alone are the benchmark's own.

What a site uploads, what the server makes of the sum, gauges, folds and what stays at a site are asked of
:class:`~strategies.federation.Strategy`, as server and client do. Several seeds train side by side.

Legend: S seeds, K sites, N records of a site, B records at a time, I inputs of a layer, Z coordinates that train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.study_sections import StrategyConfig
from privacy.accounting import calibrate_noise
from privacy.randomness import RandomStream
from privacy.sampling import draw_patients
from simulation.bench.digits import NUM_SITES, Federation, accuracy, activations, federation
from simulation.bench.strategy_network import (
    Directions,
    adapter_manifest,
    base_layers,
    clipped_sum,
    first_adapter,
    layers_with,
    record_gradients,
)
from strategies.federation import Strategy
from strategies.local_method import LocalMethod
from strategies.lora import lora_pairs
from strategies.personal import Personalisation
from strategies.registry import RULES
from strategies.server_optimizer import ServerOptimizer
from strategies.strategy import LocalResult, Phase, Setting, State
from strategies.weighted_sum import weighted_sum

RECORDS_PER_SITE = 1000
SAMPLING_RATE = 0.1
"""q of each local step."""
TARGET_DELTA = 1e-5
ROUNDS = 25
ECE_BINS = 15
_NOISE = 7  # sets the noise of a seed apart from its data


@dataclass(frozen=True)
class Arm:
    """Who trains what.

    Attributes:
        name: in the table.
        rule: as study files name it.
        rank: of the LoRA pairs; None for weights trained in full.
        pooled: one site has the records of all.
        alone: sites never hear of each other.
        hold_frames: rounds for which fresh frames stay.
    """

    name: str
    rule: str
    rank: int | None
    pooled: bool = False
    alone: bool = False
    hold_frames: int | None = None

    @property
    def measure(self) -> str:
        """The score by which it is tuned: what gives each site a model of its own is made for the site's own mix."""
        return "own" if self.alone or self.rule == "fedsa" else "overall"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How sites train.

    Attributes:
        epsilon: per record over all rounds, at :data:`TARGET_DELTA`; infinity for no noise.
        learning_rate: of plain SGD on the mean gradient.
        clip_norm_l2: C, of a record's gradient in what trains; infinity only without noise.
        local_steps: of a site in each round.
    """

    epsilon: float
    learning_rate: float
    clip_norm_l2: float
    local_steps: int

    def noise_std(self, num_rounds: int) -> float:
        """Of the noise that a site adds to each sum of clipped gradients."""
        if math.isinf(self.epsilon):
            return 0.0
        return self.clip_norm_l2 * noise_multiplier(self.epsilon, num_rounds * self.local_steps)


@lru_cache
def noise_multiplier(epsilon: float, steps: int) -> float:
    """z, by the project's accountants."""
    return calibrate_noise(epsilon=epsilon, delta=TARGET_DELTA, sampling_rate=SAMPLING_RATE, steps=steps)


@dataclass(frozen=True)
class Scores:
    """How one seed came out; accuracies in percent.

    Attributes:
        overall: over all styles and classes alike; the mean over models where sites have their own.
        worst: lowest of the sites' accuracies on their own mix.
        own: mean of them.
        calibration_error: expected calibration error over all styles, of :data:`ECE_BINS` equal bins, in percent.
        inexact: largest, over rounds, distance of the new layers from the mean of the sites' layers, beside the
            length of that mean's change; hidden layers alone, NaN where none of them trains together.
        inexact_mean: its mean over rounds.
    """

    overall: float
    worst: float
    own: float
    calibration_error: float
    inexact: float
    inexact_mean: float


@dataclass
class _Seed:
    """One seed's federation, strategy and where it has come to."""

    data: Federation
    strategy: Strategy
    state: State
    inexact: list[float] = field(default_factory=list)

    @property
    def base(self) -> list[Tensor]:
        pairs = lora_pairs(self.strategy.rule.manifest)
        return base_layers(self.data.start, pairs, self.strategy.rule.folds(self.state.broadcast))

    @property
    def layers(self) -> list[Tensor]:
        return layers_with(self.base, {name: tensor.double() for name, tensor in self.state.adapter.items()})


class DivergedError(ArithmeticError):
    """Training left the finite numbers."""


class Rounds:
    """A training run of an arm on several seeds at once.

    Args:
        arm: who trains what.
        training: how.
        seeds: of the federations.
        num_rounds: in all; what the noise is calibrated for.
    """

    def __init__(self, arm: Arm, training: Training, seeds: Sequence[int], num_rounds: int = ROUNDS) -> None:
        self.arm, self.training, self.num_rounds = arm, training, num_rounds
        self.num_sites = 1 if arm.pooled else NUM_SITES
        self.sites = [f"site-{index + 1}" for index in range(self.num_sites)]
        self.seeds = [self._seed(seed) for seed in seeds]
        self._draws = [
            [RandomStream.for_simulation(seed, "draws", site) for site in range(self.num_sites)] for seed in seeds
        ]
        self._noise = [np.random.default_rng([seed, _NOISE]) for seed in seeds]
        x, y = zip(*(_records(seed.data, pooled=arm.pooled) for seed in self.seeds), strict=True)
        self._x_SKNI, self._y_SKN = torch.stack(x), torch.stack(y)
        self._own: dict[str, Tensor] = {}  # tensors that stay at a site, [S, K, rows, columns]

    def run(self) -> list[Scores]:
        """All rounds, and the scores of each seed."""
        for number in range(1, self.num_rounds + 1):
            self.round(number)
        return [self._scores(index) for index in range(len(self.seeds))]

    def round(self, number: int) -> None:
        """One round: gauge, local steps, sum, next state."""
        for seed in self.seeds:
            seed.state = seed.strategy.gauge(number, seed.state)
        phases = [seed.strategy.plan(number) for seed in self.seeds]
        base_of = [seed.base for seed in self.seeds]
        base = [torch.stack(layers)[:, None].float() for layers in zip(*base_of, strict=True)]
        adapter = self._adapters()
        before = {name: tensor.clone() for name, tensor in adapter.items()}
        self._train(Directions([phase.trainable for phase in phases]), base, adapter)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in adapter.values()):
            raise DivergedError(f"Expected finite weights, got NaN or infinity in round {number}; lower learning_rate.")
        stays = adapter.keys() if self.arm.alone else phases[0].stays
        self._own = {name: adapter[name] for name in stays}
        if self.arm.alone:
            return
        for index, (seed, phase) in enumerate(zip(self.seeds, phases, strict=True)):
            old = seed.layers
            uploads = {
                site: phase.upload_vector(self._result(phase, index, position, before, adapter))
                for position, site in enumerate(self.sites)
            }
            seed.state = next_state(seed.strategy, number, seed.state, uploads, self.sites)
            if not phase.stays:
                trained = layers_with(
                    base_of[index], {name: tensor[index].double() for name, tensor in adapter.items()}
                )
                seed.inexact.append(_distance(seed.layers, [layer.mean(0) for layer in trained], old))

    def _seed(self, seed: int) -> _Seed:
        data = cached_federation(seed)
        manifest = adapter_manifest(self.arm.rank)
        strategy = strategy_for(self.arm, manifest, seed)
        return _Seed(data, strategy, strategy.start(first_adapter(manifest, data.start, seed)))

    def _adapters(self) -> dict[str, Tensor]:
        """What each site begins a round with, [S, K, rows, columns]."""
        shared = {
            name: torch.stack([seed.state.adapter[name] for seed in self.seeds])[:, None].repeat(
                1, self.num_sites, 1, 1
            )
            for name in self.seeds[0].state.adapter
        }
        return {**shared, **{name: tensor.clone() for name, tensor in self._own.items()}}

    def _train(self, directions: Directions, base: Sequence[Tensor], adapter: dict[str, Tensor]) -> None:
        """The local steps of a round, of all seeds and sites, in place."""
        training, expected = self.training, SAMPLING_RATE * self._x_SKNI.shape[2]
        noise_std = training.noise_std(self.num_rounds)
        for _ in range(training.local_steps):
            x_SKBI, y_SKB, weight_SKB = self._batch()
            factors = directions.factors(record_gradients(x_SKBI, y_SKB, base, adapter))
            sum_SKZ = clipped_sum(factors, weight_SKB, training.clip_norm_l2)
            if noise_std:
                sum_SKZ += self._gaussian(sum_SKZ.shape[1:], noise_std)
            directions.move(adapter, sum_SKZ * (-training.learning_rate / expected))

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Poisson draws of every site, padded to equal length."""
        num_records = self._x_SKNI.shape[2]
        drawn = [draw_patients(num_records, SAMPLING_RATE, stream) for seed in self._draws for stream in seed]
        index, weight = padded(drawn)
        shape = (len(self.seeds), self.num_sites, -1)
        index_SKB = index.view(shape)
        x_SKBI = torch.take_along_dim(self._x_SKNI, index_SKB[..., None], 2)
        return x_SKBI, torch.take_along_dim(self._y_SKN, index_SKB, 2), weight.view(shape)

    def _gaussian(self, shape: torch.Size, std: float) -> Tensor:
        draws = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in self._noise]
        return std * torch.from_numpy(np.stack(draws))

    def _result(
        self, phase: Phase, index: int, site: int, before: dict[str, Tensor], after: dict[str, Tensor]
    ) -> LocalResult:
        return LocalResult(
            shared=phase.shared.manifest,
            before_Z=_shared_coordinates(phase, before, index, site),
            after_Z=_shared_coordinates(phase, after, index, site),
            num_steps=self.training.local_steps,
            learning_rate=self.training.learning_rate,
            broadcast=self.seeds[index].state.broadcast,
        )

    def _scores(self, index: int) -> Scores:
        seed = self.seeds[index]
        if self._own:
            adapters = self._adapters()
            nets = [
                layers_with(seed.base, {name: tensor[index, site].double() for name, tensor in adapters.items()})
                for site in range(self.num_sites)
            ]
        else:
            nets = [seed.layers]
        tables = torch.stack([accuracy(net, seed.data) for net in nets])
        own_K = torch.stack([tables[site % len(nets), site] for site in range(NUM_SITES)])
        own_K = (own_K * seed.data.share_KC).sum(-1)
        error = sum(calibration_error(net, seed.data) for net in nets) / len(nets)
        return Scores(
            overall=100 * tables.mean().item(),
            worst=100 * own_K.min().item(),
            own=100 * own_K.mean().item(),
            calibration_error=100 * error,
            inexact=max(seed.inexact, default=math.nan),
            inexact_mean=float(np.mean(seed.inexact)) if seed.inexact else math.nan,
        )


def strategy_for(arm: Arm, manifest: AdapterManifest, seed: int) -> Strategy:
    """The project's strategy: the arm's rule with plain local training and a plain server."""
    config = StrategyConfig(name=arm.rule, hold_frames=arm.hold_frames)
    setting = Setting(config=config, manifest=manifest, seed=seed, num_sites=NUM_SITES)
    return Strategy(RULES[arm.rule](setting), LocalMethod(), Personalisation(), ServerOptimizer())


def next_state(
    strategy: Strategy, number: int, state: State, uploads: dict[str, Tensor], sites: Sequence[str]
) -> State:
    """What the server makes of the sites' uploads: of their sum, if the rule needs no more. Sites weigh alike."""
    weights, phase = dict.fromkeys(sites, 1.0), strategy.plan(number)
    if strategy.needs_individuals:
        deltas = {site: phase.upload_manifest.unflatten(upload) for site, upload in uploads.items()}
        return strategy.merge(number, state, deltas, weights)
    total_P = weighted_sum(uploads, weights, sites)
    return strategy.post(number, state, phase.statistics(total_P, float(len(sites))), participation=1.0)


def padded(drawn: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Draws of different length as one table of indices, and which of them count: 1 or 0, float32."""
    longest = max(map(len, drawn))
    indices = torch.zeros(len(drawn), longest, dtype=torch.int64)
    weights = torch.zeros(len(drawn), longest)
    for row, chosen in enumerate(drawn):
        indices[row, : len(chosen)] = torch.from_numpy(chosen)
        weights[row, : len(chosen)] = 1.0
    return indices, weights


def calibration_error(net: Sequence[Tensor], data: Federation) -> float:
    """Expected calibration error of a network on the test drawings in all styles."""
    logits = activations(data.test_x_KNI, net)[-1]
    confidence, answer = torch.softmax(logits, -1).max(-1)
    right = (answer == data.test_y_N).double().flatten()
    bins = (confidence.flatten() * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence.flatten())
    return float(gap.abs().sum() / len(right))


@lru_cache(maxsize=16)
def cached_federation(seed: int) -> Federation:
    """The federation of a seed, training records and start in float32."""
    data = federation(seed, num_records=RECORDS_PER_SITE)
    return replace(data, x_KNI=data.x_KNI.float(), start=tuple(layer.float() for layer in data.start))


def _shared_coordinates(phase: Phase, tensors: dict[str, Tensor], index: int, site: int) -> Tensor:
    """What a site may send of its adapter, (Z,)."""
    manifest = phase.trainable.adapter
    flat_P = torch.cat([tensors[spec.name][index, site].reshape(-1) for spec in manifest.tensors])
    coordinates_Z = phase.trainable.coordinates(flat_P)
    mask_Z = phase.shared_elements
    return coordinates_Z if mask_Z is None else coordinates_Z[mask_Z]


def _records(data: Federation, *, pooled: bool) -> tuple[Tensor, Tensor]:
    return (data.x_KNI.flatten(0, 1)[None], data.y_KN.flatten()[None]) if pooled else (data.x_KNI, data.y_KN)


def _distance(new: Sequence[Tensor], mean: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """|new - mean| / |mean - old| over the hidden layers; NaN if the mean is the old."""

    def norm(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        pairs = zip(left[:-1], right[:-1], strict=True)
        return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))

    moved = norm(mean, old)
    return norm(new, mean) / moved if moved > 0 else math.nan
