"""The functions of an expansion, their slopes and activations, on tiles of a GPU's registers, in float32.

`Functions` says which; it is a constant of the compiled code. Formulas: `kanseg.bases`; the sums over truncated powers
of B-splines as in `bases/bspline.py`. All that is unrolled here has as many steps as there are functions. Triton 3.6
takes the fields of a constant for constants only where it is told so: hence `tl.constexpr(F.act)`; nor does it know a
tuple within a tuple for a constant, so the numbers of a table of learned numbers stand in one field each.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Functions(NamedTuple):
    """[base_act(x), basis_act(phi_skip(x)), ...].

    What is learned in the phi_k are tables (sets, numbers): the channels in a row that are `shares` long have one set,
    and after `periods` channels the sets begin anew.

    Attributes:
        kind: of the phi_k, or of the terms of the one that channels share: "none", "polynomial", "fourier",
            "bernstein", "bumps", "rational" or, of phi_k(t) = psi((t - g_k) / d), the psi: "bspline", "rbf",
            "mexican_hat", "morlet", "dog".
        functions: how many phi_k there are.
        shared: 1 where phi_0 is a sum of terms times learned factors, which are then the first table; else 0.
        terms: how many terms; as `functions` where it is not shared.
        skip: how many of the phi_k need no channel.
        base: activation of the base branch; "none" for no branch.
        act: activation of the phi_k.
        squash: "identity", "tanh" or "sigmoid".
        order: of the splines.
        numbers: polynomial: a, b, c of each degree from 1; bernstein: binomials of degree and of degree - 1; bumps:
            scale; shifted psi: the g_k, 1 / d, then the factors of the truncated powers (bspline).
        counts: numbers of a set of each table: the factors of the terms; then those of c (polynomial), of low and high
            (bumps), or the coefficients of P and Q (rational).
        periods, shares: of each table; both 1 where all channels have one set.
        learned: numbers a channel that get a gradient, the sum of `counts`.
        folds: "first", "sum" or "none", see `Basis.constant`.
        one: the value of a constant phi_0 after `act`.
        first: branches before those of the phi_k.
        branches: R.
    """

    kind: str
    functions: int
    shared: int
    terms: int
    skip: int
    base: str
    act: str
    squash: str
    order: int
    numbers: tuple[float, ...]
    counts: tuple[int, ...]
    periods: tuple[int, ...]
    shares: tuple[int, ...]
    learned: int
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
def tame_sine_and_cosine(x):
    """Of |x| up to 1000: x = n pi + r, the best polynomials in r, the sign of (-1)^n; absolute error 2e-7."""
    n = tl.floor(x * 0.3183098861837907 + 0.5)
    r = (x - n * 3.140625) - n * 9.676535897932e-4
    square = r * r
    p = ((2.60005418e-6 * square - 1.98066149e-4) * square + 8.33301729e-3) * square - 0.166666571
    q = (2.47618861e-5 - square * 2.60771024e-7) * square - 1.38884035e-3
    q = (q * square + 4.16666407e-2) * square - 0.499999995
    sign = 1.0 - 2.0 * (n - 2.0 * tl.floor(0.5 * n))
    return sign * (r + r * square * p), sign * (1.0 + square * q)


@triton.jit
def sine_and_cosine(x):
    """Of any x: whole turns are taken away in float64. From 1e9 on its 2 pi has too few digits, and x counts as 0."""
    exact = x.to(tl.float64)
    turns = tl.floor(exact * 0.15915494309189535 + 0.5)
    rest = (exact - turns * 6.283185307179586).to(tl.float32)
    return tame_sine_and_cosine(tl.where(tl.abs(x) < 1e9, rest, x * 0.0))


@triton.jit
def morlet(u):
    """sin(5 u) and cos(5 u), and the Gaussian beside them, which is 0 from 14 on."""
    sine, cosine = tame_sine_and_cosine(tl.where(tl.abs(u) < 14.0, 5.0 * u, u * 0.0))
    return sine, cosine, tl.exp(-0.5 * u * u)


@triton.jit
def number(learned, TABLE: tl.constexpr, k, channel, F: tl.constexpr):
    """Number k of each channel's set in a table of what is learned; one for all where there is one set."""
    if tl.constexpr(F.periods[TABLE]) == 1:
        return tl.load(learned[TABLE] + k).to(tl.float32)
    else:
        row = channel % F.periods[TABLE] // F.shares[TABLE]
        return tl.load(learned[TABLE] + row * F.counts[TABLE] + k).to(tl.float32)[None, :]


@triton.jit
def factor(n, channel, learned, F: tl.constexpr):
    """c of degree n, times what is learned of it."""
    c = F.numbers[3 * n - 1]
    if F.learned > F.shared * F.terms:
        return number(learned, tl.constexpr(F.shared), n - 2, channel, F) * c
    else:
        return c


