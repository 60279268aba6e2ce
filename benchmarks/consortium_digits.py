"""What sharing the noise is worth in accuracy: `consortium` beside pooled DP-SGD, `site` and each hospital alone.

    python benchmarks/consortium_digits.py          # the table, from the settings in CHOSEN; writes the JSON
    python benchmarks/consortium_digits.py tune     # how CHOSEN was found, on seeds that the table does not use

Eight made-up hospitals with 500 records each (:mod:`simulation.bench.digits`), epsilon 8, 2 and 1 per record at delta
1e-5 over 200 rounds, five seeds. All arms begin with the same network, clip each record's gradient to C = 1, draw
records independently (on equal seeds: the same ones, where the rate is equal), and end with the mean of the second half
of their models:

=============  ===================================================================================================
pooled         one site with all records: DP-SGD, noise calibrated by the accountants PRV and PLD
pooled, Rényi  the same with the noise multiplier of ``consortium``, whose noise no tighter accountant knows
consortium     integers clipped exactly, Skellam shares for k_min - c honest sites, summed modulo 2**32; all present
site           each hospital adds all noise itself, E local steps a round, plain mean of the hospitals' networks
alone          each hospital trains with its own records and all noise; the mean over hospitals is shown
=============  ===================================================================================================

The masks are left out, since they cancel exactly. Rounding is that of :mod:`privacy.integer_clipping`, for many records
at a time and begun one shrinking further on, where the product nearly always ends; the exact norm is checked all the
same. Gaussian noise and rounding are drawn with numpy's generator, draws and Skellam noise with the product's.

Legend: K sites, B records at a time, P flat parameters, T rounds.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from privacy.accounting import calibrate_noise
from privacy.integer_clipping import SHRINKING
from privacy.plan import NOISE_STD_INTEGER
from privacy.randomness import RandomStream
from privacy.sampling import draw_patients
from privacy.skellam import skellam_noise
from privacy.skellam_accounting import SkellamMechanism, calibrate_skellam
from simulation.bench.digits import (
    NUM_SITES,
    RECORDS_PER_SITE,
    Federation,
    accuracy,
    federation,
    gradient_factors,
)
from simulation.bench.rows import printed, this_machine

RESULT = Path(__file__).parents[1] / "docs" / "results" / "consortium-digits.json"
DELTA = 1e-5
CLIP_NORM = 1.0
ROUNDS = 200
EPSILONS = (8.0, 2.0, 1.0)
SAMPLING_RATE = {8.0: 0.5, 2.0: 0.2, 1.0: 0.2}
NUM_COLLUDING = 1
TEST_SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101, 102)
STUDENT_T4 = 2.776
"""97.5 % point of Student's t with four degrees of freedom: half a 95 % interval of five differences, in errors."""

