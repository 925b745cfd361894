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
    before, moved = kan_layers(old), {}
    for name, layer in kan_layers(new).items():
        known = before.get(name)
        if known is None or _shape(known) != _shape(layer):
            continue
        _take_common(known.basis, layer.basis)
        given, own = (expanded(one, quantiles(channels_of(one))) for one in (known, layer))
        if given.shape == own.shape and torch.allclose(given, own, rtol=0, atol=NEGLIGIBLE):
            continue
        moved[f"{name}.basis_weight"] = fitted(known, given, own)
    return moved


def quantiles(channels: int) -> Tensor:
    """(channels, POINTS), float64: values of the normal distribution."""
    shares = torch.arange(1, POINTS + 1, dtype=torch.float64) / (POINTS + 1)
    return torch.special.ndtri(shares).expand(channels, -1)


def expanded(layer: Any, values: Tensor) -> Tensor:
    """What a layer weighs, at values of each channel: (channels, P) -> (channels, P, K), float64 on the CPU."""
    basis, act = (copy.deepcopy(part).double().cpu() for part in (layer.basis, layer.basis_act))
    return act(basis(values.double().cpu()[None]))[0].mT


def fitted(layer: Any, given: Tensor, own: Tensor) -> Tensor:
    """The basis weight of a layer for other functions, which come nearest to its own: least squares in each channel.

    Args:
        given: the layer's functions at some values, (channels, P, K), see `expanded`.
        own: the others at the same values, (channels, P, K').
    """
    change = torch.linalg.lstsq(own, given, driver="gelsd").solution  # (channels, K', K)
    weight = layer.basis_weight.detach().double().cpu()
    groups = getattr(layer, "groups", 1)
    grouped = weight.unflatten(1, (-1, given.shape[2])).unflatten(0, (groups, -1))  # (G, O/G, C/G, K, ...)
    moved = torch.einsum("gckj,gocj...->gock...", change.unflatten(0, (groups, -1)), grouped)
    return moved.flatten(0, 1).flatten(1, 2).float()


def channels_of(layer: Any) -> int:
    """Channels of a layer's input, of all its groups."""
    return getattr(layer, "groups", 1) * _shape(layer)[1]


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
