"""The clipped sum of one step in integers: what a secure sum adds up, with an L2 bound that holds exactly.

Each complete patient is clipped to C like in :mod:`privacy.clipping`, scaled by D2 / C and rounded to integers at
random, up or down, such that nothing is lost on average. Rounding can make a vector longer than it was, so the norm
of the integers themselves is compared with D2, in integers, and where it is larger the patient is shrunk a little
and rounded anew (Kairouz, Liu and Steinke 2021, section 4.1, conditional rounding, https://arxiv.org/abs/2102.06387,
with a bound that is never inflated).

What comes out is not private yet: each site adds its share of noise by :func:`privacy.skellam.add_skellam`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.errors import PrivacyError
from privacy.accounting import is_count
from privacy.clipping import ClippedSum
from privacy.randomness import RandomStream

# Legend: P flat adapter elements.

LARGEST_L2_BOUND = 2**30  # its square, and that of a vector which rounding made longer, fits into int64
SHRINKING = 0.995  # of a vector that rounding made too long


class IntegerClippedSum(ClippedSum):
    """Adds up samples to patients, clips and rounds each patient to integers of L2 norm D2 at most, adds them up.

    Guarantee (adjacency: add or remove one patient): the sum moves by a vector of integers whose L2 norm is at most
    ``l2_bound``, exactly: squares are added and compared as integers, and so is the sum. What a patient adds depends
    on that patient and on random bits that nobody else uses.

    The same samples and the same stream give the same integers, however they were cut into micro-batches. Rounding
    keeps directions on average (:func:`rounded_within`); nearly every clipped patient is shrunk once, by 0.5 %.

    Cases and refusals are those of :class:`~privacy.clipping.ClippedSum`; any refusal closes the sum for good.

    ===========================  ===============================================
    case                         result
    ===========================  ===============================================
    no patient, or B = 0         sum of zeros; an ordinary step
    gradient of zeros            adds zeros; counted, not clipped
    gradient of 1e30             clipped like any other
    NaN or infinity              the patient adds zeros; counted, in ``num_unusable`` too
    D2**2 < P                    PrivacyError: rounding would be most of the sum
    ===========================  ===============================================

    The result is a :class:`~privacy.clipping.PatientSum` whose ``sum_P`` is int64, on the CPU, in units of C / D2,
    and whose ``norm`` is in that unit. ``num_clipped`` counts the patients whose gradient was longer than C.

    Args:
        num_parameters: P, length of the flat gradients, >= 1.
        clip_norm: C, L2 norm, within 1e-30..1e30.
        l2_bound: D2, an integer within 1..2**30.
        stream: decides the rounding; :meth:`RandomStream.from_system` wherever a patient is real.
        device: where the gradients are.
        names: name of the tensor that holds an element of the flat gradient, for ``unusable_in``.

    Raises:
        PrivacyError: if ``clip_norm`` or ``l2_bound`` is out of range, or ``l2_bound`` too small for P.
        ValueError: if ``num_parameters`` is less than 1.
    """

    def __init__(
        self,
        num_parameters: int,
        *,
        clip_norm: float,
        l2_bound: int,
        stream: RandomStream,
        device: torch.device | str,
        names: Callable[[int], str] | None = None,
    ) -> None:
        super().__init__(num_parameters, clip_norm=clip_norm, device=device, names=names)
        _check_bound(l2_bound)
        if l2_bound**2 < num_parameters:
            raise PrivacyError(
                f"Expected l2_bound >= sqrt(P) = {num_parameters**0.5:.1f}, got {l2_bound}; rounding {num_parameters} "
                "elements adds up to P / 4 to the squared norm and would leave little of a gradient: use a larger "
                "range of integers or less noise."
            )
        self._sum_P = torch.zeros(num_parameters, dtype=torch.int64)
        self._l2_bound = l2_bound
        self._stream = stream

    def _add_clipped(self, clipped_P: Tensor) -> None:
        scaled_P = clipped_P.cpu().numpy() * (self._l2_bound / self._clip_norm)
        rounded_P = rounded_within(scaled_P, l2_bound=self._l2_bound, stream=self._stream)
        self._sum_P.add_(torch.from_numpy(rounded_P))


def rounded_within(vector_P: NDArray[np.float64], *, l2_bound: int, stream: RandomStream) -> NDArray[np.int64]:
    """The vector rounded to integers whose L2 norm is at most ``l2_bound`` in exact arithmetic.

    Each element x becomes one of the two integers beside it, the upper one with probability x - floor(x), to 2**-64,
    independently of the others: on average x. If the result is too long, the vector is shrunk by 0.5 % and rounded
    with new bits, until it is not. So the direction is kept on average, and the length is lost that rounding would
    add: about sum(f - f**2) / (2 * D2) for fractions f, typically P / (12 * D2), beside steps of 0.5 %.

    ===========================  =====================================
    case                         result
    ===========================  =====================================
    zeros                        zeros
    integers within the bound    themselves
    longer than the bound        scaled to it, and shrunk until it fits
    NaN or infinity              PrivacyError
    ===========================  =====================================

    Args:
        vector_P: float64, not changed. What is longer than the bound is first scaled to it.
        l2_bound: D2, an integer within 1..2**30. With D2**2 >= P some 30 attempts are enough.
        stream: random bits, 64 per element and attempt.

    Raises:
        PrivacyError: if the vector is not finite or the bound is out of range.
    """
    _check_bound(l2_bound)
    if not np.isfinite(vector_P).all():
        raise PrivacyError("Expected a finite gradient to round, got NaN or infinity; nothing may be released.")
    largest = float(np.abs(vector_P).max(initial=0.0))
    if largest > 0.0 and largest * float(np.linalg.norm(vector_P / largest)) > l2_bound:
        vector_P = vector_P / largest
        vector_P *= l2_bound / float(np.linalg.norm(vector_P))
    scale = 1.0
    while True:
        # Of the magnitude, whose fraction is a float64 in [0, 1), exactly; that of -1e-30, counted from -1, is not.
        fraction_P, whole_P = np.modf(np.abs(vector_P * scale))
        away_P = stream.uint64(len(fraction_P)) < (fraction_P * 2.0**64).astype(np.uint64)
        rounded_P = whole_P.astype(np.int64) + away_P
        np.negative(rounded_P, out=rounded_P, where=vector_P < 0)
        # At most (D2 + sqrt(P))^2 up to float64 rounding, which is far below 2^63.
        if int(np.dot(rounded_P, rounded_P)) <= l2_bound**2:
            return rounded_P
        scale *= SHRINKING


def _check_bound(l2_bound: int) -> None:
    if not (is_count(l2_bound) and 1 <= l2_bound <= LARGEST_L2_BOUND):
        raise PrivacyError(
            f"Expected l2_bound as an integer within 1..2**30, got {l2_bound!r}; set the largest L2 norm that the "
            "integers of one patient may have."
        )
