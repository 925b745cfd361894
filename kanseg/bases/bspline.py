"""B-splines on a uniform grid, the basis of the first KAN (Liu et al., arXiv 2404.19756).

Uniform knots make every function one shifted cardinal spline, which has a closed form (Schoenberg): no recursion,
no grid tensor the size of the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError


def cardinal_bspline(v: Tensor, order: int) -> Tensor:
    """The centred cardinal B-spline M_order(v), zero for |v| >= (order + 1) / 2.

    Sum over j of (-1)^j binom(order + 1, j) relu((order + 1) / 2 - |v| - j)^order / order!; the even form needs only
    the first half of the sum and so loses no digits to cancellation.
    """
    distance = v.abs()
    if order == 0:
        return ((v >= -0.5) & (v < 0.5)).to(v.dtype)
    half = (order + 1) / 2
    terms = (
        (-1) ** j * math.comb(order + 1, j) / math.factorial(order) * (half - j - distance).relu() ** order
        for j in range(math.ceil(half))
    )
    return sum(terms, torch.zeros((), dtype=v.dtype, device=v.device))


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
        return [cardinal_bspline((t - centre) / self.width, self.spline_order) for centre in self.centres]
