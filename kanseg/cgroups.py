"""What Linux's control groups leave to this process: the limits of containers, batch jobs and services.

Files and their meaning: cgroups(7), and "Control Group v2" and "Memory Resource Controller" of the kernel's manual.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Bytes that may still be taken, None without a limit. What the system keeps of files counts as free."""
    left = []
    for group in _groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0] != "max":
            left.append(max(0, int(limit[0]) - int(used[0]) + _of_files(group)))
    return min(left, default=None)


def cores_allowed() -> float | None:
    """Processor time for each second, in cores, None without a limit."""
    allowed = []
    for group in _groups("cpu"):
        parts = _words(group / "cpu.max") or [
            *_words(group / "cpu.cfs_quota_us"),
            *_words(group / "cpu.cfs_period_us"),
        ]
        if len(parts) == 2 and parts[0] not in ("max", "-1"):
            allowed.append(int(parts[0]) / int(parts[1]))
    return min(allowed, default=None)


def limit_threads() -> None:
    """No more threads than cores are allowed, before torch is imported; a number that the user has set stays.

    torch starts one for each core of the machine, and those of a container with few would wait for each other.
    """
    cores = cores_allowed()
    if cores and cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(cores))))


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups around this process, in both versions; a container sees its own at the top."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = GROUPS / controller if controllers else GROUPS
        parts = [part for part in place.split("/") if part not in ("", "..")]
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _of_files(group: Path) -> int:
    """Bytes of files that nobody has read lately."""
    words = _words(group / "memory.stat")
    found = dict(zip(words[::2], words[1::2], strict=False))
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
