"""Skellam noise for a sum of integers: the difference of two Poisson variables of equal rate.

Skellam noise is closed under sums: independent draws of variance V and W add up to a draw of variance V + W. So
hospitals can share the noise of a sum among themselves, and whichever of them take part, the noise on the sum has
a known distribution. Nothing here is rounded to a float: the noise is an integer, drawn from a table of integers.

**How exact.** With P(k) = exp(-V) I_|k|(V) for variance V, a table holds the distribution of |k| in steps of
2**-127, and the sign takes one more bit. Per sample, the distribution drawn from is within statistical (total
variation) distance 2**-105 of Skellam; for variances up to 2**32 within 2**-107:

================= ==========================================================================================
tail cut          |k| above the table has probability < 2**-128 (Chernoff) and is drawn as the last entry
table precision   each of less than 2**21 entries is off by less than 2**-127, and half of the sum counts
recurrence        integers of 160 bits and more: relative error < 2**-138; and its start, see ``_table_of``
================= ==========================================================================================

To be seen beside delta: n samples add (1 + exp(epsilon)) * n * 2**-107 to it, 3e-23 for a million parameters over a
thousand steps at epsilon 1. All this as long as AES-256 is a pseudo-random function (:mod:`privacy.randomness`).

Not guaranteed: **constant time**. Which entries of the table are read, and how long a draw takes, depends on what
is drawn; whoever measures the caches of the machine that draws is not kept out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.errors import PrivacyError
from privacy.accounting import is_count
from privacy.randomness import RandomStream

# Legend: P flat adapter elements.

LARGEST_VARIANCE = 2**34
"""Standard deviation 2**17: its table has 1.8 million entries, is built in two seconds and takes 36 MB."""

MAGNITUDE_BITS = 127  # of 128 random bits one is the sign
TAIL_BITS = 128  # the tail beyond the table has a probability below 2**-TAIL_BITS
START_BITS = 208  # the recurrence begins where the probability is below 2**-START_BITS
FIRST_BITS = 176  # of the first integer in the recurrence; the second one is less than 2**12 times smaller
LARGEST_GUIDE_BITS = 20  # 2**20 cells of 9 bytes
BLOCK = 2**15  # samples at a time: what is computed between two steps stays in the cache of one core


def skellam_noise(n: int, *, variance: int, stream: RandomStream) -> NDArray[np.int64]:
    """``n`` independent draws of symmetric Skellam noise of ``variance``; int64.

    The table of a variance is built at its first use (at most two seconds) and kept for the four that were used
    last; after that a draw takes 10-25 ns on one core.

    =========================== ====================================
    n = 0                       no draws, the stream is not used
    variance 1                  two Poisson variables of rate 1/2
    variance < 1, not integer   PrivacyError
    above LARGEST_VARIANCE      PrivacyError
    =========================== ====================================

    Args:
        n: number of draws, >= 0.
        variance: V, of each draw: each of the two Poisson variables has rate V / 2.
        stream: source of the noise; :meth:`RandomStream.from_system` wherever a patient is real.

    Raises:
        PrivacyError: as in the table.
        ValueError: if ``n`` is negative.
    """
    if not (is_count(variance) and 1 <= variance <= LARGEST_VARIANCE):
        raise PrivacyError(
            f"Expected the variance of Skellam noise as an integer within 1..2**34, got {variance!r}; share the noise "
            "between sites, or scale to a smaller integer range."
        )
    if n < 0:
        raise ValueError(f"Expected a count >= 0, got {n}.")
    table = _table_of(variance)
    noise = np.empty(n, dtype=np.int64)
    for start in range(0, n, BLOCK):
        block = noise[start : start + BLOCK]
        words = stream.uint64(len(block))
        block[:] = table.magnitudes(words >> np.uint64(1), stream)
        np.negative(block, out=block, where=(words & np.uint64(1)).astype(np.bool_))
    return noise


def add_skellam(sum_P: Tensor, *, variance: int, stream: RandomStream) -> Tensor:
    """A new tensor: ``sum_P`` plus independent Skellam noise of ``variance`` on every element.

    Guarantee: none for what one site adds. The sum over sites is the mechanism that
    :class:`~privacy.skellam_accounting.SkellamMechanism` accounts for, if the variances of those who can be
    trusted add up to its :attr:`~privacy.skellam_accounting.SkellamMechanism.variance`, and only the sum is seen.
    It holds once per call: the noise belongs to the finished sum, never to a micro-batch, and an empty sum gets
    it like any other.

    Additions wrap around at 2**64, which is exact for sums modulo 2**32.

    Args:
        sum_P: int64 vector on any device, not changed.
        variance: this site's share, see :func:`skellam_noise`.
        stream: source of the noise; :meth:`RandomStream.from_system` wherever a patient is real.

    Returns:
        int64, the shape and device of ``sum_P``.

    Raises:
        PrivacyError: if the variance is out of range; there is no way to ask for no noise.
        ValueError: if ``sum_P`` is not an int64 vector.
    """
    if sum_P.dtype != torch.int64 or sum_P.dim() != 1:
        raise ValueError(f"Expected an int64 vector, got {sum_P.dtype} of shape {list(sum_P.shape)}.")
    noise_P = torch.from_numpy(skellam_noise(sum_P.numel(), variance=variance, stream=stream))
    return sum_P + noise_P.to(sum_P.device)


@dataclass(frozen=True, eq=False)
class _Table:
    """The distribution of |k|, for inversion: |k| is the number of entries that a uniform integer reaches.

    Entry j is T(j) = 2**127 * P(|k| <= j), rounded down, as 63 high and 64 low bits. A guide (Chen and Asau 1974)
    of equal cells of the uniform integer tells how many entries lie below each cell; most cells hold one entry
    at most, and there a single comparison decides.

    Attributes:
        high: the 63 high bits of each entry, rising, and 2**63 behind the last.
        low: the 64 low bits of each entry.
        guide: for each cell, the number of entries whose high bits lie below it.
        crowded: for each cell, whether it holds two entries or more.
        guide_shift: what to shift 63 bits by to find their cell.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.int64]
    crowded: NDArray[np.bool_]
    guide_shift: int

    def magnitudes(self, uniform: NDArray[np.uint64], stream: RandomStream) -> NDArray[np.int64]:
        """|k| for uniform integers of 63 bits; further bits come from the stream where these do not decide."""
        cell = (uniform >> self.guide_shift).astype(np.intp)
        magnitude = self.guide[cell]
        entry = self.high[magnitude]
        undecided = np.flatnonzero(self.crowded[cell] | (entry == uniform))
        magnitude += entry < uniform
        magnitude[undecided] = self._searched(uniform[undecided], stream)
        return magnitude

    def _searched(self, uniform: NDArray[np.uint64], stream: RandomStream) -> NDArray[np.int64]:
        entries = self.high[:-1]
        magnitude = np.searchsorted(entries, uniform, side="left").astype(np.int64)
        for place in np.flatnonzero(self.high[magnitude] == uniform):  # probability 2**-43 and less
            first, end = magnitude[place], np.searchsorted(entries, uniform[place], side="right")
            magnitude[place] += np.searchsorted(self.low[first:end], stream.uint64(1)[0], side="right")
        return magnitude


