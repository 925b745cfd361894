"""The convolution of kernel 1 between channels: torch's, with a faster way on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kanseg.layers.convolution import lean
from kanseg.layers.geometry import check_dims
from kanseg.layers.kernels.plain_conv import pointwise_product


class Pointwise:
    """On a CPU a convolution of kernel 1 is one product of matrices, in channels-last memory."""

    def forward(self: Any, input: Tensor) -> Tensor:
        fast = pointwise_product(input, self.weight, self.bias) if lean(input) else None
        return super().forward(input) if fast is None else fast  # type: ignore[misc]


class PointwiseConv2d(Pointwise, nn.Conv2d):
    """`torch.nn.Conv2d` of kernel 1."""


class PointwiseConv3d(Pointwise, nn.Conv3d):
    """`torch.nn.Conv3d` of kernel 1."""


CLASSES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: PointwiseConv2d, 3: PointwiseConv3d}


def pointwise_conv(spatial_dims: int, in_channels: int, out_channels: int, bias: bool = True) -> nn.Module:
    """(N, in_channels, *S) -> (N, out_channels, *S), with the parameters of `torch.nn.Conv{1,2,3}d`."""
    check_dims(spatial_dims)
    return CLASSES[spatial_dims](in_channels, out_channels, 1, bias=bias)
