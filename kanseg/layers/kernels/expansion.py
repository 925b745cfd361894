"""One convolution over an expansion of its input that is made slab by slab and never kept.

y = conv([f_1(x), ..., f_R(x)]; W) + conv(1; w), the f_r pointwise. Forward writes the expansion of a slab (some planes
of the first spatial axis) into one channels-last buffer and convolves it; backward does the same again, and leads the
gradient of the buffer through the f_r block by block. The layer keeps its input. A function that is constant needs no
channel: its term depends on the distance to the border alone and is added as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels import native, winograd
from kanseg.layers.kernels.rows import as_rows, blocks, channels_last, empty_channels_last

SLAB_BYTES = 32 * 2**20  # of an expansion; a smaller one starves the gradient of the weight


@dataclass(frozen=True)
class Branches:
    """The pointwise functions f_r.

    Attributes:
        evaluate: rows (P, C) of each input -> R tensors (P, C).
        parameters: what is learned in them.
        native: channels -> how the compiled kernels make the same; None where they cannot.
    """

    evaluate: Callable[..., list[Tensor]]
    parameters: Sequence[Tensor] = ()
    native: Callable[[int], list[native.Part]] | None = None


@dataclass(frozen=True)
class Geometry:
    """Numbers a spatial axis, two or three of them."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output."""
        axes = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def expanded_conv(
    inputs: Sequence[Tensor],
    branches: Branches,
    weight: Tensor,
    constant: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """(N, C, *S) -> (N, out_channels, *S'), two or three spatial axes, channels-last.

    Args:
        inputs: one tensor or several of one shape, given to the branches together.
        weight: (out_channels, R * C / groups, *kernel), function by function within a group.
        constant: (out_channels, *kernel), the weight of a channel that is 1 everywhere, or None.
    """
    inputs = [channels_last(x) for x in inputs]
    tensors = (*inputs, *branches.parameters)
    return _ExpandedConv.apply(branches, geometry, len(inputs), weight, constant, *tensors)


class _ExpandedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        branches: Branches,
        geometry: Geometry,
        count: int,
        weight: Tensor,
        constant: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = tensors[:count]
        first = inputs[0]
        dtype = torch.get_autocast_dtype(first.device.type) if _autocast(first) else weight.dtype
        parts = None
        if branches.native is not None and dtype == torch.float32 and native.serves(*inputs):
            parts = branches.native(first.shape[1])
        made = _Made(branches, parts, geometry)
        ctx.made, ctx.count, ctx.dtype = made, count, dtype
        ctx.save_for_backward(weight, constant, *tensors)
        with torch.autocast(first.device.type, enabled=False):
            return _forward(made, inputs, weight.to(dtype), constant)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, constant, *tensors = ctx.saved_tensors
        geometry, inputs, parameters = ctx.made.geometry, tensors[: ctx.count], tensors[ctx.count :]
        needs = ctx.needs_input_grad
        wants = [x if need else None for x, need in zip(tensors, needs[5:], strict=True)]
        grad = channels_last(grad)
        kernel = weight.to(ctx.dtype)
        totals = [None if t is None else torch.zeros_like(t) for t in wants]
        constant = constant if needs[4] else None
        with torch.autocast(grad.device.type, enabled=False):
            of_weight = _backward(ctx.made, inputs, parameters, kernel, grad, totals, bool(needs[3]))
            of_constant = (
                None
                if constant is None
                else _constant_gradient(grad, constant, inputs[0].shape[2:], geometry)
            )
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        return None, None, None, of_weight, of_constant, *totals


def _forward(made: _Made, inputs: Sequence[Tensor], kernel: Tensor, constant: Tensor | None) -> Tensor:
    first, geometry = inputs[0], made.geometry
    size = geometry.out_size(first.shape[2:])
    if made.fast(first, kernel):
        out = empty_channels_last((len(first), len(kernel), *size), first)
        border = None if constant is None else _border(constant, first.shape[2:], size, geometry)
        winograd.convolve(inputs, made.parts, kernel, border, out, geometry.padding)
        return out
    whole: Tensor | None = None
    for slab in _slabs(first.shape, kernel.shape[1] * geometry.groups, kernel.dtype, geometry):
        buffer = _expansion(slab, inputs, made, kernel)
        part = _convolve(buffer, kernel, slab, geometry)
        del buffer  # before the next is made
        if slab.whole:
            whole = channels_last(part)
        else:
            if whole is None:
                whole = empty_channels_last((len(first), len(kernel), *size), first, kernel.dtype)
            _outputs(whole, slab).copy_(part)
    assert whole is not None
    if constant is not None:
        _add_constant(whole, constant, first.shape[2:], geometry)
    return whole


def _backward(
    made: _Made,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    kernel: Tensor,
    grad: Tensor,
    totals: Sequence[Tensor | None],
    of_kernel: bool,
) -> Tensor | None:
    """Gradient of the kernel, where it is asked for; those of inputs and parameters are added to `totals`."""
    geometry, expands = made.geometry, any(t is not None for t in totals)
    if made.fast(inputs[0], kernel):
        assert made.parts is not None
        if expands:
            learned = totals[len(inputs) :]
            winograd.convolve_back(inputs, made.parts, kernel, grad, totals, learned, geometry.padding)
        return (
            winograd.convolve_weight(inputs, made.parts, kernel, grad, geometry.padding)
            if of_kernel
            else None
        )
    total: Tensor | None = None
    for slab in _slabs(inputs[0].shape, kernel.shape[1] * geometry.groups, kernel.dtype, geometry):
        buffer = _expansion(slab, inputs, made, kernel)
        through, part, _ = torch.ops.aten.convolution_backward(
            channels_last(_outputs(grad, slab)),
            buffer,
            kernel,
            None,
            geometry.stride,
            slab.padding(geometry),
            geometry.dilation,
            False,
            [0] * len(geometry.stride),
            geometry.groups,
            [expands, of_kernel, False],
        )
        del buffer
        if of_kernel:
            total = _plus(total, part)
        if expands:
            _contract(through, slab, inputs, parameters, made, totals)
    return total


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The running total, in at least float32."""
    if total is None:
        return part.float() if part.dtype.itemsize < 4 else part
    return total.add_(part)


@dataclass(frozen=True)
class _Made:
    """The branches, how the compiled kernels make them here (None: they do not), and the convolution."""

    branches: Branches
    parts: list[native.Part] | None
    geometry: Geometry

    def fast(self, x: Tensor, kernel: Tensor) -> bool:
        """Whether Winograd's convolution serves."""
        return self.parts is not None and winograd.serves(x, kernel, self.geometry)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype.itemsize <= 4


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


def _slabs(shape: Sequence[int], channels: int, dtype: torch.dtype, geometry: Geometry) -> Iterator[Slab]:
    samples, _, planes, *rest = shape
    plane_bytes = channels * dtype.itemsize * torch.Size(rest).numel()
    outputs = geometry.out_size(shape[2:])[0]
    every = slice(0, samples)
    if samples * planes * plane_bytes <= SLAB_BYTES:
        yield Slab(True, every, slice(0, outputs), slice(0, planes))
        return
    stride, padding = geometry.stride[0], geometry.padding[0]
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1)
    height = max(1, (SLAB_BYTES // plane_bytes - reach) // stride)
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


def _outputs(y: Tensor, slab: Slab) -> Tensor:
    return y if slab.whole else y[slab.sample, :, slab.out]


def _planes(x: Tensor, slab: Slab) -> Tensor:
    return x if slab.whole else x[slab.sample, :, slab.source]


def _expansion(slab: Slab, inputs: Sequence[Tensor], made: _Made, weight: Tensor) -> Tensor:
    """The f_r of a slab, (N, groups * R * C, *S), channels-last, with zeros around it."""
    sources = [_planes(x, slab) for x in inputs]
    samples, channels, planes, *rest = sources[0].shape
    groups = made.geometry.groups
    width = weight.shape[1] * groups
    size = (samples, width, planes + slab.before + slab.after, *rest)
    buffer = empty_channels_last(size, weight)
    buffer[:, :, : slab.before] = 0
    buffer[:, :, slab.before + planes :] = 0
    inside = as_rows(buffer[:, :, slab.before : slab.before + planes])
    if made.parts is not None:
        native.expand(made.parts, sources, inside, channels // groups)
        return buffer
    rows = [as_rows(x) for x in sources]
    for sample in range(samples):
        into = inside[sample].unflatten(1, (groups, -1, channels // groups))
        for block in blocks(into.shape[0], channels):
            for number, part in enumerate(made.branches.evaluate(*(x[sample, block] for x in rows))):
                into[block, :, number] = part.unflatten(1, (groups, -1))
    return buffer


def _convolve(buffer: Tensor, weight: Tensor, slab: Slab, geometry: Geometry) -> Tensor:
    convolution = torch.conv2d if buffer.dim() == 4 else torch.conv3d
    return convolution(
        buffer, weight, None, geometry.stride, slab.padding(geometry), geometry.dilation, geometry.groups
    )


def _contract(
    through: Tensor,
    slab: Slab,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    made: _Made,
    totals: Sequence[Tensor | None],
) -> None:
    """Add the gradients at inputs and parameters that the gradient `through` the expansion of a slab gives."""
    sources = [_planes(x, slab) for x in inputs]
    channels, planes = sources[0].shape[1:3]
    groups = made.geometry.groups
    inside = as_rows(channels_last(through)[:, :, slab.before : slab.before + planes])
    sums = [None if t is None else as_rows(_planes(t, slab)) for t in totals[: len(inputs)]]
    if made.parts is not None:
        native.contract(made.parts, sources, inside, sums, totals[len(inputs) :], channels // groups)
        return
    rows = [as_rows(x) for x in sources]
    for sample in range(len(inside)):
        upper = inside[sample].unflatten(1, (groups, -1, channels // groups))
        for block in blocks(upper.shape[0], channels):
            with torch.enable_grad():
                leaves = [
                    x[sample, block].detach().requires_grad_(t is not None)
                    for x, t in zip(rows, sums, strict=True)
                ]
                parts = made.branches.evaluate(*leaves)
            sought = [leaf for leaf, t in zip(leaves, sums, strict=True) if t is not None]
            learned = [p for p, t in zip(parameters, totals[len(inputs) :], strict=True) if t is not None]
            depend = [number for number, part in enumerate(parts) if part.requires_grad]
            grads = torch.autograd.grad(
                [parts[number] for number in depend],
                [*sought, *learned],
                [upper[block, :, number].flatten(1).to(parts[number].dtype) for number in depend],
                allow_unused=True,
            )
            into = [t[sample, block] for t in sums if t is not None]
            into += [t for t in totals[len(inputs) :] if t is not None]
            for total, part in zip(into, grads, strict=True):
                if part is not None:
                    total += part


def _valid_taps(size: int, outputs: int, axis: int, geometry: Geometry, like: Tensor) -> Tensor:
    """(outputs, kernel): 1 where a tap of an output position lies inside the image."""
    positions = torch.arange(outputs, device=like.device) * geometry.stride[axis] - geometry.padding[axis]
    taps = torch.arange(geometry.kernel_size[axis], device=like.device) * geometry.dilation[axis]
    at = positions[:, None] + taps
    return ((at >= 0) & (at < size)).to(like.dtype)


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
    for axis, (n, outputs) in enumerate(zip(size, out_size, strict=True)):
        taps = _valid_taps(n, outputs, axis, geometry, constant)
        runs = _runs(taps)
        lengths = torch.tensor([stop - start for start, stop in runs])
        classes.append(torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), lengths))
        table = torch.tensordot(table, taps[[start for start, _ in runs]], ([axis], [1])).movedim(-1, axis)
    return winograd.Border(classes, table.contiguous())


def _constant_gradient(grad: Tensor, constant: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    planes = grad.movedim(1, -1)
    taps = _valid_taps(size[0], grad.shape[2], 0, geometry, constant)
    total = torch.zeros(taps.shape[1], *planes.shape[2:], dtype=constant.dtype, device=grad.device)
    for start, stop in _runs(taps):
        run = planes[:, start:stop].sum((0, 1), dtype=constant.dtype)
        total[taps[start] > 0] += run
    for axis in range(1, len(size)):
        taps = _valid_taps(size[axis], grad.shape[axis + 2], axis, geometry, constant)
        total = torch.tensordot(total, taps, ([axis], [0])).movedim(-1, axis)
    return total.movedim(-1, 0)
