"""Kernel, stride, padding, dilation and groups of a convolution, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Numbers a spatial axis, two or three of them."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """What `numbers` wrote down."""
        dims = (len(numbers) - 1) // 4
        kernel_size, stride, padding, dilation = (
            tuple(numbers[dims * i : dims * i + dims]) for i in range(4)
        )
        return cls(kernel_size, stride, padding, dilation, numbers[-1])

    def numbers(self) -> list[int]:
        """All in one list."""
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]

    def dense(self) -> bool:
        """Whether it is what kernels are compiled for: kernel 3, stride and dilation 1, padding to 2, one group."""
        once = (1,) * len(self.stride)
        alike = set(self.kernel_size) == {3} and self.stride == self.dilation == once
        return alike and max(self.padding) <= 2 and self.groups == 1

    def pointwise(self) -> bool:
        """Whether it is a product of each voxel's channels with one matrix."""
        return {*self.kernel_size, *self.stride, self.groups} == {1} and not any(self.padding)

    def misread(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether oneDNN's gradient of the weight reads beyond its memory if oneDNN itself pads the map with zeros.

        Seen with torch 2.14 on processors with AVX-512, in 3D: NaN, wrong numbers or a crash. In bfloat16 where an axis
        of the map is shorter than the kernel; in float32 and bfloat16 where the first window behind the zeros in front
        reaches those at the end (with strides and kernels of 4 or more). Float16, 2D and all else are right.
        """
        if x.device.type != "cpu" or x.dim() != 5 or dtype not in (torch.bfloat16, torch.float32):
            return False
        reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        short = dtype == torch.bfloat16 and any(n <= r for n, r in zip(x.shape[2:], reach, strict=True))
        first = -self.padding[0] % self.stride[0]  # plane of that window; 0 has been seen to be right
        return any(self.padding) and (short or (first > 0 and first + reach[0] >= x.shape[2]))

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output."""
        axes = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def zeros_of(padding: Sequence[int]) -> list[int]:
    """What `F.pad` is told of them: both sides of each axis, the last axis first."""
    return [n for n in reversed(padding) for _ in range(2)]
