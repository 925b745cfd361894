"""What KAN layers can do without: learned functions that say little, and functions of a basis that no data need.

`prune` sets whole learned functions to 0, the weakest of each layer (Liu et al., KAN, arXiv 2404.19756, section 2.5.1:
by the mean of their absolute values on data). Zeros take as much time and room as other weights. `simplify` saves both:
a layer whose learned functions are nearly sums of fewer ones (straight lines, or polynomials in tanh of a lower degree)
gets those as its basis, by least squares on the values that its inputs take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kanseg.bases import Basis, create_basis
from kanseg.errors import UsageError, UserError
from kanseg.study.refit import channels_of, expanded, fitted, quantiles
from kanseg.study.visualize import kan_layers

VALUES = 1024  # of a channel of all windows, that a layer's functions are looked at
LINE = {"basis": "legendre", "degree": 1, "squash": "identity"}  # 1 and x


class Without(nn.Module):
    """W -> W with 0 in some places, which get no gradient."""

    gone: Tensor

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        self.register_buffer("gone", gone)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.gone, 0)


def strengths(network: nn.Module, windows: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """How much each learned function says: the mean of |f| over the values of its channel, by layer.

    f(x) = sum_k W_k phi_k(x) belongs to one output, one channel of the layer's input and one place of its kernel. The
    base branch, which no basis expands, is no part of it. All layers with a basis count, whichever it is (WavKAN has
    none).

    Args:
        windows: inputs of the network, (N, C, *S) each; None for values of the normal distribution in each channel, as
            layers have that no window reaches (experts of a mixture).

    Returns:
        (out_channels, in_channels / groups, *kernel) of each layer; fully connected ones have no kernel.
    """
    return {
        name: _strengths(layer, values) for name, (layer, values) in _with_values(network, windows).items()
    }


def prune(network: nn.Module, share: float, windows: Sequence[Tensor] | None = None) -> nn.Module:
    """Set the weakest learned functions of each KAN layer to 0, in place; they stay 0 when the network is trained.

    The masks lie beside the weights. `kanseg.study.merge` makes them part of the weights, as `Segmenter.save` does in
    what it writes.

    Args:
        share: of the functions of each layer, 0 to 1; those that are 0 already count.
        windows: what their strength is measured on, see `strengths`.

    Raises:
        UsageError: another share, or a network without layers that have a basis.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"share is that of the learned functions of a layer, 0 to 1; got {share}")
    for name, strength in strengths(network, windows).items():
        layer: Any = network.get_submodule(name)
        weakest = strength.flatten().argsort(stable=True)[: round(share * strength.numel())]
        if len(weakest):
            gone = torch.zeros_like(strength, dtype=torch.bool).flatten().index_fill(0, weakest, True)
            by_function = gone.view_as(strength).repeat_interleave(layer.basis.num_functions, 1)
            parametrize.register_parametrization(layer, "basis_weight", Without(by_function))
    return network


def pruned_share(network: nn.Module) -> float:
    """The share of all learned functions that are 0; 0 where there are none."""
    gone = total = 0
    for layer in kan_layers(network).values():
        zero = (layer.basis_weight == 0).unflatten(1, (-1, layer.basis.num_functions)).all(2)
        gone, total = gone + int(zero.sum()), total + zero.numel()
    return gone / max(total, 1)


@dataclass(frozen=True)
class Simplified:
    """A layer that got fewer functions.

    Attributes:
        basis: its new basis, what `kanseg.bases.create_basis` takes.
        before, after: functions a channel that are convolved; constants are not.
        error: root mean square by which its output changes, in its standard deviations.
    """

    layer: str
    basis: dict[str, Any]
    before: int
    after: int
    error: float


@dataclass
class _Trial:
    """A layer with another basis, and how far its output is from the original's."""

    layer: Any
    off: float = 0.0
    spread: float = 0.0

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        axes = [axis for axis in range(output.dim()) if axis != 1]
        self.off += float((self.layer(*inputs) - output).double().square().sum())
        self.spread += float((output - output.mean(axes, keepdim=True)).double().square().sum())

    @property
    def error(self) -> float:
        return (self.off / self.spread) ** 0.5 if self.spread else float("inf")


@torch.no_grad()
def simplify(network: nn.Module, windows: Sequence[Tensor], within: float) -> list[Simplified]:
    """Give KAN layers the fewest functions that keep their outputs, in place: straight lines where these will do.

    Each layer is looked at by itself, with the inputs that it has in the network as it was. Base branch, norm and
    activation stay. What a network of such layers does to label maps is to be measured.

    Args:
        windows: inputs of the network, (N, C, *S) each, as it gets them in prediction.
        within: root mean square by which a layer's output may change, in its standard deviations.

    Returns:
        What was changed, in the order of the layers.

    Raises:
        UsageError: a share below 0, a network without layers that have a basis, or one with masks or adaptations.
    """
    if not within >= 0:
        raise UsageError(f"within is a share of the spread of a layer's output, 0 or more; got {within}")
    if any(parametrize.is_parametrized(module) for module in network.modules()):
        raise UsageError("The network has masks or changes beside its weights; kanseg.study.merge it first.")
    seen = _with_values(network, windows)
    found: dict[str, tuple[Simplified, Tensor]] = {}
    ways = {name: _fewer(layer.basis) for name, (layer, _) in seen.items()}
    for number in range(max(map(len, ways.values()), default=0)):
        trials = {
            name: _Trial(_moved(*seen[name], some[number]))
            for name, some in ways.items()
            if name not in found and number < len(some)
        }
        with _watching(network, trials):
            for window in windows:
                network(window)
        for name, trial in trials.items():
            if trial.error <= within:
                before, after = (convolved(basis) for basis in (seen[name][0].basis, trial.layer.basis))
                told = Simplified(name, ways[name][number], before, after, trial.error)
                found[name] = told, trial.layer.basis_weight
    for name, (told, weight) in found.items():
        set_basis(seen[name][0], told.basis)
        seen[name][0].basis_weight.copy_(weight)
    return [found[name][0] for name in seen if name in found]


