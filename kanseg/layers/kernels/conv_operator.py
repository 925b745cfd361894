"""The convolution over an expansion as an operator of torch, so that compilers and exporters take it as one step.

y = conv([f_1(x), ..., f_R(x)]; W) + conv(1; w). The operator keeps its inputs and weights for the backward pass, which
is an operator of its own. The functions are told by a string (`recipe`), the geometry by a list of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kanseg.layers.kernels import expansion, gpu
from kanseg.layers.kernels.expansion import Expansion
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.operators import operator, plain_eager, refuse_batched, refuse_second
from kanseg.layers.kernels.recipe import read
from kanseg.layers.kernels.rows import channels_last, empty_channels_last, laid_out

Shape = Sequence[int]
GIVEN = (
    "Tensor x, Tensor? own, Tensor? base, Tensor? basis, Tensor[] learned, "
    "str recipe, int[] geometry, ScalarType dtype"
)


def expanded_conv(
    inputs: Sequence[Tensor],
    base: Tensor | None,
    basis: Tensor | None,
    learned: Sequence[Tensor],
    recipe: str,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """(N, C, *S) -> (N, out_channels, *S'), two or three spatial axes, channels-last.

    Args:
        inputs: x, and where the functions have an input of their own that, of one shape.
        base, basis: weights of the base branch and of the functions, see `Recipe.fold`.
        learned: what the basis learns, in the order of the recipe.
        dtype: of the operands of the convolution and of the result.
    """
    x, *rest = map(laid_out, inputs)
    own = rest[0] if rest else None
    how = (recipe, geometry.numbers(), dtype)
    if plain_eager(x):
        return _Direct.apply(how, x, own, base, basis, *learned)
    return _conv(x, own, base, basis, list(learned), *how)


def _forward(
    x: Tensor,
    own: Tensor | None,
    base: Tensor | None,
    basis: Tensor | None,
    learned: Sequence[Tensor],
    recipe: str,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    inputs = [x] if own is None else [x, own]
    made = Expansion(read(recipe), learned, Geometry.of(geometry), dtype)
    return _backend(made, inputs).forward(made, inputs, base, basis)


def _fake_forward(
    x: Tensor, own: Any, base: Any, basis: Any, learned: Any, recipe: Any, geometry: Any, dtype: torch.dtype
) -> Tensor:
    size = Geometry.of(geometry).out_size(x.shape[2:])
    outputs = (basis if base is None else base).shape[0]
    return empty_channels_last((x.shape[0], outputs, *size), x, dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    own: Tensor | None,
    base: Tensor | None,
    basis: Tensor | None,
    learned: Sequence[Tensor],
    recipe: str,
    geometry: Sequence[int],
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, of x, own, base, basis and what is learned, in this order."""
    # Hooks on saved tensors may have brought them back in other memory.
    inputs = [channels_last(t) for t in (x, own) if t is not None]
    made = Expansion(read(recipe), learned, Geometry.of(geometry), dtype, needs[4:])
    sought = [*needs[: len(inputs)], *needs[2:]]
    found = _backend(made, inputs).backward(made, channels_last(grad), inputs, base, basis, sought)
    return [t for t, need in zip(found, sought, strict=True) if need]


def _backend(made: Expansion, inputs: Sequence[Tensor]) -> ModuleType:
    """Who computes: on a GPU the Triton kernels where they can, else `expansion`."""
    if gpu.serves(*inputs) and gpu.kernels("conv").serves(made.recipe, made.dtype):
        return gpu.kernels("conv")
    return expansion


def _fake_backward(
    grad: Tensor, x: Tensor, own: Any, base: Any, basis: Any, learned: Any, *others: Any
) -> list[Tensor]:
    like = zip((x, own, base, basis, *learned), others[-1], strict=True)
    return [torch.empty_like(t) if t is x or t is own else t.new_empty(t.shape) for t, need in like if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, own, base, basis, learned, *how = inputs
    ctx.save_for_backward(x, own, base, basis, *learned)
    ctx.how = how


def _lead_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    first, others = ctx.needs_input_grad[:4], ctx.needs_input_grad[4]
    grads = _gradients(_conv_backward, ctx, grad, [*first, *others])
    return *grads[:4], grads[4:], *[None] * len(ctx.how)


def _gradients(call: Callable[..., list[Tensor]], ctx: Any, grad: Tensor, needs: list[bool]) -> list[Any]:
    x, own, base, basis, *learned = ctx.saved_tensors
    found = iter(call(grad, x, own, base, basis, learned, *ctx.how, needs))
    return [next(found) if need else None for need in needs]


_conv = operator("expanded_conv", f"({GIVEN}) -> Tensor", _forward, _fake_forward)
_conv_backward = operator(
    "expanded_conv_backward", f"(Tensor grad, {GIVEN}, bool[] needs) -> Tensor[]", _backward, _fake_backward
)


@register_flop_formula(torch.ops.kanseg.expanded_conv)
def _flops(
    x: Shape,
    own: Any,
    base: Shape | None,
    basis: Shape | None,
    learned: Any,
    recipe: str,
    *how: Any,
    **made: Any,
) -> int:
    """Of the convolution as it is written, by torch's rule: two for each weight and output voxel; see `Recipe.fold`."""
    written = read(recipe)
    weights = 0 if base is None else math.prod(base)
    if basis is not None and written.basis is not None:
        functions = written.basis.num_functions
        weights += math.prod(basis) * (functions - int(written.constant is not None)) // functions
    return 2 * weights * x[0] * math.prod(Geometry.of(how[0]).out_size(x[2:]))


@register_flop_formula(torch.ops.kanseg.expanded_conv_backward)
def _flops_backward(grad: Shape, *given: Any, **made: Any) -> int:
    """Each of the gradients, of the input and of the weights, costs what the convolution does."""
    *inputs, needs = given
    return _flops(*inputs) * (int(any((*needs[:2], *needs[4:]))) + int(any(needs[2:4])))


_conv.register_autograd(_lead_back, setup_context=_keep)
_conv_backward.register_autograd(refuse_second)


class _Direct(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, how: Sequence[Any], *tensors: Any) -> Tensor:
        x, own, base, basis, *learned = tensors
        _keep(ctx, (x, own, base, basis, learned, *how), x)
        return _forward(x, own, base, basis, learned, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_batched(grad)
        call = (
            _conv_backward if torch.is_grad_enabled() else _backward
        )  # the former refuses a second derivative
        return None, *_gradients(call, ctx, grad, list(ctx.needs_input_grad[1:]))
