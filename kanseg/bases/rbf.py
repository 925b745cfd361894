"""Gaussian radial basis functions, the basis of FastKAN (Li, arXiv 2405.06721)."""

from __future__ import annotations

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError


@BASES.register("rbf")
class GaussianRBF(Basis):
    """phi_k(t) = exp(-((t - g_k) / d)^2), centres g_k evenly over `grid_range`, d their distance.

    Args:
        grid_size: number of centres, at least 2.
        grid_range: first and last centre.
    """

    def __init__(
        self,
        grid_size: int = 8,
        grid_range: tuple[float, float] = (-2.0, 2.0),
        squash: str = "identity",
        channels: int | None = None,
    ) -> None:
        low, high = grid_range
        if grid_size < 2 or high <= low:
            raise UsageError(f"RBF needs grid_size >= 2 and low < high, got {grid_size}, {grid_range}")
        super().__init__(grid_size, squash)
        self.domain = (low, high)
        self.width = (high - low) / (grid_size - 1)
        self.centres = [low + k * self.width for k in range(grid_size)]

    def functions(self, t: Tensor) -> list[Tensor]:
        return [torch.exp(-(((t - centre) / self.width) ** 2)) for centre in self.centres]
