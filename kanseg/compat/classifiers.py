"""The classification networks of torch-conv-kan but ResKANet: VGG, DenseKANet, RDNet, the plain baselines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kanseg.compat.filling import (
    DIMS,
    FAMILIES,
    Arguments,
    Blank,
    BlankMixer,
    Filling,
    State,
    all_outputs,
    features,
    finished,
    halve_by_floor,
    output,
    renaming,
    with_balance_loss,
    with_defaults,
)
from kanseg.compat.layers import CHANNEL
from kanseg.compat.links import Conversion, taken
from kanseg.compat.residual import POOL, STEM, class_named, reshape_pool, reshape_stem
from kanseg.encoders import VGGKAN, DenseKANet, Encoder, PlainKANet, RDKANet
from kanseg.encoders.densekanet import BLOCKS as BLOCKS_OF_DENSE
from kanseg.encoders.rdkanet import SIZES, RDBlock
from kanseg.errors import UsageError
from kanseg.models import Classifier


def _classifier(encoder: Encoder, classes: int, head: str = "linear", pool_size: Any = 1) -> Classifier:
    return Classifier(DIMS, encoder.in_channels, classes, encoder=encoder, head=head, pool_size=pool_size)


HEADS_OF_VGG = {
    "kan": "mlp_kan",
    "fast": "mlp_fastkan",
    "kaln": "mlp_kaln",
    "kacn": "mlp_kacn",
    "wav": "mlp_wav_kan",
}
VGG_HEADS = {"Linear": "linear", "KAN": "kan", "HiddenKAN": "hidden_kan", "VGG": "vgg"}
VGG_HEADS |= {"Matryoshka": "matryoshka", "KANtryoshka": "kantryoshka"}


def convert_vgg(family: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """VGGKAN with every head and attention."""
    own = taken(args, input_channels=3, num_classes=1000, width_scale=1, vgg_type="VGG11")
    shape, head = args.pop("expected_feature_shape", (7, 7)), args.pop("head_type", "Linear")
    match = re.fullmatch(r"VGG(11|13|16|19)_?(sa)?_?(v[234])?_?(sa)?", own["vgg_type"])
    if match is None:
        raise UsageError(
            f"Unknown vgg_type '{own['vgg_type']}'; expected VGG11, VGG13v2, VGG16v4, VGG11sa, ..."
        )
    at = {(True, True): "both", (True, False): "last"}
    last, sa = bool(args.pop("last_attention", False)), bool(match[2] or match[4])
    encoder = VGGKAN(
        DIMS,
        own["input_channels"],
        plan=f"vgg{match[1]}{match[3] or ''}",
        basis=Blank,
        width=own["width_scale"],
        attention=BlankMixer if last or sa else None,
        attention_at=at.get((last, sa), "pools"),
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
    args = with_defaults(family, args)
    also = ("sa_inner_projection",)
    filling = Filling(chosen, args, state, names, single_places=r"^features\.0\.", also=also)
    filling.fill(network)
    halve_by_floor(network)
    if head not in VGG_HEADS:
        return finished(network, filling, features)
    return finished(
        network, filling, partial(with_balance_loss, 1, answer=all_outputs) if mixed else all_outputs
    )


def _vgg_numbers(encoder: Encoder) -> dict[str, str]:
    """The reference's number of each place: it counts poolings too."""
    numbers, number = {}, 0
    for level, stage in enumerate(encoder.stages):
        for name, _ in stage.named_children():
            numbers[f"encoder.stages.{level}.{name}"] = f"features.{number}"
            number += 1
    return numbers


