"""Instance normalisation and activation in one step that keeps its input and two numbers a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.layers.kernels import native
from kanseg.layers.kernels.native import Affine
from kanseg.layers.kernels.rows import as_rows, blocks, channels_last


def instance_norm_act(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    below: Tensor | None = None,
    *,
    over: bool = False,
) -> Tensor:
    """act((y - mean) / sqrt(var + eps) * weight + bias), (N, C, *S) in channels-last memory, float32 or float64.

    Mean and variance are of each sample and channel, the variance by a second pass over the centred values.

    Args:
        act: "identity", "silu", "relu" or "prelu".
        below: slopes below zero of "prelu", (C,).
        over: without gradients, write the result over `y`.
    """
    given = (y, weight, bias, below)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _NormAct.apply(y, weight, bias, below, eps, act)
    return _forward(y, y if over else torch.empty_like(y), weight, bias, below, eps, act)[0]


def activate(z: Tensor, to: Affine) -> Tensor:
    """The activation, in place."""
    if to.act == "silu":
        return F.silu(z, inplace=True)
    if to.act == "relu":
        return z.relu_()
    return z.copy_(torch.where(z > 0, z, z * to.below)) if to.act == "prelu" else z


def before(grad: Tensor, z: Tensor, to: Affine) -> Tensor:
    """The gradient at z from that at act(z)."""
    if to.act == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    if to.act == "relu":
        return grad * (z > 0)
    return torch.where(z > 0, grad, grad * to.below) if to.act == "prelu" else grad


def _forward(
    y: Tensor,
    out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, written = as_rows(y), as_rows(out)
    compiled = native.serves(y)
    moments = [native.norm_statistics(part) if compiled else _statistics(part) for part in rows]
    mean, variance = (torch.stack(part) for part in zip(*moments, strict=True))
    inverse = (variance + eps).rsqrt()
    for part, into, to in zip(rows, written, _affine(mean, inverse, weight, bias, below, act), strict=True):
        if compiled:
            native.norm_forward(part, into, to)
            continue
        for block in blocks(*part.shape):
            torch.addcmul(to.shift, part[block], to.scale, out=into[block])
            activate(into[block], to)
    return out, mean, inverse


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (voxels, C)."""
    mean = rows.mean(0)
    squares = torch.zeros_like(mean)
    for block in blocks(*rows.shape):
        squares += (rows[block] - mean).square_().sum(0)
    return mean, squares / len(rows)


def _affine(
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    act: str,
) -> Iterator[Affine]:
    """What takes y to the normalised value, a sample at a time."""
    scale = inverse if weight is None else inverse * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    slopes = torch.zeros_like(scale[0]) if below is None else below.contiguous()
    for sample in range(len(scale)):
        yield Affine(scale[sample], shift[sample], slopes, act)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        below: Tensor | None,
        eps: float,
        act: str,
    ) -> Tensor:
        out, mean, inverse = _forward(y, torch.empty_like(y), weight, bias, below, eps, act)
        ctx.act = act
        ctx.save_for_backward(y, weight, bias, below, mean, inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, below, mean, inverse = ctx.saved_tensors
        grad, result = channels_last(grad), torch.empty_like(y)
        samples = zip(as_rows(y), as_rows(grad), as_rows(result), strict=True)
        compiled = native.serves(y, grad)
        sums = torch.zeros(3, *mean.shape, dtype=mean.dtype, device=mean.device)
        count = y[0, 0].numel()
        steps = _affine(mean, inverse, weight, bias, below, ctx.act)
        for number, ((rows, upper, lower), to) in enumerate(zip(samples, steps, strict=True)):
            reduce = native.norm_sums if compiled else _sums
            part = reduce(rows, upper, to, mean[number])
            part[1] *= inverse[number]  # of g times the normalised value
            sums[:, number] = part
            gain = -to.scale * inverse[number] * part[1] / count
            offset = -to.scale * part[0] / count - gain * mean[number]
            (native.norm_backward if compiled else _backward)(rows, upper, to, gain, offset, lower)
        plain, weighted, negative = sums.sum(1)
        return (
            result,
            None if weight is None else weighted,
            None if bias is None else plain,
            None if below is None else negative,
            None,
            None,
        )


def _sums(rows: Tensor, grad: Tensor, to: Affine, mean: Tensor) -> Tensor:
    """As `native.norm_sums`."""
    sums = torch.zeros(3, rows.shape[1], dtype=rows.dtype, device=rows.device)
    for block in blocks(*rows.shape):
        z = torch.addcmul(to.shift, rows[block], to.scale)
        g = before(grad[block], z, to)
        sums[0] += g.sum(0)
        sums[1] += (rows[block] - mean).mul_(g).sum(0)
        if to.act == "prelu":
            sums[2] += (grad[block] * z.clamp(max=0)).sum(0)
    return sums


def _backward(rows: Tensor, grad: Tensor, to: Affine, gain: Tensor, offset: Tensor, out: Tensor) -> None:
    """As `native.norm_backward`."""
    for block in blocks(*rows.shape):
        z = torch.addcmul(to.shift, rows[block], to.scale)
        out[block] = before(grad[block], z, to).mul(to.scale).addcmul_(rows[block], gain).add_(offset)
