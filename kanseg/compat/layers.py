"""The convolution layers of torch-conv-kan: one row a family, saying what it is here and where its weights are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.bases import Basis
from kanseg.compat import legacy
from kanseg.compat.links import Conversion, Link, below, stacked
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers import ConvLayer
from kanseg.layers.families import FAMILIES
from kanseg.layers.wavelet_conv import WaveletConv

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "dropout")
DEFAULT_PADDING = 0
CHANNEL, GROUP = "LayerNorm2d", "group"  # the former timm's norm over the channels of one position
NORMS = {
    "BatchNorm": "batch",
    "InstanceNorm": "instance",
    "GroupNorm": GROUP,
    "Identity": None,
    CHANNEL: CHANNEL,
}
ACTIVATIONS: dict[str, str | None] = {
    name: name.lower() for name in ("GELU", "SiLU", "ReLU", "Tanh", "Sigmoid", "Mish", "ELU", "SELU", "CELU")
}
OVER_CHANNELS = ("GLU", "LogSoftmax", "Softmax", "Softmax2d", "Softmin")  # no functions of one number
ACTIVATIONS |= {"LeakyReLU": "leakyrelu", "ReLU6": "relu6", "PReLU": "prelu", "Identity": None}


@dataclass(frozen=True)
class Family:
    """One class of the reference: the family it is, its own arguments and where its weights are kept.

    Attributes:
        arguments: the reference's argument -> ours.
        basis_key: where the weights of the basis branch are; `degree_major` says how they are ordered.
        options: (arguments of the call, groups) -> options of `ConvLayer` that make it as the reference is.
        keys: further parameters, ours -> the reference's (a group each where it has "{g}").
        defaults: values of arguments that differ from ours.
    """

    family: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    basis_key: str = "poly_weights"
    degree_major: bool = False
    options: Callable[[dict[str, Any], int], dict[str, Any]] = lambda arguments, groups: {}
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "instance"
    joined: bool = False


def _basis(basis: Callable[..., Basis]) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    return lambda arguments, groups: {"basis": basis}


_gram = _basis(legacy.multiplied_gram)


def _gram_v2(arguments: dict[str, Any], groups: int) -> dict[str, Any]:
    return {"basis": legacy.multiplied_gram, "conv": legacy.DegreeMajorKANConv}


def _legendre(arguments: dict[str, Any], groups: int) -> dict[str, Any]:
    return {"squash": legacy.BatchMinMax(groups)}


def _wavelet(arguments: dict[str, Any], groups: int) -> dict[str, Any]:
    return {"wavelet": legacy.wavelet(arguments.pop("wavelet", "mexican_hat"))}


POLYNOMIAL = {"degree": "degree"}
RELU = {"g": "grid_size", "k": "order", "train_ab": "train_phases"}
NARROW = {"dim_reduction": "dim_reduction", "min_internal": "min_internal"}
PROJECTIONS = {"down_weight": "inner_proj.{g}.weight", "up_weight": "out_proj.{g}.weight"}
PHASES = {"basis.phase_low": "phase_low", "basis.phase_high": "phase_high"}
SPLINE = {
    "spline_order": "spline_order",
    "grid_size": "grid_size",
    "grid_range": "grid_range",
    "base_activation": "base_act",
}
RBF = {"grid_size": "grid_size", "grid_range": "grid_range", "base_activation": "base_act"}

LAYERS: dict[str, Family] = {
    "KANConv": Family(
        "kan",
        SPLINE,
        "spline_conv.{g}.weight",
        options=_basis(legacy.RoundedBSpline),
        keys={"act.weight": "prelus.{g}.weight"},
    ),
    "FastKANConv": Family("fastkan", RBF, "spline_conv.{g}.weight", options=_basis(legacy.rounded_rbf)),
    "KALNConv": Family("kaln", POLYNOMIAL, degree_major=True, options=_legendre),
    "KACNConv": Family("kacn", POLYNOMIAL, "poly_conv.{g}.weight", options=_basis(legacy.ClampedChebyshev)),
    "KAGNConv": Family(
        "kagn", POLYNOMIAL, degree_major=True, options=_gram, keys={"basis.beta": "beta_weights"}
    ),
    "KAGNConvV2": Family(
        "kagn",
        POLYNOMIAL,
        "poly_conv.weight",
        options=_gram_v2,
        keys={"basis.beta": "beta_weights"},
        joined=True,
    ),
    "KAJNConv": Family("kajn", {**POLYNOMIAL, "a": "a", "b": "b"}, degree_major=True),
    "KABNConv": Family("kabn", POLYNOMIAL, options=_basis(legacy.Ones)),
    "ReLUKANConv": Family("relukan", RELU, "relukan_conv.{g}.weight", keys=PHASES),
    "WavKANConv": Family(
        "wavkan", {"wavelet_type": "wavelet", "wav_version": "wav_version"}, options=_wavelet, norm="batch"
    ),
    "BottleNeckKAGNConv": Family(
        "bottleneck_kagn",
        {**POLYNOMIAL, **NARROW},
        degree_major=True,
        options=_gram,
        keys={**PROJECTIONS, "basis.beta": "beta_weights"},
    ),
    "BottleNeckReLUKANConv": Family(
        "bottleneck_relukan",
        {**RELU, **NARROW},
        "relukan_conv.{g}.weight",
        keys={**PROJECTIONS, **PHASES},
    ),
}


def convert(name: str, spatial_dims: int, args: Mapping[str, Any], state: Mapping[str, Tensor]) -> Conversion:
    """The layer of one family of `LAYERS` with its links."""
    layer = reference_layer(name, spatial_dims, args)
    return Conversion(layer, reference_links(name, layer, state))


def reference_layer(name: str, spatial_dims: int, args: Mapping[str, Any], **further: Any) -> ConvLayer:
    """Our layer that computes what the reference's does with these arguments; its weights are new.

    Args:
        further: options of ours that the reference does not have.
    """
    spec, args = LAYERS[name], dict(args)
    channels = [args.pop(name) for name in ("input_dim", "output_dim")]
    for unused in ("ndim", "conv_class", "conv_class_plus1", "conv_w_fun"):
        args.pop(unused, None)
    geometry = {"padding": DEFAULT_PADDING, **{name: args.pop(name) for name in GEOMETRY if name in args}}
    given, args = unwrapped(args.pop("norm_layer", args.pop("norm_class", None)), args)
    norm = norm_name(given, spec.norm)
    if norm == GROUP:  # the reference has a norm a group of the layer
        args["num_groups"] = _norm_groups(args) * (1 if spec.joined else geometry.get("groups", 1))
    own = {ours: args.pop(theirs) for theirs, ours in spec.arguments.items() if theirs in args}
    own.pop("wav_version", None)  # three ways to store the same layer
    if "base_act" in own:
        own["base_act"] = activation_spec(own["base_act"])
    if "grid_range" in own:
        own["grid_range"] = tuple(own["grid_range"])
    options = {**FAMILIES[spec.family], **geometry}
    options.update(spec.options(own, geometry.get("groups", 1)), **own)
    place = "input_norm" if "input_norm" in options else "norm"
    options[place] = norm_spec(norm, args)  # what is left goes to the norm
    try:
        layer = ConvLayer(spatial_dims, *channels, **{**options, **further})
        if norm == CHANNEL:
            where, width = (layer.conv, channels[0]) if place == "input_norm" else (layer, channels[1])
            groups = 1 if spec.joined else layer.conv.groups
            setattr(where, place, channel_norm(spatial_dims, width, groups, args))
    except (TypeError, UsageError) as error:
        if not args:  # the layer itself is at fault
            raise
        raise UsageError(
            f"{name} of torch-conv-kan does not take these arguments: {args} ({error})"
        ) from error
    return layer


def unwrapped(norm: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A norm that is given as a `functools.partial`, and the arguments with its own before those of the call."""
    if not isinstance(norm, partial):
        return norm, dict(arguments)
    own = {"num_groups": norm.args[0]} if norm.args else {}
    return norm.func, {**own, **norm.keywords, **arguments}


