"""Focal modulation with KAN layers: context of growing reach, gathered by depthwise convolutions, modulates a query.

Sources: Yang et al., arXiv 2203.11926; Drokin, arXiv 2407.01092 (KAN layers in it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.errors import UsageError
from kanseg.layers.families import conv_layer as kan_layer
from kanseg.layers.norms import norm_layer, normalise
from kanseg.layers.pointwise import pointwise_conv


class FocalModulation(nn.Module):
    """y = p(norm(q * h(sum_l g_l c_l))), (N, C, *S) -> (N, C, *S).

    q, c_0 and the gates g come from one 1x1 layer of x; c_l = depthwise KAN convolution of c_{l-1}, with kernels that
    grow by `focal_factor`; the last context is the mean over all positions.

    Args:
        channels: C.
        conv_layer: constructor of the 1x1 layers, e.g. `kanseg.layers.conv_layer("bottleneck_kagn")`; default Gram.
        context_layer: constructor of the depthwise layers; default Gram polynomials.
        focal_window: kernel of the first context; `focal_factor`: its growth a level. All kernels must be odd.
        focal_level: contexts beside the global one.
        full_kan: KAN layers before the modulation too; else plain 1x1 convolutions.
        use_postln_in_modulation: normalise before the last layer, by `norm` (MONAI's norm spec).
        normalize_modulator: mean of the contexts instead of their sum.

    >>> FocalModulation(3, 4)(torch.zeros(1, 4, 5, 6, 7)).shape
    torch.Size([1, 4, 5, 6, 7])
    """

    norm: Any

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        conv_layer: Callable[..., nn.Module] | None = None,
        context_layer: Callable[..., nn.Module] | None = None,
        focal_window: int = 3,
        focal_level: int = 2,
        focal_factor: int = 2,
        full_kan: bool = True,
        use_postln_in_modulation: bool = True,
        normalize_modulator: bool = True,
        norm: str | tuple | None = ("instance", {"affine": True}),
    ) -> None:
        super().__init__()
        kernels = [focal_window + focal_factor * level for level in range(focal_level)]
        if focal_level < 0 or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise UsageError(
                "focal modulation needs odd kernels, focal_window + focal_factor * level for each of focal_level >= 0 "
                f"levels, got focal_window={focal_window}, focal_factor={focal_factor}, focal_level={focal_level}"
            )
        layer, context = conv_layer or kan_layer("kagn"), context_layer or kan_layer("kagn")
        widths = (channels, 2 * channels + focal_level + 1)
        self.split = (channels, channels, focal_level + 1)
        self.project_in = (
            layer(spatial_dims, *widths, 1) if full_kan else pointwise_conv(spatial_dims, *widths)
        )
        self.modulator = (
            layer(spatial_dims, channels, channels, 1)
            if full_kan
            else pointwise_conv(spatial_dims, channels, channels)
        )
        self.project_out = layer(spatial_dims, channels, channels, 1)
        self.contexts = nn.ModuleList(
            context(spatial_dims, channels, channels, kernel, groups=channels) for kernel in kernels
        )
        self.norm = norm_layer(norm, spatial_dims, channels) if norm and use_postln_in_modulation else None
        self.shrink = 1 / (focal_level + 1) if normalize_modulator else 1.0

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.project_in(x).split(self.split, dim=1)
        gathered = torch.zeros_like(context)
        for level, layer in enumerate(self.contexts):
            context = layer(context)
            gathered = gathered + context * gates[:, level : level + 1]
        gathered = gathered + self.everywhere(context, gathered) * gates[:, -1:]
        y = query * self.modulator(gathered * self.shrink)
        return self.project_out(y if self.norm is None else normalise(self.norm, y))

    def everywhere(self, context: Tensor, gathered: Tensor) -> Tensor:
        """The global context, (N, C, 1, ...): the mean of the widest one."""
        return context.mean(dim=tuple(range(2, context.dim())), keepdim=True)
