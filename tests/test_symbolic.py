"""Formulas say what a layer has learned, and how well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from kanseg import KANConv
from kanseg.errors import UserError
from kanseg.study import formulas, learned_functions
from kanseg.study.symbolic import LIBRARY, Formula, fit

X = np.linspace(-3, 3, 201)


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("numbers", [(1.5, 1.3, -0.7, 0.4), (-0.3, 0.6, 1.1, -2.0)])
def test_a_function_of_the_list_is_found_again(name: str, numbers: tuple[float, ...]) -> None:
    a, b, c, d = numbers
    y = a * LIBRARY[name](b * X + c) + d
    found, fitted, r2 = fit(X, y)
    assert r2 > 0.995
    simpler = [*LIBRARY][: [*LIBRARY].index(name) + 1]
    assert found in simpler
    formula = Formula(0, 0, found, *fitted, r2, 1.0)
    assert np.mean((formula(X) - y) ** 2) == pytest.approx((1 - r2) * y.var(), abs=1e-9)
    if found == name:
        assert r2 > 1 - 1e-6


def test_no_formula_of_the_list_is_much_better() -> None:
    """Than the one that is given, by scipy's own search from its start."""
    rng = np.random.default_rng(0)
    y = np.polynomial.Polynomial(rng.normal(size=4))(X / 3) + 0.2 * np.sin(3 * X)
    _, _, r2 = fit(X, y)
    for function in LIBRARY.values():
        try:
            numbers, _ = curve_fit(lambda x, a, b, c, d, g=function: a * g(b * x + c) + d, X, y, (1, 1, 0, 0))
        except RuntimeError:
            continue
        a, b, c, d = numbers
        left = y - (a * function(b * X + c) + d)
        assert 1 - left.var() / y.var() < r2 + 0.01


def test_the_strongest_functions_of_a_layer_are_described() -> None:
    torch.manual_seed(0)
    conv = KANConv(3, 4, 6, basis="gram", groups=2)
    found = formulas(conv, count=5)
    functions = learned_functions(conv, torch.as_tensor(X, dtype=torch.float32)).numpy()
    strength = np.sort(functions.std(-1), axis=None)[::-1]
    np.testing.assert_allclose([one.strength for one in found], strength[:5], rtol=1e-4)
    for one in found:
        y = functions[one.output, one.channel]
        assert 1 - np.mean((one(X) - y) ** 2) / y.var() == pytest.approx(one.r2, abs=1e-4)


def test_a_layer_that_learned_a_sine_says_so() -> None:
    conv = KANConv(2, 1, 1, kernel_size=1, basis="bspline", grid_size=24, grid_range=(-3, 3), base=False)
    x = torch.linspace(-2.9, 2.9, 400)
    with torch.no_grad():
        phi = conv.basis(x.view(1, 1, -1))[0, 0]  # (K, points)
        solved = torch.linalg.lstsq(phi.T.double(), torch.sin(2 * x + 1).double()[:, None]).solution
        conv.basis_weight.copy_(solved.view_as(conv.basis_weight))
    (found,) = formulas(conv, value_range=(-2.8, 2.8))
    assert found.name == "sin({})"
    assert found.r2 > 0.999
    assert str(found).startswith(("1 sin(2 x +1)", "-1 sin(-2 x -1)"))


def test_formulas_are_written_as_one_does() -> None:
    assert str(Formula(0, 0, "{}", 2.0, 1.0, 0.0, -0.5, 1.0, 1.0)) == "2 x -0.5"
    assert str(Formula(0, 0, "{}^2", 2.0, 1.0, 0.5, 0.0, 1.0, 1.0)) == "2 (1 x +0.5)^2 +0"
    assert str(Formula(0, 0, "exp(-{}^2)", 2.0, 3.0, 0.5, 0.0, 1.0, 1.0)) == "2 exp(-(3 x +0.5)^2) +0"


def test_a_plain_convolution_has_none() -> None:
    with pytest.raises(UserError, match="plain"):
        formulas(KANConv(2, 1, 1, basis=None))
