"""The term of a constant function: it depends on the distance to the border alone, and needs no channel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kanseg.layers.kernels import winograd
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.rows import as_rows


def add_constant(out: Tensor, constant: Tensor, size: Sequence[int], geometry: Geometry) -> None:
    """out += conv(1; constant); one response for all planes of the first axis that see the same taps."""
    response = constant.movedim(0, -1)  # (*kernel, out_channels)
    axes = range(len(size))
    taps = [_valid_taps(size[axis], out.shape[axis + 2], axis, geometry, constant) for axis in axes]
    for axis in axes[1:]:
        response = torch.tensordot(response, taps[axis], ([axis], [1])).movedim(-1, axis)
    planes = out.movedim(1, -1)  # (N, *S, out_channels)
    for start, stop in _runs(taps[0]):
        planes[:, start:stop] += torch.tensordot(taps[0][start], response.contiguous(), 1).to(out.dtype)


def border_of(
    constant: Tensor, size: Sequence[int], out_size: Sequence[int], geometry: Geometry
) -> winograd.Border:
    """conv(1; constant) as one number for all outputs that see the same taps."""
    table, classes = constant.movedim(0, -1), []
    for axis, (n, count) in enumerate(zip(size, out_size, strict=True)):
        taps = _valid_taps(n, count, axis, geometry, constant)
        runs = _runs(taps)
        lengths = torch.tensor([stop - start for start, stop in runs])
        classes.append(torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), lengths))
        table = torch.tensordot(table, taps[[start for start, _ in runs]], ([axis], [1])).movedim(-1, axis)
    return winograd.Border(classes, table.contiguous())


def constant_gradient(grad: Tensor, constant: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    if geometry.pointwise():
        return as_rows(grad).sum((0, 1), dtype=constant.dtype).view_as(constant)
    planes = grad.movedim(1, -1)
    taps = _valid_taps(size[0], grad.shape[2], 0, geometry, constant)
    total = torch.zeros(taps.shape[1], *planes.shape[2:], dtype=constant.dtype, device=grad.device)
    for start, stop in _runs(taps):
        for sample in planes:  # torch sums over two axes at once for ten times the time
            total[taps[start] > 0] += sample[start:stop].sum(0, dtype=constant.dtype)
    for axis in range(1, len(size)):
        taps = _valid_taps(size[axis], grad.shape[axis + 2], axis, geometry, constant)
        total = torch.tensordot(total, taps, ([axis], [0])).movedim(-1, axis)
    return total.movedim(-1, 0)


def _valid_taps(size: int, outputs: int, axis: int, geometry: Geometry, like: Tensor) -> Tensor:
    """(outputs, kernel): 1 where a tap of an output position lies inside the image."""
    numbers = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    inside = _taps_inside(size, outputs, *(axes[axis] for axes in numbers))
    return torch.from_numpy(inside).to(like.device, like.dtype)


@functools.lru_cache(maxsize=64)  # for tiny maps these few numbers take longer than the convolution
def _taps_inside(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> np.ndarray:
    positions = np.arange(outputs) * stride - padding
    at = positions[:, None] + np.arange(kernel) * dilation
    return ((at >= 0) & (at < size)).astype(np.float32)


def _runs(taps: Tensor) -> list[tuple[int, int]]:
    """Stretches of output positions that see the same taps."""
    changes = (taps[1:] != taps[:-1]).any(1).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(taps)]
    return list(pairwise(edges))