@triton.jit
def horner(TABLE: tl.constexpr, t, channel, learned, F: tl.constexpr):
    """sum of number k times t^k, and its derivative."""
    value = t * 0.0
    rising = t * 0.0
    for i in tl.static_range(tl.constexpr(F.counts[TABLE])):
        rising = rising * t + value
        value = value * t + number(learned, TABLE, F.counts[TABLE] - 1 - i, channel, F)
    return value, rising


@triton.jit
def mother(u, F: tl.constexpr):
    """psi(u)."""
    if F.kind == "bspline":
        total = u * 0.0
        for j in tl.static_range(tl.constexpr(F.order // 2 + 1)):
            reach = tl.maximum(0.5 * (F.order + 1) - j - tl.abs(u), 0.0)
            total += F.numbers[F.terms + 1 + j] * power(reach, tl.constexpr(F.order))
        return total
    elif F.kind == "rbf":
        return tl.exp(-u * u)
    elif F.kind == "mexican_hat":
        return 0.8673250705840776 * (1.0 - u * u) * tl.exp(-0.5 * u * u)
    elif F.kind == "morlet":
        _, cosine, gauss = morlet(u)
        return cosine * gauss
    else:  # dog
        return -u * tl.exp(-0.5 * u * u)


@triton.jit
def mother_slope(u, F: tl.constexpr):
    """The derivative of `mother`."""
    if F.kind == "bspline":
        total = u * 0.0
        for j in tl.static_range(tl.constexpr(F.order // 2 + 1)):
            reach = 0.5 * (F.order + 1) - j - tl.abs(u)
            inside = tl.where(reach > 0, power(reach, tl.constexpr(F.order - 1)), 0.0)
            total -= inside * F.numbers[F.terms + 1 + j] * F.order
        return tl.where(u > 0, total, -total)
    elif F.kind == "rbf":
        return -2.0 * u * tl.exp(-u * u)
    elif F.kind == "mexican_hat":
        return 0.8673250705840776 * u * (u * u - 3.0) * tl.exp(-0.5 * u * u)
    elif F.kind == "morlet":
        sine, cosine, gauss = morlet(u)
        return (-5.0 * sine - u * cosine) * gauss
    else:  # dog
        return (u * u - 1.0) * tl.exp(-0.5 * u * u)


@triton.jit
def term(k, t, f, channel, learned, F: tl.constexpr):
    """phi_k(t), or the term k of a shared phi_0; t is (rows, channels), `channel` (channels,), f those before."""
    if F.kind == "polynomial":
        if k == 0:
            return t * 0.0 + 1.0
        elif k == 1:
            return F.numbers[0] * t + F.numbers[1]
        else:
            step = (F.numbers[3 * k - 3] * t + F.numbers[3 * k - 2]) * f[k - 1]
            return step - factor(k, channel, learned, F) * f[k - 2]
    elif F.kind == "fourier":
        sine, cosine = sine_and_cosine(t)
        if k == 0:
            return t * 0.0 + 1.0
        elif k == 1:
            return cosine
        elif k == 2:
            return sine
        elif k == 4:
            return 2.0 * cosine * sine
        else:
            return 2.0 * cosine * f[k - 2] - f[k - 4 if k > 4 else 0]
    elif F.kind == "bernstein":
        return F.numbers[k] * power(t, k) * power(1.0 - t, F.terms - 1 - k)
    elif F.kind == "bumps":
        begin, end = number(learned, 0, k, channel, F), number(learned, 1, k, channel, F)
        bump = tl.maximum(t - begin, 0.0) * tl.maximum(end - t, 0.0) * F.numbers[0]
        return bump * bump
    elif F.kind == "rational":
        top, _ = horner(0, t, channel, learned, F)
        bottom, _ = horner(1, t, channel, learned, F)
        return top / (1.0 + tl.abs(t * bottom))
    else:
        return mother((t - F.numbers[k]) * F.numbers[F.terms], F)


@triton.jit
def terms(t, channel, learned, F: tl.constexpr):
    """Every `term`."""
    f = ()
    for k in tl.static_range(tl.constexpr(F.terms)):
        f = f + (term(k, t, f, channel, learned, F),)
    return f


@triton.jit
def function(k, t, f, channel, learned, F: tl.constexpr):
    """phi_k(t), see `term`."""
    if tl.constexpr(F.shared):
        total = t * 0.0
        for i in tl.static_range(tl.constexpr(F.terms)):
            f = f + (term(i, t, f, channel, learned, F),)
            total += number(learned, 0, i, channel, F) * f[i]
        return total
    else:
        return term(k, t, f, channel, learned, F)


@triton.jit
def derivative(k, t, f, F: tl.constexpr):
    """The derivative of term k at t, where the terms are f; of those that do not stand in `lead_back`."""
    if F.kind == "fourier":
        if k == 0:
            return t * 0.0
        elif k % 2 == 1:
            return -(k // 2 + 1.0) * f[k + 1]
        else:
            return (k // 2) * f[k - 1]
    elif F.kind == "bernstein":
        total = t * 0.0
        if k > 0:
            total += F.numbers[F.terms + k - 1] * power(t, k - 1) * power(1.0 - t, F.terms - 1 - k)
        if k < F.terms - 1:
            total -= F.numbers[F.terms + k] * power(t, k) * power(1.0 - t, F.terms - 2 - k)
        return total * (F.terms - 1)
    else:
        return mother_slope((t - F.numbers[k]) * F.numbers[F.terms], F) * F.numbers[F.terms]


@triton.jit
def upper_gradient(k, f, above, inside, width, F: tl.constexpr):
    """The gradient at phi_k = f, from that of the expansion at `above`."""
    if k < F.skip:
        return f * 0.0
    else:
        u = tl.load(above + (F.first + k - F.skip) * width, inside, 0.0).to(tl.float32)
        return u * slope(f, 0.0, tl.constexpr(F.act))


@triton.jit
def term_gradient(k, f, whole, above, inside, width, channel, learned, F: tl.constexpr):
    """The gradient at the term k = f; `whole` is that at the phi_0 which is their sum, where it is."""
    if tl.constexpr(F.shared):
        return number(learned, 0, k, channel, F) * whole
    else:
        return upper_gradient(k, f, above, inside, width, F)


@triton.jit
def lead_back(t, above, inside, width, channel, learned, sums, F: tl.constexpr, LEARNED: tl.constexpr):
    """The gradient at t from that of the expansion at `above`, and `sums` with those at the learned numbers added.

    Polynomials go from the highest down: the gradient at phi_n counts what depends on it. The others stand alone.
    """
    at = t * 0.0
    whole = at
    f = terms(t, channel, learned, F)
    found = ()
    if tl.constexpr(F.shared):
        whole = upper_gradient(0, function(0, t, (), channel, learned, F), above, inside, width, F)
        for k in tl.static_range(tl.constexpr(F.terms if LEARNED else 0)):
            found = found + (sums[k] + whole * f[k],)
    if F.kind == "polynomial":
        of_factors = ()
        beyond = t * 0.0
        second = t * 0.0
        for n in tl.static_range(tl.constexpr(F.terms - 1), 0, -1):
            here = beyond + term_gradient(n, f[n], whole, above, inside, width, channel, learned, F)
            at += F.numbers[3 * n - 3] * f[n - 1] * here
            beyond = (F.numbers[3 * n - 3] * t + F.numbers[3 * n - 2]) * here - second
            if n > 1:
                if LEARNED and F.learned > F.shared * F.terms:
                    step = F.numbers[3 * n - 1] * f[n - 2] * here
                    of_factors = (sums[F.shared * F.terms + n - 2] - step,) + of_factors
                second = factor(n, channel, learned, F) * here
        found = found + of_factors
    elif F.kind == "bumps":
        lows = ()
        highs = ()
        for k in tl.static_range(tl.constexpr(F.functions)):
            a = tl.maximum(t - number(learned, 0, k, channel, F), 0.0)
            b = tl.maximum(number(learned, 1, k, channel, F) - t, 0.0)
            root = a * b * F.numbers[0]
            both = upper_gradient(k, root * root, above, inside, width, F) * root * (2.0 * F.numbers[0])
            at += both * (b - a)
            if LEARNED:
                lows = lows + (sums[k] - both * b,)
                highs = highs + (sums[F.functions + k] + both * a,)
        found = lows + highs
    elif F.kind == "rational":
        _, rising = horner(0, t, channel, learned, F)
        bottom, bending = horner(1, t, channel, learned, F)
        below = t * bottom
        of_top = upper_gradient(0, f[0], above, inside, width, F) / (1.0 + tl.abs(below))
        of_below = -f[0] * of_top * tl.where(below > 0, 1.0, tl.where(below < 0, -1.0, 0.0))
        at = of_top * rising + of_below * (bottom + t * bending)
        if LEARNED:
            for k in tl.static_range(tl.constexpr(F.counts[0])):
                found = found + (sums[k] + of_top * power(t, k),)
            for k in tl.static_range(tl.constexpr(F.counts[1])):
                found = found + (sums[F.counts[0] + k] + of_below * power(t, k + 1),)
    else:
        for k in tl.static_range(tl.constexpr(F.skip), tl.constexpr(F.terms)):
            here = term_gradient(k, f[k], whole, above, inside, width, channel, learned, F)
            at += here * derivative(k, t, f, F)
    return at, found
