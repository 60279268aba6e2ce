"""The mask of a vector: the AES-256 keystream of a key, added modulo 2**bits.

A vector of ring elements plus a uniform mask is uniform, whatever the vector is: a one-time pad. The mask that
is not truly uniform but the keystream of AES-256 in counter mode (NIST SP 800-38A, section 6.5,
https://doi.org/10.6028/NIST.SP.800-38A) cannot be told from it, as long as AES-256 is a pseudo-random
permutation and fewer than 2**64 blocks are used; a vector of 10 million elements needs 2**22.

The counter starts at 2, as it does inside AES-GCM with a nonce of zeros (NIST SP 800-38D, sections 6.5 and 7.1,
https://doi.org/10.6028/NIST.SP.800-38D). So OpenSSL can make one and the same keystream in two ways: in counter
mode, with the AES instructions of every processor, or in GCM, whose code alone uses the wide ones of newer
servers: 21 GB/s beside 9 GB/s with AVX-512, but 5.5 GB/s without (OpenSSL 4.0, AMD EPYC). The faster one is
found by trying. The tag of GCM is never asked for: vectors are signed.

Not guaranteed: constant time, or that the key is gone from memory afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

# Legend: P elements of the vector, C elements of a chunk of it.

KEY_BYTES: Final = 32  # AES-256
_COUNTER_START: Final = (2).to_bytes(16, "big")  # GCM encrypts from 2 on; 1 is for its tag
LONGEST_BYTES: Final = 2**36 - 32  # of one keystream, where the counter of GCM ends (SP 800-38D, section 5.2.1.1)
_GCM_NONCE: Final = bytes(12)  # a key makes one mask, so the nonce may be zero
_CHUNK_BYTES: Final = 128 * 1024  # stays in the second-level cache: 1.5 times as fast as 4 MB at once
_ZEROS: Final = bytes(_CHUNK_BYTES)
_TRIALS: Final = 5


def add_mask(total_P: NDArray[np.uint32] | NDArray[np.uint64], key: bytes, *, negative: bool = False) -> None:
    """Adds the mask of ``key`` to ``total_P``, in place, or takes it away.

    Element i of the mask is bytes 4 i to 4 i + 3 of the keystream (8 i to 8 i + 7 in the ring of 64 bits), the
    lowest byte first; the sum is modulo 2**32 (2**64).

    Guarantee: adding and taking away the mask of one key leaves ``total_P`` as it was, on every machine. The
    masked vector tells nothing of the vector to those without the key, if the key is uniform and masks
    **one vector only**: two vectors under one key tell their difference. A prefix of a mask is the mask of a
    prefix.

    ========================================  ==========
    case                                      result
    ========================================  ==========
    no elements                               no change
    dtype other than native uint32, uint64    ValueError
    not a contiguous writeable vector         ValueError
    64 GiB or more                            ValueError
    key of another length than 32             ValueError
    ========================================  ==========

    Args:
        total_P: the vector, or the sum of vectors and masks so far.
        key: 32 bytes, for this vector and no other.
        negative: subtract instead of add.

    Raises:
        ValueError: as in the table; nothing is changed then.
    """
    if total_P.dtype not in (np.uint32, np.uint64) or not total_P.dtype.isnative:
        raise ValueError(f"Expected a vector of native uint32 or uint64, got {total_P.dtype}.")
    if total_P.ndim != 1 or not total_P.flags.c_contiguous or not total_P.flags.writeable:
        raise ValueError(
            f"Expected a contiguous, writeable vector to change in place, got shape {list(total_P.shape)} with "
            f"strides {list(total_P.strides)}, writeable {total_P.flags.writeable}; pass a copy."
        )
    if total_P.nbytes > LONGEST_BYTES:
        raise ValueError(f"Expected at most {LONGEST_BYTES} bytes, got {total_P.nbytes}; mask in pieces.")
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
    keystream = _fastest()(key)
    chunk = bytearray(_CHUNK_BYTES)
    mask_C = np.frombuffer(chunk, dtype=f"<u{total_P.dtype.itemsize}")
    combine = np.subtract if negative else np.add
    for start in range(0, len(total_P), len(mask_C)):
        total_C = total_P[start : start + len(mask_C)]
        keystream.update_into(memoryview(_ZEROS)[: total_C.nbytes], chunk)
        combine(total_C, mask_C[: len(total_C)], out=total_C)


def _in_counter_mode(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(_COUNTER_START)).encryptor()


def _in_gcm(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.GCM(_GCM_NONCE)).encryptor()


@cache
def _fastest() -> Callable[[bytes], CipherContext]:
    """The faster of the two ways to one keystream; the choice changes nothing but the time."""
    return min((_in_counter_mode, _in_gcm), key=_chunk_s)


def _chunk_s(way: Callable[[bytes], CipherContext]) -> float:
    """Shortest time in which a chunk is made, some 10 microseconds."""
    keystream, chunk, times_s = way(bytes(KEY_BYTES)), bytearray(_CHUNK_BYTES), []
    for _ in range(_TRIALS):
        start_s = time.perf_counter()
        keystream.update_into(_ZEROS, chunk)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)