Layers = list[Tensor]
Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an arm trains.

    Attributes:
        arm: ``pooled``, ``pooled-renyi``, ``consortium``, ``stand-in`` (``consortium`` with Gaussian noise of the same
            standard deviation on clipped floats, an eighth of the work), ``site``, ``alone`` or ``no noise``.
        epsilon: per record, over all rounds.
        learning_rate: of the optimiser, on the gradient's mean.
        optimizer: ``sgd`` or ``adam``, of the server, or of a site where it trains alone.
        trainable: ``full``, or ``twin``: two factors of rank ``RANK`` in frames that are drawn anew every few rounds.
        sampling_rate: q.
        local_steps: E, noised steps of a site in each round.
        min_sites: k_min, for ``consortium``.
        frame_rounds: for ``twin``.
        local_learning_rate: of the steps at a site, where ``optimizer`` is the server's Adam over ``site`` updates.
        tail: share of the rounds, the last ones, whose models are averaged; 0 keeps the last model alone.
        decay: the learning rate falls in a line from its double to 0.
        shrink: what training moved is denoised at the end, by the known noise (:func:`shrunk`).
    """

    arm: str
    epsilon: float
    learning_rate: float
    optimizer: str = "sgd"
    trainable: str = "full"
    sampling_rate: float = 0.2
    local_steps: int = 1
    min_sites: int = NUM_SITES - 1
    frame_rounds: int = 8
    local_learning_rate: float = 1.0
    tail: float = 0.5
    decay: bool = False
    shrink: bool = False


RANK = 4


class Frames:
    """Which directions train, and how their gradients lie in a flat vector.

    ``full``: everything. ``twin``: in each hidden layer B1 A + B A2 with public orthonormal A and B, drawn anew from a
    public seed every ``frame_rounds`` rounds; the last layer in full.
    """

    def __init__(self, setting: Setting, layers: Sequence[Tensor], seed: int) -> None:
        self._setting, self._seed = setting, seed
        self._shapes = [layer.shape[-2:] for layer in layers]
        self.frames: list[tuple[Tensor, Tensor] | None] = [None for _ in layers]
        self.at_round(0)

    def at_round(self, number: int) -> bool:
        """Whether the frames changed with this round."""
        if self._setting.trainable == "full" or number % self._setting.frame_rounds:
            return False
        generator = torch.Generator().manual_seed(1000 * self._seed + number)
        for index, (num_out, num_in) in enumerate(self._shapes[:-1]):
            a_IR, _ = torch.linalg.qr(torch.randn(num_in, RANK, generator=generator, dtype=torch.float64))
            b_OR, _ = torch.linalg.qr(torch.randn(num_out, RANK, generator=generator, dtype=torch.float64))
            self.frames[index] = (a_IR, b_OR)
        return True

    def factors(self, full: Factors) -> Factors:
        """Factors of the gradients of what trains."""
        made: Factors = []
        for (u, v), frame in zip(full, self.frames, strict=True):
            if frame is None:
                made.append((u, v))
            else:
                a_IR, b_OR = frame
                made += [(u, v @ a_IR), (u @ b_OR, v)]
        return made

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._block_shapes())

    def _block_shapes(self) -> Iterator[tuple[int, int]]:
        for (num_out, num_in), frame in zip(self._shapes, self.frames, strict=True):
            if frame is None:
                yield num_out, num_in
            else:
                yield num_out, RANK
                yield RANK, num_in

    def layers(self, flat: Tensor) -> Layers:
        """What a flat vector [..., P] means for each layer."""
        shapes = list(self._block_shapes())
        parts = torch.split(flat, [math.prod(shape) for shape in shapes], -1)
        blocks = iter(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))
        made = []
        for frame in self.frames:
            if frame is None:
                made.append(next(blocks))
            else:
                a_IR, b_OR = frame
                made.append(next(blocks) @ a_IR.mT + b_OR @ next(blocks))
        return made


def clip_factors(factors: Factors) -> Tensor:
    """For each record, what its gradient is multiplied by to have norm C at most; from the factors alone."""
    squared: Tensor | float = sum((u.square().sum(-1) * v.square().sum(-1)) for u, v in factors)
    assert isinstance(squared, Tensor)
    return (CLIP_NORM / squared.sqrt().clamp(min=1e-30)).clamp(max=1.0)


def clipped_sum(factors: Factors, weights: Tensor | float = 1.0) -> Tensor:
    """Sum of clipped gradients, [..., P], records on the last axis but one; ``weights`` 0 leave records out."""
    scale = (clip_factors(factors) * weights)[..., None]
    return torch.cat([((u * scale).mT @ v).flatten(-2) for u, v in factors], -1)


def integer_sum(factors: Factors, l2_bound: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Sum of the records' gradients, each clipped and rounded to integers of L2 norm D2 at most, exactly."""
    scale_B = clip_factors(factors) * (l2_bound / CLIP_NORM)
    scaled_BP = torch.cat([(u[:, :, None] * v[:, None, :]).flatten(1) for u, v in factors], 1) * scale_B[:, None]
    scaled = scaled_BP.numpy()
    # Clipped records are shrunk before the first attempt.
    total = np.zeros(scaled.shape[1])
    shrink_B = np.where(np.linalg.norm(scaled, axis=1) > SHRINKING * l2_bound, SHRINKING, 1.0)
    while len(scaled):
        rounded = scaled * shrink_B[:, None]
        rounded += generator.random(rounded.shape)
        np.floor(rounded, out=rounded)
        # Squares and sums of integers below 2**53 are exact in float64.
        fits_B = np.einsum("bp,bp->b", rounded, rounded) <= float(l2_bound) ** 2
        total += fits_B @ rounded
        scaled, shrink_B = scaled[~fits_B], shrink_B[~fits_B] * SHRINKING
    return total.astype(np.int64)


