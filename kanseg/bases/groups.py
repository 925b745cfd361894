"""Functions with learned coefficients that a group of channels shares: far fewer numbers than one set an edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kanseg.bases.basis import Basis, beside


def of_channels(sets: Tensor, channels: int) -> Tensor:
    """One set of coefficients a channel from one a group, (groups, K) -> (channels, K); neighbours share a set."""
    return sets.repeat_interleave(channels // len(sets), dim=0)


def fitting_groups(groups: int, channels: int | None) -> int:
    """The largest number of groups that divides both; without channels of their own all share one set."""
    return math.gcd(groups, channels) if channels else 1


class SharedFunction(Basis):
    """The one function f_g(t) = sum_k a_gk phi_k(t) of the group g of a channel (Yang and Wang, arXiv 2409.10594).

    The weights behind it are then those of a plain convolution: y = conv(f(x); W).

    Args:
        basis: the phi_k, without parameters a channel.
        groups: groups of channels with coefficients of their own; made to divide the channels.
        channels: channels of the input, or of one group of a grouped convolution, whose groups use the same sets.
    """

    def __init__(self, basis: Basis, groups: int, channels: int | None) -> None:
        super().__init__(1)
        self.basis, self.channels = basis, channels
        self.domain, self.squash, self.pointwise = basis.domain, basis.squash, basis.pointwise
        sets = fitting_groups(groups, channels)
        self.coefficients = nn.Parameter(torch.randn(sets, basis.num_functions) / basis.num_functions**0.5)

    def functions(self, t: Tensor) -> list[Tensor]:
        sets = of_channels(self.coefficients, self.channels or len(self.coefficients))
        sets = sets.repeat(t.shape[1] // len(sets), 1)
        values = self.basis.functions(t)
        return [sum((beside(a, t) * f for a, f in zip(sets.unbind(1), values, strict=True)), 0 * t)]
