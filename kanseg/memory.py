"""Memory: what the machine has left, what this process takes, and whether something still fits."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

FITS = 0.5  # of the room that is left: the rest is for what computes
LITTLE = 0.05  # of the memory: always fits, for freed memory that the process keeps counts as taken


def free_memory() -> int:
    """Bytes of main memory that are free."""
    free = _entry("/proc/meminfo", "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free


def memory_at_hand() -> int:
    """Bytes that are free: of the GPU where there is one, else of the main memory."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory()


def for_data(planned: int | None) -> int | None:
    """Bytes of main memory for data: what was planned with, or where that is a GPU's memory, what is free here."""
    import torch

    return free_memory() if planned and torch.cuda.is_available() else planned


def taken(key: str = "VmRSS") -> int | None:
    """Bytes that this process takes, by an entry of /proc/self/status; None where the system does not tell.

    Args:
        key: VmRSS, resident now; VmHWM, resident at most so far.
    """
    return _entry("/proc/self/status", key)


def fits(size: int, memory: int | None = None) -> bool:
    """Whether so many bytes more leave enough room.

    Args:
        memory: bytes that this process may take in all; default what the machine has left.
    """
    return _fits(size, memory) or (give_back() and _fits(size, memory))


def _fits(size: int, memory: int | None) -> bool:
    if memory is None:
        return size <= FITS * free_memory()
    return size <= max(FITS * (memory - (taken() or 0)), LITTLE * memory)


def give_back() -> bool:
    """Return to the system what was freed and glibc has kept for tensors of other sizes; whether that could be done."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))


def _entry(path: str, key: str) -> int | None:
    """Bytes of a line "key: 12 kB"."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
