"""Convolutions of kernel 3 and stride 1 from fewer products (arXiv 1509.09308), by the compiled kernels.

F(4, 3) along rows and columns, F(2, 3) along depth. What is convolved may be an expansion: the kernels make some planes
of it at a time, in the cache, and lead its gradient back tile by tile, so that it never lies in memory. A number of the
output does not depend on how that is cut. All numbers of a tile of 6 x 6 (4 deep) are rounded alike: beside one that is
a thousand times larger they lose three digits, and beside one that is not finite they are none.
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
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.native import Expansion, Learned, Part, pointer
from kanseg.layers.kernels.operators import asked

LEAST_VOXELS = 256  # of an output; below, the transforms of the weight cost more than they save
LEAST_STRIDED = 1024  # of one with strides; below, oneDNN does better
FORWARD, BACK, WEIGHT = range(3)
MOST_TAPS, MOST_ROOM = 27, 256  # of direct.h


class Volume(ctypes.Structure):
    """`Volume` of winograd.h."""

    _fields_ = (
        *(
            (name, c_int)
            for name in (
                *("samples", "depth", "height", "width", "in", "out"),
                *("out_depth", "out_height", "out_width", "pad_depth", "pad_height", "pad_width"),
            )
        ),
        ("kernel", c_int * 3),
        ("stride", c_int * 3),
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

    def of(self, planes: slice) -> Border:
        """That of some planes of the output, along the first spatial axis."""
        return Border([self.classes[0][planes], *self.classes[1:]], self.table)

    def described(self) -> _Border:
        """As the kernels read it; it points to memory of this object."""
        axes = [native.zeros(1, dtype=torch.int32), *self.classes][-3:]
        self.classes = axes  # kept
        return _Border(*(axis.data_ptr() for axis in axes), self.table.data_ptr(), *self.table.shape[-3:-1])


def serves(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels make this convolution."""
    voxels = torch.Size(geometry.out_size(x.shape[2:])).numel()  # of a sample, whatever its batch
    if asked.direct or not native.serves(x, weight) or geometry.groups > 1:
        return False
    if geometry.dense():
        return voxels >= LEAST_VOXELS
    return voxels >= LEAST_STRIDED and _steps(x, weight, geometry)


def _steps(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether direct.h makes it."""
    outs, ins = weight.shape[:2]
    branches = ins // x.shape[1]
    together = ins if x.shape[1] % 16 else 16 * branches  # floats that no slice can part
    few = max(together, outs) <= MOST_ROOM and not outs % 16
    small = weight[0, 0].numel() <= MOST_TAPS and max(geometry.padding) <= 2
    return few and small and max(geometry.stride) > 1 and set(geometry.dilation) == {1}


def convolve(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    weight: Tensor,
    border: Border | None,
    out: Tensor,
    geometry: Geometry,
) -> None:
    """out = convolution of what the parts make of the inputs (None: of the input), plus the border's numbers.

    All channels-last; weight (out, in, *kernel).
    """
    weight = weight.contiguous()
    call = _Call(inputs[0], out, geometry, weight, FORWARD, parts)
    added = None if border is None else byref(border.described())
    call.run("", _source(inputs, parts), _Kernel.of(weight), added, out.data_ptr())


def convolve_back(
    inputs: Sequence[Tensor],
    parts: Sequence[Part],
    weight: Tensor,
    grad: Tensor,
    totals: Sequence[Tensor | None],
    learned: Sequence[Tensor | None],
    geometry: Geometry,
) -> None:
    """Add to `totals` (as `inputs`) and `learned` what the gradient of the output gives."""
    weight = weight.contiguous()
    call = _Call(grad, inputs[0], geometry, weight, BACK, parts)
    sums = Learned(parts[-1], call.threads, learned)
    source = _source(inputs, parts, totals, sums)
    call.run("_back", source, _Kernel.of(weight, turned=True), grad.data_ptr())
    sums.add()


def convolve_weight(
    inputs: Sequence[Tensor],
    parts: Sequence[Part] | None,
    weight: Tensor,
    grad: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Gradient at the weight (out, in, *kernel), from the gradient of the output."""
    if not grad.numel():  # the kernels write a sum over samples and have none
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    call = _Call(inputs[0], grad, geometry, weight, WEIGHT, parts)
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    call.run("_weight", _source(inputs, parts), _Kernel.of(of_weight), grad.data_ptr())
    return of_weight


def convolve_input(weight: Tensor, grad: Tensor, into: Tensor, geometry: Geometry) -> None:
    """into = gradient at the input of a plain convolution without strides, from the gradient of the output."""
    weight = weight.contiguous()
    call = _Call(grad, into, geometry, weight, FORWARD, None, turned=True)
    call.run("", _source([grad], None), _Kernel.of(weight, turned=True), None, into.data_ptr())


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
    """Sizes and memory of one call.

    Args:
        turned: whether it leads a gradient back, as `BACK` does.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        geometry: Geometry,
        weight: Tensor,
        job: int,
        parts: Sequence[Part] | None,
        turned: bool = False,
    ) -> None:
        back = turned or job == BACK
        self.name = "winograd" if geometry.dense() else "direct"
        deep = x.dim() - 4
        flat = [1] * (1 - deep)
        size, out_size = [*flat, *x.shape[2:]], [*flat, *y.shape[2:]]
        pads = [2 - pad for pad in geometry.padding] if back and geometry.dense() else geometry.padding
        channels = weight.shape[:2] if back else weight.shape[1::-1]
        self.volume = Volume(len(x), *size, *channels, *out_size, *([0] * len(flat)), *pads)
        self.volume.kernel[:] = [*flat, *geometry.kernel_size]
        self.volume.stride[:] = [*flat, *geometry.stride]
        self.threads = native.threads_for(y.numel())
        self.about = (byref(self.volume), deep, parts[0].expansion.branches if parts else 0)
        scratch = getattr(native.library(), f"{self.name}_scratch")
        self.scratch = torch.empty(scratch(*self.about, self.threads, job), **native.FLOATS)

    def run(self, job: str, source: _Source, kernel: _Kernel, *others: Any) -> None:
        given = (*self.about, byref(source), byref(kernel), *others)
        getattr(native.library(), self.name + job)(*given, self.scratch.data_ptr(), self.threads)