def _norm_groups(arguments: Mapping[str, Any]) -> int:
    if "num_groups" not in arguments:
        raise UsageError(
            "norm_layer 'GroupNorm' needs the number of its groups: give functools.partial(torch.nn.GroupNorm, 4)."
        )
    return int(arguments["num_groups"])


def norm_spec(norm: str | None, arguments: Mapping[str, Any]) -> Any:
    """MONAI's spec; `CHANNEL` starts as another norm with weights, and is put in place by the caller."""
    if norm == CHANNEL:
        return ("instance", {"affine": True})
    return (norm, dict(arguments)) if norm else None


def channel_norm(
    spatial_dims: int, channels: int, groups: int, arguments: Mapping[str, Any]
) -> legacy.ChannelNorm:
    """The norm that `CHANNEL` names."""
    if spatial_dims != 2:
        raise UsageError(f"norm_layer {CHANNEL} is 2D only, but this class is {spatial_dims}D")
    return legacy.ChannelNorm(channels, groups, **arguments)


def norm_name(norm: Any, default: str) -> str | None:
    """MONAI's name of a norm that is given as a class or by its name."""
    if norm is None:
        return default
    name = norm if isinstance(norm, str) else getattr(norm, "__name__", repr(norm))
    base = name.rsplit(".", 1)[-1]
    if base != CHANNEL:
        base = re.sub(r"[123]d$", "", base)
    if base not in NORMS:
        raise UsageError(f"norm_layer '{name}' is not supported.{did_you_mean(base, NORMS)}")
    return NORMS[base]


