"""Convolution, normalisation, activation: the unit that networks are built of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks

from kanseg.errors import UsageError
from kanseg.layers.geometry import ConvGeometry, of_dims
from kanseg.layers.kan_conv import KANConv
from kanseg.layers.kernels import batch_norm_act, instance_norm_act
from kanseg.layers.kernels.operators import plain_eager
from kanseg.layers.kernels.recipe import watched
from kanseg.layers.kernels.rows import channels_last, is_channels_last
from kanseg.layers.norms import (
    ActSpec,
    activation,
    fused_batch_norm_serves,
    fused_norm_serves,
    is_affine,
    norm_layer,
    normalise,
)
from kanseg.layers.recompute import recomputed


class GroupPReLU(nn.Module):
    """PReLU with one slope a group of channels."""

    weight: nn.Parameter

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((groups,), 0.25))

    def slopes(self, channels: int) -> Tensor:
        """The slope of each channel, (channels,)."""
        return self.weight.repeat_interleave(channels // len(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slopes(x.shape[1]).to(x.dtype))


BLOCK = 1 << 20  # numbers that a norm with known statistics works on at a time
FUSED: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    GroupPReLU: "prelu",
}


class ConvLayer(nn.Module):
    """act(norm(conv(x))), (N, in_channels, *S) -> (N, out_channels, *S').

    Keeps its input and the output of the convolution for the backward pass, whatever the basis.

    Args:
        conv: the convolution class; takes (spatial_dims, in_channels, out_channels, kernel_size, **options).
        norm: MONAI norm spec, e.g. ("instance", {"affine": True}); None for none.
        act: activation name; None for none; "prelu" has one slope a group.
        dropout: channel dropout; `dropout_at="output"` puts it here, every other place inside the convolution.
        options: go to `conv` (basis, stride, groups, ...).
    """

    conv: Any
    norm: Any

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        conv: type[nn.Module] = KANConv,
        norm: str | tuple | None = ("instance", {"affine": True}),
        act: ActSpec = "silu",
        dropout: float = 0.0,
        dropout_at: str = "basis_input",
        recompute: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        at_output = dropout_at == "output"
        if not 0 <= dropout <= 1:
            raise UsageError(f"dropout is a probability from 0 to 1, got {dropout}")
        if not at_output:
            options.update(dropout=dropout, dropout_at=dropout_at)
        self.conv = conv(spatial_dims, in_channels, out_channels, kernel_size, recompute=recompute, **options)
        self.norm = norm_layer(norm, spatial_dims, out_channels) if norm else nn.Identity()
        self.act = GroupPReLU(self.conv.groups) if act == "prelu" else activation(act)
        self.dropout = of_dims("Dropout", spatial_dims)(dropout) if dropout and at_output else nn.Identity()
        pointwise = isinstance(self.norm, nn.Identity) and isinstance(self.act, nn.Identity)
        self.recompute = recompute and not pointwise
        self.kept = _kept_positions(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x if self.kept is None or x.dim() != len(self.kept) else x[self.kept])
        if not self.recompute:
            return self.dropout(self._norm_act(y))
        alone = not (self.conv._forward_hooks or _global_forward_hooks)  # or one of them may keep y
        fused_act = self._fused_act()
        if fused_act is not None:
            norm, below = self.norm, self.act.slopes(y.shape[1]) if isinstance(self.act, GroupPReLU) else None
            if fused_norm_serves(norm, y):
                y = channels_last(y)
                y = instance_norm_act(y, norm.weight, norm.bias, norm.eps, fused_act, below, over=alone)
                return self.dropout(y)
            if fused_batch_norm_serves(norm, y):
                return self.dropout(batch_norm_act(y, norm, fused_act, below))
        if alone and self._is_affine() and not torch.is_grad_enabled() and large(y):
            height = max(1, BLOCK * len(y) * y.shape[2] // y.numel())
            for planes in (some for sample in y.split(1) for some in sample.split(height, dim=2)):
                planes.copy_(self._norm_act(planes))
            return self.dropout(y)
        y = recomputed(self._norm_act, y, preserve_rng_state=False, reads=("norm", "act"))
        return self.dropout(y)

    def extra_repr(self) -> str:
        """The stride that is taken before the convolution."""
        return "" if self.kept is None else f"stride={tuple(step.step for step in self.kept[2:])} before conv"

    def _fused_act(self) -> str | None:
        """The activation's name for the kernels; None where they do not have it, or where it is watched."""
        return None if watched(self.act) else FUSED.get(type(self.act))

    def _is_affine(self) -> bool:
        """Whether norm and activation are known numbers and a function of each voxel, that nobody watches."""
        return self._fused_act() is not None and is_affine(self.norm) and not watched(self.norm)

    def _norm_act(self, y: Tensor) -> Tensor:
        return self.act(normalise(self.norm, y))


def large(y: Tensor) -> bool:
    """Whether a second map of this size is better not made."""
    return plain_eager(y) and y.device.type == "cpu" and is_channels_last(y) and y.numel() > BLOCK


def _kept_positions(conv: nn.Module) -> tuple[Any, ...] | None:
    """What a strided convolution of kernel 1 sees of its input, (N, C, *S); it then goes on without its stride.

    The rest need not be expanded, and torch 2.14's gradient of such a weight crashes in channels-last memory.
    """
    parts: list[Any] = [part for part in conv.modules() if isinstance(part, ConvGeometry)]
    local = all(getattr(part, "basis", None) is None or part.basis.pointwise for part in parts)
    local = local and getattr(conv, "local", True)
    normed = any(getattr(part, "input_norm", None) is not None for part in parts)
    if normed or not local or not parts or any({*p.kernel_size} != {1} or any(p.padding) for p in parts):
        return None
    stride = parts[0].stride
    if set(stride) == {1}:
        return None
    for part in parts:
        part.stride = (1,) * len(stride)
    return (slice(None), slice(None), *(slice(None, None, step) for step in stride))
