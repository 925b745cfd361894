"""What all U-shaped networks here share: an encoder, stages that go back up over its maps, and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders import Encoder
from kanseg.errors import UsageError
from kanseg.layers.kernels.rows import FORMATS, is_channels_last, with_gradient_as_rows
from kanseg.layers.pointwise import pointwise_conv

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Linear interpolation to a spatial size, so that any input size passes through the network.

    Computed in float32 under autocast and given in the type of `x`, or all that follows would be wide too.
    """
    if x.shape[2:] == tuple(size):
        return x
    y = F.interpolate(x, size=tuple(size), mode=LINEAR[x.dim() - 2], align_corners=align_corners)
    if is_channels_last(x):  # which the GPU's interpolation does not keep
        return with_gradient_as_rows(y.to(x.dtype, memory_format=FORMATS[x.dim()]))
    return y.to(x.dtype)


def concatenate(x: Tensor, skip: Tensor) -> Tensor:
    """Both beside each other, channel after channel."""
    return torch.cat([x, skip], dim=1)


class DecoderStage(nn.Module):
    """layers(join(resize(before(x)), skip)): a coarse map and the encoder's map of that resolution, to one map.

    Args:
        layers: what works on the joined maps.
        before: what narrows the coarse map; default nothing.
        join: `concatenate` or `torch.add`.
    """

    align_corners = False

    def __init__(
        self,
        layers: nn.Module,
        before: nn.Module | None = None,
        join: Callable[[Tensor, Tensor], Tensor] = concatenate,
    ) -> None:
        super().__init__()
        self.narrow = before or nn.Identity()
        self.layers, self.join = layers, join

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.layers(self.join(resize(self.narrow(x), skip.shape[2:], self.align_corners), skip))


class UShape(nn.Module):
    """Encoder, decoder and heads: (N, in_channels, *S) -> logits (N, out_channels, *S), float32, any size.

    In training with `deep_supervision` a list of logits from fine to coarse, each at the resolution of its stage, for
    `monai.losses.DeepSupervisionLoss`.

    Args:
        encoder: gives the maps.
        decoder: stages from coarse to fine, one for each map but the coarsest, and one more where `finest` is given.
        widths: channels that the decoder's stages give, from fine to coarse.
        finest: a layer on the image that gives the skip at full resolution where the encoder starts coarser.
        deep_supervision: logits of all but the two coarsest stages in training, a list of one where there are no more.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Sequence[nn.Module],
        widths: Sequence[int],
        out_channels: int,
        *,
        finest: nn.Module | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if out_channels < 1:
            raise UsageError(f"out_channels must be positive, got {out_channels}")
        self.spatial_dims, self.in_channels = encoder.spatial_dims, encoder.in_channels
        self.out_channels = out_channels
        self.encoder = encoder
        if finest is not None:
            self.finest = finest
        self.decoder = nn.ModuleList(decoder)
        heads = max(1, len(self.decoder) - 1) if deep_supervision else 1
        self.deep_supervision = deep_supervision
        self.heads = nn.ModuleList(
            pointwise_conv(self.spatial_dims, width, out_channels) for width in widths[:heads]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(self, x)
        *skips, decoded = self.encoder(x)
        if hasattr(self, "finest"):
            skips.insert(0, self.finest(x))
        maps: list[Tensor] = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            decoded = stage(decoded, skip)
            maps.insert(0, decoded)
        if self.training and self.deep_supervision:
            return [logits(head(features)) for head, features in zip(self.heads, maps, strict=False)]
        return logits(resize(self.heads[0](maps[0]), x.shape[2:]))


def logits(x: Tensor) -> Tensor:
    """In float32 (float64 stays) and contiguous memory, what code beyond the network expects."""
    return at_least_float32(x).contiguous()


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 where it has fewer digits."""
    return x.float() if x.dtype.itemsize < 4 else x


def check_input(model: Any, x: Tensor) -> None:
    """Raise `UsageError` where an input has other dimensions or channels than the network."""
    if x.dim() != model.spatial_dims + 2 or x.shape[1] != model.in_channels:
        axes = ", ".join("DHW"[-model.spatial_dims :])
        raise UsageError(
            f"{type(model).__name__} with spatial_dims={model.spatial_dims} expects (N, {model.in_channels}, {axes}), "
            f"got {tuple(x.shape)}"
        )
