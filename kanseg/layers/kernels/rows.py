"""Views of tensors as rows: (N, C, *S) in channels-last memory is (N, voxels, C)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels.operators import transformed

ROW_BLOCK = 1 << 18  # numbers worked on at a time, a megabyte of float32: steps meet in the cache
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """(N, C, *S) in channels-last memory, copied where it is not; one axis as the picture of height one that it is."""
    if x.dim() == 3:
        return channels_last(x.unsqueeze(2)).squeeze(2)
    y = x.contiguous(memory_format=FORMATS[x.dim()])
    return y if y is x else with_contiguous_gradient(y)


def with_contiguous_gradient(y: Tensor) -> Tensor:
    """y, whose gradient goes on in contiguous memory where there is a single sample on a CPU.

    There torch 2.14 misreads that of its instance and batch norms in channels-last memory (2D and 3D): wrong numbers,
    no error.
    """
    if y.requires_grad and of_one_sample(y):
        y.register_hook(_laid_anew)
    return y


def of_one_sample(x: Tensor) -> bool:
    """Whether it is a single sample on a CPU, outside of compilers and `torch.func`."""
    return _eager_on_cpu(x) and len(x) == 1  # in this order: a compiler may know no number of samples


def with_gradient_as_rows(y: Tensor) -> Tensor:
    """y, whose gradient goes on in channels-last memory on a CPU.

    That of a part of joined maps lies in the larger one, which costs torch's interpolation four times the copy.
    """
    if y.requires_grad and _eager_on_cpu(y):
        y.register_hook(partial(_laid_anew, memory_format=FORMATS[y.dim()]))
    return y


def _laid_anew(grad: Tensor | None, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """The gradient in that memory; there is none where nothing depends on it (in second derivatives)."""
    return None if grad is None else grad.contiguous(memory_format=memory_format)


def _eager_on_cpu(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not transformed() and x.device.type == "cpu"


def laid_out(x: Tensor) -> Tensor:
    """(N, C, *S) in channels-last memory; without gradients on a CPU as it is, and what works on a part copies that."""
    whole = (
        torch.is_grad_enabled() or x.device.type != "cpu" or torch.jit.is_tracing()
    )  # which checks without them
    return channels_last(x) if whole else x


def is_channels_last(x: Tensor) -> bool:
    """Whether `channels_last` is there for such a tensor and need not copy it."""
    return x.dim() in FORMATS and x.is_contiguous(memory_format=FORMATS[x.dim()])


def empty_channels_last(size: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, *S) in channels-last memory."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=FORMATS[len(size)])


def as_rows(x: Tensor) -> Tensor:
    """(N, C, *S) in channels-last memory -> (N, voxels, C), the same memory."""
    return x.movedim(1, -1).flatten(1, -2)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of kernel 1, (N, C, *S) -> (N, out_channels, *S), both in channels-last memory, as one product of
    matrices. In 3D on a CPU torch's own goes through channels-first memory, for two to three times the time; in
    2D it takes up to a half more where channels are few.
    """
    rows, matrix = as_rows(x).flatten(0, 1), weight.flatten(1).T
    multiply = torch.mm if bias is None else partial(torch.addmm, bias)
    if torch.is_grad_enabled():
        return multiply(rows, matrix).view(len(x), *x.shape[2:], len(weight)).movedim(-1, 1)
    # No view: a Function's result that is one may not be changed in place.
    out = empty_channels_last((len(x), len(weight), *x.shape[2:]), x)
    multiply(rows, matrix, out=as_rows(out).flatten(0, 1))
    return out


def blocks(count: int, width: int) -> Iterator[slice]:
    """Cut `count` rows of `width` numbers into blocks of about ROW_BLOCK numbers."""
    step = max(1, ROW_BLOCK // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def channel_like(rows: Tensor, given: Tensor | None) -> Tensor:
    """An uninitialised number a channel, for a gradient: as `given`, or without that as (..., C)."""
    return rows.new_empty(rows.shape[-1]) if given is None else torch.empty_like(given)
