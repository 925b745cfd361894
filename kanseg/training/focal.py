"""Focal losses with what MONAI's have not: an ignored class, smoothed labels, a focal exponent of Tversky's index."""

from __future__ import annotations

from typing import Any

import torch
from monai.losses import TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F


class FocalLoss(nn.Module):
    """Mean over voxels of (1 - p)^gamma * cross-entropy, p = exp(-cross-entropy) (Lin et al., arXiv 1708.02002).

    Logits (N, K, *S) and class numbers (N, *S). Voxels of class `ignore_index` do not count; where all are ignored the
    loss is 0.

    Args:
        gamma: 0 is the cross-entropy.
        class_weights: factor of each class, (K,), applied after p is taken.
        label_smoothing: of the cross-entropy.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.gamma, self.ignore_index, self.label_smoothing = gamma, ignore_index, label_smoothing
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        counts = target != self.ignore_index
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "reduction": "none"}
        entropy = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, **options)
        loss = (1 - torch.exp(-entropy)) ** self.gamma * entropy
        if self.class_weights is not None:
            loss = loss * self.class_weights[target.where(counts, 0)]
        return loss.where(counts, 0).sum() / counts.sum().clamp_min(1)


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
        return (self.tversky(logits, target) ** self.gamma).mean()
