"""Where tensors live: one rule for laptops, hospital workstations and clusters."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from medfed.errors import DeviceError

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(choice: str = "auto") -> torch.device:
    """The device to compute on: ``auto`` takes CUDA if there is one, else the CPU.

    MPS is used only when asked for by name: not every backbone here has all its operators there.

    Raises:
        DeviceError: if the device asked for is not on this machine.
    """
    if choice not in get_args(DeviceChoice):
        raise DeviceError(f"Expected a device of {', '.join(get_args(DeviceChoice))}, got {choice!r}.")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if choice == "auto":
        return torch.device("cuda" if present["cuda"] else "cpu")
    if not present[choice]:
        raise DeviceError(f"Expected a {choice} device, found none on this machine; use --device auto or cpu.")
    return torch.device(choice)


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast on CUDA, full precision elsewhere.

    bfloat16 on CPUs without native support is an order of magnitude slower and would change results.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def prepare_cpu(num_threads: int) -> None:
    """Fix the number of torch threads, and let the allocator keep large blocks between steps.

    By default glibc maps and unmaps every large tensor, and page faults cost a third of a decoder step. The
    price is that the process keeps its peak memory. Does nothing to the allocator elsewhere than on glibc.
    """
    torch.set_num_threads(num_threads)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_free_memory() -> None:
    """Give the system back what this process has freed, which :func:`prepare_cpu` has the allocator keep.

    For a process that waits now: it then holds what it needs, not as much as its largest piece of work so far. The
    next piece pays once for new pages: half a second for 400 MiB on a busy virtual machine. Does nothing elsewhere
    than on glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
