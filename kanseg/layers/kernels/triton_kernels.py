"""GPU kernels around the convolution over an expansion; all tensors in channels-last memory, rows are voxels.

A launch costs more than a small map, so one launch does several jobs: the numbers of its programs are shared out. What
is summed over the rows is summed by each program over its own and added up by the next kernel that needs it.
`F` is a `Functions`; `G` a `Taps`; `R` and `C` in the comments are branches and channels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kanseg.layers.kernels.triton_functions import (
    activate,
    function,
    lead_back,
    slope,
    squash_slope,
    squashed,
)


class Taps(NamedTuple):
    """Kernel, stride, padding, dilation, three axes each (2D has depth 1), and the number of taps."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    taps: int


@triton.jit
def expand_rows(pid, x, own, out, learned, rows, before, source, channels, groups,
                F: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Write the branches of a block: (rows, C) -> (rows, groups, R, C / groups); zeros where there is no source row.

    Rows of `out` before `before` and from `before + source` on are the padding of a slab.
    """
    blocks = tl.cdiv(channels, BC)
    row = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    width = channels // groups
    at = (row - before)[:, None] * channels + c[None, :]
    inside = ((row >= before) & (row < before + source))[:, None] & (c < channels)[None, :]
    into = row[:, None] * (channels * F.branches) + ((c // width) * (F.branches * width) + c % width)[None, :]
    written = (row < rows)[:, None] & (c < channels)[None, :]
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if F.first > 0:
        tl.store(
            out + into,
            tl.where(inside, activate(v, 0.0, tl.constexpr(F.base)), 0.0).to(out.dtype.element_ty),
            written,
        )
    if OWN:
        v = tl.load(own + at, inside, 0.0).to(tl.float32)
    t = squashed(v, F)
    f = ()
    for k in tl.static_range(tl.constexpr(F.functions)):
        f = f + (function(k, t, f, c, learned, F),)
        if k >= F.skip:
            value = tl.where(inside, activate(f[k], 0.0, tl.constexpr(F.act)), 0.0)
            tl.store(out + into + (F.first + k - F.skip) * width, value.to(out.dtype.element_ty), written)


@triton.jit
def fold_weight(o, base, basis, folded, constant, width, outputs,
                F: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Weights of output channel o in the order of the expansion, (taps, R, C), and of the constant, (taps, outputs)."""
    tap = tl.arange(0, BT)
    fixed = tl.zeros((BT,), tl.float32)
    for start in range(0, width, BC):
        c = start + tl.arange(0, BC)
        here = (c < width)[:, None] & (tap < TAPS)[None, :]
        into = folded + o * TAPS * F.branches * width + tap[None, :] * (F.branches * width) + c[:, None]
        if F.first > 0:
            w = tl.load(base + (o * width + c)[:, None] * TAPS + tap[None, :], here, 0.0)
            tl.store(into, w.to(folded.dtype.element_ty), here)
        if F.functions > 0:
            at = basis + (o * width + c)[:, None] * (F.functions * TAPS) + tap[None, :]
            if F.skip > 0:
                zeroth = tl.load(at, here, 0.0).to(tl.float32)
                fixed += tl.sum(zeroth, 0) * F.one
            for k in tl.static_range(tl.constexpr(F.skip), tl.constexpr(F.functions)):
                w = tl.load(at + k * TAPS, here, 0.0).to(tl.float32)
                if F.folds == "sum":
                    w -= zeroth
                tl.store(into + (F.first + k - F.skip) * width, w.to(folded.dtype.element_ty), here)
    if F.skip > 0:
        tl.store(constant + tap * outputs + o, fixed, tap < TAPS)


@triton.jit
def valid_taps(row, plane, size, out_size, G: tl.constexpr, BT: tl.constexpr):
    """(rows, BT): 1 where a tap of an output voxel lies inside the image; rows start at plane `plane` of a sample."""
    row = row.to(tl.int32)
    tap = tl.arange(0, BT)
    rest = out_size[1] * out_size[2]
    d = (plane + row // rest) % out_size[0] * G.stride[0] - G.padding[0]
    h = row // out_size[2] % out_size[1] * G.stride[1] - G.padding[1]
    w = row % out_size[2] * G.stride[2] - G.padding[2]
    d = d[:, None] + (tap // (G.kernel[1] * G.kernel[2]) * G.dilation[0])[None, :]
    h = h[:, None] + (tap // G.kernel[2] % G.kernel[1] * G.dilation[1])[None, :]
    w = w[:, None] + (tap % G.kernel[2] * G.dilation[2])[None, :]
    inside = (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])
    return tl.where(inside & (tap < G.taps)[None, :], 1.0, 0.0)


@triton.jit
def constant_sums(pid, grad, partial, rows, outputs, size, out_size, programs,
                  G: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
                  BT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums of the gradient over the voxels that see each tap, (programs, taps, outputs)."""
    blocks = tl.cdiv(outputs, BC)
    number = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)
    tap = tl.arange(0, BT)
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < outputs)[None, :]
        g = tl.load(grad + row[:, None] * outputs + c[None, :], inside, 0.0)
        seen = tl.trans(valid_taps(row, 0, size, out_size, G, BT))
        total = product(seen, g, total, grad.dtype.element_ty, PRECISION, UP)
    into = partial + (number * G.taps + tap[:, None]) * outputs + c[None, :]
    tl.store(into, total, (tap < G.taps)[:, None] & (c < outputs)[None, :])


@triton.jit(do_not_specialize=["rows", "before", "source", "folds", "out_rows", "programs", "expands"])
def prepare(x, own, out, learned, rows, before, source, channels, groups,
            base, basis, folded, constant, outputs, folds,
            grad, partial, out_rows, size, out_size, programs, expands,
            F: tl.constexpr, G: tl.constexpr, OWN: tl.constexpr, SUMS: tl.constexpr, EXPANDS: tl.constexpr,
            PRECISION: tl.constexpr, UP: tl.constexpr,
            BM: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """The first `expands` programs expand, the next `folds` fold the weight, the rest sum the constant's gradient."""
    pid = tl.program_id(0)
    if pid < expands:
        if EXPANDS:
            expand_rows(pid, x, own, out, learned, rows, before, source, channels, groups, F, OWN, BM, BC)
    elif pid < expands + folds:
        fold_weight(
            pid - expands,
            base,
            basis,
            folded,
            constant,
            channels // groups,
            outputs,
            F,
            tl.constexpr(G.taps),
            BT,
            BF,
        )
    else:
        if SUMS:
            constant_sums(pid - expands - folds, grad, partial, out_rows, outputs, size, out_size, programs,
                          G, PRECISION, UP, BT, 64, BS)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "plane"])
def add_constant(y, out, constant, rows, plane, outputs, size, out_size,
                 G: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
                 BT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out = y + the response of the constant, where the taps lie inside the image; `out` may be `y`."""
    blocks = tl.cdiv(outputs, BC)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    tap = tl.arange(0, BT)
    known = (tap < G.taps)[:, None] & (c < outputs)[None, :]
    weight = tl.load(constant + tap[:, None] * outputs + c[None, :], known, 0.0)
    kind = y.dtype.element_ty
    seen = valid_taps(row, plane, size, out_size, G, BT)
    response = product(seen, weight.to(kind), tl.zeros((BM, BC), tl.float32), kind, PRECISION, UP)
    at = row[:, None] * outputs + c[None, :]
    inside = (row < rows)[:, None] & (c < outputs)[None, :]
    tl.store(
        out + at, (tl.load(y + at, inside, 0.0).to(tl.float32) + response).to(out.dtype.element_ty), inside
    )


@triton.jit(do_not_specialize=["rows", "programs"])
def contract(x, own, upper, at_x, at_own, partial, learned, rows, channels, groups, programs,
             F: tl.constexpr, OWN: tl.constexpr, TO_X: tl.constexpr, TO_OWN: tl.constexpr, ADD: tl.constexpr,
             LEARNED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Lead the gradient of an expansion, (rows, groups, R, C / groups), back to its inputs and what is learned.

    Gradients of learned numbers are summed by each program, (programs, F.learned, C).
    """
    blocks = tl.cdiv(channels, BC)
    number = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    width = channels // groups
    column = (c // width) * (F.branches * width) + c % width
    sums = ()
    for _ in tl.static_range(tl.constexpr(F.learned if LEARNED else 0)):
        sums = sums + (tl.zeros((BM, BC), tl.float32),)
    for start in range(number * BM, rows, programs * BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = row[:, None] * channels + c[None, :]
        above = upper + row[:, None] * (channels * F.branches) + column[None, :]
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        to_x = v * 0.0
        if F.first > 0:
            to_x = slope(v, 0.0, tl.constexpr(F.base)) * tl.load(above, inside, 0.0).to(tl.float32)
        if OWN:
            v = tl.load(own + at, inside, 0.0).to(tl.float32)
        if F.functions > 0:
            t = squashed(v, F)
            to_t, sums = lead_back(t, above, inside, width, c, learned, sums, F, LEARNED)
            to_own = to_t * squash_slope(t, F)
            if not OWN:
                to_x += to_own
            elif TO_OWN:
                if ADD:
                    to_own += tl.load(at_own + at, inside, 0.0).to(tl.float32)
                tl.store(at_own + at, to_own.to(at_own.dtype.element_ty), inside)
        if TO_X:
            if ADD:
                to_x += tl.load(at_x + at, inside, 0.0).to(tl.float32)
            tl.store(at_x + at, to_x.to(at_x.dtype.element_ty), inside)
    if LEARNED:
        for i in tl.static_range(tl.constexpr(F.learned)):
            into = partial + (number * F.learned + i) * channels + c
            tl.store(into, tl.sum(sums[i], 0), c < channels)


@triton.jit(do_not_specialize=["sums", "programs"])
def unfold(weight, to_base, to_basis, constants, width, outputs, sums,
           partial, to_learned, channels, programs,
           F: tl.constexpr, TAPS: tl.constexpr, CONSTANT: tl.constexpr, LEARNED: tl.constexpr, WEIGHS: tl.constexpr,
           BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """The first `outputs` programs undo `fold_weight` on a gradient (and add up those of the constant); the others add
    up those of the learned numbers, one each.

    Args:
        constants: (sums, taps, outputs) of `constant_sums`.
        partial: (programs, F.learned, channels) of `contract`.
        to_learned: for the gradient of each table of learned numbers.
    """
    o = tl.program_id(0)
    tap = tl.arange(0, BT)
    if o < outputs:
        if WEIGHS:
            fixed = tl.zeros((BT,), tl.float32)
            if CONSTANT:
                for first in range(0, sums, 32):
                    p = first + tl.arange(0, 32)
                    at = constants + (p[:, None] * TAPS + tap[None, :]) * outputs + o
                    fixed += tl.sum(tl.load(at, (p < sums)[:, None] & (tap < TAPS)[None, :], 0.0), 0)
            for start in range(0, width, BC):
                c = start + tl.arange(0, BC)
                here = (c < width)[:, None] & (tap < TAPS)[None, :]
                at = weight + o * TAPS * F.branches * width + tap[None, :] * (F.branches * width) + c[:, None]
                if F.first > 0:
                    g = tl.load(at, here, 0.0)
                    into = to_base + (o * width + c)[:, None] * TAPS + tap[None, :]
                    tl.store(into, g.to(to_base.dtype.element_ty), here)
                if F.functions > 0:
                    into = to_basis + (o * width + c)[:, None] * (F.functions * TAPS) + tap[None, :]
                    zeroth = tl.zeros((BC, BT), tl.float32) + fixed[None, :] * F.one
                    for k in tl.static_range(tl.constexpr(F.skip), tl.constexpr(F.functions)):
                        g = tl.load(at + (F.first + k - F.skip) * width, here, 0.0).to(tl.float32)
                        tl.store(into + k * TAPS, g.to(to_basis.dtype.element_ty), here)
                        if F.folds == "sum":
                            zeroth -= g
                    if F.skip > 0:
                        tl.store(into, zeroth.to(to_basis.dtype.element_ty), here)
    else:
        if LEARNED:
            i = o - outputs
            row = 0
            for table in tl.static_range(len(F.counts)):
                add_up(table, i, row, partial, to_learned, channels, programs, F, 512)
                i -= F.periods[table] // F.shares[table] * F.counts[table]
                row += F.counts[table]


@triton.jit
def add_up(TABLE: tl.constexpr, i, row, partial, to_learned, channels, programs,
           F: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add up the gradient of number i of a table; `row` are the numbers a channel in the tables before it."""
    sets = F.periods[TABLE] // F.shares[TABLE]
    if (i >= 0) & (i < sets * F.counts[TABLE]):
        first = i // F.counts[TABLE] * F.shares[TABLE]
        each = channels // sets
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, programs * each, BLOCK):
            j = start + tl.arange(0, BLOCK)
            c = j % each // F.shares[TABLE] * F.periods[TABLE] + first + j % each % F.shares[TABLE]
            at = partial + (j // each * F.learned + row + i % F.counts[TABLE]) * channels + c
            total += tl.load(at, j < programs * each, 0.0)
        into = to_learned[TABLE] + i
        tl.store(into, tl.sum(total).to(into.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def pointwise(x, own, weight, constant, out, learned, rows, channels, outputs, groups,
              F: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A convolution of kernel 1 whose expansion is made on the way into the product and never in memory.

    Args:
        weight: (outputs, R, C / groups) of `fold_weight`.
    """
    width, high_width = channels // groups, outputs // groups
    blocks = tl.cdiv(high_width, BN)
    group = tl.program_id(1)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    kind = weight.dtype.element_ty
    total = tl.zeros((BM, BN), tl.float32)
    if F.skip > 0:
        total += tl.load(constant + group * high_width + o, o < high_width, 0.0)[None, :]
    for start in range(0, width, BK):
        c = start + tl.arange(0, BK)
        at = row[:, None] * channels + (group * width + c)[None, :]
        inside = (row < rows)[:, None] & (c < width)[None, :]
        beside = weight + (group * high_width + o)[None, :] * (F.branches * width) + c[:, None]
        known = (c < width)[:, None] & (o < high_width)[None, :]
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        if F.first > 0:
            total = product(
                activate(v, 0.0, tl.constexpr(F.base)),
                tl.load(beside, known, 0.0),
                total,
                kind,
                PRECISION,
                UP,
            )
        if OWN:
            v = tl.load(own + at, inside, 0.0).to(tl.float32)
        t = squashed(v, F)
        f = ()
        for k in tl.static_range(tl.constexpr(F.functions)):
            f = f + (function(k, t, f, group * width + c, learned, F),)
            if k >= F.skip:
                w = tl.load(beside + (F.first + k - F.skip) * width, known, 0.0)
                total = product(activate(f[k], 0.0, tl.constexpr(F.act)), w, total, kind, PRECISION, UP)
    into = out + row[:, None] * outputs + (group * high_width + o)[None, :]
    tl.store(into, total.to(out.dtype.element_ty), (row < rows)[:, None] & (o < high_width)[None, :])


@triton.jit
def product(a, b, total, KIND: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr):
    """total + a b with operands of type KIND; UP multiplies them in float32, as the interpreter needs it."""
    a = a.to(KIND)
    if UP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
