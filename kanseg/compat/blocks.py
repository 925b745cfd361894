"""The blocks of torch-conv-kan that are made of its layers: mixtures of experts, self-attention, focal modulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from kanseg.compat import legacy
from kanseg.compat.layers import (
    CHANNEL,
    channel_norm,
    norm_name,
    norm_spec,
    reference_layer,
    reference_links,
)
from kanseg.compat.layers import convert as convert_layer
from kanseg.compat.linear import convert as convert_linear
from kanseg.compat.links import Arguments, Conversion, Link, State, below, same_names, taken

EXPERTS = {
    **{
        f"MoE{family}Conv": f"{family}Conv" for family in ("KAN", "FastKAN", "KALN", "KACN", "KAGN", "WavKAN")
    },
    "MoEFullBottleneckKAGNConv": "BottleNeckKAGNConv",
}
ATTENTION = {
    "SelfKAGNtention": "KAGNConv",
    "SelfReLUKANtention": "ReLUKANConv",
    "BottleNeckSelfKAGNtention": "BottleNeckKAGNConv",
    "BottleNeckSelfReLUKANtention": "BottleNeckReLUKANConv",
    "RoPEBottleNeckSelfKAGNtention": "BottleNeckKAGNConv",
}
PREGATE = "experts.pre_gate."  # the layer before the gate of a narrow mixture
FOCAL = {"KAGNFocalModulation": "KAGNConv", "BottleNeckKAGNFocalModulation": "BottleNeckKAGNConv"}
FOCAL_OPTIONS = (
    "focal_window focal_level focal_factor use_postln_in_modulation normalize_modulator full_kan".split()
)


class Parts:
    """Makes the layers of a block, one after the other, and keeps the links of each.

    Args:
        name: class of the layers in `kanseg.compat.layers.LAYERS`.
        names: (ours, the reference's) of each layer in the order in which they are made.
    """

    def __init__(self, name: str, args: Arguments, state: State, names: Iterable[tuple[str, str]]) -> None:
        self.name, self.args, self.state, self.names = name, args, state, iter(names)
        self.links: list[Link] = []

    def __call__(
        self, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any, **options: Any
    ) -> nn.Module:
        ours, theirs = next(self.names)
        arguments = {**self.args, "input_dim": inputs, "output_dim": outputs, "kernel_size": kernel_size}
        part = convert_layer(
            self.name, spatial_dims, {**arguments, **options}, below(self.state, f"{theirs}.")
        )
        self.links += part.under(f"{ours}.", f"{theirs}.")
        return part.module


def convert_mixture(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """Experts that are whole layers of one family; the module returns (output, balance loss)."""
    gate = _gate(args, num_experts=16, k=4)
    channels = (args.pop("input_size"), args.pop("output_size"), args.pop("kernel_size", 3))
    names = ((f"layer.experts.{number}", f"experts.{number}") for number in range(gate["num_experts"]))
    experts = Parts(EXPERTS[name], {"padding": 1, **args}, state, names)
    mixture = legacy.ReferenceMixture(spatial_dims, *channels, expert_layer=experts, **gate)
    gate_links, unused = _gate_links("layer.", "", gate["noisy"])
    return Conversion(legacy.WithBalanceLoss(mixture), [*experts.links, *gate_links], unused)


def convert_narrow_mixture(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """Experts in the narrow space of a bottleneck; the module returns (output, balance loss)."""
    gate = _gate(args, **({"num_experts": 8, "k": 2} if spatial_dims == 2 else {"num_experts": 16, "k": 4}))
    before_links: list[Link] = []

    def gram(inputs: int, outputs: int) -> nn.Module:
        sizes = {"in_channels": inputs, "out_channels": outputs, "degree": args.get("degree", 3)}
        part = convert_linear("GRAMLayer", 0, sizes, below(state, PREGATE))
        before_links.extend(part.under("layer.conv.inner.gate.before.", PREGATE))
        return part.module

    before = gram if args.pop("pregate", False) else None
    mixture = partial(legacy.ReferenceMixture, before=before, **gate)
    layer = reference_layer("BottleNeckKAGNConv", spatial_dims, args, mixture=mixture)
    links = [link.under("layer.", "") for link in reference_links("BottleNeckKAGNConv", layer, state)]
    gate_links, unused = _gate_links("layer.conv.inner.", "experts.", gate["noisy"])
    unused = ("w_gate", "w_noise", *unused)
    return Conversion(legacy.WithBalanceLoss(layer), [*links, *gate_links, *before_links], unused)


def _gate(args: Arguments, num_experts: int, k: int) -> Arguments:
    gate = taken(args, num_experts=num_experts, k=k, noisy_gating=True)
    return {"noisy": gate.pop("noisy_gating"), **gate}


def _gate_links(ours: str, theirs: str, noisy: bool) -> tuple[list[Link], tuple[str, ...]]:
    """Links of the gate, and what it does not use."""
    noise = f"{theirs}w_noise"
    links = [Link(f"{ours}gate.weight", (f"{theirs}w_gate",))]
    return ([*links, Link(f"{ours}gate.noise_weight", (noise,))], ()) if noisy else (links, (noise,))


def convert_attention(
    family: str, turned: bool, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """Self-attention, with rotary positions where `turned`; the norm around it takes `affine` alone of the norm's
    arguments.
    """
    inner = args.pop("inner_projection", None)
    own = taken(args, rope_theta=10.0, rope_mixed=True) if turned else {"rope_theta": 10.0}
    args = {"norm_layer": "BatchNorm", **args}
    parts = Parts(family, args, state, [(t, f"proj_{t[0]}") for t in ("query", "key", "value")])
    rotary = ("mixed" if own["rope_mixed"] else "axial") if turned else None
    channels, norm = args.pop("input_dim"), norm_name(args["norm_layer"], "batch")
    normed = {"affine": args.get("affine", True)}
    attention = legacy.SquareAttention(
        spatial_dims,
        channels,
        args.pop("kernel_size", 3),
        conv_layer=parts,
        inner_channels=inner,
        rotary=rotary,
        theta=own["rope_theta"],
        norm=norm_spec(norm, normed),
        scale=1.0,
        gate="skip",
    )
    if norm == CHANNEL:
        attention.norm = channel_norm(spatial_dims, channels, 1, normed)
    names = {"narrow": "inner_proj", "widen": "outer_proj", "norm": "norm_layer"}
    links = [*parts.links, Link("gamma", ("gamma",)), *_renamed(attention, names)]
    if rotary == "mixed":
        links.append(Link("rotary.frequencies", ("freqs",), lambda p: p[0][:, None], lambda t: [t[:, 0]]))
    return Conversion(attention, links)


def convert_focal(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """Focal modulation; its contexts are Gram layers of the second version in either family."""
    channels, options = args.pop("input_dim"), {key: args.pop(key) for key in FOCAL_OPTIONS if key in args}
    args = {"norm_layer": "BatchNorm", **args}
    levels = range(options.get("focal_level", 2))
    window, factor = options.get("focal_window", 3), options.get("focal_factor", 2)
    pointwise = {"project_in": "f", "modulator": "h"} if options.get("full_kan", True) else {}
    parts = Parts(FOCAL[name], args, state, {**pointwise, "project_out": "proj"}.items())
    contexts = Parts("KAGNConvV2", args, state, [(f"contexts.{n}", f"focal_layers.{n}") for n in levels])
    paddings = iter((window + factor * level) // 2 for level in levels)
    norm = norm_name(args["norm_layer"], "batch")
    own = {"degree", "dropout", "norm_layer"}
    normed = {key: value for key, value in args.items() if key not in own}
    modulation = legacy.GatheredFocalModulation(
        spatial_dims,
        channels,
        conv_layer=parts,
        context_layer=lambda *a, **o: contexts(*a, padding=next(paddings), **o),
        norm=norm_spec(norm, normed),
        **options,
    )
    if norm == CHANNEL and modulation.norm is not None:
        modulation.norm = channel_norm(spatial_dims, channels, 1, normed)
    names = {"norm": "norm_layer", **({} if pointwise else {"project_in": "f", "modulator": "h"})}
    return Conversion(modulation, [*parts.links, *contexts.links, *_renamed(modulation, names)])


def _renamed(module: nn.Module, names: Mapping[str, str]) -> list[Link]:
    """Links of parts that torch makes, ours -> the reference's name."""
    parts = {ours: getattr(module, ours) for ours in names}
    return [
        link
        for ours, part in parts.items()
        if part is not None
        for link in same_names(part, f"{ours}.", f"{names[ours]}.")
    ]


CONVERTERS: dict[str, Any] = {
    **{f"{name}{{n}}DLayer": partial(convert_mixture, name) for name in EXPERTS},
    "MoEBottleNeckKAGNConv{n}DLayer": convert_narrow_mixture,
    **{
        f"{name}{{n}}D": partial(convert_attention, family, name.startswith("RoPE"))
        for name, family in ATTENTION.items()
    },
    **{f"{name}{{n}}D": partial(convert_focal, name) for name in FOCAL},
}
