"""ResKANet: a residual network whose convolutions are KAN convolutions (or plain ones, its twin).

After the residual networks of torch-conv-kan (Drokin, arXiv 2407.01092). `reskanet18` and its like have two 3x3
convolutions a block and start at full resolution, as segmentation needs it; strides and kernels are set an axis, for
anisotropic voxels. `reskanet18x32p`, `x64p` and `x224p` are the published shapes for images of that many pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.encoders.layers import INSTANCE, Layer, LayerFactory, check_kernels, network_layer, stage_layers
from kanseg.errors import UsageError, did_you_mean, unknown_option
from kanseg.layers.geometry import of_dims, per_axis

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
DEPTHS[152] = (3, 8, 36, 3)
# Layers of a block, "k" with the stage's kernel and "1" pointwise, and how much wider its output is than its middle.
BLOCKS = {"two_convs": ("kk", 1), "basic": ("k1", 1), "bottleneck": ("1k1", 4)}
STEM = ("kernel_size", "stride", "features", "max_pool")
# Stems of the published networks, by the size of images they are for.
STEMS: dict[int, dict[str, Any]] = {
    32: {"kernel_size": 3},
    64: {"kernel_size": 3, "max_pool": True},
    224: {"kernel_size": 7, "stride": 2, "max_pool": True},
}


class ResidualBlock(nn.Module):
    """Conv-norm-act layers and a skip; a 1x1 layer fits the skip where size or channels change.

    Args:
        block: row of `BLOCKS`. The stride is that of its first layer with a kernel.
        middle_width: factor of the channels in the middle of bottleneck blocks.
        first_groups: groups of the first layer, where it is the one on the image.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        conv_layer: LayerFactory,
        skip_layer: LayerFactory,
        stride: int | Sequence[int] = 1,
        block: str = "two_convs",
        middle_width: float = 1,
        first_groups: int | None = None,
    ) -> None:
        super().__init__()
        strides = per_axis(stride, spatial_dims, "stride")
        kinds, expansion = BLOCKS[block]
        middle = max(1, int(out_channels // expansion * middle_width)) if expansion > 1 else out_channels
        widths = pairwise((in_channels, *[middle] * (len(kinds) - 1), out_channels))
        strided = kinds.index("k")
        self.layers = nn.Sequential(
            *(
                conv_layer(
                    spatial_dims,
                    *width,
                    {"k": kernel_size, "1": 1}[kind],
                    stride=strides if place == strided else 1,
                    **({} if first_groups is None or place else {"groups": first_groups}),
                )
                for place, (kind, width) in enumerate(zip(kinds, widths, strict=True))
            )
        )
        fits = in_channels == out_channels and set(strides) == {1}
        self.skip = (
            nn.Identity() if fits else skip_layer(spatial_dims, in_channels, out_channels, 1, stride=strides)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.skip(x)


class ResKANet(Encoder):
    """Residual encoder, (N, in_channels, *S) -> maps of `features_per_stage` channels.

    Args:
        basis: basis or family of the layers, None for plain ones; or one a stage.
        features_per_stage: channels of each stage.
        blocks_per_stage: residual blocks of each stage.
        strides: stride of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: kernel of each stage, a number or one an axis; default 3.
        block: "two_convs", "basic" (a convolution and a 1x1) or "bottleneck" (1x1 down, convolution, 1x1 up to four
            times the width).
        stem: a layer before the first stage: kernel_size, stride (default 1), features (default those of the first
            stage), max_pool (default False): whether the first stage starts with a max pooling by 2. Then the stem
            gives a map of its own.
        middle_width: factor of the channels in the middle of bottleneck blocks.
        kan_skip: the 1x1 layers of the skips are like the others; else plain, without activation.
        kan_stages, layer_options: see `kanseg.encoders.layers`.

    >>> ResKANet(3, 1, features_per_stage=(4, 8), blocks_per_stage=(1, 1)).strides
    ((1, 1, 1), (2, 2, 2))
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        basis: Layer | Sequence[Layer] = "gram",
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        blocks_per_stage: int | Sequence[int] = 2,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        block: str = "two_convs",
        stem: dict[str, Any] | None = None,
        kan_skip: bool = False,
        middle_width: float = 1,
        kan_stages: str | Sequence[int] = "all",
        norm: str | Sequence | None = INSTANCE,
        **layer_options: Any,
    ) -> None:
        count = len(features_per_stage)
        strides = (1, *[2] * (count - 1)) if strides is None else tuple(strides)
        kernel_sizes = (3,) * count if kernel_sizes is None else tuple(kernel_sizes)
        blocks = (blocks_per_stage,) * count if isinstance(blocks_per_stage, int) else tuple(blocks_per_stage)
        for name, values in (
            ("strides", strides),
            ("kernel_sizes", kernel_sizes),
            ("blocks_per_stage", blocks),
        ):
            if len(values) != count:
                raise UsageError(
                    f"{name} needs {count} entries, one a stage of features_per_stage, got {values}"
                )
        check_kernels(kernel_sizes)
        if count < 1 or min(blocks) < 1:
            raise UsageError(f"blocks_per_stage needs {count} positive numbers, one a stage, got {blocks}")
        if block not in BLOCKS:
            raise UsageError(f"Unknown block '{block}'.{did_you_mean(block, BLOCKS)}")
        for option in stem or {}:
            if option not in STEM:
                raise unknown_option("The stem", option, STEM)
        steps = [per_axis(stride, spatial_dims, "strides") for stride in strides]
        pooled = bool(stem and stem.get("max_pool"))
        width = (stem or {}).get("features", features_per_stage[0])
        first = per_axis((stem or {}).get("stride", 1), spatial_dims, "stem stride")
        if stem and not pooled:  # one map with the first stage
            steps[0] = tuple(s * f for s, f in zip(steps[0], first, strict=True))
        maps = (*([width] if pooled else []), *features_per_stage)
        pool = [first, tuple(s * 2 for s in steps[0]), *steps[1:]] if pooled else steps
        super().__init__(spatial_dims, in_channels, maps, pool)
        layers = stage_layers(basis, count, kan_stages, norm=norm, **layer_options)
        skip = network_layer(None, norm=norm, act=None)
        self.stages = nn.ModuleList()
        head: dict[str, nn.Module] = {}
        if stem:
            kernel = stem.get("kernel_size", 3)
            head["stem"] = layers[0](spatial_dims, in_channels, width, kernel, stride=first, groups=1)
        if pooled:
            self.stages.append(nn.Sequential(head.pop("stem")))
            head["pool"] = of_dims("MaxPool", spatial_dims)(3, 2, 1)
        widths = pairwise((width if stem else in_channels, *features_per_stage))
        for number, (inputs, outputs) in enumerate(widths):
            stage = nn.Sequential()
            for name, module in head.items():
                stage.add_module(name, module)
            head = {}
            for position in range(blocks[number]):
                made = ResidualBlock(
                    spatial_dims,
                    outputs if position else inputs,
                    outputs,
                    kernel_sizes[number],
                    conv_layer=layers[number],
                    skip_layer=layers[number] if kan_skip else skip,
                    stride=1 if position else strides[number],
                    block=block,
                    middle_width=middle_width,
                    first_groups=None if stem or number or position else 1,
                )
                stage.add_module(str(position), made)
            self.stages.append(stage)


def _register(name: str, depth: int, **shape: Any) -> None:
    blocks = DEPTHS[depth]

    @ENCODERS.register(name)
    def build(
        spatial_dims: int,
        in_channels: int,
        *,
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        blocks_per_stage: int | Sequence[int] | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        **options: Any,
    ) -> ResKANet:
        stages = len(features_per_stage)
        if blocks_per_stage is None:  # more stages than the preset has repeat its last one
            blocks_per_stage = (*blocks, *[blocks[-1]] * stages)[:stages]
        return ResKANet(
            spatial_dims,
            in_channels,
            features_per_stage=features_per_stage,
            blocks_per_stage=blocks_per_stage,
            strides=strides,
            kernel_sizes=kernel_sizes,
            **{**shape, **options},
        )

    build.__doc__ = f"ResKANet with {list(blocks)} blocks a stage."


def _register_published(depth: int, pixels: int) -> None:
    block = "basic" if depth < 50 else "bottleneck"
    expansion = BLOCKS[block][1]

    @ENCODERS.register(f"reskanet{depth}x{pixels}p")
    def build(
        spatial_dims: int,
        in_channels: int,
        *,
        width: float = 1,
        blocks_per_stage: int | Sequence[int] = DEPTHS[depth],
        **options: Any,
    ) -> ResKANet:
        features = [int(8 * width) * 2**stage for stage in range(4)]
        return ResKANet(
            spatial_dims,
            in_channels,
            features_per_stage=[expansion * f for f in features],
            blocks_per_stage=blocks_per_stage,
            block=block,
            stem={**STEMS[pixels], "features": features[0]},
            kan_skip=True,
            **options,
        )

    build.__doc__ = f"ResKANet as published, {depth} layers deep, for images of {pixels} pixels."


for _depth in DEPTHS:
    _register(f"reskanet{_depth}", _depth, block="two_convs" if _depth < 50 else "bottleneck")
    for _pixels in STEMS:
        if _depth > 10:
            _register_published(_depth, _pixels)
