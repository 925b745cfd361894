"""What there is: every network and encoder with its parameters, without making its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kanseg.encoders import ENCODERS, create_encoder
from kanseg.errors import UsageError
from kanseg.models.model import MODELS, create_model

CHANNELS, CLASSES = 1, 3


def table_of_models() -> list[dict[str, Any]]:
    """Name, kind ("network" or "encoder"), parameters in 2D and 3D at the defaults, and a description.

    Counted for one image channel and three classes, None where there is none in a dimension; encoders also serve in
    `Classifier`.
    """
    rows = [_row(name, "network", MODELS.describe(name), _network) for name in MODELS]
    return rows + [_row(name, "encoder", ENCODERS.describe(name), _encoder) for name in ENCODERS]


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Parameters of what `make` makes, on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def count_flops(make: Callable[[], nn.Module], size: Sequence[int]) -> int:
    """Operations of a forward pass over an input (N, C, *S), counted without computing it.

    The rule is `torch.utils.flop_counter`'s: a multiplication with its addition counts two, of convolutions and matrix
    products as they are written (no shortcut such as Winograd's counts); norms and activations do not count. A KAN
    convolution is one over its expanded input, without the functions that are constant.
    """
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        make().eval()(torch.empty(tuple(size)))
    return int(counter.get_total_flops())


def _row(name: str, kind: str, description: str, make: Callable[[str, int], nn.Module]) -> dict[str, Any]:
    counts: dict[str, int | None] = {}
    for dims in (2, 3):
        try:
            counts[f"parameters_{dims}d"] = count_parameters(partial(make, name, dims))
        except UsageError:  # not for this dimension
            counts[f"parameters_{dims}d"] = None
    return {"name": name, "kind": kind, **counts, "description": description}


def _network(name: str, dims: int) -> nn.Module:
    return create_model(name, dims, CHANNELS, CLASSES)


def _encoder(name: str, dims: int) -> nn.Module:
    return create_encoder(name, dims, CHANNELS)
