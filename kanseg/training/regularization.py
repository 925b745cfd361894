"""Penalties beside the loss that keep KAN layers sparse or quiet: of their weights, and of what they give.

torch-conv-kan trains its classifiers so (L1 decay of layers, L1 and L2 of their activations). Here none of them depends
on the size of a batch: activations count by their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kanseg.config import PenaltyConfig
from kanseg.errors import UsageError
from kanseg.layers import ConvLayer, KANConv
from kanseg.training.parallel import full


class Penalties:
    """What is added to the loss of a network; `take` it after each pass in training.

    Args:
        model: whose KAN layers (convolution, norm and activation in one) are looked at; not compiled or recorded where
            activations count.

    Raises:
        UsageError: see `check_penalty`.
    """

    def __init__(self, model: nn.Module, options: PenaltyConfig) -> None:
        check_penalty(model, options)
        self.options = options
        self.layers = _kan_layers(model) if options.wanted else []
        self._given: list[Tensor] = []
        if not (options.activation_l1 or options.activation_l2):
            return
        model.register_forward_pre_hook(lambda *_: self._given.clear())  # and what a backward pass made again
        for layer in self.layers:
            layer.register_forward_hook(lambda _module, _inputs, y: self._given.append(y))

    def take(self) -> Tensor | float:
        """The sum of all penalties of the last pass, once; 0 where none is asked for."""
        total: Tensor | float = 0.0
        if self.options.l1:
            weights = (weight for layer in self.layers for weight in _weights(layer.conv))
            total = total + self.options.l1 * sum(full(weight.abs().sum()) for weight in weights)
        for y in self._given:
            values = y.float()
            total = total + self.options.activation_l1 * values.abs().mean()
            total = total + self.options.activation_l2 * values.square().mean()
        self._given.clear()
        return total


def check_penalty(model: nn.Module, options: PenaltyConfig) -> None:
    """Raise `UsageError` where penalties are asked for and the network has no KAN layer."""
    if options.wanted and not _kan_layers(model):
        raise UsageError("training.penalty is for KAN layers, and the network has none.")


def _kan_layers(model: nn.Module) -> list[Any]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, ConvLayer)]
    return [layer for layer in layers if not (isinstance(layer.conv, KANConv) and layer.conv.basis is None)]


def _weights(conv: nn.Module) -> Iterator[Tensor]:
    """The weights of a layer as it uses them: with the changes beside frozen ones, if there are any."""
    for module in conv.modules():
        keys = [*module._parameters, *getattr(module, "parametrizations", {})]
        for weight in (getattr(module, key) for key in keys if key.endswith("weight")):
            if weight is not None and weight.dim() > 1 and weight.requires_grad:
                yield weight
