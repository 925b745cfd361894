"""A learning rate by steps that torch has not: linear warm-up from 0, then polynomial decay to a rate above 0."""

from __future__ import annotations


def polynomial_with_warmup(
    step: int, lr: float, warmup_steps: int, total_steps: int, end: float = 1e-7, power: float = 1.0
) -> float:
    """Rate at `step`, from 0: lr s / w, then (lr - end) (1 - (s - w) / (T - w))^power + end, and `end` after T.

    For `torch.optim.lr_scheduler.LambdaLR` divide by `lr`.

    >>> [round(polynomial_with_warmup(s, 1.0, 2, 6, end=0.0), 2) for s in (0, 1, 2, 4, 6, 9)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    if step >= total_steps:
        return end
    left = 1 - (step - warmup_steps) / (total_steps - warmup_steps)
    return (lr - end) * left**power + end
