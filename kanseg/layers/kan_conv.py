"""The KAN convolution: an ordinary convolution over a pointwise basis expansion.

y = conv(act(x); W_base) + conv(Phi(x); W_basis), where Phi gives K numbers a channel. Both terms run as ONE convolution
over (K + 1) C channels, group by group, so `groups` is the native one. The expansion is not kept for the backward pass
but computed again there (`kanseg.layers.kernels`): the layer keeps its input, like a plain convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.bases import Basis, check_left_aside, create_basis
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.convolution import Convolution, lean
from kanseg.layers.geometry import of_dims, refuse_options_of_torch
from kanseg.layers.kernels import instance_norm_act
from kanseg.layers.kernels.plain_conv import plain_conv
from kanseg.layers.kernels.recipe import Recipe, names_of_tensors
from kanseg.layers.kernels.rows import channels_last, is_channels_last, laid_out
from kanseg.layers.norms import (
    ActSpec,
    activation,
    fused_norm_serves,
    norm_layer,
    normalise,
)
from kanseg.layers.recompute import recomputed

DROPOUTS = ("input", "basis_input", "basis")  # where a KAN convolution can have its dropout
OPERANDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_dropout(place: str) -> None:
    """Raise `UsageError` for a place where no KAN convolution has its dropout."""
    if place not in DROPOUTS:
        raise UsageError(f"Unknown dropout_at '{place}'.{did_you_mean(place, DROPOUTS)}")


class KANConv(Convolution):
    """N-dimensional KAN convolution, (N, in_channels, *S) -> (N, out_channels, *S'). `basis=None` is the plain one.

    Source: Drokin, "Kolmogorov-Arnold Convolutions", arXiv 2407.01092, section 3.

    Args:
        basis: name in `kanseg.bases.BASES`, a `Basis`, or None.
        base: keep the base branch conv(base_act(x)).
        base_act: activation of the base branch; None convolves x itself.
        basis_act: activation applied to the expanded basis, in [Drokin] SiLU for Gram polynomials.
        input_norm: MONAI norm spec for the input of the basis branch (FastKAN).
        dropout: channel dropout probability; `dropout_at` says where: "input" (both branches), "basis_input" or
            "basis"; a plain convolution has its input alone. "output" is for `ConvLayer`.
        recompute: compute the expansion again in backward instead of keeping it.
        operands: "bfloat16" rounds the expansion and the weight before they are multiplied, where that is faster, and
            nothing else; for processors with such products (without them it is slow), relative error about 3e-3.
        basis_options: arguments of the basis (degree, grid_size, ...), and `shared_by`, see `create_basis`.

    >>> conv = KANConv(3, 4, 8, basis="gram", groups=2)
    >>> conv(torch.zeros(1, 4, 5, 6, 7)).shape
    torch.Size([1, 8, 5, 6, 7])
    """

    basis: Any  # a Basis; None makes the plain convolution
    base_weight: Any  # parameters; None where the layer has no such branch
    basis_weight: Any
    folds = True  # whether a recipe says the same as `expand` and `joint_weight`

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        basis: str | Basis | None = "gram",
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        base: bool = True,
        base_act: ActSpec = "silu",
        basis_act: ActSpec = None,
        input_norm: str | tuple | None = None,
        dropout: float = 0.0,
        dropout_at: str = "basis_input",
        recompute: bool = True,
        operands: str | None = None,
        **basis_options: Any,
    ) -> None:
        if operands is not None and operands not in OPERANDS:
            raise UsageError(f"Unknown operands '{operands}'.{did_you_mean(operands, OPERANDS)}")
        check_dropout(dropout_at)
        refuse_options_of_torch(basis_options)
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        super().__init__(spatial_dims, in_channels, out_channels, kernel_size, groups=groups, **geometry)
        channels = in_channels // self.groups
        if basis is None:
            check_left_aside(basis_options)
            base, base_act = True, None
        self.basis = None if basis is None else create_basis(basis, channels, **basis_options)
        self.base_act = activation(base_act)
        self.basis_act = activation(basis_act)
        self.base_weight = self.new_weight(out_channels, channels, self.kernel_size) if base else None
        self.basis_weight = (
            None
            if self.basis is None
            else self.new_weight(out_channels, channels * self.basis.num_functions, self.kernel_size)
        )
        self.input_norm = norm_layer(input_norm, spatial_dims, in_channels) if input_norm else None
        self.dropout = of_dims("Dropout", spatial_dims)(dropout) if dropout else None
        self.dropout_at = dropout_at if self.basis is not None else "input"
        self.recompute = recompute
        self.operands = None if operands is None else OPERANDS[operands]
        self.learned: list[str] = []
        _ = self.recipe  # now, not where a compiler follows

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.basis is None:
            x = self._drop("input", x)
            fast = plain_conv(x, self.base_weight, self.geometry()) if self.recompute and lean(x) else None
            return self.convolve(x, self.base_weight) if fast is None else fast
        if self.input_norm is not None:
            x = self._drop("input", x)  # once for both inputs, as is the copy
            if self.recompute and lean(x):
                x = laid_out(x)
        # The norm stays outside: run twice, it would count its statistics twice.
        inputs = (x,) if self.input_norm is None else (x, self._own(x))
        if not self.recompute:
            return self.expand_and_convolve(*inputs)
        inside = DROPOUTS if self.input_norm is None else ("basis",)
        recipe = self.recipe
        if recipe is not None and not self._drops(*inside) and lean(x):
            learned = [attrgetter(name)(self.basis) for name in self.learned]
            weights = (self.base_weight, self.basis_weight)
            return self.convolve_expanded(inputs, recipe, *weights, learned, self.operands)
        return recomputed(self.expand_and_convolve, *inputs, preserve_rng_state=self.dropout is not None)

    def _own(self, x: Tensor) -> Tensor:
        """The input of the basis."""
        if not (self.recompute and self._drops("basis_input")):
            return self._normed(x)
        return recomputed(self._normed, x, reads="input_norm")

    def _normed(self, x: Tensor) -> Tensor:
        norm: Any = self.input_norm
        x = self._drop("basis_input", x)
        if self.recompute and fused_norm_serves(norm, x):
            ours = x.dim() > 3 and not is_channels_last(x)  # a copy, which the result may lie over
            return instance_norm_act(
                channels_last(x), norm.weight, norm.bias, norm.eps, "identity", over=ours
            )
        return normalise(norm, x)

    def expand_and_convolve(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Expansion and convolution. The convolution comes last, so recomputing stops just before it."""
        weight = self.joint_weight()
        return self.convolve(self.expand(x, normed).to(weight.dtype), weight)

    def expand(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """[act(x), Phi(x)] channel by channel: (N, C, *S) -> (N, C (K + 1), *S)."""
        if normed is None:
            x = self._drop("input", x)
            normed = self._drop("basis_input", x)
        branches = [self._expanded_basis(normed)]
        if self.base_weight is not None:
            branches.insert(0, self.base_act(x).unsqueeze(2))
        return torch.cat([branch.to(branches[-1].dtype) for branch in branches], dim=2).flatten(1, 2)

    def joint_weight(self) -> Tensor:
        """The weight of the one convolution over the expansion, (out_channels, C (K + 1) / groups, *kernel)."""
        if self.base_weight is None:
            return self.basis_weight
        by_channel = self.basis_weight.unflatten(1, (-1, self.basis.num_functions))
        return torch.cat([self.base_weight.unsqueeze(2), by_channel], dim=2).flatten(1, 2)

    @property
    def recipe(self) -> str | None:
        """What the operator is told of the functions. Each may be replaced, but none changed in itself."""
        if self.basis is None or not self.folds or not self.basis.pointwise:
            return None
        functions = (self.basis, None if self.base_weight is None else self.base_act, self.basis_act)
        return self.written(functions, partial(self._write, *functions))

    def _write(self, basis: Basis, base_act: nn.Module | None, basis_act: nn.Module) -> str | None:
        self.learned = names_of_tensors(basis)
        return Recipe(basis, base_act, basis_act, self._constant()).written()

    def _constant(self) -> str | None:
        """How phi_0 is known without evaluating it; it stays where it is the only function."""
        kind = self.basis.constant
        bent = kind == "sum" and not isinstance(self.basis_act, nn.Identity)
        return None if bent or self.basis.num_functions == 1 else kind

    def _drops(self, *places: str) -> bool:
        """Whether dropout acts at one of these places now."""
        return self.dropout is not None and self.training and self.dropout_at in places

    def _expanded_basis(self, x: Tensor) -> Tensor:
        return self._drop("basis", self.basis_act(self.basis(x)))

    def _drop(self, position: str, x: Tensor) -> Tensor:
        if self.dropout is None or position != self.dropout_at:
            return x
        return self.dropout(x.flatten(1, 2)).view_as(x) if position == "basis" else self.dropout(x)
