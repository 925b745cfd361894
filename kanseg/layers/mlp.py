"""Fully connected layers of the families of `kanseg.layers.families` with norm and activation, and networks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from kanseg.bases import BASES
from kanseg.errors import ShapeError, UsageError, refused_options
from kanseg.layers.families import family_name
from kanseg.layers.linear import BottleneckKANLinear, KANLinear, WaveletLinear, feature_norm
from kanseg.layers.norms import ActSpec, activation


class LinearLayer(nn.Module):
    """act(norm(linear(x))) on the last axis, (*, in_features) -> (*, out_features).

    Args:
        linear: the class; takes (in_features, out_features, **options).
        norm: "layer", "batch" or None.
        act: activation name or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        linear: Callable[..., nn.Module] = KANLinear,
        norm: str | None = "layer",
        act: ActSpec = "silu",
        **options: Any,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise UsageError(f"features must be positive, got {in_features} in and {out_features} out")
        self.in_features = in_features
        with refused_options(f"{linear.__name__}"):
            self.linear = linear(in_features, out_features, **options)
        self.norm = feature_norm(norm, out_features)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ShapeError(
                f"expected floating point numbers of shape (*, {self.in_features}), got {x.dtype} of {tuple(x.shape)}"
            )
        y = self.act(self.norm(self.linear(x.reshape(-1, x.shape[-1]))))
        return y.view(*x.shape[:-1], y.shape[-1])


FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"basis": None},
    "kan": {"basis": "bspline", "base_act": "gelu", "act": "prelu"},
    "fastkan": {"basis": "rbf", "input_norm": "layer", "bias": True, "norm": None, "act": None},
    "kaln": {"basis": "legendre"},
    "kacn": {"basis": "chebyshev", "base": False, "norm": None, "act": None},
    "kagn": {"basis": "gram", "basis_act": "silu"},
    "kajn": {"basis": "jacobi"},
    "kabn": {"basis": "bernstein"},
    "relukan": {"basis": "relu", "base": False, "bias": True, "norm": None, "act": None},
    "grkan": {"basis": "rational", "base": False},
    "wavkan": {"linear": WaveletLinear, "norm": "batch", "act": None},
    "bottleneck_kagn": {"linear": BottleneckKANLinear, "basis": "gram", "basis_act": "silu"},
    "bottleneck_relukan": {"linear": BottleneckKANLinear, "basis": "relu"},
}
FAMILIES["kagn_v2"] = FAMILIES["kagn"]  # which differs in its convolution alone


def linear_layer(basis: str | None = "gram", **options: Any) -> partial[LinearLayer]:
    """A constructor of fully connected layers of one family, `layer(in_features, out_features)`.

    Args:
        basis: a family, a basis, or None for the plain layer.
        options: override the family's row (norm, act, degree, ...).
    """
    name = family_name(basis)
    return partial(LinearLayer, **{**FAMILIES.get(name, {"basis": name}), **options})


def own_options(basis: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a layer that are its functions': of a basis (degree, grid_size, ...), or the wavelet."""
    if basis is None or not isinstance(basis, str):
        return {}
    row = FAMILIES.get(family_name(basis), {"basis": basis})
    functions = row.get("basis")
    known = {"wavelet"} if functions is None else {*BASES.parameters(functions), "shared_by"} - {"channels"}
    return {name: value for name, value in options.items() if name in known}


class KANMLP(nn.Module):
    """Fully connected layers of one family one after the other, (*, features[0]) -> (*, features[-1]).

    Args:
        features: numbers of features, from input to output.
        basis, options: see `linear_layer`.
        dropout: probability between the layers, and before the first with `first_dropout`.

    >>> import torch
    >>> KANMLP((5, 8, 3), "bspline")(torch.zeros(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        features: Sequence[int],
        basis: str | None = "gram",
        *,
        dropout: float = 0.0,
        first_dropout: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise UsageError(f"features needs at least an input and an output, got {list(features)}")
        layer = linear_layer(basis, **options)
        self.layers = nn.ModuleList(layer(*pair) for pair in pairwise(features))
        self.dropout, self.first_dropout = nn.Dropout(dropout), first_dropout

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(self.dropout(x) if number or self.first_dropout else x)
        return x
