"""The sum of one wavelet an edge, by the compiled kernels: nothing of out * in channels is ever made."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.bases.wavelet import dog, mexican_hat, morlet
from kanseg.layers.kernels import native
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.operators import only_first
from kanseg.layers.kernels.rows import FORMATS, channels_last, empty_channels_last, laid_out
from kanseg.layers.kernels.slabs import COPY_BYTES, TILE, outputs, planes_of, slabs

KINDS: dict[Callable[[Tensor], Tensor], int] = {mexican_hat: 0, morlet: 1, dog: 2}
BORDER = 2  # of zeros around the gradient of the output: the largest padding


class Waves(ctypes.Structure):
    """`Waves` of wavelet.h."""

    _fields_ = (
        *(
            (name, c_int)
            for name in (
                *("kind", "samples", "depth", "height", "width", "in", "out"),
                *("out_depth", "out_height", "out_width", "pad_depth", "pad_height", "pad_width"),
            )
        ),
        *((name, c_void_p) for name in ("inverse", "translation", "weight")),
    )


def serves(edges: Sequence[Tensor], psi: Callable[[Tensor], Tensor], geometry: Geometry) -> bool:
    """Whether the compiled kernels sum these wavelets; `edges` are the tensors of `wavelet_sum` without `kept`."""
    x, weight = edges[0], edges[3]
    return (
        psi in KINDS
        and x.dim() in FORMATS
        and native.serves(*edges)
        and not torch.is_autocast_enabled(x.device.type)
        and geometry.dense()
        and len(weight) % 16 == 0
    )


def wavelet_sum(
    x: Tensor,
    kept: Tensor | None,
    scale: Tensor,
    translation: Tensor,
    weight: Tensor,
    mix: Tensor,
    psi: Callable[[Tensor], Tensor],
    geometry: Geometry,
    over: Tensor | None = None,
) -> Tensor:
    """mix(u), u_o = sum_c conv(psi((x_c - translation_oc) / scale_oc); weight_oc); keeps x.

    (N, C, *S) -> (N, out_channels, *S'); scale, translation (out, C), weight (out, C, *kernel), mix (out, out, 1, ...);
    kept (N, C, 1, ...), by which x is multiplied first, is without a gradient. Without gradients the sum may be added
    to `over`, in channels-last memory.
    """
    tensors = (laid_out(x), kept, scale, translation, weight, mix)
    return _WaveletSum.apply(*tensors, KINDS[psi], geometry, over)


class _Call:
    """Numbers of one call; a picture is a volume of one row, its rows are the planes."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        translation: Tensor,
        weight: Tensor,
        kind: int,
        geometry: Geometry,
        out_size: Sequence[int],
    ) -> None:
        self.deep = x.dim() == 5
        size, pads, out_size = list(x.shape[2:]), list(geometry.padding), list(out_size)
        self.out_size = (len(x), len(weight), *out_size)
        if not self.deep:
            size, out_size, pads = [size[0], 1, size[1]], [out_size[0], 1, out_size[1]], [pads[0], 0, pads[1]]
        inverse, shift = (1 / scale).t().contiguous(), translation.t().contiguous()
        taps = weight.flatten(2).permute(1, 2, 0).contiguous()
        self.kept = (inverse, shift, taps)
        pointers = [t.data_ptr() for t in self.kept]
        self.waves = Waves(kind, len(x), *size, x.shape[1], len(weight), *out_size, *pads, *pointers)
        self.threads = native.threads_for(x.numel())
        self.each = native.library().wavelet_scratch(byref(self.waves))

    def run(self, function: str, *tensors: Tensor) -> None:
        scratch = native.zeros(self.threads, self.each)
        pointers = [t.data_ptr() for t in (*tensors, scratch)]
        getattr(native.library(), function)(byref(self.waves), self.deep, *pointers, self.each, self.threads)

    def forward(self, x: Tensor) -> Tensor:
        u = empty_channels_last(self.out_size, x)
        self.run("wavelet_forward", x, u)
        return u


def _rows(x: Tensor) -> Tensor:
    """(N, C, *S) in channels-last memory -> (N * voxels, C)."""
    return x.movedim(1, -1).flatten(0, -2)


class _WaveletSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        scale: Tensor,
        translation: Tensor,
        weight: Tensor,
        mix: Tensor,
        kind: int,
        geometry: Geometry,
        over: Tensor | None,
    ) -> Tensor:
        ctx.kind, ctx.geometry = kind, geometry
        ctx.save_for_backward(x, kept, scale, translation, weight, mix)
        y = over
        if y is None:
            y = empty_channels_last((len(x), len(weight), *geometry.out_size(x.shape[2:])), x)
        for slab in slabs(x, len(weight), x.dtype, geometry, COPY_BYTES, TILE):
            part = channels_last(planes_of(x, slab))
            part = part if kept is None else part * kept[slab.sample]
            into = outputs(y, slab)
            how = (kind, slab.geometry(geometry), into.shape[2:])
            u = _Call(part, scale, translation, weight, *how).forward(part)
            _rows(into).addmm_(_rows(u), mix.flatten(1).t(), beta=0 if over is None else 1)
            del part, u
        return y

    @staticmethod
    @only_first
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, scale, translation, weight, mix = ctx.saved_tensors
        x = channels_last(x)  # hooks on saved tensors may have brought it back in other memory
        x = x if kept is None else x * kept
        call = _Call(x, scale, translation, weight, ctx.kind, ctx.geometry, grad.shape[2:])
        grad = channels_last(grad)
        of_mix = None
        if ctx.needs_input_grad[5]:
            of_mix = (_rows(grad).t() @ _rows(call.forward(x))).view_as(mix)
        upper = torch.empty_like(grad)
        torch.mm(_rows(grad), mix.flatten(1), out=_rows(upper))
        planes = F.pad(upper.movedim(1, -1), (0, 0, *([BORDER] * 2 * (x.dim() - 2))))
        at_x = torch.zeros_like(x)
        sums = [native.zeros(*t.shape, dtype=torch.float64) for t in call.kept]
        call.run("wavelet_back", x, planes, at_x, *sums)
        of_inverse, of_translation, of_weight = sums
        of_scale = -of_inverse.t() / scale.square()
        return (
            at_x if kept is None else at_x.mul_(kept),
            None,
            of_scale.to(scale.dtype),
            of_translation.t().to(scale.dtype),
            of_weight.permute(2, 0, 1).reshape(weight.shape).to(weight.dtype),
            of_mix,
            None,
            None,
            None,
        )
