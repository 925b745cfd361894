"""Fully connected KAN layers.

y = W_base act(x) + W_basis Phi(x) on the last axis of x, where Phi gives K numbers a feature. Sources: those of the
bases; the rows follow the fully connected layers of torch-conv-kan (Drokin, arXiv 2407.01092).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.bases import Basis, check_left_aside, create_basis
from kanseg.bases.wavelet import get_wavelet
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.bottleneck import inner_width
from kanseg.layers.kernels.recipe import watched
from kanseg.layers.norms import ActSpec, activation
from kanseg.layers.recompute import recomputed

EDGES_AT_ONCE = (
    1 << 18
)  # (row, output, input) triples whose wavelet is evaluated together: they stay in the cache
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


def feature_norm(norm: str | None, features: int) -> nn.Module:
    """A norm of rows (M, features): "layer", "batch" or None."""
    if norm is None:
        return nn.Identity()
    if norm not in NORMS:
        raise UsageError(f"Unknown norm '{norm}' of fully connected layers.{did_you_mean(norm, NORMS)}")
    return NORMS[norm](features)


def new_weight(out_features: int, in_features: int) -> nn.Parameter:
    """Unit-gain Kaiming uniform values."""
    bound = math.sqrt(3 / in_features)
    return nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))


class KANLinear(nn.Module):
    """Fully connected KAN layer, rows (M, in_features) -> (M, out_features). `basis=None` is the plain one.

    Args:
        basis: name in `kanseg.bases.BASES`, a `Basis`, or None; `basis_options` are its arguments.
        base, base_act, basis_act, recompute: as in `KANConv`.
        input_norm: "layer", "batch" or None, before the basis.
        bias: add a number a feature.
    """

    basis: Any  # a Basis; None makes the plain layer
    basis_weight: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        basis: str | Basis | Callable[..., Basis] | None = "gram",
        base: bool = True,
        base_act: ActSpec = "silu",
        basis_act: ActSpec = None,
        input_norm: str | None = None,
        bias: bool = False,
        recompute: bool = True,
        **basis_options: Any,
    ) -> None:
        super().__init__()
        if basis is None:
            check_left_aside(basis_options)
            base, base_act = True, None
        self.basis = None if basis is None else create_basis(basis, in_features, **basis_options)
        self.base_act, self.basis_act = activation(base_act), activation(basis_act)
        self.base_weight = new_weight(out_features, in_features) if base else None
        self.basis_weight = (
            None if self.basis is None else new_weight(out_features, in_features * self.basis.num_functions)
        )
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.input_norm = feature_norm(input_norm, in_features)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.expand_and_map(x, self.input_norm(x))
        return recomputed(self.expand_and_map, x, self.input_norm(x), preserve_rng_state=False)

    def expand_and_map(self, x: Tensor, normed: Tensor) -> Tensor:
        """The layer of rows and of what the basis sees of them."""
        y = None if self.base_weight is None else F.linear(self.base_act(x), self.base_weight, self.bias)
        if self.basis is None:
            return y  # type: ignore[return-value]
        bias = self.bias if y is None else None
        weight = self.basis_weight
        if watched(self.basis):
            functions = self.basis_act(self.basis(normed)).flatten(1)
        else:  # function by function, which joins faster
            functions = torch.cat([self.basis_act(f) for f in self.basis.of(normed)], dim=1)
            weight = weight.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1)
        term = F.linear(functions.to(weight.dtype), weight, bias)
        return term if y is None else y + term


class WaveletLinear(nn.Module):
    """y_o = sum_c w_oc psi((x_c - t_oc) / s_oc) + V act(x), rows (M, in_features) -> (M, out_features) (Wav-KAN).

    Args:
        wavelet: name in `kanseg.bases.wavelet.WAVELETS`, or psi itself.
        base_act: activation of the base branch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        wavelet: str | Callable[[Tensor], Tensor] = "mexican_hat",
        base_act: ActSpec = "silu",
    ) -> None:
        super().__init__()
        self.psi = get_wavelet(wavelet)
        self.base_act = activation(base_act)
        self.scale = nn.Parameter(torch.ones(out_features, in_features))
        self.translation = nn.Parameter(torch.zeros(out_features, in_features))
        self.wavelet_weight = new_weight(out_features, in_features)
        self.base_weight = new_weight(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, EDGES_AT_ONCE // self.scale.numel())
        cut = [x] if torch.compiler.is_compiling() else x.split(rows)  # the compiler knows no number of rows
        return torch.cat([recomputed(self._map, part, preserve_rng_state=False) for part in cut])

    def _map(self, x: Tensor) -> Tensor:
        z = (x.unsqueeze(1) - self.translation) / self.scale
        return (self.psi(z) * self.wavelet_weight).sum(2) + F.linear(self.base_act(x), self.base_weight)


class BottleneckKANLinear(nn.Module):
    """y = up(W Phi(down(x))) + V act(x), rows (M, in_features) -> (M, out_features).

    Args:
        dim_reduction, min_internal: see `kanseg.layers.bottleneck.inner_width`.
        base_act: activation of the base branch.
        options: of the narrow `KANLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dim_reduction: float = 8,
        min_internal: int = 16,
        base_act: ActSpec = "silu",
        **options: Any,
    ) -> None:
        super().__init__()
        inner = inner_width(in_features, out_features, dim_reduction, min_internal)
        self.down, self.up = nn.Linear(in_features, inner), nn.Linear(inner, out_features)
        self.inner = KANLinear(inner, inner, base=False, input_norm=None, recompute=False, **options)
        self.base_weight = new_weight(out_features, in_features)
        self.base_act = activation(base_act)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._map, x, preserve_rng_state=False)

    def _map(self, x: Tensor) -> Tensor:
        y = self.up(self.inner(self.down(x)))
        return y + F.linear(self.base_act(x), self.base_weight)
