"""UKANet: a U-shaped network of KAN convolutions in 2D and 3D.

The skeleton is nnU-Net's (two convolutions a stage from full resolution on, strides and kernels by axis, deep
supervision; Isensee et al., Nature Methods 18, 2021) with residual blocks; the layers are KAN convolutions (Drokin,
arXiv 2407.01092) in the stages that `kan_stages` names, plain ones elsewhere. `basis=None` is the plain twin.
`ukanet_18` and its variants have the shape of torch-conv-kan's networks of those names instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kanseg.encoders import Encoder, ResidualBlock, create_encoder
from kanseg.encoders.layers import INSTANCE, Layer, LayerFactory, network_layer, stage_layers
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.pointwise import pointwise_conv
from kanseg.models.model import MODELS
from kanseg.models.u_shape import DecoderStage, UShape


def narrow_stage(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: Any, layer: LayerFactory
) -> DecoderStage:
    """Narrow the coarse map by a 1x1 convolution, resize it to the skip, join both, convolve twice."""
    narrow = pointwise_conv(spatial_dims, in_channels, out_channels)
    layers = nn.Sequential(
        layer(spatial_dims, 2 * out_channels, out_channels, kernel_size),
        layer(spatial_dims, out_channels, out_channels, kernel_size),
    )
    return DecoderStage(layers, narrow)


def merging_stage(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: Any, layer: LayerFactory
) -> DecoderStage:
    """Resize the coarse map to the skip, join both, merge them by a convolution, then two residual blocks."""
    block: dict[str, Any] = {"conv_layer": layer, "skip_layer": layer, "block": "basic"}
    layers = nn.Sequential(
        layer(spatial_dims, in_channels + out_channels, out_channels, kernel_size),
        ResidualBlock(spatial_dims, out_channels, out_channels, kernel_size, **block),
        ResidualBlock(spatial_dims, out_channels, out_channels, kernel_size, **block),
    )
    return DecoderStage(layers)


DECODERS: dict[str, Callable[..., DecoderStage]] = {"narrow": narrow_stage, "merging": merging_stage}


@MODELS.register("ukanet")
class UKANet(UShape):
    """U-shaped residual KAN network for segmentation in 2D and 3D, any input size.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32. In training with `deep_supervision` a list
    of logits from fine to coarse, each at the resolution of its stage, for `monai.losses.DeepSupervisionLoss`.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        encoder: name in `kanseg.encoders.ENCODERS`, in 2D also "timm/NAME" or "smp/NAME", or an encoder (say that of a
            trained `Classifier`). Where its first map is coarser than the image, a layer on the image gives the skip at
            full resolution.
        basis: basis or family of the KAN layers ("gram", "bspline", "fastkan", ...); None for the plain twin.
        features_per_stage: channels of each stage, from full resolution down. This and the next three are left aside
            by encoders that bring their own shape (all but `reskanet10` and its like).
        strides: stride of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: kernel of each stage, a number or one an axis; default 3.
        blocks_per_stage: residual blocks of each encoder stage; default by the encoder's name.
        kan_stages: where KAN layers stand: "all", "deep" (from the second stage on), "coarse" (the two coarsest, but
            not the first) or stage numbers from 0.
        bottleneck: KAN layers in their narrow form (1x1 down, KAN convolution, 1x1 up).
        norm: MONAI norm spec.
        dropout: channel dropout of every layer; noise on the input of narrow ones.
        deep_supervision: logits of all but the two coarsest stages in training.
        layer_options: further options of the KAN layers (degree, grid_size, groups, ...).
        decoder: "narrow" (a 1x1, then two convolutions) or "merging" (a convolution, then two residual blocks).
        encoder_options: further options of the encoder (width, growth, ...).
        encoder_weights: file whose encoder weights to start from (see `kanseg.encoders.load_encoder`); "download" lets
            timm or smp fetch theirs.

    >>> import torch
    >>> model = UKANet(2, in_channels=1, out_channels=3, features_per_stage=(4, 8, 16)).eval()
    >>> model(torch.zeros(1, 1, 37, 50)).shape
    torch.Size([1, 3, 37, 50])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str | Encoder = "reskanet18",
        basis: Layer | Sequence[Layer] = "gram",
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        blocks_per_stage: int | Sequence[int] | None = None,
        kan_stages: str | Sequence[int] = "all",
        bottleneck: bool = False,
        norm: str | tuple = INSTANCE,
        dropout: float = 0.0,
        deep_supervision: bool = False,
        layer_options: dict[str, Any] | None = None,
        decoder: str = "narrow",
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str | Path | None = None,
    ) -> None:
        if decoder not in DECODERS:
            raise UsageError(f"Unknown decoder '{decoder}'.{did_you_mean(decoder, DECODERS)}")
        if len(features_per_stage) < 2 or min(in_channels, out_channels) < 1:
            raise UsageError(
                f"UKANet needs at least 2 stages and positive channels, got features_per_stage={features_per_stage}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        options = {"bottleneck": bottleneck, "norm": norm, "dropout": dropout, **(layer_options or {})}
        shape: dict[str, Any] = {
            "features_per_stage": features_per_stage,
            "blocks_per_stage": blocks_per_stage,
        }
        shape |= {"strides": strides, "kernel_sizes": kernel_sizes}
        maps = create_encoder(
            encoder,
            spatial_dims,
            in_channels,
            weights=encoder_weights,
            own=encoder_options,
            basis=basis,
            kan_stages=kan_stages,
            **{**shape, **options},
        )
        widths = list(maps.out_channels)
        kernels: list[Any] = [3] * len(widths)
        if kernel_sizes is not None and tuple(widths) == tuple(features_per_stage):
            kernels = list(kernel_sizes)
        layers = stage_layers(basis, len(widths), kan_stages, **options)
        finest = None
        if set(maps.strides[0]) != {1}:
            widths.insert(0, max(8, widths[0] // 2))
            layers.insert(0, layers[0])
            kernels.insert(0, 3)
            finest = network_layer(None, norm=norm)(spatial_dims, in_channels, widths[0], 3)
        stages = [
            DECODERS[decoder](spatial_dims, widths[s + 1], widths[s], kernels[s], layers[s])
            for s in reversed(range(len(widths) - 1))
        ]
        super().__init__(maps, stages, widths, out_channels, finest=finest, deep_supervision=deep_supervision)


PUBLISHED: dict[str, dict[str, Any]] = {
    "ukanet_18": {"basis": "kan"},
    "fast_ukanet_18": {
        "basis": "fastkan",
        "layer_options": {"grid_size": 5, "grid_range": (-1, 1), "base_act": "gelu"},
    },
    "ukalnet_18": {"basis": "kaln"},
    "ukagnet_18": {"basis": "kagn"},
    "ukacnet_18": {"basis": "kacn"},
    "ukagnetnb_18": {"basis": "bottleneck_kagn"},
}
for _name, _row in PUBLISHED.items():
    MODELS.preset(
        _name,
        UKANet,
        f"UKANet as published, 18 layers deep, of {_row['basis']} layers.",
        encoder="reskanet18x32p",
        encoder_options={"blocks_per_stage": (2, 2, 2, 4)},
        decoder="merging",
        **_row,
    )
