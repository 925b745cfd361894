"""The fully connected layers of torch-conv-kan and its networks of them: one row a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from kanseg.compat import legacy
from kanseg.compat.layers import activation_spec, beta_link
from kanseg.compat.links import Conversion, Link, State, below
from kanseg.errors import UsageError
from kanseg.layers.mlp import FAMILIES, KANMLP, LinearLayer

ACTS = ("base_act", "act", "basis_act")


@dataclass(frozen=True)
class Layer:
    """One class of the reference.

    Attributes:
        family: what it is here.
        features: its names of the numbers of features.
        arguments: further arguments of its own -> ours.
        keys: our parameters -> its own.
        basis: its key of the basis weights, and whether they are (in, out, K) instead of (out, in K).
        acts: which of our activations its `act` is.
        options: options of ours that make it as the reference is.
        norm: its name of the norm; `norm_at` ours.
        act: its name of the activation.
    """

    family: str
    features: tuple[str, str] = ("input_dim", "output_dim")
    arguments: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    basis: tuple[str, bool] | None = None
    acts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    norm: str | None = "norm"
    norm_at: str = "norm"
    act: str = "base_activation"


POLYNOMIAL = {"degree": "degree"}
INPUT_OUTPUT = ("input_features", "output_features")
BASE = {"linear.base_weight": "base_weight"}
BASES = {"linear.base_weight": "base_weights"}
PHASES = {"linear.basis.phase_low": "phase_low", "linear.basis.phase_high": "phase_high"}
GRAM = Layer(
    "kagn",
    ("in_channels", "out_channels"),
    POLYNOMIAL,
    {**BASES, "linear.basis.beta": "beta_weights"},
    ("grams_basis_weights", True),
    ACTS,
    {"basis": legacy.multiplied_gram},
    act="act",
)
LAYERS: dict[str, Layer] = {
    "KANLayer": Layer(
        "kan",
        INPUT_OUTPUT,
        {"grid_size": "grid_size", "spline_order": "spline_order", "grid_range": "grid_range"},
        {**BASE, "act.weight": "prelu.weight"},
        ("spline_weight", False),
        ACTS[:1],
        {"basis": legacy.RoundedBSpline},
        norm="layer_norm",
    ),
    "KALNLayer": Layer(
        "kaln",
        INPUT_OUTPUT,
        POLYNOMIAL,
        BASE,
        ("poly_weight", False),
        ACTS[:2],
        {"squash": legacy.BatchMinMax(1)},
        norm="layer_norm",
    ),
    "FastKANLayer": Layer(
        "fastkan",
        arguments={
            "num_grids": "grid_size",
            "grid_range": "grid_range",
            "use_base_update": "base",
            "bias": "bias",
        },
        keys={"linear.base_weight": "base_linear.weight", "linear.bias": "base_linear.bias"},
        basis=("spline_linear.weight", False),
        acts=ACTS[:1],
        options={"basis": legacy.rounded_rbf},
        norm="layernorm",
        norm_at="linear.input_norm",
    ),
    "ChebyKANLayer": Layer("kacn", arguments=POLYNOMIAL, basis=("cheby_coeffs", True), norm=None),
    "GRAMLayer": GRAM,
    "JacobiKANLayer": Layer(
        "kajn",
        arguments={**POLYNOMIAL, "a": "a", "b": "b"},
        keys=BASES,
        basis=("jacobi_coeffs", True),
        acts=ACTS[:2],
        act="act",
    ),
    "BernsteinKANLayer": Layer(
        "kabn",
        arguments=POLYNOMIAL,
        keys=BASES,
        basis=("bernstein_coeffs", True),
        acts=ACTS[:2],
        act="act",
        options={"basis": legacy.Ones},
    ),
    "ReLUKANLayer": Layer(
        "relukan",
        ("input_size", "output_size"),
        {"g": "grid_size", "k": "order", "train_ab": "train_phases"},
        {**PHASES, "linear.bias": "equal_size_conv.bias"},
        ("equal_size_conv.weight", False),
        norm=None,
    ),
    "WavKANLayer": Layer(
        "wavkan",
        ("in_features", "out_features"),
        {"wavelet_type": "wavelet"},
        {
            "linear.scale": "scale",
            "linear.translation": "translation",
            "linear.wavelet_weight": "wavelet_weights",
            "linear.base_weight": "weight1",
        },
        options={"wavelet": legacy.wavelet("mexican_hat")},
        norm="bn",
    ),
    "BottleNeckGRAMLayer": replace(
        GRAM,
        family="bottleneck_kagn",
        arguments={**POLYNOMIAL, "dim_reduction": "dim_reduction", "min_internal": "min_internal"},
        keys={
            **BASES,
            "linear.inner.basis.beta": "beta_weights",
            **{
                f"linear.{ours}.{part}": f"{theirs}.{part}"
                for ours, theirs in (("down", "inner_proj"), ("up", "outer_proj"))
                for part in ("weight", "bias")
            },
        },
    ),
}
# class -> its layers' class, arguments that are named otherwise there, and defaults that differ
NETWORKS: dict[str, tuple[str, Mapping[str, str], Mapping[str, Any]]] = {
    "KAN": ("KANLayer", {}, {}),
    "KALN": ("KALNLayer", {}, {}),
    "FastKAN": ("FastKANLayer", {"grid_size": "num_grids"}, {}),
    "KACN": ("ChebyKANLayer", {}, {"degree": 3}),
    "KAGN": ("GRAMLayer", {}, {}),
    "BottleNeckKAGN": ("BottleNeckGRAMLayer", {}, {}),
    "KABN": ("BernsteinKANLayer", {}, {}),
    "KAJN": ("JacobiKANLayer", {}, {}),
    "WavKAN": ("WavKANLayer", {}, {}),
    "ReLUKAN": ("ReLUKANLayer", {}, {"g": 1, "k": 1}),
}
FACTORIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "mlp_kan": ("KAN", {"base_activation": "GELU"}),
    "mlp_fastkan": (
        "FastKAN",
        {"base_activation": "GELU", "grid_size": 5, "grid_range": (-1, 1)},
    ),
    "mlp_kaln": ("KALN", {"base_activation": "GELU"}),
    "mlp_kacn": ("KACN", {}),
    "mlp_kagn": ("KAGN", {"base_activation": "GELU"}),
    "mlp_bottleneck_kagn": ("BottleNeckKAGN", {"base_activation": "GELU"}),
    "mlp_kabn": ("KABN", {"base_activation": "GELU"}),
    "mlp_kajn": ("KAJN", {}),
    "mlp_wav_kan": ("WavKAN", {}),
    "mlp_relukan": ("ReLUKAN", {}),
}


def convert(name: str, spatial_dims: int, args: Mapping[str, Any], state: State) -> Conversion:
    """A layer of `LAYERS` with its links."""
    spec, args = LAYERS[name], dict(args)
    features = [args.pop(key) for key in spec.features]
    options = {**spec.options, **_options(spec, args)}
    if args:
        raise UsageError(f"{name} of torch-conv-kan does not take {sorted(args)}")
    layer = LinearLayer(*features, **{**FAMILIES[spec.family], **options})
    return Conversion(layer, _links(spec, layer, state))


def _options(spec: Layer, args: dict[str, Any]) -> dict[str, Any]:
    """Our options of what `args` says; it is emptied of what is understood."""
    act = args.pop("act", None) or args.pop("base_activation", None)
    args.pop("base_activation", None)
    args.pop("spline_weight_init_scale", None)
    if "grid_min" in args or "grid_max" in args:
        args["grid_range"] = (args.pop("grid_min", -2.0), args.pop("grid_max", 2.0))
    if args.get("use_base_update") is False:
        args["bias"], act = False, None
    options = {ours: args.pop(theirs) for theirs, ours in spec.arguments.items() if theirs in args}
    if act is not None:
        name = activation_spec(act)
        shared = nn.PReLU() if name == "prelu" else name  # one learned slope, wherever it serves
        options.update(dict.fromkeys(spec.acts, shared))
    if "grid_range" in options:
        options["grid_range"] = tuple(options["grid_range"])
    if "wavelet" in options:
        options["wavelet"] = legacy.wavelet(options["wavelet"], channel_axis=2)
    return options


def _links(spec: Layer, layer: nn.Module, state: State) -> list[Link]:
    own, links = layer.state_dict(), []
    for ours, theirs in spec.keys.items():
        if ours.endswith("beta"):
            links.append(beta_link(ours, theirs))
        elif ours in own:
            links.append(Link(ours, (theirs,)))
    for place in (f"{prefix}{act}." for prefix in ("", "linear.", "linear.inner.") for act in spec.acts):
        links += [Link(place + key, (f"{spec.act}.{key}",)) for key in below(own, place)]
    if spec.basis is not None:
        inner = "linear.inner" if "linear.inner.basis_weight" in own else "linear"
        functions = layer.get_submodule(f"{inner}.basis").num_functions
        links.append(_basis_link(f"{inner}.basis_weight", *spec.basis, functions, state))
    if spec.norm is not None:
        prefix = f"{spec.norm_at}."
        links += [Link(prefix + key, (f"{spec.norm}.{key}",)) for key in below(own, prefix)]
    return links


def _basis_link(ours: str, theirs: str, by_input: bool, functions: Any, state: State) -> Link:
    """Weights of the functions: (in, out, K), or any shape that is (out, in K) in memory."""
    if by_input:
        return Link(
            ours,
            (theirs,),
            lambda parts: parts[0].transpose(0, 1).flatten(1),
            lambda t: [t.unflatten(1, (-1, functions)).transpose(0, 1)],
        )
    shape = state[theirs].shape[1:] if theirs in state else (-1,)
    return Link(ours, (theirs,), lambda parts: parts[0].flatten(1), lambda t: [t.unflatten(1, shape)])


def convert_network(name: str, spatial_dims: int, args: Mapping[str, Any], state: State) -> Conversion:
    """A network of `NETWORKS`. Its dropouts stand in the list of its layers, which moves the layers' numbers."""
    args = dict(args)
    features, dropout = args.pop("layers_hidden"), args.pop("dropout", 0.0)
    first, wrapped = args.pop("first_dropout", True), args.pop("l1_decay", 0.0) > 0
    kind, renamed, defaults = NETWORKS[name]
    own = {**defaults, **{renamed.get(key, key): value for key, value in args.items()}}
    spec = LAYERS[kind]
    own = {key: value for key, value in own.items() if _known(spec, key)}  # the reference ignores the rest
    model = KANMLP(features, dropout=dropout, first_dropout=first)
    links: list[Link] = []
    position = int(dropout > 0 and first)
    for number, pair in enumerate(pairwise(features)):
        last = number == len(features) - 2
        prefix = f"layers.{position}." + "module." * (wrapped and not last)
        arguments = {**own, **dict(zip(spec.features, pair, strict=True))}
        part = convert(kind, spatial_dims, arguments, below(state, prefix))
        model.layers[number] = part.module
        links += part.under(f"layers.{number}.", prefix)
        position += 1 + int(dropout > 0)
    return Conversion(model, links)


def _known(spec: Layer, argument: str) -> bool:
    return argument in spec.arguments or (argument in ("act", "base_activation") and bool(spec.acts))


def convert_factory(name: str, spatial_dims: int, args: Mapping[str, Any], state: State) -> Conversion:
    """The networks by function, whose defaults differ from those of the class."""
    kind, defaults = FACTORIES[name]
    return convert_network(kind, spatial_dims, {**defaults, **args}, state)


CONVERTERS: dict[str, Callable[[int, dict[str, Any], State], Conversion]] = {
    **{name: partial(convert, name) for name in LAYERS},
    **{name: partial(convert_network, name) for name in NETWORKS},
    **{name: partial(convert_factory, name) for name in FACTORIES},
}
