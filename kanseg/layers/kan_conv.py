"""The KAN convolution: an ordinary convolution over a pointwise basis expansion.

y = conv(act(x); W_base) + conv(Phi(x); W_basis), where Phi gives K numbers a channel. Both terms run as ONE convolution
over (K + 1) C channels, group by group, so `groups` is the native one. The expansion is not kept for the backward pass
but computed again there (`kanseg.layers.kernels`): the layer keeps its input, like a plain convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from kanseg.bases import Basis, create_basis
from kanseg.errors import ShapeError, UsageError, did_you_mean
from kanseg.layers.kernels import expanded_conv, gpu, instance_norm_act
from kanseg.layers.kernels.expansion import Geometry
from kanseg.layers.kernels.plain_conv import plain_conv, pointwise_product
from kanseg.layers.kernels.recipe import Recipe, names_of_tensors
from kanseg.layers.kernels.rows import FORMATS, channels_last, is_channels_last

CHANNEL_DROPOUT: dict[int, type[nn.Module]] = {
    1: nn.Dropout1d,
    2: nn.Dropout2d,
    3: nn.Dropout3d,
}  # of whole channels
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DROPOUTS = ("input", "basis_input", "basis")  # where a KAN convolution can have its dropout
OPERANDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ActSpec = str | tuple[str, dict[str, Any]] | None


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One integer an axis: 3 -> (3, 3, 3)."""
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims:
        raise UsageError(f"{name} needs one number or {spatial_dims} (spatial_dims), got {value}")
    return values


def check_dropout(place: str) -> None:
    """Raise `UsageError` for a place where no KAN convolution has its dropout."""
    if place not in DROPOUTS:
        raise UsageError(f"Unknown dropout_at '{place}'.{did_you_mean(place, DROPOUTS)}")


def activation(act: ActSpec) -> nn.Module:
    """An activation by MONAI's name ("silu" is "swish" there), identity for None."""
    if act is None:
        return nn.Identity()
    made = nn.SiLU() if act == "silu" else get_act_layer(act)
    if getattr(made, "inplace", False):
        made.inplace = False  # others read its input too
    return made


