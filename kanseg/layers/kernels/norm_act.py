"""Instance normalisation and activation in one step that keeps its input and two numbers a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.layers.kernels.rows import as_rows, blocks, channels_last

# activation: in place, and the gradient at its input from the gradient at its output
ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "identity": (lambda z: z, lambda g, z: g),
    "silu": (lambda z: F.silu(z, inplace=True), torch.ops.aten.silu_backward),
    "relu": (torch.relu_, lambda g, z: g * (z > 0)),
}


def instance_norm_act(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str) -> Tensor:
    """act((y - mean) / sqrt(var + eps) * weight + bias), (N, C, *S) in channels-last memory, float32 or float64.

    Mean and variance are of each sample and channel, the variance by a second pass over the centred values.
    Without gradients the result is written over `y`.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, weight, bias)):
        return _NormAct.apply(y, weight, bias, eps, act)
    return _forward(y, y, weight, bias, eps, act)[0]


def _forward(
    y: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, written = as_rows(y), as_rows(out)
    count, channels = rows.shape[1:]
    mean = rows.sum(1, keepdim=True) / count
    squares = torch.zeros_like(mean)
    for sample in range(len(rows)):
        for block in blocks(count, channels):
            squares[sample] += (rows[sample, block] - mean[sample]).square_().sum(0)
    inverse = (squares / count + eps).rsqrt()
    scale, shift = _affine(mean, inverse, weight, bias)
    activate = ACTIVATIONS[act][0]
    for sample in range(len(rows)):
        for block in blocks(count, channels):
            into = written[sample, block]
            torch.addcmul(shift[sample], rows[sample, block], scale[sample], out=into)
            activate(into)
    return out, mean, inverse


def _affine(
    mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factor and summand that take y to the normalised value, (N, 1, C)."""
    scale = inverse if weight is None else inverse * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
    ) -> Tensor:
        out, mean, inverse = _forward(y, torch.empty_like(y), weight, bias, eps, act)
        ctx.act = act
        ctx.save_for_backward(y, weight, bias, mean, inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, inverse = ctx.saved_tensors
        grad = channels_last(grad)
        result = torch.empty_like(y)
        rows, upper, lower = as_rows(y), as_rows(grad), as_rows(result)
        count, channels = rows.shape[1:]
        scale, shift = _affine(mean, inverse, weight, bias)
        before = ACTIVATIONS[ctx.act][1]
        sums = torch.zeros(2, *mean.shape, dtype=mean.dtype, device=mean.device)
        for sample in range(len(rows)):
            for block in blocks(count, channels):
                z = torch.addcmul(shift[sample], rows[sample, block], scale[sample])
                g = before(upper[sample, block], z)
                lower[sample, block] = g
                sums[0, sample] += g.sum(0)
                sums[1, sample] += (rows[sample, block] - mean[sample]).mul_(g).sum(0)
        sums[1] *= inverse  # of g times the normalised value
        slope = -scale * inverse * sums[1] / count
        offset = -scale * sums[0] / count - slope * mean
        for sample in range(len(rows)):
            for block in blocks(count, channels):
                g = lower[sample, block].mul_(scale[sample]).addcmul_(rows[sample, block], slope[sample])
                g += offset[sample]
        gain = None if weight is None else sums[1].sum((0, 1))
        offsets = None if bias is None else sums[0].sum((0, 1))
        return result, gain, offsets, None, None
