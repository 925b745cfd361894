"""The contract of an encoder: all that a decoder needs to know is `out_channels` and `strides`."""

from __future__ import annotations

from torch import Tensor, nn

from kanseg.registry import Registry

ENCODERS = Registry("encoder")


class Encoder(nn.Module):
    """forward: (N, in_channels, *S) -> one feature map a stage, from fine to coarse.

    Attributes:
        out_channels: channels of each map.
        strides: stride of each stage against the one before it, one number an axis; the first may be 1.
    """

    out_channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def forward(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define its forward pass")
