"""Penalties beside the loss that keep KAN layers sparse or quiet: of their weights, and of what they give.

torch-conv-kan trains its classifiers so (L1 decay of layers, L1 and L2 of their activations). Here none of them depends
on the size of a batch: activations count by their mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kanseg.config import TrainingConfig
from kanseg.errors import UsageError
from kanseg.layers import ConvLayer, KANConv
from kanseg.training.parallel import full


class Penalties:
    """What is added to the loss of a network; `take` it after each pass in training.

    Args:
        model: whose KAN layers (convolution, norm and activation in one) are looked at.

    Raises:
        UsageError: the network has no KAN layer, or its passes are compiled or recorded and activations are asked for.
    """

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        self.options = options = training.penalty
        self.layers: list[Any] = [m for m in model.modules() if options.wanted and _is_kan(m)]
        self._given: list[Tensor] = []
        if options.wanted and not self.layers:
            raise UsageError("training.penalty is for KAN layers, and the network has none.")
        if not (options.activation_l1 or options.activation_l2):
            return
        if training.compile or training.cuda_graph:
            raise UsageError(
                "Penalties of activations need training.compile=false and training.cuda_graph=false."
            )
        model.register_forward_pre_hook(lambda *_: self._given.clear())  # and what a backward pass made again
        for layer in self.layers:
            layer.register_forward_hook(lambda _module, _inputs, y: self._given.append(y))

    def take(self) -> Tensor | float:
        """The sum of all penalties of the last pass, once; 0 where none is asked for."""
        total: Tensor | float = 0.0
        if self.options.l1:
            parameters = {p: None for layer in self.layers for p in layer.conv.parameters() if p.dim() > 1}
            total = total + self.options.l1 * sum(full(p.abs().sum()) for p in parameters if p.requires_grad)
        for y in self._given:
            values = y.float()
            total = total + self.options.activation_l1 * values.abs().mean()
            total = total + self.options.activation_l2 * values.square().mean()
        self._given.clear()
        return total


def _is_kan(module: Any) -> bool:
    if not isinstance(module, ConvLayer):
        return False
    return not (isinstance(module.conv, KANConv) and module.conv.basis is None)
