"""The table of networks and how one is made from it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from kanseg.errors import UsageError, did_you_mean
from kanseg.registry import Registry

MODELS = Registry("model")


def list_models() -> list[str]:
    """Names that `create_model` knows.

    >>> "ukanet" in list_models()
    True
    """
    return MODELS.names()


def describe_model(name: str) -> str:
    """The first line of the model's documentation."""
    return (inspect.getdoc(MODELS.get(name)) or "").partition("\n")[0]


def create_model(
    name: str, spatial_dims: int, in_channels: int, out_channels: int, **options: Any
) -> nn.Module:
    """A network by name. In `eval()` its forward returns one logits tensor, (N, out_channels, *S).

    Raises:
        UsageError: unknown name or option (the nearest one is named), or values that do not fit together.
    """
    entry = MODELS.get(name)
    known = [p for p in inspect.signature(entry).parameters if p not in ("self", "kwargs")]
    for option in options:
        if option not in known:
            raise UsageError(f"Model '{name}' has no option '{option}'.{did_you_mean(option, known)}")
    return entry(spatial_dims, in_channels, out_channels, **options)
