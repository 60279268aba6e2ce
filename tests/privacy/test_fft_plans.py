"""Plans of long transforms are forgotten, and accounting for round after round holds no memory."""

import ctypes
import gc
import sys

import numpy as np
import pytest
from scipy import fft

from privacy.accounting import Mechanism, epsilon_spent
from privacy.fft_plans import forget_fft_plans

MIB = 2**20
LENGTHS = range(2**16, 2**16 + 16)


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "held_mapped", "usmblks", "fsmblks", "held", "free", "top")
    ]


def held_bytes() -> int:
    """What is allocated and not freed, by Python's arrays and by libraries."""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc alone says what is allocated")
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallocInfo
    gc.collect()
    said = ask()
    return said.held + said.held_mapped


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_plans_of_long_transforms_are_forgotten(dtype: type) -> None:
    forget_fft_plans()
    before = held_bytes()
    for length in LENGTHS:
        fft.fft(np.zeros(length, dtype)) if dtype is np.complex128 else fft.rfft(np.zeros(length, dtype))
    kept = held_bytes() - before
    forget_fft_plans()
    assert kept > 8 * MIB  # else there is nothing to forget any more, and this module can go
    assert held_bytes() - before < MIB / 4


def test_accounting_for_round_after_round_holds_no_memory() -> None:
    """Growing histories have grids of ever other lengths; four of them left 38 MiB of plans behind."""
    epsilon_spent([Mechanism(1.03, 0.5, 40)], 0.004)
    before = held_bytes()
    for steps in range(42, 50, 2):
        epsilon_spent([Mechanism(1.03, 0.5, steps)], 0.004)
    assert held_bytes() - before < MIB
