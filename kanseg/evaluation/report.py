"""Pictures and tables of results."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kanseg.training.files import make_folder, write_bytes

if TYPE_CHECKING:
    from rich.table import Table

OPACITY = 0.45
PLANES = ("sagittal", "coronal", "axial")


def picture(
    image: np.ndarray,
    reference: np.ndarray | None,
    prediction: np.ndarray,
    path: Path | str,
    *,
    spacing: Sequence[float],
    title: str = "",
    label_names: Sequence[str] = (),
    label_values: Sequence[int] | None = None,
) -> Path:
    """Save a PNG: columns image, reference and prediction; three planes through the largest cuts (one row in 2D).

    Args:
        image: (*S), axes in RAS order for volumes; reference and prediction likewise, label maps.
        spacing: mm, one number an axis.
        label_names: names in the legend, background first.
        label_values: their values in the label maps; default 0, 1, 2, ...
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    values = list(range(len(label_names))) if label_values is None else list(label_values)
    if not values:
        values = sorted({0, *np.unique(prediction).tolist()})
    names = list(label_names) or [f"label {v}" for v in values]
    colours = _colours(len(values) - 1)
    columns = {"image": None, "reference": reference, "prediction": prediction}
    shown = {name: labels for name, labels in columns.items() if name == "image" or labels is not None}
    planes = _planes(reference if reference is not None else prediction)
    low, high = np.percentile(image, (0.5, 99.5))
    figure = Figure(figsize=(3.1 * len(shown), 2.9 * len(planes) + 0.7), dpi=110, layout="constrained")
    axes = figure.subplots(len(planes), len(shown), squeeze=False)
    for row, (axis, index) in enumerate(planes):
        aspect, name = _aspect(spacing, axis), PLANES[axis] if image.ndim == 3 else ""
        for column, (heading, labels) in enumerate(shown.items()):
            cell = axes[row, column]
            cell.imshow(_cut(image, axis, index), cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if labels is not None:
                cut = _cut(labels, axis, index)
                numbers = sum(number * (cut == value) for number, value in enumerate(values))
                cell.imshow(
                    np.ma.masked_equal(numbers, 0),
                    cmap=ListedColormap(colours),
                    vmin=1,
                    vmax=max(2, len(values) - 1),
                    alpha=OPACITY,
                    interpolation="nearest",
                    aspect=aspect,
                )
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(heading)
            if column == 0:
                cell.set_ylabel(name)
    patches = [Patch(color=c, label=n) for c, n in zip(colours, names[1:], strict=False)]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(4, max(1, len(patches))), frameon=False
    )
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = Path(path)
    make_folder(path.parent)
    return write_bytes(path, buffer.getvalue())


def _planes(labels: np.ndarray) -> list[tuple[int, int]]:
    """(axis, index) of the cut with the most labelled voxels along each axis; the whole picture in 2D."""
    if labels.ndim == 2:
        return [(-1, 0)]
    marked = labels > 0
    counts = [marked.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return [
        (axis, int(count.argmax()) if count.any() else len(count) // 2) for axis, count in enumerate(counts)
    ]


def _cut(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A plane as radiologists read it: upper or front end up, the patient's right (or front) on the left."""
    return volume if axis < 0 else np.take(volume, index, axis=axis).T[::-1, ::-1]


def _aspect(spacing: Sequence[float], axis: int) -> float:
    rest = [s for a, s in enumerate(spacing) if a != axis] if axis >= 0 else list(spacing)[::-1]
    return rest[1] / rest[0]


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [
        colormaps["tab10" if count <= 10 else "turbo"](i if count <= 10 else i / count) for i in range(count)
    ]


def score_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str = "") -> Table:
    """A table for the terminal from the `metrics` of a summary: a row a class, mean [95 % interval] a metric."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    columns = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (mm)", "nsd": "NSD"}
    table.add_column("class")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for label, scores in metrics.items():
        cells = [_cell(scores[metric]) for metric in columns]
        table.add_row(label, *cells, style="bold" if label == "mean" else None)
    return table


def _cell(score: Mapping[str, Any]) -> str:
    """Mean [interval]; one case has no interval."""
    mean = f"{score['mean']:.3f}"
    return mean if score["n"] == 1 else f"{mean} [{score['ci95'][0]:.3f}, {score['ci95'][1]:.3f}]"
