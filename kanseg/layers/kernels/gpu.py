"""Whether the Triton kernels serve, and how they are launched.

They are for CUDA (and ROCm) tensors of float32, bfloat16 and float16 where Triton can be imported; elsewhere torch's
own operations give the same numbers. `KANSEG_TRITON=0` in the environment switches them off. In Triton's interpreter
(`TRITON_INTERPRET=1`) they run, slowly, on tensors in the memory of the CPU, which is how they are tested.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: bfloat16 and asynchronous copies
MULTIPLE = 4  # programs a multiprocessor, for kernels whose programs take turns over the rows


@functools.cache
def available() -> str | None:
    """Version of the Triton that would serve; None without."""
    if os.environ.get("KANSEG_TRITON") == "0":
        return None
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception:  # what a broken installation raises at import is any error
        return None


def described() -> str:
    """For people: which Triton, and whether there is a GPU for it."""
    version = available()
    if version is None:
        return "none (Triton is not installed, or KANSEG_TRITON=0)"
    capable = torch.cuda.is_available() and _capable(torch.device("cuda", torch.cuda.current_device()))
    return version if capable else f"{version}, but no GPU that they are for"


def serves(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can work on these."""
    return all(t.dtype in DTYPES and _capable(t.device) for t in tensors) and available() is not None


@functools.cache
def _capable(device: torch.device) -> bool:
    if device.type == "cpu":
        return INTERPRETED
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def kernels(name: str) -> ModuleType:
    """A module of kernels, imported when it is needed."""
    return importlib.import_module(f"kanseg.layers.kernels.triton_{name}")


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, registers: int | None = None, **constants: Any
) -> None:
    """Run `kernel` on `grid` programs, on the device of the tensors.

    Args:
        registers: a thread may have so many. Without, NVIDIA's assembler may choose a few less than are needed, so that
            more threads run at a time, and keep a number or two in memory.
    """
    if 0 in grid:
        return
    if registers is not None and not torch.version.hip:
        constants["maxnreg"] = registers
    with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **constants)


def turns(blocks: int, columns: int, device: torch.device) -> int:
    """How many programs share `blocks` of rows, where `columns` such sets run beside each other."""
    return max(1, min(blocks, MULTIPLE * _multiprocessors(device) // columns))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def ceiling(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def tile(channels: int, numbers: int, least: int = 1, most: int = 64) -> tuple[int, int]:
    """Rows and columns of a block of about `numbers` numbers; powers of two."""
    columns = min(most, max(least, 1 << (channels - 1).bit_length()))
    return max(16, numbers // columns), columns
