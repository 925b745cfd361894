"""The convolution over an expansion on a GPU: Triton expands and leads gradients back, cuDNN convolves.

As `expansion` does, slab by slab, so that an expansion never takes much memory. A convolution of kernel 1 is one
product whose operand is expanded on the way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.bases.basis import identity, tanh
from kanseg.bases.bernstein import Bernstein
from kanseg.bases.bspline import BSpline
from kanseg.bases.fourier import Fourier
from kanseg.bases.groups import SharedFunction
from kanseg.bases.orthogonal import Gram, OrthogonalPolynomials
from kanseg.bases.rational import GroupRational
from kanseg.bases.rbf import GaussianRBF
from kanseg.bases.relu import ReLUBumps
from kanseg.bases.wavelet import WaveletShifts, dog, mexican_hat, morlet
from kanseg.layers.kernels import gpu
from kanseg.layers.kernels.expansion import Expansion
from kanseg.layers.kernels.native import KNOWN
from kanseg.layers.kernels.recipe import Recipe
from kanseg.layers.kernels.rows import channels_last, empty_channels_last
from kanseg.layers.kernels.slab_conv import convolution_gradients, convolve
from kanseg.layers.kernels.slabs import Slab, outputs, planes_of, slabs
from kanseg.layers.kernels.triton_functions import Functions
from kanseg.layers.kernels.triton_kernels import Taps, add_constant, contract, pointwise, prepare, unfold

MOST = 33  # functions at most: all are unrolled
KINDS: dict[Any, str] = {  # by class, or by what is shifted
    OrthogonalPolynomials: "polynomial",
    Gram: "polynomial",
    Fourier: "fourier",
    Bernstein: "bernstein",
    ReLUBumps: "bumps",
    GroupRational: "rational",
    BSpline: "bspline",
    GaussianRBF: "rbf",
    **{psi: psi.__name__ for psi in (mexican_hat, morlet, dog)},
}
PHASED = ("bumps", "rational")  # with numbers of their own a channel: not shared
Tables = tuple[tuple[int, int, int], ...]  # `counts`, `periods` and `shares` of each
ACTS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.ReLU: "relu",
}
SQUASHES: dict[Any, str] = {identity: "identity", tanh: "tanh", torch.sigmoid: "sigmoid"}


@functools.lru_cache(maxsize=256)
def described(recipe: Recipe, tables: Tables = ()) -> Functions | None:
    """The recipe for the kernels, with `tables` of what it learns; None where they cannot make it."""
    basis, acts = recipe.basis, (recipe.base_act, recipe.basis_act)
    if any(type(act) not in ACTS for act in acts if act is not None):
        return None
    if any(isinstance(act, nn.GELU) and act.approximate != "none" for act in acts):
        return None
    base = "none" if recipe.base_act is None else ACTS[type(recipe.base_act)]
    act = ACTS[type(recipe.basis_act)]
    if basis is None:
        nothing = ("identity", 0, (), (), (), (), 0, "none", 1.0)
        return Functions("none", 0, 0, 0, 0, base, act, *nothing, 1, 1)
    shared = type(basis) is SharedFunction
    summed: Any = basis.basis if shared else basis
    kind, squash = KINDS.get(getattr(summed, "psi", summed.kind)), SQUASHES.get(basis.squash)
    order = getattr(summed, "spline_order", 1)
    if summed.kind not in KNOWN or kind is None or squash is None or order < 1 or summed.num_functions > MOST:
        return None
    if shared and kind in PHASED:
        return None
    folds, skip, first = recipe.constant or "none", int(recipe.constant is not None), int(base != "none")
    count = basis.num_functions
    how = (count, int(shared), summed.num_functions, skip, base, act, squash, order, _numbers(summed))
    counts, periods, shares = zip(*tables, strict=True) if tables else ((), (), ())
    learned = (counts, periods, shares, sum(counts))
    return Functions(kind, *how, *learned, folds, recipe.one, first, first + count - skip)


def tables_of(basis: Any, learned: Sequence[Tensor]) -> Tables:
    """How channels share what a basis learns, (sets, numbers) each, or (numbers,) for one set."""
    found = []
    for table in learned:
        sets = len(table) if table.dim() == 2 else 1
        period = 1 if sets == 1 else getattr(basis, "channels", None) or sets
        found.append((table.shape[-1], period, period // sets))
    return tuple(found)


def _numbers(basis: Any) -> tuple[float, ...]:
    """`Functions.numbers`."""
    if isinstance(basis, OrthogonalPolynomials):
        return tuple(float(number) for row in basis.recurrence for number in row)
    if isinstance(basis, Bernstein):
        degrees = (basis.degree, max(basis.degree - 1, 0))
        return tuple(float(math.comb(degree, k)) for degree in degrees for k in range(degree + 1))
    if isinstance(basis, ReLUBumps):
        return (float(basis.scale),)
    if isinstance(basis, Fourier | GroupRational):
        return ()
    if isinstance(basis, WaveletShifts):
        return (*basis.shifts, 1 / basis.width)
    numbers = (*basis.centres, 1 / basis.width)
    if isinstance(basis, GaussianRBF):
        return numbers
    order = basis.spline_order
    terms = range(order // 2 + 1)
    return (*numbers, *((-1) ** j * math.comb(order + 1, j) / math.factorial(order) for j in terms))


def serves(recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether these kernels can make the functions, and operands of this type."""
    return dtype in gpu.DTYPES and described(recipe) is not None


