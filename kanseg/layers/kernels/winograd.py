"""Convolutions of kernel 3 and stride 1 from fewer products (arXiv 1509.09308), by the compiled kernels.

F(4, 3) along rows and columns, F(2, 3) along depth. What is convolved may be an expansion: the kernels make some planes
of it at a time, in the cache, and lead its gradient back tile by tile, so that it never lies in memory. A number of the
output does not depend on how that is cut.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels import native
from kanseg.layers.kernels.native import Expansion, Learned, Part, pointer

LEAST_VOXELS = 2048  # of an output; below, the transforms of the weight cost more than they save
FORWARD, BACK, WEIGHT = range(3)
FOUR = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
SIX = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
    )
    / 24
)


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
        and not any(n % 16 for n in weight.shape[:2])
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
    call = _Call(inputs[0], out, padding, weight.shape[1], FORWARD, parts is not None)
    source, kernel = _source(inputs, parts), transformed(weight)
    added = None if border is None else byref(border.described())
    call.run("winograd", source, kernel.data_ptr(), added, out.data_ptr())


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
    first = inputs[0]
    call = _Call(grad, first, [2 - pad for pad in padding], len(weight), BACK, True, out=weight.shape[1])
    sums = Learned(parts[-1], call.threads, learned)
    source, kernel = _source(inputs, parts, totals, sums), transformed(_turned(weight))
    call.run("winograd_back", source, kernel.data_ptr(), grad.data_ptr())
    sums.add()


def convolve_weight(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    weight: Tensor,
    grad: Tensor,
    padding: Sequence[int],
) -> Tensor:
    """Gradient at the weight (out, in, *kernel), from the gradient of the output."""
    dims = weight.dim() - 2
    call = _Call(inputs[0], grad, padding, weight.shape[1], WEIGHT, parts is not None)
    sums = torch.zeros(call.threads, len(_filter(dims)), weight.shape[1], len(weight))
    call.run("winograd_weight", _source(inputs, parts), grad.data_ptr(), sums.data_ptr())
    total = sums[0] if call.threads == 1 else sums.sum(0)
    by_tap = torch.mm(_filter(dims).t(), total.flatten(1)).unflatten(1, total.shape[1:])
    return by_tap.unflatten(0, (3,) * dims).movedim((-1, -2), (0, 1))


def convolve_input(weight: Tensor, grad: Tensor, into: Tensor, padding: Sequence[int]) -> None:
    """into = gradient at the input of a plain convolution, from the gradient of the output."""
    convolve([grad], None, _turned(weight), None, into, [2 - pad for pad in padding])


@functools.cache
def _filter(spatial_dims: int) -> Tensor:
    """(positions, taps) float32."""
    plane = torch.kron(SIX, SIX)
    return (plane if spatial_dims == 2 else torch.kron(FOUR, plane)).float()


def transformed(weight: Tensor) -> Tensor:
    """A weight (out, in, *kernel) as the kernels take it, (positions, in, out)."""
    dims = weight.dim() - 2
    by_tap = weight.permute(*range(2, dims + 2), 1, 0).flatten(0, dims - 1)
    return torch.mm(_filter(dims), by_tap.flatten(1)).unflatten(1, by_tap.shape[1:])


def _turned(weight: Tensor) -> Tensor:
    """The weight of the convolution that leads a gradient back."""
    return weight.transpose(0, 1).flip([axis + 2 for axis in range(weight.dim() - 2)])


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
        expanded: bool,
        out: int = 0,
    ) -> None:
        self.deep = x.dim() - 4
        flat = [1] * (1 - self.deep)
        size, out_size = [*flat, *x.shape[2:]], [*flat, *y.shape[2:]]
        pads = [*([0] * (1 - self.deep)), *padding]
        self.volume = Volume(len(x), *size, channels, out or y.shape[1], *out_size, *pads)
        self.threads = native.threads_for(y.numel())
        self.each = native.library().winograd_scratch(
            byref(self.volume), self.deep, expanded, self.threads, job
        )
        self.scratch = torch.empty(self.threads, self.each)

    def run(self, function: str, source: _Source, *about: Any) -> None:
        given = (byref(self.volume), self.deep, byref(source), *about)
        getattr(native.library(), function)(*given, self.scratch.data_ptr(), self.each, self.threads)
