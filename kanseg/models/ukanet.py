"""UKANet: a U-shaped network of KAN convolutions in 2D and 3D.

The skeleton is nnU-Net's (two convolutions a stage from full resolution on, strides and kernels by axis, deep
supervision; Isensee et al., Nature Methods 18, 2021) with residual blocks; the layers are KAN convolutions (Drokin,
arXiv 2407.01092) in the stages that `kan_stages` names, plain ones elsewhere. `basis=None` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders import ENCODERS, Encoder
from kanseg.encoders.reskanet import LayerFactory
from kanseg.errors import UsageError
from kanseg.layers import conv_layer
from kanseg.models.model import MODELS

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation to a spatial size, so that any input size passes through the network."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=LINEAR[x.dim() - 2], align_corners=False)


class DecoderStage(nn.Module):
    """Narrow the coarse map by a 1x1 convolution, resize it to the skip, join both, convolve twice."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        conv_layer: LayerFactory,
    ) -> None:
        super().__init__()
        self.narrow = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 1)
        self.layers = nn.Sequential(
            conv_layer(spatial_dims, 2 * out_channels, out_channels, kernel_size),
            conv_layer(spatial_dims, out_channels, out_channels, kernel_size),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.layers(torch.cat([resize(self.narrow(x), skip.shape[2:]), skip], dim=1))


@MODELS.register("ukanet")
class UKANet(nn.Module):
    """U-shaped residual KAN network for segmentation in 2D and 3D, any input size.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32. In training with `deep_supervision` a list
    of logits from fine to coarse, each at the resolution of its stage, for `monai.losses.DeepSupervisionLoss`.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        encoder: name in `kanseg.encoders.ENCODERS`.
        basis: basis or family of the KAN layers ("gram", "bspline", "fastkan", ...); None for the plain twin.
        features_per_stage: channels of each stage, from full resolution down.
        strides: stride of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: kernel of each stage, a number or one an axis; default 3.
        blocks_per_stage: residual blocks of each encoder stage; default by the encoder's name.
        kan_stages: where KAN layers stand: "all", "deep" (from the second stage on) or stage numbers from 0.
        bottleneck: KAN layers in their narrow form (1x1 down, KAN convolution, 1x1 up).
        norm: MONAI norm spec.
        dropout: channel dropout of every layer.
        deep_supervision: logits of all but the two coarsest stages in training.
        layer_options: further options of the KAN layers (degree, grid_size, ...).

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
        encoder: str = "reskanet18",
        basis: str | None = "gram",
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        blocks_per_stage: int | Sequence[int] | None = None,
        kan_stages: str | Sequence[int] = "all",
        bottleneck: bool = False,
        norm: str | tuple = ("instance", {"affine": True}),
        dropout: float = 0.0,
        deep_supervision: bool = False,
        layer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in LINEAR:
            raise UsageError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        stages = len(features_per_stage)
        if stages < 2 or min(in_channels, out_channels) < 1:
            raise UsageError(
                f"UKANet needs at least 2 stages and positive channels, got features_per_stage={features_per_stage}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        strides = (1, *[2] * (stages - 1)) if strides is None else tuple(strides)
        kernel_sizes = (3,) * stages if kernel_sizes is None else tuple(kernel_sizes)
        for name, values in (("strides", strides), ("kernel_sizes", kernel_sizes)):
            if len(values) != stages:
                raise UsageError(
                    f"{name} needs {stages} entries, one a stage of features_per_stage, got {values}"
                )
        shared = {"norm": _spec(norm), "dropout": dropout}
        plain = conv_layer(None, **shared)
        kan = conv_layer(
            basis, bottleneck=bottleneck and basis is not None, **_kan_options(basis, shared, layer_options)
        )
        where = _kan_stages(kan_stages, stages)
        layers = [kan if stage in where else plain for stage in range(stages)]
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.encoder: Encoder = ENCODERS.create(
            encoder,
            spatial_dims,
            in_channels,
            conv_layers=layers,
            skip_layer=conv_layer(None, norm=shared["norm"], act=None),
            features_per_stage=tuple(features_per_stage),
            blocks_per_stage=blocks_per_stage,
            strides=strides,
            kernel_sizes=kernel_sizes,
        )
        widths = self.encoder.out_channels
        self.decoder = nn.ModuleList(
            DecoderStage(spatial_dims, widths[s + 1], widths[s], kernel_sizes[s], conv_layer=layers[s])
            for s in reversed(range(stages - 1))
        )
        heads = max(1, stages - 2) if deep_supervision else 1
        self.deep_supervision = heads > 1
        self.heads = nn.ModuleList(
            Conv[Conv.CONV, spatial_dims](widths[s], out_channels, 1) for s in range(heads)
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self._check(x)
        *skips, decoded = self.encoder(x)
        maps: list[Tensor] = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            decoded = stage(decoded, skip)
            maps.insert(0, decoded)
        if self.training and self.deep_supervision:
            return [head(features).float() for head, features in zip(self.heads, maps, strict=False)]
        return resize(self.heads[0](maps[0]), x.shape[2:]).float()

    def _check(self, x: Tensor) -> None:
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[-self.spatial_dims :])
            raise UsageError(
                f"UKANet with spatial_dims={self.spatial_dims} expects (N, {self.in_channels}, {axes}), "
                f"got {tuple(x.shape)}"
            )


def _spec(norm: Any) -> Any:
    """A norm spec as MONAI wants it; JSON turns the pair into a list."""
    return tuple(norm) if isinstance(norm, list) else norm


def _kan_options(basis: str | None, shared: dict[str, Any], own: dict[str, Any] | None) -> dict[str, Any]:
    """FastKAN normalises its input instead of its output, so the norm goes there."""
    options = {**shared, **(own or {})}
    if basis is not None and conv_layer(basis).keywords.get("input_norm"):
        options["input_norm"] = options.pop("norm")
    return options


def _kan_stages(kan_stages: str | Sequence[int], stages: int) -> set[int]:
    named = {"all": range(stages), "deep": range(1, stages)}
    if isinstance(kan_stages, str) and kan_stages not in named:
        raise UsageError(f"kan_stages must be 'all', 'deep' or stage numbers, got '{kan_stages}'")
    chosen = set(named[kan_stages] if isinstance(kan_stages, str) else kan_stages)
    if not chosen <= set(range(stages)):
        raise UsageError(f"kan_stages must lie in 0 ... {stages - 1}, got {sorted(chosen)}")
    return chosen
