"""The functions of an expansion, their slopes and activations, on tiles of a GPU's registers, in float32.

`Functions` says which; it is a constant of the compiled code. Formulas: `kanseg.bases`; the sums over truncated powers
of B-splines as in `bases/bspline.py`. All that is unrolled here has as many steps as there are functions. Triton 3.6
takes the fields of a constant for constants only where it is told so: hence `tl.constexpr(F.act)`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Functions(NamedTuple):
    """[base_act(x), basis_act(phi_skip(x)), ...].

    Attributes:
        kind: "none", "polynomial", "bernstein", "bspline", "rbf" or "bumps".
        functions: how many phi_k there are.
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
    functions: int
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
    at = (channel % F.period) * F.functions + k
    return tl.load(low + at).to(tl.float32), tl.load(high + at).to(tl.float32)


@triton.jit
def function(k, t, channel, low, high, one, two, F: tl.constexpr):
    """phi_k(t); t is (rows, channels), `channel` (channels,), `one` and `two` are phi_{k-1} and phi_{k-2}."""
    if F.kind == "polynomial":
        if k == 0:
            return t * 0.0 + 1.0
        elif k == 1:
            return F.numbers[0] * t + F.numbers[1]
        else:
            return (F.numbers[3 * k - 3] * t + F.numbers[3 * k - 2]) * one - factor(low, k, F) * two
    elif F.kind == "bernstein":
        return F.numbers[k] * power(t, k) * power(1.0 - t, F.functions - 1 - k)
    elif F.kind == "bspline":
        distance = tl.abs((t - F.numbers[k]) * F.numbers[F.functions])
        total = t * 0.0
        for j in tl.static_range(tl.constexpr(F.order // 2 + 1)):
            reach = tl.maximum(0.5 * (F.order + 1) - j - distance, 0.0)
            total += F.numbers[F.functions + 1 + j] * power(reach, tl.constexpr(F.order))
        return total
    elif F.kind == "rbf":
        u = (t - F.numbers[k]) * F.numbers[F.functions]
        return tl.exp(-u * u)
    else:  # bumps
        begin, end = edges(low, high, channel, k, F)
        bump = tl.maximum(t - begin[None, :], 0.0) * tl.maximum(end[None, :] - t, 0.0) * F.numbers[0]
        return bump * bump


@triton.jit
def derivative(k, t, f, F: tl.constexpr):
    """The derivative of phi_k at t, where its value is f; not of polynomials and bumps."""
    if F.kind == "bernstein":
        total = t * 0.0
        if k > 0:
            total += F.numbers[F.functions + k - 1] * power(t, k - 1) * power(1.0 - t, F.functions - 1 - k)
        if k < F.functions - 1:
            total -= F.numbers[F.functions + k] * power(t, k) * power(1.0 - t, F.functions - 2 - k)
        return total * (F.functions - 1)
    elif F.kind == "bspline":
        v = (t - F.numbers[k]) * F.numbers[F.functions]
        total = t * 0.0
        for j in tl.static_range(tl.constexpr(F.order // 2 + 1)):
            reach = 0.5 * (F.order + 1) - j - tl.abs(v)
            inside = tl.where(reach > 0, power(reach, tl.constexpr(F.order - 1)), 0.0)
            total -= inside * F.numbers[F.functions + 1 + j] * F.order
        return tl.where(v > 0, total, -total) * F.numbers[F.functions]
    else:  # rbf
        return (F.numbers[k] - t) * f * (2.0 * F.numbers[F.functions] * F.numbers[F.functions])


@triton.jit
def upper_gradient(k, f, above, inside, width, F: tl.constexpr):
    """The gradient at phi_k = f, from that of the expansion at `above`."""
    if k < F.skip:
        return f * 0.0
    else:
        u = tl.load(above + (F.first + k - F.skip) * width, inside, 0.0).to(tl.float32)
        return u * slope(f, 0.0, tl.constexpr(F.act))


@triton.jit
def lead_back(t, above, inside, width, channel, low, high, sums, F: tl.constexpr, LEARNED: tl.constexpr):
    """The gradient at t from that of the expansion at `above`, and `sums` with those at the learned numbers added.

    Polynomials go from the highest down: the gradient at phi_n counts what depends on it. The others stand alone.
    """
    at = t * 0.0
    if F.kind == "polynomial":
        f = (function(0, t, channel, low, high, t, t, F),)
        for k in tl.static_range(1, tl.constexpr(F.functions)):
            f = f + (function(k, t, channel, low, high, f[k - 1], f[k - 2 if k > 1 else 0], F),)
        learned = ()
        beyond = t * 0.0
        second = t * 0.0
        for i in tl.static_range(tl.constexpr(F.functions - 1)):
            a = F.numbers[3 * (F.functions - 1 - i) - 3]
            b = F.numbers[3 * (F.functions - 1 - i) - 2]
            here = (
                upper_gradient(F.functions - 1 - i, f[F.functions - 1 - i], above, inside, width, F) + beyond
            )
            at += a * f[F.functions - 2 - i] * here
            beyond = (a * t + b) * here - second
            if F.functions - 1 - i > 1:
                if LEARNED:
                    c = F.numbers[3 * (F.functions - 1 - i) - 1]
                    learned = (sums[F.functions - 3 - i] - c * f[F.functions - 3 - i] * here,) + learned
                second = factor(low, F.functions - 1 - i, F) * here
        return at, learned
    elif F.kind == "bumps":
        lows = ()
        highs = ()
        for k in tl.static_range(tl.constexpr(F.functions)):
            begin, end = edges(low, high, channel, k, F)
            a = tl.maximum(t - begin[None, :], 0.0)
            b = tl.maximum(end[None, :] - t, 0.0)
            f = a * b * F.numbers[0]
            both = upper_gradient(k, f * f, above, inside, width, F) * f * (2.0 * F.numbers[0])
            at += both * (b - a)
            if LEARNED:
                lows = lows + (sums[k] - both * b,)
                highs = highs + (sums[F.functions + k] + both * a,)
        return at, lows + highs
    else:
        for k in tl.static_range(tl.constexpr(F.skip), tl.constexpr(F.functions)):
            f = function(k, t, channel, low, high, t, t, F)
            at += upper_gradient(k, f, above, inside, width, F) * derivative(k, t, f, F)
        return at, sums
