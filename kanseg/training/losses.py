"""Losses by name: of logits (N, K, *S) and class numbers (N, 1, *S), without the background in Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.losses import (
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
)

from kanseg.registry import Registry
from kanseg.training.annotation import Annotated

LOSSES = Registry("loss")
# Dice over the whole batch of patches: one patch alone often lacks a class, and its Dice would then jump.
SHARED = {"to_onehot_y": True, "softmax": True, "include_background": False, "batch": True}
TABLE: dict[str, Callable[..., Any]] = {
    "dice": DiceLoss,
    "dice_ce": DiceCELoss,
    "dice_focal": DiceFocalLoss,
    "generalized_dice": GeneralizedDiceLoss,
    "tversky": TverskyLoss,
}


def create_loss(name: str, **options: Any) -> DeepSupervisionLoss:
    """A loss that also takes the list of a deeply supervised network; weights halve with every level."""
    return DeepSupervisionLoss(Annotated(LOSSES.create(name, **options)))


def _register(name: str, loss: Callable[..., Any]) -> None:
    @LOSSES.register(name)
    def build(**options: Any) -> Any:
        return loss(**{**SHARED, **options})


for _name, _loss in TABLE.items():
    _register(_name, _loss)
