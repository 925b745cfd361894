"""Mother wavelets and the basis of their shifts (Wav-KAN, Bozorgasl and Chen, arXiv 2405.12832).

`WAVELETS` are plain functions psi(z); `layers.wavelet_conv` learns one scale and translation an edge of the network,
the basis here spreads fixed shifts over an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError, did_you_mean


def mexican_hat(z: Tensor) -> Tensor:
    """2 / (sqrt(3) pi^(1/4)) (1 - z^2) exp(-z^2 / 2), the Ricker wavelet."""
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - z**2) * torch.exp(-(z**2) / 2)


def morlet(z: Tensor) -> Tensor:
    """cos(5 z) exp(-z^2 / 2)."""
    return torch.cos(5 * z) * torch.exp(-(z**2) / 2)


def dog(z: Tensor) -> Tensor:
    """-z exp(-z^2 / 2), the derivative of a Gaussian."""
    return -z * torch.exp(-(z**2) / 2)


def meyer(z: Tensor) -> Tensor:
    """sin(pi |z|) times Meyer's smooth cut-off: 1 up to 1/2, 0 from 1 on."""
    distance = z.abs()
    t = (2 * distance - 1).clamp(0, 1)
    ramp = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
    return torch.sin(math.pi * distance) * torch.cos(math.pi / 2 * ramp)


def shannon(z: Tensor) -> Tensor:
    """sinc(z / 2) cos(3 pi z / 2), the real Shannon wavelet: an ideal band-pass."""
    return torch.sinc(z / 2) * torch.cos(1.5 * math.pi * z)


WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (mexican_hat, morlet, dog, meyer, shannon)
}


def get_wavelet(wavelet: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A mother wavelet by name, or the given function."""
    if callable(wavelet):
        return wavelet
    if wavelet not in WAVELETS:
        raise UsageError(f"Unknown wavelet '{wavelet}'.{did_you_mean(wavelet, WAVELETS)}")
    return WAVELETS[wavelet]


@BASES.register("wavelet")
class WaveletShifts(Basis):
    """phi_k(t) = psi((t - g_k) / d) with g_k evenly over `grid_range`, d their distance.

    Args:
        wavelet: name in `WAVELETS`.
        grid_size: number of shifts, at least 2.
        grid_range: first and last shift.
    """

    def __init__(
        self,
        wavelet: str = "mexican_hat",
        grid_size: int = 8,
        grid_range: tuple[float, float] = (-2.0, 2.0),
        squash: str = "identity",
        channels: int | None = None,
    ) -> None:
        low, high = grid_range
        if grid_size < 2 or high <= low:
            raise UsageError(
                f"wavelet shifts need grid_size >= 2 and low < high, got {grid_size}, {grid_range}"
            )
        super().__init__(grid_size, squash)
        self.domain = (low, high)
        self.psi = get_wavelet(wavelet)
        self.width = (high - low) / (grid_size - 1)
        self.shifts = [low + k * self.width for k in range(grid_size)]

    def functions(self, t: Tensor) -> list[Tensor]:
        return [self.psi((t - shift) / self.width) for shift in self.shifts]


for _name in WAVELETS:
    BASES.preset(_name, WaveletShifts, f"`wavelet` with psi the wavelet {_name}.", wavelet=_name)
