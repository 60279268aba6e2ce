"""How each arm of the strategies benchmark trains, and how that was found: on seeds that the table does not use.

    medfed bench strategies --tune      # an hour; prints the lines of CHOSEN

For each arm and epsilon a climb over learning rate, clip norm and local steps, one after the other and the learning
rate once more, by the mean over :data:`TUNING_SEEDS`. The learning rate has no last value to run into. Without noise
records are clipped all the same: it trains better, and C = 10 clips next to nothing; and what was found for each
epsilon is tried as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean

from simulation.bench.strategy_rounds import Arm, DivergedError, Rounds, Training
from strategies.registry import RULES

EPSILONS = (math.inf, 8.0, 4.0, 2.0, 1.0)
TEST_SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101, 102)
UNTRAINED = 30.0
"""Percent; less than the network scores before training, by any measure."""
LOCAL_STEPS = (2, 4, 8, 16)
CLIP_NORMS_L2 = (0.1, 0.3, 1.0, 3.0, 10.0)

_ALL_ARMS = (
    Arm("fedit", "fedit", 4),
    Arm("ffa-lora", "ffa-lora", 4),
    Arm("rolora", "rolora", 4),
    Arm("alt-gauge", "alt-gauge", 4),
    Arm("twin", "twin", 8),
    Arm("ffa-fresh", "ffa-fresh", 4),
    Arm("twin-fresh", "twin-fresh", 8),
    Arm("twin-fresh, held 5", "twin-fresh", 8, hold_frames=5),
    Arm("fed-sb", "fed-sb", 16),
    Arm("fedsa", "fedsa", 4),
    Arm("fedex", "fedex", 4),
    Arm("flora", "flora", 4),
    Arm("flexlora", "flexlora", 4),
    Arm("lora-fair", "lora-fair", 4),
    Arm("head-only", "head-only", 4),
    Arm("full fine-tuning", "fedit", None),
    Arm("local only", "fedit", None, alone=True),
    Arm("centralised", "fedit", None, pooled=True),
)

TUNABLE = tuple(arm for arm in _ALL_ARMS if arm.rule in RULES)
"""Of twin's rank 8, half of each pair trains: as many numbers as of fedit's rank 4."""


def _chosen(name: str, epsilon: float, *values: float) -> tuple[tuple[str, float], Training]:
    rate, clip_norm, steps = values
    training = Training(epsilon=epsilon, learning_rate=rate, clip_norm_l2=clip_norm, local_steps=int(steps))
    return (name, epsilon), training


CHOSEN: dict[tuple[str, float], Training] = dict(
    [
        _chosen("fedit", math.inf, 40.0, 0.1, 16),  # 72.6 of 19
        _chosen("fedit", 8.0, 2.83, 1.0, 8),  # 67.1 of 12
        _chosen("fedit", 4.0, 28.3, 0.1, 8),  # 65.9 of 16
        _chosen("fedit", 2.0, 14.1, 0.1, 8),  # 63.0 of 17
        _chosen("fedit", 1.0, 10.0, 0.1, 8),  # 60.0 of 18
        _chosen("ffa-lora", math.inf, 3.77, 3.0, 16),  # 67.1 of 21
        _chosen("ffa-lora", 8.0, 5.66, 1.0, 8),  # 64.0 of 13
        _chosen("ffa-lora", 4.0, 1.33, 3.0, 8),  # 63.1 of 15
        _chosen("ffa-lora", 2.0, 2.83, 1.0, 8),  # 60.7 of 12
        _chosen("ffa-lora", 1.0, 0.471, 3.0, 8),  # 56.0 of 16
        _chosen("rolora", math.inf, 4.0, 1.0, 8),  # 66.6 of 16
        _chosen("rolora", 8.0, 1.33, 3.0, 8),  # 65.2 of 15
        _chosen("rolora", 4.0, 1.33, 3.0, 8),  # 63.9 of 15
        _chosen("rolora", 2.0, 20.0, 0.1, 8),  # 60.9 of 16
        _chosen("rolora", 1.0, 10.0, 0.1, 8),  # 56.2 of 18
        _chosen("alt-gauge", math.inf, 0.8, 10.0, 16),  # 71.5 of 19
        _chosen("alt-gauge", 8.0, 4.0, 1.0, 8),  # 67.3 of 12
        _chosen("alt-gauge", 4.0, 5.66, 1.0, 8),  # 65.7 of 13
        _chosen("alt-gauge", 2.0, 9.43, 0.3, 8),  # 62.6 of 16
        _chosen("alt-gauge", 1.0, 1.67, 0.3, 16),  # 57.4 of 17
        _chosen("twin", math.inf, 2.67, 3.0, 16),  # 73.3 of 20
        _chosen("twin", 8.0, 4.0, 1.0, 16),  # 69.2 of 16
        _chosen("twin", 4.0, 13.3, 0.3, 8),  # 65.6 of 16
        _chosen("twin", 2.0, 6.67, 0.3, 8),  # 61.9 of 16
        _chosen("twin", 1.0, 20.0, 0.1, 4),  # 58.7 of 18
        _chosen("ffa-fresh", math.inf, 160.0, 0.1, 16),  # 75.1 of 23
        _chosen("ffa-fresh", 8.0, 113.0, 0.1, 8),  # 69.2 of 18
        _chosen("ffa-fresh", 4.0, 80.0, 0.1, 8),  # 66.9 of 18
        _chosen("ffa-fresh", 2.0, 13.3, 0.3, 8),  # 62.9 of 16
        _chosen("ffa-fresh", 1.0, 20.0, 0.1, 8),  # 57.9 of 16
        _chosen("twin-fresh", math.inf, 8.0, 1.0, 8),  # 72.8 of 18
        _chosen("twin-fresh", 8.0, 26.7, 0.3, 8),  # 69.8 of 17
        _chosen("twin-fresh", 4.0, 4.0, 1.0, 8),  # 68.1 of 12
        _chosen("twin-fresh", 2.0, 40.0, 0.1, 8),  # 64.8 of 16
        _chosen("twin-fresh", 1.0, 14.1, 0.1, 8),  # 59.5 of 17
        _chosen("twin-fresh, held 5", math.inf, 2.67, 3.0, 16),  # 74.9 of 20
        _chosen("twin-fresh, held 5", 8.0, 56.6, 0.1, 8),  # 68.5 of 17
        _chosen("twin-fresh, held 5", 4.0, 56.6, 0.1, 8),  # 66.9 of 16
        _chosen("twin-fresh, held 5", 2.0, 40.0, 0.1, 4),  # 63.0 of 16
        _chosen("twin-fresh, held 5", 1.0, 6.67, 0.3, 4),  # 59.9 of 18
        _chosen("fed-sb", math.inf, 80.0, 0.1, 16),  # 70.4 of 21
        _chosen("fed-sb", 8.0, 5.66, 1.0, 8),  # 66.1 of 13
        _chosen("fed-sb", 4.0, 18.9, 0.3, 8),  # 64.1 of 17
        _chosen("fed-sb", 2.0, 40.0, 0.1, 4),  # 60.8 of 17
        _chosen("fed-sb", 1.0, 5.66, 1.0, 2),  # 57.9 of 17
        _chosen("fedsa", math.inf, 13.3, 0.3, 16),  # 86.1 of 19
        _chosen("fedsa", 8.0, 20.0, 0.1, 8),  # 80.5 of 16
        _chosen("fedsa", 4.0, 14.1, 0.1, 8),  # 78.8 of 17
        _chosen("fedsa", 2.0, 10.0, 0.1, 8),  # 76.0 of 18
        _chosen("fedsa", 1.0, 5.0, 0.1, 8),  # 71.1 of 20
        _chosen("fedex", math.inf, 5.66, 1.0, 16),  # 73.4 of 20
        _chosen("fedex", 8.0, 0.943, 3.0, 8),  # 67.2 of 15
        _chosen("fedex", 4.0, 20.0, 0.1, 16),  # 67.0 of 15
        _chosen("fedex", 2.0, 10.0, 0.1, 16),  # 64.1 of 15
        _chosen("fedex", 1.0, 10.0, 0.1, 8),  # 59.3 of 18
        _chosen("flora", math.inf, 1.33, 3.0, 16),  # 64.8 of 19
        _chosen("flora", 8.0, 1.33, 3.0, 16),  # 69.7 of 15
        _chosen("flora", 4.0, 28.3, 0.1, 16),  # 67.4 of 15
        _chosen("flora", 2.0, 14.1, 0.1, 16),  # 62.0 of 15
        _chosen("flora", 1.0, 9.43, 0.3, 4),  # 56.6 of 18
        _chosen("flexlora", math.inf, 0.2, 10.0, 8),  # 65.3 of 18
        _chosen("flexlora", 8.0, 1.41, 1.0, 8),  # 64.6 of 13
        _chosen("flexlora", 4.0, 0.471, 3.0, 8),  # 63.9 of 16
        _chosen("flexlora", 2.0, 10.0, 0.1, 8),  # 62.9 of 18
        _chosen("flexlora", 1.0, 3.54, 0.1, 16),  # 59.0 of 16
        _chosen("lora-fair", math.inf, 40.0, 0.1, 16),  # 72.5 of 19
        _chosen("lora-fair", 8.0, 28.3, 0.1, 16),  # 68.3 of 15
        _chosen("lora-fair", 4.0, 4.71, 0.3, 16),  # 66.1 of 15
        _chosen("lora-fair", 2.0, 3.33, 0.3, 16),  # 63.1 of 16
        _chosen("lora-fair", 1.0, 10.0, 0.1, 8),  # 59.4 of 18
        _chosen("head-only", math.inf, 5.66, 1.0, 16),  # 59.1 of 19
        _chosen("head-only", 8.0, 5.66, 1.0, 16),  # 58.7 of 16
        _chosen("head-only", 4.0, 2.0, 1.0, 8),  # 57.6 of 12
        _chosen("head-only", 2.0, 0.471, 3.0, 8),  # 56.9 of 16
        _chosen("head-only", 1.0, 0.333, 3.0, 8),  # 54.9 of 17
        _chosen("full fine-tuning", math.inf, 1.89, 3.0, 8),  # 76.1 of 20
        _chosen("full fine-tuning", 8.0, 1.33, 3.0, 8),  # 72.5 of 15
        _chosen("full fine-tuning", 4.0, 2.83, 1.0, 8),  # 69.1 of 12
        _chosen("full fine-tuning", 2.0, 9.43, 0.3, 4),  # 65.5 of 17
        _chosen("full fine-tuning", 1.0, 0.833, 0.3, 16),  # 60.8 of 19
        _chosen("local only", math.inf, 4.0, 1.0, 8),  # 88.3 of 16
        _chosen("local only", 8.0, 2.36, 0.3, 16),  # 84.1 of 16
        _chosen("local only", 4.0, 5.0, 0.1, 16),  # 82.2 of 17
        _chosen("local only", 2.0, 2.5, 0.1, 16),  # 79.2 of 19
        _chosen("local only", 1.0, 0.417, 0.3, 16),  # 75.5 of 21
        _chosen("centralised", math.inf, 0.566, 10.0, 8),  # 77.8 of 19
        _chosen("centralised", 8.0, 1.89, 3.0, 8),  # 76.8 of 16
        _chosen("centralised", 4.0, 1.89, 3.0, 8),  # 76.7 of 16
        _chosen("centralised", 2.0, 1.89, 3.0, 8),  # 73.6 of 15
        _chosen("centralised", 1.0, 4.0, 1.0, 8),  # 69.7 of 12
    ]
)
"""As the search printed it, rule by rule: learning rate, clip norm, local steps; then the score on the tuning seeds."""

ARMS = tuple(arm for arm in TUNABLE if all((arm.name, epsilon) in CHOSEN for epsilon in EPSILONS))
"""Rows of the table: what has been tuned."""


def tuned(arm: Arm, epsilon: float, *, beside: Sequence[Training] = ()) -> tuple[Training, float, int]:
    """The best setting found, its score on the tuning seeds, and how many were tried.

    Args:
        arm: what trains.
        epsilon: for all settings.
        beside: settings to try after the climb.
    """

    @cache
    def score_of(training: Training) -> float:
        try:
            found = Rounds(arm, training, TUNING_SEEDS).run()
        except DivergedError:
            return -math.inf
        return fmean(getattr(seed, arm.measure) for seed in found)

    def score(step_exponent: int, clip: int, steps: int) -> float:
        return score_of(_training(epsilon, step_exponent, clip, steps))

    step, clip, steps = 2, CLIP_NORMS_L2.index(1.0), LOCAL_STEPS.index(8)
    while score(step, clip, steps) < UNTRAINED:  # nothing is uphill of what diverged
        step -= 2
    step = _climb(step, lambda value: score(value, clip, steps), range(-40, 40))
    clip = _climb(clip, lambda value: score(step, value, steps), range(len(CLIP_NORMS_L2)))
    # With half the steps, each twice as long: an update of the same size.
    total = step + 2 * steps
    steps = _climb(steps, lambda value: score(total - 2 * value, clip, value), range(len(LOCAL_STEPS)))
    step = _climb(total - 2 * steps, lambda value: score(value, clip, steps), range(-40, 40))
    found = [_training(epsilon, step, clip, steps), *(replace(other, epsilon=epsilon) for other in beside)]
    best = max(found, key=score_of)
    return best, score_of(best), score_of.cache_info().currsize


def _training(epsilon: float, step_exponent: int, clip: int, steps: int) -> Training:
    """The step, learning rate times clip norm, is a power of the square root of two."""
    rate = float(f"{2 ** (step_exponent / 2) / CLIP_NORMS_L2[clip]:.3g}")
    return Training(
        epsilon=epsilon, learning_rate=rate, clip_norm_l2=CLIP_NORMS_L2[clip], local_steps=LOCAL_STEPS[steps]
    )


def _climb(start: int, score: Callable[[int], float], allowed: range) -> int:
    """The best value that single steps uphill lead to; two at once are tried where one goes down."""
    best = start
    for direction in (1, -1):
        while True:
            ahead = [best + direction * far for far in (1, 2) if best + direction * far in allowed]
            better = next((value for value in ahead if score(value) > score(best)), None)
            if better is None:
                break
            best = better
    return best


def print_tuned(
    write: Callable[[str], None], arms: Iterable[Arm] = TUNABLE, epsilons: Iterable[float] = EPSILONS
) -> None:
    """A line of CHOSEN for each arm and epsilon, as soon as it is found."""
    for arm in arms:
        private: list[Training] = []
        for epsilon in sorted(epsilons):
            # Without noise nothing that suits noise should be better than what was found.
            training, score, tried = tuned(arm, epsilon, beside=private if math.isinf(epsilon) else ())
            private.append(training)
            values = ", ".join(
                _number(value)
                for value in (epsilon, training.learning_rate, training.clip_norm_l2, training.local_steps)
            )
            write(f'    _chosen("{arm.name}", {values}),  # {score:.1f} of {tried}')


def _number(value: float) -> str:
    return "math.inf" if math.isinf(value) else repr(value)
