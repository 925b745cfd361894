"""Fourier series, the basis of FourierKAN (Xu et al., arXiv 2406.01034)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError


@BASES.register("fourier")
class Fourier(Basis):
    """1, cos t, sin t, ..., cos(n t), sin(n t), by the multiple-angle recurrence from one cosine and one sine.

    Args:
        degree: the highest frequency n; there are 2 n + 1 functions.
    """

    domain = (-math.pi, math.pi)
    constant = "first"

    def __init__(
        self,
        degree: int = 2,
        squash: str | Callable[[Tensor], Tensor] = "identity",
        channels: int | None = None,
    ) -> None:
        if degree < 0:
            raise UsageError(f"degree must be 0 or more, got {degree}")
        super().__init__(2 * degree + 1, squash)

    def functions(self, t: Tensor) -> list[Tensor]:
        waves = [torch.ones_like(t), t.cos(), t.sin()][: self.num_functions]
        before = (waves[0], torch.zeros_like(t))
        while len(waves) < self.num_functions:
            cosine, sine = waves[-2:]
            waves += [2 * waves[1] * cosine - before[0], 2 * waves[1] * sine - before[1]]
            before = (cosine, sine)
        return waves
