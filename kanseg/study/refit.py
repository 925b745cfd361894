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
NEGLIGIBLE = 1e-5  # by which a fit may differ from the weights as they are


@torch.no_grad()
def refit(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """Basis weights of `new` that come nearest to the functions of `old`, by name, where the two bases differ.

    Layers of the same name are compared; what else they have in common must be in `new` already, but for learned
    numbers of its bases: those that both have are taken over.
    """
    before, fitted = kan_layers(old), {}
    for name, layer in kan_layers(new).items():
        known = before.get(name)
        if known is None or not _alike(known, layer):
            continue
        take_common(known.basis, layer.basis)
        channels = known.basis_weight.shape[1] // known.basis.num_functions
        change = change_of_basis(known, layer, channels)
        same = torch.eye(*change.shape[1:], dtype=change.dtype)
        if known.basis_weight.shape == layer.basis_weight.shape and (change - same).abs().max() < NEGLIGIBLE:
            continue
        weight = known.basis_weight.unflatten(1, (channels, -1)).double()
        fitted[f"{name}.basis_weight"] = (
            torch.einsum("ckj,ocj...->ock...", change, weight).flatten(1, 2).float()
        )
    return fitted


@torch.no_grad()
def change_of_basis(old: Any, new: Any, channels: int) -> Tensor:
    """(channels, K of new, K of old), float64: what each old function is in new ones.

    Args:
        old, new: layers with `basis` and `basis_act`.
    """
    quantiles = torch.arange(1, POINTS + 1, dtype=torch.float64) / (POINTS + 1)
    x = torch.special.ndtri(quantiles).expand(1, channels, -1)
    values = [layer.basis_act(_double(layer.basis)(x))[0].mT for layer in (old, new)]  # (C, points, K)
    return torch.linalg.lstsq(values[1], values[0], driver="gelsd").solution


@torch.no_grad()
def take_common(old: nn.Module, new: nn.Module) -> None:
    """Copy the learned numbers that two bases have in common: the first ones of each parameter of the same name."""
    own: Mapping[str, Tensor] = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        given = own.get(name)
        if given is not None and given.dim() == parameter.dim():
            common = tuple(slice(min(a, b)) for a, b in zip(given.shape, parameter.shape, strict=True))
            parameter[common] = given[common]


def _alike(old: Any, new: Any) -> bool:
    """Whether two layers differ in their bases alone."""
    shapes = (
        (
            len(layer.basis_weight),
            layer.basis_weight.shape[1] // layer.basis.num_functions,
            *layer.basis_weight.shape[2:],
        )
        for layer in (old, new)
    )
    return len(set(shapes)) == 1


def _double(basis: nn.Module) -> nn.Module:
    return copy.deepcopy(basis).double().cpu()
