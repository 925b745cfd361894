"""Formulas for the learned functions of a KAN convolution: a g(b x + c) + d with g from a short list.

Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, section 2.5.1 (symbolic functions by affine
parameters and R^2). A formula describes one edge at the centre of the kernel, on the values that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares

from kanseg.errors import UserError
from kanseg.layers import KANConv
from kanseg.study.visualize import learned_functions

Function = Callable[[np.ndarray], np.ndarray]


def _sigmoid(u: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(u / 2)))


# By how a formula is written, "{}" for its argument; the simpler before the richer.
LIBRARY: dict[str, Function] = {
    "{}": lambda u: u,
    "{}^2": np.square,
    "|{}|": np.abs,
    "{}^3": lambda u: u**3,
    "relu({})": lambda u: np.maximum(u, 0),
    "tanh({})": np.tanh,
    "sin({})": np.sin,
    "exp(-{}^2)": lambda u: np.exp(-np.square(u)),
    "exp({})": lambda u: np.exp(np.minimum(u, 30)),
    "silu({})": lambda u: u * _sigmoid(u),
}
BEND = np.concatenate([sign * np.geomspace(0.2, 6, 18) for sign in (1, -1)])  # b that the search begins from
SHIFT = np.linspace(-6, 6, 25)  # and c
NEAR = 0.005  # of R^2 that a simpler formula may be worse by


@dataclass(frozen=True)
class Formula:
    """a g(b x + c) + d for the edge from `channel` (within its group) to `output`; `r2` is 1 where it is exact.

    `strength` is the root mean square of the learned function about its mean.
    """

    output: int
    channel: int
    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    strength: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values of the formula."""
        return np.asarray(self.a * LIBRARY[self.name](self.b * np.asarray(x) + self.c) + self.d)

    def __str__(self) -> str:
        """As one writes it, to three digits."""
        inner = "x" if (self.b, self.c) == (1, 0) else f"({self.b:.3g} x {self.c:+.3g})"
        if self.name[:2] != "{}":  # the name has brackets of its own
            inner = inner.strip("()")
        if "-{}" in self.name and inner != "x":
            inner = f"({inner})"
        return f"{self.a:.3g} {self.name.format(inner)} {self.d:+.3g}"


def formulas(
    conv: KANConv, *, count: int = 12, value_range: tuple[float, float] = (-3.0, 3.0), points: int = 201
) -> list[Formula]:
    """Formulas of the `count` strongest functions of a KAN convolution, the strongest first.

    Args:
        value_range: inputs that count; those of a layer behind a norm are mostly within -3 and 3.

    Raises:
        UserError: the convolution is plain.
    """
    if conv.basis is None:
        raise UserError("The convolution is plain: it has no learned functions.")
    x = torch.linspace(*value_range, points)
    functions = learned_functions(conv, x).double().cpu().numpy()
    strength = functions.std(-1)
    strongest = np.argsort(-strength, axis=None, kind="stable")[:count]
    found = []
    for output, channel in zip(*np.unravel_index(strongest, strength.shape), strict=True):
        name, numbers, r2 = fit(x.double().numpy(), functions[output, channel])
        found.append(Formula(int(output), int(channel), name, *numbers, r2, float(strength[output, channel])))
    return found


def fit(x: np.ndarray, y: np.ndarray) -> tuple[str, tuple[float, float, float, float], float]:
    """Name, (a, b, c, d) and R^2 of the simplest formula that is nearly as good as the best, for values y at x.

    >>> name, numbers, r2 = fit(np.linspace(-3, 3, 61), 2 * np.linspace(-3, 3, 61) ** 2 - 1)
    >>> name, [round(number, 6) for number in numbers], round(r2, 6)
    ('{}^2', [2.0, 1.0, 0.0, -1.0], 1.0)
    """
    found = {name: _best(function, name, x, y) for name, function in LIBRARY.items()}
    best = max(r2 for _, r2 in found.values())
    name = next(name for name, (_, r2) in found.items() if r2 >= best - NEAR)
    return name, *found[name]


def _best(
    g: Function, name: str, x: np.ndarray, y: np.ndarray
) -> tuple[tuple[float, float, float, float], float]:
    """(a, b, c, d) of the least squares, and R^2: a search over b and c, refined; a and d follow from them."""
    if name == "{}":  # b and c say nothing that a and d do not
        return _numbers(g, (1.0, 0.0), x, y)
    if name == "{}^2":  # and nor does b
        starts = np.stack([np.ones_like(SHIFT), SHIFT], 1)
    else:
        starts = np.stack(np.meshgrid(BEND, SHIFT, indexing="ij"), -1).reshape(-1, 2)
    start = max(starts, key=lambda bc: _numbers(g, bc, x, y)[1])
    refined = least_squares(lambda bc: _residual(g, bc, x, y), start, max_nfev=100).x
    numbers, r2 = max((_numbers(g, bc, x, y) for bc in (start, refined)), key=lambda one: one[1])
    return numbers, r2


def _numbers(
    g: Function, bc: np.ndarray | tuple[float, float], x: np.ndarray, y: np.ndarray
) -> tuple[tuple[float, float, float, float], float]:
    values, wanted = g(bc[0] * x + bc[1]), y - y.mean()
    centred = values - values.mean()
    norm = centred @ centred
    a = float(centred @ wanted / norm) if norm > 0 else 0.0
    left = wanted - a * centred
    total = wanted @ wanted
    r2 = 1 - float(left @ left / total) if total > 0 else 1.0
    return (a, float(bc[0]), float(bc[1]), float(y.mean() - a * values.mean())), r2


def _residual(g: Function, bc: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (a, b, c, d), _ = _numbers(g, bc, x, y)
    return np.asarray(a * g(b * x + c) + d - y)
