"""Focal losses with what MONAI's have not: an ignored class, smoothed labels, a focal exponent of Tversky's index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses import TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError


def powered(x: Tensor, exponent: float) -> Tensor:
    """x^exponent of numbers of 0 or more, with gradient 0 at 0, where that of exponents below 1 is infinite."""
    return x.clamp_min(torch.finfo(x.dtype).tiny) ** exponent


class FocalLoss(nn.Module):
    """Mean of (1 - p)^gamma * cross-entropy, p the probability of the true class (Lin et al., arXiv 1708.02002).

    Logits (N, K, *S) and class numbers (N, *S). Voxels of class `ignore_index` do not count; where all are ignored the
    loss is 0.

    Args:
        gamma: 0 is the cross-entropy.
        class_weights: factor of each class, (K,).
        label_smoothing: of the cross-entropy.
        reduction: "mean" or "sum" over the voxels that count, or "none" for the loss of each of them, (M,).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got '{reduction}'")
        self.gamma, self.ignore_index, self.label_smoothing = gamma, ignore_index, label_smoothing
        self.reduction = reduction
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        counts = target != self.ignore_index
        target = target.where(counts, 0)
        entropy = F.cross_entropy(logits, target, reduction="none")
        p = torch.exp(-entropy)
        if self.label_smoothing:
            smoothing = self.label_smoothing
            entropy = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
        loss = powered(1 - p, self.gamma) * entropy
        if self.class_weights is not None:
            loss = loss * self.class_weights[target]
        return REDUCTIONS[self.reduction](loss, counts)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda loss, counts: loss.where(counts, 0).sum() / counts.sum().clamp_min(1),
    "sum": lambda loss, counts: loss.where(counts, 0).sum(),
    "none": lambda loss, counts: loss[counts],
}


class FocalTverskyLoss(nn.Module):
    """Mean over samples and classes of (1 - Tversky index)^gamma (Abraham and Khan, arXiv 1810.07842).

    Args:
        gamma: 1 is MONAI's `TverskyLoss`.
        options: of `TverskyLoss` (alpha: false positives, beta: false negatives, softmax, to_onehot_y, ...).
    """

    def __init__(self, gamma: float = 4 / 3, **options: Any) -> None:
        super().__init__()
        self.gamma = gamma
        self.tversky = TverskyLoss(**options, reduction="none")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return powered(self.tversky(logits, target), self.gamma).mean()
