"""ResKANet: a residual network whose convolutions are KAN convolutions (or plain ones, its twin).

After the residual networks of torch-conv-kan (Drokin, arXiv 2407.01092), with two 3x3 convolutions a block and a stem
at full resolution, as segmentation needs it; strides and kernels are set an axis, for anisotropic voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.errors import UsageError
from kanseg.layers.kan_conv import per_axis

LayerFactory = Callable[..., nn.Module]
BLOCKS = {"reskanet10": (1, 1, 1, 1), "reskanet18": (2, 2, 2, 2), "reskanet34": (3, 4, 6, 3)}


class ResidualBlock(nn.Module):
    """Two conv-norm-act layers and a skip; a 1x1 convolution fits the skip where size or channels change."""

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
    ) -> None:
        super().__init__()
        strides = per_axis(stride, spatial_dims, "stride")
        self.layers = nn.Sequential(
            conv_layer(spatial_dims, in_channels, out_channels, kernel_size, stride=strides),
            conv_layer(spatial_dims, out_channels, out_channels, kernel_size),
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
        conv_layers: one conv-norm-act constructor a stage.
        skip_layer: constructor of the 1x1 layers in the skips.
        features_per_stage: channels of each stage.
        blocks_per_stage: residual blocks of each stage.
        strides: stride of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: kernel of each stage, a number or one an axis; default 3.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        conv_layers: Sequence[LayerFactory],
        skip_layer: LayerFactory,
        features_per_stage: Sequence[int],
        blocks_per_stage: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernel_sizes: Sequence[int | Sequence[int]],
    ) -> None:
        super().__init__()
        self.out_channels = tuple(features_per_stage)
        self.strides = tuple(per_axis(stride, spatial_dims, "strides") for stride in strides)
        widths = pairwise((in_channels, *features_per_stage))
        plans = zip(widths, conv_layers, blocks_per_stage, self.strides, kernel_sizes, strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    ResidualBlock(
                        spatial_dims,
                        inputs if block == 0 else outputs,
                        outputs,
                        kernel_size,
                        conv_layer=layer,
                        skip_layer=skip_layer,
                        stride=stride if block == 0 else 1,
                    )
                    for block in range(blocks)
                )
            )
            for (inputs, outputs), layer, blocks, stride, kernel_size in plans
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _register(name: str, blocks: Sequence[int]) -> None:
    @ENCODERS.register(name)
    def build(*args: Any, blocks_per_stage: int | Sequence[int] | None = None, **options: Any) -> ResKANet:
        stages = len(options["features_per_stage"])
        counts = blocks if blocks_per_stage is None else blocks_per_stage
        counts = (counts,) * stages if isinstance(counts, int) else tuple(counts)
        if blocks_per_stage is None:  # more stages than the preset has repeat its last one
            counts = (*counts, *[counts[-1]] * stages)[:stages]
        if len(counts) != stages or min(counts) < 1:
            raise UsageError(f"blocks_per_stage needs {stages} positive numbers, one a stage, got {counts}")
        return ResKANet(*args, blocks_per_stage=counts, **options)

    build.__doc__ = f"ResKANet with {list(blocks)} blocks a stage."


for _name, _blocks in BLOCKS.items():
    _register(_name, _blocks)
