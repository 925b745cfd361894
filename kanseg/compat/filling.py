"""Networks of torch-conv-kan: ours with blank places for layers, which the reference's layers then fill.

Every network is built by the constructors of `kanseg.models` and `kanseg.encoders`; what differs from ours stands here
and in the converters: names of weights, defaults of the reference's functions, and layers built without arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from kanseg.compat import blocks, layers, legacy, linear
from kanseg.compat.links import Arguments, Conversion, Link, State, below, same_names
from kanseg.encoders.densekanet import AveragePool
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.geometry import per_axis
from kanseg.layers.kernels.operators import direct_products
from kanseg.layers.mixture import take_balance_loss
from kanseg.layers.mlp import KANMLP
from kanseg.layers.norms import activation
from kanseg.models.u2kanet import NestedU
from kanseg.models.u_shape import DecoderStage

Names = Callable[[str], str]  # a module's path in our network -> in the reference's
Answer = Callable[[Any, Tensor], Any]  # (network, x) -> output or outputs
DIMS = 2
NEVER = "(?!)"  # a pattern that no name fits


class Blank(nn.Module):
    """The place of a layer: what it was asked to be."""

    def __init__(
        self, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any = 3, **geometry: Any
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")[0]
        self.geometry = {name: per_axis(value, spatial_dims, name)[0] for name, value in geometry.items()}

    def geometric(self) -> Arguments:
        """Kernel, stride, padding, dilation and groups, as torch names them."""
        dilation = self.geometry.get("dilation", 1)
        same = dilation * (self.kernel_size - 1) // 2
        return {"kernel_size": self.kernel_size, "padding": same, **self.geometry}

    def reshape(self, **geometry: Any) -> None:
        """Other numbers, by torch's names."""
        self.kernel_size = geometry.pop("kernel_size", self.kernel_size)
        self.geometry.update(geometry)

    def arguments(self) -> Arguments:
        """By the reference's names."""
        return {"input_dim": self.inputs, "output_dim": self.outputs, **self.geometric()}


class BlankMixer(nn.Module):
    """The place of an attention or focal layer."""

    def __init__(self, spatial_dims: int, channels: int, **options: Any) -> None:
        super().__init__()
        self.channels = channels


