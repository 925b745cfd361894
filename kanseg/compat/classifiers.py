"""The classification networks of torch-conv-kan: ResKANet, VGG, DenseKANet, RDNet, the plain baselines."""

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
    finished,
    halve_by_floor,
    output,
    renaming,
    residual_part,
    taken,
    with_balance_loss,
    with_defaults,
)
from kanseg.compat.links import Conversion
from kanseg.encoders import VGGKAN, DenseKANet, Encoder, PlainKANet, RDKANet, ResKANet
from kanseg.encoders.densekanet import BLOCKS as BLOCKS_OF_DENSE
from kanseg.encoders.rdkanet import SIZES, RDBlock
from kanseg.encoders.reskanet import BLOCKS, DEPTHS, STEMS
from kanseg.errors import UsageError
from kanseg.models import Classifier


def _classifier(encoder: Encoder, classes: int, head: str = "linear", pool_size: Any = 1) -> Classifier:
    return Classifier(DIMS, encoder.in_channels, classes, encoder=encoder, head=head, pool_size=pool_size)


def convert_reskanet(
    family: str, depth: int, pixels: int, spatial_dims: int, args: Arguments, state: State
) -> Conversion:
    """ResKANet and its mixtures, whose balance loss is a mean over the stages."""
    own = taken(args, input_channels=3, num_classes=1000, width_scale=1, width_per_group=64)
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
        (
            r"encoder\.stages\.(\d)\.(\d+)\.(.*)",
            lambda m: f"layer{int(m[1]) + 1 - first}.{m[2]}.{residual_part(m[3])}",
        ),
        (r"head\.1", "fc"),
    ]
    args = with_defaults(family, args)
    filling = Filling(
        FAMILIES[family], args, state, renaming(rows), single_places=r"^conv1\.", kinds_vary=mixed
    )
    filling.fill(network)
    return finished(network, filling, partial(with_balance_loss, 1 / 4) if mixed else output)


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
    args = with_defaults(family, args)
    filling = Filling(chosen, args, state, names, single_places=r"^features\.0\.")
    filling.fill(network)
    halve_by_floor(network)
    return finished(network, filling, partial(with_balance_loss, 1) if mixed else all_outputs)


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
    own = taken(args, input_channels=3, num_classes=1000, num_init_features=64, growth_rate=None, bn_size=4)
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
    args = with_defaults(family, args)
    filling = Filling(FAMILIES[family], args, state, renaming(rows), single_places=r"^features\.conv0\.")
    filling.fill(network)
    halve_by_floor(network)
    return finished(network, filling, partial(with_balance_loss, 1) if mixed else output)


def _dense_layer(block: int, match: re.Match[str]) -> str:
    return f"features.denseblock{block}.denselayer{int(match[2]) + 1}.conv{int(match[3]) + 1}"


DENSE_BLOCKS: dict[str, tuple[int, ...]] = {str(depth): blocks for depth, blocks in BLOCKS_OF_DENSE.items()}
DENSE_BLOCKS |= {"161": (6, 12, 36, 24), "tiny": (5, 5, 5)}


