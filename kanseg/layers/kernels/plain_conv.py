"""The ordinary convolution where something is faster than torch's: Winograd's products, or one for kernel 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels import winograd
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.operators import only_first, plain_eager
from kanseg.layers.kernels.rows import FORMATS, channels_last, empty_channels_last, product


def plain_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor | None:
    """conv(x; weight), (N, C, *S) -> (N, out_channels, *S'), or None where torch's own serves better."""
    if geometry.pointwise():
        return pointwise_product(x, weight)
    if not _is_plain(x) or not geometry.dense() or not winograd.serves(x, weight, geometry):
        return None
    return _PlainConv.apply(channels_last(x), weight, geometry)


def pointwise_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """conv(x; weight) + bias of kernel 1 and one group by `product` on a CPU, or None where torch's own serves."""
    if not _is_plain(x) or x.device.type != "cpu" or x.dtype != weight.dtype or not x.numel():
        return None
    return product(channels_last(x), weight, bias)


def _is_plain(x: Tensor) -> bool:
    return x.dim() in FORMATS and plain_eager(x) and not torch.is_autocast_enabled(x.device.type)


class _PlainConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        out = empty_channels_last((len(x), len(weight), *geometry.out_size(x.shape[2:])), x)
        winograd.convolve([x], None, weight, None, out, geometry)
        return out

    @staticmethod
    @only_first
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x = channels_last(x)  # hooks on saved tensors may have brought it back in other memory
        grad, geometry = channels_last(grad), ctx.geometry
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            winograd.convolve_input(weight, grad, of_x, geometry)
        if ctx.needs_input_grad[1]:
            of_weight = winograd.convolve_weight([x], None, weight, grad, geometry)
        return of_x, of_weight, None