class Optimizer:
    """SGD, or Adam (0.9, 0.999) on the flat vector."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.reset()

    def reset(self) -> None:
        self._steps, self._first, self._second = 0, torch.zeros(()), torch.zeros(())

    def step(self, gradient: Tensor) -> Tensor:
        """What to add to the parameters."""
        if self._setting.optimizer == "sgd":
            return -self._setting.learning_rate * gradient
        self._steps += 1
        self._first = 0.9 * self._first + 0.1 * gradient
        self._second = 0.999 * self._second + 0.001 * gradient.square()
        first = self._first / (1 - 0.9**self._steps)
        second = self._second / (1 - 0.999**self._steps)
        return -self._setting.learning_rate * first / (second.sqrt() + 1e-8)


def shared(setting: Setting, num_parameters: int) -> SkellamMechanism:
    """The noise on the sum that is accounted for."""
    return calibrate_skellam(
        epsilon=setting.epsilon,
        delta=DELTA,
        sampling_rate=setting.sampling_rate,
        steps=ROUNDS,
        num_parameters=num_parameters,
        noise_std_integer=NOISE_STD_INTEGER,
    )


@lru_cache(maxsize=4)
def cached_federation(seed: int) -> Federation:
    return federation(seed)


def scores(setting: Setting, seed: int) -> dict[str, float]:
    """Accuracy in percent: ``global`` over all styles and classes alike, ``own`` and ``worst`` on a site's own mix."""
    data = cached_federation(seed)
    if setting.arm in ("site", "alone"):
        nets = trained_at_sites(setting, data, seed)
    else:
        nets = [trained_on_sums(setting, data, seed)]
    tables = torch.stack([accuracy(net, data) for net in nets])  # [networks, K, C]
    own_K = (torch.stack([tables[site % len(nets), site] for site in range(NUM_SITES)]) * data.share_KC).sum(-1)
    return {
        "global": 100 * tables.mean().item(),
        "own": 100 * own_K.mean().item(),
        "worst": 100 * own_K.min().item(),
    }


def trained_on_sums(setting: Setting, data: Federation, seed: int) -> Layers:
    """One network, one step a round on the noised sum over all records."""
    layers = [layer.clone() for layer in data.start]
    frames, optimizer = Frames(setting, layers, seed), Optimizer(setting)
    release = releases(setting, frames.num_parameters, seed)
    draws = [RandomStream.for_simulation(seed, "draws", site) for site in range(NUM_SITES)]
    expected = setting.sampling_rate * NUM_SITES * RECORDS_PER_SITE
    tail = [torch.zeros_like(layer) for layer in layers]
    for number in range(ROUNDS):
        if frames.at_round(number):
            optimizer.reset()
        factors_K = []
        for site in range(NUM_SITES):
            drawn = torch.from_numpy(draw_patients(RECORDS_PER_SITE, setting.sampling_rate, draws[site]))
            full = gradient_factors(data.x_KNI[site, drawn], data.y_KN[site, drawn], layers)
            factors_K.append(frames.factors(full))
        moved = frames.layers(optimizer.step(release(factors_K) / expected))
        if setting.decay:
            moved = [move * 2 * (1 - number / ROUNDS) for move in moved]
        layers = [layer + move for layer, move in zip(layers, moved, strict=True)]
        if number >= first_kept(setting):
            tail = [mean + layer / (ROUNDS - first_kept(setting)) for mean, layer in zip(tail, layers, strict=True)]
    if setting.shrink:  # a step's noise is in all models after it: that of the tail's mean is a weighted sum
        kept = ROUNDS - first_kept(setting)
        steps = first_kept(setting) + sum((step / kept) ** 2 for step in range(1, kept + 1))
        noise_std = CLIP_NORM * noise_multiplier(setting, frames.num_parameters) / expected
        noise_std *= setting.learning_rate * math.sqrt(steps)
        tail = [start + shrunk(mean - start, noise_std) for start, mean in zip(data.start, tail, strict=True)]
    return tail


