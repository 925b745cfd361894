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
from kanseg.bases.fourier import Fourier
from kanseg.bases.groups import SharedFunction, of_channels
from kanseg.bases.orthogonal import Gram, OrthogonalPolynomials
from kanseg.bases.rational import GroupRational
from kanseg.bases.rbf import GaussianRBF
from kanseg.bases.relu import ReLUBumps
from kanseg.bases.wavelet import WaveletShifts, dog, mexican_hat, morlet

INTERFACE = 4  # of the functions; counted up here and in plain.cpp when one takes other arguments
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
ACTS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.SiLU: 1, nn.GELU: 2, nn.ReLU: 3}
ACT_NAMES = {"identity": 0, "silu": 1, "relu": 3, "prelu": 4}
SQUASHES: dict[Any, int] = {identity: 0, tanh: 1, torch.sigmoid: 2}
NONE, POLYNOMIAL, BERNSTEIN, BSPLINE, RBF, BUMPS, FOURIER, RATIONAL, WAVELET = range(9)
PHASED = (BUMPS, RATIONAL)  # with numbers of their own a channel, `low` and `high`
WAVES: dict[Any, int] = {mexican_hat: 0, morlet: 1, dog: 2}
MOST = 33  # functions at most
FEW = 1 << 15  # numbers for which one thread is enough
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
SWITCHED_OFF = ("0", "false", "off", "no")  # values of KANSEG_NATIVE


Numbers = tuple[tuple[Tensor, ...], dict[str, Any], Any]  # of `_numbers`


class Expansion(ctypes.Structure):
    """`Expansion` of rows.h."""

    _fields_ = (
        *(
            (name, c_int)
            for name in ("kind", "functions", "skip", "base", "act", "squash", "order", "channels")
        ),
        *((name, c_int) for name in ("branches", "offset", "shared")),
        *((name, c_void_p) for name in ("numbers", "low", "high")),
    )


@dataclass
class Part:
    """Branches of an expansion that one call makes.

    Attributes:
        source: number of the input they are functions of.
        kept: tensors whose memory `expansion` points to.
        spread: gradients of the factors c (33,) and of the phases (2, functions or order, channels) -> those of the
            learned parameters, in their order.
    """

    expansion: Expansion
    source: int
    kept: tuple[Tensor, ...] = ()
    spread: Callable[[Tensor, Tensor], list[Tensor]] | None = None


@functools.cache
def library() -> Any:
    """The loaded kernels of the best instruction set here, as attributes; None where they are not."""
    if os.environ.get("KANSEG_NATIVE", "").lower() in SWITCHED_OFF:
        return None
    for file in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            loaded = ctypes.CDLL(str(file))
            if loaded.kanseg_interface() == INTERFACE:
                return Kernels(loaded, INSTRUCTION_SETS[loaded.kanseg_instruction_set()])
        except (OSError, AttributeError, IndexError):  # built for another machine, or by another version
            continue
    return None


def available() -> str | None:
    """Name of the instruction set that the compiled kernels use here; None without them."""
    found = library()
    return None if found is None else found.name


def absent() -> str:
    """Why there are none, where there are none."""
    if os.environ.get("KANSEG_NATIVE", "").lower() in SWITCHED_OFF:
        return f"KANSEG_NATIVE={os.environ['KANSEG_NATIVE']} switches them off"
    if files := sorted(Path(__file__).parent.glob("_native*.so")):
        return f"{files[0].name} was built for another machine or version; install kanseg again"
    return "they were not built; install a C++ compiler, then kanseg again"


class Kernels:
    """Functions of rows.h and winograd.h for one instruction set."""

    def __init__(self, loaded: ctypes.CDLL, name: str) -> None:
        self.name = name
        at, size, number, described = c_void_p, c_longlong, c_int, POINTER(Expansion)
        signatures: dict[str, tuple[Any, ...]] = {
            "expand": (described, at, at, size, number, number),
            "contract": (described, *[at] * 6, size, number, number),
            "moments": (at, at, at, number, size, number, number),
            "norm_forward": (*[at] * 6, number, size, number, number),
            "norm_reduce": (*[at] * 7, number, size, number, number),
            "norm_backward": (*[at] * 9, number, size, number, number),
            **{
                f"{kind}{job}": (at, number, number, *[at] * count, number)
                for kind in ("winograd", "direct")
                for job, count in (("", 5), ("_back", 4), ("_weight", 4))
            },
            "winograd_scratch": (at, *[number] * 4),
            "direct_scratch": (at, *[number] * 4),
            "wavelet_forward": (at, number, *[at] * 3, size, number),
            "wavelet_back": (at, number, *[at] * 7, size, number),
            "wavelet_scratch": (at,),
        }
        for function, arguments in signatures.items():
            entry = getattr(loaded, f"kanseg_{function}_{name}")
            entry.argtypes = arguments
            entry.restype = size if function.endswith("scratch") else None
            setattr(self, function, entry)
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