@lru_cache(maxsize=4)
def _table_of(variance: int) -> _Table:
    """The table of a variance, by the recurrence of the Bessel functions from the tail to the centre.

    I_(k-1)(V) = I_(k+1)(V) + (2 k / V) I_k(V) (DLMF 10.29.1), as integers, normalised by sum_k I_k(V) = exp(V).
    In this direction all terms are positive, so relative errors do not grow but add up: less than 2**22 steps that
    each round down an integer above 2**160. Beginning with 0 behind order M adds a multiple of the recurrence's
    other solution, which grows with k: no P(k) moves by more than P(M + 1) (Miller's algorithm, DLMF 3.6).
    """
    last, start = _first_beyond(variance, TAIL_BITS), _first_beyond(variance, START_BITS)
    weights = [0] * last
    weight, weight_above, total = 1 << FIRST_BITS, 0, 0
    for k in range(start, 0, -1):
        total += 2 * weight
        if k < last:
            weights[k] = weight
        weight, weight_above = weight_above + 2 * k * weight // variance, weight
    weights[0] = weight
    total += weight

    entries, reached = bytearray(), 0
    for k, weight in enumerate(weights):
        reached += 2 * weight if k else weight
        entries += ((reached << MAGNITUDE_BITS) // total).to_bytes(16, "little")
    low, high = np.frombuffer(bytes(entries), dtype="<u8").astype(np.uint64).reshape(last, 2).T

    guide_bits = min(LARGEST_GUIDE_BITS, last.bit_length() + 1)
    guide_shift = MAGNITUDE_BITS - 64 - guide_bits
    edges = np.arange(2**guide_bits + 1, dtype=np.uint64) << guide_shift
    below = np.searchsorted(high, edges, side="left").astype(np.int64)
    return _Table(
        high=np.append(high, np.uint64(2**63)),
        low=np.ascontiguousarray(low),
        guide=below[:-1].copy(),
        crowded=np.diff(below) > 1,
        guide_shift=guide_shift,
    )


def _first_beyond(variance: int, bits: int) -> int:
    """An integer t >= 1 with P(|X| > t) < 2**-bits, by the bound of Chernoff, close to the smallest one.

    log P(X >= t) <= V (cosh(s) - 1) - s t for every s >= 0, least at s = asinh(t / V).
    """

    def is_beyond(t: int) -> bool:
        log_tail = t * t / (math.hypot(variance, t) + variance) - t * math.asinh(t / variance)
        return log_tail < -(bits + 2) * math.log(2)

    low, high = 0, 1
    while not is_beyond(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high
