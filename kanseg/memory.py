"""Memory: what the machine has left, what this process takes, and whether something still fits."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import tempfile
from pathlib import Path

import psutil

from kanseg.cgroups import memory_left
from kanseg.errors import UsageError

FITS = 0.5  # of the room that is left: the rest is for what computes
NEAR = 0.6  # of the memory: from there on what is freed is not kept for later
LITTLE = 0.05  # of the memory: always fits, for freed memory that the process keeps counts as taken
LASTING = "/var/tmp"  # for what is larger than memory, by the rules of Linux systems
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size_in_bytes(text: str | int | None) -> int | None:
    """A size as --memory takes it; bytes, and None for no limit, stay as they are.

    >>> size_in_bytes("8G"), size_in_bytes("500 MiB")
    (8589934592, 524288000)
    """
    if not isinstance(text, str):
        return text
    number, unit = text.upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in UNITS:
        number, unit = number[:-1], number[-1]
    try:
        size = float(number) * UNITS[unit]
    except ValueError:
        size = 0
    if not 0 < size < math.inf:
        raise UsageError(f"--memory '{text}' is not a size such as 8G or 500M.")
    if not unit and size < UNITS["M"]:
        raise UsageError(f"--memory '{text}' has no unit; did you mean {text}G?")
    return int(size)


def free_memory() -> int:
    """Bytes of main memory that are free, to the machine and to the container or batch job that this is in."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def on_gpu() -> bool:
    """Whether networks compute on a GPU here, so that what is planned with is its memory."""
    import torch

    return torch.cuda.is_available()


def memory_at_hand() -> int:
    """Bytes that are free: of the GPU where there is one, else of the main memory."""
    import torch

    return torch.cuda.mem_get_info()[0] if on_gpu() else free_memory()


def for_data(planned: int | None) -> int | None:
    """Bytes of main memory for data: what was planned with, or where that is a GPU's memory, what is free here."""
    return free_memory() if planned and on_gpu() else planned


def taken(key: str = "VmRSS") -> int:
    """Bytes that this process takes, by an entry of Linux's /proc/self/status or what other systems have instead.

    Args:
        key: VmRSS, resident now; VmHWM, resident at most so far.
    """
    found = _entry("/proc/self/status", key)  # not ru_maxrss, which a child takes over from what starts it
    if found is not None:
        return found
    now = psutil.Process().memory_info()
    if key == "VmRSS":
        return now.rss
    if sys.platform == "win32":
        return now.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fits(size: int, memory: int | None = None) -> bool:
    """Whether so many bytes more leave enough room.

    Args:
        memory: bytes that this process may take in all; default what the machine has left.
    """
    return _fits(size, memory) or (give_back() and _fits(size, memory))


def _fits(size: int, memory: int | None) -> bool:
    if memory is None:
        return size <= FITS * free_memory()
    return size <= max(FITS * (memory - taken()), LITTLE * memory)


def spill_folder() -> str:
    """Folder for what does not fit into memory: the system's temporary one, or where that lies in memory /var/tmp.

    A folder that TMPDIR names is taken as it is.
    """
    folder = tempfile.gettempdir()
    if "TMPDIR" in os.environ or not _in_memory(folder):
        return folder
    return LASTING if os.access(LASTING, os.W_OK) and not _in_memory(LASTING) else folder


def _in_memory(folder: str) -> bool:
    """Whether a folder lies on a tmpfs, as /tmp does on some systems."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    path = Path(folder).resolve()
    around = [(len(place), kind) for place, kind in mounts if path.is_relative_to(place)]
    return bool(around) and max(around)[1] in ("tmpfs", "ramfs")


def settle(memory: int | None) -> None:
    """Return freed memory to the system where this process nears what it may take in all (bytes; None: no limit)."""
    if memory and taken() > NEAR * memory:
        give_back()


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
