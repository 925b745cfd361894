"""The segmentation networks of torch-conv-kan: UKANet, UKAGNet, U2KANet."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from kanseg.compat.blocks import FOCAL_OPTIONS
from kanseg.compat.filling import (
    DIMS,
    FAMILIES,
    Arguments,
    Blank,
    BlankMixer,
    Filling,
    State,
    align_corners,
    all_outputs,
    finished,
    output,
    renaming,
    with_defaults,
)
from kanseg.compat.functions import LAYER_FUNCTIONS
from kanseg.compat.links import Conversion, taken
from kanseg.compat.residual import BLOCK_CLASSES, IN_BLOCKS, class_named, reshape_stem, residual_part
from kanseg.encoders import ResidualBlock
from kanseg.errors import UsageError, did_you_mean
from kanseg.models import U2KANet, UKAGNet, UKANet

LATER_BLOCKS = r"^layer\d[ed]\.([1-9]|\d\d)"


def convert_ukanet(defaults: Arguments, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """UKANet; its blocks but the first of each level are built without the call's arguments."""
    args = {**defaults, **args}
    family, block = class_named(args.pop("block"), BLOCK_CLASSES, "block")
    if block != "basic" or FAMILIES[family].mixture:
        raise UsageError("UKANet of torch-conv-kan runs with the blocks of two layers alone (...BasicBlock)")
    counts = list(args.pop("layers"))
    own = taken(args, input_channels=3, num_classes=1000, width_scale=1, width_per_group=64)
    if any(args.pop("replace_stride_with_dilation", None) or []):
        raise UsageError("replace_stride_with_dilation of UKANet raises an error in torch-conv-kan too")
    network = UKANet(
        DIMS,
        own["input_channels"],
        own["num_classes"],
        encoder="reskanet18x32p",
        encoder_options={"blocks_per_stage": (*counts[:3], 2 * counts[3]), "width": own["width_scale"]},
        decoder="merging",
        basis=Blank,
    )
    for stage, count in zip(network.decoder, reversed(counts[:3]), strict=True):
        _repeat(stage, count)
    reshape_stem(
        network.get_submodule("encoder.stages.0.stem"),
        taken(args, fcnv_kernel_size=7, fcnv_stride=1, fcnv_padding=3),
    )
    last = counts[3]
    rows = [
        (r"encoder\.stages\.0\.stem", "conv1"),
        (
            r"encoder\.stages\.(\d)\.(\d+)\.(.*)",
            lambda m: f"{_level(int(m[1]), int(m[2]), last)}.{residual_part(m[3])}",
        ),
        (r"decoder\.(\d)\.layers\.0", lambda m: f"merge{3 - int(m[1])}"),
        (
            r"decoder\.(\d)\.layers\.(\d+)\.(.*)",
            lambda m: f"layer{3 - int(m[1])}d.{int(m[2]) - 1}.{residual_part(m[3])}",
        ),
        (r"heads\.0", "output"),
    ]
    filling = Filling(
        FAMILIES[family],
        args,
        state,
        renaming(rows),
        plain_places=LATER_BLOCKS,
        own_norm_places=LATER_BLOCKS,
        block_places=IN_BLOCKS,
    )
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, output)


def _level(stage: int, block: int, last: int) -> str:
    """The reference's name of a block of the encoder; the coarsest level has as many in its decoder."""
    down = stage < 3 or block < last
    return f"layer{stage + 1}{'e' if down else 'd'}.{block if down else block - last}"


def _repeat(stage: Any, count: int) -> None:
    """Another number of residual blocks after the merging layer."""
    merge = stage.layers[0]
    shape = (DIMS, merge.outputs, merge.outputs)
    layers: Any = {"conv_layer": Blank, "skip_layer": Blank, "block": "basic"}
    stage.layers = nn.Sequential(merge, *(ResidualBlock(*shape, **layers) for _ in range(count)))


def convert_ukagnet(spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """UKAGNet with any mixer."""
    own = taken(args, input_channels=3, num_classes=1, unet_depth=4, unet_layers=2, width_scale=1)
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
    also = ("inner_projection_attention", *FOCAL_OPTIONS)
    filling = Filling(FAMILIES["kagnbn" if narrow else "kagn"], args, state, renaming(rows), also=also)
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, output)


