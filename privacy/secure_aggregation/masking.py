"""The mask of a vector: the AES-256 keystream of a key, added modulo 2**bits.

A vector of ring elements plus a uniform mask is uniform, whatever the vector is: a one-time pad. The mask that
is not truly uniform but the keystream of AES-256 in counter mode (NIST SP 800-38A, section 6.5,
https://doi.org/10.6028/NIST.SP.800-38A) cannot be told from it, as long as AES-256 is a pseudo-random
permutation and fewer than 2**64 blocks are used; the vectors here need some 2**22.

Not guaranteed: constant time, or that the key is gone from memory afterwards.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

# Legend: P elements of the vector.

KEY_BYTES: Final = 32  # AES-256
_COUNTER_START: Final = bytes(16)  # a key makes one mask, so counting may begin at zero
_CHUNK_BYTES: Final = 128 * 1024  # stays in the second-level cache: 1.5 times as fast as 4 MB at once
_ZEROS: Final = bytes(_CHUNK_BYTES)


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
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(_COUNTER_START)).encryptor()
    keystream = bytearray(_CHUNK_BYTES)
    word_bytes = total_P.dtype.itemsize
    mask_C = np.frombuffer(keystream, dtype=f"<u{word_bytes}")
    combine = np.subtract if negative else np.add
    for start in range(0, len(total_P), len(mask_C)):
        chunk_C = total_P[start : start + len(mask_C)]
        encryptor.update_into(memoryview(_ZEROS)[: chunk_C.nbytes], keystream)
        combine(chunk_C, mask_C[: len(chunk_C)], out=chunk_C)
