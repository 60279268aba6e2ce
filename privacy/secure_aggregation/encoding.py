"""Real vectors as elements of a ring, so that the sum of the elements is the sum of the vectors.

A secure sum is a sum of integers modulo 2**bits. :class:`FixedPoint` turns a real into an integer of a fixed
unit, 2**-fraction_bits, chosen so that one site's vector fits and **no sum can wrap**: a parameter set for
which it could is refused before anything is sent. :func:`integer_ring` and :func:`from_ring` do the same for
vectors that are integers already, as those with integer noise are.

Not guaranteed: that a site which does not run this code keeps to the bound. Under a secure sum nobody sees its
vector; what is checked is the range of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.errors import SecureAggregationError
from privacy.clipping import LARGEST_CLIP_NORM, ROUNDING, SMALLEST_CLIP_NORM, clip_factor

# Legend: P elements of the vector, C elements of a chunk of it.

Ring: TypeAlias = NDArray[np.uint32] | NDArray[np.uint64]
"""A vector of ring elements."""

RingBits: TypeAlias = Literal[32, 64]

SMALLEST_VALUE_BITS: Final = 2  # a sign and a bit
_CHUNK_ELEMENTS: Final = 2**15  # of float64: 256 KiB, which stays in the second-level cache
_RINGS: Final[dict[int, tuple[type[Any], type[Any]]]] = {32: (np.uint32, np.int32), 64: (np.uint64, np.int64)}


@dataclass(frozen=True)
class FixedPoint:
    """Signed fixed point in two's complement, for sums of up to ``num_summands`` vectors of bounded norm.

    Guarantee: the sum of the encodings of up to ``num_summands`` vectors, modulo 2**ring_bits, decodes to the
    sum of the vectors (each scaled down to ``clip_norm`` where it is longer), every element to within
    :meth:`quantisation_bound`. Sites with equal fields have equal encodings, bit by bit.

    The unit is the smallest with clip_norm <= 2**(value_bits - 1) units. The worst element of a sum is
    num_summands * (clip_norm * 2**fraction_bits + 1) units; construction refuses unless that is below
    2**(ring_bits - 1), in exact arithmetic.

    ==================================  ==============================================
    vector                              encoding
    ==================================  ==============================================
    no elements, or zeros               as it is
    norm above clip_norm                of the vector scaled down: see :func:`bounded`
    half a unit                         the even neighbour
    NaN or infinity                     SecureAggregationError that names the tensor
    finite, squares overflow float64    SecureAggregationError
    ==================================  ==============================================

    Attributes:
        clip_norm: largest L2 norm of one vector, within 1e-30..1e30.
        num_summands: largest number of vectors in a sum.
        ring_bits: width of a ring element: 4 or 8 bytes on the wire.
        value_bits: width of one vector's elements, the sign included. 24 loses nothing of a float32 at the
            size of the clip norm, and leaves room for 255 summands in 32 bits.

    Raises:
        SecureAggregationError: if a field is out of range, or a sum could wrap; the message has the nearest
            values that are valid.
    """

    clip_norm: float
    num_summands: int
    ring_bits: RingBits = 32
    value_bits: int = 24

    def __post_init__(self) -> None:
        if not SMALLEST_CLIP_NORM <= self.clip_norm <= LARGEST_CLIP_NORM:
            raise SecureAggregationError(
                f"Expected a clip_norm within {SMALLEST_CLIP_NORM}..{LARGEST_CLIP_NORM}, got {self.clip_norm}; set "
                "the largest L2 norm that the vector of one site may have."
            )
        if self.num_summands < 1:
            raise SecureAggregationError(f"Expected num_summands >= 1, got {self.num_summands}; count the sites.")
        if self.ring_bits not in _RINGS:
            raise SecureAggregationError(f"Expected ring_bits 32 or 64, got {self.ring_bits}.")
        if not SMALLEST_VALUE_BITS <= self.value_bits <= self.ring_bits:
            raise SecureAggregationError(
                f"Expected value_bits within {SMALLEST_VALUE_BITS}..{self.ring_bits}, got {self.value_bits}."
            )
        self._check_no_sum_wraps()

    @cached_property
    def fraction_bits(self) -> int:
        """The largest f with clip_norm * 2**f <= 2**(value_bits - 1); negative for a clip norm beyond that."""
        return _fraction_bits(self.clip_norm, self.value_bits)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ring: uint32 or uint64."""
        return np.dtype(_RINGS[self.ring_bits][0])

    def encode(self, vector_P: Tensor | NDArray[Any], names: Callable[[int], str] | None = None) -> Ring:
        """The ring elements of one site's vector: rounded to the nearest unit, the same for equal vectors.

        Args:
            vector_P: float32 or float64; not changed.
            names: name of the tensor that holds an element, for messages
                (:meth:`medfed.adapter_manifest.AdapterManifest.name_at`).

        Raises:
            SecureAggregationError: as in the table of the class.
            ValueError: if it is not a float32 or float64 vector.
        """
        plain_P = _floats(vector_P)
        factor, _ = _scaling(plain_P, self.clip_norm, names)
        unsigned, signed = _RINGS[self.ring_bits]
        encoded_P = np.empty(len(plain_P), dtype=signed)
        # Chunks stay in the cache; the power of two is exact, so the product is rounded as in `bounded`.
        scale = math.ldexp(factor, self.fraction_bits)
        units_C = np.empty(min(len(plain_P), _CHUNK_ELEMENTS), dtype=np.float64)
        for start in range(0, len(plain_P), _CHUNK_ELEMENTS):
            chunk_C = plain_P[start : start + _CHUNK_ELEMENTS]
            product_C = np.multiply(chunk_C, scale, out=units_C[: len(chunk_C)], dtype=np.float64)
            encoded_P[start : start + len(chunk_C)] = np.rint(product_C, out=product_C)
        ring_P: Ring = encoded_P.view(unsigned)
        return ring_P

    def decode(self, sum_P: Ring, *, num_summands: int) -> NDArray[np.float64]:
        """The sum of ``num_summands`` vectors.

        Args:
            sum_P: sum of as many encodings, modulo 2**ring_bits; not changed.
            num_summands: 1..``self.num_summands``.

        Raises:
            SecureAggregationError: if ``num_summands`` is out of range; or if an element of the sum is larger
                than that many vectors can make it, so that a site sent what it must not, or masks are left.
            ValueError: if the sum is not a vector of the ring.
        """
        if sum_P.dtype != self.dtype:
            raise ValueError(f"Expected a sum of dtype {self.dtype}, got {sum_P.dtype}.")
        integers_P = from_ring(sum_P, limit=math.floor(self._worst_sum(num_summands)))
        # The power of two is exact: nothing is rounded here but the conversion of integers above 2**53.
        return np.multiply(integers_P, math.ldexp(1.0, -self.fraction_bits), dtype=np.float64)

    def quantisation_bound(self, num_summands: int) -> float:
        """Largest distance of an element of a decoded sum from the sum of the vectors, as :func:`bounded` has them.

        Half a unit for each summand; and, if the sum can exceed 2**53 units, what float64 loses of it.

        Raises:
            SecureAggregationError: if ``num_summands`` is outside 1..``self.num_summands``.
        """
        worst = self._worst_sum(num_summands)
        lost = float(worst) * ROUNDING if worst > 1 / ROUNDING else 0.0
        return math.ldexp(num_summands / 2 + lost, -self.fraction_bits)

    def _worst_sum(self, num_summands: int) -> Fraction:
        """What no element of a sum exceeds, in units: one more than the clip norm for each summand."""
        if not 1 <= num_summands <= self.num_summands:
            raise SecureAggregationError(
                f"Expected a sum of 1..{self.num_summands} vectors, got {num_summands}; plan for as many as there "
                "are sites."
            )
        return num_summands * _worst_value(self.clip_norm, self.value_bits)

    def _check_no_sum_wraps(self) -> None:
        capacity = 2 ** (self.ring_bits - 1)
        worst_value = _worst_value(self.clip_norm, self.value_bits)
        if self.num_summands * worst_value < capacity:
            return
        advice = []
        if (most_summands := math.ceil(capacity / worst_value) - 1) >= 1:
            advice.append(f"num_summands <= {most_summands}")
        for value_bits in range(self.value_bits - 1, SMALLEST_VALUE_BITS - 1, -1):
            if self.num_summands * _worst_value(self.clip_norm, value_bits) < capacity:
                advice.append(f"value_bits <= {value_bits}")
                break
        if self.ring_bits == 32 and self.num_summands * worst_value < 2**63:
            advice.append("ring_bits 64")
        raise SecureAggregationError(
            "Expected num_summands * (clip_norm * 2**fraction_bits + 1) < 2**(ring_bits - 1), so that no sum wraps, "
            f"got {self.num_summands} * ({self.clip_norm} * 2**{self.fraction_bits} + 1) = "
            f"{math.ceil(self.num_summands * worst_value)}, not below {capacity}; use {' or '.join(advice)}."
        )


