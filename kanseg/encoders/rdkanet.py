"""RDKANet: a dense network with depthwise convolutions and residual scales (RDNet, Kim et al., arXiv 2403.19588).

Shapes after torch-conv-kan (Drokin, arXiv 2407.01092): patches of 4, then stages of dense blocks, each of a depthwise
7x7, a 1x1 to four times the width and a 1x1 to the growth, scaled by a learned factor that starts near zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.encoders.layers import Layer, LayerFactory, check_kernels, depthwise_layers, stage_layers
from kanseg.errors import UsageError

# features of the stem; growth of each stage (each of three blocks); stages that halve the resolution.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (32, (32, 52, 64, 64, 64, 64, 112), (1, 2, 6)),
    "small": (72, (64, 128, *[128] * 7, 240, 240), (1, 2, 9)),
    "base": (120, (96, 128, *[168] * 7, 336, 336), (1, 2, 9)),
    "large": (144, (128, 192, *[256] * 8, 360, 360), (1, 2, 10)),
}
START = 1e-6  # of the residual scales


def _by_eight(width: float) -> int:
    return max(8, int(width / 8) * 8)


class EffectiveSqueeze(nn.Module):
    """x times a hard sigmoid of a 1x1 layer over its mean (effective squeeze and excitation)."""

    def __init__(self, spatial_dims: int, channels: int, layer: LayerFactory) -> None:
        super().__init__()
        self.layer = layer(spatial_dims, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.layer(x.mean(dim=tuple(range(2, x.dim())), keepdim=True)))


class RDBlock(nn.Module):
    """x -> [x, gamma * layers(x)]: depthwise, 1x1 to a multiple of the width, 1x1 to `growth`, squeeze.

    Args:
        scale: that gamma starts with; None is none, as 1 that is not learned.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        growth: int,
        *,
        kernel_size: int,
        expansion: float,
        squeeze: bool,
        scale: float | None,
        layer: LayerFactory,
        depthwise_layer: LayerFactory,
    ) -> None:
        super().__init__()
        self.growth = growth
        middle = _by_eight(in_channels * expansion)
        self.layers = nn.Sequential(
            depthwise_layer(spatial_dims, in_channels, in_channels, kernel_size, groups=in_channels),
            layer(spatial_dims, in_channels, middle, 1),
            layer(spatial_dims, middle, growth, 1),
        )
        if squeeze:
            self.layers.append(EffectiveSqueeze(spatial_dims, growth, layer))
        self.gamma = None if scale is None else nn.Parameter(torch.full((growth,), scale))

    def forward(self, x: Tensor) -> Tensor:
        added = self.layers(x)
        if self.gamma is not None:
            added = added * self.gamma.view(-1, *[1] * (x.dim() - 2))
        return torch.cat([x, added], dim=1)


