"""Normalisation and activation in one step that keeps its input and two numbers a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from kanseg.layers.kernels import gpu, native
from kanseg.layers.kernels.native import Affine
from kanseg.layers.kernels.operators import operator, plain_eager, refuse_batched, refuse_second
from kanseg.layers.kernels.rows import as_rows, blocks, channel_like, channels_last


def instance_norm_act(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    below: Tensor | None = None,
    *,
    over: bool = False,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """act((y - mean) / sqrt(var + eps) * weight + bias), (N, C, *S) in channels-last memory, float32 or float64,
    on a GPU that `gpu` serves also half of that.

    Mean and variance are of each sample and channel, the variance by a second pass over the centred values.

    Args:
        act: "identity", "silu", "relu" or "prelu".
        below: slopes below zero of "prelu", (C,).
        over: without gradients, write the result over `y`.
        seen: where nothing watches the operators, gets mean and 1 / deviation of each sample and channel, (N, C).
    """
    if y.dim() == 3:
        return instance_norm_act(y.unsqueeze(2), weight, bias, eps, act, below, over=over).squeeze(2)
    given = (y, weight, bias, below)
    if not plain_eager(y):
        return _norm(*given, eps, act)[0]
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if differentiated or forward_ad._current_level >= 0:  # the latter is refused by torch, in its words
        return _Direct.apply(seen, *given, eps, act)
    made, *statistics = forward(*given, eps, act, out=y if over else None)
    if seen is not None:
        seen += statistics
    return made


def batch_norm_act(y: Tensor, norm: Any, act: str, below: Tensor | None = None) -> Tensor:
    """act(norm(y)) of a batch norm in training, which counts the batch in its running statistics, if it has such.

    All voxels of the batch are those of one sample to `instance_norm_act`.
    """
    rows = channels_last(y).movedim(1, -1)
    seen: list[Tensor] = []
    flat = rows.reshape(1, -1, 1, rows.shape[-1]).movedim(-1, 1)
    made = instance_norm_act(flat, norm.weight, norm.bias, norm.eps, act, below, seen=seen)
    if norm.running_mean is not None:
        mean, inverse = (t[0].detach() for t in seen)
        count = flat.shape[2]
        variance = (inverse.pow(-2) - norm.eps).clamp_(min=0) * (count / (count - 1))
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance, share)
    return made.movedim(1, -1).reshape(rows.shape).movedim(-1, 1)


def activate(z: Tensor, to: Affine) -> Tensor:
    """The activation, in place."""
    if to.act == "silu":
        return F.silu(z, inplace=True)
    if to.act == "relu":
        return z.relu_()
    if to.act == "prelu":
        low = z.clamp(max=0)
        return z.sub_(low).addcmul_(low, to.below)
    return z


def before(grad: Tensor, z: Tensor, to: Affine) -> Tensor:
    """The gradient at z from that at act(z)."""
    if to.act == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    if to.act == "relu":
        return grad * (z > 0)
    if to.act == "prelu":  # the slope: 1 above zero, `below` from it downwards
        return (z > 0).to(z.dtype).mul_(1 - to.below).add_(to.below).mul_(grad)
    return grad


def forward(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    eps: float,
    act: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / deviation of each sample and channel, (N, C)."""
    y = channels_last(y)
    if not y.numel():
        none = y.new_zeros(y.shape[:2], dtype=_statistics_type(y))
        return torch.empty_like(y), none, none.clone()
    if gpu.serves(y):
        return gpu.kernels("norm").forward(y, weight, bias, below, eps, act, out)
    if y.dtype.itemsize < 4:
        made, mean, inverse = forward(y.float(), weight, bias, below, eps, act)
        return made.to(y.dtype), mean, inverse
    out = torch.empty_like(y) if out is None else out
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
            torch.addcmul(to.shift, part[block] - to.mean, to.scale, out=into[block])
            activate(into[block], to)
    return out, mean, inverse


def _statistics_type(y: Tensor) -> torch.dtype:
    return y.dtype if y.dtype.itemsize > 4 else torch.float32


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
    weight, bias, below = (None if t is None else t.to(mean.dtype) for t in (weight, bias, below))
    scale = inverse if weight is None else inverse * weight
    shift, slopes = (torch.zeros_like(scale[0]) if t is None else t.contiguous() for t in (bias, below))
    for sample in range(len(scale)):
        yield Affine(scale[sample], mean[sample], shift, slopes, act)


def backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    act: str,
) -> tuple[Tensor, ...]:
    """The gradients at y, weight, bias and below, whether there are such or not."""
    y, grad = channels_last(y), channels_last(grad)
    if not y.numel():
        return torch.empty_like(y), *(channel_like(mean, t).zero_() for t in (weight, bias, below))
    if gpu.serves(y, grad):
        return gpu.kernels("norm").backward(grad, y, weight, bias, below, mean, inverse, act)
    if y.dtype.itemsize < 4:
        of_y, *others = backward(grad.float(), y.float(), weight, bias, below, mean, inverse, act)
        return of_y.to(y.dtype), *others
    result = torch.empty_like(y)
    samples = zip(as_rows(y), as_rows(grad), as_rows(result), strict=True)
    compiled = native.serves(y, grad)
    sums = torch.zeros(3, *mean.shape, dtype=mean.dtype, device=mean.device)
    count = y[0, 0].numel()
    steps = _affine(mean, inverse, weight, bias, below, act)
    for number, ((rows, upper, lower), to) in enumerate(zip(samples, steps, strict=True)):
        reduce = native.norm_sums if compiled else _sums
        part = reduce(rows, upper, to)
        part[1] *= inverse[number]  # of g times the normalised value
        sums[:, number] = part
        gain = -to.scale * inverse[number] * part[1] / count
        offset = -to.scale * part[0] / count
        (native.norm_backward if compiled else _to_rows)(rows, upper, to, gain, offset, lower)
    plain, weighted, negative = (part.sum(0) for part in sums)  # no views of one tensor
    given = ((weighted, weight), (plain, bias), (negative, below))
    return result, *(part if t is None else part.to(t.dtype) for part, t in given)


def _sums(rows: Tensor, grad: Tensor, to: Affine) -> Tensor:
    """As `native.norm_sums`."""
    sums = torch.zeros(3, rows.shape[1], dtype=rows.dtype, device=rows.device)
    for block in blocks(*rows.shape):
        apart = rows[block] - to.mean
        z = torch.addcmul(to.shift, apart, to.scale)
        g = before(grad[block], z, to)
        sums[0] += g.sum(0)
        sums[1] += apart.mul_(g).sum(0)
        if to.act == "prelu":
            sums[2] += (grad[block] * z.clamp(max=0)).sum(0)
    return sums


def _to_rows(rows: Tensor, grad: Tensor, to: Affine, gain: Tensor, offset: Tensor, out: Tensor) -> None:
    """As `native.norm_backward`."""
    for block in blocks(*rows.shape):
        apart = rows[block] - to.mean
        z = torch.addcmul(to.shift, apart, to.scale)
        out[block] = before(grad[block], z, to).mul(to.scale).addcmul_(apart, gain).add_(offset)


def _fake_forward(y: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, inverse = (y.new_empty(y.shape[:2], dtype=_statistics_type(y)) for _ in range(2))
    return torch.empty_like(y), mean, inverse


def _fake_backward(
    grad: Tensor, y: Tensor, weight: Any, bias: Any, below: Any, mean: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(y), *(channel_like(mean, t) for t in (weight, bias, below))


GIVEN = "Tensor y, Tensor? weight, Tensor? bias, Tensor? below"
_norm = operator(
    "instance_norm_act", f"({GIVEN}, float eps, str act) -> (Tensor, Tensor, Tensor)", forward, _fake_forward
)
_norm_backward = operator(
    "instance_norm_act_backward",
    f"(Tensor grad, {GIVEN}, Tensor mean, Tensor inverse, str act) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, _, ctx.act = inputs
    ctx.save_for_backward(*given, *output[1:])


def _lead_back(
    ctx: Any, grad: Tensor, *others: Any, call: Callable[..., Any] | None = None, needs: Any = None
) -> tuple[Any, ...]:
    grads = (call or _norm_backward)(grad, *ctx.saved_tensors, ctx.act)
    needs = needs or ctx.needs_input_grad[:4]
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_norm.register_autograd(_lead_back, setup_context=_keep)
_norm_backward.register_autograd(refuse_second)


class _Direct(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, seen: list[Tensor] | None, *given: Any) -> Tensor:
        made = forward(*given)
        _keep(ctx, given, made)
        if seen is not None:
            seen += made[1:]
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_batched(grad)
        call = None if torch.is_grad_enabled() else backward
        return None, *_lead_back(ctx, grad, call=call, needs=ctx.needs_input_grad[1:5])
