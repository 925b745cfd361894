"""Bernstein polynomials, the basis of Bezier curves (KABN)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError


@BASES.register("bernstein")
class Bernstein(Basis):
    """B_k(t) = binom(D, k) t^k (1 - t)^(D - k) on [0, 1], k = 0 ... D: positive, and they sum to 1.

    Args:
        degree: D; the sigmoid brings the input into [0, 1].
    """

    domain = (0.0, 1.0)
    constant = "sum"

    def __init__(
        self,
        degree: int = 3,
        squash: str | Callable[[Tensor], Tensor] = "sigmoid",
        channels: int | None = None,
    ) -> None:
        if degree < 0:
            raise UsageError(f"degree must be 0 or more, got {degree}")
        super().__init__(degree + 1, squash)
        self.degree = degree

    def functions(self, t: Tensor) -> list[Tensor]:
        powers, rest = [torch.ones_like(t)], [torch.ones_like(t)]
        for _ in range(self.degree):
            powers.append(powers[-1] * t)
            rest.append(rest[-1] * (1 - t))
        degree = self.degree
        return [math.comb(degree, k) * powers[k] * rest[degree - k] for k in range(degree + 1)]
