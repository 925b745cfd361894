"""Where a training computes, and in what precision."""

from __future__ import annotations

import ctypes
import sys

import torch
from accelerate import Accelerator

from kanseg.config import TrainingConfig
from kanseg.errors import UsageError


def make_accelerator(options: TrainingConfig) -> Accelerator:
    """The GPU where there is one, else the CPU; mixed precision (bf16) on CUDA only."""
    cuda = options.device == "auto" and torch.cuda.is_available()
    if options.precision == "bf16" and not cuda:
        raise UsageError("training.precision=bf16 needs a CUDA device; leave it at auto.")
    if not cuda:
        keep_freed_memory()
    bf16 = cuda and options.precision != "float32" and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=options.device == "cpu", mixed_precision="bf16" if bf16 else "no")


def keep_freed_memory() -> None:
    """Let glibc give freed memory to the next tensor instead of returning it to the system after each step.

    Fresh pages cost more than most pointwise steps: 10 to 30 % of a training step on a CPU. Elsewhere nothing happens.
    """
    mmap_max, trim_threshold = -4, -1  # parameters of mallopt(3)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, -1)
