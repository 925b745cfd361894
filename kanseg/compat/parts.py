"""Small parts of torch-conv-kan: spatial norms, the nested head, losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.compat.focal import FocalLoss, FocalTverskyLoss
from kanseg.compat.links import Conversion, Link, State, same_names
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.bottleneck import NoiseInjection
from kanseg.layers.heads import MatryoshkaHead
from kanseg.layers.spatial_norm import SpatialNorm

SPATIAL_NORM = {"norm": "norm_layer", "scale": "conv_y", "shift": "conv_b"}


class OneOrSeveral(nn.Module):
    """A loss that reads one channel by the sigmoid and several by the softmax; `complement` is 1 minus it."""

    def __init__(self, loss: Callable[..., nn.Module], complement: bool = False, **options: Any) -> None:
        super().__init__()
        self.one, self.several = loss(**options, sigmoid=True), loss(**options, softmax=True)
        self.complement = complement

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = (self.one if logits.shape[1] == 1 else self.several)(logits, target)
        return 1 - loss if self.complement else loss


class DiceAndCrossEntropy(nn.Module):
    """Dice loss plus `weight` times the binary cross-entropy of every channel."""

    def __init__(self, smooth: float, weight: float) -> None:
        super().__init__()
        self.dice, self.weight = OneOrSeveral(DiceLoss, smooth_nr=smooth, smooth_dr=smooth), weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        entropy = F.binary_cross_entropy_with_logits(logits, target)
        return self.dice(logits, target) + self.weight * entropy


def convert_norm(groups: int, spatial_dims: int, args: dict[str, Any], state: State) -> Conversion:
    """Both spatial norms; the one without a second image has no channels of it."""
    norm = SpatialNorm(
        spatial_dims,
        args.pop("num_channels"),
        args.pop("num_channels_cond", state["conv_y.weight"].shape[1]),
        args.pop("num_groups", groups),
        args.pop("affine", True),
    )
    _none_left(args)
    links = [
        link
        for ours, theirs in SPATIAL_NORM.items()
        for link in same_names(norm.get_submodule(ours), f"{ours}.", f"{theirs}.")
    ]
    return Conversion(norm, links)


def convert_head(spatial_dims: int, args: dict[str, Any], state: State) -> Conversion:
    """The nested head."""
    nesting, classes = args.pop("nesting_list"), args.pop("num_classes", 1000)
    head = MatryoshkaHead(nesting, classes, shared=args.pop("efficient", False), bias=args.pop("bias", True))
    _none_left(args)
    names = [key.removeprefix("classifiers.") for key in head.state_dict()]
    return Conversion(head, [Link(f"classifiers.{n}", (f"nesting_classifier_{n}",)) for n in names])


def _none_left(args: dict[str, Any]) -> None:
    if args:
        raise UsageError(f"torch-conv-kan does not take {sorted(args)} here")


def _dice(complement: bool, args: dict[str, Any]) -> nn.Module:
    smooth = args.get("smooth", 1.0)
    return OneOrSeveral(DiceLoss, complement, smooth_nr=smooth, smooth_dr=smooth)


def _tversky(args: dict[str, Any]) -> nn.Module:
    smooth = args.get("smooth", 1.0)
    weights = {"alpha": args.get("alpha", 0.5), "beta": args.get("beta", 0.5)}
    options = {**weights, "gamma": args.get("gamma", 1.0), "smooth_nr": smooth, "smooth_dr": smooth}
    return OneOrSeveral(FocalTverskyLoss, **options)


def _focal(args: dict[str, Any]) -> nn.Module:
    alpha = args.get("alpha")
    return FocalLoss(
        args.get("gamma", 0.0),
        class_weights=None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32),
        ignore_index=args.get("ignore_index", -100),
        label_smoothing=args.get("label_smoothing", 0.0),
        reduction=args.get("reduction", "mean"),
    )


LOSSES: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "Dice": partial(_dice, True),
    "DiceLoss": partial(_dice, False),
    "DiceLossWithBCE": lambda args: DiceAndCrossEntropy(args.get("smooth", 1.0), args.get("bce_weight", 0.5)),
    "TverskyLoss": _tversky,
    "FocalLoss": _focal,
}


LOSS_ARGUMENTS = {
    "Dice": "smooth",
    "DiceLoss": "smooth",
    "DiceLossWithBCE": "smooth bce_weight",
    "TverskyLoss": "smooth alpha beta gamma",
    "FocalLoss": "alpha gamma label_smoothing reduction ignore_index num_classes",
}


def convert_loss(name: str, spatial_dims: int, args: dict[str, Any], state: State) -> Conversion:
    """A loss; it has no weights."""
    known = LOSS_ARGUMENTS[name].split()
    if unknown := sorted(set(args) - set(known)):
        raise UsageError(
            f"{name} of torch-conv-kan does not take '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
        )
    return Conversion(LOSSES[name](args), [])


def convert_noise(spatial_dims: int, args: dict[str, Any], state: State) -> Conversion:
    """Noise in training; it has no weights."""
    return Conversion(NoiseInjection(args.get("p", 0.0), args.get("alpha", 0.05)), [])


CONVERTERS: dict[str, Any] = {
    "NoiseInjection": convert_noise,
    "SelfSpatialNorm": partial(convert_norm, 16),
    "SpatialNorm": partial(convert_norm, 32),
    "MatryoshkaHead": convert_head,
    **{name: partial(convert_loss, name) for name in LOSSES},
}
