"""The compiled kernels for float32 on a CPU, called by address: no tie to a version of torch or of Python.

They are built when kanseg is installed, where there is a compiler; `available()` says whether, and the eager steps
beside this module give the same numbers without them. `KANSEG_NATIVE=0` in the environment switches them off.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.bases import Basis
from kanseg.bases.basis import identity, tanh
from kanseg.bases.bernstein import Bernstein
from kanseg.bases.bspline import BSpline
from kanseg.bases.orthogonal import Gram, OrthogonalPolynomials
from kanseg.bases.rbf import GaussianRBF
from kanseg.bases.relu import ReLUBumps

INSTRUCTION_SETS = ("plain", "avx2", "avx512")
ACTS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.SiLU: 1, nn.GELU: 2, nn.ReLU: 3}
ACT_NAMES = {"identity": 0, "silu": 1, "relu": 3, "prelu": 4}
SQUASHES: dict[Any, int] = {identity: 0, tanh: 1, torch.sigmoid: 2}
NONE, POLYNOMIAL, BERNSTEIN, BSPLINE, RBF, BUMPS = range(6)
MOST = 33  # functions at most
FEW = 1 << 15  # numbers for which one thread is enough
BLOCK = 1 << 14  # rows whose gradients of parameters are summed in float32


class Expansion(ctypes.Structure):
    """`Expansion` of rows.h."""

    _fields_ = (
        *(
            (name, c_int)
            for name in ("kind", "functions", "skip", "base", "act", "squash", "order", "channels")
        ),
        ("branches", c_int),
        ("offset", c_int),
        *((name, c_void_p) for name in ("numbers", "low", "high")),
    )


class Volume(ctypes.Structure):
    """`Volume` of winograd.h."""

    _fields_ = tuple(
        (name, c_int)
        for name in (
            *("samples", "depth", "height", "width", "in", "out"),
            *("out_depth", "out_height", "out_width", "pad_depth", "pad_height", "pad_width"),
        )
    )


@dataclass
class Part:
    """Branches of an expansion that one call makes.

    Attributes:
        source: number of the input they are functions of.
        kept: tensors whose memory `expansion` points to.
        spread: gradients of the factors c (33,) and of the phases (2, functions, channels) -> those of the learned
            parameters, in their order.
    """

    expansion: Expansion
    source: int
    kept: tuple[Tensor, ...] = ()
    spread: Callable[[Tensor, Tensor], list[Tensor]] | None = None


@functools.cache
def library() -> Any:
    """The loaded kernels of the best instruction set here, as attributes; None where they are not."""
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files or os.environ.get("KANSEG_NATIVE") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(files[0]))
        return Kernels(loaded, INSTRUCTION_SETS[loaded.kanseg_instruction_set()])
    except (OSError, AttributeError):  # built for another machine, or by another version
        return None


def available() -> str | None:
    """Name of the instruction set that the compiled kernels use here; None without them."""
    found = library()
    return None if found is None else found.name


class Kernels:
    """Functions of rows.h and winograd.h for one instruction set."""

    winograd_scratch: Any

    def __init__(self, loaded: ctypes.CDLL, name: str) -> None:
        self.name = name
        floats, doubles, size, number = c_void_p, c_void_p, c_longlong, c_int
        described, sizes = POINTER(Expansion), POINTER(Volume)
        signatures = {
            "expand": (described, floats, floats, size, number, number),
            "contract": (described, *[floats] * 6, size, number, number),
            "moments": (floats, floats, doubles, number, size, number, number),
            "norm_forward": (*[floats] * 5, number, size, number, number),
            "norm_reduce": (*[floats] * 6, doubles, number, size, number, number),
            "norm_backward": (*[floats] * 8, number, size, number, number),
            "winograd": (sizes, number, *[floats] * 4, size, number),
            "winograd_weight": (sizes, number, *[floats] * 4, size, number),
            "winograd_scratch": (sizes, number),
        }
        for function, arguments in signatures.items():
            entry = getattr(loaded, f"kanseg_{function}_{name}")
            entry.argtypes, entry.restype = arguments, None
            setattr(self, function, entry)
        self.winograd_scratch.restype = size
        _share_threads(loaded)


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Let the kernels run on the OpenMP threads of torch; a second set of threads would fight it for the cores."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        openmp = ctypes.CDLL(str(path))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        pointers = [ctypes.cast(getattr(openmp, name), c_void_p) for name in names]
        loaded.kanseg_use_threads.argtypes = [c_void_p] * 3
        loaded.kanseg_use_threads(*pointers)
        return


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled kernels can work on these."""
    return library() is not None and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def describe(
    basis: Basis | None, base_act: nn.Module | None, basis_act: nn.Module, skip: int, inputs: int
) -> Callable[[int], list[Part]] | None:
    """How the kernels make [act(x), phi_skip(x), ...]: channels -> parts; None where they cannot.

    Args:
        inputs: 2 where the functions have an input of their own.
    """
    base = -1 if base_act is None else ACTS.get(type(base_act))
    if isinstance(base_act, nn.GELU) and base_act.approximate != "none":
        base = None
    act = ACTS.get(type(basis_act))
    if base is None or act not in (0, 1):
        return None
    if basis is None:
        return lambda channels: [Part(Expansion(kind=NONE, base=base, channels=channels, branches=1), 0)]
    squash = _squash(basis)
    kind = next((number for cls, number in KINDS.items() if isinstance(basis, cls)), None)
    if kind is None or squash is None or basis.num_functions > MOST or type(basis) not in KNOWN:
        return None
    if isinstance(basis, BSpline) and basis.spline_order == 0:
        return None
    first = int(base >= 0)
    count = basis.num_functions - skip + first
    settings = {"kind": kind, "functions": basis.num_functions, "skip": skip, "act": act, "squash": squash}
    settings |= {"branches": count, "order": getattr(basis, "spline_order", 0)}

    def parts(channels: int) -> list[Part]:
        kept, pointers, spread = _numbers(basis, channels)
        own = {**settings, **pointers, "channels": channels}
        if inputs == 1 or base < 0:
            return [Part(Expansion(**own, base=base), inputs - 1, kept, spread)]
        alone = Expansion(kind=NONE, base=base, channels=channels, branches=count)
        return [Part(alone, 0), Part(Expansion(**own, base=-1, offset=first), 1, kept, spread)]

    return parts


