"""Rational functions shared by groups of channels, the basis of GR-KAN (Yang and Wang, arXiv 2409.10594)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kanseg.bases.basis import BASES, Basis, beside
from kanseg.bases.groups import fitting_groups, of_channels
from kanseg.errors import UsageError

# SiLU = x / 2 (1 + tanh(x / 2)) with the continued fraction of tanh up to z (15 + z^2) / (15 + 6 z^2)
NUMERATOR = (0.0, 1 / 2, 1 / 4, 1 / 20, 1 / 240)
DENOMINATOR = (0.0, 1 / 10)


@BASES.register("rational")
class GroupRational(Basis):
    """The one function P(t) / (1 + |t Q(t)|) with learned polynomials P and Q a group of channels, SiLU at the start.

    Args:
        degree: of P, at least 4.
        denominator_degree: of t Q, at least 2.
        groups: groups of channels with polynomials of their own; made to divide the channels.
        channels: see `kanseg.bases.groups.SharedFunction`.
    """

    domain = (-3.0, 3.0)

    def __init__(
        self,
        degree: int = 5,
        denominator_degree: int = 4,
        groups: int = 8,
        squash: str | Callable[[Tensor], Tensor] = "identity",
        channels: int | None = None,
    ) -> None:
        if degree < len(NUMERATOR) - 1 or denominator_degree < len(DENOMINATOR):
            raise UsageError(
                f"rational functions need degree >= {len(NUMERATOR) - 1} and denominator_degree >= "
                f"{len(DENOMINATOR)}, got {degree} and {denominator_degree}"
            )
        super().__init__(1, squash)
        sets = fitting_groups(groups, channels)
        self.channels = channels or sets
        numerator = torch.tensor(NUMERATOR + (0.0,) * (degree + 1 - len(NUMERATOR)))
        denominator = torch.tensor(DENOMINATOR + (0.0,) * (denominator_degree - len(DENOMINATOR)))
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
