"""Losses by name: of logits (N, K, *S) and class numbers (N, 1, *S), without the background in Dice.

All are MONAI's; a name with two terms is their sum. Dice-like terms run over the whole batch of patches: one patch
alone often lacks a class, and its Dice would then jump.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.losses import (
    BoundaryLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
)
from torch import Tensor, nn

from kanseg.errors import UsageError, refused_options, unknown_option
from kanseg.registry import Registry
from kanseg.training.annotation import Annotated

Terms = Sequence[tuple[float, Callable[..., nn.Module], Mapping[str, Any]]]

LOSSES = Registry("loss")
SHARED = {"to_onehot_y": True, "softmax": True, "include_background": False, "batch": True}
CROSS_ENTROPY = (1.0, DiceCELoss, {"lambda_dice": 0.0})  # MONAI's own is a part of this one
# Boundary (Kervadec et al., arXiv 1812.07032): distances count in voxels, so its weight beside Dice is small.
TABLE: dict[str, Terms] = {
    "ce": [CROSS_ENTROPY],
    "dice": [(1.0, DiceLoss, {})],
    "dice_ce": [(1.0, DiceCELoss, {})],
    "dice_focal": [(1.0, DiceFocalLoss, {})],
    "dice_boundary": [(1.0, DiceLoss, {}), (0.01, BoundaryLoss, {})],
    "focal": [(1.0, FocalLoss, {"use_softmax": True, "include_background": True})],
    "generalized_dice": [(1.0, GeneralizedDiceLoss, {})],
    "tversky": [(1.0, TverskyLoss, {})],
    "tversky_ce": [(1.0, TverskyLoss, {}), CROSS_ENTROPY],
}


class Sum(nn.Module):
    """Weighted sum of losses of the same arguments."""

    def __init__(self, terms: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.terms, self.weights = nn.ModuleList(terms), list(weights)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Losses of logits (N, K, *S) and class numbers (N, 1, *S), summed up."""
        values = [term(logits, label) for term in self.terms]
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))  # type: ignore[return-value]


def create_loss(name: str, **options: Any) -> DeepSupervisionLoss:
    """A loss that also takes the list of a deeply supervised network; weights halve with every level, down to a 16th.

    Args:
        options: of MONAI's losses; each term takes those that it has (`alpha`, `gamma`, `batch`, `lambda_ce`,
            `weight` of the classes, ...). `weights` are those of the terms.

    Raises:
        UsageError: unknown loss, or an option that none of its terms has; the nearest is named.
    """
    with refused_options(f"The loss '{name}'"):
        loss = LOSSES.create(name, **options)
        placed = any(
            isinstance(part, BoundaryLoss) or not getattr(part, "batch", True) for part in loss.modules()
        )
        return DeepSupervisionLoss(Annotated(loss, placed))


def check_loss(loss: nn.Module, what: str, logits: Tensor, target: Tensor) -> None:
    """Raise `UsageError` where a loss does not fit its classes, as by so many weights, on an example of them."""
    with refused_options(f"{what} of {logits.shape[1]} classes", RuntimeError):
        loss(logits, target)


def _register(name: str, terms: Terms) -> None:
    known = {"weights", *(option for _, loss, _ in terms for option in _options(loss))}

    @LOSSES.register(name)
    def build(weights: Sequence[float] | None = None, **options: Any) -> nn.Module:
        for option in options:
            if option not in known:
                raise unknown_option(f"Loss '{name}'", option, known)
        if weights is not None and len(weights) != len(terms):
            raise UsageError(f"Loss '{name}' has {len(terms)} terms, got weights={list(weights)}.")
        if isinstance(options.get("weight"), Sequence):
            options["weight"] = torch.tensor(options["weight"], dtype=torch.float32)
        made = [_term(loss, {**SHARED, **fixed, **options}) for _, loss, fixed in terms]
        return Sum(made, weights or [weight for weight, _, _ in terms])


def _term(loss: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    known = _options(loss)
    return loss(**{key: value for key, value in options.items() if key in known})


def _options(loss: Callable[..., nn.Module]) -> list[str]:
    return list(inspect.signature(loss).parameters)


for _name, _terms in TABLE.items():
    _register(_name, _terms)
