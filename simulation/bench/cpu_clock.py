"""A clock that runs only while it is asked to."""

from __future__ import annotations

import gc
import time
from typing import Self


class CpuClock:
    """Adds up the processor time of this process, of all its threads, over the blocks that it is entered for.

    Attributes:
        cpu_s: so far, in seconds.
    """

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._entered_s = 0.0

    def __enter__(self) -> Self:
        gc.collect()  # not what others left behind
        self._entered_s = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time() - self._entered_s
