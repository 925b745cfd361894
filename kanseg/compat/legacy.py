"""What the reference computes and its formulas do not say: kept apart, for parity only, never a default.

IvanDrokin/torch-conv-kan at 7a0e83c multiplies the Gram recurrence where it should divide, scales the input of the
Legendre layer by the extremes of the whole batch, has a Bernstein basis that is constantly 1, a Mexican hat of the
other sign, a Shannon wavelet windowed over channels, and a grouped Gram layer that mixes degrees with channels. Its
attention is not scaled, multiplies the skip by the learned number, and turns tokens as if they lay on a square. Its
grids are in float32, whatever a network is run in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.bases import Basis
from kanseg.bases.bspline import BSpline
from kanseg.bases.orthogonal import Gram, OrthogonalPolynomials
from kanseg.bases.rbf import GaussianRBF
from kanseg.bases.wavelet import mexican_hat
from kanseg.layers.attention import KANAttention
from kanseg.layers.focal import FocalModulation
from kanseg.layers.gates import NoisyTopKGate
from kanseg.layers.kan_conv import KANConv
from kanseg.layers.mixture import MixtureOfExperts, take_balance_loss
from kanseg.layers.rotary import Rotary


def multiplied_gram(degree: int = 3, channels: int | None = None) -> Gram:
    """c_{n+1} = (2n + 1) n^2 (4 n^2 - 1) / (n + 1)^2, where Gram's polynomials divide by 4 n^2 - 1."""
    basis = Gram(degree)
    basis.recurrence = [(1.0, 0.0, 0.0)] + [
        (1.0, 0.0, (2 * n + 1) * n * n * (4 * n * n - 1) / (n + 1) ** 2) for n in range(1, degree)
    ]
    return basis


class ClampedChebyshev(OrthogonalPolynomials):
    """Chebyshev polynomials of |t| <= 1 - 1e-7, which in float32 is a matter of rounding and left out."""

    kind = OrthogonalPolynomials

    def __init__(self, degree: int = 3, channels: int | None = None) -> None:
        super().__init__(degree, lambda n: (1.0 if n == 1 else 2.0, 0.0, float(n > 1)))

    def functions(self, t: Tensor) -> list[Tensor]:
        most = 1 - 1e-7
        return super().functions(t.clamp(-most, most) if t.dtype == torch.float64 else t)


class RoundedBSpline(BSpline):
    """B-splines whose knots and their distances are numbers of float32, also where a network is run in float64."""

    kind = BSpline

    def functions(self, t: Tensor) -> list[Tensor]:
        if t.dtype != torch.float64:
            return super().functions(t)
        order, (low, high), width = self.spline_order, self.domain, self.width
        ends = (low - width * order, high + width * order)
        knots = torch.linspace(*ends, self.num_functions + order + 1, dtype=torch.float32, device=t.device)
        splines = [((t >= left) & (t < right)).to(t.dtype) for left, right in pairwise(knots)]
        for r in range(1, order + 1):
            splines = [
                (t - knots[i]) / (knots[i + r] - knots[i]) * left
                + (knots[i + r + 1] - t) / (knots[i + r + 1] - knots[i + 1]) * right
                for i, (left, right) in enumerate(pairwise(splines))
            ]
        return splines


def rounded_rbf(
    grid_size: int = 8, grid_range: tuple[float, float] = (-2.0, 2.0), channels: int | None = None
) -> GaussianRBF:
    """Radial functions whose centres are numbers of float32, also where a network is run in float64."""
    basis = GaussianRBF(grid_size, grid_range)
    basis.centres = torch.linspace(*grid_range, grid_size, dtype=torch.float32).tolist()
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
    """degree + 1 functions that are all 1."""

    def __init__(self, degree: int = 3, channels: int | None = None) -> None:
        super().__init__(degree + 1)

    def functions(self, t: Tensor) -> list[Tensor]:
        return [torch.ones_like(t)] * self.num_functions