class RDKANet(Encoder):
    """Encoder of dense blocks with depthwise convolutions, (N, in_channels, *S) -> one map a resolution, from 1/4 on.

    Where a layer's stride does not divide a map, the map is filled up with zeros at its far ends.

    Args:
        size: "tiny", "small", "base" or "large", the defaults of the next three.
        features: channels of the stem.
        growths: channels that each block of a stage adds.
        halving: stages that start by halving the resolution.
        blocks: blocks of a stage, a number or one a stage.
        squeeze: stages that have squeeze and excitation; default all but the first two.
        patch: kernel and stride of the stem.
        kernel_size: of the depthwise convolutions.
        expansion: width between the 1x1 layers, in multiples of the block's input.
        transition: channels kept between stages.
        scale: that the learned factors of the blocks start with; None leaves them out.
        stem_options: layer options of the stem, over the others'. In torch-conv-kan it is always narrow,
            {"bottleneck": True}.
        basis, kan_stages, layer_options: see `kanseg.encoders.layers`; one basis a map. The depthwise convolutions are
            never narrow.

    >>> RDKANet(2, 3, features=8, growths=(8, 8), halving=(1,), blocks=1).out_channels
    (16, 16)
    """

    fills = True  # torch-conv-kan leaves what is over at the far ends

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        size: str = "tiny",
        features: int | None = None,
        growths: Sequence[int] | None = None,
        halving: Sequence[int] | None = None,
        blocks: int | Sequence[int] = 3,
        squeeze: Sequence[int] | None = None,
        patch: int = 4,
        kernel_size: int = 7,
        expansion: float = 4,
        transition: float = 0.5,
        scale: float | None = START,
        stem_options: dict[str, Any] | None = None,
        basis: Layer | Sequence[Layer] = "gram",
        kan_stages: str | Sequence[int] = "all",
        **layer_options: Any,
    ) -> None:
        check_kernels([kernel_size])
        if size not in SIZES:
            raise UsageError(f"size must be one of {list(SIZES)}, got '{size}'")
        preset = SIZES[size]
        features = preset[0] if features is None else features
        growths = preset[1] if growths is None else tuple(growths)
        halving = preset[2] if halving is None else tuple(halving)
        counts = (blocks,) * len(growths) if isinstance(blocks, int) else tuple(blocks)
        squeeze = range(2, len(growths)) if squeeze is None else squeeze
        if len(counts) != len(growths) or not set(halving) <= set(range(1, len(growths))):
            raise UsageError(
                f"blocks needs {len(growths)} entries and halving lies in 1 ... {len(growths) - 1}, one a stage of "
                f"growths, got {counts} and {tuple(halving)}"
            )
        widths, channels = [], features
        for number, (growth, count) in enumerate(zip(growths, counts, strict=True)):
            channels = _by_eight(channels * transition) if number else channels
            channels += growth * count
            widths.append(channels)
        last = [number - 1 for number in sorted(halving)] + [len(growths) - 1]
        strides = (patch, *[2] * len(halving))
        super().__init__(spatial_dims, in_channels, [widths[number] for number in last], strides)
        layers = stage_layers(basis, len(strides), kan_stages, **layer_options)
        deep = depthwise_layers(basis, len(strides), kan_stages, **layer_options)
        first = stage_layers(basis, len(strides), kan_stages, **{**layer_options, **(stem_options or {})})[0]
        stem = first(spatial_dims, in_channels, features, patch, stride=patch, padding=0, groups=1)
        self.stages = nn.ModuleList()
        parts: list[nn.Module] = [stem]
        channels = features
        for number, (growth, count) in enumerate(zip(growths, counts, strict=True)):
            level = len(self.stages) + (number in halving)
            if number in halving:
                self.stages.append(nn.Sequential(*parts))
                parts = []
            if number:
                width, kernel = _by_eight(channels * transition), 2 if number in halving else 1
                parts.append(
                    layers[level](spatial_dims, channels, width, kernel, stride=kernel, padding=0, groups=1)
                )
                channels = width
            for _ in range(count):
                made = RDBlock(
                    spatial_dims,
                    channels,
                    growth,
                    kernel_size=kernel_size,
                    expansion=expansion,
                    squeeze=number in squeeze,
                    scale=scale,
                    layer=layers[level],
                    depthwise_layer=deep[level],
                )
                parts.append(made)
                channels += growth
        self.stages.append(nn.Sequential(*parts))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage, stride in zip(self.stages, self.strides, strict=True):
            lacking = [-size % step for size, step in zip(x.shape[2:], stride, strict=True)]
            filled = self.fills and any(lacking)
            x = stage(F.pad(x, [end for n in reversed(lacking) for end in (0, n)]) if filled else x)
            maps.append(x)
        return maps


for _size in SIZES:
    ENCODERS.preset(
        f"rdkanet_{_size}",
        RDKANet,
        f"Dense blocks with depthwise convolutions, {_size}, from 1/4 on.",
        size=_size,
    )
