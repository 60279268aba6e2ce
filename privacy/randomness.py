"""The keystream from which samplers and noise draw: AES-256 in counter mode, keyed by the operating system.

A statistical generator (Mersenne twister, Philox, PCG) can be rewound from its outputs, and released noise
is output. This stream cannot, as long as AES-256 is a pseudo-random function: every byte is used once and in
order, and the key is held by nothing but the cipher.

Two kinds of stream, and no third:

* :meth:`RandomStream.from_system`: a new key of 256 bits from the operating system. What patients are
  promised rests on this one only.
* :meth:`RandomStream.for_simulation`: a key that anyone can compute, so that a simulated study can be
  repeated. It protects nobody.

Not guaranteed: constant time, erasure of the key from memory, or anything about threads: a stream belongs to
one thread of one process.
"""

from __future__ import annotations

import hashlib
import os
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from medfed.canonical import canonical_bytes
from medfed.errors import PrivacyError

KEY_BYTES = 32  # AES-256
COUNTER_START = bytes(16)  # a key serves one stream, so counting may begin at zero (NIST SP 800-38A, 6.5)
WORD_BYTES = 8
LARGEST_BOUND = 2**63  # what int64, the type of an index, can hold

# The largest radius that `normal` can draw: sqrt(-2 ln 2^-65).
LARGEST_NORMAL = 9.4926


class RandomStream:
    """An endless sequence of independent uniform bytes, and numbers made from them.

    All methods consume the same sequence, so no byte serves twice. Module-level generators (``random``,
    ``numpy.random``, ``torch``) are neither read nor changed.

    Copying, pickling and use in a forked child are refused: two holders of one keystream would draw the same
    noise, and the difference of two results with equal noise is bare of it.

    Args:
        key: 32 bytes. Use :meth:`from_system` or :meth:`for_simulation` instead of a key of your own.

    Raises:
        ValueError: if the key has not 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}; call RandomStream.from_system().")
        self._keystream = Cipher(algorithms.AES256(key), modes.CTR(COUNTER_START)).encryptor()
        self._process = os.getpid()

    @classmethod
    def from_system(cls) -> RandomStream:
        """A stream with a new key from the operating system, unlike any other stream."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def for_simulation(cls, seed: int, *context: str | int) -> RandomStream:
        """The stream that is fixed by ``seed`` and ``context``: for virtual patients only.

        The key is the SHA-256 of the canonical JSON of both, so different contexts have independent streams
        and ``("a", 12)`` differs from ``("a1", 2)``. Whoever knows the study knows the key: results drawn
        from it carry no privacy at all. Bytes and integers are the same on every machine; normals may differ
        in their last bits where the mathematical library does.
        """
        return cls(hashlib.sha256(canonical_bytes(["medfed.simulation-stream.v1", seed, *context])).digest())

    def bytes(self, n: int) -> bytes:
        """The next ``n`` bytes.

        Raises:
            ValueError: if ``n`` is negative.
            PrivacyError: in a process other than the one that made the stream.
        """
        _check_count(n)
        if os.getpid() != self._process:
            raise PrivacyError(
                "Expected a random stream to be used by the process that made it, got a forked child, whose draws "
                "would repeat those of its parent; make a new stream in the child."
            )
        return self._keystream.update(bytes(n))

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """The next ``n`` integers, uniform on [0, 2**64), eight little-endian bytes each."""
        _check_count(n)
        return np.frombuffer(self.bytes(WORD_BYTES * n), dtype="<u8").astype(np.uint64)

    def below(self, bound: int, n: int) -> NDArray[np.int64]:
        """``n`` independent integers, exactly uniform on [0, ``bound``).

        Integers above the last whole multiple of ``bound`` under 2**64 are drawn again, without which small
        results would be more frequent (Lemire 2019, section 2, https://arxiv.org/abs/1805.10941).

        Raises:
            ValueError: if ``bound`` is outside 1..2**63 or ``n`` is negative.
        """
        if not 1 <= bound <= LARGEST_BOUND:
            raise ValueError(f"Expected a bound within 1..2**63, got {bound}.")
        _check_count(n)
        last_accepted = np.uint64(2**64 - 2**64 % bound - 1)
        accepted = np.empty(0, dtype=np.uint64)
        while len(accepted) < n:
            drawn = self.uint64(n - len(accepted))
            accepted = np.concatenate([accepted, drawn[drawn <= last_accepted]])
        return (accepted % np.uint64(bound)).astype(np.int64)

    def normal(self, n: int) -> NDArray[np.float64]:
        """``n`` standard normals in float64, always finite (Box and Muller 1958).

        Each pair takes 128 bits: a radius ``sqrt(-2 ln u)`` with ``u = (k + 1/2) / 2**64``, and an angle. The
        half keeps ``u`` from zero and 64 bits reach to 9.49 standard deviations, where a generator of 53 bits
        ends at 8.6. What is missing is the radius beyond, with probability 2**-65 = 2.7e-20 per pair. The two
        normals of a pair are ``n / 2`` places apart, rounded up; within one half none share bits.

        Floating point: the values lie on a grid that depends on them (Mironov 2012). Noise for release comes
        from :func:`privacy.noise.add_gaussian`, which hides that grid.

        Raises:
            ValueError: if ``n`` is negative.
        """
        _check_count(n)
        num_pairs = (n + 1) // 2
        radius_bits, angle_bits = self.uint64(2 * num_pairs).reshape(2, num_pairs)
        # The sum is rounded to 53 bits, to 2**64 at most: then u is 1 and the radius 0, never NaN.
        radius = np.sqrt(-2.0 * np.log((radius_bits + 0.5) * 2.0**-64))
        angle = angle_bits * (2.0 * np.pi * 2.0**-64)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

    def __reduce__(self) -> NoReturn:
        """Refuses copies and pickles.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "Expected a random stream to stay where it was made, got an attempt to copy it, which would draw the "
            "same numbers twice; make a new stream instead."
        )


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"Expected a count >= 0, got {n}.")
