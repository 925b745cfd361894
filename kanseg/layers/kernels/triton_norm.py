"""Instance normalisation and activation on a GPU: two launches forward, two backward.

Each program sums over its own rows; the kernel that needs a sum adds up the parts itself. Means and squares of the
parts are merged as Chan, Golub and LeVeque do (Stanford report STAN-CS-79-773), so that no digits cancel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kanseg.layers.kernels import gpu
from kanseg.layers.kernels.rows import channel_like
from kanseg.layers.kernels.triton_functions import activate, slope

BLOCK = 2048  # numbers a program works on at a time


def forward(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    eps: float,
    act: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_act.forward`."""
    made = torch.empty_like(y) if out is None else out
    plan = _Plan(y)
    parts, (mean, inverse) = plan.floats(2, plan.programs), (plan.floats(), plan.floats())
    gpu.launch(moments, plan.grid, y, parts[0], parts[1], *plan.sizes, BM=plan.bm, BC=plan.bc)
    gpu.launch(
        normalise, plan.grid,
        y, made, *parts, weight, bias, below, mean, inverse, eps, *plan.sizes,
        ACT=act, BM=plan.bm, BC=plan.bc, BP=plan.block_programs,
    )  # fmt: skip
    return made, mean, inverse


def backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    below: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `norm_act.backward`."""
    plan = _Plan(y)
    parts = plan.floats(3, plan.programs)
    result, (of_weight, of_bias, of_below) = (
        torch.empty_like(y),
        (channel_like(mean, t) for t in (weight, bias, below)),
    )
    shared = (weight, bias, below, mean, inverse)
    gpu.launch(sums, plan.grid, y, grad, *shared, *parts, *plan.sizes, ACT=act, BM=plan.bm, BC=plan.bc)
    gpu.launch(
        lead_back, plan.grid,
        y, grad, *shared, *parts, result, of_weight, of_bias, of_below, len(y), *plan.sizes,
        ACT=act, BM=plan.bm, BC=plan.bc, BP=plan.block_programs,
    )  # fmt: skip
    return result, of_weight, of_bias, of_below


class _Plan:
    """How programs share the rows of each sample."""

    def __init__(self, y: Tensor) -> None:
        self.y, channels = y, y.shape[1]
        rows = y[0, 0].numel()
        self.bm, self.bc = gpu.tile(channels, BLOCK, most=32)
        columns = gpu.ceiling(channels, self.bc)
        self.programs = gpu.turns(gpu.ceiling(rows, self.bm), columns * len(y), y.device)
        self.grid = (self.programs * columns, len(y))
        self.sizes = (rows, channels, self.programs)
        self.block_programs = 1 << (self.programs - 1).bit_length()

    def floats(self, *shape: int) -> Any:
        """Numbers of each sample and channel."""
        size = (*shape[:1], len(self.y), *shape[1:], self.y.shape[1])
        return torch.empty(size, dtype=torch.float32, device=self.y.device)


@triton.jit(do_not_specialize=["rows", "programs"])
def moments(y, means, squares, rows, channels, programs, BM: tl.constexpr, BC: tl.constexpr):
    """Mean and sum of squares about it of the rows of each program, (N, programs, C)."""
    blocks = tl.cdiv(channels, BC)
    number = tl.program_id(0) // blocks
    sample = tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    y += sample.to(tl.int64) * rows * channels
    count = 0.0
    mean = tl.zeros((BC,), tl.float32)
    square = tl.zeros((BC,), tl.float32)
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        v = tl.load(y + row[:, None] * channels + c[None, :], inside, 0.0).to(tl.float32)
        here = tl.minimum(rows - start, BM) * 1.0
        centre = tl.sum(v, 0) / here
        apart = tl.where(inside, v - centre[None, :], 0.0)
        shift = centre - mean
        square += tl.sum(apart * apart, 0) + shift * shift * (count * here / (count + here))
        mean += shift * (here / (count + here))
        count += here
    at = (sample * programs + number) * channels + c
    tl.store(means + at, mean, c < channels)
    tl.store(squares + at, square, c < channels)


@triton.jit
def merged(means, squares, sample, c, rows, channels, programs, BM: tl.constexpr, BP: tl.constexpr):
    """Mean and variance of a sample from its parts."""
    part = tl.arange(0, BP)
    blocks = tl.cdiv(rows, BM)
    count = tl.cdiv(blocks - part, programs) * BM - tl.where(
        (blocks - 1) % programs == part, blocks * BM - rows, 0
    )
    count = tl.where(part < programs, count, 0).to(tl.float32)[:, None]
    at = (sample * programs + part)[:, None] * channels + c[None, :]
    inside = (part < programs)[:, None] & (c < channels)[None, :]
    centres = tl.load(means + at, inside, 0.0)
    mean = tl.sum(count * centres, 0) / rows
    apart = centres - mean[None, :]
    return mean, tl.sum(tl.load(squares + at, inside, 0.0) + count * apart * apart, 0) / rows


@triton.jit
def each(numbers, c, channels, other):
    """One number a channel, float32; `other` where there are none."""
    if numbers is None:
        return tl.zeros_like(c).to(tl.float32) + other
    else:
        return tl.load(numbers + c, c < channels, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "programs"])
def normalise(y, out, means, squares, weight, bias, below, mean_out, inverse_out, eps, rows, channels, programs,
              ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """out = act((y - mean) / deviation * weight + bias); mean and 1 / deviation are kept, (N, C)."""
    blocks = tl.cdiv(channels, BC)
    number = tl.program_id(0) // blocks
    sample = tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    mean, variance = merged(means, squares, sample, c, rows, channels, programs, BM, BP)
    inverse = 1.0 / tl.sqrt(variance + eps)
    if number == 0:
        tl.store(mean_out + sample * channels + c, mean, c < channels)
        tl.store(inverse_out + sample * channels + c, inverse, c < channels)
    scale = inverse * each(weight, c, channels, 1.0)
    shift = each(bias, c, channels, 0.0)
    slopes = each(below, c, channels, 0.0)
    first = sample.to(tl.int64) * rows * channels
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = first + row[:, None] * channels + c[None, :]
        z = (tl.load(y + at, inside, 0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(out + at, activate(z, slopes[None, :], ACT).to(out.dtype.element_ty), inside)


@triton.jit
def before(y, grad, at, inside, mean, inverse, gain, shift, slopes, ACT: tl.constexpr):
    """Gradient at z = normalised * gain + shift, the normalised value, and what the slope below zero gets."""
    normal = (tl.load(y + at, inside, 0.0).to(tl.float32) - mean[None, :]) * inverse[None, :]
    normal = tl.where(inside, normal, 0.0)
    z = normal * gain[None, :] + shift[None, :]
    upper = tl.load(grad + at, inside, 0.0).to(tl.float32)
    return upper * slope(z, slopes[None, :], ACT), normal, upper * tl.minimum(z, 0.0)


@triton.jit(do_not_specialize=["rows", "programs"])
def sums(y, grad, weight, bias, below, mean, inverse, plain, weighted, negative, rows, channels, programs,
         ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums of the gradient at z, of that times the normalised value, and for the slopes, (N, programs, C)."""
    blocks = tl.cdiv(channels, BC)
    number = tl.program_id(0) // blocks
    sample = tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    mean = each(mean + sample * channels, c, channels, 0.0)
    inverse = each(inverse + sample * channels, c, channels, 0.0)
    gain, shift = each(weight, c, channels, 1.0), each(bias, c, channels, 0.0)
    slopes = each(below, c, channels, 0.0)
    first = sample.to(tl.int64) * rows * channels
    one = tl.zeros((BC,), tl.float32)
    other = tl.zeros((BC,), tl.float32)
    third = tl.zeros((BC,), tl.float32)
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = first + row[:, None] * channels + c[None, :]
        g, normal, under = before(y, grad, at, inside, mean, inverse, gain, shift, slopes, ACT)
        one += tl.sum(g, 0)
        other += tl.sum(g * normal, 0)
        if ACT == "prelu":
            third += tl.sum(under, 0)
    at = (sample * programs + number) * channels + c
    tl.store(plain + at, one, c < channels)
    tl.store(weighted + at, other, c < channels)
    tl.store(negative + at, third, c < channels)


