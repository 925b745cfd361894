"""Resampling along the axes, some planes at a time.

MONAI makes 60 bytes of coordinates for every voxel of the result, of a CT of 400 x 400 x 500 voxels 5 GB, and takes
five times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import AFFINE_TOL
from monai.transforms import SpatialResample
from torch import Tensor

AT_ONCE = 1 << 21  # voxels of the result; up to that many it is MONAI's to the bit
Along = Callable[[Tensor, int, Tensor], Tensor]  # values, axis, places -> values at these places of the axis
STRAIGHT = 1e-3  # voxels that an axis may depart from an axis of the other grid over its whole length


class ResampleAlongAxes(SpatialResample):
    """MONAI's resampling between grids whose axes are parallel, with memory for little more than the result.

    Numbers are MONAI's to the rounding of float32; of two labels that are equally near it may take the other. MONAI
    itself resamples between grids whose axes are not parallel (of a sheared image), and what is small.
    """

    def __call__(  # type: ignore[override]  # as `Spacing` calls it
        self, img: MetaTensor, dst_affine: Tensor, spatial_size: Sequence[int], mode: str, **how: Any
    ) -> Tensor:
        affine = torch.as_tensor(dst_affine, dtype=torch.float64)
        size = [int(length) for length in spatial_size]
        same = list(img.shape[1:]) == size and torch.allclose(img.affine, affine, atol=AFFINE_TOL)
        there = torch.linalg.solve(img.affine.double(), affine)
        across = (there[:3, :3] - there[:3, :3].diag().diag()).abs() * torch.tensor(size)
        if mode not in WAYS or same or prod(size) <= AT_ONCE or across.max() > STRAIGHT:
            return super().__call__(img, affine, size, mode, **how)
        note = {**how, "dtype": img.dtype}  # without a copy of the image
        one = super().__call__(img, affine, [1, 1, 1], mode, **note)  # for what it notes of itself
        whole = _resampled(img.as_tensor(), there, size, WAYS[mode])
        return whole.as_subclass(MetaTensor).copy_meta_from(one) if isinstance(one, MetaTensor) else whole

    def inverse(self, data: MetaTensor) -> Tensor:  # type: ignore[override]  # MONAI's passes `__call__` over
        done = self.pop_transform(data)
        told = {key: done["extra_info"][key] for key in ("mode", "padding_mode")}
        with self.trace_transform(False):
            return self(
                data, done["extra_info"]["src_affine"], done["orig_size"], align_corners=False, **told
            )


def _resampled(values: Tensor, there: Tensor, size: Sequence[int], along: Along) -> Tensor:
    """Values (C, *S) on a grid (C, *size), float32; beyond their ends the last ones stand in.

    Args:
        there: takes voxels of that grid to voxels of the values, axis by axis.
    """
    whole = torch.empty(len(values), *size)
    deep = max(1, AT_ONCE // prod(size[1:]))
    places = [_places(there[k, k], there[k, 3], size[k], values.shape[1 + k]) for k in range(3)]
    moved = [axis for axis, own in enumerate(places, start=1) if not _stays(own, values.shape[axis])]
    for start in range(0, size[0], deep):
        planes = slice(start, start + deep)
        found = along(values, 1, places[0][planes]) if 1 in moved else values[:, planes]
        for axis in (2, 3):
            found = along(found, axis, places[axis - 1]) if axis in moved else found
        whole[:, planes] = found
    return whole


def _places(step: Tensor, first: Tensor, count: int, length: int) -> Tensor:
    """Where `count` voxels of the result lie along an axis of `length` voxels, float64."""
    return (torch.arange(count, dtype=torch.float64) * step + first).clamp(0, length - 1)


def _stays(places: Tensor, length: int) -> bool:
    """Whether an axis of `length` voxels is as it was, as that across slices of one thickness often is."""
    return torch.equal(places, torch.arange(length, dtype=places.dtype))


def _linear(values: Tensor, axis: int, places: Tensor) -> Tensor:
    low = places.floor().long()
    high = (low + 1).clamp(max=values.shape[axis] - 1)
    before, after = (values.index_select(axis, end).double() for end in (low, high))
    return torch.lerp(before, after, (places - low).view(-1, *[1] * (values.ndim - 1 - axis)))


def _nearest(values: Tensor, axis: int, places: Tensor) -> Tensor:
    return values.index_select(axis, places.round().long())


WAYS: dict[str, Along] = {"bilinear": _linear, "nearest": _nearest}
