"""Optimizers and learning-rate schedules by name, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kanseg.config import TrainingConfig
from kanseg.errors import UsageError, UserError, refused_options
from kanseg.registry import Registry
from kanseg.training.parameters import parameter_groups, shares_of

OPTIMIZERS = Registry("optimizer")
SCHEDULES = Registry("schedule")
Groups = Iterable[nn.Parameter] | Sequence[dict[str, Any]]


@OPTIMIZERS.register("adamw")
def adamw(
    parameters: Groups, lr: float = 1e-3, weight_decay: float = 3e-5, **options: Any
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **options)


@OPTIMIZERS.register("sgd")
def sgd(
    parameters: Groups,
    lr: float = 1e-2,
    weight_decay: float = 3e-5,
    momentum: float = 0.99,
    nesterov: bool = True,
    **options: Any,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.99, as in nnU-Net."""
    options = {"momentum": momentum, "nesterov": nesterov, **options}
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, **options)


@OPTIMIZERS.register("lion")
def lion(
    parameters: Groups, lr: float = 1e-4, weight_decay: float = 3e-4, **options: Any
) -> torch.optim.Optimizer:
    """Lion (Chen et al., arXiv 2302.06675): the sign of a momentum, at a third to a tenth of AdamW's rate."""
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise UserError("The optimizer 'lion' needs: pip install lion-pytorch") from error
    return Lion(parameters, lr=lr, weight_decay=weight_decay, **options)


@OPTIMIZERS.register("lbfgs")
def lbfgs(
    parameters: Groups,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    max_iter: int = 4,
    history_size: int = 10,
    line_search_fn: str | None = "strong_wolfe",
    **options: Any,
) -> torch.optim.Optimizer:
    """L-BFGS with Wolfe's line search: a step evaluates the loss of its batch several times."""
    if weight_decay:
        raise UsageError(
            f"The optimizer 'lbfgs' has no weight decay, got {weight_decay}. Set training.weight_decay=0."
        )
    options = {
        "max_iter": max_iter,
        "history_size": history_size,
        "line_search_fn": line_search_fn,
        **options,
    }
    return torch.optim.LBFGS(parameters, lr=lr, **options)


@SCHEDULES.register("poly")
def poly(fraction: float, power: float = 0.9) -> float:
    """Polynomial decay, nnU-Net's."""
    return (1 - fraction) ** power


@SCHEDULES.register("cosine")
def cosine(fraction: float) -> float:
    """Half a cosine (Loshchilov and Hutter, arXiv 1608.03983), without restarts."""
    return (1 + math.cos(math.pi * fraction)) / 2


@SCHEDULES.register("constant")
def constant(fraction: float) -> float:
    """The full rate to the end."""
    return 1.0


def lr_factor(fraction: float, warmup: float = 0.02, schedule: str = "poly", **options: Any) -> float:
    """Share of the full learning rate at `fraction` of the training: linear warm-up, then the schedule's decay.

    Args:
        options: of the schedule.

    >>> [round(lr_factor(f), 3) for f in (0.01, 0.5, 1.0)]
    [0.495, 0.536, 0.0]
    """
    fraction = min(max(fraction, 0.0), 1.0)
    rise = min(1.0, max(fraction / warmup, 0.01)) if warmup else 1.0
    with refused_options(f"The schedule '{schedule}'"):
        return rise * SCHEDULES.create(schedule, fraction, **options)


def create_optimizer(model: nn.Module, options: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of a config over the parameters that are trained, each group with its share `lr_scale` of lr.

    AdamW is torch's fused one on CPUs and GPUs (a quarter of the time of its plain one).
    """
    groups = parameter_groups(model, shares_of(options.lr_scale), options.layer_decay)
    given = {"lr": options.lr, "weight_decay": options.weight_decay, **options.optimizer_options}
    known = {p.device.type for p in model.parameters()} <= {"cpu", "cuda"}
    if options.optimizer == "adamw" and known and not {"foreach", "differentiable"} & given.keys():
        given.setdefault("fused", True)
    with refused_options(f"The optimizer '{options.optimizer}'"):
        return OPTIMIZERS.create(options.optimizer, groups, **given)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """One step of the exponential moving average of the weights, in place; young averages forget faster."""
    decay = min(decay, (1 + step) / (10 + step))
    averages, values = [], []
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            averages.append(average[name])
            values.append(value.to(average[name].dtype))
        else:
            average[name].copy_(value)
    get_ema_multi_avg_fn(decay)(averages, values, None)  # all of them in a few launches
