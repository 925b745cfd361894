"""Weights of one basis as weights of another: higher degrees, finer grids, or another family.

The functions of a trained layer are kept as far as the new basis has them: its weights are a least-squares fit at
values that follow the normal distribution, as the inputs of layers after a norm do. More degrees of the same
polynomials are exact (nearly so for Gram's, which all change with the degree); a finer grid is the grid extension of
Liu et al., KAN, arXiv 2404.19756, section 2.4.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.study.visualize import kan_layers

POINTS = 999
NEGLIGIBLE = 1e-6  # by which functions may differ that are the same


@torch.no_grad()
def refit(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """Basis weights of `new` that come nearest to the functions of `old`, by name, where their functions differ.

    Layers of the same name and channels are compared. What else they have in common must be in `new` already, but for
    vectors of learned numbers of its bases: the first ones of those that both have are taken over. Base branch, norm
    and activation are no part of it, nor is WavKAN, which has no basis.
    """
    before, fitted = kan_layers(old), {}
    for name, layer in kan_layers(new).items():
        known = before.get(name)
        if known is None or _shape(known) != _shape(layer):
            continue
        _take_common(known.basis, layer.basis)
        channels = _shape(layer)[1]
        given, own = (_values(one, channels) for one in (known, layer))
        if given.shape == own.shape and torch.allclose(given, own, rtol=0, atol=NEGLIGIBLE):
            continue
        change = torch.linalg.lstsq(own, given, driver="gelsd").solution  # (C, K of new, K of old)
        weight = known.basis_weight.unflatten(1, (channels, -1)).double()
        fitted[f"{name}.basis_weight"] = (
            torch.einsum("ckj,ocj...->ock...", change, weight).flatten(1, 2).float()
        )
    return fitted


def _values(layer: Any, channels: int) -> Tensor:
    """(channels, points, K), float64: what a layer weighs, at values of the normal distribution."""
    quantiles = torch.arange(1, POINTS + 1, dtype=torch.float64) / (POINTS + 1)
    basis = copy.deepcopy(layer.basis).double().cpu()
    return layer.basis_act(basis(torch.special.ndtri(quantiles).expand(1, channels, -1)))[0].mT


def _take_common(old: nn.Module, new: nn.Module) -> None:
    """Copy the first numbers of vectors that two bases have in common; places on a grid, which are no vectors, stay."""
    own: Mapping[str, Tensor] = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        given = own.get(name)
        if given is not None and given.dim() == parameter.dim() == 1:
            common = min(len(given), len(parameter))
            parameter[:common] = given[:common]


def _shape(layer: Any) -> tuple[int, ...]:
    """Outputs, channels and kernel of a layer, whatever its basis."""
    outputs, columns, *kernel = layer.basis_weight.shape
    return outputs, columns // layer.basis.num_functions, *kernel
