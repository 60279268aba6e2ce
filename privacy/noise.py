"""Gaussian noise for a clipped sum, hardened against the arithmetic of floating point.

The Gaussian mechanism is private for real numbers. In float64 a draw lies on a grid that depends on the draw,
and a single released number can tell which sums were possible at all (Mironov 2012,
https://doi.org/10.1145/2382196.2382264; for the Gaussian, Jin et al. 2022, https://arxiv.org/abs/2112.05307).
Here every noise value is the sum of four normals, halved, which has the same distribution; to invert it, an
attacker has to search some 2**159 combinations instead of 2**53 (Holohan and Braghin 2021, section 5.1, with
n = 2, https://arxiv.org/abs/2107.10138).

The claim is **hardened, not proven**: no theorem covers float64. Two more facts stand beside it. No noise
value exceeds 19 noise_std, because no normal exceeds 9.49; what is missing has probability 4 * 2**-65 per pair
of coordinates, 8e-15 for 150 000 of them, to be seen beside delta. And a caller who rounds the result to
float32 before release also drops the bits that these attacks read, at no cost to privacy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.errors import PrivacyError
from privacy.randomness import RandomStream

# Legend: P flat adapter elements.


def hardened_normal(n: int, stream: RandomStream) -> NDArray[np.float64]:
    """``n`` standard normals, each the sum of four normals, halved; float64, |z| < 19.

    The variance is (1 + 1 + 1 + 1) / 2**2 = 1. The four come from four calls, so they share no bits: the two
    halves of one Box-Muller pair would add up to a single one.
    """
    return (stream.normal(n) + stream.normal(n) + stream.normal(n) + stream.normal(n)) / 2.0


def add_gaussian(sum_P: Tensor, *, noise_std: float, stream: RandomStream) -> Tensor:
    """A new tensor: ``sum_P`` plus independent N(0, noise_std**2) on every element.

    Guarantee: with ``noise_std = z * C`` and a sum that one patient moves by at most C in L2 norm, this is the
    Gaussian mechanism of noise multiplier z, adjacency add/remove one patient, hardened as told above. It
    holds once per call: the noise belongs to the finished sum, never to a micro-batch, and an empty sum gets
    it like any other.

    There is no way to ask for no noise: a study without protection does not call this function.

    ===========================  =====================
    case                         result
    ===========================  =====================
    sum of zeros (empty batch)   noise alone
    no elements                  no elements
    noise_std 0, < 0, NaN, inf   PrivacyError
    NaN or infinity in the sum   PrivacyError
    ===========================  =====================

    Args:
        sum_P: float64 vector on any device, not changed.
        noise_std: standard deviation per element, > 0 and finite, in the unit of the sum.
        stream: source of the noise; :meth:`RandomStream.from_system` wherever a patient is real.

    Returns:
        float64, the shape and device of ``sum_P``.

    Raises:
        PrivacyError: as in the table.
        ValueError: if ``sum_P`` is not a float64 vector; in float32 small noise would be rounded away.
    """
    if not (math.isfinite(noise_std) and noise_std > 0.0):
        raise PrivacyError(
            f"Expected a finite noise_std > 0, got {noise_std}; a study without noise must not ask for any."
        )
    if sum_P.dtype != torch.float64 or sum_P.dim() != 1:
        raise ValueError(f"Expected a float64 vector, got {sum_P.dtype} of shape {list(sum_P.shape)}.")
    if not bool(torch.isfinite(sum_P).all()):
        raise PrivacyError("Expected a finite sum of clipped gradients, got NaN or infinity; nothing may be released.")
    noise_P = torch.from_numpy(noise_std * hardened_normal(sum_P.numel(), stream))
    return sum_P + noise_P.to(sum_P.device)
