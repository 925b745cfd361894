"""The families of KAN convolutions of the literature, as rows of one table of options.

`conv_layer("kagn")` gives a constructor of conv-norm-act layers, `layer(spatial_dims, in_channels, out_channels, ...)`.
`KAGNConv3d(in_channels, out_channels, ...)` and its like are thin names over it, made for 1, 2 and 3 dimensions.
Formulas: Drokin, arXiv 2407.01092; the sources of the bases stand in their files. Where the reference implementation
(torch-conv-kan) departs from them, these rows follow the formulas.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from kanseg.bases import BASES
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.bottleneck import BottleneckKANConv
from kanseg.layers.conv_layer import ConvLayer
from kanseg.layers.mixture import MixtureOfExperts
from kanseg.layers.wavelet_conv import WaveletConv

BATCH = "batch"
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"basis": None, "dropout_at": "input"},
    "kan": {"basis": "bspline", "base_act": "gelu", "act": "prelu", "dropout_at": "output"},
    "fastkan": {"basis": "rbf", "input_norm": ("instance", {"affine": True}), "norm": None, "act": None},
    "kaln": {"basis": "legendre", "base_act": None},
    "kacn": {"basis": "chebyshev", "base": False, "act": None, "dropout_at": "output"},
    "kagn": {"basis": "gram", "basis_act": "silu"},
    "kagn_v2": {
        "basis": "gram",
        "basis_act": "silu",
    },  # one grouped convolution and one norm, as all rows here
    "kajn": {"basis": "jacobi", "base_act": None, "dropout_at": "basis"},
    "kabn": {"basis": "bernstein", "base_act": None},
    "relukan": {"basis": "relu", "dropout_at": "input"},
    "grkan": {"basis": "rational", "base": False},
    "wavkan": {"conv": WaveletConv, "norm": BATCH, "act": None},
    "bottleneck_kagn": {"conv": BottleneckKANConv, "basis": "gram", "basis_act": "silu"},
    "bottleneck_relukan": {"conv": BottleneckKANConv, "basis": "relu"},
}
MIXING = ("k", "noisy", "balance_weight", "before")  # options of mixtures of experts
NAMES = {
    "kan": "KANConv",
    "fastkan": "FastKANConv",
    "kaln": "KALNConv",
    "kacn": "KACNConv",
    "kagn": "KAGNConv",
    "kagn_v2": "KAGNV2Conv",
    "kajn": "KAJNConv",
    "kabn": "KABNConv",
    "relukan": "ReLUKANConv",
    "grkan": "GRKANConv",
    "wavkan": "WavKANConv",
    "bottleneck_kagn": "BottleneckKAGNConv",
    "bottleneck_relukan": "BottleneckReLUKANConv",
}
BY_BASIS: dict[str, str] = {}  # the first family of each basis
for _family, _row in FAMILIES.items():
    if _row.get("basis") and "conv" not in _row:
        BY_BASIS.setdefault(_row["basis"], _family)


def family_name(basis: str | None) -> str:
    """The family of a basis ("gram" -> "kagn"); a family's own name stays; None and "plain" are the plain twin.

    A basis without a family of its own (say "mexican_hat" with shared shifts) is returned as it is.
    """
    if basis is None:
        return "plain"
    if basis in FAMILIES:
        return basis
    if basis not in BASES:
        raise UsageError(f"Unknown basis '{basis}'.{did_you_mean(basis, [*BASES, *FAMILIES])}")
    return BY_BASIS.get(basis, basis)


def conv_layer(
    basis: str | None = "gram", *, bottleneck: bool = False, num_experts: int = 0, **options: Any
) -> partial[Any]:
    """A constructor of conv-norm-act layers of one family, `layer(spatial_dims, in_channels, out_channels, ...)`.

    Args:
        basis: a family, a basis, or None for the plain convolution.
        bottleneck: the narrow form (1x1 down, KAN, 1x1 up) of the family.
        num_experts: make a mixture of this many experts of it; of a bottleneck only the narrow part is mixed. 0: none.
        options: override the family's row (norm, act, dropout, basis_options, ...); for mixtures also those of
            `MixtureOfExperts` (k, noisy, balance_weight, before), by themselves or as a dictionary `mixture`.
    """
    name = family_name(basis)
    row = FAMILIES.get(name, {"basis": name})
    if bottleneck and row.get("basis") and "conv" not in row:
        kept = {key: value for key, value in row.items() if key in ("basis", "basis_act", "base_act", "act")}
        row = {**kept, "conv": BottleneckKANConv}
    elif bottleneck and row.get("conv") is WaveletConv:
        raise UsageError(
            "basis 'wavkan' has no bottleneck form; choose another basis or bottleneck=False "
            "(model.options.bottleneck=false)"
        )
    row = {**row, **options}
    if num_experts:
        chosen = {**(row.pop("mixture", None) or {}), **{k: row.pop(k) for k in MIXING if k in row}}
        mixture = partial(MixtureOfExperts, num_experts=num_experts, **chosen)
        if row.get("conv") is not BottleneckKANConv:
            return partial(mixture, expert_layer=partial(ConvLayer, **row))
        row["mixture"] = mixture
    return partial(ConvLayer, **row)


def _thin_name(family: str, spatial_dims: int) -> type[nn.Module]:
    """`KAGNConv3d` and its like: the family's layer with the dimension fixed."""
    name = f"{NAMES[family]}{spatial_dims}d"

    def __init__(  # noqa: N807
        self: ConvLayer, in_channels: int, out_channels: int, kernel_size: Any = 3, **options: Any
    ) -> None:
        row = {**FAMILIES[family], **options}
        ConvLayer.__init__(self, spatial_dims, in_channels, out_channels, kernel_size, **row)

    documentation = (
        f"{spatial_dims}D layer of the family '{family}' (see `kanseg.layers.FAMILIES`), "
        "(in_channels, out_channels, kernel_size=3, **options of ConvLayer)."
    )
    return type(name, (ConvLayer,), {"__init__": __init__, "__doc__": documentation, "__module__": __name__})


LAYER_CLASSES = {
    f"{NAMES[family]}{dims}d": _thin_name(family, dims) for family in NAMES for dims in (1, 2, 3)
}
globals().update(LAYER_CLASSES)
