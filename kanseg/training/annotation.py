"""Losses of labels that overlap or are not complete, made from any loss of class numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

CERTAIN = 30.0  # logit of an answer without doubt: its loss and its gradient are 0


class Annotated(_Loss):
    """A loss of logits (N, K, *S) and class numbers (N, 1, *S), for labels as `kanseg.data.labels.targets` gives them.

    Voxels with a negative label do not count: the loss is that of the others, in one row (1, K, voxels). Memberships
    (N, K, *S) of overlapping regions are K - 1 questions of two answers, "not this region" with logit 0 and "this
    region" (so the probability is the sigmoid of its logit); the losses of all are averaged.

    Args:
        placed: the loss goes by samples or places, so it keeps all voxels, and those that do not count are background
            that was answered rightly. So they are where a batch has no other.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], placed: bool = False) -> None:
        super().__init__()
        self.loss, self.placed = loss, placed

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        unknown = label < 0
        if unknown.any():
            known = ~unknown[:, 0]
            if self.placed or not known.any():
                logits, label = self._certain(logits, unknown), label.masked_fill(unknown, 0)
            else:
                logits, label = (maps.movedim(1, -1)[known].T[None] for maps in (logits, label))
        if label.shape[1] == 1:
            return self.loss(logits, label)
        binary = [self._one(logits[:, k : k + 1], label[:, k : k + 1]) for k in range(1, logits.shape[1])]
        return torch.stack(binary).mean()

    def _one(self, logit: Tensor, member: Tensor) -> Tensor:
        return self.loss(torch.cat([torch.zeros_like(logit), logit], dim=1), member)

    def _certain(self, logits: Tensor, unknown: Tensor) -> Tensor:
        answer = torch.full((1, logits.shape[1], *[1] * (logits.dim() - 2)), -CERTAIN).to(logits)
        answer[:, 0] = CERTAIN
        return torch.where(unknown[:, :1], answer, logits)
