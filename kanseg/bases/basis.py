"""The contract of a basis: K univariate functions of one number, applied to every element of a tensor.

A basis knows nothing of images: `basis(x)` turns (N, C, *spatial) into (N, C, K, *spatial). It first brings any real
number into its domain by `squash`, then evaluates its functions there, always at least in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.errors import UsageError, did_you_mean
from kanseg.registry import Registry

BASES = Registry("basis")


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def tanh(x: Tensor) -> Tensor:
    """tanh by the sigmoid, which is about ten times faster on a CPU (absolute error 1e-7)."""
    return torch.sigmoid(2 * x) * 2 - 1


SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "tanh": tanh,
    "sigmoid": torch.sigmoid,
}


def as_squash(squash: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A map of the real line into the domain of a basis, by name or as it is."""
    if callable(squash):
        return squash
    if squash not in SQUASHES:
        raise UsageError(f"Unknown squash '{squash}'.{did_you_mean(squash, SQUASHES)}")
    return SQUASHES[squash]


class Basis(nn.Module):
    """K functions phi_k. Subclasses set `num_functions` and implement `functions`.

    Attributes:
        num_functions: K.
        domain: the interval on which `evaluate` is meant to be used.
        constant: "first" where phi_0 is 1, "sum" where all functions add up to 1, so that a convolution can do without
            phi_0; else None.
        pointwise: whether `squash` looks at one number alone; only what compat makes does not.
        kind: the class whose functions these are in float32, which the kernels know; default its own.
    """

    domain: tuple[float, float] = (-1.0, 1.0)
    constant: str | None = None
    kind: type[Basis]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = vars(cls).get("kind", cls)

    def __init__(self, num_functions: int, squash: str | Callable[[Tensor], Tensor] = "identity") -> None:
        super().__init__()
        if num_functions < 1:
            raise UsageError(f"{type(self).__name__} needs at least one function, got {num_functions}")
        self.num_functions = num_functions
        self.squash = as_squash(squash)
        self.pointwise: bool = getattr(squash, "pointwise", True)

    def functions(self, t: Tensor) -> list[Tensor]:
        """phi_0(t) ... phi_{K-1}(t) for t in the domain, each (N, C, *spatial) as t is."""
        raise NotImplementedError(f"{type(self).__name__} does not define its functions")

    def evaluate(self, t: Tensor) -> Tensor:
        """phi_k(t) for t in the domain: (N, C, *spatial) -> (N, C, K, *spatial)."""
        return torch.stack(self.functions(t), dim=2)

    def of(self, x: Tensor) -> list[Tensor]:
        """phi_k(squash(x)), each (N, C, *spatial), in float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return self.functions(self.squash(x.float() if x.dtype.itemsize < 4 else x))

    def forward(self, x: Tensor) -> Tensor:
        """phi_k(squash(x)): (N, C, *spatial) -> (N, C, K, *spatial), in float32 also under autocast."""
        return torch.stack(self.of(x), dim=2)

    def extra_repr(self) -> str:
        return f"num_functions={self.num_functions}"


def beside(parameter: Tensor, t: Tensor) -> Tensor:
    """View numbers a channel, (C,), so that they broadcast against t, (N, C, *spatial)."""
    return parameter.to(t.dtype).reshape(-1, *[1] * (t.dim() - 2))
