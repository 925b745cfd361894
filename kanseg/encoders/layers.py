"""The layers of a network from its options: which family stands in which stage, with which norm and how grouped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from kanseg.errors import UsageError
from kanseg.layers import conv_layer
from kanseg.layers.families import MIXING
from kanseg.layers.geometry import per_axis

LayerFactory = Callable[..., nn.Module]  # (spatial_dims, in_channels, out_channels, kernel_size, **geometry)
Layer = str | None | LayerFactory
INSTANCE = ("instance", {"affine": True})


def network_layer(
    basis: Layer = "gram",
    *,
    bottleneck: bool = False,
    norm: str | Sequence | None = INSTANCE,
    dropout: float = 0.0,
    groups: int = 1,
    num_experts: int = 0,
    **options: Any,
) -> LayerFactory:
    """A constructor of the conv-norm-act layers that a network is built of.

    Args:
        basis: basis or family of the KAN layers; None for the plain twin; a constructor is taken as it is.
        bottleneck: KAN layers in their narrow form (1x1 down, KAN convolution, 1x1 up).
        norm: MONAI norm spec, a name or a pair; of the input where the family normalises its input (FastKAN).
        dropout: channel dropout.
        groups, num_experts: of every convolution but those of kernel 1, depthwise ones and the one on the image; with
            experts each is a `MixtureOfExperts` (narrow ones mix their narrow part), whose options k, noisy,
            balance_weight and before go along.
        options: further options of the KAN layers (degree, grid_size, act, ...); the plain twin does without.
    """
    if callable(basis):
        return basis
    mixing = {key: options.pop(key) for key in (*MIXING, "mixture") if key in options}
    options = {**({} if basis is None else options), "norm": norm, "dropout": dropout}
    family = partial(conv_layer, basis, bottleneck=bottleneck and basis is not None)
    if family().keywords.get("input_norm"):
        options["input_norm"] = options.pop("norm")
    layer = family(**options)
    inner = partial(family(num_experts=num_experts, **mixing, **options), groups=groups)
    return layer if groups == 1 and not num_experts else partial(_by_place, layer, inner)


def stage_layers(
    basis: Layer | Sequence[Layer], stages: int, kan_stages: str | Sequence[int] = "all", **options: Any
) -> list[LayerFactory]:
    """One constructor of layers a stage.

    Args:
        basis: for all stages, or one a stage.
        kan_stages: where KAN layers stand: "all", "deep" (from the second stage on), "coarse" (the two coarsest, but
            not the first) or stage numbers from 0; plain layers stand elsewhere.
        options: of `network_layer`.
    """
    given: list[Any] = list(basis) if isinstance(basis, list | tuple) else [basis] * stages
    if len(given) != stages:
        raise UsageError(f"basis needs one entry or {stages}, one a stage, got {len(given)}")
    where = _kan_stages(kan_stages, stages)
    return [network_layer(given[stage] if stage in where else None, **options) for stage in range(stages)]


def depthwise_layers(
    basis: Layer | Sequence[Layer], stages: int, kan_stages: str | Sequence[int] = "all", **options: Any
) -> list[LayerFactory]:
    """`stage_layers` for depthwise convolutions, which are never narrow."""
    given: Any = basis if isinstance(basis, list | tuple) else [basis] * stages
    wide: Any = [one.removeprefix("bottleneck_") if isinstance(one, str) else one for one in given]
    return stage_layers(wide, stages, kan_stages, **{**options, "bottleneck": False})


def check_kernels(kernel_sizes: Sequence[int | Sequence[int]]) -> None:
    """Raise `UsageError` for an even kernel, whose map is a voxel smaller than the one that it is joined with."""
    flat = [size for kernel in kernel_sizes for size in ([kernel] if isinstance(kernel, int) else kernel)]
    if any(size % 2 == 0 for size in flat):
        raise UsageError(f"kernel_sizes must be odd, got {list(kernel_sizes)}")


def _by_place(
    layer: LayerFactory,
    inner: LayerFactory,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = 3,
    **geometry: Any,
) -> nn.Module:
    """`layer` where the network is pointwise or says the groups itself, `inner` elsewhere."""
    own = "groups" in geometry or set(per_axis(kernel_size, spatial_dims, "kernel_size")) == {1}
    return (layer if own else inner)(spatial_dims, in_channels, out_channels, kernel_size, **geometry)


def _kan_stages(kan_stages: str | Sequence[int], stages: int) -> set[int]:
    named = {"all": range(stages), "deep": range(1, stages), "coarse": range(max(1, stages - 2), stages)}
    if isinstance(kan_stages, str) and kan_stages not in named:
        raise UsageError(f"kan_stages must be 'all', 'deep', 'coarse' or stage numbers, got '{kan_stages}'")
    chosen = set(named[kan_stages] if isinstance(kan_stages, str) else kan_stages)
    if not chosen <= set(range(stages)):
        raise UsageError(f"kan_stages must lie in 0 ... {stages - 1}, got {sorted(chosen)}")
    return chosen
