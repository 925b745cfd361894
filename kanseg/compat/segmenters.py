"""The segmentation networks of torch-conv-kan: UKANet, UKAGNet, U2KANet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    residual_part,
    taken,
    with_defaults,
)
from kanseg.compat.links import Conversion
from kanseg.errors import UsageError, did_you_mean
from kanseg.models import U2KANet, UKAGNet, UKANet


def convert_ukanet(family: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """UKANet; its blocks but the first of each level are built without the call's arguments."""
    own = taken(args, input_channels=3, num_classes=1, width_scale=1)
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
        (r"encoder\.stages\.3\.([23])\.(.*)", lambda m: f"layer4d.{int(m[1]) - 2}.{residual_part(m[2])}"),
        (
            r"encoder\.stages\.(\d)\.(\d+)\.(.*)",
            lambda m: f"layer{int(m[1]) + 1}e.{m[2]}.{residual_part(m[3])}",
        ),
        (r"decoder\.(\d)\.layers\.0", lambda m: f"merge{3 - int(m[1])}"),
        (
            r"decoder\.(\d)\.layers\.([12])\.(.*)",
            lambda m: f"layer{3 - int(m[1])}d.{int(m[2]) - 1}.{residual_part(m[3])}",
        ),
        (r"heads\.0", "output"),
    ]
    filling = Filling(
        FAMILIES[family],
        with_defaults(family, args),
        state,
        renaming(rows),
        plain_places=r"^layer\d[ed]\.[1-9]",
    )
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, output)


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
    filling = Filling(FAMILIES["kagnbn" if narrow else "kagn"], args, state, renaming(rows))
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, output)


def convert_u2kanet(family: str, shape: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """U2KANet and the small one; all seven outputs in `eval()` too."""
    own = taken(args, input_channels=3, num_classes=1, width_scale=1)
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
    filling = Filling(FAMILIES[family], {**defaults, **args}, state, renaming(rows))
    filling.fill(network)
    align_corners(network)
    return finished(network, filling, all_outputs)


def _nested(path: str) -> str:
    for ours, theirs in (("enter", "input_conv"), ("down.", "encoder_list."), ("up.", "decoder_list.")):
        path = path.replace(ours, theirs) if path.startswith(ours) else path
    return path


SEGMENTERS = {"kan": "ukanet_18", "fast": "fast_ukanet_18", "kaln": "ukalnet_18", "kagn": "ukagnet_18"}
SEGMENTERS |= {"kacn": "ukacnet_18", "kagnbn": "ukagnetnb_18"}
NESTED = {
    "kan": "u2kanet",
    "fast": "fast_u2kanet",
    "kaln": "u2kalnet",
    "kacn": "u2kacnet",
    "kagn": "u2kagnet",
}
NESTED |= {"kagnbn": "u2kagnet_bn", "": "u2net"}
CONVERTERS: dict[str, Callable[..., Conversion]] = {
    **{name: partial(convert_ukanet, family) for family, name in SEGMENTERS.items()},
    "UKAGNet": convert_ukagnet,
    **{name: partial(convert_u2kanet, family, "large") for family, name in NESTED.items()},
    **{f"{name}_small": partial(convert_u2kanet, family, "small") for family, name in NESTED.items()},
}
