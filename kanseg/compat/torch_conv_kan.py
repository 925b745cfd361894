"""Modules of IvanDrokin/torch-conv-kan (MIT, commit 7a0e83c) as kanseg modules with the same weights and output.

`from_torch_conv_kan` reads a class name, its constructor arguments and its state_dict. The module it returns gives the
reference's numbers in `eval()`, its errors included (`compat.legacy`); new networks should be built from
`kanseg.layers` and `kanseg.models` instead. `to_torch_conv_kan` and `reference_gradients` go the other way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kanseg.compat import (
    blocks,
    classifiers,
    functions,
    layers,
    linear,
    parts,
    residual,
    scores,
    segmenters,
    wrappers,
)
from kanseg.compat.links import Conversion, load, spread
from kanseg.errors import UsageError, did_you_mean

# (spatial_dims, arguments, state_dict) -> our module and its links; "{n}D" stands for 1D, 2D and 3D.
Converter = Callable[[int, dict[str, Any], Mapping[str, Tensor]], Conversion]
CONVERTERS: dict[str, Converter] = {
    **layers.CONVERTERS,
    **blocks.CONVERTERS,
    **linear.CONVERTERS,
    **functions.CONVERTERS,
    **residual.CONVERTERS,
    **segmenters.CONVERTERS,
    **classifiers.CONVERTERS,
    **parts.CONVERTERS,
    **scores.CONVERTERS,
    **wrappers.CONVERTERS,
}


def from_torch_conv_kan(
    class_name: str, args: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """Our module with the reference's weights, in `eval()`; same output and gradients.

    Args:
        class_name: e.g. "KAGNConv2DLayer", also dotted as in "kan_convs.KAGNConv2DLayer".
        args: constructor arguments by the reference's names; norm layers and activations as classes or by name.
        state_dict: the reference's state_dict.

    Raises:
        UsageError: unknown class or argument, or a class that has no counterpart here.
        UserError: keys or shapes of `state_dict` that do not fit, the first of them named.
    """
    convert, spatial_dims = find(class_name, args)
    try:
        conversion = convert(spatial_dims, dict(args), state_dict)
    except KeyError as error:
        raise UsageError(f"{class_name} needs the argument {error}, got {sorted(args)}") from error
    module = load(conversion, class_name, state_dict)
    module.reference_links = conversion.links
    return module.eval()


def to_torch_conv_kan(module: Any) -> dict[str, Tensor]:
    """The reference's state_dict of a module made by `from_torch_conv_kan` (without its constant buffers)."""
    return spread(module.reference_links, module.state_dict())


def reference_gradients(module: Any) -> dict[str, Tensor]:
    """Gradients after `backward()` under the reference's parameter names and in its layout."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return spread(module.reference_links, gradients)


def find(class_name: str, args: Mapping[str, Any]) -> tuple[Converter, int]:
    """The converter of a class and its number of spatial dimensions (2 where neither name nor arguments say)."""
    short = class_name.rsplit(".", 1)[-1]
    match = re.search(r"([123N])D", short)
    name = short.replace(match[0], "{n}D") if match else short
    if name in wrappers.REFUSED:
        raise UsageError(
            f"'{class_name}' of torch-conv-kan has no counterpart here: it {wrappers.REFUSED[name]}"
        )
    if name not in CONVERTERS:
        spelled = [key.replace("{n}", "{1,2,3}") for key in CONVERTERS]
        known = difflib.get_close_matches(short, spelled, n=8, cutoff=0.3) or layers.LAYERS
        raise UsageError(f"Unknown class '{class_name}' of torch-conv-kan.{did_you_mean(class_name, known)}")
    dims = match[1] if match and match[1] != "N" else args.get("ndim", 2)
    return CONVERTERS[name], int(dims)
