"""Limits of containers, batch jobs and services: what control groups leave counts as the machine's memory and cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kanseg import cgroups, memory

GIB = 2**30
NO_LIMIT = 9223372036854771712  # what version 1 writes for it
TREES = {
    "version 2, a container": ("0::/\n", {"memory.max": 4 * GIB, "memory.current": GIB, "cpu.max": "150000 100000"}),
    "version 2, a service below one with less": (
        "0::/batch.slice/job_1\n",
        {
            "batch.slice/memory.max": 5 * GIB,
            "batch.slice/memory.current": 2 * GIB,
            "batch.slice/cpu.max": "max 100000",
            "batch.slice/job_1/memory.max": 16 * GIB,
            "batch.slice/job_1/memory.current": GIB,
            "batch.slice/job_1/cpu.max": "300000 200000",
        },
    ),
    "version 1, a container that is told its place on the host": (
        "12:memory:/docker/4f2a\n11:cpu,cpuacct:/docker/4f2a\n0::/docker/4f2a\n",
        {
            "memory/memory.limit_in_bytes": 4 * GIB,
            "memory/memory.usage_in_bytes": GIB,
            "cpu/cpu.cfs_quota_us": 150000,
            "cpu/cpu.cfs_period_us": 100000,
        },
    ),
    "version 1, a batch job": (
        "4:memory:/slurm/job_7\n3:cpuacct,cpu:/slurm/job_7\n",
        {
            "memory/memory.limit_in_bytes": NO_LIMIT,
            "memory/memory.usage_in_bytes": 9 * GIB,
            "memory/slurm/job_7/memory.limit_in_bytes": 3 * GIB + GIB // 2,
            "memory/slurm/job_7/memory.usage_in_bytes": GIB,
            "memory/slurm/job_7/memory.stat": f"cache 7\ninactive_file 3\ntotal_inactive_file {GIB // 2}",
            "cpu/slurm/job_7/cpu.cfs_quota_us": 150000,
            "cpu/slurm/job_7/cpu.cfs_period_us": 100000,
        },
    ),
}  # fmt: skip
FREE = {
    "version 2": ("0::/\n", {"memory.max": "max", "memory.current": GIB, "cpu.max": "max 100000"}),
    "version 1": (
        "4:memory:/\n3:cpu:/\n",
        {"memory/memory.usage_in_bytes": GIB, "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000},
    ),
    "neither": ("", {}),
}


@pytest.fixture
def grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def grown(tree: tuple[str, dict[str, object]]) -> None:
        own, files = tree
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(cgroups, "GROUPS", tmp_path / "groups")
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")

    return grown


@pytest.mark.parametrize("kind", TREES)
def test_the_least_that_a_group_leaves_counts(kind: str, grow, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(TREES[kind])
    assert cgroups.memory_left() == 3 * GIB
    assert cgroups.cores_allowed() == 1.5
    assert memory.free_memory() <= 3 * GIB
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cgroups.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cgroups.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7", "the user's number stays"


@pytest.mark.parametrize("kind", FREE)
def test_without_limits_the_machine_counts(kind: str, grow, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(FREE[kind])
    assert cgroups.memory_left() is None
    assert cgroups.cores_allowed() is None
    assert memory.free_memory() > 0
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cgroups.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_group_that_is_full_leaves_nothing(grow) -> None:
    grow(("0::/\n", {"memory.max": GIB, "memory.current": GIB + 5}))
    assert cgroups.memory_left() == 0


def test_a_real_group_is_seen_by_a_process_in_it() -> None:
    group, limit = make_group()
    try:
        (group / limit).write_text(str(GIB))
        code = (
            "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from kanseg.memory import free_memory; print(free_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code, group], capture_output=True, text=True, check=True)
        assert 0.7 * GIB < int(done.stdout) < GIB
    finally:
        group.rmdir()


def make_group() -> tuple[Path, str]:
    """A group of our own, and the file of its limit."""
    name = f"kanseg_test_{os.getpid()}"
    for top, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = cgroups.GROUPS / top / name
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            return group, limit
        group.rmdir()
    pytest.skip("this process may not make control groups with a limit of memory")