def convert_u2kanet(
    shape: str, family: str, first: int, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """U2KANet and the small one; all seven outputs in `eval()` too. `first` is the kernel of the first layer."""
    own = taken(args, input_channels=3, num_classes=1, width_scale=1)
    network = U2KANet(
        DIMS,
        own["input_channels"],
        own["num_classes"],
        width=own["width_scale"],
        shape=shape,
        basis=Blank,
        first_kernel=first,
    )
    rows = [
        (r"encoder\.(\d)\.(.*)", lambda m: f"stage{int(m[1]) + 1}.{_nested(m[2])}"),
        (r"decoder\.(\d)\.(.*)", lambda m: f"stage{int(m[1]) + 1}d.{_nested(m[2])}"),
        (r"heads\.(\d)", lambda m: f"side{int(m[1]) + 1}"),
        (r"together", "outconv"),
    ]
    filling = Filling(FAMILIES[family], args, state, renaming(rows))
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, all_outputs)


def convert_by_name(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """The networks by function."""
    family, small = NESTED[name.removesuffix("_small")], name.endswith("_small")
    first = 1 if (family, small) == ("kagnbn", True) else 3  # this one's first layer has no kernel
    defaults = {"grid_size": 5, "grid_range": (-2, 2)} if family == "fast" else {}
    shape = "small" if small else "large"
    return convert_u2kanet(shape, family, first, spatial_dims, {**defaults, **args}, state)


def convert_by_layer(shape: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """The networks by class, whose layers are given as functions: one of `FUNCTIONS`, its name, or a partial of it."""
    layer, first = (_function(args.pop(key)) for key in ("conv_func", "conf_fun_first"))
    family, kernel, options = layer
    if kernel != 3:
        raise UsageError("conv_func of U2KANet must have a 3x3 kernel")
    names = {"in_ch": "input_channels", "out_ch": "num_classes", "width_factor": "width_scale"}
    given = {names[key]: value for key, value in args.items() if key in names}
    return convert_u2kanet(shape, family, first[1], spatial_dims, {**options, **given}, state)


def _function(given: Any) -> tuple[str, int, Arguments]:
    """Family, kernel and arguments of a layer that is given as a function."""
    options = dict(getattr(given, "keywords", {}))
    family, kernel = class_named(getattr(given, "func", given), LAYER_FUNCTIONS, "function")
    return family, kernel, options


def _nested(path: str) -> str:
    for ours, theirs in (("enter", "input_conv"), ("down.", "encoder_list."), ("up.", "decoder_list.")):
        path = path.replace(ours, theirs) if path.startswith(ours) else path
    return path


SEGMENTERS = {
    "ukanet_18": "KANBasicBlock",
    "fast_ukanet_18": "FastKANBasicBlock",
    "ukalnet_18": "KALNBasicBlock",
    "ukagnet_18": "KAGNBasicBlock",
    "ukacnet_18": "KACNBasicBlock",
    "ukagnetnb_18": "BottleneckKAGNBasicBlock",
}
OF_NAMES = {"layers": (2, 2, 2, 2), "fcnv_kernel_size": 3, "fcnv_padding": 1}
NESTED = {
    "u2kanet": "kan",
    "fast_u2kanet": "fast",
    "u2kalnet": "kaln",
    "u2kacnet": "kacn",
    "u2kagnet": "kagn",
    "u2kagnet_bn": "kagnbn",
    "u2net": "",
}
CONVERTERS: dict[str, Any] = {
    "UKANet": partial(convert_ukanet, {}),
    **{
        name: partial(
            convert_ukanet,
            with_defaults(BLOCK_CLASSES[block][0], {"block": block, "num_classes": 1, **OF_NAMES}),
        )
        for name, block in SEGMENTERS.items()
    },
    "UKAGNet": convert_ukagnet,
    **{
        f"{name}{ending}": partial(convert_by_name, name + ending)
        for name in NESTED
        for ending in ("", "_small")
    },
    "U2KANet": partial(convert_by_layer, "large"),
    "U2KANetSmall": partial(convert_by_layer, "small"),
}
