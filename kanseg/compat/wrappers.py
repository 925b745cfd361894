"""Classes of torch-conv-kan that make other classes: by a name (AutoKAN), or by a class as argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from kanseg.compat import blocks, classifiers, residual, segmenters
from kanseg.compat.blocks import EXPERTS
from kanseg.compat.layers import LAYERS
from kanseg.compat.links import Arguments, Conversion, State, taken
from kanseg.errors import UsageError, did_you_mean

# Names of AutoKAN that are not those of the functions.
AUTO = {
    "ukanet18": "ukanet_18",
    "ukalnet18": "ukalnet_18",
    "ukagnet18": "ukagnet_18",
    "ukacnet18": "ukacnet_18",
}
AUTO |= {
    name: name
    for name in (
        "fast_ukanet_18 u2kanet u2kagnet u2kalnet u2kacnet fast_u2kanet u2kanet_small fast_u2kanet_small "
        "densekanet121 fast_densekanet121 densekagnet121 densekalnet121 densekacnet121 densekalnet161 "
        "vggkan fast_vggkan vggkaln vggkacn vggkagn vgg_wav_kan reskagnet18 reskagnet50 reskagnet101 reskagnet152"
    ).split()
}
# It takes these for another network.
AUTO |= dict.fromkeys(
    ("densekalnet169", "densekalnet201", "densekagnet161", "densekagnet169", "densekagnet201"),
    "densekacnet121",
)
# It cannot make these: it hands their norm on as a word.
BROKEN_AUTO = ("u2kagnet_small", "u2kalnet_small", "u2kacnet_small")
NORMS = {"instance2d": "InstanceNorm2d", "batchnorm2d": "BatchNorm2d"}
ACTIVATIONS = {"gelu": "GELU", "silu": "SiLU", "relu": "ReLU", "prelu": "PReLU"}
NETWORKS: dict[str, Callable[..., Conversion]] = {
    **residual.CONVERTERS,
    **segmenters.CONVERTERS,
    **classifiers.CONVERTERS,
}


SPLINES = ("ukanet18", "u2kanet", "u2kanet_small", "densekanet121", "vggkan")
TINY = {
    "VGG": ("vggkagn_bn", "moe_vggkagn_bn"),
    "DenseNet": ("tiny_densekagnet_bn", "tiny_densekagnet_moebn"),
}


def convert_auto(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """AutoKAN: a network by name, norms and activations by words; its defaults are not those of the functions."""
    name = args.pop("model_name")
    if name in BROKEN_AUTO:
        raise UsageError(
            f"AutoKAN of torch-conv-kan cannot make '{name}' itself. Name the function: models.{name}"
        )
    if name not in AUTO:
        raise UsageError(f"Unknown model_name '{name}' of AutoKAN.{did_you_mean(name, AUTO)}")
    if "norm_layer" in args:
        args["norm_layer"] = NORMS.get(args["norm_layer"], "InstanceNorm2d")
    if "base_activation" in args:
        word = args["base_activation"]
        if word not in ACTIVATIONS:
            raise UsageError(f"Unknown base_activation '{word}' of AutoKAN.{did_you_mean(word, ACTIVATIONS)}")
        args["base_activation"] = ACTIVATIONS[word]
    defaults: Arguments = {"growth_rate": 32} if "dense" in name else {}
    if name in SPLINES:
        defaults |= {"spline_order": 1, "grid_size": 1}
    elif "fast" in name:
        defaults |= {"grid_size": 1, "grid_range": (-1, 1), "base_activation": "GELU"}
    return NETWORKS[AUTO[name]](spatial_dims, {**defaults, **args}, state)


def convert_tiny(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """TinyAutoKAGN: the narrow Gram networks."""
    kind, mixed = args.pop("model_type"), args.pop("is_moe", False)
    if kind not in TINY:
        raise UsageError(f"TinyAutoKAGN of torch-conv-kan makes no '{kind}'.{did_you_mean(kind, TINY)}")
    if not mixed:
        taken(args, num_experts=None, noisy_gating=None, k=None)
    if kind == "VGG":
        args = {"expected_feature_shape": (1, 1), **args}
    else:
        args.pop("width_scale", None)
    return NETWORKS[TINY[kind][mixed]](spatial_dims, args, state)


def convert_mixture_of(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """A mixture whose experts are of a class that is an argument."""
    family, dims = _layer_class(args.pop("conv_class"))
    names = {layer: name for name, layer in EXPERTS.items()}
    if family not in names:
        raise UsageError(f"MoEKANConvBase of torch-conv-kan takes no {family}.{did_you_mean(family, names)}")
    return blocks.convert_mixture(names[family], dims, args, state)


def convert_attention_of(turned: bool, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """Self-attention over layers of a class that is an argument."""
    family, dims = _layer_class(args.pop("conv_kan_layer"))
    if args.get("norm_layer") is None:
        raise UsageError("attention over a class that is an argument needs norm_layer, e.g. nn.BatchNorm2d")
    return blocks.convert_attention(family, turned, dims, args, state)


def _layer_class(given: Any) -> tuple[str, int]:
    """Row of `LAYERS` and dimensions of a class that is given itself or by its name."""
    name = (given if isinstance(given, str) else getattr(given, "__name__", repr(given))).rsplit(".", 1)[-1]
    match = re.fullmatch(r"(\w+)([123])DLayer", name)
    if match is None or match[1] not in LAYERS:
        raise UsageError(f"Unknown layer '{name}'.{did_you_mean(name, [f'{row}2DLayer' for row in LAYERS])}")
    return match[1], int(match[2])


CONVERTERS: dict[str, Any] = {
    "AutoKAN": convert_auto,
    "TinyAutoKAGN": convert_tiny,
    "MoEKANConvBase": convert_mixture_of,
    "SelfKANtention{n}D": partial(convert_attention_of, False),
    "RoPESelfKANtention{n}D": partial(convert_attention_of, True),
}
MODULES = "is made of modules, which arguments do not describe. "
FITTED = "Merge it into ordinary layers (fuse_layer, merge) and name their class; kanseg.study.adapt does the like."
# What has no counterpart here, and why.
REFUSED = {
    "KANFocalModulation{n}D": "takes a class as argument. Name KAGNFocalModulation or BottleNeckKAGNFocalModulation.",
    "PEFTKAGNConv{n}DLayer": f"is made of another layer. {FITTED}",
    "PEFTVGGKAGN": f"is made of another network. {FITTED}",
    "VGG": f"{MODULES}Name the class of the family, e.g. VGGKAGN.",
    "L1": f"{MODULES}Name the class inside and take 'module.' off its keys.",
    "L2": f"{MODULES}Name the class inside and take 'module.' off its keys.",
    "WeightDecay": f"{MODULES}Name the class inside and take 'module.' off its keys.",
    "NoiseMultiplicativeInjection": "doubles what it should multiply by about one; in eval() it does nothing.",
    "DiceLossWithFocal": "wants classes as indices and as channels at once, so that no target serves it.",
}