def bounded(
    vector_P: Tensor | NDArray[Any], clip_norm: float, names: Callable[[int], str] | None = None
) -> tuple[NDArray[np.float64], bool]:
    """The vector that :meth:`FixedPoint.encode` encodes, in float64, and whether it was scaled down.

    Guarantee: its L2 norm in exact arithmetic is at most ``clip_norm`` (:func:`privacy.clipping.clip_factor`). A
    vector whose norm is below ``clip_norm`` by a relative 1e-9 for a million elements comes back as it is.

    Args:
        vector_P: float32 or float64; not changed.
        clip_norm: within 1e-30..1e30.
        names: name of the tensor that holds an element, for messages.

    Raises:
        SecureAggregationError: on NaN, infinity, or a norm that float64 cannot hold.
        ValueError: if it is not a float32 or float64 vector.
    """
    plain_P = _floats(vector_P)
    factor, was_scaled = _scaling(plain_P, clip_norm, names)
    return np.multiply(plain_P, factor, dtype=np.float64), was_scaled


def integer_ring(values_P: NDArray[np.int64], *, limit: int, ring_bits: RingBits = 32) -> Ring:
    """Signed integers as ring elements, two's complement.

    Args:
        values_P: int64, not changed.
        limit: largest absolute value that one vector may have. That n vectors cannot wrap,
            n * limit < 2**(ring_bits - 1), is for the caller to know: noise has no bound but a likely one.
        ring_bits: 32 or 64.

    Raises:
        SecureAggregationError: if a value is beyond ``limit``.
        ValueError: if the values are not an int64 vector, or ``limit`` is not one of the ring.
    """
    if values_P.dtype != np.int64 or values_P.ndim != 1:
        raise ValueError(f"Expected an int64 vector, got {values_P.dtype} of shape {list(values_P.shape)}.")
    _check_limit(limit, ring_bits)
    _check_range(values_P, limit)
    unsigned, signed = _RINGS[ring_bits]
    ring_P: Ring = values_P.astype(signed).view(unsigned)
    return ring_P


