"""Rényi curves of noised steps: one form for every kind of noise, so that steps of different kinds add up.

A curve holds the Rényi divergence of one step at the integers :data:`ORDERS`. Curves of steps that were run one
after the other on one cohort add up, adaptively chosen or not (Mironov 2017, proposition 1,
https://arxiv.org/abs/1702.07476), and a sum becomes (epsilon, delta) by :func:`epsilon_of_renyi`. All curves here
hold for add/remove adjacency, in both directions.

**Sampling.** A step whose noise alone gives D_k(Q || P) <= e(k), for noise P and shifted noise Q, and in which a
unit takes part with probability q, independently of all others, has for every integer order a >= 2

    D_a((1 - q) P + q Q || P) <= log(sum_k C(a, k) (1 - q)^(a - k) q^k exp((k - 1) e(k))) / (a - 1).

With e(k) = D_k this is the binomial theorem and an equality (Mironov, Talwar and Zhang 2019, section 3.3,
https://arxiv.org/abs/1908.10530); it grows with every e(k). The other direction is never larger:
D_a(P || (1 - q) P + q Q) <= D_a((1 - q) P + q Q || P) wherever x -> v - x swaps P and Q = P shifted by v, that is
for any noise with P(x) = P(-x). Theorem 5 of that paper states it for smooth densities; here is a proof that also
holds for sums over a lattice. With r = Q / P, averaging each divergence with its image under the involution turns
the claim into: f(u) + r f(w) >= 0 at every point, where f(t) = t^a - t^(1 - a), u = 1 - q + q r, w = 1 - q + q / r.
As u + r w = 1 + r, this is (u - 1) (s(u) - s(w)) >= 0 with s(t) = f(t) / (t - 1). And u w >= 1, because
u w = (1 - q)^2 + q^2 + q (1 - q) (r + 1 / r). Take u >= 1 (the other case is the same with u and w exchanged);
w is 1 or less. f is convex above 1 and concave below, so s rises above 1 and falls below; and s(1 / u) = s(u).
From 1 / u <= w <= 1 follows s(w) <= s(1 / u) = s(u).

What else is random in a step (the draws of the other units, stochastic rounding, the choice of images) is drawn
independently of the noise and of whether the unit takes part, so quasi-convexity (van Erven and Harremoës 2014,
theorem 13, https://arxiv.org/abs/1206.2459) bounds the divergence of the mixture by its worst case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS = (*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 448, 512, 768, 1024)
"""Orders of every curve. Dense where epsilon of 0.5 to 20 has its best order; the last ones serve charges that are
nearly nothing: below 0.004 at delta 1e-5 no order up to 1024 reports."""

ROUNDING = 1e-9
"""Relative part that is added to a curve for the float64 arithmetic in it, which errs by less than 1e-11."""

Renyi = NDArray[np.float64]
"""Rényi divergence at :data:`ORDERS`; read-only."""

_LOG_FACTORIAL = np.array([math.lgamma(n + 1) for n in range(ORDERS[-1] + 1)])


def sampled_renyi(divergence: Callable[[NDArray[np.float64]], NDArray[np.float64]], sampling_rate: float) -> Renyi:
    """The curve of a step in which each unit takes part with probability ``sampling_rate``.

    ===================== =========================================================
    q = 1                 the divergence itself
    divergence 0          0
    divergence infinite   infinite, wherever that order takes part
    ===================== =========================================================

    Args:
        divergence: upper bound of the Rényi divergence without sampling, at the orders that it is given: all
            integers from 2 to the last of ``ORDERS``.
        sampling_rate: q, in (0, 1].

    Returns:
        Upper bound of both directions at ``ORDERS``, see the head of this module; ``ROUNDING`` included.
    """
    order = np.arange(2, ORDERS[-1] + 1)
    plain = divergence(order.astype(np.float64))
    curve = np.empty(len(ORDERS))
    if sampling_rate == 1:
        curve[:] = plain[np.array(ORDERS) - 2]
    else:
        # As 1 + sum of C(a, k) (1 - q)^(a - k) q^k (exp((k - 1) e(k)) - 1): no digit is lost where all is near 1.
        exponent = (order - 1) * plain
        with np.errstate(divide="ignore"):
            log_excess = exponent + np.log(-np.expm1(-exponent))
        log_q, log_rest = math.log(sampling_rate), math.log1p(-sampling_rate)
        for place, a in enumerate(ORDERS):
            k = order[: a - 1]
            log_weight = _LOG_FACTORIAL[a] - _LOG_FACTORIAL[k] - _LOG_FACTORIAL[a - k] + k * log_q + (a - k) * log_rest
            curve[place] = np.logaddexp(0.0, np.logaddexp.reduce(log_weight + log_excess[: a - 1])) / (a - 1)
    curve *= 1 + ROUNDING
    curve.flags.writeable = False
    return curve


@lru_cache(maxsize=1024)
def gaussian_renyi(noise_multiplier: float, sampling_rate: float) -> Renyi:
    """The curve of one step with Gaussian noise: D_a = a / (2 z^2) before sampling; infinite below z of 1e-154."""
    with np.errstate(over="ignore"):
        per_order = np.float64(0.5) / np.float64(noise_multiplier) / np.float64(noise_multiplier)
        return sampled_renyi(lambda order: order * per_order, sampling_rate)


def epsilon_of_renyi(renyi: NDArray[np.float64], delta: float, orders: Sequence[int] = ORDERS) -> tuple[float, int]:
    """The epsilon that a curve guarantees at ``delta``, and the order that gives it.

    Source: Balle et al. 2020, theorem 21 (https://arxiv.org/abs/1905.09982), which is also proposition 12 of
    Canonne, Kamath and Steinke 2020 (https://arxiv.org/abs/2004.00010). Negative where the curve guarantees more
    than epsilon 0 at this delta.
    """
    order = np.array(orders)
    epsilon = renyi - (math.log(delta) + np.log(order)) / (order - 1) + np.log1p(-1 / order)
    best = int(np.argmin(epsilon))
    return float(epsilon[best]), int(order[best])
