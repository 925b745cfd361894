"""One convolution over an expansion of its input that is made slab by slab and never kept.

y = conv([f_1(x), ..., f_R(x)]; W) + conv(1; w), the f_r pointwise. Forward writes the expansion of a slab (some planes
of the first spatial axis) into one channels-last buffer and convolves it; backward does the same again, and leads the
gradient of the buffer through the f_r block by block. The layer keeps its input. A function that is constant needs no
channel: its term depends on the distance to the border alone and is added as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.layers.kernels import gpu, native, winograd
from kanseg.layers.kernels.recipe import Recipe
from kanseg.layers.kernels.rows import (
    as_rows,
    blocks,
    channels_last,
    empty_channels_last,
    is_channels_last,
    product,
)

# Channels * planes * rows of one volume up to which torch convolves it by a loop of its own, 10 to 40 times slower than
# oneDNN (`use_mkldnn` in its Convolution.cpp; seen in torch 2.13 and 2.14).
LEFT_TO_TORCH = 20480
LEAST_VOXELS = 128  # of that volume; the loop does well below
SLAB_BYTES = 32 * 2**20  # of an expansion; a smaller one starves the gradient of the weight
COPY_BYTES = 12 * 2**20  # of an input
TILE = 4  # rows of Winograd's largest tile; what begins with one has the same numbers
SLAB_OF_GPU = 1 / 512  # of its memory
LEAST_OF_GPU = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Geometry:
    """Numbers a spatial axis, two or three of them."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """What `numbers` wrote down."""
        dims = (len(numbers) - 1) // 4
        kernel_size, stride, padding, dilation = (
            tuple(numbers[dims * i : dims * i + dims]) for i in range(4)
        )
        return cls(kernel_size, stride, padding, dilation, numbers[-1])

    def numbers(self) -> list[int]:
        """All in one list."""
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]

    def dense(self) -> bool:
        """Whether it is what kernels are compiled for: kernel 3, stride and dilation 1, padding to 2, one group."""
        once = (1,) * len(self.stride)
        alike = set(self.kernel_size) == {3} and self.stride == self.dilation == once
        return alike and max(self.padding) <= 2 and self.groups == 1

    def pointwise(self) -> bool:
        """Whether it is a product of each voxel's channels with one matrix."""
        return {*self.kernel_size, *self.stride, self.groups} == {1} and not any(self.padding)

    def misread(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether oneDNN's gradient of the weight reads beyond its memory if oneDNN itself pads the map with zeros.

        Seen with torch 2.14 on processors with AVX-512, in 3D: NaN, wrong numbers or a crash. In bfloat16 where an axis
        of the map is shorter than the kernel; in float32 and bfloat16 where the first window behind the zeros in front
        reaches those at the end (with strides and kernels of 4 or more). Float16, 2D and all else are right.
        """
        if x.device.type != "cpu" or x.dim() != 5 or dtype not in (torch.bfloat16, torch.float32):
            return False
        reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        short = dtype == torch.bfloat16 and any(n <= r for n, r in zip(x.shape[2:], reach, strict=True))
        first = -self.padding[0] % self.stride[0]  # plane of that window; 0 has been seen to be right
        return any(self.padding) and (short or (first > 0 and first + reach[0] >= x.shape[2]))

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output."""
        axes = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


@dataclass(frozen=True)
class Expansion:
    """The functions of a recipe with what they learn, and the convolution over them.

    Attributes:
        learned: tensors of the recipe, in its order.
        dtype: of the operands of the convolution.
        wanted: which of `learned` need a gradient; None for none.
        parts: how the compiled kernels make the functions; None where they do not serve.
    """

    recipe: Recipe
    learned: Sequence[Tensor]
    geometry: Geometry
    dtype: torch.dtype
    wanted: Sequence[bool] | None = None
    parts: list[native.Part] | None = None

    def compiled(self, inputs: Sequence[Tensor]) -> Expansion:
        """With the compiled kernels where they serve `inputs`."""
        if self.dtype == torch.float64 or not native.serves(*inputs):
            return self
        wanted = self.wanted or [False] * len(self.learned)
        made = self.recipe.native(self.learned, wanted, len(inputs))
        return self if made is None else replace(self, parts=made(inputs[0].shape[1]))

    def fast(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the compiled convolutions serve: in float32, which is no slower than a direct one in bfloat16."""
        return self.parts is not None and winograd.serves(x, weight, self.geometry)


def forward(
    expansion: Expansion, inputs: Sequence[Tensor], base: Tensor | None, basis: Tensor | None
) -> Tensor:
    """(N, C, *S) -> (N, out_channels, *S'), two or three spatial axes, channels-last.

    Args:
        inputs: x, and where the functions have one of their own that.
        base, basis: weights, see `Recipe.fold`.
    """
    expansion = expansion.compiled(inputs)
    first, geometry = inputs[0], expansion.geometry
    weight, constant = expansion.recipe.fold(base, basis)
    size = geometry.out_size(first.shape[2:])
    out: Tensor | None = None
    with torch.autocast(first.device.type, enabled=False):
        fast = expansion.fast(first, weight)
        kernel = weight if fast else weight.to(expansion.dtype)
        dtype = kernel.dtype
        if fast:
            assert expansion.parts is not None
            out = empty_channels_last((len(first), len(weight), *size), first, dtype)
            border = None if constant is None else _border(constant, first.shape[2:], size, geometry)
            for slab in copied(inputs, geometry):
                sources = [channels_last(planes_of(x, slab)) for x in inputs]
                near = None if border is None else border.of(slab.out)
                into = outputs(out, slab)
                winograd.convolve(sources, expansion.parts, kernel, near, into, slab.geometry(geometry))
                del sources  # before the next are made
            return out.to(expansion.dtype)
        multiplied = geometry.pointwise() and first.device.type == "cpu"
        bias = None if constant is None or not multiplied else constant.flatten().to(dtype)
        for slab in slabs(first, weight.shape[1] * geometry.groups, dtype, geometry):
            buffer = _expansion(slab, inputs, expansion, kernel)
            part = product(buffer, kernel, bias) if multiplied else convolve(buffer, kernel, slab, geometry)
            del buffer  # before the next is made
            if slab.whole:
                out = channels_last(part)
            else:
                if out is None:
                    out = empty_channels_last((len(first), len(weight), *size), first, dtype)
                outputs(out, slab).copy_(part)
        assert out is not None
        if constant is not None and not multiplied:
            _add_constant(out, constant, first.shape[2:], geometry)
    return out.to(expansion.dtype)


def backward(
    expansion: Expansion,
    grad: Tensor,
    inputs: Sequence[Tensor],
    base: Tensor | None,
    basis: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients at the inputs, `base`, `basis` and what is learned in the functions, None where `needs` says so."""
    expansion = expansion.compiled(inputs)
    geometry, count, learned = expansion.geometry, len(inputs), expansion.learned
    weight, constant = expansion.recipe.fold(base, basis)
    weighs, sought = any(needs[count : count + 2]), [*needs[:count], *needs[count + 2 :]]
    fast = expansion.fast(inputs[0], weight)
    kernel = weight if fast else weight.to(expansion.dtype)
    grad = grad.to(kernel.dtype)
    totals = [
        torch.zeros_like(t) if need else None for t, need in zip((*inputs, *learned), sought, strict=True)
    ]
    of_weight: Tensor | None = None
    of_constant: Tensor | None = None
    with torch.autocast(grad.device.type, enabled=False):
        if fast:
            assert expansion.parts is not None
            about = (inputs, expansion.parts, kernel, grad)
            if any(sought):
                winograd.convolve_back(*about, totals[:count], totals[count:], geometry)
            if weighs:
                of_weight = winograd.convolve_weight(*about, geometry)
        else:
            of_weight = _slab_gradients(expansion, grad, inputs, kernel, totals, weighs)
        if weighs and constant is not None:
            of_constant = _constant_gradient(grad, constant, inputs[0].shape[2:], geometry)
    weights: tuple[Tensor | None, Tensor | None] = (None, None)
    if of_weight is not None:
        weights = expansion.recipe.unfold(of_weight, of_constant, base, basis)
    return [*totals[:count], *weights, *totals[count:]]


def _slab_gradients(
    expansion: Expansion,
    grad: Tensor,
    inputs: Sequence[Tensor],
    kernel: Tensor,
    totals: Sequence[Tensor | None],
    weighs: bool,
) -> Tensor | None:
    """Gradient of the kernel, slab by slab; those at inputs and learned numbers are added to `totals`."""
    geometry, expands = expansion.geometry, any(t is not None for t in totals)
    total: Tensor | None = None
    width = kernel.shape[1] * geometry.groups
    for slab in slabs(inputs[0], width, kernel.dtype, geometry):
        buffer = _expansion(slab, inputs, expansion, kernel)
        through, part = convolution_gradients(
            outputs(grad, slab), buffer, kernel, slab, geometry, expands, weighs
        )
        del buffer
        if weighs:
            total = plus(total, part)
        if expands:
            _contract(through, slab, inputs, expansion, totals)
    return total


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, slab: Slab, geometry: Geometry, of_x: bool, of_weight: bool
) -> tuple[Any, Any]:
    """Gradients at x and weight of the convolution of a slab."""
    if geometry.pointwise() and x.device.type == "cpu":
        return _gradients_of_product(grad, x, weight, of_x, of_weight)
    here, none = replace(geometry, padding=slab.padding(geometry)), (0,) * len(geometry.padding)
    samples, channels, *size = x.shape
    edge = here.padding if of_weight and here.misread(x, weight.dtype) else none
    if any(edge):
        x, here = channels_last(F.pad(x, zeros_of(edge))), replace(here, padding=none)
    x, weight = for_onednn(x, weight)
    grad = channels_last(grad)
    if len(x) > samples:
        grad = F.pad(grad, [0, 0] * (grad.dim() - 1) + [0, len(x) - samples])
    about = (here.stride, here.padding, here.dilation, False, none, here.groups)
    at_x, at_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *about, [of_x, of_weight, False]
    )
    inside = [slice(before, before + n) for before, n in zip(edge, size, strict=True)]
    return (
        None if at_x is None else at_x[(slice(samples), slice(channels), *inside)],
        None if at_weight is None else at_weight[:, : channels // geometry.groups],
    )


def zeros_of(padding: Sequence[int]) -> list[int]:
    """What `F.pad` is told of them: both sides of each axis, the last axis first."""
    return [n for n in reversed(padding) for _ in range(2)]


def _gradients_of_product(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `convolution_gradients`, by two products of matrices: torch would first copy to channels-first memory."""
    upper, rows = (as_rows(channels_last(t)).flatten(0, 1) for t in (grad, x))
    at_x = at_weight = None
    if of_x:
        at_x = (upper @ weight.flatten(1)).view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
    if of_weight:
        few = rows.shape[1] < upper.shape[1]  # first, for which the product is up to 20 times faster
        at_weight = ((rows.T @ upper).T if few else upper.T @ rows).reshape(weight.shape)
    return at_x, at_weight


def for_onednn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with channels of zeros more, or x with a sample more, where torch would convolve by its own loop."""
    size, channels = x.shape[2:], x.shape[1]
    alone = len(x) == 1 and len(size) == 3 and size.numel() >= LEAST_VOXELS and channels == weight.shape[1]
    if not alone or x.device.type != "cpu" or x.dtype != torch.float32 or weight[0, 0].numel() == 1:
        return x, weight
    missing = LEFT_TO_TORCH // (size[0] * size[1]) + 1 - channels
    if missing <= 0:
        return x, weight
    if channels + missing > max(16, 2 * channels):
        return F.pad(x, [0] * 9 + [1]), weight
    return F.pad(x, [0] * 7 + [missing, 0, 0]), F.pad(weight, [0] * 7 + [missing, 0, 0])


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The running total, in at least float32."""
    if total is None:
        return part.float() if part.dtype.itemsize < 4 else part
    return total.add_(part)


@dataclass(frozen=True)
class Slab:
    """Planes of the first spatial axis of some samples.

    Attributes:
        whole: the whole batch at once, with the padding left to the convolution.
        sample: which samples.
        out: planes of the output.
        source: planes of the input that they see.
        before, after: planes of zeros around these.
    """

    whole: bool
    sample: slice
    out: slice
    source: slice
    before: int = 0
    after: int = 0

    def padding(self, geometry: Geometry) -> tuple[int, ...]:
        """What is left for the convolution to pad."""
        return geometry.padding if self.whole else (0, *geometry.padding[1:])

    def geometry(self, geometry: Geometry) -> Geometry:
        """That of a convolution which makes just these planes of the output, and pads for itself."""
        return geometry if self.whole else replace(geometry, padding=(self.before, *geometry.padding[1:]))


WHOLE = Slab(True, slice(None), slice(None), slice(None))


def slab_bytes(device: torch.device) -> int:
    """Of an expansion, at most.

    On a CPU it fits into the caches. On a GPU its way through the memory takes a tenth of the convolution's time, while
    each slab costs a launch of every kernel and the planes that its neighbours make too.
    """
    if device.type != "cuda":
        return SLAB_BYTES
    return max(LEAST_OF_GPU, int(SLAB_OF_GPU * gpu.memory(device)))


def copied(inputs: Sequence[Tensor], geometry: Geometry) -> Iterator[Slab]:
    """All at once; where inputs must be copied into channels-last memory, COPY_BYTES of each at a time."""
    scattered = next((x for x in inputs if not is_channels_last(x)), None)
    if scattered is None:
        return iter([WHOLE])
    return slabs(scattered, scattered.shape[1], scattered.dtype, geometry, COPY_BYTES, TILE)


def slabs(
    x: Tensor,
    channels: int,
    dtype: torch.dtype,
    geometry: Geometry,
    most: int | None = None,
    multiple: int = 1,
) -> Iterator[Slab]:
    """Cut the batch `x` where its expansion to so many channels has more than `most` bytes (None: `slab_bytes`), into
    slabs of a multiple of so many planes of the output.
    """
    samples, _, planes, *rest = x.shape
    most = slab_bytes(x.device) if most is None else most
    plane_bytes = channels * dtype.itemsize * torch.Size(rest).numel()
    outputs = geometry.out_size(x.shape[2:])[0]
    every = slice(0, samples)
    if samples * planes * plane_bytes <= most:
        yield Slab(True, every, slice(0, outputs), slice(0, planes))
        return
    stride, padding = geometry.stride[0], geometry.padding[0]
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1)
    height = max(1, (most // plane_bytes - reach) // stride)
    height = math.ceil(outputs / max(1, math.ceil(outputs / height)))  # no thin slab at the end
    height = math.ceil(height / multiple) * multiple
    for sample in range(samples):
        for start in range(0, outputs, height):
            stop = min(start + height, outputs)
            low, high = start * stride - padding, (stop - 1) * stride - padding + reach + 1
            source = slice(min(max(low, 0), planes), max(min(high, planes), 0))
            yield Slab(
                False,
                slice(sample, sample + 1),
                slice(start, stop),
                source,
                before=min(max(-low, 0), high - low),
                after=min(max(high - planes, 0), high - low),
            )


def outputs(y: Tensor, slab: Slab) -> Tensor:
    return y if slab.whole else y[slab.sample, :, slab.out]


def planes_of(x: Tensor, slab: Slab) -> Tensor:
    return x if slab.whole else x[slab.sample, :, slab.source]


def _expansion(slab: Slab, inputs: Sequence[Tensor], made: Expansion, weight: Tensor) -> Tensor:
    """The f_r of a slab, (N, groups * R * C, *S), channels-last, with zeros around it."""
    sources = [planes_of(x, slab) for x in inputs]
    samples, channels, planes, *rest = sources[0].shape
    groups = made.geometry.groups
    width = weight.shape[1] * groups
    size = (samples, width, planes + slab.before + slab.after, *rest)
    buffer = empty_channels_last(size, weight)
    buffer[:, :, : slab.before] = 0
    buffer[:, :, slab.before + planes :] = 0
    inside = as_rows(buffer[:, :, slab.before : slab.before + planes])
    rows = [as_rows(channels_last(x)) for x in sources]
    if made.parts is not None:
        for at in _halves(inside):
            part = (
                inside[at]
                if inside.dtype == torch.float32
                else torch.empty(inside[at].shape, **native.FLOATS)
            )
            native.expand(made.parts, [x[at] for x in rows], part, channels // groups)
            if part.dtype != inside.dtype:
                inside[at] = part
        return buffer
    for sample in range(samples):
        into = inside[sample].unflatten(1, (groups, -1, channels // groups))
        for block in blocks(into.shape[0], channels):
            for number, part in enumerate(made.recipe(made.learned, *(x[sample, block] for x in rows))):
                into[block, :, number] = part.unflatten(1, (groups, -1))
    return buffer


def _halves(rows: Tensor) -> Iterator[Any]:
    """All of (N, voxels, C) where it is float32, else blocks, which are made or read in float32 beside it."""
    if rows.dtype == torch.float32:
        yield slice(None)
        return
    for sample in range(len(rows)):
        yield from ((sample, block) for block in blocks(*rows.shape[1:]))


def convolve(buffer: Tensor, weight: Tensor, slab: Slab, geometry: Geometry) -> Tensor:
    """The convolution of a slab."""
    convolution = torch.conv2d if buffer.dim() == 4 else torch.conv3d
    samples = len(buffer)
    buffer, weight = for_onednn(buffer, weight)
    made = convolution(
        buffer, weight, None, geometry.stride, slab.padding(geometry), geometry.dilation, geometry.groups
    )
    return made if len(made) == samples else made[:samples]


def _contract(
    through: Tensor,
    slab: Slab,
    inputs: Sequence[Tensor],
    made: Expansion,
    totals: Sequence[Tensor | None],
) -> None:
    """Add the gradients at inputs and parameters that the gradient `through` the expansion of a slab gives."""
    sources = [planes_of(x, slab) for x in inputs]
    channels, planes = sources[0].shape[1:3]
    groups = made.geometry.groups
    inside = as_rows(channels_last(through)[:, :, slab.before : slab.before + planes])
    sums = [None if t is None else as_rows(planes_of(t, slab)) for t in totals[: len(inputs)]]
    rows = [as_rows(x) for x in sources]
    if made.parts is not None:
        for at in _halves(inside):
            parts, places = [x[at] for x in rows], [None if t is None else t[at] for t in sums]
            learned = totals[len(inputs) :]
            native.contract(made.parts, parts, inside[at].float(), places, learned, channels // groups)
        return
    for sample in range(len(inside)):
        upper = inside[sample].unflatten(1, (groups, -1, channels // groups))
        for block in blocks(upper.shape[0], channels):
            leaves = [
                t.detach().requires_grad_(total is not None)
                for t, total in zip((*(x[sample, block] for x in rows), *made.learned), totals, strict=True)
            ]
            with recording():
                functions = made.recipe(leaves[len(inputs) :], *leaves[: len(inputs)])
            depend = [number for number, function in enumerate(functions) if function.requires_grad]
            grads = torch.autograd.grad(
                [functions[number] for number in depend],
                [leaf for leaf in leaves if leaf.requires_grad],
                [upper[block, :, number].flatten(1).to(functions[number].dtype) for number in depend],
                allow_unused=True,
            )
            into = [t[sample, block] for t in sums if t is not None]
            into += [t for t in totals[len(inputs) :] if t is not None]
            for place, gradient in zip(into, grads, strict=True):
                if gradient is not None:
                    place.add_(gradient)


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an operator, which runs below it."""
    keys, without = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        without = without.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), without),
        torch.enable_grad(),
    ):
        yield


