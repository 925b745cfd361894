"""The convolution of one slab by torch, and its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.layers.kernels.geometry import Geometry, zeros_of
from kanseg.layers.kernels.rows import as_rows, channels_last
from kanseg.layers.kernels.slabs import Slab

# Channels * planes * rows of one volume up to which torch convolves it by a loop of its own, 10 to 40 times slower than
# oneDNN (`use_mkldnn` in its Convolution.cpp; seen in torch 2.13 and 2.14).
LEFT_TO_TORCH = 20480
LEAST_VOXELS = 128  # of that volume; the loop does well below


def convolve(buffer: Tensor, weight: Tensor, slab: Slab, geometry: Geometry) -> Tensor:
    """The convolution of a slab."""
    convolution = torch.conv2d if buffer.dim() == 4 else torch.conv3d
    samples = len(buffer)
    buffer, weight = for_onednn(buffer, weight)
    made = convolution(
        buffer, weight, None, geometry.stride, slab.padding(geometry), geometry.dilation, geometry.groups
    )
    return made if len(made) == samples else made[:samples]


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, slab: Slab, geometry: Geometry, of_x: bool, of_weight: bool
) -> tuple[Any, Any]:
    """Gradients at x and weight of the convolution of a slab."""
    if geometry.pointwise() and x.device.type == "cpu":
        return _gradients_of_product(grad, x, weight, of_x, of_weight)
    here, none = replace(geometry, padding=slab.padding(geometry)), (0,) * len(geometry.padding)
    samples, channels, *size = x.shape
    edge = here.padding if of_weight and here.misread(x, weight.dtype) else none
    if any(edge):
        x, here = channels_last(F.pad(x, zeros_of(edge))), replace(here, padding=none)
    x, weight = for_onednn(x, weight)
    grad = channels_last(grad)
    if len(x) > samples:
        grad = F.pad(grad, [0, 0] * (grad.dim() - 1) + [0, len(x) - samples])
    about = (here.stride, here.padding, here.dilation, False, none, here.groups)
    at_x, at_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *about, [of_x, of_weight, False]
    )
    inside = [slice(before, before + n) for before, n in zip(edge, size, strict=True)]
    return (
        None if at_x is None else at_x[(slice(samples), slice(channels), *inside)],
        None if at_weight is None else at_weight[:, : channels // geometry.groups],
    )


def _gradients_of_product(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `convolution_gradients`, by two products of matrices: torch would first copy to channels-first memory."""
    upper, rows = (as_rows(channels_last(t)).flatten(0, 1) for t in (grad, x))
    at_x = at_weight = None
    if of_x:
        at_x = (upper @ weight.flatten(1)).view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
    if of_weight:
        few = rows.shape[1] < upper.shape[1]  # first, for which the product is up to 20 times faster
        at_weight = ((rows.T @ upper).T if few else upper.T @ rows).reshape(weight.shape)
    return at_x, at_weight


def for_onednn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with channels of zeros more, or x with a sample more, where torch would convolve by its own loop."""
    size, channels = x.shape[2:], x.shape[1]
    alone = len(x) == 1 and len(size) == 3 and size.numel() >= LEAST_VOXELS and channels == weight.shape[1]
    if not alone or x.device.type != "cpu" or x.dtype != torch.float32 or weight[0, 0].numel() == 1:
        return x, weight
    missing = LEFT_TO_TORCH // (size[0] * size[1]) + 1 - channels
    if missing <= 0:
        return x, weight
    if channels + missing > max(16, 2 * channels):
        return F.pad(x, [0] * 9 + [1]), weight
    return F.pad(x, [0] * 7 + [missing, 0, 0]), F.pad(weight, [0] * 7 + [missing, 0, 0])
