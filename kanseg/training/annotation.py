"""Losses of labels that overlap or are not complete, made from any loss of class numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

CERTAIN = 30.0  # logit of an answer without doubt: its loss and its gradient are 0


class Annotated(_Loss):
    """A loss of logits (N, K, *S) and class numbers (N, 1, *S), for labels as `kanseg.data.labels.targets` gives them.

    Voxels with a negative label add nothing: they count as background that was answered rightly. Memberships
    (N, K, *S) of overlapping regions are K - 1 questions of two answers, "not this region" with logit 0 and "this
    region" (so the probability is the sigmoid of its logit); the losses of all are averaged.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        unknown = label < 0
        if unknown.any():
            label = label.masked_fill(unknown, 0)
            logits = self._certain(logits, unknown)
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
