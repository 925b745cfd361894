"""Functions of torch-conv-kan on arrays: its scores of masks, and its learning rate by steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from kanseg.compat.links import Conversion
from kanseg.errors import UsageError, did_you_mean
from kanseg.training.schedules import polynomial_with_warmup

Scores = dict[str, float]


class Function(nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = partial(function, **options)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def soft_dice(targets: Any, predictions: Any, smooth: float = 1.0) -> Scores:
    """Mean over samples and channels of (2 |p t| + smooth) / (|p| + |t| + smooth), both (N, C, *S)."""
    t, p = (np.asarray(x, dtype=np.float64).reshape(*x.shape[:2], -1) for x in (targets, predictions))
    return {"dice": float(((2 * (t * p).sum(-1) + smooth) / (t.sum(-1) + p.sum(-1) + smooth)).mean())}


def iou(output: Any, target: Any) -> Scores:
    """Overlap of both above one half, 1e-5 added above and below."""
    p, t = (np.asarray(x) > 0.5 for x in (output, target))
    return {"IoU": float(((p & t).sum() + 1e-5) / ((p | t).sum() + 1e-5))}


def indicators(target: Any, output: Any) -> Scores:
    """Overlap and surface distances of both above one half, the whole array being one object; 0 where undefined."""
    t, p = (np.asarray(x) > 0.5 for x in (target, output))
    both, either = (p & t).sum(), (p | t).sum()
    scores = {"IoU": _share(both, either), "dice": _share(2 * both, p.sum() + t.sum())}
    apart = np.concatenate([_to_surface(p, t), _to_surface(t, p)]) if p.any() and t.any() else np.zeros(1)
    # The farthest voxel, and the 95th percentile over both ways.
    scores |= {"hd": float(apart.max()), "hd95": float(np.percentile(apart, 95))}
    recall, precision = _share(both, t.sum()), _share(both, p.sum())
    scores |= {"recall": recall, "specificity": _share((~p & ~t).sum(), (~t).sum())}
    return scores | {"precision": precision, "f1_score": _share(2 * recall * precision, recall + precision)}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _to_surface(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distances of the surface of one object to that of the other, in voxels."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    surfaces = [mask & ~binary_erosion(mask) for mask in (one, other)]
    return np.asarray(distance_transform_edt(~surfaces[1])[surfaces[0]])


def learning_rate(step: int, lr: float, **options: float) -> float:
    """The rate at a step, by the names of the reference."""
    names = {"num_warmup_steps": "warmup_steps", "num_training_steps": "total_steps", "lr_end": "end"}
    ours: Any = {names.get(key, key): value for key, value in options.items()}
    return polynomial_with_warmup(step, lr, **ours)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "dice": (soft_dice, "smooth"),
    "iou_score": (iou, ""),
    "medseg_indicators": (indicators, ""),
    "get_polynomial_decay_schedule_with_warmup": (
        learning_rate,
        "lr num_warmup_steps num_training_steps lr_end power",
    ),
}


def convert(name: str, spatial_dims: int, args: dict[str, Any], state: Mapping[str, Tensor]) -> Conversion:
    """A function with these arguments; scores are called as in the reference, (targets, predictions)."""
    function, known = FUNCTIONS[name]
    if unknown := sorted(set(args) - set(known.split())):
        raise UsageError(
            f"{name} of torch-conv-kan does not take '{unknown[0]}'.{did_you_mean(unknown[0], known.split())}"
        )
    return Conversion(Function(function, args), [])


CONVERTERS: dict[str, Any] = {name: partial(convert, name) for name in FUNCTIONS}
