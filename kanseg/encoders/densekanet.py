"""DenseKANet: every layer of a block sees all maps before it (DenseNet, Huang et al., arXiv 1608.06993).

Shapes after torch-conv-kan (Drokin, arXiv 2407.01092): a transition is batch norm, SELU, a plain 1x1 and average
pooling, and there is no norm at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.encoders.layers import Layer, LayerFactory, stage_layers
from kanseg.errors import UsageError
from kanseg.layers.geometry import of_dims
from kanseg.layers.pointwise import pointwise_conv

POOLING = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}


class DenseBlock(nn.ModuleList):
    """Layers 1x1 to `bottleneck_width` * growth channels, then k x k to `growth`; each sees all outputs before it."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        count: int,
        growth: int,
        bottleneck_width: int,
        kernel_size: int | Sequence[int],
        layer: LayerFactory,
        inner_layer: LayerFactory,
    ) -> None:
        super().__init__(
            nn.Sequential(
                layer(spatial_dims, in_channels + number * growth, bottleneck_width * growth, 1),
                inner_layer(spatial_dims, bottleneck_width * growth, growth, kernel_size),
            )
            for number in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class DenseKANet(Encoder):
    """Densely connected encoder, (N, in_channels, *S) -> one map a resolution, the first at half.

    Args:
        basis: basis or family of the layers, None for plain ones; or one a map.
        blocks: layers of each dense block.
        growth: channels that a layer adds.
        features: channels of the stem.
        bottleneck_width: channels between the two convolutions of a layer, in multiples of `growth`.
        stem_kernel: kernel of the stem, whose stride is 2.
        max_pool: whether a max pooling by 2 follows the stem.
        last_transition: whether a transition follows the last block too (the tiny networks).
        inner_options: layer options of the k x k layers in the blocks, over the others'. Those of torch-conv-kan's
            narrow networks are {"dim_reduction": 8}.
        kan_stages, layer_options: see `kanseg.encoders.layers`.

    >>> DenseKANet(2, 1, blocks=(2, 2), growth=4, features=8).out_channels
    (8, 16, 16)
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        basis: Layer | Sequence[Layer] = "gram",
        blocks: Sequence[int] = BLOCKS[121],
        growth: int = 32,
        features: int = 64,
        bottleneck_width: int = 4,
        stem_kernel: int = 7,
        max_pool: bool = True,
        last_transition: bool = False,
        inner_options: dict[str, Any] | None = None,
        kan_stages: str | Sequence[int] = "all",
        **layer_options: Any,
    ) -> None:
        if min(*blocks, growth, features) < 1:
            raise UsageError(
                f"blocks, growth and features must be positive, got {blocks}, {growth}, {features}"
            )
        maps, channels = [features] if max_pool else [], features
        for count in blocks:
            channels += count * growth
            maps.append(channels)
            channels //= 2
        if last_transition:
            maps.append(channels)
        super().__init__(spatial_dims, in_channels, maps, (2,) * len(maps))
        layers = stage_layers(basis, len(maps), kan_stages, **layer_options)
        inner = stage_layers(basis, len(maps), kan_stages, **{**layer_options, **(inner_options or {})})
        stem = layers[0](spatial_dims, in_channels, features, stem_kernel, stride=2, groups=1)
        self.stages = nn.ModuleList()
        head: dict[str, nn.Module] = {"stem": stem}
        if max_pool:
            self.stages.append(nn.Sequential(stem))
            head = {"pool": of_dims("MaxPool", spatial_dims)(3, 2, 1)}
        channels = features
        for count in blocks:
            number = len(self.stages)
            stage = nn.Sequential()
            for name, module in head.items():
                stage.add_module(name, module)
            block = DenseBlock(
                spatial_dims, channels, count, growth, bottleneck_width, 3, layers[number], inner[number]
            )
            stage.add_module("block", block)
            self.stages.append(stage)
            channels += count * growth
            head = {"transition": _transition(spatial_dims, channels)}
            channels //= 2
        if last_transition:
            self.stages.append(nn.Sequential())
            self.stages[-1].add_module("transition", head["transition"])


class AveragePool(nn.Module):
    """Means over blocks of two voxels an axis; at an odd end, and of an axis of one, over what is there.

    torch's own refuses an axis of one in 3D, and bfloat16 on a CPU. With `ceil_mode` off an odd end is dropped.
    """

    ceil_mode = True

    def forward(self, x: Tensor) -> Tensor:
        spatial_dims = x.dim() - 2
        block = [min(2, size) for size in x.shape[2:]]
        wide = x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x
        return POOLING[spatial_dims](wide, block, [2] * spatial_dims, ceil_mode=self.ceil_mode).to(x.dtype)


def _transition(spatial_dims: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        of_dims("BatchNorm", spatial_dims)(channels),
        nn.SELU(),
        pointwise_conv(spatial_dims, channels, channels // 2, bias=False),
        AveragePool(),
    )


PRESETS: dict[str, dict[str, Any]] = {
    **{f"densekanet{depth}": {"blocks": blocks} for depth, blocks in BLOCKS.items()},
    "densekanet161": {"blocks": (6, 12, 36, 24), "growth": 48},
    "densekanet_tiny": {"blocks": (5, 5, 5), "stem_kernel": 5, "max_pool": False, "last_transition": True},
}
for _name, _row in PRESETS.items():
    ENCODERS.preset(_name, DenseKANet, f"Densely connected, blocks of {list(_row['blocks'])} layers.", **_row)
