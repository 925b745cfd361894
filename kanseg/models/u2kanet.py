"""U2KANet: a U whose stages are small Us (U^2-Net, Qin et al., Pattern Recognition 106, 2020) of KAN layers.

After the networks of that name in torch-conv-kan (Drokin, arXiv 2407.01092), in 1D, 2D and 3D and for any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.encoders.layers import INSTANCE, Layer, LayerFactory, check_kernels, network_layer
from kanseg.errors import UsageError
from kanseg.layers.geometry import CONVOLUTIONS, of_dims
from kanseg.layers.pointwise import pointwise_conv
from kanseg.models.model import MODELS
from kanseg.models.u_shape import check_input, logits, resize

# Height of each stage's U (0: four layers without pooling), its inner and its outer channels in multiples of `width`.
LARGE = ((7, 8, 16), (6, 8, 32), (5, 16, 64), (4, 32, 128), (0, 64, 128), (0, 64, 128))
LARGE_UP = ((7, 4, 16), (6, 8, 16), (5, 16, 32), (4, 32, 64), (0, 64, 128))
SMALL = tuple((height, 4, 16) for height, _, _ in LARGE)
SMALL_UP = tuple((height, 4, 16) for height, _, _ in LARGE_UP)
SHAPES = {"large": (LARGE, LARGE_UP), "small": (SMALL, SMALL_UP)}


class NestedU(nn.Module):
    """A small U with a skip around it, (N, in_channels, *S) -> (N, out_channels, *S).

    Args:
        height: layers down, all but the last two of which pool by 2 afterwards and the last has dilation 2; 0 for four
            layers of dilations 1, 2, 4, 8 without pooling.
        middle: channels inside.
        first: constructor of the layer on the input.
    """

    align_corners = False

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        middle: int,
        out_channels: int,
        height: int,
        layer: LayerFactory,
        first: LayerFactory,
    ) -> None:
        super().__init__()
        down = (*[1] * (height - 1), 2) if height else (1, 2, 4, 8)
        up = (1,) * (height - 1) if height else (4, 2, 1)
        self.enter = first(spatial_dims, in_channels, out_channels)
        self.down = nn.ModuleList(
            layer(spatial_dims, middle if number else out_channels, middle, dilation=dilation)
            for number, dilation in enumerate(down)
        )
        self.up = nn.ModuleList(
            layer(
                spatial_dims, 2 * middle, middle if number < len(up) - 1 else out_channels, dilation=dilation
            )
            for number, dilation in enumerate(up)
        )
        self.pools = max(0, height - 2)
        self.pool = of_dims("MaxPool", spatial_dims)(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        h = entered = self.enter(x)
        skips = []
        for number, layer in enumerate(self.down):
            h = layer(h)
            skips.append(h)
            if number < self.pools:
                h = self.pool(h)
        skips.pop()
        for layer in self.up:
            skip = skips.pop()
            h = layer(torch.cat([resize(h, skip.shape[2:], self.align_corners), skip], dim=1))
        return h + entered


@MODELS.register("u2kanet")
class U2KANet(nn.Module):
    """Nested U of KAN layers: six stages that are small Us themselves, seven outputs in training.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32; in training with `deep_supervision` a list
    of seven: of all stages together, then of each stage from fine to coarse, all at full resolution.

    Args:
        width: factor of all channels.
        shape: "large" (44 million parameters in the plain original, 16 times fewer here at width 1) or "small".
        basis: basis or family of the layers; None for plain ones.
        bottleneck: layers in their narrow form.
        first_kernel: kernel of the layer on the image; 1 in the small narrow network of torch-conv-kan.
        norm, dropout, layer_options: as in `UKANet`.
        deep_supervision: all seven outputs in training.

    >>> U2KANet(2, 1, 3, shape="small", width=0.25).eval()(torch.zeros(1, 1, 20, 33)).shape
    torch.Size([1, 3, 20, 33])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        width: float = 1,
        shape: str = "large",
        basis: Layer = "gram",
        bottleneck: bool = False,
        first_kernel: int = 3,
        norm: str | tuple = INSTANCE,
        dropout: float = 0.0,
        deep_supervision: bool = True,
        layer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in CONVOLUTIONS or shape not in SHAPES or min(in_channels, out_channels) < 1:
            raise UsageError(
                f"U2KANet needs spatial_dims 1, 2 or 3, shape {' or '.join(SHAPES)} and positive channels, got "
                f"{spatial_dims}, '{shape}', in_channels={in_channels}, out_channels={out_channels}"
            )
        if 4 * width < 1:
            raise UsageError(f"width must be at least 0.25, got {width}")
        check_kernels([first_kernel])
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.deep_supervision = deep_supervision
        options = {"bottleneck": bottleneck, "norm": norm, "dropout": dropout, **(layer_options or {})}
        layer = network_layer(basis, **options)
        first = partial(network_layer(basis, **{**options, "groups": 1}), kernel_size=first_kernel)
        down, up = SHAPES[shape]

        def nested(plan: Sequence[int], inputs: int, enter: LayerFactory) -> NestedU:
            height, middle, outputs = plan
            return NestedU(
                spatial_dims, inputs, int(middle * width), int(outputs * width), height, layer, enter
            )

        self.pool = of_dims("MaxPool", spatial_dims)(2, ceil_mode=True)
        channels = [int(plan[-1] * width) for plan in down]
        self.encoder = nn.ModuleList(
            nested(plan, channels[number - 1] if number else in_channels, layer if number else first)
            for number, plan in enumerate(down)
        )
        risen = [*[int(plan[-1] * width) for plan in up], channels[-1]]
        self.decoder = nn.ModuleList(
            nested(plan, risen[number + 1] + channels[number], layer) for number, plan in enumerate(up)
        )
        conv = of_dims("Conv", spatial_dims)
        self.heads = nn.ModuleList(conv(inputs, out_channels, 3, padding=1) for inputs in risen)
        self.together = pointwise_conv(spatial_dims, len(risen) * out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(self, x)
        outputs = self.outputs(x)
        return outputs if self.training and self.deep_supervision else outputs[0]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """All seven logits, float32: of all stages together, then of each from fine to coarse."""
        size = x.shape[2:]
        maps = []
        for number, stage in enumerate(self.encoder):
            x = stage(self.pool(x) if number else x)
            maps.append(x)
        risen = [x]
        for stage, skip in zip(reversed(self.decoder), reversed(maps[:-1]), strict=True):
            x = stage(torch.cat([resize(x, skip.shape[2:]), skip], dim=1))
            risen.insert(0, x)
        sides = [resize(head(features), size) for head, features in zip(self.heads, risen, strict=True)]
        return [logits(output) for output in (self.together(torch.cat(sides, dim=1)), *sides)]


MODELS.preset(
    "u2kanet_small",
    U2KANet,
    "Nested U of KAN layers, every stage with few channels; seven outputs in training.",
    shape="small",
)
