"""The table of networks and how one is made from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch import nn

from kanseg.errors import UsageError, did_you_mean, refused_options, unknown_option
from kanseg.registry import Registry

MODELS = Registry("model")
CLASSIFIERS = Registry("classifier")  # logits for the whole image; not among `list_models`
TABLES = {"segmentation": MODELS, "classification": CLASSIFIERS}  # by the task of a plan


def list_models() -> list[str]:
    """Names that `create_model` knows.

    >>> "ukanet" in list_models()
    True
    """
    return MODELS.names()


def table_of(name: str) -> Registry:
    """The table that has a model of this name; `UsageError` with the nearest name for an unknown one."""
    if name not in MODELS and name not in CLASSIFIERS:
        raise UsageError(f"Unknown model '{name}'.{did_you_mean(name, [*MODELS, *CLASSIFIERS])}")
    return CLASSIFIERS if name in CLASSIFIERS else MODELS


def describe_model(name: str) -> str:
    """The first line of the model's documentation."""
    return MODELS.describe(name)


def create_model(
    name: str, spatial_dims: int, in_channels: int, out_channels: int, **options: Any
) -> nn.Module:
    """A network by name. In `eval()` its forward returns one logits tensor, (N, out_channels, *S).

    "classifier" makes a `Classifier`, whose logits are (N, out_channels).

    Raises:
        UsageError: unknown name or option (the nearest one is named), or values that do not fit together.
    """
    table = table_of(name)
    known = [option for option in table.parameters(name) if option not in ("self", "kwargs")]
    for option in options:
        if option not in known:
            raise unknown_option(f"Model '{name}'", option, known)
    with refused_options(f"Model '{name}'", AttributeError) if options else nullcontext():
        return table.create(name, spatial_dims, in_channels, out_channels, **options)


def check_patch(model: nn.Module, patch_size: Sequence[int], batch_size: int = 2) -> None:
    """Raise `UsageError` where a patch is smaller than the stride of the coarsest map of a network with an encoder, or
    is not what a network of another library takes in training.
    """
    if callable(own := getattr(model, "check_patch", None)):
        own(patch_size, batch_size)
    strides = getattr(getattr(model, "encoder", None), "strides", None)
    if strides is None:
        return
    total = np.prod(strides, axis=0).tolist()
    if any(size < stride for size, stride in zip(patch_size, total, strict=True)):
        raise UsageError(
            f"{type(model).__name__} halves too often for the patch: its coarsest map has stride {total}, the patch "
            f"has {list(patch_size)}. Take fewer stages (model.options has depth, features, strides or encoder for "
            "that, by model), another model, or a larger patch_size in plan.json."
        )
