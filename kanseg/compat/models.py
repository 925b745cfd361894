"""The networks of torch-conv-kan: ours with blank places for layers, which the reference's layers then fill.

Every network is built by the constructors of `kanseg.models` and `kanseg.encoders`; what differs from ours stands here:
names of weights, defaults of the reference's functions, and layers that it builds without their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from kanseg.compat import blocks, layers, legacy, linear
from kanseg.compat.links import Conversion, Link, below
from kanseg.encoders import VGGKAN, DenseKANet, Encoder, PlainKANet, RDKANet, ResKANet
from kanseg.encoders.densekanet import BLOCKS as BLOCKS_OF_DENSE
from kanseg.encoders.rdkanet import SIZES, RDBlock
from kanseg.encoders.reskanet import BLOCKS, DEPTHS, STEMS
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.kan_conv import per_axis
from kanseg.layers.linear import KANMLP
from kanseg.layers.mixture import take_balance_loss
from kanseg.models import Classifier, U2KANet, UKAGNet, UKANet
from kanseg.models.u2kanet import NestedU
from kanseg.models.u_shape import DecoderStage

Arguments = dict[str, Any]
State = Mapping[str, Tensor]
Names = Callable[[str], str]  # a module's path in our network -> in the reference's
DIMS = 2


class Blank(nn.Module):
    """The place of a layer: what it was asked to be."""

    def __init__(self, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any = 3, **geometry: Any) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")[0]
        self.geometry = {name: per_axis(value, spatial_dims, name)[0] for name, value in geometry.items()}

    def geometric(self) -> Arguments:
        """Kernel, stride, padding, dilation and groups, as torch names them."""
        dilation = self.geometry.get("dilation", 1)
        same = dilation * (self.kernel_size - 1) // 2
        return {"kernel_size": self.kernel_size, "padding": same, **self.geometry}

    def arguments(self) -> Arguments:
        """By the reference's names."""
        return {"input_dim": self.inputs, "output_dim": self.outputs, **self.geometric()}


class BlankMixer(nn.Module):
    """The place of an attention or focal layer."""

    def __init__(self, spatial_dims: int, channels: int, **options: Any) -> None:
        super().__init__()
        self.channels = channels


class ReferenceNetwork(nn.Module):
    """A network of ours that answers as the reference's does.

    Args:
        answer: (network, x) -> output or outputs.
    """

    def __init__(self, network: nn.Module, answer: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.answer = network, answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.network, x)


@dataclass(frozen=True)
class Family:
    """One family of layers in the reference's networks.

    Attributes:
        layer: class of its convolutions in `kanseg.compat.layers.LAYERS`; None for plain ones.
        fully_connected: class of its networks of fully connected layers.
        defaults: arguments of its layers that the networks set.
        mixture: class of its mixtures of experts in `kanseg.compat.blocks`, for convolutions with a kernel.
        attention, focal: classes of those blocks.
    """

    layer: str | None
    fully_connected: str = "KAN"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    mixture: str | None = None
    attention: str = "SelfKAGNtention"
    focal: str = "KAGNFocalModulation"


FAST = {"grid_size": 5, "grid_range": (-1, 1)}
FUNCTION_DEFAULTS = {"fast": {"base_activation": "GELU"}}  # of the reference's functions, over those of its classes
NARROW = {"attention": "BottleNeckSelfKAGNtention", "focal": "BottleNeckKAGNFocalModulation"}
FAMILIES: dict[str, Family] = {
    "": Family(None),
    "kan": Family("KANConv", "KAN"),
    "fast": Family("FastKANConv", "FastKAN", FAST),
    "kaln": Family("KALNConv", "KALN"),
    "kacn": Family("KACNConv", "KACN"),
    "kagn": Family("KAGNConv", "KAGN"),
    "kagnbn": Family("BottleNeckKAGNConv", "BottleNeckKAGN", **NARROW),
    "wav": Family("WavKANConv", "WavKAN"),
    "moe_kan": Family("KANConv", "KAN", mixture="MoEKANConv"),
    "moe_fast": Family("FastKANConv", "FastKAN", FAST, mixture="MoEFastKANConv"),
    "moe_kaln": Family("KALNConv", "KALN", mixture="MoEKALNConv"),
    "moe_kacn": Family("KACNConv", "KACN", mixture="MoEKACNConv"),
    "moe_kagn": Family("KAGNConv", "KAGN", mixture="MoEKAGNConv"),
    "moe_kagnbn": Family("BottleNeckKAGNConv", "BottleNeckKAGN", mixture="MoEBottleNeckKAGNConv", **NARROW),
    "moe_wav": Family("WavKANConv", "WavKAN", mixture="MoEWavKANConv"),
}
EXPERTS = ("num_experts", "k", "noisy_gating", "pregate")
NORM_ARGUMENTS = ("eps", "momentum")