def activation_spec(act: Any) -> str | nn.Module | None:
    """MONAI's name of an activation that is given as a class or by its name; itself where MONAI has none of it."""
    given: Any = getattr(nn, act.rsplit(".", 1)[-1], None) if isinstance(act, str) else act
    name = getattr(given, "__name__", "")
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    try:
        made = given if isinstance(given, nn.Module) else given()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module) or type(made).__name__ in OVER_CHANNELS:
        known = {*ACTIVATIONS, *nn.modules.activation.__all__}.difference(OVER_CHANNELS)
        raise UsageError(
            f"base_activation '{name or act}' is not supported.{did_you_mean(name or str(act), known)}"
        )
    return made


def reference_links(name: str, layer: ConvLayer, state: Mapping[str, Tensor]) -> list[Link]:
    """How each tensor of a layer of `reference_layer` is made of the reference's, which `state` has."""
    spec, conv, groups, spatial_dims = LAYERS[name], layer.conv, layer.conv.groups, layer.conv.spatial_dims
    stacked_parts = 1 if spec.joined else groups

    def many(ours: str, pattern: str) -> Link:
        return stacked(ours, pattern, stacked_parts)

    links = []
    base = "base_conv.weight" if spec.joined else "base_conv.{g}.weight"
    if getattr(conv, "base_weight", None) is not None:
        links.append(many("conv.base_weight", base))
    for ours, theirs in spec.keys.items():
        if not ours.startswith("basis."):
            links.append(many(ours if ours.startswith("act.") else f"conv.{ours}", theirs))
    if spec.family == "wavkan":
        links += _wavelet_links(conv, state)
    for kan, own, their in _expansions(conv):
        links += [
            link.under(own, their) for link in _basis_links(spec, kan, spatial_dims, below(state, their))
        ]
    act = getattr(conv, "base_act", None)
    links += (
        [Link(f"conv.base_act.{key}", (f"base_activation.{key}",)) for key in act.state_dict()] if act else []
    )
    place = "conv.input_norm" if getattr(conv, "input_norm", None) is not None else "norm"
    norm = layer.get_submodule(place)
    for key in norm.state_dict():
        pattern = f"layer_norm.{key}" if spec.joined else f"layer_norm.{{g}}.{key}"
        links.append(many(f"{place}.{key}", pattern))
    return links


def _pairs(t: Tensor) -> Tensor:
    """(1, A, B, 1, ...) -> (A, B)."""
    return t.reshape(t.shape[1:3])


def _spatial(t: Tensor, spatial_dims: int) -> Tensor:
    """(A, B) -> (1, A, B, 1, ...)."""
    return t.reshape(1, *t.shape, *[1] * spatial_dims)