def wavelet(name: str, channel_axis: int = 3) -> str | Callable[[Tensor], Tensor]:
    """The reference's wavelet: the Mexican hat times -1, and sin(z) / z times a Hamming window over the channels."""
    changed: dict[str, Any] = {
        "mexican_hat": negative_mexican_hat,
        "shannon": partial(channel_windowed_shannon, channel_axis),
    }
    return changed.get(name, name)


def negative_mexican_hat(z: Tensor) -> Tensor:
    """The Mexican hat times -1."""
    return -mexican_hat(z)


def channel_windowed_shannon(axis: int, z: Tensor) -> Tensor:
    """sin(z) / z times a symmetric Hamming window over an axis of z."""
    window = torch.hamming_window(z.shape[axis], periodic=False, dtype=z.dtype, device=z.device)
    return torch.sinc(z / math.pi) * window.view(-1, *[1] * (z.dim() - 1 - axis))


class DegreeMajorKANConv(KANConv):
    """A grouped layer whose expansion is ordered by function first and only then cut into groups (KAGN "V2")."""

    folds = False

    def expand(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        base = self.base_act(x).unflatten(1, (self.groups, -1))
        basis = self._expanded_basis(x).transpose(1, 2).flatten(1, 2).unflatten(1, (self.groups, -1))
        return torch.cat([base, basis], dim=2).flatten(1, 2)

    def joint_weight(self) -> Tensor:
        return torch.cat([self.base_weight, self.basis_weight], dim=1)


class ReferenceGate(NoisyTopKGate):
    """Weights that are shares of the softmax over all experts, with 1e-6 in the denominator."""

    def shares(self, logits: Tensor, chosen: Tensor) -> Tensor:
        shares = logits.softmax(dim=1).gather(1, chosen)
        return shares / (shares.sum(dim=1, keepdim=True) + 1e-6)


class ReferenceMixture(MixtureOfExperts):
    """A mixture that keeps its balance loss in `eval()` too; that of one expert is (1,)."""

    gate_class = ReferenceGate

    def forward(self, x: Tensor) -> Tensor:
        y, loss = self.mix(x)
        self.balance_loss = loss.reshape(1) if len(self.experts) == 1 else loss
        return y


class WithBalanceLoss(nn.Module):
    """(output, balance loss) of a layer with mixtures."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return self.layer(x), take_balance_loss(self.layer)


class SquareRotary(Rotary):
    """Positions of the tokens but the first on a square, whatever the grid: (t mod w, t // w) with w^2 = L - 1."""

    def __init__(
        self, spatial_dims: int, channels: int, num_heads: int = 1, *, kind: str, theta: float
    ) -> None:
        super().__init__(2, channels, num_heads, kind=kind, theta=theta)
        if kind == "axial":
            length = theta ** -(torch.arange(0, channels, 4)[: channels // 4] / channels)
            self.frequencies = torch.block_diag(length, length)[:, None]

    def positions(self, size: Sequence[int]) -> Tensor:
        count = math.prod(size) - 1
        width = max(math.sqrt(count), 1)
        t = torch.arange(count, device=self.frequencies.device, dtype=torch.float32)
        tokens = torch.stack([t % width, torch.div(t, width, rounding_mode="floor")], dim=-1)
        return torch.cat([tokens.new_zeros(1, 2), tokens])


class SquareAttention(KANAttention):
    """Its rotary positions are those of a square of pixels."""

    new_rotary = SquareRotary


class GatheredFocalModulation(FocalModulation):
    """The global context is the mean of the weighted sum of the others."""

    def everywhere(self, context: Tensor, gathered: Tensor) -> Tensor:
        return super().everywhere(gathered, gathered)


class ChannelNorm(nn.Module):
    """Normalises the channels of a group at each position, (N, C, *S) -> (N, C, *S) (timm's LayerNorm2d)."""

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight: Any = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias: Any = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        by_group = x.movedim(1, -1).unflatten(-1, (self.groups, -1))
        y = F.layer_norm(by_group, by_group.shape[-1:], eps=self.eps).flatten(-2)
        return (y if self.weight is None else y * self.weight + self.bias).movedim(-1, 1)
