"""Convolutions of kernel 3 and stride 1 from fewer products (arXiv 1509.09308), by the compiled kernels.

F(4, 3) along rows and columns, F(2, 3) along depth. What is convolved may be an expansion: the kernels make some planes
of it at a time, in the cache, and lead its gradient back tile by tile, so that it never lies in memory. A number of the
output does not depend on how that is cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels import native
from kanseg.layers.kernels.native import Expansion, Learned, Part, pointer

LEAST_VOXELS = 2048  # of an output; below, the transforms of the weight cost more than they save
FORWARD, BACK, WEIGHT = range(3)


class Volume(ctypes.Structure):
    """`Volume` of winograd.h."""

    _fields_ = tuple(
        (name, c_int)
        for name in (
            *("samples", "depth", "height", "width", "in", "out"),
            *("out_depth", "out_height", "out_width", "pad_depth", "pad_height", "pad_width"),
        )
    )


class _Source(ctypes.Structure):
    """`Source` of winograd.h."""

    _fields_ = (
        ("part", POINTER(Expansion) * 2),
        ("input", c_void_p * 2),
        ("gradient", c_void_p * 2),
        *((name, c_void_p) for name in ("inner", "phases", "phases_total")),
    )


class _Kernel(ctypes.Structure):
    """`Kernel` of winograd.h."""

    _fields_ = (("at", c_void_p), ("of_out", c_longlong), ("of_in", c_longlong), ("flipped", c_int))

    @classmethod
    def of(cls, weight: Tensor, turned: bool = False) -> _Kernel:
        """A contiguous weight (out, in, *kernel), or turned that of the convolution which leads a gradient back."""
        outs, ins = weight.stride()[:2]
        return cls(weight.data_ptr(), ins, outs, 1) if turned else cls(weight.data_ptr(), outs, ins, 0)


class _Border(ctypes.Structure):
    """`Border` of winograd.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("depth", "row", "column", "table")),
        ("rows", c_int),
        ("columns", c_int),
    )


@dataclass
class Border:
    """Numbers added to an output that depend on its distance to the border.

    Attributes:
        classes: (outputs,) int32 an axis: the class of each position.
        table: (classes, ..., out_channels), an axis of classes for each of space.
    """

    classes: list[Tensor]
    table: Tensor

    def described(self) -> _Border:
        """As the kernels read it; it points to memory of this object."""
        axes = [torch.zeros(1, dtype=torch.int32), *self.classes][-3:]
        self.classes = axes  # kept
        return _Border(*(axis.data_ptr() for axis in axes), self.table.data_ptr(), *self.table.shape[-3:-1])


def serves(x: Tensor, weight: Tensor, geometry: Any) -> bool:
    """Whether the kernels make this convolution."""
    voxels = len(x) * torch.Size(geometry.out_size(x.shape[2:])).numel()
    return (
        native.serves(x, weight)
        and geometry.dense()
        and voxels >= LEAST_VOXELS
    )


def convolve(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    weight: Tensor,
    border: Border | None,
    out: Tensor,
    padding: Sequence[int],
) -> None:
    """out = convolution of what the parts make of the inputs (None: of the input), plus the border's numbers.

    All channels-last; weight (out, in, *kernel).
    """
    weight = weight.contiguous()
    call = _Call(inputs[0], out, padding, weight.shape[1], FORWARD, parts)
    added = None if border is None else byref(border.described())
    call.run("winograd", _source(inputs, parts), _Kernel.of(weight), added, out.data_ptr())


def convolve_back(
    inputs: Sequence[Tensor],
    parts: Sequence[Part],
    weight: Tensor,
    grad: Tensor,
    totals: Sequence[Tensor | None],
    learned: Sequence[Tensor | None],
    padding: Sequence[int],
) -> None:
    """Add to `totals` (as `inputs`) and `learned` what the gradient of the output gives."""
    weight, pads = weight.contiguous(), [2 - pad for pad in padding]
    call = _Call(grad, inputs[0], pads, len(weight), BACK, parts, out=weight.shape[1])
    sums = Learned(parts[-1], call.threads, learned)
    source = _source(inputs, parts, totals, sums)
    call.run("winograd_back", source, _Kernel.of(weight, turned=True), grad.data_ptr())
    sums.add()


def convolve_weight(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    weight: Tensor,
    grad: Tensor,
    padding: Sequence[int],
) -> Tensor:
    """Gradient at the weight (out, in, *kernel), from the gradient of the output."""
    call = _Call(inputs[0], grad, padding, weight.shape[1], WEIGHT, parts)
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    call.run("winograd_weight", _source(inputs, parts), _Kernel.of(of_weight), grad.data_ptr())
    return of_weight


def convolve_input(weight: Tensor, grad: Tensor, into: Tensor, padding: Sequence[int]) -> None:
    """into = gradient at the input of a plain convolution, from the gradient of the output."""
    weight = weight.contiguous()
    call = _Call(grad, into, [2 - pad for pad in padding], len(weight), FORWARD, None)
    call.run("winograd", _source([grad], None), _Kernel.of(weight, turned=True), None, into.data_ptr())


def _source(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    totals: Sequence[Tensor | None] = (),
    sums: Learned | None = None,
) -> _Source:
    source = _Source()
    if parts is None:
        source.input[0] = inputs[0].data_ptr()
    for number, part in enumerate(parts or ()):
        source.part[number] = ctypes.pointer(part.expansion)
        source.input[number] = inputs[part.source].data_ptr()
        source.gradient[number] = pointer(totals[part.source]) if totals else None
    if sums is not None:
        source.inner, source.phases, source.phases_total = sums.pointers()
    return source


class _Call:
    """Sizes and memory of one call."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        padding: Sequence[int],
        channels: int,
        job: int,
        parts: Sequence[Part] | None,
        out: int = 0,
    ) -> None:
        self.deep = x.dim() - 4
        flat = [1] * (1 - self.deep)
        size, out_size = [*flat, *x.shape[2:]], [*flat, *y.shape[2:]]
        pads = [*([0] * (1 - self.deep)), *padding]
        self.volume = Volume(len(x), *size, channels, out or y.shape[1], *out_size, *pads)
        self.threads = native.threads_for(y.numel())
        self.branches = parts[0].expansion.branches if parts else 0
        self.about = (byref(self.volume), self.deep, self.branches)
        floats = native.library().winograd_scratch(*self.about, self.threads, job)
        self.scratch = torch.empty(floats)

    def run(self, function: str, source: _Source, kernel: _Kernel, *others: Any) -> None:
        given = (*self.about, byref(source), byref(kernel), *others)
        getattr(native.library(), function)(*given, self.scratch.data_ptr(), self.threads)
