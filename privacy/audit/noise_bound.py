"""From too many right guesses to an epsilon: how much less noise would explain what an attacker achieved.

Whoever guesses, from noised steps, whether a patient took part is right with probability (1 + TV) / 2 at most, where
TV is the total variation distance between the steps with and without that patient, which is their delta at epsilon 0.
An attacker who is right more often has shown that the steps do not hide as the claimed noise does. The epsilon of the
most noise that the guesses leave possible is a lower bound *of this kind*: it reads every fault as a lack of noise, in
steps with the claimed sampling. Compare Nasr et al. 2023, section 5 (https://arxiv.org/abs/2302.07956), who so read
errors as a Gaussian mechanism's.

Distances are rounded towards less privacy and the epsilon towards more, so no sound mechanism is blamed for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from privacy.accounting import Mechanism

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

_MOST, _LEAST = 16.0, 1 / 8  # factors of the claimed noise between which it is searched
_PRECISION = 2e-3  # of the factor
_INTERVAL = 2e-3  # of discretised losses


@dataclass(frozen=True)
class NoiseBound:
    """How much noise is left, as far as an attack can tell.

    Attributes:
        noise_multiplier: with so much or more, the guesses would be too good; None if they refute nothing.
        epsilon: lower bound that follows, at the delta asked for; 0 if they refute nothing.
    """

    noise_multiplier: float | None
    epsilon: float


def noise_bound(claimed: Mechanism, refuted: Callable[[float], bool], *, delta: float) -> NoiseBound:
    """Searches noise from an eighth to sixteen times the claimed; what is outside is reported at the edge.

    Guarantee: if ``refuted`` is wrong with probability 1 - confidence at most for the true distance, then so is the
    bound for steps as claimed.

    Args:
        claimed: the steps that are audited.
        refuted: whether the guesses are too good for this total variation distance; monotone: too good for one is too
            good for every smaller one.
        delta: at which epsilon is reported.
    """

    def at(factor: float) -> Mechanism:
        return replace(claimed, noise_multiplier=claimed.noise_multiplier * factor)

    def is_refuted(factor: float) -> bool:
        return refuted(total_variation(at(factor)))

    if not is_refuted(_MOST):
        return NoiseBound(None, 0.0)
    low, high = _LEAST, _MOST  # the upper end is refuted
    if is_refuted(_LEAST):
        high = _LEAST
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_refuted(middle) else (middle, high)
    found = at(high)
    return NoiseBound(found.noise_multiplier, least_epsilon(found, delta))


@lru_cache(maxsize=4096)
def total_variation(mechanism: Mechanism) -> float:
    """The distance between the steps with and without a unit, at least the true one and at most 1.

    At sampling rate 1 it is 2 Phi(mu / 2) - 1 with mu = sqrt(steps) / z, exactly; else from a privacy loss
    distribution of dp-accounting, rounded up.
    """
    if mechanism.steps == 0:
        return 0.0
    if mechanism.sampling_rate == 1.0:
        return math.erf(math.sqrt(mechanism.steps / 8) / mechanism.noise_multiplier)
    return min(1.0, float(_losses(mechanism, pessimistic=True).get_delta_for_epsilon(0.0)))


@lru_cache(maxsize=512)
def least_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Epsilon of the steps at ``delta``, at most the true one: for lower bounds."""
    if mechanism.steps == 0:
        return 0.0
    return max(0.0, float(_losses(mechanism, pessimistic=False).get_epsilon_for_delta(delta)))


def _losses(mechanism: Mechanism, *, pessimistic: bool) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier,
        sampling_prob=mechanism.sampling_rate,
        value_discretization_interval=_INTERVAL,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,  # which knows no rounding towards more privacy
    )
    return step.self_compose(mechanism.steps)
