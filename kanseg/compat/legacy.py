"""What the reference computes and its formulas do not say: kept apart, for parity only, never a default.

IvanDrokin/torch-conv-kan at 7a0e83c multiplies the Gram recurrence where it should divide, scales the input of the
Legendre layer by the extremes of the whole batch, has a Bernstein basis that is constantly 1, a Mexican hat of the
other sign, a Shannon wavelet windowed over channels, and a grouped Gram layer that mixes degrees with channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kanseg.bases import Basis
from kanseg.bases.orthogonal import Gram
from kanseg.bases.wavelet import mexican_hat
from kanseg.layers.kan_conv import KANConv


def multiplied_gram(degree: int) -> Gram:
    """c_{n+1} = (2n + 1) n^2 (4 n^2 - 1) / (n + 1)^2, where Gram's polynomials divide by 4 n^2 - 1."""
    basis = Gram(degree)
    basis.recurrence = [(1.0, 0.0, 0.0)] + [
        (1.0, 0.0, (2 * n + 1) * n * n * (4 * n * n - 1) / (n + 1) ** 2) for n in range(1, degree)
    ]
    return basis


class BatchMinMax(nn.Module):
    """2 (x - min) / (max - min) - 1 with the extremes of all samples, channels of the group and positions."""

    pointwise = False

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        by_group = x.unflatten(1, (self.groups, -1))
        axes = [axis for axis in range(by_group.dim()) if axis != 1]
        low, high = by_group.amin(axes, keepdim=True), by_group.amax(axes, keepdim=True)
        return (2 * (by_group - low) / (high - low) - 1).view_as(x)


class Ones(Basis):
    """K functions that are all 1."""

    def functions(self, t: Tensor) -> list[Tensor]:
        return [torch.ones_like(t)] * self.num_functions


def negative_mexican_hat(z: Tensor) -> Tensor:
    """The Mexican hat times -1."""
    return -mexican_hat(z)


def channel_windowed_shannon(z: Tensor) -> Tensor:
    """sin(z) / z times a symmetric Hamming window over the channels, axis 3 of (N, groups, edges, C, *spatial)."""
    window = torch.hamming_window(z.shape[3], periodic=False, dtype=z.dtype, device=z.device)
    return torch.sinc(z / math.pi) * window.view(-1, *[1] * (z.dim() - 4))


class DegreeMajorKANConv(KANConv):
    """A grouped layer whose expansion is ordered by function first and only then cut into groups (KAGN "V2")."""

    folds = False

    def expand(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        base = self.base_act(x).unflatten(1, (self.groups, -1))
        basis = self._expanded_basis(x).transpose(1, 2).flatten(1, 2).unflatten(1, (self.groups, -1))
        return torch.cat([base, basis], dim=2).flatten(1, 2)

    def weight(self) -> Tensor:
        return torch.cat([self.base_weight, self.basis_weight], dim=1)