def convolved(basis: Basis) -> int:
    """Functions a channel that a convolution over the basis sees; it does without one that is constant."""
    return basis.num_functions - int(basis.constant is not None and basis.num_functions > 1)


def set_basis(layer: Any, how: Mapping[str, Any]) -> None:
    """Put another basis into a KAN layer, with weights of 0 and no activation behind it.

    Args:
        how: its name as `basis`, and its options.
    """
    outputs, columns, *kernel = layer.basis_weight.shape
    channels = columns // layer.basis.num_functions
    layer.basis = create_basis(channels=channels, **how)
    layer.basis_act = nn.Identity()
    zeros = layer.basis_weight.new_zeros(outputs, channels * layer.basis.num_functions, *kernel)
    layer.basis_weight = nn.Parameter(zeros, layer.basis_weight.requires_grad)
    layer.given_basis = dict(how)
    getattr(layer, "recipe", None)  # written now, not where a compiler follows


def set_bases(network: nn.Module, bases: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The inverse of `given_bases`, for a network that is made anew.

    Raises:
        UserError: a layer that the network has not, or no such basis.
    """
    layers = kan_layers(network)
    for name, how in bases.items():
        if name not in layers:
            raise UserError(f"there is no KAN layer '{name}'")
        set_basis(layers[name], how)
    return network


def given_bases(network: nn.Module) -> dict[str, dict[str, Any]]:
    """The bases that `simplify` gave to layers, by their names."""
    layers = kan_layers(network).items()
    return {name: layer.given_basis for name, layer in layers if hasattr(layer, "given_basis")}


def _fewer(basis: Basis) -> list[dict[str, Any]]:
    """Bases of fewer functions, the cheapest first."""
    most = convolved(basis) - 1
    polynomials = [{"basis": "legendre", "degree": degree} for degree in range(1, most + 1)]
    return [dict(LINE), *polynomials] if most else []


def _moved(layer: Any, values: Tensor, how: Mapping[str, Any]) -> Any:
    """A copy of a layer with another basis, whose weights come nearest to the old functions at the values."""
    moved = copy.deepcopy(layer)
    set_basis(moved, how)
    moved.basis_weight.copy_(fitted(layer, expanded(layer, values), expanded(moved, values)))
    return moved


@torch.no_grad()
def _strengths(layer: Any, values: Tensor) -> Tensor:
    outputs, columns, *kernel = layer.basis_weight.shape
    count, groups = layer.basis.num_functions, getattr(layer, "groups", 1)
    functions = expanded(layer, values).float().unflatten(0, (groups, -1))  # (G, C / G, P, K)
    weight = layer.basis_weight.float().cpu().reshape(groups, outputs // groups, columns // count, count, -1)
    found = weight.new_empty(groups, outputs // groups, columns // count, weight.shape[-1])
    for group in range(groups):
        for channel in range(columns // count):
            values = torch.einsum("pk,okm->pom", functions[group, channel], weight[group, :, channel])
            found[group, :, channel] = values.abs().mean(0)
    return found.reshape(outputs, columns // count, *kernel)


@torch.no_grad()
def _with_values(network: nn.Module, windows: Sequence[Tensor] | None) -> dict[str, tuple[Any, Tensor]]:
    """Layers with a basis, and values that it sees in each channel, (channels, values)."""
    layers = kan_layers(network)
    if not layers:
        raise UsageError("The network has no layers with functions of a basis: they are plain, or WavKAN.")
    if windows is None:
        return {name: (layer, quantiles(channels_of(layer))) for name, layer in layers.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(0)
    count = -(-VALUES // len(windows))

    def keep(name: str) -> Any:
        def look(_basis: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            flat = inputs[0].movedim(1, 0).flatten(1)
            some = torch.randint(flat.shape[1], (count,), generator=generator)
            found[name].append(flat[:, some.to(flat.device)].float().cpu())

        return look

    with _watching(network, {f"{name}.basis".lstrip("."): keep(name) for name in layers}):
        for window in windows:
            network(window)
    return {
        name: (layer, torch.cat(found[name], 1) if found[name] else quantiles(channels_of(layer)))
        for name, layer in layers.items()
    }


@contextmanager
def _watching(network: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """The network in `eval()` and these hooks on modules of it, for a while."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    handles = [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