def beta_link(ours: str, theirs: str) -> Link:
    """The reference keeps degree + 1 factors and uses 1 ... degree - 1."""
    return Link(ours, (theirs,), lambda parts: parts[0][1:-1], lambda t: [F.pad(t, (1, 1))])


def _expansions(conv: Any) -> list[tuple[Any, str, str]]:
    """The convolutions over a basis in a layer, with their prefix in ours and in the reference."""
    inner = getattr(conv, "inner", conv)
    if not hasattr(inner, "experts"):
        place = "conv." if inner is conv else "conv.inner."
        return [(inner, place, "")] if getattr(inner, "basis", None) is not None else []
    return [
        (expert, f"conv.inner.experts.{number}.", f"experts.experts.{number}.")
        for number, expert in enumerate(inner.experts)
    ]


def _basis_links(spec: Family, conv: Any, spatial_dims: int, state: Mapping[str, Tensor]) -> list[Link]:
    """Learned numbers of the basis, and the weights of its branch: stacked over groups, and channel-major in ours."""
    links = []
    for ours, theirs in spec.keys.items():
        if ours.endswith("beta"):
            links.append(beta_link(ours, theirs))
        elif "phase" in ours:
            links.append(
                Link(ours, (theirs,), lambda parts: _pairs(parts[0]), lambda t: [_spatial(t, spatial_dims)])
            )
    functions, groups = conv.basis.num_functions, 1 if spec.joined else conv.groups
    one_tensor = spec.basis_key == "poly_weights"
    names = (spec.basis_key,) if one_tensor else tuple(spec.basis_key.format(g=g) for g in range(groups))

    def swap(t: Tensor, first: int) -> Tensor:
        return t.unflatten(1, (first, -1)).transpose(1, 2).flatten(1, 2) if spec.degree_major else t

    def to_ours(parts: list[Tensor]) -> Tensor:
        return swap(parts[0].flatten(0, 1) if one_tensor else torch.cat(parts), functions)

    def to_theirs(t: Tensor) -> list[Tensor]:
        t = swap(t, t.shape[1] // functions)
        return [t.unflatten(0, (groups, -1))] if one_tensor else list(t.chunk(groups))

    return [*links, Link("basis_weight", names, to_ours, to_theirs)]


def _wavelet_links(conv: WaveletConv, state: Mapping[str, Tensor]) -> list[Link]:
    """Scale, translation, mixing, and the weights in whichever of the three storages the state has."""
    groups, dims = conv.groups, conv.spatial_dims

    def group(g: int) -> str:
        return f"wavelet_conv.{g}."

    def edge(name: str) -> Link:
        return Link(
            f"conv.{name}",
            tuple(group(g) + name for g in range(groups)),
            lambda parts: torch.cat([_pairs(part) for part in parts]),
            lambda t: [_spatial(part, dims) for part in t.chunk(groups)],
        )

    separate = group(0) + "wavelet_weights.0.weight" in state
    each = conv.out_channels // groups
    names = (
        tuple(f"{group(g)}wavelet_weights.{o}.weight" for g in range(groups) for o in range(each))
        if separate
        else tuple(f"{group(g)}wavelet_weights.weight" for g in range(groups))
    )
    extra_axis = not separate and names[0] in state and state[names[0]].dim() == dims + 3

    def to_ours(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts)
        return joined.squeeze(1) if extra_axis else joined

    def to_theirs(t: Tensor) -> list[Tensor]:
        return list((t.unsqueeze(1) if extra_axis else t).chunk(len(names)))

    mix = tuple(f"{group(g)}wavelet_out.weight" for g in range(groups))
    return [
        edge("scale"),
        edge("translation"),
        Link("conv.wavelet_weight", names, to_ours, to_theirs),
        Link("conv.mix_weight", mix, torch.cat, lambda t: list(t.chunk(groups))),
    ]


CONVERTERS = {
    f"{name.removesuffix('V2')}{{n}}DLayer{'V2' * name.endswith('V2')}": partial(convert, name)
    for name in LAYERS
}
