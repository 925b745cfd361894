"""The learned univariate functions of a KAN convolution, as numbers and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kanseg.errors import UserError
from kanseg.layers import KANConv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kan_layers(model: nn.Module) -> dict[str, Any]:
    """All layers that weigh the functions of a basis, convolutions and fully connected ones, by their names."""
    weighed = (
        (name, module, getattr(module, "basis_weight", None)) for name, module in model.named_modules()
    )
    return {name: module for name, module, weight in weighed if isinstance(weight, Tensor)}


def kan_convolutions(model: nn.Module) -> dict[str, KANConv]:
    """The convolutions among them; plain ones are left out."""
    return {name: layer for name, layer in kan_layers(model).items() if isinstance(layer, KANConv)}


@torch.no_grad()
def learned_functions(conv: KANConv, x: Tensor) -> Tensor:
    """What each edge of a KAN convolution does to a value, at the centre of its kernel.

    f_oc(x) = W_base[o, c] act(x) + sum_k W_basis[o, c, k] phi_k(x): (points,) -> (out_channels, in_channels / groups,
    points).
    """
    channels = conv.in_channels // conv.groups
    centre = tuple(size // 2 for size in conv.kernel_size)
    values = x.to(conv.basis_weight).view(1, 1, -1).expand(1, channels, -1)
    expanded = conv.basis_act(conv.basis(values))[0]  # (C, K, points)
    weights = conv.basis_weight[(..., *centre)].unflatten(1, (channels, -1))
    functions = torch.einsum("ock,ckp->ocp", weights, expanded)
    if conv.base_weight is not None:
        functions = functions + conv.base_weight[(..., *centre)].unsqueeze(-1) * conv.base_act(values)
    return functions


def plot_learned_functions(
    model: nn.Module,
    layer: str | None = None,
    *,
    count: int = 12,
    value_range: tuple[float, float] = (-3.0, 3.0),
) -> Figure:
    """Draw the `count` strongest functions of one layer (default: the first KAN layer) of a network.

    Raises:
        UserError: the network has no KAN layer, or none of that name.
    """
    from matplotlib.figure import Figure

    convolutions = kan_convolutions(model)
    if not convolutions or (layer is not None and layer not in convolutions):
        known = ", ".join(list(convolutions)[:5]) or "none: all its convolutions are plain"
        raise UserError(f"The network has no KAN layer '{layer or ''}'. Its KAN layers: {known}.")
    name = layer or next(iter(convolutions))
    x = torch.linspace(*value_range, 200)
    functions = learned_functions(convolutions[name], x)
    strength = (functions - functions.mean(-1, keepdim=True)).square().mean(-1)
    strongest = strength.flatten().topk(min(count, strength.numel())).indices.tolist()
    columns = 4
    rows = -(-len(strongest) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, index in zip(axes, strongest, strict=False):
        output, channel = divmod(index, functions.shape[1])
        axis.axhline(0, color="0.85", linewidth=0.8)
        axis.plot(x, functions[output, channel], color="tab:blue")
        axis.set_title(f"channel {channel} to {output}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(strongest) :]:
        axis.set_axis_off()
    figure.suptitle(f"Strongest learned functions of {name}", fontsize=10)
    figure.supxlabel("input value", fontsize=8)
    figure.supylabel("output value", fontsize=8)
    return figure
