"""Rational functions shared by groups of channels, the basis of GR-KAN (Yang and Wang, arXiv 2409.10594)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kanseg.bases.basis import BASES, Basis, beside
from kanseg.bases.groups import fitting_groups, of_channels
from kanseg.errors import UsageError, did_you_mean

# The functions to start as, by the coefficients of P and Q.
STARTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # SiLU = x / 2 (1 + tanh(x / 2)) with the continued fraction of tanh up to z (15 + z^2) / (15 + 6 z^2)
    "silu": ((0.0, 1 / 2, 1 / 4, 1 / 20, 1 / 240), (0.0, 1 / 10)),
    "identity": ((0.0, 1.0), (1e-3,)),  # with Q = 0 |t Q| would have no slope, and Q would stay
}


@BASES.register("rational")
class GroupRational(Basis):
    """The one function P(t) / (1 + |t Q(t)|) with learned polynomials P and Q a group of channels.

    Args:
        degree: of P, at least 4 to start as SiLU.
        denominator_degree: of t Q, at least 2 to start as SiLU.
        groups: groups of channels with polynomials of their own; made to divide the channels.
        start: the function before training, "silu" or "identity" (to a thousandth of t^2).
        channels: see `kanseg.bases.groups.SharedFunction`.
    """

    domain = (-3.0, 3.0)

    def __init__(
        self,
        degree: int = 5,
        denominator_degree: int = 4,
        groups: int = 8,
        squash: str | Callable[[Tensor], Tensor] = "identity",
        start: str = "silu",
        channels: int | None = None,
    ) -> None:
        if start not in STARTS:
            raise UsageError(f"Unknown start '{start}'.{did_you_mean(start, STARTS)}")
        top, bottom = STARTS[start]
        if degree < len(top) - 1 or denominator_degree < len(bottom):
            raise UsageError(
                f"rational functions that start as {start} need degree >= {len(top) - 1} and denominator_degree >= "
                f"{len(bottom)}, got {degree} and {denominator_degree}"
            )
        super().__init__(1, squash)
        sets = fitting_groups(groups, channels)
        self.channels = channels or sets
        numerator = torch.tensor(top + (0.0,) * (degree + 1 - len(top)))
        denominator = torch.tensor(bottom + (0.0,) * (denominator_degree - len(bottom)))
        self.numerator = nn.Parameter(numerator.repeat(sets, 1))
        self.denominator = nn.Parameter(denominator.repeat(sets, 1))

    def functions(self, t: Tensor) -> list[Tensor]:
        top, bottom = (self._horner(sets, t) for sets in (self.numerator, self.denominator))
        return [top / (1 + (t * bottom).abs())]

    def _horner(self, sets: Tensor, t: Tensor) -> Tensor:
        each = of_channels(sets, self.channels).repeat(t.shape[1] // self.channels, 1)
        value = torch.zeros_like(t)
        for coefficient in each.flip(1).unbind(1):
            value = value * t + beside(coefficient, t)
        return value