def first_kept(setting: Setting) -> int:
    """The first round whose model is in the mean."""
    return ROUNDS - max(1, int(setting.tail * ROUNDS))


def releases(setting: Setting, num_parameters: int, seed: int) -> Callable[[list[Factors]], Tensor]:
    """What makes the noised sum [P] of a round from the factors of each site's drawn records."""
    generator = np.random.default_rng([seed, 7])
    if setting.arm == "consortium":
        mechanism = shared(setting, num_parameters)
        share = mechanism.share_variance(setting.min_sites - NUM_COLLUDING)
        streams = [RandomStream.for_simulation(seed, "noise", site) for site in range(NUM_SITES)]

        def masked(factors_K: list[Factors]) -> Tensor:
            total = np.zeros(num_parameters, dtype=np.uint32)
            for factors, stream in zip(factors_K, streams, strict=True):
                clipped = integer_sum(factors, mechanism.l2_bound, generator)
                noised = clipped + skellam_noise(num_parameters, variance=share, stream=stream)
                total += noised.astype(np.uint32)  # modulo 2**32
            return torch.from_numpy(total.view(np.int32).astype(np.float64)) * (CLIP_NORM / mechanism.l2_bound)

        return masked
    noise_std = CLIP_NORM * noise_multiplier(setting, num_parameters)

    def pooled(factors_K: list[Factors]) -> Tensor:
        everyone = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*factors_K, strict=True)]
        return clipped_sum(everyone) + noise_std * torch.from_numpy(generator.standard_normal(num_parameters))

    return pooled


def noise_multiplier(setting: Setting, num_parameters: int) -> float:
    """z of the Gaussian arms."""
    if setting.arm == "no noise":
        return 0.0
    if setting.arm == "pooled-renyi":
        return shared(setting, num_parameters).noise_multiplier
    if setting.arm == "stand-in":
        return shared(setting, num_parameters).noise_multiplier * excess(setting)
    steps = ROUNDS * (setting.local_steps if setting.arm == "site" else 1)
    return calibrate_noise(epsilon=setting.epsilon, delta=DELTA, sampling_rate=setting.sampling_rate, steps=steps)


def excess(setting: Setting) -> float:
    """M = sqrt(K / h_min): noise on the sum with all sites present over the noise that is accounted for."""
    return math.sqrt(NUM_SITES / (setting.min_sites - NUM_COLLUDING))


def shrunk(moved: Tensor, noise_std: float) -> Tensor:
    """A layer's move with its singular values shrunk to what noise of this deviation leaves of them.

    Optimal for the Frobenius norm if noise is white and signal of low rank (Gavish and Donoho 2017, "Optimal shrinkage
    of singular values", eq. 7): nothing is left below the edge of Marchenko and Pastur.
    """
    u, values, v = torch.linalg.svd(moved, full_matrices=False)
    small, large = sorted(moved.shape)
    ratio = small / large
    y = values / (noise_std * math.sqrt(large))
    kept = ((y.square() - ratio - 1).square() - 4 * ratio).clamp(min=0).sqrt() / y
    kept = torch.where(y > 1 + math.sqrt(ratio), kept, torch.zeros_like(y))
    return u @ torch.diag(kept * noise_std * math.sqrt(large)) @ v


