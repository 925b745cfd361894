"""Self-attention whose queries, keys and values come from KAN convolutions.

Sources: Zhang et al., arXiv 1805.08318 (attention beside a skip that a learned number opens); Drokin, arXiv 2407.01092
(KAN convolutions in it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.families import conv_layer as kan_layer
from kanseg.layers.norms import norm_layer, normalise
from kanseg.layers.pointwise import pointwise_conv
from kanseg.layers.rotary import Rotary

GATES = ("attention", "skip")


class KANAttention(nn.Module):
    """norm(x + gamma o), o_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j over all positions, (N, C, *S) -> (N, C, *S).

    gamma starts at 0: a new layer is its norm alone. With gate="skip" it multiplies x instead of o. Memory does not
    grow with the square of the positions where torch has a fused kernel (CPU and CUDA).

    Args:
        channels: C.
        kernel_size: of the layers that make q, k and v.
        conv_layer: constructor of those layers, e.g. `kanseg.layers.conv_layer("relukan")`; default Gram polynomials.
        inner_channels: 1x1 convolutions lead to this many channels before and back after; default none.
        num_heads: heads, each with its share of the channels.
        rotary: "axial", "mixed" or None, see `Rotary`; `theta` is its base.
        norm: MONAI norm spec, None for none.
        scale: factor of the products; default 1 / sqrt(channels of a head).
        gate: what gamma multiplies: "attention", or "skip" as in torch-conv-kan and its published weights.
        options: go to `conv_layer` (groups, ...).

    >>> KANAttention(3, 8, rotary="axial")(torch.zeros(1, 8, 2, 3, 4)).shape
    torch.Size([1, 8, 2, 3, 4])
    """

    norm: Any

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        conv_layer: Callable[..., nn.Module] | None = None,
        inner_channels: int | None = None,
        num_heads: int = 1,
        rotary: str | None = None,
        theta: float = 10.0,
        norm: str | Sequence | None = ("instance", {"affine": True}),
        scale: float | None = None,
        gate: str = "attention",
        **options: Any,
    ) -> None:
        super().__init__()
        inner = inner_channels or channels
        if num_heads < 1 or inner % num_heads:
            raise UsageError(f"{inner} channels cannot be shared by num_heads={num_heads}; choose a divisor")
        if gate not in GATES:
            raise UsageError(f"Unknown gate '{gate}'.{did_you_mean(gate, GATES)}")
        layer = conv_layer or kan_layer("kagn")
        self.narrow = pointwise_conv(spatial_dims, channels, inner) if inner_channels else nn.Identity()
        self.widen = pointwise_conv(spatial_dims, inner, channels) if inner_channels else nn.Identity()
        self.query, self.key, self.value = (
            layer(spatial_dims, inner, inner, kernel_size, **options) for _ in range(3)
        )
        self.rotary = (
            None
            if rotary is None
            else self.new_rotary(spatial_dims, inner // num_heads, num_heads, kind=rotary, theta=theta)
        )
        self.gamma = nn.Parameter(torch.zeros(1))
        self.norm = norm_layer(norm, spatial_dims, channels) if norm else nn.Identity()
        self.num_heads, self.scale, self.gate = num_heads, scale, gate

    new_rotary: type[Rotary] = Rotary

    def forward(self, x: Tensor) -> Tensor:
        h = self.narrow(x)
        query, key, value = (self._tokens(layer(h)) for layer in (self.query, self.key, self.value))
        if self.rotary is not None:
            query, key = self.rotary((query, key), h.shape[2:])
        o = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        o = self.widen(o.transpose(2, 3).reshape(h.shape))
        joined = x + self.gamma * o if self.gate == "attention" else self.gamma * x + o
        return normalise(self.norm, joined)

    def _tokens(self, x: Tensor) -> Tensor:
        """(N, C, *S) -> (N, heads, L, C / heads)."""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