def forward(made: Expansion, inputs: Sequence[Tensor], base: Tensor | None, basis: Tensor | None) -> Tensor:
    """As `expansion.forward`; what lies in other memory (a graph that was exported on a CPU) is copied first."""
    job = _Job(made, [channels_last(x) for x in inputs], base, basis)
    size = job.out_size
    out: Tensor | None = None
    with torch.autocast(job.x.device.type, enabled=False):
        if job.is_product():
            job.prepare(None)
            out = empty_channels_last((len(job.x), job.outputs, *size), job.x, made.dtype)
            job.multiply(out)
            return out
        for number, slab in enumerate(job.slabs()):
            buffer = job.prepare(slab, folds=number == 0)
            part = channels_last(convolve(buffer, job.folded, slab, made.geometry))
            del buffer
            if slab.whole:
                out = part
            elif out is None:
                out = empty_channels_last((len(job.x), job.outputs, *size), job.x, made.dtype)
            into = outputs(out, slab)
            if job.functions.skip:
                job.add_constant(part, into, slab)
            elif not slab.whole:
                into.copy_(part)
    assert out is not None
    return out


def backward(
    made: Expansion,
    grad: Tensor,
    inputs: Sequence[Tensor],
    base: Tensor | None,
    basis: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """As `expansion.backward`."""
    job = _Job(made, inputs, base, basis)
    count = len(inputs)
    weighs, learns = any(needs[count : count + 2]), any(needs[count + 2 :])
    expands = learns or any(needs[:count])
    grad = grad.to(made.dtype)
    cut = list(job.slabs())
    new = torch.empty_like if len(cut) == 1 else torch.zeros_like  # the halos of slabs overlap
    totals = [new(x) if need else None for x, need in zip(inputs, needs, strict=False)]
    of_weight: Tensor | None = None
    job.plan_learned(learns, len(cut))
    with torch.autocast(grad.device.type, enabled=False):
        for number, slab in enumerate(cut):
            buffer = job.prepare(slab, folds=number == 0, grad=grad if weighs and number == 0 else None)
            upper = outputs(grad, slab)
            through, part = convolution_gradients(
                upper, buffer, job.folded, slab, made.geometry, expands, weighs
            )
            del buffer
            if weighs:
                of_weight = (
                    part if len(cut) == 1 else part.float() if of_weight is None else of_weight.add_(part)
                )
            if expands:
                job.contract(channels_last(through), slab, totals, number, add=len(cut) > 1)
    weights, learned = job.unfold(of_weight, learns)
    found = [*totals, *weights, *learned]
    return [t if need else None for t, need in zip(found, needs, strict=True)]


class _Job:
    """One convolution: its sizes, the folded weight and what is summed on the way."""

    def __init__(
        self, made: Expansion, inputs: Sequence[Tensor], base: Tensor | None, basis: Tensor | None
    ) -> None:
        self.made, self.x, self.own = made, inputs[0], inputs[1] if len(inputs) > 1 else None
        self.base = None if base is None else base.contiguous()
        self.basis = None if basis is None else basis.contiguous()
        self.learned = tuple(t.contiguous() for t in made.learned)
        found = described(made.recipe, tables_of(made.recipe.basis, made.learned))
        assert found is not None  # or this backend would not serve
        self.functions: Functions = found
        geometry = made.geometry
        weight = self.basis if self.base is None else self.base
        assert weight is not None
        self.outputs, self.channels = len(weight), self.x.shape[1]
        self.width = self.channels // geometry.groups
        flat = [1] * (3 - len(geometry.stride))
        self.out_size = geometry.out_size(self.x.shape[2:])
        self.size3, self.out_size3 = (*flat, *self.x.shape[2:]), (*flat, *self.out_size)
        no = [0] * len(flat)
        self.taps = Taps(
            (*flat, *geometry.kernel_size),  # type: ignore[arg-type]
            (*flat, *geometry.stride),  # type: ignore[arg-type]
            (*no, *geometry.padding),  # type: ignore[arg-type]
            (*flat, *geometry.dilation),  # type: ignore[arg-type]
            math.prod(geometry.kernel_size),
        )
        size = (self.outputs, self.functions.branches * self.width, *geometry.kernel_size)
        self.folded = empty_channels_last(size, self.x, made.dtype)
        self.constant = self._floats(self.taps.taps, self.outputs)
        self.block_taps = max(16, 1 << (self.taps.taps - 1).bit_length())
        precision = (
            "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
        )  # of products of float32, as cuDNN's
        self.products: dict[str, Any] = {"PRECISION": precision, "UP": gpu.INTERPRETED}
        self.constants: Tensor | None = None
        self.sums: Tensor | None = None

    def _floats(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.x.device)

    def slabs(self) -> list[Slab]:
        """See `expansion.slabs`."""
        width = self.functions.branches * self.channels
        return list(slabs(self.x, width, self.made.dtype, self.made.geometry))

    def prepare(self, slab: Slab | None, *, folds: bool = True, grad: Tensor | None = None) -> Any:
        """Expand a slab, fold the weight, and sum the gradient of the constant, in one launch."""
        f, groups = self.functions, self.made.geometry.groups
        bm, bc = gpu.tile(self.channels, 1024)
        x = own = out = None
        rows = before = source = expands = 0
        if slab is not None:
            x, own = planes_of(self.x, slab), None if self.own is None else planes_of(self.own, slab)
            samples, _, planes, *rest = x.shape
            plane = math.prod(rest)
            size = (samples, f.branches * self.channels, planes + slab.before + slab.after, *rest)
            out = empty_channels_last(size, self.folded)
            source, before = samples * planes * plane, slab.before * plane
            rows = source + (slab.before + slab.after) * plane
            expands = gpu.ceiling(rows, bm) * gpu.ceiling(self.channels, bc)
        partial, sums, out_rows, programs, bs = None, 0, 0, 0, 16
        if grad is not None and f.skip:
            bs = gpu.tile(self.outputs, 0, 16)[1]
            out_rows = len(self.x) * math.prod(self.out_size)
            columns = gpu.ceiling(self.outputs, bs)
            programs = gpu.turns(gpu.ceiling(out_rows, 64), columns, self.x.device)
            partial = self.constants = self._floats(programs, self.taps.taps, self.outputs)
            sums = programs * columns
        fold = self.outputs if folds else 0
        bf = min(max(1, 1024 // self.block_taps), 1 << (self.width - 1).bit_length())
        gpu.launch(
            prepare, (expands + fold + sums,),
            x, own, out, self.learned, rows, before, source, self.channels, groups,
            self.base, self.basis, self.folded, self.constant, self.outputs, fold,
            grad, partial, out_rows, self.size3, self.out_size3, programs, expands,
            F=f, G=self.taps, OWN=own is not None, SUMS=sums > 0, EXPANDS=expands > 0, **self.products,
            BM=bm, BC=bc, BT=self.block_taps, BF=bf, BS=bs,
            registers=64 if own is not None and self.made.dtype.itemsize == 2 else None,
        )  # fmt: skip
        return out

    def is_product(self) -> bool:
        """Whether the convolution is a product of matrices."""
        ones = (1, 1, 1)
        return self.taps == Taps(ones, ones, (0, 0, 0), self.taps.dilation, 1)

    def multiply(self, out: Tensor) -> None:
        """The convolution of kernel 1."""
        rows, f = out.numel() // self.outputs, self.functions
        high_width = self.outputs // self.made.geometry.groups
        bn = min(128, max(16, 1 << (high_width - 1).bit_length()))
        bk = 16 if f.shared or f.kind == "morlet" else 32  # many numbers are in registers at a time
        grid = (gpu.ceiling(rows, 64) * gpu.ceiling(high_width, bn), self.made.geometry.groups)
        gpu.launch(
            pointwise, grid,
            self.x, self.own, self.folded, self.constant, out, self.learned,
            rows, self.channels, self.outputs, self.made.geometry.groups,
            F=f, OWN=self.own is not None, **self.products, BM=64, BN=bn, BK=bk,
            registers=255 if f.kind in PHASED and self.made.dtype.itemsize == 2 else None,
        )  # fmt: skip

    def add_constant(self, part: Tensor, into: Tensor, slab: Slab) -> None:
        """into = part + the response of the constant."""
        rows = part.numel() // self.outputs
        bm, bc = gpu.tile(self.outputs, 2048, 16)
        grid = (gpu.ceiling(rows, bm) * gpu.ceiling(self.outputs, bc),)
        gpu.launch(
            add_constant, grid,
            part, into, self.constant, rows, slab.out.start, self.outputs, self.size3, self.out_size3,
            G=self.taps, **self.products, BT=self.block_taps, BM=bm, BC=bc,
        )  # fmt: skip

    def plan_learned(self, learns: bool, cut: int) -> None:
        """Where `contract` leaves the gradients of what is learned, a part for each slab and program."""
        many = learns * self.functions.learned  # a sum each is kept in registers
        self.tile = gpu.tile(self.channels, 1024 if many < 8 else 512, most=32 if many < 24 else 16)
        self.columns = gpu.ceiling(self.channels, self.tile[1])
        rows = self.x.numel() // self.channels
        self.programs = gpu.turns(gpu.ceiling(rows, self.tile[0]), self.columns, self.x.device)
        if learns:
            self.sums = self._floats(cut, self.programs, self.functions.learned, self.channels)

    def contract(
        self, through: Tensor, slab: Slab, totals: Sequence[Tensor | None], number: int, *, add: bool
    ) -> None:
        """Lead the gradient of a slab's expansion back."""
        x, own = planes_of(self.x, slab), None if self.own is None else planes_of(self.own, slab)
        inside = through[:, :, slab.before : slab.before + x.shape[2]]
        to_x, to_own = (None if t is None else planes_of(t, slab) for t in (*totals, None)[:2])
        sums = None if self.sums is None else self.sums[number]
        gpu.launch(
            contract, (self.programs * self.columns,),
            x, own, inside, to_x, to_own, sums, self.learned,
            x.numel() // self.channels, self.channels, self.made.geometry.groups, self.programs,
            F=self.functions, OWN=own is not None, TO_X=to_x is not None, TO_OWN=to_own is not None, ADD=add,
            LEARNED=sums is not None, BM=self.tile[0], BC=self.tile[1],
        )  # fmt: skip

    def unfold(
        self, of_weight: Tensor | None, learns: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients at the two weights and at what is learned, from all sums, in one launch."""
        f, t = self.functions, self.taps.taps
        weights = [
            None if w is None or of_weight is None else torch.empty_like(w) for w in (self.base, self.basis)
        ]
        learned = [torch.empty_like(x) if learns else None for x in self.learned]
        if of_weight is not None:
            of_weight = channels_last(of_weight)
        if of_weight is None and not learns:
            return weights, learned
        constants, sums = self.constants, self.sums
        bc = min(max(1, 1024 // self.block_taps), 1 << (self.width - 1).bit_length())
        gpu.launch(
            unfold, (self.outputs + (sum(t.numel() for t in self.learned) if learns else 0),),
            of_weight, *weights, constants, self.width, self.outputs, 0 if constants is None else len(constants),
            sums, tuple(learned), self.channels, 0 if sums is None else sums.shape[0] * sums.shape[1],
            F=f, TAPS=t, CONSTANT=constants is not None, LEARNED=learns, WEIGHS=of_weight is not None,
            BT=self.block_taps, BC=bc,
        )  # fmt: skip
        return weights, learned