def trained_at_sites(setting: Setting, data: Federation, seed: int) -> list[Layers]:
    """A network for each site, or one mean network: full noise at every site, E steps between two means, or none."""
    layers = [layer.expand(NUM_SITES, *layer.shape) for layer in data.start]
    frames, optimizer = Frames(setting, layers, seed), Optimizer(setting)
    server = None
    if setting.arm == "site" and setting.optimizer == "adam":
        server, optimizer = (
            optimizer,
            Optimizer(replace(setting, optimizer="sgd", learning_rate=setting.local_learning_rate)),
        )
    noise_std = CLIP_NORM * noise_multiplier(setting, frames.num_parameters)
    generator = np.random.default_rng([seed, 7])
    draws = [RandomStream.for_simulation(seed, "draws", site) for site in range(NUM_SITES)]
    expected = setting.sampling_rate * RECORDS_PER_SITE
    tail = [torch.zeros_like(layer) for layer in layers]
    for number in range(ROUNDS):
        if frames.at_round(number):
            optimizer.reset()
        before = layers
        for _ in range(setting.local_steps):
            drawn_KB, weight_KB = padded(
                [draw_patients(RECORDS_PER_SITE, setting.sampling_rate, stream) for stream in draws]
            )
            x_KBI = torch.take_along_dim(data.x_KNI, drawn_KB[..., None], 1)
            full = gradient_factors(x_KBI, torch.take_along_dim(data.y_KN, drawn_KB, 1), layers)
            sum_KP = clipped_sum(frames.factors(full), weight_KB)
            sum_KP += noise_std * torch.from_numpy(generator.standard_normal(sum_KP.shape))
            moved = frames.layers(optimizer.step(sum_KP / expected))
            layers = [layer + move for layer, move in zip(layers, moved, strict=True)]
        if server is not None:
            gradient = torch.cat([(old - new).mean(0).flatten() for old, new in zip(before, layers, strict=True)])
            step = server.step(gradient / (setting.local_steps * setting.local_learning_rate))
            sizes = [old[0].numel() for old in before]
            layers = [
                old + part.reshape(old.shape[1:]) for old, part in zip(before, torch.split(step, sizes), strict=True)
            ]
        elif setting.arm == "site":
            layers = [layer.mean(0, keepdim=True).expand_as(layer) for layer in layers]
        if number >= first_kept(setting):
            tail = [mean + layer / (ROUNDS - first_kept(setting)) for mean, layer in zip(tail, layers, strict=True)]
    count = 1 if setting.arm == "site" else NUM_SITES
    return [[layer[site] for layer in tail] for site in range(count)]


