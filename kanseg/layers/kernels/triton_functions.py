"""The functions of an expansion, their slopes and activations, on tiles of a GPU's registers, in float32.

`Functions` says which; it is a constant of the compiled code. Formulas: `kanseg.bases`; the sums over truncated powers
of B-splines as in `bases/bspline.py`. All that is unrolled here has as many steps as there are functions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Functions(NamedTuple):
    """[base_act(x), basis_act(phi_skip(x)), ...].

    Attributes:
        kind: "none", "polynomial", "bernstein", "bspline", "rbf" or "bumps".
        count: of the phi_k.
        skip: how many of them need no channel.
        base: activation of the base branch; "none" for no branch.
        act: activation of the phi_k.
        squash: "identity", "tanh" or "sigmoid".
        order: of the splines.
        numbers: polynomial: a, b, c of each degree from 1; bernstein: binomials of degree and of degree - 1; bspline:
            centres, 1 / spacing, then the factors of the truncated powers; rbf: centres, 1 / spacing; bumps: scale.
        learned: how many numbers a channel get a gradient: the factors of c (polynomial), low and high (bumps).
        period: channels after which learned numbers repeat.
        folds: "first", "sum" or "none", see `Basis.constant`.
        one: the value of a constant phi_0 after `act`.
        first: branches before those of the phi_k.
        branches: R.
    """

    kind: str
    count: int
    skip: int
    base: str
    act: str
    squash: str
    order: int
    numbers: tuple[float, ...]
    learned: int
    period: int
    folds: str
    one: float
    first: int
    branches: int


@triton.jit
def activate(x, below, ACT: tl.constexpr):
    """act(x); `below` is the slope of "prelu" below zero."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "prelu":
        return tl.where(x > 0, x, x * below)
    else:
        return x


@triton.jit
def slope(x, below, ACT: tl.constexpr):
    """The derivative of `activate`."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        gauss = tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * gauss * 0.3989422804014327
    elif ACT == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == "prelu":
        return tl.where(x > 0, 1.0, below)
    else:
        return x * 0.0 + 1.0


@triton.jit
def squashed(x, F: tl.constexpr):
    """The point in the domain of the basis."""
    if F.squash == "tanh":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif F.squash == "sigmoid":
        return tl.sigmoid(x)
    else:
        return x


@triton.jit
def squash_slope(t, F: tl.constexpr):
    """The derivative of `squashed`, from its value."""
    if F.squash == "tanh":
        return 1.0 - t * t
    elif F.squash == "sigmoid":
        return t * (1.0 - t)
    else:
        return t * 0.0 + 1.0


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT by products."""
    y = x * 0.0 + 1.0
    for _ in tl.static_range(EXPONENT):
        y = y * x
    return y


@triton.jit
def factor(learned, n, F: tl.constexpr):
    """c of degree n, times what is learned of it."""
    c = F.numbers[3 * n - 1]
    if F.learned > 0:
        return tl.load(learned + n - 2).to(tl.float32) * c
    else:
        return c


@triton.jit
def edges(low, high, channel, k, F: tl.constexpr):
    """Where bump k of each channel begins and ends."""
    at = (channel % F.period) * F.count + k
    return tl.load(low + at).to(tl.float32), tl.load(high + at).to(tl.float32)


@triton.jit
def functions(t, channel, low, high, F: tl.constexpr):
    """phi_0(t) ... as a tuple; t is (rows, channels), `channel` (channels,)."""
    f = ()
    if F.kind == "polynomial":
        f = f + (t * 0.0 + 1.0,)
        for n in tl.static_range(1, F.count):
            step = (F.numbers[3 * n - 3] * t + F.numbers[3 * n - 2]) * f[n - 1]
            if n > 1:
                step -= factor(low, n, F) * f[n - 2]
            f = f + (step,)
    elif F.kind == "bernstein":
        for k in tl.static_range(F.count):
            f = f + (F.numbers[k] * power(t, k) * power(1.0 - t, F.count - 1 - k),)
    elif F.kind == "bspline":
        for k in tl.static_range(F.count):
            distance = tl.abs((t - F.numbers[k]) * F.numbers[F.count])
            total = t * 0.0
            for j in tl.static_range(F.order // 2 + 1):
                reach = tl.maximum(0.5 * (F.order + 1) - j - distance, 0.0)
                total += F.numbers[F.count + 1 + j] * power(reach, F.order)
            f = f + (total,)
    elif F.kind == "rbf":
        for k in tl.static_range(F.count):
            u = (t - F.numbers[k]) * F.numbers[F.count]
            f = f + (tl.exp(-u * u),)
    elif F.kind == "bumps":
        for k in tl.static_range(F.count):
            begin, end = edges(low, high, channel, k, F)
            bump = tl.maximum(t - begin[None, :], 0.0) * tl.maximum(end[None, :] - t, 0.0) * F.numbers[0]
            f = f + (bump * bump,)
    return f


@triton.jit
def lead_back(t, g, f, channel, low, high, F: tl.constexpr):
    """The gradient at t from those at the phi_k, a tuple, and those at the learned numbers at each place, a tuple."""
    at = t * 0.0
    learned = ()
    if F.kind == "polynomial":
        above = t * 0.0  # the gradient at phi_{n+1} with all that depends on it, then at phi_{n+2}
        second = t * 0.0
        for i in tl.static_range(F.count - 1):
            a = F.numbers[3 * (F.count - 1 - i) - 3]
            here = g[F.count - 1 - i] + above
            at += a * f[F.count - 2 - i] * here
            if F.count - 1 - i > 1:
                c = factor(low, F.count - 1 - i, F)
                learned = (-F.numbers[3 * (F.count - 1 - i) - 1] * f[F.count - 3 - i] * here,) + learned
            else:
                c = 0.0
            above = (a * t + F.numbers[3 * (F.count - 1 - i) - 2]) * here - second
            second = c * here
    elif F.kind == "bernstein":
        for k in tl.static_range(F.count - 1):
            lower = F.numbers[F.count + k] * power(t, k) * power(1.0 - t, F.count - 2 - k)
            at += (F.count - 1) * lower * (g[k + 1] - g[k])
    elif F.kind == "bspline":
        for k in tl.static_range(F.count):
            v = (t - F.numbers[k]) * F.numbers[F.count]
            total = t * 0.0
            for j in tl.static_range(F.order // 2 + 1):
                reach = 0.5 * (F.order + 1) - j - tl.abs(v)
                inside = tl.where(reach > 0, power(reach, F.order - 1), 0.0)
                total -= F.order * F.numbers[F.count + 1 + j] * inside
            at += g[k] * tl.where(v > 0, total, -total)
        at *= F.numbers[F.count]
    elif F.kind == "rbf":
        for k in tl.static_range(F.count):
            at -= g[k] * f[k] * (t - F.numbers[k])
        at *= 2.0 * F.numbers[F.count] * F.numbers[F.count]
    elif F.kind == "bumps":
        ends = ()
        for k in tl.static_range(F.count):
            begin, end = edges(low, high, channel, k, F)
            a = tl.maximum(t - begin[None, :], 0.0)
            b = tl.maximum(end[None, :] - t, 0.0)
            both = 2.0 * F.numbers[0] * F.numbers[0] * a * b * g[k]
            at += both * (b - a)
            learned = learned + (-both * b,)
            ends = ends + (both * a,)
        learned = learned + ends
    return at, learned