class Filling:
    """Puts the reference's layers into the blank places of a network and keeps the links.

    Args:
        family: of the layers.
        args: the call's arguments; those that are no layer's are not used.
        state: the reference's state_dict.
        names: our path of a place -> the reference's.
        plain_places: pattern of the reference's names where its layers are built without the call's arguments.
        single_places: pattern of the names of layers that are no mixtures although the family's are.
        degree: of the fully connected layers of the head; default as in the layers.
        kinds_vary: not all layers are of one class; their weights show which they are.
    """

    def __init__(
        self,
        family: Family,
        args: Mapping[str, Any],
        state: State,
        names: Names,
        *,
        plain_places: str = "$^",
        single_places: str = "$^",
        degree: int | None = None,
        kinds_vary: bool = False,
    ) -> None:
        self.family, self.args, self.state, self.names = family, {**family.defaults, **args}, state, names
        self.plain_places, self.single_places = re.compile(plain_places), re.compile(single_places)
        self.degree, self.kinds_vary = degree, kinds_vary
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
            return _plain_layer(blank, state)
        args = self._layer_arguments(prefix, blank, state)
        depthwise = blank.geometry.get("groups", 1) > 1
        name = "KAGNConvV2" if depthwise else self.family.layer
        single = blank.kernel_size == 1 or depthwise or self.single_places.search(prefix)
        if self.family.mixture and not single:
            args.update({key: self.args[key] for key in EXPERTS if key in self.args})
            return self._mixture(self.family.mixture, args, state)
        if self.kinds_vary and "poly_weights" in state:
            name = _polynomial(state)
        converted = layers.convert(name, DIMS, args, state)
        if str(self.args.get("norm_layer")).rsplit(".", 1)[-1].strip("'>") == "LayerNorm2d":
            channels = converted.module.get_submodule("conv").out_channels
            converted.module.norm = legacy.ChannelNorm(channels)
        return converted

    def _mixture(self, name: str, args: Arguments, state: State) -> Conversion:
        gates = [value for key, value in state.items() if key.endswith("w_gate")]
        experts = {"k": 2, "num_experts": gates[0].shape[1] if gates else 8, **args}
        if name == "MoEBottleNeckKAGNConv":
            return blocks.CONVERTERS["MoEBottleNeckKAGNConv{n}DLayer"](DIMS, experts, state)
        experts["input_size"], experts["output_size"] = experts.pop("input_dim"), experts.pop("output_dim")
        return blocks.CONVERTERS[f"{name}{{n}}DLayer"](DIMS, experts, state)

    def _layer_arguments(self, prefix: str, blank: Blank, state: State) -> Arguments:
        known = {*layers.LAYERS[str(self.family.layer)].arguments, *NORM_ARGUMENTS}
        plain = bool(self.plain_places.search(prefix))
        given = self.family.defaults if plain else self.args
        own = {key: value for key, value in given.items() if key in known}
        return {**blank.arguments(), **own, **_stored(state, blank)}

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
        return (self.focal if "focal_layers.0.beta_weights" in state else self.attention)(prefix, blank, state)

    def _block(self, name: str, blank: BlankMixer, state: State, options: Arguments) -> Conversion:
        own = {key: self.args[key] for key in ("degree", "affine", *NORM_ARGUMENTS) if key in self.args}
        inner = {}
        if "inner_proj.weight" in state:
            inner["inner_projection"] = state["inner_proj.weight"].shape[0]
        normed = "BatchNorm2d" if "norm_layer.running_mean" in state else "InstanceNorm2d"
        own["affine"] = "norm_layer.weight" in state
        projection = "proj_k.inner_proj.0.weight"
        if projection in state:
            own.update(_narrow(state[projection].shape[0], state[projection].shape[1]))
        args = {"input_dim": blank.channels, "norm_layer": normed, **own, **inner, **options}
        return blocks.CONVERTERS[f"{name}{{n}}D"](DIMS, args, state)