@triton.jit
def total(parts, sample, c, channels, programs, BP: tl.constexpr):
    """The sum over the programs of one sample."""
    part = tl.arange(0, BP)
    at = (sample * programs + part)[:, None] * channels + c[None, :]
    return tl.sum(tl.load(parts + at, (part < programs)[:, None] & (c < channels)[None, :], 0.0), 0)


@triton.jit(do_not_specialize=["samples", "rows", "programs"])
def lead_back(y, grad, weight, bias, below, mean, inverse, plain, weighted, negative,
              out, of_weight, of_bias, of_below, samples, rows, channels, programs,
              ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """The gradient at y; the first programs add up those at weight, bias and slopes."""
    blocks = tl.cdiv(channels, BC)
    number = tl.program_id(0) // blocks
    sample = tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    mean = each(mean + sample * channels, c, channels, 0.0)
    inverse = each(inverse + sample * channels, c, channels, 0.0)
    gain, shift = each(weight, c, channels, 1.0), each(bias, c, channels, 0.0)
    slopes = each(below, c, channels, 0.0)
    if (number == 0) & (sample == 0):
        one = tl.zeros((BC,), tl.float32)
        other = tl.zeros((BC,), tl.float32)
        third = tl.zeros((BC,), tl.float32)
        for s in range(samples):
            one += total(plain, s, c, channels, programs, BP)
            other += total(weighted, s, c, channels, programs, BP)
            third += total(negative, s, c, channels, programs, BP)
        tl.store(of_bias + c, one.to(of_bias.dtype.element_ty), c < channels)
        tl.store(of_weight + c, other.to(of_weight.dtype.element_ty), c < channels)
        tl.store(of_below + c, third.to(of_below.dtype.element_ty), c < channels)
    constant = total(plain, sample, c, channels, programs, BP) / rows
    linear = total(weighted, sample, c, channels, programs, BP) / rows
    first = sample.to(tl.int64) * rows * channels
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = first + row[:, None] * channels + c[None, :]
        g, normal, _ = before(y, grad, at, inside, mean, inverse, gain, shift, slopes, ACT)
        g = (g - constant[None, :] - normal * linear[None, :]) * (gain * inverse)[None, :]
        tl.store(out + at, g.to(out.dtype.element_ty), inside)
