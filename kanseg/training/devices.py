"""Where a training computes, in what precision, and what it keeps in memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kanseg.config import TrainingConfig
from kanseg.errors import UsageError
from kanseg.training.parallel import launched


def make_accelerator(options: TrainingConfig) -> Accelerator:
    """The GPU where there is one, else the CPU; mixed precision (bf16, else fp16) on CUDA only."""
    launched()
    cuda = options.device == "auto" and torch.cuda.is_available()
    if options.precision in ("bf16", "fp16") and not cuda:
        raise UsageError(f"training.precision={options.precision} needs a CUDA device; leave it at auto.")
    if cuda:
        torch.backends.cudnn.benchmark = True  # patches have one size
    else:
        keep_freed_memory()
    best = "bf16" if cuda and torch.cuda.is_bf16_supported() else "no"
    precision = {"auto": best, "float32": "no"}.get(options.precision, options.precision)
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision)
    if options.cuda_graph and not may_record(options, accelerator):
        raise UsageError(
            "training.cuda_graph=true is for one process on a CUDA device, with compile=false and accumulate=1."
        )
    return accelerator


def may_record(options: TrainingConfig, accelerator: Accelerator) -> bool:
    """Whether `record_passes` is for such a training."""
    alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return alone and options.accumulate == 1 and not options.compile


def record_passes(network: nn.Module, image: Tensor) -> None:
    """Record a network's forward and backward pass in training on a GPU, and replay them from now on.

    A replay is one launch instead of some hundreds, which take longer than the work itself where patches are small.
    Every later image must have the shape of `image`; weights may change in place only. Evaluation stays as it is.
    """
    if any(hasattr(module, "balance_loss") for module in network.modules()):
        raise UsageError("training.cuda_graph=true does not work with mixtures of experts.")
    kept = [buffer.clone() for buffer in network.buffers()]  # the passes before the recording change them
    try:
        torch.cuda.make_graphed_callables(network, (image.clone(),), allow_unused_input=True)
    except RuntimeError as error:
        words = f"This network cannot be recorded ({str(error).splitlines()[0]})."
        raise UsageError(f"{words} Train with training.cuda_graph=false.") from error
    for buffer, value in zip(network.buffers(), kept, strict=True):
        buffer.copy_(value)


def checkpoint_stages(model: nn.Module) -> None:
    """Let each stage keep its input alone and compute the rest again in the backward pass.

    Stages are the elements of the outermost lists of modules; their names and weights stay as they are.
    """
    for stage in _stages(model):
        stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)  # type: ignore[method-assign]


def _stages(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.Sequential):
            yield from _stages(child)
            continue
        yield from (stage for stage in child if next(stage.children(), None) is not None)


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