def _valid_taps(size: int, outputs: int, axis: int, geometry: Geometry, like: Tensor) -> Tensor:
    """(outputs, kernel): 1 where a tap of an output position lies inside the image."""
    numbers = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    inside = _taps_inside(size, outputs, *(axes[axis] for axes in numbers))
    return torch.from_numpy(inside).to(like.device, like.dtype)


@functools.lru_cache(maxsize=64)  # for tiny maps these few numbers take longer than the convolution
def _taps_inside(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> np.ndarray:
    positions = np.arange(outputs) * stride - padding
    at = positions[:, None] + np.arange(kernel) * dilation
    return ((at >= 0) & (at < size)).astype(np.float32)


def _runs(taps: Tensor) -> list[tuple[int, int]]:
    """Stretches of output positions that see the same taps."""
    changes = (taps[1:] != taps[:-1]).any(1).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(taps)]
    return list(pairwise(edges))


def _add_constant(out: Tensor, constant: Tensor, size: Sequence[int], geometry: Geometry) -> None:
    """out += conv(1; constant); one response for all planes of the first axis that see the same taps."""
    response = constant.movedim(0, -1)  # (*kernel, out_channels)
    axes = range(len(size))
    taps = [_valid_taps(size[axis], out.shape[axis + 2], axis, geometry, constant) for axis in axes]
    for axis in axes[1:]:
        response = torch.tensordot(response, taps[axis], ([axis], [1])).movedim(-1, axis)
    planes = out.movedim(1, -1)  # (N, *S, out_channels)
    for start, stop in _runs(taps[0]):
        planes[:, start:stop] += torch.tensordot(taps[0][start], response.contiguous(), 1).to(out.dtype)


