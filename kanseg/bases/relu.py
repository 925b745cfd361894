"""Squared products of two ReLUs, bell shaped and cheap: the basis of ReLU-KAN (Qiu et al., arXiv 2406.02075)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanseg.bases.basis import BASES, Basis, beside
from kanseg.errors import UsageError


@BASES.register("relu")
class ReLUBumps(Basis):
    """R_i(t) = (relu(t - low_i) relu(high_i - t) r)^2 with low_i = (i - k) / g, high_i = low_i + (k + 1) / g.

    There are g + k functions over [0, 1]; r = 4 g^2 / (k + 1)^2 makes each peak 1 at the start.

    Args:
        grid_size: g.
        order: k, how many neighbours a bump overlaps.
        train_phases: learn low and high, one pair a channel and function.
        channels: number of channels with phases of their own; None shares one set. An input with a multiple of
            `channels` channels (groups) repeats them.
    """

    domain = (0.0, 1.0)

    def __init__(
        self,
        grid_size: int = 5,
        order: int = 3,
        train_phases: bool = True,
        squash: str = "identity",
        channels: int | None = None,
    ) -> None:
        if grid_size < 1 or order < 0:
            raise UsageError(f"ReLU bumps need grid_size >= 1 and order >= 0, got {grid_size}, {order}")
        super().__init__(grid_size + order, squash)
        low = torch.arange(-order, grid_size).repeat(channels or 1, 1) / grid_size
        self.phase_low = nn.Parameter(low, requires_grad=train_phases)
        self.phase_high = nn.Parameter(low + (order + 1) / grid_size, requires_grad=train_phases)
        self.scale = 4 * grid_size**2 / (order + 1) ** 2

    def functions(self, t: Tensor) -> list[Tensor]:
        repeats = t.shape[1] // len(self.phase_low) if len(self.phase_low) > 1 else 1
        edges = (phase.repeat(repeats, 1).unbind(1) for phase in (self.phase_low, self.phase_high))
        return [
            ((t - beside(low, t)).relu() * (beside(high, t) - t).relu() * self.scale) ** 2
            for low, high in zip(*edges, strict=True)
        ]
