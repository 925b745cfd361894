"""Where a training computes, and in what precision."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from kanseg.config import TrainingConfig
from kanseg.errors import UsageError


def make_accelerator(options: TrainingConfig) -> Accelerator:
    """The GPU where there is one, else the CPU; mixed precision (bf16) on CUDA only."""
    cuda = options.device == "auto" and torch.cuda.is_available()
    if options.precision == "bf16" and not cuda:
        raise UsageError("training.precision=bf16 needs a CUDA device; leave it at auto.")
    bf16 = cuda and options.precision != "float32" and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=options.device == "cpu", mixed_precision="bf16" if bf16 else "no")