def norm_layer(norm: str | Sequence, spatial_dims: int, channels: int) -> nn.Module:
    """A norm of MONAI's by its spec; `UsageError` with the nearest name for one that is not known."""
    try:
        return get_norm_layer(norm if isinstance(norm, str) else tuple(norm), spatial_dims, channels)
    except ValueError as error:
        raise UsageError(f"norm={norm!r} is not known: {' '.join(str(error).split())}") from error


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), also where torch refuses an instance norm: a map of one voxel, which becomes its bias, or of none."""
    if isinstance(norm, _InstanceNorm) and not x.numel():
        return x + sum(p.sum() for p in norm.parameters())  # nothing, with a gradient for each
    stored = getattr(norm, "track_running_stats", False) and not norm.training  # statistics, which serve
    if isinstance(norm, _InstanceNorm) and math.prod(x.shape[2:]) == 1 and not stored:
        return torch.instance_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps, False)
    return norm(x)


def fused_norm_serves(norm: nn.Module, x: Tensor) -> bool:
    """Whether `instance_norm_act` computes this norm."""
    if not isinstance(norm, _InstanceNorm) or norm.track_running_stats or x.dim() not in FORMATS:
        return False
    return (x.dtype.itemsize >= 4 or x.device.type == "cuda" or gpu.serves(x)) and lean(x)


class ConvGeometry(nn.Module):
    """What every convolution here shares: channels, groups, kernel, stride, padding, dilation; checked once.

    `padding=None` keeps the size of odd kernels at stride 1: dilation * (kernel_size - 1) // 2 on each side.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if spatial_dims not in CONVOLUTIONS:
            raise UsageError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        if min(in_channels, out_channels) < 1:
            raise UsageError(f"channels must be positive, got {in_channels} in and {out_channels} out")
        if groups < 1 or in_channels % groups or out_channels % groups:
            common = math.gcd(in_channels, out_channels)
            fitting = ", ".join(str(n) for n in range(1, common + 1) if not common % n)
            raise UsageError(
                f"in_channels (={in_channels}) and out_channels (={out_channels}) must be divisible by "
                f"groups (={groups}): take {fitting}"
            )
        self.spatial_dims, self.groups = spatial_dims, groups
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")
        self.stride = per_axis(stride, spatial_dims, "stride")
        self.dilation = per_axis(dilation, spatial_dims, "dilation")
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        self.padding = (
            tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))
            if padding is None
            else per_axis(padding, spatial_dims, "padding")
        )
        if min(self.padding) < 0:
            raise UsageError(f"padding must not be negative, got {self.padding}")

    def check(self, x: Tensor) -> None:
        """Refuse what the kernels, which read by address, would misread.

        Raises:
            ShapeError: not a batch of `in_channels` channels and `spatial_dims` axes, or smaller than the kernel.
            UsageError: whole or complex numbers, or on another device than the weights.
        """
        weight = next((p for p in self._parameters.values() if p is not None), x)
        if weight.device != x.device or not x.is_floating_point():
            raise UsageError(
                f"expected floating point numbers on {weight.device}, where the layer is, got {x.dtype} on {x.device}"
            )
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[-self.spatial_dims :])
            raise ShapeError(
                f"expected an input of shape (N, {self.in_channels}, {axes}), got {tuple(x.shape)}"
            )
        if torch.compiler.is_compiling():  # sizes may be unknown there
            return
        if x.numel() and min(self.geometry().out_size(x.shape[2:])) < 1:
            raise ShapeError(
                f"Kernel size can't be greater than actual input size: a map of {tuple(x.shape[2:])} is smaller than "
                f"the kernel {self.kernel_size} (dilation {self.dilation}, padding {self.padding})"
            )

    def new_weight(self, out_channels: int, in_channels: int, kernel_size: Sequence[int]) -> nn.Parameter:
        """A convolution weight with unit-gain Kaiming uniform values, fan-in counted over all its inputs."""
        bound = math.sqrt(3 / (in_channels * math.prod(kernel_size)))
        return nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size).uniform_(-bound, bound))

    def convolve(self, x: Tensor, weight: Tensor, groups: int | None = None, padding: Any = None) -> Tensor:
        """The convolution with this geometry (or other groups or padding) and no bias."""
        result = result_type(x, weight)
        if self.spatial_dims == 3 and self.geometry().misread(x, result):
            with torch.autocast("cpu", enabled=False):
                return self.wide(x.float(), weight.float(), groups, padding).to(result)
        return self.wide(x, weight, groups, padding)

    def wide(self, x: Tensor, weight: Tensor, groups: int | None, padding: Any) -> Tensor:
        """`convolve` in the type that the operands have."""
        how = (self.stride, self.padding if padding is None else padding, self.dilation)
        return CONVOLUTIONS[self.spatial_dims](x, weight, None, *how, groups or self.groups)

    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups."""
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def convolve_expanded(
        self,
        inputs: Sequence[Tensor],
        recipe: str,
        base: Tensor | None,
        basis: Tensor | None = None,
        learned: Sequence[Tensor] = (),
        operands: torch.dtype | None = None,
    ) -> Tensor:
        """The convolution over an expansion that is not kept; see `expanded_conv`. 1D runs as 2D of height one."""
        if base is not None and basis is not None and base.dtype != basis.dtype:
            both = torch.promote_types(base.dtype, basis.dtype)
            base, basis = base.to(both), basis.to(both)
        result = result_type(inputs[0], base, basis)
        dtype = operands if operands is not None and result == torch.float32 else result
        if self.spatial_dims > 1:
            return expanded_conv(inputs, base, basis, learned, recipe, self.geometry(), dtype).to(result)
        flat = Geometry(
            (1, *self.kernel_size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )
        base, basis = (None if weight is None else weight.unsqueeze(2) for weight in (base, basis))
        inputs = [x.unsqueeze(2) for x in inputs]
        return expanded_conv(inputs, base, basis, learned, recipe, flat, dtype).squeeze(2).to(result)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A grouped 1x1 convolution, no bias."""
        fast = pointwise_product(x, weight) if self.groups == 1 and lean(x) else None
        return fast if fast is not None else CONVOLUTIONS[self.spatial_dims](x, weight, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


def result_type(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """The type of a convolution's result here and now: that of autocast where it acts."""
    device = x.device.type
    acts = not x.is_meta and torch.is_autocast_enabled(device) and x.dtype.itemsize <= 4
    return torch.get_autocast_dtype(device) if acts else next(w.dtype for w in weights if w is not None)


def lean(x: Tensor) -> bool:
    """Whether the kernels that work on rows serve here; elsewhere torch's own steps do better."""
    if torch.compiler.is_compiling():  # the operators choose who computes when they run
        return x.device.type in ("cpu", "cuda")
    if transformed():
        return False
    if x.device.type in ("cpu", "meta") or gpu.serves(x):
        return True
    return is_channels_last(x)


def transformed() -> bool:
    """Whether a transformation of `torch.func` is at work, which takes plain steps of torch alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    """`function(*inputs)`, keeping only `inputs` for the backward pass. Under torch.compile the compiler decides, and
    transformations of `torch.func` keep what they need.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, **options)


class KANConv(ConvGeometry):
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
    folds = True  # whether a recipe says the same as `expand` and `weight`

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        basis: str | Basis | None = "gram",
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
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
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        super().__init__(spatial_dims, in_channels, out_channels, kernel_size, groups=groups, **geometry)
        channels = in_channels // self.groups
        if basis is None:
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
        self.dropout = CHANNEL_DROPOUT[spatial_dims](dropout) if dropout else None
        self.dropout_at = dropout_at if self.basis is not None else "input"
        self.recompute = recompute
        self.operands = None if operands is None else OPERANDS[operands]
        self.recipe = self._recipe() if self.basis is not None and self.folds else None
        self.learned = names_of_tensors(self.basis) if self.recipe is not None else []

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.basis is None:
            x = self._drop("input", x)
            fast = plain_conv(x, self.base_weight, self.geometry()) if self.recompute and lean(x) else None
            return self.convolve(x, self.base_weight) if fast is None else fast
        if self.input_norm is not None:
            x = self._drop("input", x)  # once for both inputs, as is the copy
            if self.recompute and self.spatial_dims > 1 and lean(x):
                x = channels_last(x)
        # The norm stays outside: run twice, it would count its statistics twice.
        inputs = (x,) if self.input_norm is None else (x, self._normed(self._drop("basis_input", x)))
        if not self.recompute:
            return self.expand_and_convolve(*inputs)
        if self.recipe is not None and not self._drops() and lean(x):
            learned = [attrgetter(name)(self.basis) for name in self.learned]
            weights = (self.base_weight, self.basis_weight)
            return self.convolve_expanded(inputs, self.recipe, *weights, learned, self.operands)
        return recomputed(self.expand_and_convolve, *inputs, preserve_rng_state=self.dropout is not None)

    def _normed(self, x: Tensor) -> Tensor:
        norm: Any = self.input_norm
        if self.recompute and fused_norm_serves(norm, x):
            return instance_norm_act(x, norm.weight, norm.bias, norm.eps, "identity")
        return normalise(norm, x)

    def expand_and_convolve(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Expansion and convolution. The convolution comes last, so recomputing stops just before it."""
        return self.convolve(self.expand(x, normed), self.weight())

    def expand(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """[act(x), Phi(x)] channel by channel: (N, C, *S) -> (N, C (K + 1), *S)."""
        if normed is None:
            x = self._drop("input", x)
            normed = self._drop("basis_input", x)
        branches = [self._expanded_basis(normed)]
        if self.base_weight is not None:
            branches.insert(0, self.base_act(x).unsqueeze(2))
        return torch.cat([branch.to(branches[-1].dtype) for branch in branches], dim=2).flatten(1, 2)

    def weight(self) -> Tensor:
        """The weight of the one convolution over the expansion, (out_channels, C (K + 1) / groups, *kernel)."""
        if self.base_weight is None:
            return self.basis_weight
        by_channel = self.basis_weight.unflatten(1, (-1, self.basis.num_functions))
        return torch.cat([self.base_weight.unsqueeze(2), by_channel], dim=2).flatten(1, 2)

    def _recipe(self) -> str | None:
        """What the operator is told of the functions; made once, so a basis is not changed afterwards."""
        base_act = None if self.base_weight is None else self.base_act
        recipe = Recipe(self.basis, base_act, self.basis_act, self._constant())
        return recipe.written() if self.basis.pointwise else None

    def _constant(self) -> str | None:
        """How phi_0 is known without evaluating it; it stays where it is the only function."""
        kind = self.basis.constant
        bent = kind == "sum" and not isinstance(self.basis_act, nn.Identity)
        return None if bent or self.basis.num_functions == 1 else kind

    def _drops(self) -> bool:
        """Whether dropout acts inside the expansion now."""
        outside = self.input_norm is not None and self.dropout_at != "basis"
        return self.dropout is not None and self.training and not outside

    def _expanded_basis(self, x: Tensor) -> Tensor:
        return self._drop("basis", self.basis_act(self.basis(x)))

    def _drop(self, position: str, x: Tensor) -> Tensor:
        if self.dropout is None or position != self.dropout_at:
            return x
        return self.dropout(x.flatten(1, 2)).view_as(x) if position == "basis" else self.dropout(x)
