"""The functions by which torch-conv-kan makes the layers of its networks."""

from __future__ import annotations

from functools import partial
from typing import Any

from kanseg.compat import blocks
from kanseg.compat.filling import DIMS, FAMILIES, Arguments, Blank, Filling, State
from kanseg.compat.links import Conversion, below, taken

# Function -> family and kernel.
LAYER_FUNCTIONS: dict[str, tuple[str, int]] = {
    f"{name}_conv{kernel}x{kernel}": (family, kernel)
    for name, family in {
        "kan": "kan",
        "fast_kan": "fast",
        "kaln": "kaln",
        "kacn": "kacn",
        "kagn": "kagn",
        "bottleneck_kagn": "kagnbn",
        "wav_kan": "wav",
    }.items()
    for kernel in (1, 3)
}
LAYER_FUNCTIONS |= {
    "conv3x3": ("", 3),
    "moe_kaln_conv3x3": ("moe_kaln", 3),
    "moe_kagn_conv3x3": ("moe_kagn", 3),
    "moe_bottleneck_kagn_conv3x3": ("moe_kagnbn", 3),
}
ATTENTION_FUNCTIONS: dict[str, tuple[str, Arguments]] = {
    "self_kagn_conv3x3": ("SelfKAGNtention{n}D", {}),
    "self_bottleneck_kagn_conv3x3": ("BottleNeckSelfKAGNtention{n}D", {"dim_reduction": 8}),
}


def convert_layer(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """A layer; where its weights are penalised the reference wraps it."""
    family, kernel = LAYER_FUNCTIONS[name]
    geometry = taken(args, stride=1, **({"dilation": 1} if kernel > 1 else {}))
    blank = Blank(DIMS, args.pop("in_planes"), args.pop("out_planes"), kernel, **geometry)
    prefix = "module." if args.get("l1_decay", 0) > 0 and family else ""
    part = Filling(FAMILIES[family], args, state, str).layer("", blank, below(state, prefix))
    return Conversion(part.module, part.under("", prefix), [prefix + key for key in part.unused])


def convert_attention(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """Self-attention; here `inner_projection` divides the channels."""
    kind, defaults = ATTENTION_FUNCTIONS[name]
    channels, divisor = args.pop("in_planes"), args.pop("inner_projection", None)
    inner = None if divisor is None else channels // divisor
    own = {"input_dim": channels, "inner_projection": inner, "padding": args.get("dilation", 1)}
    return blocks.CONVERTERS[kind](DIMS, {"norm_layer": "InstanceNorm2d", **defaults, **args, **own}, state)


CONVERTERS: dict[str, Any] = {
    **{name: partial(convert_layer, name) for name in LAYER_FUNCTIONS},
    **{name: partial(convert_attention, name) for name in ATTENTION_FUNCTIONS},
}
