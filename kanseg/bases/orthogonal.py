"""Orthogonal polynomials: Legendre, Chebyshev, Hermite, Jacobi and Gram, all by one three-term recurrence.

P_0 = 1, P_1 = a_1 t + b_1, P_n = (a_n t + b_n) P_{n-1} - c_n P_{n-2}. A family is its coefficients (a, b, c).
The input is squashed into [-1, 1] by tanh, so every function stays bounded for any voxel value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kanseg.bases.basis import BASES, Basis
from kanseg.errors import UsageError

Coefficients = tuple[float, float, float]
Squash = str | Callable[[Tensor], Tensor]


class OrthogonalPolynomials(Basis):
    """P_0 ... P_degree of a family given by `coefficients(n) -> (a_n, b_n, c_n)` for n >= 1.

    Args:
        degree: highest degree D; there are K = D + 1 functions. 0 is the constant alone.
        coefficients: the recurrence of the family.
        squash: map of the input into [-1, 1].
    """

    constant = "first"

    def __init__(
        self,
        degree: int,
        coefficients: Callable[[int], Coefficients],
        squash: Squash = "tanh",
    ) -> None:
        if degree < 0:
            raise UsageError(f"degree must be 0 or more, got {degree}")
        super().__init__(degree + 1, squash)
        self.degree = degree
        self.recurrence = [coefficients(n) for n in range(1, degree + 1)]

    def functions(self, t: Tensor) -> list[Tensor]:
        functions = [torch.ones_like(t)]
        for n, (a, b, c) in enumerate(self.recurrence, start=1):
            slope = t if (a, b) == (1.0, 0.0) else a * t + b
            following = slope * functions[-1] if n > 1 else slope
            functions.append(following - self.coefficient(n, c) * functions[-2] if c else following)
        return functions

    def coefficient(self, n: int, c: float) -> float | Tensor:
        """The factor of P_{n-2}; learned bases scale it."""
        return c


@BASES.register("legendre")
def legendre(degree: int = 3, channels: int | None = None, squash: Squash = "tanh") -> Basis:
    """Legendre polynomials, orthogonal on [-1, 1] with weight 1 (KALN)."""
    return OrthogonalPolynomials(degree, lambda n: ((2 * n - 1) / n, 0.0, (n - 1) / n), squash)


@BASES.register("chebyshev")
def chebyshev(degree: int = 3, channels: int | None = None, squash: Squash = "tanh") -> Basis:
    """Chebyshev polynomials of the first kind, weight (1 - t^2)^(-1/2) (KACN)."""
    return OrthogonalPolynomials(degree, lambda n: (1.0 if n == 1 else 2.0, 0.0, float(n > 1)), squash)


@BASES.register("hermite")
def hermite(degree: int = 3, channels: int | None = None, squash: Squash = "tanh") -> Basis:
    """Monic Hermite polynomials He_n, weight exp(-t^2 / 2) on the real line."""
    return OrthogonalPolynomials(degree, lambda n: (1.0, 0.0, n - 1.0), squash)


@BASES.register("jacobi")
def jacobi(
    degree: int = 3, a: float = 1.0, b: float = 1.0, channels: int | None = None, squash: Squash = "tanh"
) -> Basis:
    """Jacobi polynomials P^(a, b), weight (1 - t)^a (1 + t)^b, a, b > -1 (KAJN)."""
    if min(a, b) <= -1:
        raise UsageError(f"Jacobi polynomials need a, b > -1, got a={a}, b={b}")

    def coefficients(n: int) -> Coefficients:
        if n == 1:
            return (a + b + 2) / 2, (a - b) / 2, 0.0
        s = 2 * n + a + b
        scale = 2 * n * (n + a + b)
        return (
            s * (s - 1) / scale,
            (s - 1) * (a * a - b * b) / (scale * (s - 2)),
            2 * (n + a - 1) * (n + b - 1) * s / (scale * (s - 2)),
        )

    return OrthogonalPolynomials(degree, coefficients, squash)


@BASES.register("gram")
class Gram(OrthogonalPolynomials):
    """Gram (discrete Chebyshev) polynomials with a learned recurrence (KAGN).

    Monic, orthogonal at start on `points` equally spaced points t_i = (2i + 1 - points) / points:
    c_{n+1} = n^2 (points^2 - n^2) / (points^2 (4 n^2 - 1)). Each c is multiplied by a learned weight that starts at 1.

    Args:
        degree: highest degree.
        points: number of points of the grid, more than `degree`; default degree + 1.
    """

    def __init__(
        self,
        degree: int = 3,
        points: int | None = None,
        squash: Squash = "tanh",
        channels: int | None = None,
    ) -> None:
        points = degree + 1 if points is None else points
        if points <= degree:
            raise UsageError(
                f"Gram polynomials of degree {degree} need more than {degree} points, got {points}"
            )

        def coefficients(n: int) -> Coefficients:
            m = n - 1
            return 1.0, 0.0, m * m * (points**2 - m * m) / (points**2 * (4 * m * m - 1)) if m else 0.0

        super().__init__(degree, coefficients, squash)
        self.beta = nn.Parameter(torch.ones(max(degree - 1, 0)))

    def coefficient(self, n: int, c: float) -> Tensor:
        return self.beta[n - 2] * c