def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that the kernels read or write by address, in main memory."""
    return torch.zeros(size, dtype=dtype, device="cpu")


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
    shared = type(basis) is SharedFunction
    summed: Any = basis.basis if shared else basis
    squash, order = _squash(basis), _order(summed)
    kind = next((number for cls, number in KINDS.items() if isinstance(summed, cls)), None)
    if None in (kind, squash, order) or summed.kind not in KNOWN or summed.num_functions > MOST:
        return None
    if shared and kind in PHASED:
        return None
    first = int(base >= 0)
    count = basis.num_functions - skip + first
    settings = {"kind": kind, "functions": summed.num_functions, "skip": skip, "act": act, "squash": squash}
    settings |= {"branches": count, "order": order, "shared": int(shared)}

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
    Fourier: FOURIER,
    GroupRational: RATIONAL,
    WaveletShifts: WAVELET,
}
KNOWN = (*KINDS, Gram)  # a subclass may change `functions`


def _squash(basis: Basis) -> int | None:
    return next((number for squash, number in SQUASHES.items() if basis.squash is squash), None)


def _order(basis: Basis) -> int | None:
    """`order` of rows.h: of a spline, coefficients of each polynomial of a fraction, which wavelet; None for others."""
    if isinstance(basis, BSpline):
        return basis.spline_order or None
    if isinstance(basis, GroupRational):
        return max(basis.numerator.shape[1], basis.denominator.shape[1])
    return WAVES.get(basis.psi) if isinstance(basis, WaveletShifts) else 0


def _numbers(basis: Basis, channels: int) -> Numbers:
    """Tensors with what the kernels need to know of a basis, pointers to them, and `Part.spread`."""
    if isinstance(basis, ReLUBumps):
        scale = torch.tensor([float(basis.scale)], **FLOATS)
        scaled = (scale,), {"numbers": scale.data_ptr()}, None
        return _by_channel([basis.phase_low, basis.phase_high], None, channels, scaled)
    if isinstance(basis, GroupRational):
        return _by_channel([basis.numerator, basis.denominator], basis.channels, channels, ((), {}, None))
    if isinstance(basis, SharedFunction):
        known, inner = _numbers(basis.basis, channels), list(basis.basis.parameters())
        return _by_channel([basis.coefficients], basis.channels, channels, known, inner)
    spread = None
    if isinstance(basis, OrthogonalPolynomials):
        rows = torch.tensor(basis.recurrence or [(0.0, 0.0, 0.0)], **FLOATS)
        if isinstance(basis, Gram) and basis.degree > 1:
            factors = rows[1:, 2].clone()
            rows[1:, 2] *= basis.beta.detach()

            def of_beta(inner: Tensor, phases: Tensor) -> list[Tensor]:
                return [inner[2 : 2 + len(factors)] * factors]

            spread = of_beta if basis.beta.requires_grad else None
        numbers = rows.flatten()
    elif isinstance(basis, Bernstein):
        numbers = torch.tensor([float(math.comb(basis.degree, k)) for k in range(basis.degree + 1)], **FLOATS)
    elif isinstance(basis, Fourier):
        numbers = zeros(1)
    elif isinstance(basis, WaveletShifts):
        numbers = torch.tensor([*basis.shifts, 1 / basis.width], **FLOATS)
    else:
        assert isinstance(basis, BSpline | GaussianRBF)
        numbers = torch.tensor([*basis.centres, 1 / basis.width], **FLOATS)
    return (numbers,), {"numbers": numbers.data_ptr()}, spread


def _by_channel(
    own: Sequence[Tensor], period: int | None, channels: int, known: Numbers, inner: Sequence[Tensor] = ()
) -> Numbers:
    """As `_numbers`, with one or two tensors of numbers by sets of channels, each (sets, numbers), as `low` and `high`.

    Args:
        period: channels after which the sets begin anew; None: as many as there are sets.
        known: what the kernels need to know beside them.
        inner: what is learned beside them.
    """
    order, sets = max(part.shape[1] for part in own), len(own[0])
    period = period or sets
    wide = zeros(2, order, channels)  # the shorter one filled up with zeros
    for into, part in zip(wide, own, strict=False):
        into[: part.shape[1]] = of_channels(part.detach().float(), period).repeat(channels // period, 1).T
    kept, pointers, inner_spread = known

    def spread(sums: Tensor, by_channel: Tensor) -> list[Tensor]:
        by_set = by_channel.unflatten(2, (-1, sets, period // sets)).sum((2, 4)).transpose(1, 2)
        found = [one[:, : part.shape[1]] for one, part in zip(by_set, own, strict=False)]
        beyond = inner_spread(sums, by_channel) if inner_spread else [torch.zeros_like(p) for p in inner]
        return [*found, *beyond]

    pointers = {**pointers, "low": wide[0].data_ptr(), "high": wide[1].data_ptr()}
    return (*kept, wide), pointers, spread if any(part.requires_grad for part in (*own, *inner)) else None


def threads_for(numbers: int) -> int:
    return 1 if numbers < FEW else torch.get_num_threads()


def expand(parts: Sequence[Part], inputs: Sequence[Tensor], out: Tensor, width: int) -> None:
    """Write the branches of rows, each input (rows * width,) in memory, to `out`, (rows, branches, width) in memory."""
    kernels = library()
    for part in parts:
        x = inputs[part.source]
        rows = x.numel() // width
        kernels.expand(part.expansion, x.data_ptr(), out.data_ptr(), rows, width, threads_for(x.numel()))


class Learned:
    """Sums that the kernels make of the gradients of what is learned in a part, one a thread."""

    def __init__(self, part: Part, threads: int, totals: Sequence[Tensor | None]) -> None:
        self.totals = totals
        self.spread = part.spread if any(t is not None for t in totals) else None
        e = part.expansion
        phased = self.spread is not None and (e.kind in PHASED or e.shared)
        size = (threads, 2, e.order if e.kind == RATIONAL else e.functions, e.channels)
        self.inner = zeros(threads, MOST, dtype=torch.float64) if self.spread else None
        self.phases = zeros(*size) if phased else None
        self.phases_total = zeros(*size, dtype=torch.float64) if phased else None

    def pointers(self) -> tuple[int | None, ...]:
        """Where the kernels find them."""
        return tuple(pointer(t) for t in (self.inner, self.phases, self.phases_total))

    def add(self) -> None:
        """Add what was summed to the totals of the learned parameters."""
        if self.spread is None or self.inner is None:
            return
        phases = zeros() if self.phases_total is None else self.phases_total.sum(0)
        for total, part in zip(self.totals, self.spread(self.inner.sum(0), phases), strict=True):
            if total is not None:
                total += part.to(total.dtype)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of its memory; None for None."""
    return None if tensor is None else tensor.data_ptr()


