"""What every convolution here shares: channels, groups, kernel, stride, padding, dilation, and how it is made lean."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import ShapeError, UsageError
from kanseg.layers.kernels import expanded_conv, gpu
from kanseg.layers.kernels.expansion import Geometry, zeros_of
from kanseg.layers.kernels.operators import transformed
from kanseg.layers.kernels.plain_conv import pointwise_product
from kanseg.layers.kernels.recipe import Recipe, Written
from kanseg.layers.kernels.rows import channels_last, is_channels_last

# Dropout of whole channels, which MONAI's table has from two axes on.
CHANNEL_DROPOUT: dict[int, type[nn.Module]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def check_dims(spatial_dims: int) -> None:
    """Raise `UsageError` for a number of axes that there are no layers for."""
    if spatial_dims not in CONVOLUTIONS:
        raise UsageError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One integer an axis: 3 -> (3, 3, 3)."""
    try:
        values = tuple(map(operator.index, value if isinstance(value, Iterable) else [value] * spatial_dims))
    except TypeError as error:
        raise UsageError(f"{name} needs whole numbers, got {value!r}") from error
    if len(values) != spatial_dims:
        raise UsageError(f"{name} needs one number or {spatial_dims} (spatial_dims), got {value}")
    return values


class ConvGeometry(nn.Module):
    """What every convolution here shares: channels, groups, kernel, stride, padding, dilation; checked once.

    `padding=None` keeps the size of odd kernels at stride 1: dilation * (kernel_size - 1) // 2 on each side.
    """

    base_act: Any

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
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
        self.written = Written()
        self.spatial_dims, self.groups = spatial_dims, groups
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")
        self.stride = per_axis(stride, spatial_dims, "stride")
        self.dilation = per_axis(dilation, spatial_dims, "dilation")
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        self.padding = (
            tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))
            if padding is None
            else per_axis(padding, spatial_dims, "padding")
        )
        if min(self.padding) < 0:
            raise UsageError(f"padding must not be negative, got {self.padding}")

    def check(self, x: Tensor) -> None:
        """Refuse what the kernels, which read by address, would misread.

        Raises:
            ShapeError: not a batch of `in_channels` channels and `spatial_dims` axes, or smaller than the kernel.
            UsageError: whole or complex numbers, or on another device than the weights.
        """
        weight = next((p for p in self._parameters.values() if p is not None), x)
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

    def new_weight(self, out_channels: int, in_channels: int, kernel_size: Sequence[int]) -> nn.Parameter:
        """A convolution weight with unit-gain Kaiming uniform values, fan-in counted over all its inputs."""
        bound = math.sqrt(3 / (in_channels * math.prod(kernel_size)))
        return nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size).uniform_(-bound, bound))

    def convolve(self, x: Tensor, weight: Tensor, groups: int | None = None, padding: Any = None) -> Tensor:
        """The convolution with this geometry (or other groups or padding) and no bias."""
        here = replace(self.geometry(), padding=tuple(self.padding if padding is None else padding))
        # An exported graph has no gradients, and must not depend on a size.
        learns = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if learns and here.misread(x, result_type(x, weight)):
            x, here = F.pad(x, zeros_of(here.padding)), replace(here, padding=(0,) * self.spatial_dims)
        how = (here.stride, here.padding, here.dilation)
        return CONVOLUTIONS[self.spatial_dims](x, weight, None, *how, groups or self.groups)

    @property
    def base_recipe(self) -> str | None:
        """What `convolve_expanded` is told of a base branch, conv(base_act(x)), alone."""
        act = self.base_act
        return self.written((act,), lambda: Recipe(None, act, nn.Identity()).written())

    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups."""
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def convolve_expanded(
        self,
        inputs: Sequence[Tensor],
        recipe: str,
        base: Tensor | None,
        basis: Tensor | None = None,
        learned: Sequence[Tensor] = (),
        operands: torch.dtype | None = None,
    ) -> Tensor:
        """The convolution over an expansion that is not kept; see `expanded_conv`. 1D runs as 2D of height one."""
        if base is not None and basis is not None and base.dtype != basis.dtype:
            both = torch.promote_types(base.dtype, basis.dtype)
            base, basis = base.to(both), basis.to(both)
        result = result_type(inputs[0], base, basis)
        dtype = operands if operands is not None and result == torch.float32 else result
        if self.spatial_dims > 1:
            return expanded_conv(inputs, base, basis, learned, recipe, self.geometry(), dtype).to(result)
        flat = Geometry(
            (1, *self.kernel_size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )
        base, basis = (None if weight is None else weight.unsqueeze(2) for weight in (base, basis))
        inputs = [x.unsqueeze(2) for x in inputs]
        return expanded_conv(inputs, base, basis, learned, recipe, flat, dtype).squeeze(2).to(result)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A grouped 1x1 convolution, no bias."""
        if not lean(x):
            return CONVOLUTIONS[self.spatial_dims](x, weight, groups=self.groups)
        fast = pointwise_product(x, weight) if self.groups == 1 else None
        if fast is not None:
            return fast
        return CONVOLUTIONS[self.spatial_dims](channels_last(x), weight, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


def result_type(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """The type of a convolution's result here and now: that of autocast where it acts."""
    device = x.device.type
    acts = not x.is_meta and torch.is_autocast_enabled(device) and x.dtype.itemsize <= 4
    return torch.get_autocast_dtype(device) if acts else next(w.dtype for w in weights if w is not None)


def lean(x: Tensor) -> bool:
    """Whether the kernels that work on rows serve here; elsewhere torch's own steps do better."""
    if torch.compiler.is_compiling():  # the operators choose who computes when they run
        return x.device.type in ("cpu", "cuda")
    if transformed():
        return False
    if x.device.type in ("cpu", "meta") or gpu.serves(x):
        return True
    return is_channels_last(x)
