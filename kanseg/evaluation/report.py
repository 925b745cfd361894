"""Pictures and tables of results."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kanseg.training.files import make_folder, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table

Colour = tuple[float, float, float, float]
OPACITY = 0.45
WIDTH, SHAPES = 3.1, (0.35, 1.6)  # inches of a column; least and greatest height by width
NAMES_A_ROW, MOST_NAMES = 4, 40  # of a legend
MOST_CLASSES, FEW_NAMES, FEW_LETTERS, FEW_POINTS = 40, 6, 12, 30
WIDE = 110  # letters in a line of a terminal that has room for intervals beside means
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
        image: (*S), axes in RAS order for volumes, or a picture in colours, (*S, 3) from 0 to 255; reference and
            prediction are label maps (*S).
        spacing: mm, one number an axis.
        label_names: names in the legend, background first; what the picture does not show is left out.
        label_values: their values in the label maps; default 0, 1, 2, ...
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    values = list(range(len(label_names))) if label_values is None else list(label_values)
    if not values:
        values = sorted({0, *np.unique(prediction).tolist()})
    names = list(label_names) or [f"label {v}" for v in values]
    colours = class_colours(len(values) - 1)
    columns = {"image": None, "reference": reference, "prediction": prediction}
    shown = {name: labels for name, labels in columns.items() if name == "image" or labels is not None}
    planes = _planes(reference if reference is not None and reference.any() else prediction)
    low, high = np.percentile(image, (0.5, 99.5))
    seen: set[int] = set()
    for axis, index in planes:
        cuts = (_cut(labels, axis, index) for labels in shown.values() if labels is not None)
        seen.update(value for cut in cuts for value in np.unique(cut).tolist())
    legend = [
        Patch(color=colour, label=name)
        for colour, name, value in zip(colours, names[1:], values[1:], strict=True)
        if value in seen
    ]
    if len(legend) > MOST_NAMES:
        legend[MOST_NAMES:] = [Patch(alpha=0, label=f"and {len(legend) - MOST_NAMES} more")]
    rows = math.ceil(len(legend) / NAMES_A_ROW)
    heights = [
        np.clip(_height(_cut(prediction, *plane), _aspect(spacing, plane[0])), *SHAPES) for plane in planes
    ]
    size = (WIDTH * len(shown), WIDTH * sum(heights) + 0.6 + 0.22 * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(planes), len(shown), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (axis, index) in enumerate(planes):
        aspect, name = _aspect(spacing, axis), PLANES[axis] if prediction.ndim == 3 else ""
        for column, (heading, labels) in enumerate(shown.items()):
            cell = axes[row, column]
            if image.ndim > prediction.ndim:
                cell.imshow(np.clip(image / max(255, image.max()), 0, 1), aspect=aspect)
            else:
                cell.imshow(_cut(image, axis, index), cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if labels is not None:
                cut = _painted(_cut(labels, axis, index), values, colours)
                cell.imshow(cut, aspect=aspect, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(heading)
            if column == 0:
                cell.set_ylabel(name)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=min(NAMES_A_ROW, max(1, len(legend))), frameon=False
    )
    figure.suptitle(title)
    return saved(figure, path)


def draw_scores(scores: Mapping[str, Sequence[float]], path: Path | str, *, title: str = "") -> Path:
    """Save a PNG: a box and a point a case for each class; of many classes those with the lowest means.

    Args:
        scores: Dice of each case by class.
    """
    from matplotlib.figure import Figure

    shown = dict(sorted(scores.items(), key=lambda item: np.mean(item[1]))[:MOST_CLASSES])
    shown = {name: scores[name] for name in scores if name in shown}
    if len(shown) < len(scores):
        title += f"{': ' if title else ''}the {len(shown)} lowest of {len(scores)} classes"
    figure = Figure(figsize=(max(5.0, 0.45 * len(shown) + 2), 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    how: dict[str, Any] = {
        "positions": places,
        "widths": 0.55,
        "showfliers": False,
        "medianprops": {"color": "black"},
    }
    axes.boxplot(list(shown.values()), **how)
    spread = np.random.default_rng(0)
    for place, values in zip(places, shown.values(), strict=True):
        aside = spread.uniform(-0.18, 0.18, len(values))
        axes.plot(place + aside, values, ".", color="tab:blue", alpha=0.5, markersize=5, clip_on=False)
    turned = len(shown) > FEW_NAMES or any(len(name) > FEW_LETTERS for name in shown)
    axes.set_xticks(places, list(shown), rotation=60 if turned else 0, ha="right" if turned else "center")
    axes.set(ylabel="Dice", ylim=(0, 1), title=title)
    axes.grid(axis="y", alpha=0.3)
    return saved(figure, path)


def draw_curves(
    trainings: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path | str,
    *,
    metric: str = "dice",
    label: str = "mean Dice of validation cases",
) -> Path:
    """Save a PNG: loss and validation score over the epochs, a line a training.

    Args:
        trainings: records of `kanseg.training.monitor.Monitor`, by name.
        metric: the score of these records, and `label` its words for the axis.
    """
    mean = f"mean_{metric}"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, records in trainings.items():
        marker = "." if len(records) < FEW_POINTS else ""
        left.plot([r["epoch"] for r in records], [r["loss"] for r in records], marker=marker, label=name)
        scored = [r for r in records if r[mean] is not None]
        right.plot([r["epoch"] for r in scored], [r[mean] for r in scored], marker=marker, label=name)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=label, ylim=(0, 1))
    last = max(records[-1]["epoch"] for records in trainings.values())
    for axes in (left, right):
        axes.set_xlim(-0.5, max(last, 1) + 0.5)  # of one epoch alone, ticks would be fractions
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.ticklabel_format(axis="y", useOffset=False)
    left.legend()
    return saved(figure, path)


def saved(figure: Figure, path: Path | str) -> Path:
    """Write a figure as PNG, atomically."""
    buffer, path = io.BytesIO(), Path(path)
    figure.savefig(buffer, format="png")
    make_folder(path.parent)
    return write_bytes(path, buffer.getvalue())


def _painted(cut: np.ndarray, values: Sequence[int], colours: Sequence[Colour]) -> np.ndarray:
    """A cut through a label map in colours that let the image shine through, (*S, 4)."""
    picture = np.zeros((*cut.shape, 4))
    for value, colour in zip(values[1:], colours, strict=True):
        picture[cut == value] = (*colour[:3], OPACITY)
    return picture


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


def _height(cut: np.ndarray, aspect: float) -> float:
    """Of a cut that is shown, by its width."""
    return aspect * cut.shape[0] / cut.shape[1]


def _aspect(spacing: Sequence[float], axis: int) -> float:
    rest = [s for a, s in enumerate(spacing) if a != axis] if axis >= 0 else list(spacing)[::-1]
    return rest[1] / rest[0]


def class_colours(count: int) -> list[Colour]:
    """Of the classes but the background, in pictures and in viewers: red, green, blue and opacity, 0 to 1."""
    from matplotlib import colormaps

    return [
        colormaps["tab10" if count <= 10 else "turbo"](i if count <= 10 else i / count) for i in range(count)
    ]


def score_rows(
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str = "mm"
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table from the `metrics` of a summary: a class, mean [95 % interval] of each metric.

    Args:
        unit: of lengths: "mm", or "pixels" of pictures.
    """
    columns = {"dice": "Dice", "iou": "IoU", "hd95": f"HD95 ({unit})", "nsd": "NSD"}
    shown = {label: scores for label, scores in metrics.items() if label != "mean" or len(metrics) != 2}
    digits = {"hd95": 2}
    rows = [
        [label, *(interval(scores[metric], digits.get(metric, 3)) for metric in columns)]
        for label, scores in shown.items()
    ]
    return ["class", *columns.values()], rows


def score_table(
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str = "", unit: str = "mm"
) -> Table:
    """The same for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    heading, rows = score_rows(metrics, unit)
    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for label, *cells in rows:
        table.add_row(escape(label), *map(Whole, cells), style="bold" if label == "mean" else None)
    return table


class Whole:
    """Text of "mean [interval]": in a narrow terminal the interval is a line of its own, unbroken."""

    def __init__(self, text: str) -> None:
        self.text, (self.mean, _, self.interval) = text, text.partition(" ")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        fits = len(self.text) <= options.max_width
        yield Text(self.text if fits else f"{self.mean}\n{self.interval}")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        short = max(len(self.mean), len(self.interval))
        return Measurement(short, short if console.width < WIDE else len(self.text))


def interval(score: Mapping[str, Any], digits: int = 3) -> str:
    """Mean [interval]; one case has no interval."""
    mean, low, high = (f"{value:.{digits}f}" for value in (score["mean"], *score["ci95"]))
    return mean if score["n"] == 1 else f"{mean} [{low}, {high}]"
