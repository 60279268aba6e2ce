"""Gives back what SciPy keeps of Fourier transforms that will not come again.

SciPy's FFT (pocketfft) remembers the plans of its last sixteen lengths, for real and for complex transforms apart, up
to 24 bytes for each point, and offers no way to forget them. The accountants' grids have another length for every
number of steps, so that a plan is kept and never used again: in a process that accounts for round after round they
come to sixteen times a grid.
"""

from __future__ import annotations

import numpy as np

_REMEMBERED = 16
"""Plans that pocketfft keeps for each kind of transform (``nmax`` of its ``get_plan``)."""


def forget_fft_plans() -> None:
    """Push every plan for long transforms of float64 out of SciPy's memory, by sixteen short ones of each kind.

    Takes a tenth of a millisecond. Where transforms of these short lengths were asked for last, fewer plans are
    pushed out than sixteen; no other code here asks for any.
    """
    from scipy import fft

    for length in range(2, 2 + _REMEMBERED):
        values = np.zeros(length)
        fft.rfft(values)
        fft.fft(values.astype(np.complex128))
