"""The residual blocks of torch-conv-kan, which its ResKANet and UKANet are made of, and ResKANet itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from kanseg.compat.filling import (
    DIMS,
    FAMILIES,
    NEVER,
    Arguments,
    Blank,
    Filling,
    State,
    finished,
    output,
    renaming,
    with_balance_loss,
    with_defaults,
)
from kanseg.compat.links import Conversion, taken
from kanseg.encoders import ResidualBlock, ResKANet
from kanseg.encoders.reskanet import BLOCKS, DEPTHS, STEMS
from kanseg.errors import UsageError, did_you_mean
from kanseg.models import Classifier

SHAPES = {"BasicBlock": "basic", "Bottleneck": "bottleneck"}
# The reference's class of a block -> family of its layers, row of `BLOCKS`.
BLOCK_CLASSES: dict[str, tuple[str, str]] = {
    f"{name}{ending}": (family, shape)
    for name, family in {
        "KAN": "kan",
        "FastKAN": "fast",
        "KALN": "kaln",
        "KACN": "kacn",
        "KAGN": "kagn",
        "BottleneckKAGN": "kagnbn",
        "MoEKALN": "moe_kaln",
        "MoEBottleneckKAGN": "moe_kagnbn",
    }.items()
    for ending, shape in SHAPES.items()
    if (family, shape) != ("moe_kagnbn", "bottleneck")
}
IN_BLOCKS = r"^layer\d[ed]?\.\d+\.conv\d\."
STEM = {"fcnv_kernel_size": 7, "fcnv_stride": 2, "fcnv_padding": 3}  # also where the kernel is another
POOL = ("mp_kernel_size", "mp_stride", "mp_padding")


def class_named(given: Any, known: Mapping[str, Any], argument: str) -> Any:
    """What the reference's class, given itself or by its name, is in a table."""
    name = given if isinstance(given, str) else getattr(given, "__name__", repr(given))
    name = name.rsplit(".", 1)[-1]
    if name not in known:
        raise UsageError(f"Unknown {argument} '{name}' of torch-conv-kan.{did_you_mean(name, known)}")
    return known[name]


def residual_part(path: str) -> str:
    """A layer of a residual block: layers.0 -> conv1, skip -> downsample."""
    return re.sub(r"layers\.(\d)", lambda m: f"conv{int(m[1]) + 1}", path).replace("skip", "downsample")