def contract(
    parts: Sequence[Part],
    inputs: Sequence[Tensor],
    upper: Tensor,
    totals: Sequence[Tensor | None],
    learned: Sequence[Tensor | None],
    width: int,
) -> None:
    """Add to `totals` (as `inputs`) and `learned` what the gradient `upper`, in memory as `out` of `expand`, gives."""
    for part in parts:
        x, threads = inputs[part.source], threads_for(inputs[part.source].numel())
        sums = Learned(part, threads, learned)
        into = pointer(totals[part.source])
        about = (x.data_ptr(), upper.data_ptr(), into, *sums.pointers())
        library().contract(part.expansion, *about, x.numel() // width, width, threads)
        sums.add()


def norm_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (voxels, C), contiguous, each (C,), summed in float64."""
    count, channels = rows.shape
    threads = threads_for(rows.numel())
    centre = zeros(channels)
    moments = []
    for power in (1, 2):
        sums = zeros(threads, channels, dtype=torch.float64)
        library().moments(
            rows.data_ptr(), centre.data_ptr(), sums.data_ptr(), power, count, channels, threads
        )
        moments.append(sums.sum(0) / count)
        centre = moments[0].float()
    # the mean that the squares were taken about is rounded to float32
    return centre, (moments[1] - (moments[0] - centre).square()).clamp(min=0).float()


@dataclass
class Affine:
    """z = (y - mean) * scale + shift of one sample, and the activation of z; all (C,), contiguous.

    Attributes:
        below: slopes below zero of the activation "prelu"; zeros for the others.
    """

    scale: Tensor
    mean: Tensor
    shift: Tensor
    below: Tensor
    act: str

    def pointers(self) -> tuple[int, ...]:
        """Where the kernels find them."""
        return tuple(t.data_ptr() for t in (self.scale, self.mean, self.shift, self.below))


def _sizes(rows: Tensor, to: Affine) -> tuple[int, int, int, int]:
    """Activation, voxels, channels, threads: the last arguments of the kernels of a norm."""
    count, channels = rows.shape
    return ACT_NAMES[to.act], count, channels, threads_for(rows.numel())


def norm_forward(rows: Tensor, out: Tensor, to: Affine) -> None:
    """out = act(z), both (voxels, C), contiguous; `out` may be `rows`."""
    library().norm_forward(rows.data_ptr(), out.data_ptr(), *to.pointers(), *_sizes(rows, to))


def norm_sums(rows: Tensor, grad: Tensor, to: Affine) -> Tensor:
    """Sums over the rows of g, of g (rows - mean), and of what `below` gets, (3, C); g is the gradient at z."""
    sizes = _sizes(rows, to)
    sums = zeros(sizes[-1], 3, rows.shape[1], dtype=torch.float64)
    about = (*to.pointers(), sums.data_ptr())
    library().norm_reduce(rows.data_ptr(), grad.data_ptr(), *about, *sizes)
    return sums.sum(0).float()


def norm_backward(rows: Tensor, grad: Tensor, to: Affine, gain: Tensor, offset: Tensor, out: Tensor) -> None:
    """out = g * scale + (rows - mean) * gain + offset, all contiguous."""
    about = (*to.pointers(), gain.data_ptr(), offset.data_ptr(), out.data_ptr())
    library().norm_backward(rows.data_ptr(), grad.data_ptr(), *about, *_sizes(rows, to))