def from_ring(sum_P: Ring, *, limit: int) -> NDArray[np.int64]:
    """The signed integers of ring elements: the inverse of :func:`integer_ring`, for a vector or a sum.

    Args:
        sum_P: uint32 or uint64, not changed.
        limit: largest absolute value that the sum may have.

    Raises:
        SecureAggregationError: if a value is beyond ``limit``: a site sent what it must not, or masks are left.
        ValueError: if ``sum_P`` is not a vector of a ring, or ``limit`` is not one of its.
    """
    ring_bits = 8 * sum_P.dtype.itemsize
    if sum_P.ndim != 1 or ring_bits not in _RINGS or sum_P.dtype != _RINGS[ring_bits][0]:
        raise ValueError(f"Expected a uint32 or uint64 vector, got {sum_P.dtype} of shape {list(sum_P.shape)}.")
    _check_limit(limit, ring_bits)
    values_P = sum_P.view(_RINGS[ring_bits][1])
    _check_range(values_P, limit)
    integers_P: NDArray[np.int64] = values_P.astype(np.int64)
    return integers_P


def _worst_value(clip_norm: float, value_bits: int) -> Fraction:
    """One more than the clip norm, in units: no element of an encoding exceeds it, whatever was rounded."""
    return Fraction(clip_norm) * Fraction(2) ** _fraction_bits(clip_norm, value_bits) + 1