def convert_rdnet(size: str, spatial_dims: int, args: Arguments, state: State) -> Conversion:
    """RDNet with Gram layers, narrow or not."""
    features, growths, halving = SIZES[size]
    own = taken(args, num_classes=1000, num_init_features=features, growth_rates=growths)
    count = len(own["growth_rates"])
    down = args.pop("is_downsample_block", None) or [number in halving for number in range(count)]
    kinds = args.pop("block_type", None) or ["Block", "Block", *["BlockESE"] * (count - 2)]
    own |= taken(
        args, num_blocks_list=[3] * count, bottleneck_width_ratio=4, transition_compression_ratio=0.5
    )
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
                inner = (
                    path.removeprefix(ours).replace(".layers.", ".layers.layers.").replace("3.layer", "3.fc")
                )
                return theirs + inner
        return {"head.0": "head.norm", "head.2": "head.fc"}.get(path, path)

    narrow = "dense_stages.0.0.dense_block0.layers.layers.1.inner_proj.0.weight" in state
    args = {"norm_layer": "LayerNorm2d", **args}
    # The stem is narrow in any case.
    filling = Filling(FAMILIES["kagnbn" if narrow else "kagn"], args, state, names, kinds_vary=True)
    filling.fill(network)
    return finished(network, filling, output)


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
    own = taken(args, input_channels=3, num_classes=10, degree_out=2)
    widths = list(args.pop("layer_sizes"))
    if len(widths) != sizes:
        raise UsageError(f"layer_sizes needs {sizes} numbers, got {widths}")
    stages = (
        [widths[:1], widths[1:2], widths[2:]]
        if sizes == 4
        else [widths[:1], widths[1:2], widths[2:5], widths[5:]]
    )
    kan = FAMILIES[family].layer is not None
    layer = Blank if kan else partial(_vanilla, _plain_affine(state))
    encoder = PlainKANet(DIMS, own["input_channels"], stages=stages, basis=layer)
    network = _classifier(encoder, own["num_classes"], "kan" if kan and own["degree_out"] >= 2 else "linear")
    places = [
        f"encoder.stages.{level}.{name}"
        for level, s in enumerate(encoder.stages)
        for name, _ in s.named_children()
    ]
    numbers = {place: f"layers.{number}" for number, place in enumerate(places)}
    if not kan:
        numbers = {
            f"{place}.{inner}": f"layers.{at + inner}"
            for place, at in zip(places, _plain_positions(state), strict=False)
            for inner in (0, 1)
        }
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
    return finished(network, filling, partial(with_balance_loss, 0) if mixed else output)


def _vanilla(
    affine: bool, spatial_dims: int, inputs: int, outputs: int, kernel_size: Any, **geometry: Any
) -> nn.Module:
    """Convolution with bias, batch norm, ReLU."""
    conv = nn.Conv2d(
        inputs, outputs, **Blank(spatial_dims, inputs, outputs, kernel_size, **geometry).geometric()
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, affine=affine), nn.ReLU())


def _plain_affine(state: State) -> bool:
    return any(
        key.endswith("running_mean") and key.replace("running_mean", "weight") in state for key in state
    )


def _plain_positions(state: State) -> list[int]:
    """Numbers of the convolutions in a flat list of layers."""
    found = (re.fullmatch(r"layers\.(\d+)\.weight", key) for key in state if state[key].dim() == DIMS + 2)
    return sorted(int(match[1]) for match in found if match)


BASELINES = {"": "SimpleConv", "kan": "SimpleConvKAN", "fast": "SimpleFastConvKAN", "kaln": "SimpleConvKALN"}
BASELINES |= {"kacn": "SimpleConvKACN", "kagn": "SimpleConvKAGN", "wav": "SimpleConvWavKAN"}
VGGS = {
    "wav": ("wav_vggkan", "WavVVGKAN"),
    "kagnbn": ("vggkagn_bn", "VGGKAGN_BN"),
    "kan": ("vggkan", "VGGKAN"),
}
VGGS |= {"fast": ("fast_vggkan", "FastVGGKAN"), "moe_kagn": ("moe_vggkagn", "MoEVGGKAGN")}
VGGS |= {"moe_kagnbn": ("moe_vggkagn_bn", "MoE_VGGKAGN_BN")}
VGGS |= {family: (f"vgg{family}", f"VGG{family.upper()}") for family in ("kaln", "kacn", "kagn")}


def _converters() -> Iterator[tuple[str, Callable[..., Conversion]]]:
    for size in SIZES:
        yield f"kagrdnet_{size}", partial(convert_rdnet, size)
    yield "KAGNRDNet", partial(convert_rdnet, "tiny")
    for family in ("kan", "fast", "kaln", "kacn", "kagn", "kagnbn", "moe_kaln", "moe_kagnbn"):
        yield from _backbones(family)
    for family, name in BASELINES.items():
        yield name, partial(convert_baseline, family, 4)
        yield f"Eight{name}", partial(convert_baseline, family, 8)
    for family, names in VGGS.items():
        yield from dict.fromkeys(names, partial(convert_vgg, family)).items()


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