KINDS: dict[type[Basis], int] = {
    OrthogonalPolynomials: POLYNOMIAL,
    Bernstein: BERNSTEIN,
    BSpline: BSPLINE,
    GaussianRBF: RBF,
    ReLUBumps: BUMPS,
}
KNOWN = (*KINDS, Gram)  # a subclass may change `functions`


def _squash(basis: Basis) -> int | None:
    return next((number for squash, number in SQUASHES.items() if basis.squash is squash), None)


def _numbers(basis: Basis, channels: int) -> tuple[tuple[Tensor, ...], dict[str, Any], Any]:
    """Tensors with what the kernels need to know of a basis, pointers to them, and `Part.spread`."""
    if isinstance(basis, ReLUBumps):
        phases = torch.stack([basis.phase_low.detach().float(), basis.phase_high.detach().float()])
        repeats = channels // phases.shape[1]
        wide = phases.repeat(1, repeats, 1).transpose(1, 2).contiguous()  # (2, functions, channels)
        scale = torch.tensor([float(basis.scale)])
        pointers = {"numbers": scale.data_ptr(), "low": wide[0].data_ptr(), "high": wide[1].data_ptr()}

        def of_phases(inner: Tensor, outer: Tensor) -> list[Tensor]:
            return list(outer.unflatten(2, (repeats, -1)).sum(2).transpose(1, 2))

        return (wide, scale), pointers, of_phases if basis.phase_low.requires_grad else None
    spread = None
    if isinstance(basis, OrthogonalPolynomials):
        rows = torch.tensor(basis.recurrence or [(0.0, 0.0, 0.0)], dtype=torch.float32)
        if isinstance(basis, Gram) and basis.degree > 1:
            factors = rows[1:, 2].clone()
            rows[1:, 2] *= basis.beta.detach()

            def of_beta(inner: Tensor, outer: Tensor) -> list[Tensor]:
                return [inner[2 : 2 + len(factors)] * factors]

            spread = of_beta if basis.beta.requires_grad else None
        numbers = rows.flatten()
    elif isinstance(basis, Bernstein):
        numbers = torch.tensor([float(math.comb(basis.degree, k)) for k in range(basis.degree + 1)])
    else:
        assert isinstance(basis, BSpline | GaussianRBF)
        numbers = torch.tensor([*basis.centres, 1 / basis.width], dtype=torch.float32)
    return (numbers,), {"numbers": numbers.data_ptr()}, spread