def _fraction_bits(clip_norm: float, value_bits: int) -> int:
    mantissa, exponent = math.frexp(clip_norm)  # clip_norm = mantissa * 2**exponent, 1/2 <= mantissa < 1
    return value_bits - exponent if mantissa == 0.5 else value_bits - 1 - exponent


def _floats(vector_P: Tensor | NDArray[Any]) -> NDArray[np.floating[Any]]:
    """The vector as an array, without a copy where it lies on the CPU."""
    array: NDArray[Any] = vector_P.detach().cpu().numpy() if isinstance(vector_P, torch.Tensor) else vector_P
    if array.dtype not in (np.float32, np.float64) or array.ndim != 1:
        raise ValueError(f"Expected a float32 or float64 vector, got {array.dtype} of shape {list(array.shape)}.")
    return array


def _scaling(
    plain_P: NDArray[np.floating[Any]], clip_norm: float, names: Callable[[int], str] | None
) -> tuple[float, bool]:
    """What to multiply the vector by, and whether that is less than 1."""
    squares = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # judged below
        for start in range(0, len(plain_P), _CHUNK_ELEMENTS):
            chunk_C = plain_P[start : start + _CHUNK_ELEMENTS].astype(np.float64)
            squares += float(np.dot(chunk_C, chunk_C))
    if not math.isfinite(squares):
        # Finite squares prove finite elements in one pass; only a suspicious sum pays for the search.
        _refuse(plain_P, names)
    factor = clip_factor(math.sqrt(squares), clip_norm=clip_norm, num_parameters=len(plain_P))
    return factor, factor < 1.0


def _refuse(plain_P: NDArray[np.floating[Any]], names: Callable[[int], str] | None) -> None:
    (wrong,) = np.nonzero(~np.isfinite(plain_P))
    if not len(wrong):
        raise SecureAggregationError(
            "Expected a vector whose squares float64 can add up, got a larger one; lower the learning rate."
        )
    where = f"{names(int(wrong[0]))!r}" if names else f"element {wrong[0]}"
    raise SecureAggregationError(
        f"Expected finite values, got NaN or infinity in {where}; nothing was sent. Lower the learning rate."
    )


def _check_limit(limit: int, ring_bits: int) -> None:
    if ring_bits not in _RINGS or not 0 <= limit < 2 ** (ring_bits - 1):
        raise ValueError(
            f"Expected a limit within 0..2**(ring_bits - 1) - 1 and ring_bits 32 or 64, got {limit} and {ring_bits}."
        )


def _check_range(values_P: NDArray[np.signedinteger[Any]], limit: int) -> None:
    """Refuses values beyond ``limit``; integers of Python, because -(-2**31) wraps in the array's own."""
    if len(values_P) == 0:
        return
    smallest, largest = int(values_P.min()), int(values_P.max())
    if max(-smallest, largest) > limit:
        raise SecureAggregationError(
            f"Expected integers within -{limit}..{limit}, got {smallest}..{largest}; a site sent what it must not, or "
            "masks are left in the sum. Do not use it."
        )