class ReferenceNetwork(nn.Module):
    """A network of ours that answers as the reference's does, and is rounded as it: Winograd's products lose a digit.

    Args:
        answer: (network, x) -> output or outputs.
    """

    def __init__(self, network: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.network, self.answer = network, answer

    def forward(self, x: Tensor) -> Any:
        with direct_products():
            return self.answer(self.network, x)


@dataclass(frozen=True)
class Family:
    """One family of layers in the reference's networks.

    Attributes:
        layer: class of its convolutions in `kanseg.compat.layers.LAYERS`; None for plain ones.
        fully_connected: class of its networks of fully connected layers.
        in_blocks: arguments of its layers in residual blocks where the call gives none.
        mixture: class of its mixtures of experts in `kanseg.compat.blocks`, for convolutions with a kernel.
        attention, focal: classes of those blocks.
    """

    layer: str | None
    fully_connected: str = "KAN"
    in_blocks: Mapping[str, Any] = field(default_factory=dict)
    mixture: str | None = None
    attention: str = "SelfKAGNtention"
    focal: str = "KAGNFocalModulation"


FAST = {"grid_size": 5, "grid_range": (-1, 1)}
FUNCTION_DEFAULTS = {
    "fast": {"base_activation": "GELU", **FAST}
}  # where its functions differ from its classes
NARROW: dict[str, Any] = {"attention": "BottleNeckSelfKAGNtention", "focal": "BottleNeckKAGNFocalModulation"}
FAMILIES: dict[str, Family] = {
    "": Family(None),
    "kan": Family("KANConv", "KAN"),
    "fast": Family("FastKANConv", "FastKAN", FAST),
    "kaln": Family("KALNConv", "KALN"),
    "kacn": Family("KACNConv", "KACN"),
    "kagn": Family("KAGNConv", "KAGN"),
    "kagnbn": Family("BottleNeckKAGNConv", "BottleNeckKAGN", **NARROW),
    "wav": Family("WavKANConv", "WavKAN"),
    "moe_kaln": Family("KALNConv", "KALN", mixture="MoEKALNConv"),
    "moe_kagn": Family("KAGNConv", "KAGN", mixture="MoEKAGNConv"),
    "moe_kagnbn": Family("BottleNeckKAGNConv", "BottleNeckKAGN", mixture="MoEBottleNeckKAGNConv", **NARROW),
}
EXPERTS = ("num_experts", "k", "noisy_gating", "pregate")
NORM_ARGUMENTS = ("eps", "momentum")
# Arguments that the weights show, or that do nothing in `eval()`.
SEEN = ("groups", "affine", "norm_layer", "dropout", "dropout_linear", "l1_decay", "l1_penalty")
KEPT_NORMS = {"Identity", "GroupNorm", layers.CHANNEL}  # whose weights do not show which norm they are of


class Filling:
    """Puts the reference's layers into the blank places of a network and keeps the links.

    Args:
        family: of the layers.
        args: what is left of the call's arguments; a layer takes its own, and the rest is in `SEEN` or `also`.
        state: the reference's state_dict.
        names: our path of a place -> the reference's.
        plain_places: pattern of the reference's names where its layers are built without the call's arguments.
        own_norm_places: pattern of those names whose layers have their own norm, whatever `norm_layer` is.
        block_places: pattern of the names of layers in residual blocks.
        single_places: pattern of the names of layers that are no mixtures although the family's are.
        degree: of the fully connected layers of the head; default as in the layers.
        kinds_vary: not all layers are of one class; their weights show which they are.
        also: further arguments that the converter knows.

    Raises:
        UsageError: an argument that the reference does not take; the nearest is named.
    """

    def __init__(
        self,
        family: Family,
        args: Mapping[str, Any],
        state: State,
        names: Names,
        *,
        plain_places: str = NEVER,
        own_norm_places: str = NEVER,
        block_places: str = NEVER,
        single_places: str = NEVER,
        degree: int | None = None,
        kinds_vary: bool = False,
        also: Sequence[str] = (),
    ) -> None:
        self.family, self.args, self.state, self.names = family, args, state, names
        self.plain_places, self.single_places = re.compile(plain_places), re.compile(single_places)
        self.own_norm_places, self.block_places = re.compile(own_norm_places), re.compile(block_places)
        self.degree, self.kinds_vary = degree, kinds_vary
        own = ("base_activation",) if family.layer is None else layers.LAYERS[family.layer].arguments
        known = {*own, *SEEN, *NORM_ARGUMENTS, *also, *(EXPERTS if family.mixture else ())}
        if unknown := sorted(set(args) - known):
            raise UsageError(
                f"torch-conv-kan does not take '{unknown[0]}' here.{did_you_mean(unknown[0], known)}"
            )
        self.links: list[Link] = []
        self.unused: list[str] = []

    def fill(self, network: nn.Module) -> None:
        """Fill all blanks, and link everything else by its name."""
        within = "-"  # a place that has been filled, with all it held
        for path, module in list(network.named_modules()):
            if path.startswith(f"{within}."):
                continue
            kind = PARTS.get(type(module))
            if kind is None:
                direct = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                self.links += [Link(f"{path}.{key}", (f"{self.names(path)}.{key}",)) for key, _ in direct]
                continue
            within, prefix = path, self._prefix(self.names(path))
            part = kind(self, prefix, module, below(self.state, prefix))
            module, links = part.module, part.under("", prefix)
            if isinstance(module, legacy.WithBalanceLoss):
                module, links = module.layer, [self._inside(link) for link in links]
            network.set_submodule(path, module)
            self.links += [link.under(f"{path}.", "") for link in links]
            self.unused += [prefix + key for key in part.unused]

    def _inside(self, link: Link) -> Link:
        return Link(link.ours.removeprefix("layer."), link.theirs, link.to_ours, link.to_theirs)

    def _prefix(self, theirs: str) -> str:
        """Where the weights are: the reference wraps layers where it penalises their weights, and has fully connected
        layers at the place itself, or in a list there.
        """
        outer = theirs.rstrip("0123456789.")
        for place in (f"{theirs}.module.", f"{theirs}.layers.", f"{theirs}.0.layers.", f"{outer}.layers."):
            if any(key.startswith(place) for key in self.state):
                return place.removesuffix("layers.")
        return f"{theirs}."

    def fully_connected(self, prefix: str, network: KANMLP, state: State) -> Conversion:
        """Fully connected layers in a head."""
        ends: Any = (network.layers[0], network.layers[-1])
        features = [ends[0].linear.base_weight.shape[1], ends[1].linear.base_weight.shape[0]]
        args = {**self.args, "layers_hidden": features, "first_dropout": True}
        args["dropout"] = 0.0 if any(key.startswith("layers.0.") for key in state) else 0.5
        args["l1_decay"] = float(any(".module." in key for key in state))
        if self.degree is not None:
            args["degree"] = self.degree
        return linear.CONVERTERS[self.family.fully_connected](DIMS, args, state)

    def layer(self, prefix: str, blank: Blank, state: State) -> Conversion:
        """A convolution of the family, or a mixture of such."""
        if self.family.layer is None:
            return _plain_layer(blank, state, self.args.get("base_activation", "GELU"))
        args = self._layer_arguments(prefix, blank, state)
        depthwise = blank.geometry.get("groups", 1) > 1
        name = "KAGNConvV2" if depthwise else self.family.layer
        single = blank.kernel_size == 1 or depthwise or self.single_places.search(prefix)
        if self.family.mixture and not single:
            args.update({key: self.args[key] for key in EXPERTS if key in self.args})
            return self._mixture(self.family.mixture, args, state)
        if self.kinds_vary and "poly_weights" in state:
            name = _polynomial(state)
        return layers.convert(name, DIMS, args, state)

    def _mixture(self, name: str, args: Arguments, state: State) -> Conversion:
        gates = [value for key, value in state.items() if key.endswith("w_gate")]
        experts = {"k": 2, "num_experts": gates[0].shape[1] if gates else 8, **args}
        if name == "MoEBottleNeckKAGNConv":
            return blocks.CONVERTERS["MoEBottleNeckKAGNConv{n}DLayer"](DIMS, experts, state)
        experts["input_size"], experts["output_size"] = experts.pop("input_dim"), experts.pop("output_dim")
        return blocks.CONVERTERS[f"{name}{{n}}DLayer"](DIMS, experts, state)

    def _layer_arguments(self, prefix: str, blank: Blank, state: State) -> Arguments:
        known = {*layers.LAYERS[str(self.family.layer)].arguments, *NORM_ARGUMENTS}
        given = {} if self.plain_places.search(prefix) else self.args
        placed = self.family.in_blocks if self.block_places.search(prefix) else {}
        own = {key: value for key, value in {**placed, **given}.items() if key in known}
        stored = _stored(state, blank)
        if not self.own_norm_places.search(prefix):
            stored.update(_kept_norm(self.args))
        return {**blank.arguments(), **own, **stored}

    def attention(self, prefix: str, blank: BlankMixer, state: State) -> Conversion:
        """Self-attention of the family, on the channels it meets."""
        groups = _groups(below(state, "proj_k.")) or 1
        return self._block(
            self.family.attention, blank, state, {"kernel_size": 3, "padding": 1, "groups": groups}
        )

    def focal(self, prefix: str, blank: BlankMixer, state: State) -> Conversion:
        """Focal modulation of the family."""
        options = {key: self.args[key] for key in blocks.FOCAL_OPTIONS if key in self.args}
        return self._block(self.family.focal, blank, state, options)

    def mixer(self, prefix: str, blank: BlankMixer, state: State) -> Conversion:
        """What the place's weights show it to be."""
        return (self.focal if "focal_layers.0.beta_weights" in state else self.attention)(
            prefix, blank, state
        )

    def _block(self, name: str, blank: BlankMixer, state: State, options: Arguments) -> Conversion:
        own = {key: self.args[key] for key in ("degree", *NORM_ARGUMENTS) if key in self.args}
        inner = {}
        if "inner_proj.weight" in state:
            inner["inner_projection"] = state["inner_proj.weight"].shape[0]
        batch = any(key.endswith("running_mean") for key in state)
        normed = {"norm_layer": "BatchNorm2d" if batch else "InstanceNorm2d", **_kept_norm(self.args)}
        inside = any("layer_norm." in key and key.endswith("weight") for key in state)
        if inside or "norm_layer.weight" not in state:  # else each norm has its own default
            own["affine"] = inside
        projection = "proj_k.inner_proj.0.weight"
        if projection in state:
            own.update(_narrow(state[projection].shape[0], state[projection].shape[1]))
        args = {"input_dim": blank.channels, **normed, **own, **inner, **options}
        return blocks.CONVERTERS[f"{name}{{n}}D"](DIMS, args, state)


PARTS: dict[type[nn.Module], Callable[..., Conversion]] = {
    Blank: Filling.layer,
    BlankMixer: Filling.mixer,
    KANMLP: Filling.fully_connected,
}


def _stored(state: State, blank: Blank) -> Arguments:
    """What the weights themselves say of a layer: groups, norm, the grid of radial functions, a narrow form's width."""
    norms = [key for key in state if re.search(r"(^|\.)layer_norm\.", key)]
    batch = any(key.endswith("running_mean") for key in norms)
    affine = any(key.endswith("weight") for key in norms)
    found: Arguments = {"norm_layer": "BatchNorm2d" if batch else "InstanceNorm2d", "affine": affine}
    found["groups"] = _groups(state) or blank.geometry.get("groups", 1)
    if (grid := state.get("rbf.grid")) is not None:
        found.update(grid_size=len(grid), grid_range=grid[[0, -1]].tolist())
    if "inner_proj.0.weight" in state:
        widest = max(blank.inputs, blank.outputs) // found["groups"]
        found.update(_narrow(state["inner_proj.0.weight"].shape[0], widest))
    return found


def _kept_norm(args: Mapping[str, Any]) -> Arguments:
    """The call's norm where the weights do not show it, as those of one with further arguments, a partial, do not."""
    norm = args.get("norm_layer")
    if isinstance(norm, partial):
        return {"norm_layer": norm}
    layers.norm_name(norm, "batch")  # or it is refused
    name = norm if isinstance(norm, str) else getattr(norm, "__name__", "")
    name = name.rsplit(".", 1)[-1]
    return {"norm_layer": name} if name in KEPT_NORMS else {}


def _polynomial(state: State) -> str:
    """The class of a polynomial layer by its weights."""
    if "beta_weights" not in state:
        return "KALNConv"
    return "BottleNeckKAGNConv" if "inner_proj.0.weight" in state else "KAGNConv"


def _groups(state: State) -> int:
    """Groups of a layer that keeps one convolution a group, 0 where it keeps one for all."""
    found = (re.search(r"(?:base|poly)_conv\.(\d+)\.weight$", key) for key in state)
    return len({match[1] for match in found if match})


def _narrow(inner: int, widest: int) -> Arguments:
    """Arguments of a narrow form whose inner width is known."""
    return {"dim_reduction": widest / (inner + 0.5), "min_internal": 1}


def _plain_layer(blank: Blank, state: State, act: Any) -> Conversion:
    """[Dropout,] convolution with bias, which may be wrapped, batch norm, activation."""
    weights = {key: value for key, value in state.items() if key.endswith("weight") and value.dim() > 1}
    theirs = next((key.removesuffix("weight") for key in weights), "0.")
    first = int(theirs.split(".")[0])
    groups = blank.inputs // weights[f"{theirs}weight"].shape[1] if weights else 1
    conv = nn.Conv2d(blank.inputs, blank.outputs, **{**blank.geometric(), "groups": groups})
    module = nn.Sequential(conv, nn.BatchNorm2d(blank.outputs), activation(layers.activation_spec(act)))
    links = same_names(conv, "0.", theirs)
    links += [link for n in (1, 2) for link in same_names(module[n], f"{n}.", f"{first + n}.")]
    return Conversion(module, links)


def output(network: nn.Module, x: Tensor) -> Any:
    return network(x)


def all_outputs(network: Any, x: Tensor) -> Any:
    outputs = network.outputs(x)
    return outputs if isinstance(outputs, Tensor) else tuple(outputs)


def features(network: Any, x: Tensor) -> Any:
    return network.encoder(x)[-1]


def with_balance_loss(share: float, network: nn.Module, x: Tensor, answer: Answer = output) -> Any:
    return answer(network, x), share * take_balance_loss(network)


def finished(network: nn.Module, filling: Filling, answer: Answer) -> Conversion:
    links = [link.under("network.", "") for link in filling.links]
    return Conversion(ReferenceNetwork(network, answer), links, filling.unused)


def halve_by_floor(network: nn.Module) -> None:
    """The reference drops what is left over when it halves an odd size."""
    for module in network.modules():
        if isinstance(module, nn.MaxPool2d | AveragePool):
            module.ceil_mode = False


def with_defaults(family: str, args: Arguments) -> Arguments:
    return {**FUNCTION_DEFAULTS.get(family.removeprefix("moe_"), {}), **args}


def align_corners(network: nn.Module) -> None:
    """The reference aligns the corners when it doubles a map."""
    for module in network.modules():
        if isinstance(module, DecoderStage | NestedU):
            module.align_corners = True


def renaming(rows: list[tuple[str, Any]]) -> Names:
    """The first row that matches a whole path says its name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rows]

    def rename(path: str) -> str:
        for pattern, new in compiled:
            if pattern.fullmatch(path):
                return pattern.sub(new, path)
        return path

    return rename
