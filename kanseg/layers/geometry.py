"""What every convolution here shares: channels, groups, kernel, stride, padding and dilation, checked once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import ShapeError, UsageError
from kanseg.layers.kernels.geometry import Geometry

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Options of torch's convolutions, and what to do without them.
OF_TORCH = {
    "bias": "the norm behind the convolution has an offset",
    "padding_mode": "they pad with zeros; pad before them (torch.nn.functional.pad) and give padding=0",
    "device": "layer.to(device), or torch.device(...) as a context around its making",
    "dtype": "layer.to(dtype)",
}


def refuse_options_of_torch(options: Iterable[str]) -> None:
    """Raise `UsageError` for an option that torch's convolutions have and these have not."""
    for option in options:
        if option in OF_TORCH:
            raise UsageError(
                f"KAN layers have no option '{option}' of torch's convolutions: {OF_TORCH[option]}."
            )


def check_dims(spatial_dims: int) -> None:
    """Raise `UsageError` for a number of axes that there are no layers for."""
    if spatial_dims not in CONVOLUTIONS:
        raise UsageError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")


def of_dims(kind: str, spatial_dims: int) -> Callable[..., nn.Module]:
    """torch's class of that kind for so many axes; MONAI's factories would do, but take seconds to import.

    >>> of_dims("MaxPool", 3)(2)
    MaxPool3d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    """
    check_dims(spatial_dims)
    return getattr(nn, f"{kind}{spatial_dims}d")


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One integer an axis: 3 -> (3, 3, 3)."""
    try:
        values = tuple(map(operator.index, value if isinstance(value, Iterable) else [value] * spatial_dims))
    except TypeError as error:
        raise UsageError(f"{name} needs whole numbers, got {value!r}") from error
    if len(values) != spatial_dims:
        raise UsageError(f"{name} needs one number or {spatial_dims} (spatial_dims), got {value}")
    return values


def _without_first(conv: ConvGeometry, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Without the voxel that the same padding on both sides, of an even kernel, makes too many."""
    kept = [slice(width % 2, None) for width in conv._reach()]
    return y[(slice(None), slice(None), *kept)]


class ConvGeometry(nn.Module):
    """Channels, groups, kernel, stride, padding and dilation of a convolution.

    `padding=None` keeps the size of odd kernels at stride 1: dilation * (kernel_size - 1) // 2 on each side. "same"
    keeps that of even ones, too, with one voxel more behind than before, as torch's does; "valid" is 0.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        check_dims(spatial_dims)
        if min(in_channels, out_channels) < 1:
            raise UsageError(f"channels must be positive, got {in_channels} in and {out_channels} out")
        if groups < 1 or in_channels % groups or out_channels % groups:
            common = math.gcd(in_channels, out_channels)
            fitting = ", ".join(str(n) for n in range(1, common + 1) if not common % n)
            raise UsageError(
                f"in_channels (={in_channels}) and out_channels (={out_channels}) must be divisible by "
                f"groups (={groups}): take {fitting}"
            )
        self.spatial_dims, self.groups = spatial_dims, groups
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")
        self.stride = per_axis(stride, spatial_dims, "stride")
        self.dilation = per_axis(dilation, spatial_dims, "dilation")
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        self.padding = self._sides(padding)
        if padding == "same" and self._uneven():
            self.register_forward_hook(_without_first)
        if min(self.padding) < 0:
            raise UsageError(f"padding must not be negative, got {self.padding}")

    def _reach(self) -> list[int]:
        """Voxels of each axis beside the first that a kernel sees."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]

    def _uneven(self) -> bool:
        return any(width % 2 for width in self._reach())

    def _sides(self, padding: int | Sequence[int] | str | None) -> tuple[int, ...]:
        """Voxels that are added on each side of each axis."""
        total = self._reach()
        if padding == "same" and max(self.stride) > 1:
            raise UsageError(f"padding 'same' keeps the size at stride 1 alone, got stride {self.stride}")
        if padding in (None, "same"):
            return tuple((width + (padding == "same")) // 2 for width in total)
        if isinstance(padding, str) and padding != "valid":
            raise UsageError(f"padding must be a number an axis, 'valid' or 'same', got '{padding}'")
        return per_axis(0 if isinstance(padding, str) else padding, self.spatial_dims, "padding")  # type: ignore[arg-type]

    def check(self, x: Tensor) -> None:
        """Refuse what the kernels, which read by address, would misread.

        Raises:
            ShapeError: not a batch of `in_channels` channels and `spatial_dims` axes, or smaller than the kernel.
            UsageError: whole or complex numbers, or on another device than the weights.
        """
        weight = [*(p for p in self._parameters.values() if p is not None), x][0]
        if weight.device != x.device or not x.is_floating_point():
            raise UsageError(
                f"expected floating point numbers on {weight.device}, where the layer is, got {x.dtype} on {x.device}"
            )
        if x.dtype == torch.float64 and weight.dtype.itemsize < 8:
            raise UsageError(
                f"expected {weight.dtype} as the weights are, got {x.dtype}: x.float() or layer.double()"
            )
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[-self.spatial_dims :])
            raise ShapeError(
                f"expected an input of shape (N, {self.in_channels}, {axes}), got {tuple(x.shape)}"
            )
        if torch.compiler.is_compiling():  # sizes may be unknown there
            return
        if x.numel() and min(self.geometry().out_size(x.shape[2:])) < 1:
            raise ShapeError(
                f"Kernel size can't be greater than actual input size: a map of {tuple(x.shape[2:])} is smaller than "
                f"the kernel {self.kernel_size} (dilation {self.dilation}, padding {self.padding})"
            )

    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups."""
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )
