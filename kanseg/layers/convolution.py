"""How a layer convolves: with its geometry, over expansions that are not kept, by whichever kernels serve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.layers.geometry import CONVOLUTIONS, ConvGeometry
from kanseg.layers.kernels import expanded_conv, gpu
from kanseg.layers.kernels.geometry import Geometry, zeros_of
from kanseg.layers.kernels.operators import only_plain
from kanseg.layers.kernels.plain_conv import pointwise_product
from kanseg.layers.kernels.recipe import Recipe, Written
from kanseg.layers.kernels.rows import channels_last, is_channels_last


class Convolution(ConvGeometry):
    """Products with weights over the geometry of a layer, no bias."""

    base_act: Any

    def __init__(self, *sizes: Any, **geometry: Any) -> None:
        super().__init__(*sizes, **geometry)
        self.written = Written()

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


def result_type(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """The type of a convolution's result here and now: that of autocast where it acts."""
    device = x.device.type
    acts = not x.is_meta and torch.is_autocast_enabled(device) and x.dtype.itemsize <= 4
    return torch.get_autocast_dtype(device) if acts else next(w.dtype for w in weights if w is not None)


def lean(x: Tensor) -> bool:
    """Whether the kernels that work on rows serve here; elsewhere torch's own steps do better."""
    if only_plain():
        return False
    if torch.compiler.is_compiling():  # the operators choose who computes when they run
        return x.device.type in ("cpu", "cuda")
    if x.device.type in ("cpu", "meta") or gpu.serves(x):
        return True
    return is_channels_last(x)
