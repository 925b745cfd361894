"""Pictures of how classifiers do: confusion matrix, ROC curves, and the mistakes they are surest of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.evaluation.report import saved, short, told_apart

MOST_COUNTED, MOST_NAMED = 20, 60  # classes with counts in cells, and with names
MOST_COLOURED = 10  # classes with a curve in colour
A_ROW = 4  # pictures


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path | str) -> Path:
    """Save a PNG: rows are the true classes, columns the predicted ones; colours are shares of the row.

    Args:
        counts: images, (K, K); see `kanseg.evaluation.classification.confusion`.
    """
    from matplotlib.figure import Figure

    classes = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.52 * classes, 2.6, 9.0))
    letters = max(map(len, map(short, names))) if classes <= MOST_NAMED else 4
    size = float(np.clip(360 / classes, 4.5, 10))  # points
    margin = 0.011 * size * letters + 0.4
    figure = Figure(figsize=(side + margin + 1.0, side + margin + 0.3), dpi=110, layout=_layout())
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
    if classes <= MOST_NAMED:
        labels = [short(name) for name in names]
        flat = max(map(len, labels)) * classes > 60
        turn: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if flat else {}
        axes.set_xticks(range(classes), labels, fontsize=size, **turn)
        axes.set_yticks(range(classes), labels, fontsize=size)
    axes.set(
        xlabel="predicted class" if classes <= MOST_NAMED else "predicted class (number in plan.json)",
        ylabel="true class" if classes <= MOST_NAMED else "true class (number in plan.json)",
    )
    for row, column in np.argwhere(counts > 0) if classes <= MOST_COUNTED else ():
        colour = "white" if shares[row, column] > 0.6 else "black"
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=size
        )
    return saved(figure, path)


@dataclass(frozen=True)
class Roc:
    """Of one class: shares of false and of true alarms at falling thresholds, and the area under the curve."""

    false: np.ndarray
    true: np.ndarray
    area: float


def roc(chances: np.ndarray, truth: np.ndarray) -> Roc | None:
    """The ROC curve of a class, from probabilities (N,) and whether each image has it; None where all or none have."""
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-chances, kind="stable")
    ends = np.append(np.diff(chances[order]) != 0, True)  # images of one probability are alarms together
    true, false = (np.append(0.0, np.cumsum(side[order])[ends] / side.sum()) for side in (truth, ~truth))
    return Roc(false, true, float(np.diff(false) @ (true[1:] + true[:-1]) / 2))


def draw_roc(curves: Mapping[str, Roc], path: Path | str) -> Path:
    """Save a PNG: a curve a class, named with its area; of many classes the lowest are, and the mean in black."""
    from matplotlib.figure import Figure

    ranked = sorted(curves, key=lambda name: curves[name].area)
    named = list(curves) if len(curves) <= MOST_COLOURED else ranked[: MOST_COLOURED // 2]
    figure = Figure(figsize=(7.8, 4.6), dpi=110, layout=_layout())
    axes = figure.subplots()
    told_apart(axes)
    for name, curve in curves.items():
        if name not in named:
            axes.plot(curve.false, curve.true, color="lightgray", linewidth=0.6)
    for name in named:
        curve = curves[name]
        axes.plot(curve.false, curve.true, linewidth=1.5, label=f"{short(name)} ({curve.area:.3f})")
    if len(curves) > 1:
        places = np.linspace(0, 1, 501)
        mean = np.mean([np.interp(places, curve.false, curve.true) for curve in curves.values()], axis=0)
        mean[0] = 0.0
        area = np.mean([curve.area for curve in curves.values()])
        label = f"mean of {len(curves)} classes ({area:.3f})"
        axes.plot(places, mean, color="black", linewidth=2, linestyle="--", label=label)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="false positive rate (1 - specificity)",
        ylabel="true positive rate (sensitivity)",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    few = len(named) < len(curves)
    figure.legend(
        loc="outside right upper",
        title=f"class (AUC){', the lowest' if few else ''}",
        frameon=False,
        fontsize=9,
    )
    return saved(figure, path)


def draw_images(images: Sequence[np.ndarray], captions: Sequence[str], path: Path | str) -> Path:
    """Save a PNG of images in rows, each with its caption above.

    Args:
        images: (H, W) in grey, stretched from their least to their largest value, or (H, W, 3) from 0 to 255.
    """
    from matplotlib.figure import Figure

    columns = min(A_ROW, len(images))
    rows = math.ceil(len(images) / columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    height = 2.2 + 0.17 * lines
    figure = Figure(figsize=(2.45 * columns, height * rows), dpi=110, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, image, caption in zip(cells, images, captions, strict=False):
        if image.ndim == 3:
            cell.imshow(np.clip(image / max(255, image.max()), 0, 1))
        else:
            cell.imshow(image, cmap="gray")
        cell.set_title(caption, fontsize=8, parse_math=False)
    return saved(figure, path)


def _layout() -> Any:
    """Constrained, with room at the edges for what stands outside of the axes."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