def _threads(numbers: int) -> int:
    return 1 if numbers < FEW else torch.get_num_threads()


def expand(parts: Sequence[Part], inputs: Sequence[Tensor], out: Tensor, width: int) -> None:
    """Write the branches of rows, each input (rows * width,) in memory, to `out`, (rows, branches, width) in memory."""
    kernels = library()
    for part in parts:
        x = inputs[part.source]
        rows = x.numel() // width
        kernels.expand(part.expansion, x.data_ptr(), out.data_ptr(), rows, width, _threads(x.numel()))


def contract(
    parts: Sequence[Part],
    inputs: Sequence[Tensor],
    upper: Tensor,
    totals: Sequence[Tensor | None],
    learned: Sequence[Tensor | None],
    width: int,
) -> None:
    """Add to `totals` (as `inputs`) and `learned` what the gradient `upper`, in memory as `out` of `expand`, gives."""
    kernels = library()
    for part in parts:
        x, into, e = inputs[part.source], totals[part.source], part.expansion
        spread = part.spread if any(t is not None for t in learned) else None
        wanted = spread is not None
        rows, threads = x.numel() // width, _threads(x.numel())
        per_voxel = e.channels // width
        step = max(1, BLOCK // per_voxel) * per_voxel * threads if wanted else rows
        inner = torch.zeros(threads, MOST)
        outer = torch.zeros(2, threads, e.functions, e.channels) if wanted and e.kind == BUMPS else None
        sums: list[Any] = [0, 0]
        for start in range(0, rows, step):
            count = min(step, rows - start)
            kernels.contract(
                e,
                x.data_ptr() + 4 * start * width,
                upper.data_ptr() + 4 * start * width * e.branches,
                None if into is None else into.data_ptr() + 4 * start * width,
                inner.data_ptr() if wanted else None,
                None if outer is None else outer[0].data_ptr(),
                None if outer is None else outer[1].data_ptr(),
                count,
                width,
                threads,
            )
            if wanted:
                sums[0] += inner.double().sum(0)
                inner.zero_()
            if outer is not None:
                sums[1] += outer.double().sum(1)
                outer.zero_()
        if spread is not None:
            for total, part_of in zip(learned, spread(*sums), strict=True):
                if total is not None:
                    total += part_of.to(total.dtype)


def norm_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (voxels, C), contiguous, each (C,), summed in float64."""
    count, channels = rows.shape
    threads = _threads(rows.numel())
    centre = torch.zeros(channels)
    moments = []
    for power in (1, 2):
        sums = torch.zeros(threads, channels, dtype=torch.float64)
        library().moments(
            rows.data_ptr(), centre.data_ptr(), sums.data_ptr(), power, count, channels, threads
        )
        moments.append(sums.sum(0) / count)
        centre = moments[0].float()
    # the mean that the squares were taken about is rounded to float32
    return centre, (moments[1] - (moments[0] - centre).square()).clamp(min=0).float()


@dataclass
class Affine:
    """z = y * scale + shift of one sample, and the activation of z; all (C,), contiguous.

    Attributes:
        below: slopes below zero of the activation "prelu"; zeros for the others.
    """

    scale: Tensor
    shift: Tensor
    below: Tensor
    act: str

    def pointers(self) -> tuple[int, int, int]:
        """Where the kernels find them."""
        return self.scale.data_ptr(), self.shift.data_ptr(), self.below.data_ptr()


def _sizes(rows: Tensor, to: Affine) -> tuple[int, int, int, int]:
    """Activation, voxels, channels, threads: the last arguments of the kernels of a norm."""
    count, channels = rows.shape
    return ACT_NAMES[to.act], count, channels, _threads(rows.numel())


def norm_forward(rows: Tensor, out: Tensor, to: Affine) -> None:
    """out = act(z), both (voxels, C), contiguous; `out` may be `rows`."""
    library().norm_forward(rows.data_ptr(), out.data_ptr(), *to.pointers(), *_sizes(rows, to))


def norm_sums(rows: Tensor, grad: Tensor, to: Affine, mean: Tensor) -> Tensor:
    """Sums over the rows of g, of g (rows - mean), and of what `below` gets, (3, C); g is the gradient at z."""
    sizes = _sizes(rows, to)
    sums = torch.zeros(sizes[-1], 3, rows.shape[1], dtype=torch.float64)
    about = (*to.pointers(), mean.data_ptr(), sums.data_ptr())
    library().norm_reduce(rows.data_ptr(), grad.data_ptr(), *about, *sizes)
    return sums.sum(0).float()


def norm_backward(rows: Tensor, grad: Tensor, to: Affine, gain: Tensor, offset: Tensor, out: Tensor) -> None:
    """out = g * scale + rows * gain + offset, all contiguous."""
    about = (*to.pointers(), gain.data_ptr(), offset.data_ptr(), out.data_ptr())
    library().norm_backward(rows.data_ptr(), grad.data_ptr(), *about, *_sizes(rows, to))


# Winograd's transforms of a kernel of 3: F(2, 3) along depth, F(4, 3) along rows and columns.
FOUR = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
SIX = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
    )
    / 24
)
LEAST_VOXELS = 2048  # of an output; below, the transforms of the weight cost more than they save


@functools.cache
def _filter(spatial_dims: int) -> Tensor:
    """(positions, taps) float32."""
    plane = torch.kron(SIX, SIX)
    return (plane if spatial_dims == 2 else torch.kron(FOUR, plane)).float()


def winograd_serves(x: Tensor, weight: Tensor, geometry: Any, voxels: int) -> bool:
    """Whether this convolution can be made from fewer products."""
    once = (1,) * len(geometry.stride)
    return (
        serves(x, weight)
        and set(geometry.kernel_size) == {3}
        and geometry.stride == geometry.dilation == once
        and max(geometry.padding) <= 2
        and geometry.groups == 1
        and not any(n % 16 for n in weight.shape[:2])
        and voxels >= LEAST_VOXELS
    )


def winograd_kernel(weight: Tensor, *, backward: bool = False) -> Tensor:
    """A weight (out, in, *kernel) in the form that `winograd` takes, (positions, in, out); for the gradient turned."""
    dims = weight.dim() - 2
    if backward:
        weight = weight.transpose(0, 1).flip([axis + 2 for axis in range(dims)])
    by_tap = weight.permute(*range(2, dims + 2), 1, 0).flatten(0, dims - 1)
    return torch.mm(_filter(dims), by_tap.flatten(1)).unflatten(1, by_tap.shape[1:])


def winograd(x: Tensor, kernel: Tensor, out: Tensor, padding: Sequence[int]) -> None:
    """out = convolution of x with a kernel from `winograd_kernel`, both channels-last."""
    volume, deep, scratch, each, threads = _volume(x, out, padding)
    library().winograd(
        volume, deep, x.data_ptr(), kernel.data_ptr(), out.data_ptr(), scratch.data_ptr(), each, threads
    )


def winograd_weight(x: Tensor, grad: Tensor, padding: Sequence[int]) -> Tensor:
    """Gradient at a transformed kernel, (positions, in, out), from the gradient of the output."""
    volume, deep, scratch, each, threads = _volume(x, grad, padding)
    sums = torch.zeros(threads, 144 if deep else 36, x.shape[1], grad.shape[1])
    library().winograd_weight(
        volume, deep, x.data_ptr(), grad.data_ptr(), sums.data_ptr(), scratch.data_ptr(), each, threads
    )
    return sums[0] if threads == 1 else sums.sum(0)


def winograd_weight_back(sums: Tensor, spatial_dims: int) -> Tensor:
    """Gradient at the weight, (out, in, *kernel), from that at the transformed kernel."""
    by_tap = torch.mm(_filter(spatial_dims).t(), sums.flatten(1)).unflatten(1, sums.shape[1:])
    return by_tap.unflatten(0, (3,) * spatial_dims).movedim((-1, -2), (0, 1))


def _volume(x: Tensor, out: Tensor, padding: Sequence[int]) -> tuple[Volume, int, Tensor, int, int]:
    """Sizes, whether it has depth, and scratch for each thread."""
    deep = x.dim() - 4
    flat = [1] * (1 - deep)
    size, out_size = [*flat, *x.shape[2:]], [*flat, *out.shape[2:]]
    pads = [*([0] * (1 - deep)), *padding]
    volume = Volume(len(x), *size, x.shape[1], out.shape[1], *out_size, *pads)
    threads = _threads(out.numel())
    each = library().winograd_scratch(volume, deep)
    return volume, deep, torch.empty(threads, each), each, threads
