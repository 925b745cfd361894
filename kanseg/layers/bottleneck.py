"""KAN convolution in a narrow space: 1x1 down, expand and convolve, 1x1 up, beside a plain base branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.errors import UsageError
from kanseg.layers.convolution import Convolution, lean
from kanseg.layers.kan_conv import KANConv, check_dropout
from kanseg.layers.kernels.operators import only_plain
from kanseg.layers.kernels.rows import laid_out
from kanseg.layers.norms import ActSpec, activation
from kanseg.layers.recompute import recomputed


class NoiseInjection(nn.Module):
    """In training: x + alpha * m * N(0, 1) * std_c(x) with m ~ Bernoulli(p) an element; std over all but channels.

    Where a channel has a single value its spread counts as 0 (no noise, never NaN).
    """

    def __init__(self, p: float = 0.0, alpha: float = 0.05) -> None:
        super().__init__()
        self.p, self.alpha = p, alpha

    def acts(self) -> bool:
        """Whether it changes its input now."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.acts() or not x.numel():
            return x
        axes = [axis for axis in range(x.dim()) if axis != 1]
        spread = x.std(dim=axes, keepdim=True, correction=int(x.numel() > x.shape[1]))
        return x + self.alpha * torch.bernoulli(torch.full_like(x, self.p)) * torch.randn_like(x) * spread


def inner_width(inputs: int, outputs: int, dim_reduction: float, min_internal: int) -> int:
    """Channels of the narrow space: max(inputs, outputs) / dim_reduction, or where that is below `min_internal`,
    min(min_internal, inputs, outputs).
    """
    if dim_reduction <= 0:
        raise UsageError(f"dim_reduction must be positive, got {dim_reduction}")
    inner = int(max(inputs, outputs) / dim_reduction)
    return min(min_internal, inputs, outputs) if inner < min_internal else inner


class BottleneckKANConv(Convolution):
    """y = up(conv_basis(Phi(down(x)))) + conv(act(x)), (N, in_channels, *S) -> (N, out_channels, *S').

    The inner width a group is `inner_width`. Source: Drokin, arXiv 2407.01092, section 3.5.

    Args:
        basis, basis_act, base_act, basis_options: as in `KANConv`.
        mixture: constructor of a mixture of several narrow convolutions in place of the one, called like
            `MixtureOfExperts`.
        dim_reduction, min_internal: see `inner_width`.
        dropout: probability of noise injection at an element of the input, wherever `dropout_at` would have it.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        basis: str = "gram",
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        base_act: ActSpec = "silu",
        basis_act: ActSpec = None,
        dim_reduction: float = 4,
        min_internal: int = 16,
        dropout: float = 0.0,
        dropout_at: str = "basis_input",
        recompute: bool = True,
        mixture: Callable[..., nn.Module] | None = None,
        **basis_options: Any,
    ) -> None:
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        super().__init__(spatial_dims, in_channels, out_channels, kernel_size, groups=groups, **geometry)
        check_dropout(dropout_at)
        inputs, outputs = in_channels // self.groups, out_channels // self.groups
        inner = inner_width(inputs, outputs, dim_reduction, min_internal)
        ones = (1,) * spatial_dims
        self.down_weight = self.new_weight(inner * self.groups, inputs, ones)
        self.up_weight = self.new_weight(out_channels, inner, ones)
        self.base_weight = self.new_weight(out_channels, inputs, self.kernel_size)
        self.base_act = activation(base_act)
        _ = self.base_recipe  # now, not where a compiler follows
        options: dict[str, Any] = {"basis": basis, "basis_act": basis_act, "base": False}
        options.update(geometry, padding=self.padding, groups=groups, recompute=recompute, **basis_options)
        narrow: Any = KANConv if mixture is None else partial(mixture, expert_layer=KANConv)
        self.inner = narrow(spatial_dims, inner * self.groups, inner * self.groups, kernel_size, **options)
        self.mixed = mixture is not None
        self.noise = NoiseInjection(dropout)
        self.local = not (self.mixed or dropout)  # a gate and the spread of noise look at all positions
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if not self.recompute:
            return self._convolve(self.noise(x))
        if lean(x):
            x = laid_out(x)  # once for both branches
        if not self.noise.acts():
            return self._summed(x)
        # A mixture's gate draws noise too, so it runs once.
        return self._summed(recomputed(self.noise, x)) if self.mixed else recomputed(self._noisy, x)

    def _summed(self, x: Tensor) -> Tensor:
        if (self.base_recipe is None or not lean(x)) and not self.mixed:
            return recomputed(self._convolve, x, preserve_rng_state=False)
        if self.mixed:  # its experts recompute what they are made of
            return _sum(self._narrow(x), self._base(x))
        # The narrow term first: its maps are gone before the base is made.
        narrow = recomputed(
            self._narrow, x, preserve_rng_state=False, reads=("down_weight", "up_weight", "inner")
        )
        return _sum(narrow, self._base(x))

    def _noisy(self, x: Tensor) -> Tensor:
        return self._summed(self.noise(x))

    def _base(self, x: Tensor) -> Tensor:
        if self.base_recipe is None or not lean(x):
            return recomputed(self._plain_base, x, preserve_rng_state=False, reads="base_")
        return self.convolve_expanded([x], self.base_recipe, self.base_weight)

    def _plain_base(self, x: Tensor) -> Tensor:
        return self.convolve(self.base_act(x), self.base_weight)

    def _convolve(self, x: Tensor) -> Tensor:
        return _sum(self._narrow(x), self._plain_base(x))

    def _narrow(self, x: Tensor) -> Tensor:
        return self.pointwise(self.inner(self.pointwise(x, self.down_weight)), self.up_weight)


def _sum(narrow: Tensor, base: Tensor) -> Tensor:
    """narrow + base, in the memory of one that is no view: torch copies the gradient of a changed view four times."""
    if only_plain():  # one of them alone may be of a transformation
        return narrow + base
    if (
        torch.compiler.is_compiling()
        or narrow.dtype != base.dtype
        or base._is_view()
        or not narrow._is_view()
    ):
        return narrow.add_(base)
    return base.add_(narrow)