def convert_block(name: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """One block; its `downsample` is known by the weights."""
    family, block = BLOCK_CLASSES[name]
    expansion = BLOCKS[block][1]
    inputs, outputs = args.pop("inplanes"), args.pop("planes") * expansion
    args.pop("downsample", None)
    own = taken(args, stride=1, dilation=1, base_width=64)
    network = ResidualBlock(
        DIMS,
        inputs,
        outputs,
        conv_layer=Blank,
        skip_layer=Blank,
        stride=own["stride"],
        block=block,
        middle_width=_middle_width([outputs // expansion], own["base_width"], args.get("groups", 1)),
    )
    _dilate(network, block, own["dilation"])
    if any(key.startswith("downsample.") for key in state):  # also where neither size nor channels change
        network.skip = Blank(DIMS, inputs, outputs, 1, stride=own["stride"])
    filling = Filling(
        FAMILIES[family],
        args,
        state,
        residual_part,
        block_places=r"^conv\d\.",
        kinds_vary=family.startswith("moe_"),
    )
    filling.fill(network)
    return finished(network, filling, partial(with_balance_loss, 1) if filling.family.mixture else output)


def convert_reskanet(defaults: Arguments, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """ResKANet and its mixtures, whose balance loss is a mean over the stages."""
    args = {**defaults, **args}
    family, block = class_named(args.pop("block"), BLOCK_CLASSES, "block")
    counts = list(args.pop("layers"))
    own = taken(args, input_channels=3, num_classes=1000, width_scale=1, width_per_group=64)
    hidden, pooled = args.pop("hidden_layer_dim", None), args.pop("use_first_maxpool", True)
    dilated = args.pop("replace_stride_with_dilation", None) or [False] * 3
    stem, pool = taken(args, **STEM), taken(args, **dict.fromkeys(POOL))
    mixed = family.startswith("moe_")
    widths = [8 * own["width_scale"] * 2**stage for stage in range(4)]
    encoder = ResKANet(
        DIMS,
        own["input_channels"],
        basis=Blank,
        features_per_stage=[BLOCKS[block][1] * width for width in widths],
        blocks_per_stage=counts,
        strides=[1, *(1 if instead else 2 for instead in dilated)],
        block=block,
        stem={**STEMS[224], "max_pool": pooled, "features": 2 * widths[0] if mixed else widths[0]},
        kan_skip=True,
        middle_width=_middle_width(widths, own["width_per_group"], args.get("groups", 1)),
    )
    _dilate_stages(encoder, block, dilated)
    network = Classifier(DIMS, encoder.in_channels, own["num_classes"], encoder=encoder)
    reshape_stem(network.get_submodule(f"encoder.stages.0.{'0' if pooled else 'stem'}"), stem)
    if pooled:
        reshape_pool(network.get_submodule("encoder.stages.1.pool"), pool)
    if mixed and hidden is not None:  # the others take the number and do nothing with it
        network.pool = nn.Sequential(network.pool, Blank(DIMS, encoder.out_channels[-1], hidden, 1))
        network.head[1] = nn.Linear(hidden, own["num_classes"])
    first = int(pooled)
    rows = [
        (rf"encoder\.stages\.0\.{'0' if first else 'stem'}", "conv1"),
        (
            r"encoder\.stages\.(\d)\.(\d+)\.(.*)",
            lambda m: f"layer{int(m[1]) + 1 - first}.{m[2]}.{residual_part(m[3])}",
        ),
        (r"pool\.1", "hidden_layer"),
        (r"head\.1", "fc"),
    ]
    filling = Filling(
        FAMILIES[family],
        args,
        state,
        renaming(rows),
        # Only the Gram networks and the mixtures hand their norm to the stem.
        own_norm_places=NEVER if family in ("kagn", "kagnbn") or mixed else r"^conv1\.",
        block_places=IN_BLOCKS,
        single_places=r"^(conv1|hidden_layer)\.",
        kinds_vary=mixed,
    )
    filling.fill(network)
    return finished(network, filling, partial(with_balance_loss, 1 / 4) if mixed else output)


def reshape_stem(stem: Any, geometry: Arguments) -> None:
    """The first layer by the reference's arguments `STEM`."""
    stem.reshape(**{name.removeprefix("fcnv_"): value for name, value in geometry.items()})


def reshape_pool(pool: nn.Module, geometry: Arguments) -> None:
    """The first pooling by the reference's arguments `POOL`."""
    for name, value in geometry.items():
        if value is not None:
            setattr(pool, name.removeprefix("mp_"), value)


def _middle_width(planes: list[int], base_width: float, groups: int) -> float:
    """Our factor of the channels in the middle; the reference rounds before it multiplies by the groups."""
    factor = base_width / 64 * groups
    if any(int(width * factor) != int(width * base_width / 64) * groups for width in planes):
        raise UsageError(
            f"width_per_group={base_width} with groups={groups} is not supported: it must divide evenly"
        )
    return factor


def _dilate_stages(encoder: ResKANet, block: str, instead: list[bool]) -> None:
    """Dilation where a stage has it instead of a stride; the first block of a stage has that of the stage before."""
    dilation, shift = 1, len(encoder.stages) - 4
    for number, replaced in enumerate([False, *instead]):
        before, dilation = dilation, dilation * (2 if replaced else 1)
        blocks = [
            part for part in encoder.stages[number + shift].children() if isinstance(part, ResidualBlock)
        ]
        for position, part in enumerate(blocks):
            _dilate(part, block, dilation if position else before)


def _dilate(part: ResidualBlock, block: str, dilation: int) -> None:
    if dilation == 1:
        return
    if block != "bottleneck":
        raise UsageError(
            "blocks of two layers take no dilation in torch-conv-kan; choose a ...Bottleneck block"
        )
    layer: Any = part.layers[1]
    layer.reshape(dilation=dilation)


def _shape(depth: int, pixels: int) -> Arguments:
    """Arguments of the networks by their names: blocks a stage and the stem for images of that many pixels."""
    stem = STEMS[pixels]
    kernel, pooled = stem["kernel_size"], bool(stem.get("max_pool"))
    geometry = {"fcnv_kernel_size": kernel, "fcnv_stride": stem.get("stride", 1), "fcnv_padding": kernel // 2}
    return {"layers": DEPTHS[depth], "use_first_maxpool": pooled, **geometry}


# Name, with {} for depth and size of image; class of the blocks before its ending; sizes.
NAMES: list[tuple[str, str, list[tuple[int, int]]]] = [
    ("reskanet_{}", "KAN", [(18, 32)]),
    ("fast_reskanet_{}", "FastKAN", [(18, 32)]),
    ("reskacnet_{}", "KACN", [(18, 32)]),
    ("reskalnet_{}", "KALN", [(18, 32), (18, 64), (50, 64), (101, 64), (101, 32), (152, 64), (152, 32)]),
    ("moe_reskalnet_{}", "MoEKALN", [(18, 64), (50, 64), (101, 64), (152, 64)]),
    ("reskagnet_{}", "KAGN", [(18, 32), (34, 32), (101, 64)]),
    ("reskagnet{}", "KAGN", [(18, 224), (50, 224), (101, 224), (152, 224)]),
    ("reskagnet_bn{}", "BottleneckKAGN", [(50, 224)]),
    ("reskagnetbn_{}", "BottleneckKAGN", [(18, 32), (34, 32)]),
    ("reskagnetbn_moe_{}", "MoEBottleneckKAGN", [(18, 32), (34, 32)]),
]
CONVERTERS: dict[str, Any] = {name: partial(convert_block, name) for name in BLOCK_CLASSES}
CONVERTERS |= dict.fromkeys(("ResKANet", "MoEResKANet"), partial(convert_reskanet, {}))
for _name, _blocks, _sizes in NAMES:
    for _depth, _pixels in _sizes:
        _block = f"{_blocks}{'BasicBlock' if _depth < 50 else 'Bottleneck'}"
        _defaults = with_defaults(BLOCK_CLASSES[_block][0], {"block": _block, **_shape(_depth, _pixels)})
        _size = f"{_depth}x{_pixels}p" if _pixels < 224 else str(_depth)
        CONVERTERS[_name.format(_size)] = partial(convert_reskanet, _defaults)
