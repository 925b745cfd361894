"""Optimizers by name, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kanseg.registry import Registry

OPTIMIZERS = Registry("optimizer")


@OPTIMIZERS.register("adamw")
def adamw(
    parameters: Iterable[nn.Parameter], lr: float = 1e-3, weight_decay: float = 3e-5
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


@OPTIMIZERS.register("sgd")
def sgd(
    parameters: Iterable[nn.Parameter], lr: float = 1e-2, weight_decay: float = 3e-5
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.99, as in nnU-Net."""
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=0.99, nesterov=True)


def lr_factor(fraction: float, warmup: float = 0.02, power: float = 0.9) -> float:
    """Share of the full learning rate at `fraction` of the training: linear warm-up, polynomial decay.

    >>> [round(lr_factor(f), 3) for f in (0.01, 0.5, 1.0)]
    [0.495, 0.536, 0.0]
    """
    fraction = min(max(fraction, 0.0), 1.0)
    rise = min(1.0, max(fraction / warmup, 0.01)) if warmup else 1.0
    return rise * (1 - fraction) ** power


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """One step of the exponential moving average of the weights, in place; young averages forget faster."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value.to(average[name].dtype), 1 - decay)
        else:
            average[name].copy_(value)
