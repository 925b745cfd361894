"""Fine-tuning of few numbers: what is learnt lies beside frozen weights, and is added to them in the end.

Low rank: W + up down, with `rank` rows in between (LoRA: Hu et al., arXiv 2106.09685); the weight of a convolution is a
matrix of outputs by everything else. Chosen functions: the weights of some functions of a basis alone change, of a
polynomial those of its highest degrees, say (the scheme of torch-conv-kan's adapters). Both begin at the function that
the network computes, and `merge` leaves a network of the same layers as before. Higher degrees and finer grids are no
matter of training: see `kanseg.study.refit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kanseg.errors import UsageError
from kanseg.study.visualize import kan_layers

HEADS = "*head*"  # what gives the classes, in most networks
PLACE = ".parametrizations."  # torch's name for where a change lies
FROZEN = "_frozen_by_adapt"  # attribute of a network: names of its parameters


class LowRank(nn.Module):
    """W -> W + up down, W of any shape (rows, ...). `up` begins at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter(torch.randn_like(weight.new_empty(rank, columns)) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        # In full precision also under autocast: it is added once for all in the end.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.up @ self.down).view_as(weight)


class SomeFunctions(nn.Module):
    """W (outputs, channels * count, ...) -> W + change at the chosen ones of the `count` functions of each channel."""

    chosen: Tensor

    def __init__(self, weight: Tensor, count: int, chosen: Sequence[int]) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("chosen", torch.tensor(chosen, device=weight.device), persistent=False)
        by_channel = weight.unflatten(1, (-1, count))
        self.change = nn.Parameter(torch.zeros_like(by_channel[:, :, list(chosen)]))

    def forward(self, weight: Tensor) -> Tensor:
        by_channel = weight.unflatten(1, (-1, self.count))
        return by_channel.index_add(2, self.chosen.to(weight.device), self.change).flatten(1, 2)


def adapt(
    model: nn.Module, *, rank: int = 0, functions: Sequence[int] = (), train: Sequence[str] = (HEADS,)
) -> nn.Module:
    """Freeze a network but for changes beside its weights, in place.

    Vectors are trained as they are: norms, biases, the numbers of a recurrence. Larger ones of bases (scales of
    wavelets, phases, coefficients of rational functions) are frozen.

    Args:
        rank: of the changes of all weights; 0 for none.
        functions: numbers of basis functions, counted from 0, whose weights change in KAN layers; `rank` is then for
            the other weights.
        train: shell patterns of parameters that are trained as they are, the heads by default.

    Raises:
        UsageError: see `check_adapt`.
    """
    check_adapt(model, rank=rank, functions=functions, train=train)
    layers, frozen = kan_layers(model), []
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            whole = _under(name, key)
            kept = parameter.dim() < 2 or any(fnmatchcase(whole, pattern) for pattern in train)
            if kept or not parameter.requires_grad:
                continue
            frozen.append(whole)
            parameter.requires_grad_(False)
            if functions and name in layers and key == "basis_weight":
                change: nn.Module = SomeFunctions(parameter, layers[name].basis.num_functions, functions)
            elif rank and key.endswith("weight"):
                change = LowRank(parameter, rank)
            else:
                continue
            parametrize.register_parametrization(module, key, change)
    model.__dict__[FROZEN] = frozen
    return model


def check_adapt(
    model: nn.Module, *, rank: int = 0, functions: Sequence[int] = (), train: Sequence[str] = (HEADS,)
) -> None:
    """Whether a network can be adapted so.

    Raises:
        UsageError: neither rank nor functions, no KAN layer has such functions, a pattern that fits nothing, or a
            network that is adapted already or whose layers share a weight.
    """
    if rank < 0 or not (rank or functions):
        raise UsageError(
            f"adapt needs rank of 1 or more, or functions; got rank={rank}, functions={list(functions)}"
        )
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UsageError(
            "The network has parametrizations already (of adapt, or norms of weights); merge them first."
        )
    named = list(model.named_parameters(remove_duplicate=False))
    if len(named) > len({id(parameter) for _, parameter in named}):
        raise UsageError(
            "Layers of the network share a weight; adapt is for networks where each has its own."
        )
    for pattern in train:
        if pattern != HEADS and not any(fnmatchcase(name, pattern) for name, _ in named):
            raise UsageError(
                f"No parameter fits the pattern '{pattern}' of what is trained, e.g. {named[0][0]}."
            )
    _check_functions(kan_layers(model), functions)


def merge(model: nn.Module) -> nn.Module:
    """Add the changes to the weights, in place; what `adapt` froze is trained again."""
    for module in list(model.modules()):
        for key in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)
    for name in model.__dict__.pop(FROZEN, []):
        model.get_parameter(name).requires_grad_()
    return model


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of an adapted network as that of the network before; others as they are."""
    plain = {name: value for name, value in weights.items() if PLACE not in name}
    for name, module in model.named_modules():
        for key, change in getattr(module, "parametrizations", {}).items():
            place = f"{_under(name, PLACE[1:] + key)}."
            own = {n.removeprefix(place): value for n, value in weights.items() if n.startswith(place)}
            plain[_under(name, key)] = torch.func.functional_call(change, own, ()).detach()
    return plain


def _check_functions(layers: Mapping[str, Any], functions: Sequence[int]) -> None:
    if not functions:
        return
    if not layers:
        raise UsageError("functions are those of KAN layers, and the network has none. Give a rank.")
    fewest = min(layer.basis.num_functions for layer in layers.values())
    if not 0 <= min(functions) <= max(functions) < fewest or len(set(functions)) < len(functions):
        raise UsageError(
            f"functions must be different numbers of 0 to {fewest - 1}, for the bases have {fewest} functions; "
            f"got {list(functions)}"
        )


def _under(module: str, key: str) -> str:
    """The name of what is `key` in a module; the network itself has an empty name."""
    return f"{module}.{key}" if module else key
