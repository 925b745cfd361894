"""Rotary positions on any grid.

Sources: Su et al., arXiv 2104.09864 and Heo et al., arXiv 2403.13298 (axial and mixed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError, did_you_mean


def _axial(spatial_dims: int, num_heads: int, pairs: int, theta: float) -> Tensor:
    turns = torch.arange(pairs)
    length = theta ** -((turns // spatial_dims) / math.ceil(pairs / spatial_dims))
    return F.one_hot(turns % spatial_dims, spatial_dims).T[:, None] * length


def _mixed(spatial_dims: int, num_heads: int, pairs: int, theta: float) -> nn.Parameter:
    direction = F.normalize(torch.randn(spatial_dims, num_heads, pairs), dim=0)
    return nn.Parameter(direction * theta ** -(torch.arange(pairs) / max(pairs, 1)))


# Frequencies (axes, heads or 1, pairs) of (spatial_dims, num_heads, pairs, theta); a parameter where they are learned.
ROTARY: dict[str, Callable[[int, int, int, float], Tensor]] = {"axial": _axial, "mixed": _mixed}


class Rotary(nn.Module):
    """Turns channel pairs (2j, 2j + 1) of a token at position p by the angle sum_a p_a f_aj.

    Products of queries and keys then depend on the difference of their positions alone.

    Args:
        spatial_dims: number of axes a.
        channels: channels of one head, even.
        num_heads: heads; each has its own frequencies where they are learned.
        kind: "axial": each pair belongs to one axis, frequencies theta^(-j / pairs of the axis), fixed;
            "mixed": learned frequencies in all axes, of those lengths and random directions at start.
        theta: ratio of the largest frequency to the smallest, about.
    """

    frequencies: Tensor  # (axes, heads or 1, pairs)

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        num_heads: int = 1,
        *,
        kind: str = "axial",
        theta: float = 10.0,
    ) -> None:
        super().__init__()
        if kind not in ROTARY:
            raise UsageError(f"Unknown rotary positions '{kind}'.{did_you_mean(kind, ROTARY)}")
        if channels % 2:
            raise UsageError(f"rotary positions need an even number of channels a head, got {channels}")
        pairs = channels // 2
        frequencies = ROTARY[kind](spatial_dims, num_heads, pairs, theta)
        if isinstance(frequencies, nn.Parameter):
            self.frequencies = frequencies
        else:
            self.register_buffer("frequencies", frequencies)

    def forward(self, tokens: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Turn each of `tokens`, (N, heads, L, channels), L positions of a grid of this size in row-major order."""
        frequencies = self.frequencies
        angles = torch.einsum("la,ahp->hlp", self.positions(size).to(frequencies), frequencies)
        cosine, sine = angles.cos(), angles.sin()
        turned = []
        for t in tokens:
            first, second = t[..., 0::2], t[..., 1::2]
            pairs = (first * cosine - second * sine, first * sine + second * cosine)
            turned.append(torch.stack(pairs, dim=-1).flatten(-2).to(t.dtype))
        return turned

    def positions(self, size: Sequence[int]) -> Tensor:
        """Coordinates of the grid's points, (L, axes)."""
        axes = [torch.arange(n, device=self.frequencies.device) for n in size]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
