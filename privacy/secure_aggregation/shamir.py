"""Shamir's secret sharing of bytes: any ``threshold`` shares give the secret back, fewer tell nothing.

Every byte of the secret is shared on its own, as the value at 0 of a random polynomial of degree
``threshold - 1`` over GF(256); a share is the value at another point (Shamir 1979,
https://doi.org/10.1145/359168.359176). All bytes go through the same array operations at once, so the secrets
of a whole epoch, one after the other, are shared or restored in one call. The field is the one of AES:
polynomials over GF(2) modulo x**8 + x**4 + x**3 + x + 1 (FIPS 197, section 4,
https://doi.org/10.6028/NIST.FIPS.197-upd1); of its 255 points other than 0 each holder has one.

Not guaranteed: integrity. A wrong share gives a wrong secret, without a sign of it: compare the secret with a
commitment to it. Nor constant time: tables are read at places that depend on the secrets, which another
process on the same processor may be able to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Legend: N holders (points), T coefficients (threshold), S bytes of all secrets.

LARGEST_POINT: Final = 255  # the non-zero elements of GF(256)
SMALLEST_THRESHOLD: Final = 2  # with 1, every share is the secret
_POLYNOMIAL: Final = 0x11B  # x**8 + x**4 + x**3 + x + 1 (FIPS 197, section 4.2)
_ORDER: Final = 255  # of the multiplicative group


def _tables() -> tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.uint8]]:
    """Logarithms and powers of the generator x + 1, and all products."""
    power = np.empty(2 * _ORDER, dtype=np.uint8)  # twice, so that the sum of two logarithms is an index
    log = np.zeros(256, dtype=np.intp)
    element = 1
    for exponent in range(_ORDER):
        power[exponent] = power[exponent + _ORDER] = element
        log[element] = exponent
        element ^= element << 1
        if element > LARGEST_POINT:
            element ^= _POLYNOMIAL
    product = power[log[:, None] + log]
    product[0, :] = product[:, 0] = 0
    return log, power, product


_LOG, _POWER, _PRODUCT = _tables()


def split(
    secrets_S: NDArray[np.uint8], *, threshold: int, points: Sequence[int], random_bytes: Callable[[int], bytes]
) -> NDArray[np.uint8]:
    """The share of every point, shape (len(points), S).

    Guarantee: any ``threshold`` of the shares fix the secrets, and any ``threshold - 1`` of them are
    independent of the secrets, uniform bytes, if what ``random_bytes`` returns is uniform and used nowhere
    else. The leading coefficient may be zero, as it must for that.

    ===============================  =================
    case                             result
    ===============================  =================
    no secrets, S = 0                shares of no bytes
    threshold 1, or above N          ValueError
    point 0, above 255, or twice     ValueError
    ===============================  =================

    Args:
        secrets_S: the secrets, one after the other; not changed.
        threshold: how many shares restore the secrets, 2..N.
        points: one for each holder, distinct, 1..255.
        random_bytes: a source fit for keys: ``os.urandom``, or the stream of a simulation. Called once, for
            (threshold - 1) * S bytes.

    Raises:
        ValueError: as in the table; if the secrets are not a vector of bytes; or if ``random_bytes`` returns
            another number of bytes than it was asked for.
    """
    _check_bytes(secrets_S, "secrets")
    if len(set(points)) != len(points) or not all(1 <= point <= LARGEST_POINT for point in points):
        raise ValueError(f"Expected distinct points within 1..{LARGEST_POINT}, got {list(points)}.")
    if not SMALLEST_THRESHOLD <= threshold <= len(points):
        raise ValueError(
            f"Expected a threshold within {SMALLEST_THRESHOLD}..{len(points)}, the number of points, got {threshold}."
        )
    num_secrets = len(secrets_S)
    drawn = random_bytes((threshold - 1) * num_secrets)
    if len(drawn) != (threshold - 1) * num_secrets:
        raise ValueError(f"Expected {(threshold - 1) * num_secrets} random bytes, got {len(drawn)}.")
    points_N = np.array(points, dtype=np.uint8)
    power_N = np.ones_like(points_N)
    shares_SN = np.repeat(secrets_S[:, None], len(points), axis=1)
    for coefficient_S in np.frombuffer(drawn, dtype=np.uint8).reshape(threshold - 1, num_secrets):
        power_N = _PRODUCT[power_N, points_N]
        # Row c holds c * x**k for all points: a coefficient picks a whole row, which is one copy of N bytes.
        shares_SN ^= np.take(_PRODUCT[:, power_N], coefficient_S, axis=0)
    return np.ascontiguousarray(shares_SN.T)


def reconstruct(shares: Mapping[int, NDArray[np.uint8]], *, at: int = 0) -> NDArray[np.uint8]:
    """The polynomial through all given shares, evaluated at ``at``: at 0 the secrets, elsewhere a share.

    Guarantee: with exactly ``threshold`` right shares, the secrets, or the right share of point ``at``. All
    shares are used, so one that is wrong makes the result wrong; more than ``threshold`` right ones do no
    harm, fewer give bytes that have nothing to do with the secrets.

    ===========================  ==============
    case                         result
    ===========================  ==============
    ``at`` is a point of shares  that share
    shares of no bytes           no bytes
    no share                     ValueError
    point 0 or above 255         ValueError
    ===========================  ==============

    Args:
        shares: the share of each point, equally long vectors of bytes; not changed.
        at: 0..255.

    Raises:
        ValueError: as in the table, or if the shares are not equally long vectors of bytes.
    """
    if not 0 <= at <= LARGEST_POINT:
        raise ValueError(f"Expected a point within 0..{LARGEST_POINT} to evaluate at, got {at}.")
    if not shares or not all(1 <= point <= LARGEST_POINT for point in shares):
        raise ValueError(f"Expected shares of points within 1..{LARGEST_POINT}, got points {list(shares)}.")
    lengths = set()
    for point, share_S in shares.items():
        _check_bytes(share_S, f"the share of point {point}")
        lengths.add(len(share_S))
    if len(lengths) > 1:
        raise ValueError(f"Expected shares of one length, got {sorted(lengths)}.")
    if at in shares:
        return shares[at].copy()
    value_S = np.zeros(lengths.pop(), dtype=np.uint8)
    for weight, share_S in zip(_lagrange(np.array(list(shares)), at), shares.values(), strict=True):
        value_S ^= np.take(_PRODUCT[weight], share_S)
    return value_S


def _lagrange(points_N: NDArray[np.intp], at: int) -> NDArray[np.uint8]:
    """What each share is multiplied by: the product over the other points of (at - x_j) / (x_i - x_j).

    In a field of characteristic 2, minus is exclusive or. ``at`` is none of the points.
    """
    log_difference_NN = _LOG[points_N[:, None] ^ points_N]  # the diagonal is log 0, which is stored as 0
    log_distance_N = _LOG[points_N ^ at]
    log_weight_N = log_distance_N.sum() - log_distance_N - log_difference_NN.sum(axis=1)
    weight_N: NDArray[np.uint8] = _POWER[log_weight_N % _ORDER]
    return weight_N


def _check_bytes(array: NDArray[np.uint8], name: str) -> None:
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"Expected {name} as a vector of uint8, got {array.dtype} of shape {list(array.shape)}.")
