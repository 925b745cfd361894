"""What there is: every network, encoder and layer with its parameters, without making its weights."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kanseg.bases import BASES
from kanseg.encoders import ENCODERS, create_encoder
from kanseg.errors import UsageError
from kanseg.layers.bottleneck import BottleneckKANConv
from kanseg.layers.families import FAMILIES, NAMES, conv_layer
from kanseg.layers.wavelet_conv import WaveletConv
from kanseg.models.model import MODELS, create_model

CHANNELS, CLASSES = 1, 3
KINDS: dict[Any, tuple[str, tuple[str, ...]]] = {  # of layers: what they are, options of their own
    WaveletConv: ("One wavelet an edge, its place and width learned", ("wavelet",)),
    BottleneckKANConv: ("1x1 down, the KAN convolution, 1x1 up", ("dim_reduction", "min_internal")),
}


def table_of_models() -> list[dict[str, Any]]:
    """Name, kind ("network" or "encoder"), parameters in 2D and 3D at the defaults, and a description.

    Counted for one image channel and three classes, None where there is none in a dimension; encoders also serve in
    `Classifier`.
    """
    with _no_garbage_collection():
        rows = [_row(name, "network", MODELS.describe(name), _network) for name in MODELS]
        return rows + [_row(name, "encoder", ENCODERS.describe(name), _encoder) for name in ENCODERS]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """60,000 modules set it off again and again, over all that torch and MONAI hold: a third of the time."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.enable()


def table_of_layers() -> list[dict[str, Any]]:
    """Families of layers, then the bases that no family is named after: name, basis, thin class, options, description.

    "parameters" is that of a layer of kernel 3 with 32 to 32 channels in 3D at the defaults over the plain one's;
    "options" are the basis's own with their defaults, given by `layer_options` or to the layer itself.
    """
    alone = [name for name in BASES if name not in {row.get("basis") for row in FAMILIES.values()}]
    plain = _count(None)
    return [_layer(name, plain) for name in (*FAMILIES, *alone)]


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


def _layer(name: str, plain: int) -> dict[str, Any]:
    row = FAMILIES.get(name, {"basis": name})
    basis: str | None = row.get("basis")
    conv: Any = row.get("conv")
    kind, own = KINDS.get(conv, ("" if basis else "The plain convolution", ()))
    said, options = [], {}
    if basis:
        said = [BASES.describe(basis).rstrip(".")]
        # All have them, a layer means others by "groups", and the name says it.
        common = ("channels", "squash", "groups", *getattr(BASES.get(basis), "keywords", ()))
        options = {key: one.default for key, one in BASES.parameters(basis).items() if key not in common}
    options |= {key: inspect.signature(conv).parameters[key].default for key in own}
    return {
        "name": name,
        "basis": basis,
        "class": f"{NAMES[name]}3d" if name in NAMES else None,
        "parameters": _count(name) / plain,
        "options": options,
        "description": ". ".join([*said, kind] if kind else said),
    }


def _count(layer: str | None) -> int:
    return count_parameters(partial(conv_layer(layer), 3, 32, 32))


def _network(name: str, dims: int) -> nn.Module:
    return create_model(name, dims, CHANNELS, CLASSES)


def _encoder(name: str, dims: int) -> nn.Module:
    return create_encoder(name, dims, CHANNELS)