def padded(drawn: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Draws of different length as one table of indices, and which of them count."""
    longest = max(map(len, drawn))
    indices = torch.zeros(len(drawn), longest, dtype=torch.int64)
    weights = torch.zeros(len(drawn), longest, dtype=torch.float64)
    for site, chosen in enumerate(drawn):
        indices[site, : len(chosen)] = torch.from_numpy(chosen)
        weights[site, : len(chosen)] = 1.0
    return indices, weights


def tuning_grid(arm: str, epsilon: float) -> Iterator[Setting]:
    """What is tried for an arm; `site` gets more to choose from than anybody, since it has more to choose."""
    base = Setting(arm=arm, epsilon=epsilon, learning_rate=1.0, sampling_rate=SAMPLING_RATE[epsilon])
    if arm == "site":
        sgd_rates = {
            1: (0.25, 0.35, 0.5, 0.7, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
            2: (0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0),
            4: (0.125, 0.25, 0.5, 1.0),
        }
        for steps, rates in sgd_rates.items():
            yield from (replace(base, local_steps=steps, learning_rate=rate) for rate in rates)
        for steps, rate in product((1, 2), (0.01, 0.02, 0.03, 0.04)):
            local = {8.0: 1.0, 2.0: 0.5, 1.0: 0.25}[epsilon]
            yield replace(base, local_steps=steps, learning_rate=rate, optimizer="adam", local_learning_rate=local)
        return
    rates = (0.06, 0.125, 0.25, 0.5, 1.0, 2.0) if arm == "alone" else (1.0, 1.4, 2.0, 3.0, 4.0, 6.0)
    adam_rates = (0.005, 0.01, 0.02, 0.03, 0.04) if arm == "alone" else (0.01, 0.02, 0.03, 0.04)
    yield from (replace(base, learning_rate=rate) for rate in rates)
    yield from (replace(base, learning_rate=rate, optimizer="adam") for rate in adam_rates)


def tuned(console: Console) -> dict[tuple[str, float], Setting]:
    """The best setting for each arm and epsilon, by the mean over the tuning seeds.

    ``alone`` is judged by the hospitals' own mix, for which it is made, the others by all styles and classes alike.
    ``pooled-renyi`` is not tuned: it takes what suits ``pooled``; ``consortium`` takes what suits its stand-in.
    """
    best: dict[tuple[str, float], Setting] = {}
    for epsilon, arm in product(EPSILONS, ("pooled", "stand-in", "site", "alone")):
        measure = "own" if arm == "alone" else "global"
        scored = []
        for setting in tuning_grid(arm, epsilon):
            score = statistics.fmean(scores(setting, seed)[measure] for seed in TUNING_SEEDS)
            scored.append((score, setting))
        score, best[arm, epsilon] = max(scored, key=lambda pair: pair[0])
        console.print(f"{arm} {epsilon:g}: {score:.1f} of {len(scored)}: {best[arm, epsilon]}", highlight=False)
    return best


CHOSEN: dict[tuple[str, float], Setting] = {
    (setting.arm, setting.epsilon): setting
    for setting in (
        Setting(arm="pooled", epsilon=8.0, sampling_rate=0.5, learning_rate=0.03, optimizer="adam"),
        Setting(arm="stand-in", epsilon=8.0, sampling_rate=0.5, learning_rate=0.03, optimizer="adam"),
        Setting(arm="site", epsilon=8.0, sampling_rate=0.5, learning_rate=6.0),
        Setting(arm="alone", epsilon=8.0, sampling_rate=0.5, learning_rate=0.02, optimizer="adam"),
        Setting(arm="pooled", epsilon=2.0, learning_rate=3.0),
        Setting(arm="stand-in", epsilon=2.0, learning_rate=3.0),
        Setting(arm="site", epsilon=2.0, learning_rate=0.5, local_steps=2),
        Setting(arm="alone", epsilon=2.0, learning_rate=0.02, optimizer="adam"),
        Setting(arm="pooled", epsilon=1.0, learning_rate=2.0),
        Setting(arm="stand-in", epsilon=1.0, learning_rate=1.4),
        Setting(arm="site", epsilon=1.0, learning_rate=0.25, local_steps=2),
        Setting(arm="alone", epsilon=1.0, learning_rate=0.25),
    )
}
"""As `tune` found it; the settings with which nobody does better on the tuning seeds."""


def arms(epsilon: float) -> dict[str, Setting]:
    """The rows of an epsilon: name -> setting."""
    pooled, stand_in = CHOSEN["pooled", epsilon], CHOSEN["stand-in", epsilon]
    consortium = replace(stand_in, arm="consortium")
    return {
        "no noise": replace(pooled, arm="no noise"),
        "pooled": pooled,
        "pooled, Rényi": replace(pooled, arm="pooled-renyi"),
        "consortium, k_min 7": consortium,
        "consortium, k_min 6": replace(consortium, min_sites=NUM_SITES - 2),
        "site": CHOSEN["site", epsilon],
        "alone": CHOSEN["alone", epsilon],
    }


def variants(epsilon: float) -> dict[str, Setting]:
    """What was tried to beat ``consortium`` at k_min 7, with Gaussian noise standing in."""
    base = CHOSEN["stand-in", epsilon]
    sgd = base if base.optimizer == "sgd" else replace(base, optimizer="sgd", learning_rate=6.0)
    adam = base if base.optimizer == "adam" else replace(base, optimizer="adam", learning_rate=0.02)
    twin = replace(sgd, trainable="twin", learning_rate=min(8.0, 2 * sgd.learning_rate))
    return {
        "Gaussian stand-in": base,
        "SGD, tail mean": sgd,
        "SGD, last model": replace(sgd, tail=0.0),
        "SGD, falling rate, mean of last quarter": replace(
            sgd, decay=True, tail=0.25, learning_rate=0.7 * sgd.learning_rate
        ),
        "server Adam, tail mean": adam,
        "SGD, tail mean, shrunk by the known noise": replace(sgd, shrink=True),
        "twin, frame redrawn every round": replace(twin, frame_rounds=1),
        "twin, frame held 8 rounds": replace(twin, frame_rounds=8),
        "twin, frame held 50 rounds": replace(twin, frame_rounds=50),
    }


def row(
    name: str, kind: str, setting: Setting, seeds: list[dict[str, float]], base: list[dict[str, float]]
) -> dict[str, object]:
    """One row of the result: means over seeds, and the paired differences to ``base`` with their 95 % half-width."""
    num_parameters = Frames(setting, cached_federation(TEST_SEEDS[0]).start, 0).num_parameters
    shares = setting.arm in ("consortium", "stand-in")
    accounted = (
        shared(setting, num_parameters).noise_multiplier if shares else noise_multiplier(setting, num_parameters)
    )
    differences = [mine["global"] - other["global"] for mine, other in zip(seeds, base, strict=True)]
    return {
        "name": name,
        "kind": kind,
        "epsilon": setting.epsilon,
        "noise_multiplier": accounted,
        "excess": excess(setting) if shares else None,
        "num_parameters": num_parameters,
        "global": statistics.fmean(score["global"] for score in seeds),
        "own": statistics.fmean(score["own"] for score in seeds),
        "worst": statistics.fmean(score["worst"] for score in seeds),
        "difference": statistics.fmean(differences),
        "half_interval": STUDENT_T4 * statistics.stdev(differences) / math.sqrt(len(differences)),
        "seeds": [score["global"] for score in seeds],
        "setting": asdict(setting),
    }


def measured(console: Console) -> list[dict[str, object]]:
    """All rows; arms differ from ``pooled``, variants from the first of them."""
    rows = []
    for epsilon in EPSILONS:
        for kind, settings, against in (
            ("arm", arms(epsilon), "pooled"),
            ("variant", variants(epsilon), "Gaussian stand-in"),
        ):
            all_scores = {}
            for name, setting in settings.items():
                all_scores[name] = [scores(setting, seed) for seed in TEST_SEEDS]
                console.print(f"epsilon {epsilon:g}, {name}: done", style="dim", highlight=False)
            rows += [row(name, kind, settings[name], found, all_scores[against]) for name, found in all_scores.items()]
    return rows


def shown(rows: Sequence[dict[str, object]]) -> Table:
    """The rows for people."""
    table = Table("epsilon", "", "m", "accuracy", "difference", "own mix", "worst site")
    for one in rows:
        table.add_row(
            f"{one['epsilon']:g}",
            str(one["name"]),
            "" if one["excess"] is None else f"{one['excess']:.3f}",
            f"{one['global']:.1f}",
            f"{one['difference']:+.1f} ± {one['half_interval']:.1f}",
            f"{one['own']:.1f}",
            f"{one['worst']:.1f}",
        )
    return table


def main(arguments: Sequence[str]) -> None:
    """Tune, or measure and write the result."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    if list(arguments) == ["tune"]:
        for setting in tuned(console).values():
            print(setting)
        return
    machine = this_machine()
    rows = measured(console)
    result = {"command": "python benchmarks/consortium_digits.py", **printed([], machine), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(shown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
