"""Classification heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import ShapeError, UsageError


class MatryoshkaHead(nn.Module):
    """Logits from the first m features for each m of `nesting`, so that features may be cut short later.

    (N, nesting[-1]) -> tuple of (N, out_features), one a width. Source: Kusupati et al., arXiv 2205.13147.

    Args:
        nesting: widths, increasing.
        out_features: classes.
        shared: one weight, of which each width uses its first columns; else a classifier a width.

    >>> import torch
    >>> [tuple(logits.shape) for logits in MatryoshkaHead((4, 8), 3)(torch.zeros(2, 8))]
    [(2, 3), (2, 3)]
    """

    classifiers: Any  # of linear layers

    def __init__(
        self, nesting: Sequence[int], out_features: int, *, shared: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if not nesting or list(nesting) != sorted(set(nesting)) or nesting[0] < 1:
            raise UsageError(f"nesting needs increasing positive widths, got {list(nesting)}")
        self.nesting = tuple(nesting)
        widths = self.nesting[-1:] if shared else self.nesting
        self.classifiers = nn.ModuleList(nn.Linear(width, out_features, bias) for width in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() != 2 or x.shape[1] != self.nesting[-1]:
            raise ShapeError(f"expected an input of shape (N, {self.nesting[-1]}), got {tuple(x.shape)}")
        widths = self.nesting[-len(self.classifiers) :]
        own = [one(x[:, :width]) for one, width in zip(self.classifiers, widths, strict=True)]
        last = self.classifiers[-1]  # called first, for hooks may make its weight (pruning)
        shared = [F.linear(x[:, :n], last.weight[:, :n], last.bias) for n in self.nesting[: -len(own)]]
        return (*shared, *own)
