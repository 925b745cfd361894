"""What there is: every network and encoder with its parameters, without making its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from kanseg.encoders import ENCODERS, create_encoder
from kanseg.models.model import MODELS, create_model

CHANNELS, CLASSES = 1, 3


def table_of_models() -> list[dict[str, Any]]:
    """Name, kind ("network" or "encoder"), parameters in 2D and 3D at the defaults, and a description.

    Counted for one image channel and three classes; encoders also serve in `Classifier`.
    """
    rows = [_row(name, "network", MODELS.describe(name), _network) for name in MODELS]
    return rows + [_row(name, "encoder", ENCODERS.describe(name), _encoder) for name in ENCODERS]


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Parameters of what `make` makes, on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def _row(name: str, kind: str, description: str, make: Callable[[str, int], nn.Module]) -> dict[str, Any]:
    counts = {f"parameters_{dims}d": count_parameters(partial(make, name, dims)) for dims in (2, 3)}
    return {"name": name, "kind": kind, **counts, "description": description}


def _network(name: str, dims: int) -> nn.Module:
    return create_model(name, dims, CHANNELS, CLASSES)


def _encoder(name: str, dims: int) -> nn.Module:
    return create_encoder(name, dims, CHANNELS)
