"""What a training was: versions, seed, code, data, hardware; at its end also time, memory and energy."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from kanseg import __version__
from kanseg.cgroups import cores_allowed
from kanseg.data.cases import Case, files_of
from kanseg.data.digests import file_digest
from kanseg.files import read_json, write_json
from kanseg.progress import processes

MANIFEST = "manifest.json"
PACKAGES = ("torch", "monai", "accelerate", "numpy", "nibabel", "SimpleITK", "albumentations", "safetensors")
RAPL = Path("/sys/class/powercap")


class Manifest:
    """The manifest.json of a folder, kept over resumes: sessions add up.

    Args:
        data: what `digests` gave.
        facts: what else to tell: seed, fold, config.
    """

    def __init__(self, path: Path, data: Mapping[str, Any], device: torch.device, **facts: Any) -> None:
        self.path, self.device = path, device
        earlier = read_json(path) or {}
        self.values = {**facts, "command": sys.argv, **environment(device), "data": data}
        self.sessions: list[dict[str, Any]] = [*earlier.get("sessions", []), {"began": _now()}]
        self.energy = Energy(device)
        self.write()

    def write(self, **result: Any) -> None:
        """Bring the file up to date; `result` is what the session has to tell at this moment."""
        self.sessions[-1] |= {"until": _now(), **self.energy.used(), **result}
        known = [session["energy_joules"] for session in self.sessions if session.get("energy_joules")]
        total = {"energy_joules": sum(known) if known else None}
        write_json(self.path, {**self.values, **total, "sessions": self.sessions})


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, revision of the code and hardware."""
    versions = {"kanseg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    hardware: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": cores_allowed(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes(),
    }
    return {"versions": versions, "git": git_revision(), "hardware": hardware}


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout that kanseg runs from, and whether files differ from it; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return None if commit is None else {"commit": commit, "changed": bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()
    return None


def digests(cases: Iterable[Case], seen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """SHA-256 of the files of each case together, and of all cases.

    Args:
        seen: fingerprint of the run, whose digests need not be made again.
    """
    known = {
        name: [file["sha256"] for file in case["files"].values()]
        for name, case in (seen or {"cases": {}})["cases"].items()
    }
    by_case = {case.id: _joined(known.get(case.id) or map(file_digest, files_of(case))) for case in cases}
    return {"sha256": _joined(by_case.values()), "cases": by_case}


def _joined(found: Iterable[str]) -> str:
    return hashlib.sha256("".join(found).encode()).hexdigest()


class Energy:
    """Energy since it was made, where the machine tells it: the CPU packages (RAPL) and the GPU (NVML)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ranges = {
            path: _number(path / "max_energy_range_uj") for path in sorted(RAPL.glob("intel-rapl:?"))
        }
        self.packages = {path: _number(path / "energy_uj") for path in self.ranges}
        self.joules = dict.fromkeys(self.packages, 0.0)
        self.gpu = _gpu_millijoules(device)

    def used(self) -> dict[str, Any]:
        """{"energy_joules": the sum, or None where nothing is told, "energy_source"}."""
        sources = []
        for path, before in self.packages.items():
            now = _number(path / "energy_uj")
            if now is not None and before is not None:
                self.joules[path] += (
                    (now - before) % (self.ranges[path] or 2**63)
                ) / 1e6  # the counter wraps
                self.packages[path] = now
                sources.append("RAPL")
        total = sum(self.joules.values())
        now_gpu = _gpu_millijoules(self.device)
        if self.gpu is not None and now_gpu is not None:
            total += (now_gpu - self.gpu) / 1e3
            sources.append("NVML")
        return {"energy_joules": round(total, 1) if sources else None, "energy_source": sorted(set(sources))}


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # most systems let only root read it
        return int(path.read_text())
    return None


def _gpu_millijoules(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    with suppress(Exception):  # pynvml is not installed, or the card does not count
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
