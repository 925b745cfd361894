"""Wavelet KAN convolution with one wavelet an edge (Wav-KAN): scale and translation for every pair of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.bases.wavelet import get_wavelet
from kanseg.errors import unknown_option
from kanseg.layers.convolution import Convolution, lean
from kanseg.layers.geometry import of_dims
from kanseg.layers.kan_conv import check_dropout
from kanseg.layers.kernels import wavelet
from kanseg.layers.kernels.operators import only_plain, plain_eager
from kanseg.layers.kernels.recipe import watched
from kanseg.layers.kernels.rows import channels_last, laid_out
from kanseg.layers.kernels.slabs import WHOLE, Slab, planes_of, slabs
from kanseg.layers.norms import ActSpec, activation
from kanseg.layers.recompute import recomputed
from kanseg.layers.terms import SumOfTerms, Term, summed

GEOMETRY = ("stride", "padding", "dilation", "groups")
EDGES_AT_ONCE = 256  # (output, input) channel pairs expanded together: bounds memory, costs no time
OF_EDGES = ("psi", "scale", "translation", "wavelet_weight", "mix_weight")  # what their terms read
STEPS = 3  # maps of as many edges that a wavelet's steps hold at once


class WaveletConv(Convolution):
    """u_o = sum_c conv(psi((x_c - t_oc) / s_oc); W_oc), y = mix(u) + conv(act(x)); mix is a 1x1 convolution.

    (N, in_channels, *S) -> (N, out_channels, *S'). The expansion has out * in channels; it is made a few output
    channels at a time and again in backward, so neither pass holds it whole.

    Args:
        wavelet: name in `kanseg.bases.wavelet.WAVELETS`, or psi itself.
        base_act: activation of the base branch.
        dropout: channel dropout of the wavelet branch's input, wherever `dropout_at` would have it.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        wavelet: str | Callable[[Tensor], Tensor] = "mexican_hat",
        base_act: ActSpec = "silu",
        dropout: float = 0.0,
        dropout_at: str = "basis_input",
        recompute: bool = True,
        **geometry: Any,
    ) -> None:
        for option in geometry:
            if option not in GEOMETRY:
                raise unknown_option("A layer of wavelets", option, ("wavelet", "base_act", "dropout"))
        super().__init__(spatial_dims, in_channels, out_channels, kernel_size, **geometry)
        check_dropout(dropout_at)
        inputs = in_channels // self.groups
        self.psi = get_wavelet(wavelet)
        self.scale = nn.Parameter(torch.ones(out_channels, inputs))
        self.translation = nn.Parameter(torch.zeros(out_channels, inputs))
        self.wavelet_weight = self.new_weight(out_channels, inputs, self.kernel_size)
        self.mix_weight = self.new_weight(out_channels, out_channels // self.groups, (1,) * spatial_dims)
        self.base_weight = self.new_weight(out_channels, inputs, self.kernel_size)
        self.base_act = activation(base_act)
        _ = self.base_recipe  # now, not where a compiler follows
        self.dropout = of_dims("Dropout", spatial_dims)(dropout) if dropout else None
        self.recompute = recompute
        self.step = max(1, EDGES_AT_ONCE // in_channels)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        edges = (self.scale, self.translation, self.wavelet_weight, self.mix_weight)
        compiled = self.base_recipe is not None and self._compiled(x, *edges)
        if self.recompute and lean(x):
            x = laid_out(x) if compiled else channels_last(x)  # once for both terms
        kept = None  # channels, those that dropout leaves
        if self.dropout is not None and self.training:
            kept = self.dropout(x.new_ones(*x.shape[:2], *[1] * self.spatial_dims))
        if compiled and self.base_recipe is not None:
            waves = partial(wavelet.wavelet_sum, x, kept, *edges, self.psi, self.geometry())
            y = self.convolve_expanded([x], self.base_recipe, self.base_weight)
            return waves().add_(y) if torch.is_grad_enabled() else waves(over=y)
        tensors = (x, kept, *edges, self.base_weight)
        plain = torch.compiler.is_compiling() or only_plain() or torch.jit.is_tracing()
        whole = plain or not self.recompute or x.is_meta
        apart = torch.is_grad_enabled() and self._apart()
        cut = [WHOLE] if whole or apart else self._slabs(x)
        terms: list[Term] = [(WHOLE, self._base_term)]
        for first in range(0, self._edges(), self.step):
            terms += [(slab, partial(self._edge_term, first, slab)) for slab in cut]
        if torch.is_grad_enabled() and not whole:
            if apart:
                steps = [partial(recomputed, terms[0][1], reads="base_")]
                steps += [partial(recomputed, term, reads=OF_EDGES) for _, term in terms[1:]]
                return summed([(WHOLE, step) for step in steps], tensors)
            return SumOfTerms.apply(terms, *tensors)
        return summed(terms, tensors)

    def _slabs(self, x: Tensor) -> list[Slab]:
        """What of x is expanded at once."""
        width = STEPS * self.in_channels * min(self.step, self._edges())
        return list(slabs(x, width, torch.promote_types(x.dtype, torch.float32), self.geometry()))

    def _apart(self) -> bool:
        """Whether the functions have numbers that are trained, which are no tensors of the sum, or hooks."""
        parts = [part for part in (self.psi, self.base_act) if isinstance(part, nn.Module)]
        return any(watched(part) or any(p.requires_grad for p in part.parameters()) for part in parts)

    def _compiled(self, x: Tensor, *edges: Tensor) -> bool:
        """Whether the compiled kernels serve."""
        usual = self.recompute and lean(x) and plain_eager(x)
        return usual and wavelet.serves((x, *edges), self.psi, self.geometry())

    def _edges(self) -> int:
        return self.out_channels // self.groups

    def _base_term(self, x: Tensor, *others: Tensor) -> Tensor:
        if self.recompute and self.base_recipe is not None and lean(x):
            return self.convolve_expanded([x], self.base_recipe, others[-1])
        return self.convolve(self.base_act(x), others[-1])

    def _edge_term(
        self,
        first: int,
        slab: Slab,
        x: Tensor,
        kept: Tensor | None,
        scale: Tensor,
        translation: Tensor,
        weight: Tensor,
        mix: Tensor,
        base: Tensor,
    ) -> Tensor:
        """What output channels first ... first + step of the wavelets, of every group, add to (a slab of) y."""
        some = slice(first, first + self.step)

        def chosen(t: Tensor) -> Tensor:
            return t.unflatten(0, (self.groups, -1))[:, some]

        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            z = planes_of(x, slab)
            z = z if kept is None else z * kept[slab.sample]
            z = z.float() if z.dtype.itemsize < 4 else z
            z = z.unflatten(1, (self.groups, 1, -1))
            shape = (1, self.groups, -1, z.shape[3], *[1] * self.spatial_dims)
            expanded = self.psi((z - chosen(translation).reshape(shape)) / chosen(scale).reshape(shape))
        weight = chosen(weight).flatten(0, 1)
        expanded = expanded.flatten(1, 3).to(weight.dtype)
        if slab.before or slab.after:
            expanded = F.pad(expanded, [0, 0] * (self.spatial_dims - 1) + [slab.before, slab.after])
        u = self.convolve(expanded, weight, groups=len(weight), padding=slab.padding(self.geometry()))
        return self.pointwise(u, mix[:, some])
