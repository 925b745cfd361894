"""Every basis keeps the contract, and is what its name says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import interpolate, special
from torch import nn

from kanseg.bases import BASES, create_basis
from kanseg.bases.orthogonal import Gram
from kanseg.bases.wavelet import WAVELETS
from kanseg.errors import UsageError

ALL = BASES.names()


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("spatial", [(7,), (4, 5), (3, 4, 2)])
def test_adds_one_axis_in_every_dimension(name: str, spatial: tuple[int, ...]) -> None:
    basis = create_basis(name, channels=3)
    assert basis(torch.randn(2, 3, *spatial)).shape == (2, 3, basis.num_functions, *spatial)


def test_is_pointwise(name: str) -> None:
    basis, x = create_basis(name, channels=2), 0.3 * torch.randn(2, 2, 6)
    changed = x.clone()
    changed[1, 0, 3] += 0.5
    different = (basis(x) != basis(changed)).any(dim=2)
    assert different[1, 0, 3]
    assert different.sum() == 1


def test_functions_are_linearly_independent(name: str) -> None:
    basis = create_basis(name, channels=1).double()
    low, high = basis.domain
    t = torch.linspace(low + 1e-3, high - 1e-3, 400, dtype=torch.float64)
    singular = torch.linalg.svdvals(basis.evaluate(t.view(1, 1, -1))[0, 0])
    assert singular[-1] > 1e-3 * singular[0]


def test_gradient_is_right(name: str) -> None:
    basis = create_basis(name, channels=2).double()
    x = (torch.randn(1, 2, 5, dtype=torch.float64) * 0.4 + 0.013).requires_grad_()
    parameters = tuple(p for p in basis.parameters() if p.requires_grad)
    assert torch.autograd.gradcheck(lambda x, *_: basis(x), (x, *parameters))


def test_stays_finite_far_outside_its_domain(name: str) -> None:
    basis = create_basis(name, channels=1)
    x = torch.tensor([-1e6, -50.0, -3.0, 0.0, 3.0, 50.0, 1e6]).view(1, 1, -1).requires_grad_()
    y = basis(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


def test_is_evaluated_in_float32_under_autocast(name: str) -> None:
    basis, x = create_basis(name, channels=2), torch.randn(1, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, full = basis(x.bfloat16()), basis(x.bfloat16().float())
    assert low.dtype == torch.float32
    assert torch.equal(low, full)


def test_follows_the_module_to_float64(name: str) -> None:
    assert create_basis(name, channels=2).double()(torch.randn(1, 2, 3).double()).dtype == torch.float64


GRID = torch.linspace(-1, 1, 41, dtype=torch.float64)
POLYNOMIALS = [
    ("legendre", {}, lambda n, t: special.eval_legendre(n, t)),
    ("chebyshev", {}, lambda n, t: special.eval_chebyt(n, t)),
    ("hermite", {}, lambda n, t: special.eval_hermitenorm(n, t)),
    ("jacobi", {"a": 1.0, "b": 1.0}, lambda n, t: special.eval_jacobi(n, 1.0, 1.0, t)),
    ("jacobi", {"a": 0.5, "b": 1.5}, lambda n, t: special.eval_jacobi(n, 0.5, 1.5, t)),
    ("jacobi", {"a": 0.0, "b": 0.0}, lambda n, t: special.eval_legendre(n, t)),
]


@pytest.mark.parametrize(("basis", "options", "reference"), POLYNOMIALS)
def test_polynomials_are_scipys(basis: str, options: dict, reference) -> None:
    ours = create_basis(basis, channels=1, degree=6, **options).double().evaluate(GRID.view(1, 1, -1))[0, 0]
    theirs = np.stack([reference(n, GRID.numpy()) for n in range(7)])
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


WEIGHTS = {
    "legendre": lambda t: np.ones_like(t),
    "chebyshev": lambda t: 1 / np.sqrt(1 - t**2),
    "jacobi": lambda t: (1 - t) * (1 + t),
}


@pytest.mark.parametrize("basis", WEIGHTS)
def test_polynomials_are_orthogonal_by_quadrature(basis: str) -> None:
    nodes, weights = special.roots_chebyt(64)  # exact for p(t) / sqrt(1 - t^2)
    values = (
        create_basis(basis, channels=1, degree=5).double().evaluate(torch.tensor(nodes).view(1, 1, -1))[0, 0]
    )
    gram = (values.numpy() * weights * WEIGHTS[basis](nodes) * np.sqrt(1 - nodes**2)) @ values.numpy().T
    off_diagonal = gram - np.diag(np.diag(gram))
    tolerance = 2e-3 if basis != "chebyshev" else 1e-12  # sqrt(1 - t^2) is not a polynomial
    assert np.abs(off_diagonal).max() < tolerance * np.abs(np.diag(gram)).max()


@pytest.mark.parametrize(("degree", "points"), [(3, None), (5, None), (4, 20)])
def test_gram_polynomials_are_orthogonal_on_their_points(degree: int, points: int | None) -> None:
    basis = Gram(degree, points).double()
    count = points or degree + 1
    t = (2 * torch.arange(count, dtype=torch.float64) + 1 - count) / count
    values = basis.evaluate(t.view(1, 1, -1))[0, 0]
    products = (values @ values.T).detach()
    assert (products - products.diag().diag()).abs().max() < 1e-12


def test_degree_zero_is_the_constant() -> None:
    for name in ("legendre", "chebyshev", "gram", "hermite", "jacobi", "bernstein", "fourier"):
        basis = create_basis(name, channels=1, degree=0)
        assert torch.equal(basis(torch.randn(1, 1, 4)), torch.ones(1, 1, 1, 4))


@pytest.mark.parametrize(
    ("name", "options"), [("bernstein", {"degree": 4}), ("bspline", {}), ("bspline", {"spline_order": 2})]
)
def test_partition_of_unity(name: str, options: dict) -> None:
    basis = create_basis(name, channels=1, **options).double()
    t = torch.linspace(*basis.domain, 101, dtype=torch.float64)[:-1]
    total = basis.evaluate(t.view(1, 1, -1)).sum(dim=2)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_bernstein_polynomials_are_binomial_probabilities() -> None:
    from scipy.stats import binom

    t = np.linspace(0, 1, 21)
    ours = (
        create_basis("bernstein", channels=1, degree=5)
        .double()
        .evaluate(torch.tensor(t).view(1, 1, -1))[0, 0]
    )
    np.testing.assert_allclose(ours.numpy(), np.stack([binom.pmf(k, 5, t) for k in range(6)]), atol=1e-12)


@pytest.mark.parametrize(("order", "size"), [(1, 3), (2, 4), (3, 5), (4, 6), (5, 5)])
def test_bsplines_are_scipys(order: int, size: int) -> None:
    low, high = -1.0, 1.0
    step = (high - low) / size
    knots = np.linspace(low - order * step, high + order * step, size + 2 * order + 1)
    t = np.linspace(-1.6, 1.6, 97)
    theirs = np.stack(
        [
            np.nan_to_num(interpolate.BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)(t))
            for i in range(size + order)
        ]
    )
    basis = create_basis("bspline", channels=1, grid_size=size, spline_order=order).double()
    ours = basis.evaluate(torch.tensor(t).view(1, 1, -1))[0, 0]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)


def test_rbf_is_a_gaussian_at_its_centres() -> None:
    basis = create_basis("rbf", channels=1, grid_size=5, grid_range=(-1.0, 1.0))
    values = basis(torch.linspace(-1, 1, 5).view(1, 1, -1))[0, 0]
    distance = torch.arange(5).view(-1, 1) - torch.arange(5)
    torch.testing.assert_close(values, torch.exp(-(distance.float() ** 2)))


def test_relu_bumps_peak_at_one_between_their_phases() -> None:
    basis = create_basis("relu", channels=None)
    middle = ((basis.phase_low + basis.phase_high) / 2).detach()
    peaks = basis(middle.view(1, 1, -1))[0, 0].diag()
    torch.testing.assert_close(peaks, torch.ones_like(peaks))


@pytest.mark.parametrize("name", ["mexican_hat", "morlet", "dog"])
def test_wavelets_have_no_mean(name: str) -> None:
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    mean = torch.trapezoid(WAVELETS[name](z), z)
    assert abs(mean) < 1e-4  # morlet without its correction term: 1e-5


def test_mexican_hat_is_the_second_derivative_of_a_gaussian() -> None:
    z = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(torch.exp(-(z**2) / 2).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    torch.testing.assert_close(WAVELETS["mexican_hat"](z), -second * 2 / (3**0.5 * torch.pi**0.25))


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_fourier_functions_are_cosines_and_sines(degree: int) -> None:
    t = torch.linspace(-7, 7, 41, dtype=torch.float64)
    ours = create_basis("fourier", channels=1, degree=degree).evaluate(t.view(1, 1, -1))[0, 0]
    waves = [wave(k * t) for k in range(1, degree + 1) for wave in (torch.cos, torch.sin)]
    torch.testing.assert_close(ours, torch.stack([torch.ones_like(t), *waves]))


@pytest.mark.parametrize(("start", "function"), [("silu", nn.functional.silu), ("identity", nn.Identity())])
def test_rational_functions_start_as_asked_and_follow_their_coefficients(start: str, function: Any) -> None:
    basis = create_basis("rational", channels=4, groups=2, start=start).double()
    t = torch.linspace(-3, 3, 31, dtype=torch.float64)
    start_values = basis(t.view(1, 1, -1).expand(1, 4, -1))
    assert (start_values - function(t)).abs().max() < 0.01
    start_values.square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in basis.parameters())  # nothing is stuck
    nn.init.normal_(basis.numerator)
    nn.init.normal_(basis.denominator)
    values = basis(t.view(1, 1, -1).expand(1, 4, -1))[0, :, 0].detach().numpy()
    for channel in range(4):
        a, b = (sets[channel // 2].detach().numpy() for sets in (basis.numerator, basis.denominator))
        top, bottom = np.polyval(a[::-1], t.numpy()), np.polyval([*b[::-1], 0.0], t.numpy())
        np.testing.assert_allclose(values[channel], top / (1 + np.abs(bottom)))


@pytest.mark.parametrize("name", BASES.names())
def test_a_shared_function_is_one_sum_a_group_of_channels(name: str) -> None:
    basis = create_basis(name, channels=6, shared_by=2).double()
    x = torch.randn(2, 12, 5, dtype=torch.float64)  # two groups of a convolution, 6 channels each
    phi = basis.basis(x)
    sets = basis.coefficients[[0, 0, 0, 1, 1, 1] * 2]
    torch.testing.assert_close(basis(x)[:, :, 0], torch.einsum("nckp,ck->ncp", phi, sets))
    assert basis.num_functions == 1


def test_groups_that_do_not_divide_the_channels_are_made_to() -> None:
    assert len(create_basis("gram", channels=1, shared_by=8).coefficients) == 1
    assert len(create_basis("rational", channels=12, groups=8).numerator) == 4


def test_unknown_names_and_options_are_explained() -> None:
    with pytest.raises(UsageError, match="'grm'.*Did you mean 'gram'"):
        create_basis("grm", channels=1)
    with pytest.raises(UsageError, match="Unknown start 'sliu'.*Did you mean 'silu'"):
        create_basis("rational", channels=1, start="sliu")
    with pytest.raises(UsageError, match="basis 'gram' has no option 'grid_size'. Known: degree"):
        create_basis("gram", channels=1, grid_size=3)
    with pytest.raises(UsageError, match="degree must be 0 or more"):
        create_basis("legendre", channels=1, degree=-1)
