"""B-splines on a uniform grid, the basis of the first KAN (Liu et al., arXiv 2404.19756).

Uniform knots make every function one shifted cardinal spline, which has a closed form (Schoenberg): no recursion,
no grid tensor the size of the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError


def cardinal_bspline(v: Tensor, order: int) -> Tensor:
    """The centred cardinal B-spline M_order(v), zero for |v| >= (order + 1) / 2.

    Sum over j of (-1)^j binom(order + 1, j) relu((order + 1) / 2 - |v| - j)^order / order!; the even form needs only
    the first half of the sum and so loses no digits to cancellation.
    """
    if order == 0:
        return ((v >= -0.5) & (v < 0.5)).to(v.dtype)
    return _CardinalBSpline.apply(v, order)


class _CardinalBSpline(torch.autograd.Function):
    """Its derivative is a sum of the same form, cheaper than a way back through each step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, order: int) -> Tensor:
        return _truncated_powers(v, order, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        v, ctx.order = inputs
        ctx.save_for_backward(v)
        ctx.save_for_forward(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad * _slope(v, ctx.order), None
        slope = _truncated_powers(v, ctx.order, ctx.order - 1).mul_(v.sign().neg_())
        return slope.mul(grad) if _is_batched(grad) else slope.mul_(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (v,) = ctx.saved_tensors
        return tangent * _slope(v, ctx.order)


def _is_batched(x: Tensor) -> bool:
    """Whether it stands for many, which one tensor cannot take in place."""
    functions: Any = torch._C._functorch
    return bool(functions.is_functorch_wrapped_tensor(x) or functions.is_legacy_batchedtensor(x))


def _slope(v: Tensor, order: int) -> Tensor:
    """The derivative as a difference of splines of lower order, for one that is differentiated again."""
    return cardinal_bspline(v + 0.5, order - 1) - cardinal_bspline(v - 0.5, order - 1)


def _truncated_powers(v: Tensor, order: int, power: int) -> Tensor:
    """Sum over j of (-1)^j binom(order + 1, j) relu((order + 1) / 2 - j - |v|)^power / power!, few passes, in place."""
    half, distance, total = (order + 1) / 2, v.abs(), None
    scale = math.factorial(power) ** (-1 / max(1, power))  # to this power it divides by power!
    for j in range(math.ceil(half)):
        reach = torch.rsub(distance, (half - j) * scale, alpha=scale)
        term = reach.clamp_(min=0).pow_(power) if power else (reach > 0).to(reach.dtype)
        factor = (-1) ** j * math.comb(order + 1, j)
        total = term if total is None else total.add_(term, alpha=factor)
    assert total is not None
    return total


@BASES.register("bspline")
class BSpline(Basis):
    """`grid_size` + `spline_order` B-splines over `grid_range`; a partition of unity inside it, zero far outside.

    Args:
        grid_size: number of intervals in `grid_range`.
        spline_order: polynomial order (3: cubic).
        grid_range: the interval (low, high).
    """

    def __init__(
        self,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        squash: str = "identity",
        channels: int | None = None,
    ) -> None:
        low, high = grid_range
        if grid_size < 1 or spline_order < 0 or high <= low:
            raise UsageError(
                f"B-splines need grid_size >= 1, spline_order >= 0 and low < high, got {grid_size}, {spline_order}, "
                f"{grid_range}"
            )
        super().__init__(grid_size + spline_order, squash)
        self.domain = (low, high)
        self.spline_order = spline_order
        self.width = (high - low) / grid_size
        self.centres = [low + self.width * (k + (1 - spline_order) / 2) for k in range(self.num_functions)]

    def functions(self, t: Tensor) -> list[Tensor]:
        u = t / self.width
        return [cardinal_bspline(u - centre / self.width, self.spline_order) for centre in self.centres]
