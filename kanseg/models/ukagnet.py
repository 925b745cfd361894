"""UKAGNet: a U-shaped network of plain stacks of KAN layers, with convolution, attention or focal modulation as mixer.

After the network of that name in torch-conv-kan (Drokin, arXiv 2407.01092), in 1D, 2D and 3D and for any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from kanseg.encoders import PlainKANet
from kanseg.encoders.layers import INSTANCE, Layer, depthwise_layers, stage_layers
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers import FocalModulation, KANAttention
from kanseg.models.model import MODELS
from kanseg.models.u_shape import DecoderStage, UShape

# What joins the maps of encoder and decoder before the convolutions, (spatial_dims, channels, **options) -> module.
MIXERS: dict[str, Callable[..., nn.Module] | None] = {
    "conv": None,
    "self-attention": KANAttention,
    "focal": FocalModulation,
}


@MODELS.register("ukagnet")
class UKAGNet(UShape):
    """U-shaped network of stacked KAN layers with mixers (convolution, self-attention or focal modulation).

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32. In training with `deep_supervision` a list
    of logits from fine to coarse.

    Args:
        depth: resolutions; default one for each of `strides`, else 4. Each has twice the channels of the one before.
        layers: KAN layers of each stage, down and up.
        width: factor of the 16 channels at full resolution.
        basis: basis or family of the layers; None for plain ones; or one a stage.
        bottleneck: layers in their narrow form.
        mixer: "conv", "self-attention" (its cost grows with the square of the voxels) or "focal", which works on the
            joined maps before the convolutions; or a constructor, (spatial_dims, channels, **options) -> module.
        mixer_options: of `KANAttention` or `FocalModulation`.
        strides: of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: of each stage, a number or one an axis; default 3.
        kan_stages, norm, dropout, layer_options: as in `UKANet`.
        deep_supervision: logits of all but the two coarsest stages in training.

    >>> import torch
    >>> UKAGNet(2, 1, 3, depth=2, layers=1).eval()(torch.zeros(1, 1, 9, 14)).shape
    torch.Size([1, 3, 9, 14])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        depth: int | None = None,
        layers: int = 2,
        width: float = 1,
        basis: Layer | Sequence[Layer] = "gram",
        bottleneck: bool = True,
        mixer: str | Callable[..., nn.Module] = "conv",
        mixer_options: dict[str, Any] | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        kan_stages: str | Sequence[int] = "all",
        norm: str | tuple = INSTANCE,
        dropout: float = 0.0,
        deep_supervision: bool = False,
        layer_options: dict[str, Any] | None = None,
    ) -> None:
        if not callable(mixer) and mixer not in MIXERS:
            raise UsageError(f"Unknown mixer '{mixer}'.{did_you_mean(mixer, MIXERS)}")
        if mixer_options and not callable(mixer) and MIXERS[mixer] is None:
            raise UsageError(
                f"mixer_options {sorted(mixer_options)} are of a mixer, but mixer='{mixer}' is none. Choose "
                "mixer='self-attention' or 'focal', or leave them away."
            )
        depth = depth or (4 if strides is None else len(strides))
        strides = (1, *[2] * (depth - 1)) if strides is None else tuple(strides)
        kernel_sizes = (3,) * depth if kernel_sizes is None else tuple(kernel_sizes)
        if depth < 2 or layers < 1 or depth > min(len(strides), len(kernel_sizes)):
            raise UsageError(
                f"UKAGNet needs depth >= 2, layers >= 1 and at most as many stages as strides and kernel_sizes have, "
                f"which a plan makes for its patch ({len(strides)} and {len(kernel_sizes)}); got depth={depth}, "
                f"layers={layers}"
            )
        widths = [int(16 * width) * 2**stage for stage in range(depth)]
        options = {"norm": norm, "dropout": dropout, **(layer_options or {})}
        stacks = stage_layers(basis, depth, kan_stages, bottleneck=bottleneck, **options)
        depthwise = depthwise_layers(basis, depth, kan_stages, **options)
        encoder = PlainKANet(
            spatial_dims,
            in_channels,
            basis=stacks,
            stages=[[channels] * layers for channels in widths],
            strides=strides[:depth],
            kernel_sizes=kernel_sizes[:depth],
        )
        stages = []
        for stage in reversed(range(depth - 1)):
            layer, kernel, channels = stacks[stage], kernel_sizes[stage], widths[stage]
            joined = channels + widths[stage + 1]
            mixing_layer = mixer if callable(mixer) else MIXERS[mixer]
            mixing: dict[str, Any] = {"conv_layer": layer, "norm": norm}
            if mixing_layer is FocalModulation:
                mixing["context_layer"] = depthwise[stage]
            mixing |= mixer_options or {}
            made = [mixing_layer(spatial_dims, joined, **mixing)] if mixing_layer else []
            for number in range(layers):
                made.append(layer(spatial_dims, channels if number else joined, channels, kernel))
            stages.append(DecoderStage(nn.Sequential(*made)))
        super().__init__(encoder, stages, widths, out_channels, deep_supervision=deep_supervision)