PARTS: dict[type[nn.Module], Callable[..., Conversion]] = {
    Blank: Filling.layer,
    BlankMixer: Filling.mixer,
    KANMLP: Filling.fully_connected,
}


def _stored(state: State, blank: Blank) -> Arguments:
    """What the weights themselves say of a layer: groups, norm, and the width of a narrow form."""
    norms = [key for key in state if re.search(r"(^|\.)layer_norm\.", key)]
    batch = any(key.endswith("running_mean") for key in norms)
    affine = any(key.endswith("weight") for key in norms)
    found: Arguments = {"norm_layer": "BatchNorm2d" if batch else "InstanceNorm2d", "affine": affine}
    found["groups"] = _groups(state) or blank.geometry.get("groups", 1)
    if "inner_proj.0.weight" in state:
        widest = max(blank.inputs, blank.outputs) // found["groups"]
        found.update(_narrow(state["inner_proj.0.weight"].shape[0], widest))
    return found


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


def _plain_layer(blank: Blank, state: State) -> Conversion:
    """[Dropout,] convolution with bias, batch norm, GELU."""
    first = min((int(key.split(".")[0]) for key in state), default=0)
    conv = nn.Conv2d(blank.inputs, blank.outputs, **blank.geometric())
    affine = f"{first + 1}.weight" in state
    module = nn.Sequential(conv, nn.BatchNorm2d(blank.outputs, affine=affine), nn.GELU())
    links = [
        Link(f"{number}.{key}", (f"{number + first}.{key}",))
        for number in (0, 1)
        for key in module[number].state_dict()
    ]
    return Conversion(module, links)


def _output(network: nn.Module, x: Tensor) -> Any:
    return network(x)


def _with_balance_loss(share: float, network: nn.Module, x: Tensor) -> Any:
    return network(x), share * take_balance_loss(network)


def _all_outputs(network: Any, x: Tensor) -> Any:
    outputs = network.outputs(x)
    return outputs if isinstance(outputs, Tensor) else tuple(outputs)


def _finished(network: nn.Module, filling: Filling, answer: Callable[[Any, Tensor], Any]) -> Conversion:
    links = [link.under("network.", "") for link in filling.links]
    return Conversion(ReferenceNetwork(network, answer), links, filling.unused)


def _taken(args: Arguments, **defaults: Any) -> Arguments:
    """These arguments, which `args` loses."""
    return {name: args.pop(name, default) for name, default in defaults.items()}


def _floor(network: nn.Module) -> None:
    """The reference drops what is left over when it halves an odd size."""
    for module in network.modules():
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            module.ceil_mode = False


def _with_defaults(family: str, args: Arguments) -> Arguments:
    return {**FUNCTION_DEFAULTS.get(family.removeprefix("moe_"), {}), **args}


def _corners(network: nn.Module) -> None:
    """The reference aligns the corners when it doubles a map."""
    for module in network.modules():
        if isinstance(module, DecoderStage | NestedU):
            module.align_corners = True


# --- segmenters ---


