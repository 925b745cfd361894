"""One convolution over an expansion of its input that is made slab by slab and never kept.

y = conv([f_1(x), ..., f_R(x)]; W) + conv(1; w), the f_r pointwise. Forward writes the expansion of a slab (some planes
of the first spatial axis) into one channels-last buffer and convolves it; backward does the same again, and leads the
gradient of the buffer through the f_r block by block. The layer keeps its input. A function that is constant needs no
channel: its term depends on the distance to the border alone and is added as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels import native, winograd
from kanseg.layers.kernels.constant import add_constant, border_of, constant_gradient
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.recipe import Recipe
from kanseg.layers.kernels.rows import as_rows, blocks, channels_last, empty_channels_last, product
from kanseg.layers.kernels.slab_conv import convolution_gradients, convolve
from kanseg.layers.kernels.slabs import Slab, copied, outputs, planes_of, slabs


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
            border = None if constant is None else border_of(constant, first.shape[2:], size, geometry)
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
            add_constant(out, constant, first.shape[2:], geometry)
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
            of_constant = constant_gradient(grad, constant, inputs[0].shape[2:], geometry)
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


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The running total, in at least float32."""
    if total is None:
        return part.float() if part.dtype.itemsize < 4 else part
    return total.add_(part)


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