def _border(
    constant: Tensor, size: Sequence[int], out_size: Sequence[int], geometry: Geometry
) -> winograd.Border:
    """conv(1; constant) as one number for all outputs that see the same taps."""
    table, classes = constant.movedim(0, -1), []
    for axis, (n, count) in enumerate(zip(size, out_size, strict=True)):
        taps = _valid_taps(n, count, axis, geometry, constant)
        runs = _runs(taps)
        lengths = torch.tensor([stop - start for start, stop in runs])
        classes.append(torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), lengths))
        table = torch.tensordot(table, taps[[start for start, _ in runs]], ([axis], [1])).movedim(-1, axis)
    return winograd.Border(classes, table.contiguous())


def _constant_gradient(grad: Tensor, constant: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    if geometry.pointwise():
        return as_rows(grad).sum((0, 1), dtype=constant.dtype).view_as(constant)
    planes = grad.movedim(1, -1)
    taps = _valid_taps(size[0], grad.shape[2], 0, geometry, constant)
    total = torch.zeros(taps.shape[1], *planes.shape[2:], dtype=constant.dtype, device=grad.device)
    for start, stop in _runs(taps):
        for sample in planes:  # torch sums over two axes at once for ten times the time
            total[taps[start] > 0] += sample[start:stop].sum(0, dtype=constant.dtype)
    for axis in range(1, len(size)):
        taps = _valid_taps(size[axis], grad.shape[axis + 2], axis, geometry, constant)
        total = torch.tensordot(total, taps, ([axis], [0])).movedim(-1, axis)
    return total.movedim(-1, 0)
