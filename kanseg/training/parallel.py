"""Several processes: what they share, gather and split. With one process each function gives back what it got."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from kanseg.errors import UsageError, UserError
from kanseg.progress import RENDEZVOUS, processes
from kanseg.training.stop import LAUNCHED, sigterm_by

T = TypeVar("T")
# Variables by which accelerate would wait for processes that no launcher of kanseg's started, as in a step of Slurm's.
OTHER_LAUNCHERS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PATIENCE = timedelta(hours=12)  # of processes that wait for what one does alone


def launched() -> int:
    """How many processes were started together; what is left of other launchers is forgotten.

    Raises:
        UsageError: the environment tells of several, and not how they meet.
    """
    count = processes()
    if count == 1 and (told := os.environ.get("WORLD_SIZE") or "1") != "1":
        missing = ", ".join(name for name in RENDEZVOUS if not os.environ.get(name))
        raise UsageError(
            f"WORLD_SIZE={told} in the environment says that {told} processes train together, and without {missing} "
            "they do not meet. Start them by torchrun, or unset WORLD_SIZE to train with one process."
        )
    if count == 1 and LAUNCHED not in os.environ:
        for name in OTHER_LAUNCHERS:
            os.environ.pop(name, None)
    return count


def once(step: Callable[[], T]) -> T:
    """Result of a step that the main process alone takes, on every process; so is its `UserError`."""
    if launched() == 1:
        return step()
    if LAUNCHED not in os.environ and not dist.is_initialized():
        # On standard error of each of them, for the first one may never come.
        place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        print(
            f"Waiting for {processes()} processes to meet at {place}, as WORLD_SIZE says. Unset it to train with one.",
            file=sys.stderr,
            flush=True,
        )
    with sigterm_by(signal.SIG_DFL):  # Python hears of no signal there, and there is nothing to save
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    told: list[Any] = [None, None]
    if state.is_main_process:
        try:
            told = [step(), None]
        except UserError as error:
            told = [None, error]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def leave() -> None:
    """The end of a command that went well: wait for each other, then end the threads that connect the processes.

    A process that ended with them running would now and then be aborted, and the launcher would stop the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def shard(model: nn.Module, accelerator: Accelerator) -> bool:
    """Split weights, gradients and optimizer state over the CPU processes of `accelerate launch --use_fsdp --cpu`.

    On GPUs accelerate does that itself (`Accelerator.prepare`); its older FSDP 1 is refused.

    Returns:
        Whether the model is split now, and accelerate must leave it alone.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("FSDP 1 cannot be used. Add to accelerate launch: --fsdp_version 2")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
    return True


def full(tensor: Tensor) -> Tensor:
    """A whole tensor on every process, of one that is split over them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, split as `reference` is (the inverse of `full`)."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)


def whole_batch(output: T, accelerator: Accelerator) -> T:
    """Outputs or targets (a tensor, a list or a dictionary) of all processes, joined along the batch.

    The gradient goes back to each process. A Dice of the whole batch is not the mean of the processes' own, so each
    computes the loss of all.
    """
    if accelerator.num_processes == 1:
        return output
    if isinstance(output, dict):
        return {key: whole_batch(part, accelerator) for key, part in output.items()}  # type: ignore[return-value]
    if isinstance(output, list | tuple):
        return type(output)(whole_batch(part, accelerator) for part in output)  # type: ignore[return-value]
    return _Joined.apply(output)


class _Joined(torch.autograd.Function):
    """A tensor of every process, one after the other; the gradient of a part is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [
            torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(pairs: list[tuple[int, Any]], accelerator: Accelerator) -> list[Any]:
    """What each process computed under an index, in the order of the indices, on every process."""
    found = pairs
    if accelerator.num_processes > 1:
        parts: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(parts, pairs)
        found = [pair for part in parts for pair in part]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]