def convert_densekanet(
    tiny: bool, defaults: Arguments, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """DenseKANet, the tiny ones with a fully connected KAN as head, and mixtures."""
    args = {**defaults, **args}
    family = class_named(args.pop("block_class"), DENSE_CLASSES, "block_class")
    own = taken(args, input_channels=3, num_classes=1000, num_init_features=64, growth_rate=32, bn_size=4)
    blocks = args.pop("block_config", (5, 5, 5) if tiny else DENSE_BLOCKS["121"])
    stem = taken(args, **{**STEM, **({"fcnv_kernel_size": 5, "fcnv_padding": 2} if tiny else {})})
    pooled = not tiny and args.pop("use_first_maxpool", True)
    pool = taken(args, **({} if tiny else dict.fromkeys(POOL)))
    encoder = DenseKANet(
        DIMS,
        own["input_channels"],
        basis=Blank,
        blocks=blocks,
        growth=own["growth_rate"],
        features=own["num_init_features"],
        bottleneck_width=own["bn_size"],
        stem_kernel=5 if tiny else 7,
        max_pool=pooled,
        last_transition=tiny,
    )
    reshape_stem(encoder.get_submodule(f"stages.0.{'0' if pooled else 'stem'}"), stem)
    if pooled:
        reshape_pool(encoder.get_submodule("stages.1.pool"), pool)
    network = _classifier(encoder, own["num_classes"], "kan" if tiny else "linear")
    first = int(pooled)
    rows = [
        (rf"encoder\.stages\.0\.{'0' if pooled else 'stem'}", "features.conv0"),
        (r"encoder\.stages\.(\d)\.block\.(\d+)\.([01])", lambda m: _dense_layer(int(m[1]) + 1 - first, m)),
        (r"encoder\.stages\.(\d)\.transition\.0", lambda m: f"features.transition{int(m[1]) - first}.norm"),
        (r"encoder\.stages\.(\d)\.transition\.2", lambda m: f"features.transition{int(m[1]) - first}.conv"),
        (r"head\.[01]", "classifier"),
    ]
    also, single = ("memory_efficient",), r"^features\.conv0\."
    filling = Filling(FAMILIES[family], args, state, renaming(rows), single_places=single, also=also)
    filling.fill(network)
    halve_by_floor(network)
    return finished(network, filling, partial(with_balance_loss, 1) if filling.family.mixture else output)


def _dense_layer(block: int, match: re.Match[str]) -> str:
    return f"features.denseblock{block}.denselayer{int(match[2]) + 1}.conv{int(match[3]) + 1}"


RDNET = {"num_init_features": 64, "growth_rates": (64, 104, 128, 128, 128, 128, 224)}
RDNET |= {"is_downsample_block": (None, True, True, False, False, False, True), "block_type": "Block"}
RDNET_UNUSED = (
    "drop_rate",
    "drop_path_rate",
    "head_init_scale",
    "zero_head",
    "checkpoint_path",
    "ls_init_value",
)


def convert_rdnet(defaults: Arguments, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """RDNet with Gram layers, narrow or not, and attention after its stages."""
    args = {**defaults, **args}
    growths, down, kinds = (args.pop(key) for key in ("growth_rates", "is_downsample_block", "block_type"))
    count = len(growths)
    kinds = [kinds] * count if isinstance(kinds, str) else kinds
    own = taken(args, num_classes=1000, num_init_features=64, num_blocks_list=[3] * count, patch_size=4)
    ratios = taken(args, bottleneck_width_ratio=4, transition_compression_ratio=0.5)
    attention = args.pop("post_block_attention", False)
    narrow = args.pop("is_bottleneck", True)
    encoder = RDKANet(
        DIMS,
        args.pop("in_chans", args.pop("in_channels", 3)),
        features=own["num_init_features"],
        growths=growths,
        halving=[number for number, halves in enumerate(down) if number and halves],
        blocks=own["num_blocks_list"],
        squeeze=[number for number, kind in enumerate(kinds) if kind.endswith("ESE")],
        patch=own["patch_size"],
        expansion=ratios["bottleneck_width_ratio"],
        transition=ratios["transition_compression_ratio"],
        scale=1.0 if args.get("ls_init_value", 1) > 0 else None,
        basis=Blank,
    )
    encoder.fills = False
    if attention:
        _attend_after_stages(encoder, own["num_init_features"])
    network = _classifier(encoder, own["num_classes"], "normed_linear")
    places = _rdnet_places(encoder, 2 if attention else 1)

    def names(path: str) -> str:
        for ours, theirs in places.items():
            if path == ours or path.startswith(f"{ours}."):
                inner = (
                    path.removeprefix(ours).replace(".layers.", ".layers.layers.").replace("3.layer", "3.fc")
                )
                return theirs + inner
        return {"head.0": "head.norm", "head.2": "head.fc"}.get(path, path)

    filling = Filling(
        FAMILIES["kagnbn" if narrow else "kagn"],
        {"norm_layer": CHANNEL, **args},
        state,
        names,
        plain_places=r"^stem\.",  # of degree 3 and narrow in any case; it shares the norm
        kinds_vary=True,
        also=(*RDNET_UNUSED, "inner_projection_attention_scale"),
    )
    filling.fill(network)
    return finished(network, filling, output)


def _attend_after_stages(encoder: Encoder, channels: int) -> None:
    """Places for attention where a run of blocks ends."""
    for level, parts in enumerate(encoder.stages):
        widened: list[nn.Module] = []
        for part in parts.children():
            if widened and isinstance(widened[-1], RDBlock) and not isinstance(part, RDBlock):
                widened.append(BlankMixer(DIMS, channels))
            channels = _channels_after(part, channels)
            widened.append(part)
        if isinstance(widened[-1], RDBlock):
            widened.append(BlankMixer(DIMS, channels))
        encoder.stages[level] = nn.Sequential(*widened)


def _channels_after(part: Any, channels: int) -> int:
    return channels + part.growth if isinstance(part, RDBlock) else part.outputs


def _rdnet_places(encoder: Encoder, step: int) -> dict[str, str]:
    """Our path of each part -> the reference's: the stem, the layers between stages, the blocks and attention.

    Args:
        step: parts of the reference that a stage is.
    """
    places, stage, block = {}, 0, 0
    for level, parts in enumerate(encoder.stages):
        for name, part in parts.named_children():
            path = f"encoder.stages.{level}.{name}"
            if isinstance(part, RDBlock):
                places[path] = f"dense_stages.{stage}.{min(stage, 1)}.dense_block{block}"
                block += 1
            elif isinstance(part, BlankMixer):
                places[path] = f"dense_stages.{stage + 1}"
            elif not places:
                places[path] = "stem.stem.0"
            else:
                stage, block = stage + step, 0
                places[path] = f"dense_stages.{stage}.0"
    return places


def convert_baseline(
    family: str, sizes: int, defaults: Arguments, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """The plain stacks of four, eight or more layers."""
    args = {**defaults, **args}
    own = taken(args, input_channels=1, num_classes=10, degree_out=3)
    widths = list(args.pop("layer_sizes"))
    strided = args.pop("stride_indexes", HALVING.get(sizes, ()))
    if sizes and len(widths) != sizes:
        raise UsageError(f"layer_sizes needs {sizes} numbers, got {widths}")
    stages: list[list[int]] = [[]]
    for number, width in enumerate(widths):
        if number and number + 1 in strided:
            stages.append([])
        stages[-1].append(width)
    kan, mixed = FAMILIES[family].layer is not None, family.startswith("moe_")
    layer = Blank if kan else partial(_vanilla, args.get("groups", 1))
    encoder = PlainKANet(DIMS, own["input_channels"], stages=stages, basis=layer)
    network = _classifier(encoder, own["num_classes"], "kan" if kan and own["degree_out"] >= 2 else "linear")
    places = [
        f"encoder.stages.{level}.{name}"
        for level, s in enumerate(encoder.stages)
        for name, _ in s.named_children()
    ]
    numbers = {place: f"layers.{number}" for number, place in enumerate(places)}
    if not kan:  # a flat list of convolutions, norms and activations
        flat = {(3 * number, place) for number, place in enumerate(places)}
        numbers = {f"{place}.{inner}": f"layers.{at + inner}" for at, place in flat for inner in (0, 1)}
    last = "output.1" if kan else "output"

    def names(path: str) -> str:
        return numbers.get(path) or re.sub(r"^head\.1", last, re.sub(r"^head\.0", "output", path))

    also = ("dropout_poly", "dropout_full", "dropout_degree", "drop_type")
    chosen = replace(FAMILIES[family], fully_connected="KAGN") if mixed else FAMILIES[family]
    filling = Filling(chosen, args, state, names, degree=own["degree_out"], also=also)
    filling.fill(network)
    return finished(network, filling, partial(with_balance_loss, 0) if mixed else output)


def _vanilla(
    default_groups: int, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any, **geometry: Any
) -> nn.Module:
    """Convolution with bias, batch norm, ReLU."""
    blank = Blank(spatial_dims, inputs, outputs, kernel_size, **{"groups": default_groups, **geometry})
    return nn.Sequential(nn.Conv2d(inputs, outputs, **blank.geometric()), nn.BatchNorm2d(outputs), nn.ReLU())


HALVING = {4: (2, 3), 8: (2, 3, 6)}  # layers of stride 2, counted from 1
# Family -> the reference's name, arguments that its classes set.
BASELINES: dict[str, tuple[str, Arguments]] = {
    "": ("SimpleConv", {}),
    "kan": ("SimpleConvKAN", {"degree_out": 2}),
    "fast": ("SimpleFastConvKAN", {"degree_out": 2}),
    "kaln": ("SimpleConvKALN", {}),
    "kacn": ("SimpleConvKACN", {}),
    "kagn": ("SimpleConvKAGN", {}),
    "wav": ("SimpleConvWavKAN", {}),
    "moe_kagnbn": ("SimpleMoEConvKAGNBN", {"k": 4}),
}
VGGS = {
    "kan": ("vggkan", "VGGKAN"),
    "fast": ("fast_vggkan", "FastVGGKAN"),
    "kaln": ("vggkaln", "VGGKALN"),
    "kacn": ("vggkacn", "VGGKACN"),
    "kagn": ("vggkagn", "VGGKAGN"),
    "kagnbn": ("vggkagn_bn", "VGGKAGN_BN"),
    "wav": ("vgg_wav_kan", "WavVVGKAN"),
    "moe_kagn": ("moe_vggkagn", "MoEVGGKAGN"),
    "moe_kagnbn": ("moe_vggkagn_bn", "MoE_VGGKAGN_BN"),
}
DENSE_BLOCKS: dict[str, tuple[int, ...]] = {str(depth): blocks for depth, blocks in BLOCKS_OF_DENSE.items()}
DENSE_BLOCKS |= {"161": (6, 12, 36, 24)}
DENSE_CLASSES = {
    "_KANDenseBlock": "kan",
    "_FastKANDenseBlock": "fast",
    "_KALNDenseBlock": "kaln",
    "_KACNDenseBlock": "kacn",
    "_KAGNDenseBlock": "kagn",
    "_BottleNeckKAGNDenseBlock": "kagnbn",
    "_MoEBottleNeckKAGNDenseBlock": "moe_kagnbn",
}
# Class of the blocks -> names with {} for the depth, name of the tiny one, and the depths.
DENSE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "_KANDenseBlock": ("densekanet{}", "tiny_densekanet", ("121",)),
    "_FastKANDenseBlock": ("fast_densekanet{}", "tiny_fast_densekanet", ("121",)),
    "_KACNDenseBlock": ("densekacnet{}", "tiny_densekacnet", ("121",)),
    "_KALNDenseBlock": ("densekalnet{}", "tiny_densekalnet", tuple(DENSE_BLOCKS)),
    "_KAGNDenseBlock": ("densekagnet{}", "tiny_densekagnet", tuple(DENSE_BLOCKS)),
    "_BottleNeckKAGNDenseBlock": ("densekagnet{}bn", "tiny_densekagnet_bn", tuple(DENSE_BLOCKS)),
    "_MoEBottleNeckKAGNDenseBlock": ("densekagnet{}moebn", "tiny_densekagnet_moebn", tuple(DENSE_BLOCKS)),
}


def _converters() -> Iterator[tuple[str, Callable[..., Conversion]]]:
    yield "KAGNRDNet", partial(convert_rdnet, RDNET)
    for size, (features_of_stem, growths, halving) in SIZES.items():
        count = len(growths)
        shape = {"num_init_features": features_of_stem, "growth_rates": growths}
        shape["is_downsample_block"] = [number in halving for number in range(count)]
        shape["block_type"] = ["Block", "Block", *["BlockESE"] * (count - 2)]
        yield f"kagrdnet_{size}", partial(convert_rdnet, shape)
    for block, (name, tiny, depths) in DENSE.items():
        shape = with_defaults(DENSE_CLASSES[block], {"block_class": block})
        yield tiny, partial(convert_densekanet, True, shape)
        for depth in depths:
            sizes = {"block_config": DENSE_BLOCKS[depth], "growth_rate": 48 if depth == "161" else 32}
            yield name.format(depth), partial(convert_densekanet, False, {**shape, **sizes})
    yield "DenseKANet", partial(convert_densekanet, False, {})
    yield "TinyDenseKANet", partial(convert_densekanet, True, {})
    for family, (name, defaults) in BASELINES.items():
        yield name, partial(convert_baseline, family, 4, defaults)
        eight = {**defaults, "degree_out": 3} if family == "kan" else defaults
        yield f"Eight{name}", partial(convert_baseline, family, 8, eight)
    yield "SixteenSimpleConvKAGN", partial(convert_baseline, "kagn", 0, {})
    for family, names in VGGS.items():
        yield from dict.fromkeys(names, partial(convert_vgg, family)).items()


CONVERTERS: dict[str, Callable[..., Conversion]] = dict(_converters())
