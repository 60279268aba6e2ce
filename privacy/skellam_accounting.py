"""How much privacy shared Skellam noise on a secure sum of integers costs, and how much noise a target needs.

A step: each unit takes part with probability q, independently of all others; the integer vector that it adds to
the sum has L2 norm at most D2, exactly (:class:`~privacy.integer_clipping.IntegerClippedSum`); each hospital adds
Skellam noise to its own sum (:func:`~privacy.skellam.add_skellam`), and only the sum over hospitals is seen. What
is accounted is the noise of those hospitals alone who are sure to be there and to keep theirs to themselves;
noise of further ones, and the reduction modulo 2**32, only process what was released.

**The bound without sampling.** For integer orders a > 1, a shift of L1 norm D1 and L2 norm D2, and noise of variance
mu on every element,

    D_a <= a D2^2 / (2 mu) + min(((2 a - 1) D2^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu)),

Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning", the bound of
section 3 and, for many dimensions, corollary 4.1 with scale 1 (https://arxiv.org/abs/2110.04995). The first term is
the Gaussian's. For integer vectors of d elements D1 <= min(sqrt(d) D2, D2^2).

**With sampling** the binomial expansion of :mod:`privacy.renyi` is used, which is proven there for both directions,
because Skellam noise is symmetric. The tests compare both with the divergence itself, summed up.

All epsilons hold under add/remove adjacency. Nothing here checks that noise was drawn as accounted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from medfed.errors import PrivacyError
from privacy.accounting import (
    NOISE_DECIMALS,
    NoisedSteps,
    epsilon_spent,
    is_count,
    is_number,
    require_delta,
    require_sampled_noise,
)
from privacy.renyi import Renyi, sampled_renyi


@dataclass(frozen=True)
class SkellamMechanism:
    """One homogeneous run of steps with Skellam noise on a sum of integers: Poisson sampling, add/remove adjacency.

    ``noise_multiplier`` and ``l2_bound`` are what is chosen; :attr:`variance` follows from them, so that the noise
    that is drawn and the noise that is accounted cannot differ.

    Attributes:
        noise_multiplier: z, standard deviation over ``l2_bound`` of that noise on the sum which is sure to be there
            and unknown to the adversary; > 0.
        sampling_rate: q, probability with which each unit takes part in a step; in (0, 1].
        steps: number of steps, empty batches included; 0 spends nothing.
        l2_bound: D2, largest L2 norm of what one unit adds to the sum of integers; >= 1.
        num_parameters: d, elements of the sum; >= 1.

    Raises:
        PrivacyError: if a value is outside its range.
    """

    noise: ClassVar[str] = "skellam, shared"

    noise_multiplier: float
    sampling_rate: float
    steps: int
    l2_bound: int
    num_parameters: int

    def __post_init__(self) -> None:
        require_sampled_noise(self.noise_multiplier, self.sampling_rate, self.steps)
        for name in ("l2_bound", "num_parameters"):
            value = getattr(self, name)
            if not (is_count(value) and value >= 1):
                raise PrivacyError(f"Expected {name} as an integer >= 1, got {value!r}; give a whole number.")

    @property
    def variance(self) -> int:
        """Variance of the accounted noise on each element of the sum: (z * D2)^2, rounded up to an integer."""
        return math.ceil((Fraction(self.noise_multiplier) * self.l2_bound) ** 2)

    @property
    def l1_bound(self) -> int:
        """D1, largest L1 norm of an integer vector of L2 norm D2: the lesser of sqrt(d) D2 and D2^2, rounded down."""
        return min(math.isqrt(self.num_parameters * self.l2_bound**2), self.l2_bound**2)

    def share_variance(self, num_sites: int) -> int:
        """Variance that each site draws such that any ``num_sites`` of them have at least :attr:`variance` together.

        Args:
            num_sites: h_min, sites that are sure to be in the sum and to keep their noise to themselves; >= 1.

        Raises:
            PrivacyError: if ``num_sites`` is no integer >= 1.
        """
        if not (is_count(num_sites) and num_sites >= 1):
            raise PrivacyError(
                f"Expected num_sites as an integer >= 1, got {num_sites!r}; noise is shared among the least number of "
                "honest sites that a sum can have."
            )
        return -(-self.variance // num_sites)

    def renyi(self) -> Renyi:
        """Rényi divergence of one step, in both directions, at :data:`privacy.renyi.ORDERS`."""
        return _curve(self.variance, self.l2_bound, self.l1_bound, float(self.sampling_rate))


def skellam_divergence(
    order: NDArray[np.float64], *, variance: int, l2_bound: int, l1_bound: int
) -> NDArray[np.float64]:
    """Upper bound of the Rényi divergence of Skellam noise from itself shifted by an integer vector, either way.

    Args:
        order: integers > 1; for others the bound is not proven.
        variance: mu, of the noise on each element; >= 1.
        l2_bound: D2, of the shift.
        l1_bound: D1, of the shift.

    Source: see the head of this module.
    """
    squared = float(l2_bound**2)
    near = ((2 * order - 1) * squared + 6 * l1_bound) / (4 * float(variance) ** 2)
    far = 3 * l1_bound / (2 * float(variance))
    return order * squared / (2 * float(variance)) + np.minimum(near, far)


def calibrate_skellam(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    num_parameters: int,
    noise_std_integer: int,
    beside: Sequence[NoisedSteps] = (),
) -> SkellamMechanism:
    """The mechanism of least noise whose epsilon is at most the target.

    The noise multiplier z is the smallest of ``NOISE_DECIMALS`` decimals. The range of integers is chosen by its
    noise: D2 = floor(noise_std_integer / z), and the standard deviation of the noise is then z * D2, at most
    ``noise_std_integer`` and within one part in D2 of it. So the bits that a sum needs hardly depend on epsilon, and
    the integers are as fine as the noise allows.

    :func:`~privacy.accounting.epsilon_spent` of the result never exceeds the target; with the next smaller decimal it
    does. Deterministic. A tenth of a second at most the first time, then remembered.

    Args:
        epsilon: target for all steps together, > 0 and finite.
        delta: in (0, 1).
        sampling_rate: q, in (0, 1].
        steps: noised steps, >= 1.
        num_parameters: d, >= 1.
        noise_std_integer: largest standard deviation of the noise on the sum, in integers; >= 1. Epsilon hardly depends
            on it (less than 1e-6 of the curve at 2**12). What coarse integers cost is signal: rounding shortens each
            patient by about d / (12 D2^2) of its length (:func:`~privacy.integer_clipping.rounded_within`).
        beside: what else is spent on the same cohort under the same epsilon, its noise given.

    Raises:
        PrivacyError: if an argument is outside its range, or no noise up to D2 = 1 reaches the target.
    """
    require_delta(delta)
    if not (is_number(epsilon) and epsilon > 0):
        raise PrivacyError(f"Expected a finite epsilon > 0, got {epsilon!r}; no finite noise reaches epsilon 0.")
    if not (is_count(steps) and steps >= 1):
        raise PrivacyError(f"Expected steps as an integer >= 1, got {steps!r}; count every noised step of the study.")
    if not (is_count(noise_std_integer) and noise_std_integer >= 1):
        raise PrivacyError(
            f"Expected noise_std_integer as an integer >= 1, got {noise_std_integer!r}; 2**16 fits sums of 32 bits."
        )
    noisiest = SkellamMechanism(float(noise_std_integer), sampling_rate, steps, 1, num_parameters)
    return _calibrated(float(epsilon), float(delta), noisiest, tuple(beside))


@lru_cache(maxsize=256)
def _calibrated(
    epsilon: float, delta: float, noisiest: SkellamMechanism, beside: tuple[NoisedSteps, ...]
) -> SkellamMechanism:
    """The least noise that reaches the target, with ``noisiest`` at D2 = 1 as the most that is tried."""
    noise_std_integer = int(noisiest.noise_multiplier)
    ticks_per_unit = 10**NOISE_DECIMALS

    def at(ticks: int) -> SkellamMechanism:
        return SkellamMechanism(
            noise_multiplier=ticks / ticks_per_unit,
            sampling_rate=noisiest.sampling_rate,
            steps=noisiest.steps,
            l2_bound=noise_std_integer * ticks_per_unit // ticks,
            num_parameters=noisiest.num_parameters,
        )

    least = epsilon_spent([noisiest, *beside], delta).value
    if least > epsilon:
        besides = " and what is spent beside it" if beside else ""
        raise PrivacyError(
            f"Expected noise of standard deviation {noise_std_integer} on integers{besides} to reach epsilon "
            f"{epsilon:g}, got {least:.4g} even where one unit moves the sum by 1; raise noise_std_integer, epsilon or "
            f"delta, or lower sampling_rate or the number of steps{', or noise more what is beside' if beside else ''}."
        )

    def reaches(ticks: int) -> bool:
        return _reaches([at(ticks), *beside], epsilon, delta)

    return at(_smallest_up_to(noise_std_integer * ticks_per_unit, reaches))


def _reaches(mechanisms: Sequence[NoisedSteps], epsilon: float, delta: float) -> bool:
    try:
        return epsilon_spent(mechanisms, delta).value <= epsilon
    except PrivacyError:  # noise too small for any finite bound
        return False


def _smallest_up_to(limit: int, fits: Callable[[int], bool]) -> int:
    """The smallest integer >= 1 that fits, if ``limit`` fits and fitting is monotone; in any case one that fits."""
    failing, fitting = 0, limit
    while fitting - failing > 1:
        middle = (failing + fitting) // 2
        failing, fitting = (failing, middle) if fits(middle) else (middle, fitting)
    return fitting


@lru_cache(maxsize=1024)
def _curve(variance: int, l2_bound: int, l1_bound: int, sampling_rate: float) -> Renyi:
    def divergence(order: NDArray[np.float64]) -> NDArray[np.float64]:
        return skellam_divergence(order, variance=variance, l2_bound=l2_bound, l1_bound=l1_bound)

    return sampled_renyi(divergence, sampling_rate)