def convert_ukanet(family: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """UKANet; its blocks but the first of each level are built without the call's arguments."""
    own = _taken(args, input_channels=3, num_classes=1, width_scale=1)
    network = UKANet(
        DIMS,
        own["input_channels"],
        own["num_classes"],
        encoder="reskanet18x32p",
        encoder_options={"blocks_per_stage": (2, 2, 2, 4), "width": own["width_scale"]},
        decoder="merging",
        basis=Blank,
    )
    rows = [
        (r"encoder\.stages\.0\.stem", "conv1"),
        (r"encoder\.stages\.3\.([23])\.(.*)", lambda m: f"layer4d.{int(m[1]) - 2}.{_part(m[2])}"),
        (r"encoder\.stages\.(\d)\.(\d+)\.(.*)", lambda m: f"layer{int(m[1]) + 1}e.{m[2]}.{_part(m[3])}"),
        (r"decoder\.(\d)\.layers\.0", lambda m: f"merge{3 - int(m[1])}"),
        (
            r"decoder\.(\d)\.layers\.([12])\.(.*)",
            lambda m: f"layer{3 - int(m[1])}d.{int(m[2]) - 1}.{_part(m[3])}",
        ),
        (r"heads\.0", "output"),
    ]
    filling = Filling(
        FAMILIES[family], _with_defaults(family, args), state, _renaming(rows), plain_places=r"^layer\d[ed]\.[1-9]"
    )
    filling.fill(network)
    _corners(network)
    return _finished(network, filling, _output)


def _part(path: str) -> str:
    """A layer of a residual block: layers.0 -> conv1, skip -> downsample."""
    return re.sub(r"layers\.(\d)", lambda m: f"conv{int(m[1]) + 1}", path).replace("skip", "downsample")


def _renaming(rows: list[tuple[str, Any]]) -> Names:
    """The first row that matches a whole path says its name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rows]

    def rename(path: str) -> str:
        for pattern, new in compiled:
            if pattern.fullmatch(path):
                return pattern.sub(new, path)
        return path

    return rename


def convert_ukagnet(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """UKAGNet with any mixer."""
    own = _taken(args, input_channels=3, num_classes=1, unet_depth=4, unet_layers=2, width_scale=1)
    narrow, mixer = args.pop("use_bottleneck", True), args.pop("mixer_type", "conv")
    known = ("conv", "self-att", "focal")
    if mixer not in known:
        raise UsageError(f"Unknown mixer_type '{mixer}' of UKAGNet.{did_you_mean(mixer, known)}")
    network = UKAGNet(
        DIMS,
        own["input_channels"],
        own["num_classes"],
        depth=own["unet_depth"],
        layers=own["unet_layers"],
        width=own["width_scale"],
        mixer="conv" if mixer == "conv" else BlankMixer,
        basis=Blank,
    )
    rows = [
        (r"encoder\.stages\.(\d+)\.(\d+)", r"encoder.\1.\2"),
        (r"decoder\.(\d+)\.layers\.(\d+)", r"decoder.\1.\2"),
        (r"heads\.0", "output"),
    ]
    filling = Filling(FAMILIES["kagnbn" if narrow else "kagn"], args, state, _renaming(rows))
    filling.fill(network)
    _corners(network)
    return _finished(network, filling, _output)


def convert_u2kanet(family: str, shape: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """U2KANet and the small one; all seven outputs in `eval()` too."""
    own = _taken(args, input_channels=3, num_classes=1, width_scale=1)
    network = U2KANet(
        DIMS, own["input_channels"], own["num_classes"], width=own["width_scale"], shape=shape, basis=Blank
    )
    rows = [
        (r"encoder\.(\d)\.(.*)", lambda m: f"stage{int(m[1]) + 1}.{_nested(m[2])}"),
        (r"decoder\.(\d)\.(.*)", lambda m: f"stage{int(m[1]) + 1}d.{_nested(m[2])}"),
        (r"heads\.(\d)", lambda m: f"side{int(m[1]) + 1}"),
        (r"together", "outconv"),
    ]
    defaults = {"grid_range": (-2, 2)} if family == "fast" else {}
    if family == "kagnbn" and shape == "small":  # its first layer has no kernel
        first: Any = network.encoder[0].enter
        network.encoder[0].enter = Blank(DIMS, first.inputs, first.outputs, 1)
    filling = Filling(FAMILIES[family], {**defaults, **args}, state, _renaming(rows))
    filling.fill(network)
    _corners(network)
    return _finished(network, filling, _all_outputs)


def _nested(path: str) -> str:
    for ours, theirs in (("enter", "input_conv"), ("down.", "encoder_list."), ("up.", "decoder_list.")):
        path = path.replace(ours, theirs) if path.startswith(ours) else path
    return path


# --- classifiers ---


def _classifier(encoder: Encoder, classes: int, head: str = "linear", pool_size: Any = 1) -> Classifier:
    return Classifier(DIMS, encoder.in_channels, classes, encoder=encoder, head=head, pool_size=pool_size)


def convert_reskanet(
    family: str, depth: int, pixels: int, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """ResKANet and its mixtures, whose balance loss is a mean over the stages."""
    own = _taken(args, input_channels=3, num_classes=1000, width_scale=1, width_per_group=64)
    mixed = family.startswith("moe_")
    block = "basic" if depth < 50 else "bottleneck"
    widths = [int(8 * own["width_scale"]) * 2**stage for stage in range(4)]
    stem = {**STEMS[pixels], "features": 2 * widths[0] if mixed else widths[0]}
    encoder = ResKANet(
        DIMS,
        own["input_channels"],
        basis=Blank,
        features_per_stage=[BLOCKS[block][1] * width for width in widths],
        blocks_per_stage=DEPTHS[depth],
        block=block,
        stem=stem,
        kan_skip=True,
        middle_width=own["width_per_group"] / 64 * args.get("groups", 1),
    )
    network = _classifier(encoder, own["num_classes"])
    first = int(bool(stem.get("max_pool")))
    rows = [
        (rf"encoder\.stages\.0\.{'0' if first else 'stem'}", "conv1"),
        (r"encoder\.stages\.(\d)\.(\d+)\.(.*)", lambda m: f"layer{int(m[1]) + 1 - first}.{m[2]}.{_part(m[3])}"),
        (r"head\.1", "fc"),
    ]
    args = _with_defaults(family, args)
    filling = Filling(
        FAMILIES[family], args, state, _renaming(rows), single_places=r"^conv1\.", kinds_vary=mixed
    )
    filling.fill(network)
    return _finished(network, filling, partial(_with_balance_loss, 1 / 4) if mixed else _output)


HEADS_OF_VGG = {"kan": "mlp_kan", "fast": "mlp_fastkan", "kaln": "mlp_kaln", "kacn": "mlp_kacn", "wav": "mlp_wav_kan"}
VGG_HEADS = {"Linear": "linear", "KAN": "kan", "HiddenKAN": "hidden_kan", "VGG": "vgg"}
VGG_HEADS |= {"Matryoshka": "matryoshka", "KANtryoshka": "kantryoshka"}


def convert_vgg(family: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """VGGKAN with every head and attention."""
    own = _taken(args, input_channels=3, num_classes=1000, width_scale=1, vgg_type="VGG11")
    shape, head = args.pop("expected_feature_shape", (7, 7)), args.pop("head_type", "Linear")
    match = re.fullmatch(r"VGG(11|13|16|19)_?(sa)?_?(v[234])?_?(sa)?", own["vgg_type"])
    if match is None:
        raise UsageError(f"Unknown vgg_type '{own['vgg_type']}'; expected VGG11, VGG13v2, VGG16v4, VGG11sa, ...")
    last, sa = args.pop("last_attention", False), bool(match[2] or match[4])
    encoder = VGGKAN(
        DIMS,
        own["input_channels"],
        plan=f"vgg{match[1]}{match[3] or ''}",
        basis=Blank,
        width=own["width_scale"],
        attention=BlankMixer if last or sa else None,
        attention_at="last" if last else "pools",
    )
    network = _classifier(encoder, own["num_classes"], VGG_HEADS.get(head, "none"), tuple(shape))
    numbers = _vgg_numbers(encoder)

    def names(path: str) -> str:
        path = re.sub(r"\.classifiers\.(\d)$", r".nesting_classifier_\1", path)
        return numbers.get(path) or path.replace("head.", "classifier.")

    mixed = family.startswith("moe_")
    # Also the narrow networks have ordinary Gram layers in their heads.
    chosen = FAMILIES[family]
    chosen = replace(chosen, fully_connected=HEADS_OF_VGG.get(family.removeprefix("moe_"), "mlp_kagn"))
    args = _with_defaults(family, args)
    filling = Filling(chosen, args, state, names, single_places=r"^features\.0\.")
    filling.fill(network)
    _floor(network)
    return _finished(network, filling, partial(_with_balance_loss, 1) if mixed else _all_outputs)


def _vgg_numbers(encoder: Encoder) -> dict[str, str]:
    """The reference's number of each place: it counts poolings too."""
    numbers, number = {}, 0
    for level, stage in enumerate(encoder.stages):
        for name, _ in stage.named_children():
            numbers[f"encoder.stages.{level}.{name}"] = f"features.{number}"
            number += 1
    return numbers


def convert_densekanet(
    family: str, size: str, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """DenseKANet, the tiny ones with a fully connected KAN as head, and mixtures."""
    own = _taken(args, input_channels=3, num_classes=1000, num_init_features=64, growth_rate=None, bn_size=4)
    tiny = size == "tiny"
    growth = own["growth_rate"] or (48 if size == "161" else 32)
    blocks = args.pop("block_config", None) or DENSE_BLOCKS[size]
    pooled = not tiny and args.pop("use_first_maxpool", True)
    encoder = DenseKANet(
        DIMS,
        own["input_channels"],
        basis=Blank,
        blocks=blocks,
        growth=growth,
        features=own["num_init_features"],
        bottleneck_width=own["bn_size"],
        stem_kernel=5 if tiny else 7,
        max_pool=pooled,
        last_transition=tiny,
    )
    network = _classifier(encoder, own["num_classes"], "kan" if tiny else "linear")
    first = int(pooled)
    rows = [
        (rf"encoder\.stages\.0\.{'0' if pooled else 'stem'}", "features.conv0"),
        (r"encoder\.stages\.(\d)\.block\.(\d+)\.([01])", lambda m: _dense_layer(int(m[1]) + 1 - first, m)),
        (r"encoder\.stages\.(\d)\.transition\.0", lambda m: f"features.transition{int(m[1]) - first}.norm"),
        (r"encoder\.stages\.(\d)\.transition\.2", lambda m: f"features.transition{int(m[1]) - first}.conv"),
        (r"head\.[01]", "classifier"),
    ]
    mixed = family.startswith("moe_")
    args = _with_defaults(family, args)
    filling = Filling(FAMILIES[family], args, state, _renaming(rows), single_places=r"^features\.conv0\.")
    filling.fill(network)
    _floor(network)
    return _finished(network, filling, partial(_with_balance_loss, 1) if mixed else _output)


def _dense_layer(block: int, match: re.Match[str]) -> str:
    return f"features.denseblock{block}.denselayer{int(match[2]) + 1}.conv{int(match[3]) + 1}"


DENSE_BLOCKS = {**{str(depth): blocks for depth, blocks in BLOCKS_OF_DENSE.items()}, "161": (6, 12, 36, 24)}
DENSE_BLOCKS["tiny"] = (5, 5, 5)


def convert_rdnet(size: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """RDNet with Gram layers, narrow or not."""
    features, growths, halving = SIZES[size]
    own = _taken(args, num_classes=1000, num_init_features=features, growth_rates=growths)
    count = len(own["growth_rates"])
    down = args.pop("is_downsample_block", None) or [number in halving for number in range(count)]
    kinds = args.pop("block_type", None) or ["Block", "Block", *["BlockESE"] * (count - 2)]
    own |= _taken(args, num_blocks_list=[3] * count, bottleneck_width_ratio=4, transition_compression_ratio=0.5)
    stem = args.pop("input_channels", args.pop("in_chans", _stem_channels(state)))
    encoder = RDKANet(
        DIMS,
        stem,
        features=own["num_init_features"],
        growths=own["growth_rates"],
        halving=[number for number, halves in enumerate(down) if halves],
        blocks=own["num_blocks_list"],
        squeeze=[number for number, kind in enumerate(kinds) if kind.endswith("ESE")],
        patch=args.pop("patch_size", 4),
        expansion=own["bottleneck_width_ratio"],
        transition=own["transition_compression_ratio"],
        basis=Blank,
    )
    network = _classifier(encoder, own["num_classes"], "normed_linear")
    places = _rdnet_places(encoder)

    def names(path: str) -> str:
        for ours, theirs in places.items():
            if path == ours or path.startswith(f"{ours}."):
                inner = path.removeprefix(ours).replace(".layers.", ".layers.layers.").replace("3.layer", "3.fc")
                return theirs + inner
        return {"head.0": "head.norm", "head.2": "head.fc"}.get(path, path)

    narrow = "dense_stages.0.0.dense_block0.layers.layers.1.inner_proj.0.weight" in state
    args = {"norm_layer": "LayerNorm2d", **args}
    # The stem is narrow in any case.
    filling = Filling(FAMILIES["kagnbn" if narrow else "kagn"], args, state, names, kinds_vary=True)
    filling.fill(network)
    return _finished(network, filling, _output)


def _stem_channels(state: State) -> int:
    weight = state.get("stem.stem.0.base_conv.0.weight")
    return 3 if weight is None else weight.shape[1]


def _rdnet_places(encoder: Encoder) -> dict[str, str]:
    """Our path of each part -> the reference's: the stem, the layers between stages, and the blocks."""
    places, stage, block = {}, 0, 0
    for level, parts in enumerate(encoder.stages):
        for name, part in parts.named_children():
            path = f"encoder.stages.{level}.{name}"
            if isinstance(part, RDBlock):
                places[path] = f"dense_stages.{stage}.{min(stage, 1)}.dense_block{block}"
                block += 1
            elif not places:
                places[path] = "stem.stem.0"
            else:
                stage, block = stage + 1, 0
                places[path] = f"dense_stages.{stage}.0"
    return places


def convert_baseline(family: str, sizes: int, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """The plain stacks of four or eight layers."""
    own = _taken(args, input_channels=3, num_classes=10, degree_out=2)
    widths = list(args.pop("layer_sizes"))
    if len(widths) != sizes:
        raise UsageError(f"layer_sizes needs {sizes} numbers, got {widths}")
    stages = [widths[:1], widths[1:2], widths[2:]] if sizes == 4 else [widths[:1], widths[1:2], widths[2:5], widths[5:]]
    kan = FAMILIES[family].layer is not None
    layer = Blank if kan else partial(_vanilla, _plain_affine(state))
    encoder = PlainKANet(DIMS, own["input_channels"], stages=stages, basis=layer)
    network = _classifier(encoder, own["num_classes"], "kan" if kan and own["degree_out"] >= 2 else "linear")
    places = [f"encoder.stages.{level}.{name}" for level, s in enumerate(encoder.stages) for name, _ in s.named_children()]
    numbers = {place: f"layers.{number}" for number, place in enumerate(places)}
    if not kan:
        numbers = {f"{place}.{inner}": f"layers.{at + inner}" for place, at in zip(places, _plain_positions(state), strict=False) for inner in (0, 1)}
    last = "output.1" if any(key.startswith("output.1.") for key in state) else "output"
    mixed = family.startswith("moe_")

    def names(path: str) -> str:
        return numbers.get(path) or re.sub(r"^head\.\d", last, path)

    defaults = {"grid_size": 8, "grid_range": (-2, 2)} if family == "fast" else {}
    filling = Filling(
        FAMILIES[family],
        {**defaults, **args},
        state,
        names,
        single_places=r"^layers\.0\.",
        degree=own["degree_out"],
    )
    filling.fill(network)
    return _finished(network, filling, partial(_with_balance_loss, 0) if mixed else _output)


def _vanilla(affine: bool, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any, **geometry: Any) -> nn.Module:
    """Convolution with bias, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, **Blank(spatial_dims, inputs, outputs, kernel_size, **geometry).geometric())
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, affine=affine), nn.ReLU())


def _plain_affine(state: State) -> bool:
    return any(key.endswith("running_mean") and key.replace("running_mean", "weight") in state for key in state)


def _plain_positions(state: State) -> list[int]:
    """Numbers of the convolutions in a flat list of layers."""
    found = (re.fullmatch(r"layers\.(\d+)\.weight", key) for key in state if state[key].dim() == DIMS + 2)
    return sorted(int(match[1]) for match in found if match)


def _converters() -> Iterator[tuple[str, Callable[..., Conversion]]]:
    segmenting = {"kan": "ukanet_18", "fast": "fast_ukanet_18", "kaln": "ukalnet_18", "kagn": "ukagnet_18"}
    segmenting |= {"kacn": "ukacnet_18", "kagnbn": "ukagnetnb_18"}
    for family, name in segmenting.items():
        yield name, partial(convert_ukanet, family)
    yield "UKAGNet", convert_ukagnet
    nested = {"kan": "u2kanet", "fast": "fast_u2kanet", "kaln": "u2kalnet", "kacn": "u2kacnet", "kagn": "u2kagnet"}
    nested |= {"kagnbn": "u2kagnet_bn", "": "u2net"}
    for family, name in nested.items():
        yield name, partial(convert_u2kanet, family, "large")
        yield f"{name}_small", partial(convert_u2kanet, family, "small")
    for size in SIZES:
        yield f"kagrdnet_{size}", partial(convert_rdnet, size)
    yield "KAGNRDNet", partial(convert_rdnet, "tiny")
    for family in ("kan", "fast", "kaln", "kacn", "kagn", "kagnbn", "moe_kaln", "moe_kagnbn"):
        yield from _backbones(family)
    for eight, count in (("", 4), ("Eight", 8)):
        for family, name in BASELINES.items():
            yield f"{eight}{name}", partial(convert_baseline, family, count)


BASELINES = {"": "SimpleConv", "kan": "SimpleConvKAN", "fast": "SimpleFastConvKAN", "kaln": "SimpleConvKALN"}
BASELINES |= {"kacn": "SimpleConvKACN", "kagn": "SimpleConvKAGN", "wav": "SimpleConvWavKAN"}
VGGS = {"wav": ("wav_vggkan", "WavVVGKAN"), "kagnbn": ("vggkagn_bn", "VGGKAGN_BN"), "kan": ("vggkan", "VGGKAN")}
VGGS |= {"fast": ("fast_vggkan", "FastVGGKAN"), "moe_kagn": ("moe_vggkagn", "MoEVGGKAGN")}
VGGS |= {"moe_kagnbn": ("moe_vggkagn_bn", "MoE_VGGKAGN_BN")}
VGGS |= {family: (f"vgg{family}", f"VGG{family.upper()}") for family in ("kaln", "kacn", "kagn")}


def _backbones(family: str) -> Iterator[tuple[str, Callable[..., Conversion]]]:
    """Names of the residual and dense networks: [moe_][fast_]reskanet_18x32p, reskagnet_bn50, densekanet121, ..."""
    mixed, fast, narrow = (part * (part.strip("_") in family) for part in ("moe_", "fast_", "bn"))
    kind = "kan" if fast else family.removeprefix("moe_").removesuffix("bn")
    start = f"{mixed}{fast}res{kind}et"
    for depth in (18, 34, 50, 101, 152):
        for pixels in STEMS:
            convert = partial(convert_reskanet, family, depth, pixels)
            size = str(depth) if pixels == 224 else f"{depth}x{pixels}p"
            for middle in {f"{narrow}_", f"_{narrow}".rstrip("_"), narrow}:
                yield f"{start}{middle}{size}", convert
    ending = f"{mixed.removesuffix('_')}{narrow}"
    for size in DENSE_BLOCKS:
        tiny, number = ("tiny_", "") if size == "tiny" else ("", size)
        for joint in {"_" if ending else "", ""}:
            name = f"{tiny}{fast}dense{kind}et{number}{joint}{ending}"
            yield name, partial(convert_densekanet, family, size)


CONVERTERS: dict[str, Callable[..., Conversion]] = dict(_converters())
for _family, _names in VGGS.items():
    CONVERTERS |= dict.fromkeys(_names, partial(convert_vgg, _family))
