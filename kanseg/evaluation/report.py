"""Pictures and tables of results."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kanseg.data.class_names import SAFE, Colour, class_colours
from kanseg.files import make_folder, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table

OPACITY, SURE = 0.45, 0.85  # of classes, and of differences
WIDTH, SHAPES = 3.1, (0.35, 1.6)  # inches of a column; least and greatest height by width
DIFFERENCES = {"missed": "#F0E442", "added": "#FF00FF", "other class": "#00FFFF"}  # over grey
ENDS = (("A", "P"), ("R", "L"), ("R", "L"))  # of the patient, at the left and right of each plane
MOST_NAMES, LONGEST = 40, 30  # names of a legend; letters of one that shares a line
LETTERS = 22  # of a name that is shown beside much else
PANELS = 3  # in a row
MOST_LINES = 12  # classes of a diagram
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
    """Save a PNG: image, reference, prediction and their difference; three planes through the largest cuts, or one row.

    Volumes lie as radiologists look at them, the patient's right on the left; letters and a scale say so.

    Args:
        image: (*S), axes in RAS order for volumes, or a picture in colours, (*S, 3) from 0 to 255; reference and
            prediction are label maps (*S).
        spacing: mm, one number an axis.
        label_names: names in the legend, background first; what the picture does not show is left out.
        label_values: their values in the label maps; default 0, 1, 2, ...
    """
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    values = list(range(len(label_names))) if label_values is None else list(label_values)
    if not values:
        values = sorted({0, *np.unique(prediction).tolist()})
    names = list(label_names) or [f"label {v}" for v in values]
    colours = class_colours(len(values) - 1)
    planes = _planes(reference if reference is not None and reference.any() else prediction)
    maps = {"reference": reference, "prediction": prediction}
    cuts = [
        {name: _cut(labels, *plane) for name, labels in maps.items() if labels is not None}
        for plane in planes
    ]
    seen = {value for shown in cuts for cut in shown.values() for value in np.unique(cut).tolist()}
    legend = [
        Patch(color=colour, label=short(name, 2 * LONGEST))
        for colour, name, value in zip(colours, names[1:], values[1:], strict=True)
        if value in seen
    ]
    if len(legend) > MOST_NAMES:
        legend[MOST_NAMES:] = [Patch(alpha=0, label=f"and {len(legend) - MOST_NAMES} more")]
    layers = [{name: _painted(cut, values, colours) for name, cut in shown.items()} for shown in cuts]
    if reference is not None:
        kinds = [_differences(shown["prediction"], shown["reference"], values) for shown in cuts]
        for layer, kind in zip(layers, kinds, strict=True):
            layer["difference"] = _painted(kind, range(4), [to_rgba(c) for c in DIFFERENCES.values()], SURE)
        for number, (name, colour) in enumerate(DIFFERENCES.items(), start=1):
            legend += [Patch(color=colour, label=name)] * any(number in kind for kind in kinds)
    columns = ["image", *layers[0]]
    longest = max((len(str(patch.get_label())) for patch in legend), default=0)
    names_a_row = int(WIDTH * len(columns) / (0.6 + 0.09 * longest))  # inches of a name, about
    names_a_row = max(1, min(2 + len(columns), names_a_row, len(legend)))
    heights = [
        np.clip(_height(_cut(prediction, *plane), _aspect(spacing, plane[0])), *SHAPES) for plane in planes
    ]
    below = 0.22 * math.ceil(len(legend) / names_a_row)
    size = (WIDTH * len(columns), WIDTH * sum(heights) + 0.6 + below)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(planes), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    limits = (
        np.percentile(image, (0.5, 99.5)) if image.ndim == prediction.ndim else (0, max(255, image.max()))
    )
    for cells, layer, plane in zip(axes, layers, planes, strict=True):
        _draw_plane(dict(zip(columns, cells, strict=True)), image, layer, plane, spacing, limits)
    for cell, column in zip(axes[0], columns, strict=True):
        cell.set_title(column)
    figure.legend(handles=legend, loc="outside lower center", ncols=names_a_row, frameon=False)
    figure.suptitle(title)
    return saved(figure, path)


def _draw_plane(
    cells: Mapping[str, Axes],
    image: np.ndarray,
    layers: Mapping[str, np.ndarray],
    plane: tuple[int, int],
    spacing: Sequence[float],
    limits: Sequence[float],
) -> None:
    """One row of a picture: a plane of the image in every cell, and over it what is painted there."""
    axis, (low, high) = plane[0], limits
    cut = _cut(image, *plane)
    how: dict[str, Any] = {"aspect": _aspect(spacing, axis)}
    for name, cell in cells.items():
        if cut.ndim == 2:
            cell.imshow(cut, cmap="gray", vmin=low, vmax=high, **how)
        else:
            bright = np.clip(cut / high, 0, 1)
            grey = bright.mean(-1, keepdims=True).repeat(3, -1)
            cell.imshow(grey if name == "difference" else bright, **how)
        if name in layers:
            cell.imshow(layers[name], interpolation="nearest", **how)
        cell.set_xticks([])
        cell.set_yticks([])
    height, width = cut.shape[:2]
    cells["image"].set_ylabel(PLANES[axis] if axis >= 0 else f"{width} x {height} pixels")
    if axis >= 0:
        _mark(cells["image"], axis, width, next(s for a, s in enumerate(spacing) if a != axis))


def _differences(prediction: np.ndarray, reference: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Of each voxel its place in `DIFFERENCES`, from 1; 0 where both agree and what the reference says is ignored."""
    there, said = reference != values[0], prediction != values[0]
    kinds = np.select([there & ~said, said & ~there, prediction != reference], [1, 2, 3])
    return np.where(np.isin(reference, values), kinds, 0)


def _mark(cell: Axes, axis: int, width: int, spacing: float) -> None:
    """Write into a plane which end of the patient is where, and draw a scale of at most 0.3 of the width.

    Args:
        spacing: mm, along the rows of pixels.
    """
    from matplotlib.patheffects import withStroke

    seen: dict[str, Any] = {"color": "white", "path_effects": [withStroke(linewidth=2.5, foreground="black")]}
    written: dict[str, Any] = {"transform": cell.transAxes, "fontsize": 9, "va": "center", **seen}
    for place, align, letter in zip((0.02, 0.98), ("left", "right"), ENDS[axis], strict=True):
        cell.text(place, 0.5, letter, ha=align, **written)
    most = 0.3 * width * spacing
    unit = 10.0 ** math.floor(math.log10(most))
    length = max(step * unit for step in (1, 2, 5) if step * unit <= most)
    left = 0.04 * width
    how: dict[str, Any] = {"transform": cell.get_xaxis_transform(), **seen}
    cell.set_autoscale_on(False)
    cell.plot([left, left + length / spacing], [0.05, 0.05], linewidth=2, solid_capstyle="butt", **how)
    cell.text(left, 0.08, f"{length:g} mm", fontsize=8, va="bottom", **how)


def draw_scores(scores: Mapping[str, Sequence[float]], path: Path | str) -> Path:
    """Save a PNG: a box and a point a case for each class; of many classes those with the lowest means.

    Args:
        scores: Dice of each case by class.
    """
    from matplotlib.figure import Figure

    shown = dict(sorted(scores.items(), key=lambda item: np.mean(item[1]))[:MOST_CLASSES])
    shown = {name: scores[name] for name in scores if name in shown}
    title = f"the {len(shown)} lowest of {len(scores)} classes" if len(shown) < len(scores) else ""
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
    axes.set_xticks(
        places, [*map(short, shown)], rotation=60 if turned else 0, ha="right" if turned else "center"
    )
    axes.set(ylabel="Dice", ylim=(0, 1), title=title)
    axes.grid(axis="y", alpha=0.3)
    return saved(figure, path)


def short(name: str, letters: int = LETTERS) -> str:
    """A name, cut in its middle where it is long.

    >>> short("a" * 20 + "b" * 20, 11)
    'aaaaa…bbbbb'
    """
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"


def limits_of_agreement(differences: np.ndarray) -> tuple[float, float]:
    """Between which 95 % of differences (N,) lie by Bland and Altman: their mean -+ 1.96 standard deviations.

    >>> limits_of_agreement(np.array([-1.0, 0.0, 1.0]))
    (-1.96, 1.96)
    """
    mean, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1))
    return mean - spread, mean + spread


def draw_agreement(
    volumes: Mapping[str, np.ndarray], path: Path | str, *, what: str = "volume", unit: str = "ml"
) -> Path:
    """Save a PNG of Bland and Altman's plots: a panel a class, a point a case, and the limits of agreement.

    Args:
        volumes: of each class, (2, N): of the predictions, and of the references.
    """
    from matplotlib.figure import Figure

    across = min(PANELS, len(volumes))
    down = math.ceil(len(volumes) / across)
    figure = Figure(figsize=(3.4 * max(across, 2), 2.9 * down + 0.3), dpi=110, layout="constrained")
    cells = figure.subplots(down, across, squeeze=False).ravel()
    for cell, (name, (said, true)) in zip(cells, volumes.items(), strict=False):
        difference = said - true
        cell.plot((said + true) / 2, difference, ".", color="tab:blue", alpha=0.6)
        cell.axhline(0, color="grey", linewidth=0.8)
        cell.axhline(difference.mean(), color="black", label="mean")
        for limit in limits_of_agreement(difference):
            cell.axhline(limit, color="black", linestyle="--", label="95 % limits")
        cell.set_title(short(name, LONGEST), parse_math=False)
    for cell in cells[len(volumes) :]:
        cell.set_axis_off()
    figure.supxlabel(f"mean of both {what}s ({unit})", fontsize="medium")
    figure.supylabel(f"prediction - reference ({unit})", fontsize="medium")
    lines = cells[0].get_legend_handles_labels()[0][:2]
    figure.legend(handles=lines, loc="outside upper right", ncols=2, frameon=False)
    return saved(figure, path)


def draw_reliability(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], path: Path | str) -> Path:
    """Save a PNG of reliability diagrams, before and after calibration: what was said, and how often it was so.

    Args:
        curves: of each class, before and after, [mean probability, share that was, weight] of each bin.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.8), dpi=110, layout="constrained")
    cells = figure.subplots(1, 2, sharey=True)
    for side, (cell, title) in enumerate(zip(cells, ("before", "after calibration"), strict=True)):
        told_apart(cell)
        cell.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as said")
        for name, both in list(curves.items())[:MOST_LINES]:
            said, was, _ = zip(*both[side], strict=True)
            cell.plot(said, was, marker=".", label=short(name))
        cell.set(xlabel="probability", title=title, xlim=(0, 1), ylim=(0, 1))
    cells[0].set_ylabel("share of voxels that were so")
    figure.legend(handles=cells[0].lines, loc="outside right upper", frameon=False)
    return saved(figure, path)


def draw_curves(
    trainings: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path | str,
    *,
    metric: str = "dice",
    label: str = "mean Dice of validation cases",
    title: str = "",
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
    told_apart(left)
    told_apart(right)
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
    figure.legend(handles=left.lines, loc="outside right upper", frameon=False)
    figure.suptitle(title)
    return saved(figure, path)


def told_apart(axes: Axes) -> None:
    """Draw the lines of several things in colours of `SAFE`, and from the seventh on in another style."""
    from cycler import cycler

    axes.set_prop_cycle(cycler(linestyle=["-", "-."]) * cycler(color=SAFE))


def saved(figure: Figure, path: Path | str) -> Path:
    """Write a figure as PNG, atomically."""
    buffer, path = io.BytesIO(), Path(path)
    figure.savefig(buffer, format="png")
    make_folder(path.parent)
    return write_bytes(path, buffer.getvalue())


def _painted(
    cut: np.ndarray, values: Sequence[int], colours: Sequence[Colour], opacity: float = OPACITY
) -> np.ndarray:
    """A cut through a label map in colours that let the image shine through, (*S, 4)."""
    picture = np.zeros((*cut.shape, 4))
    for value, colour in zip(values[1:], colours, strict=True):
        picture[cut == value] = (*colour[:3], opacity)
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


def score_rows(
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str = "mm", tolerance: float = 1.0
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table from the `metrics` of a summary: a class, mean [95 % interval] of each metric.

    Args:
        unit: of lengths: "mm", or "pixels" of pictures.
        tolerance: of NSD, in that unit.
    """
    within = f"{tolerance:g} {unit.removesuffix('s') if tolerance == 1 else unit}"
    columns = {"dice": "Dice", "iou": "IoU", "hd95": f"HD95 ({unit})", "nsd": f"NSD ({within})"}
    shown = {label: scores for label, scores in metrics.items() if label != "mean" or len(metrics) != 2}
    digits = {"hd95": 2}
    rows = [
        [label, *(interval(scores[metric], digits.get(metric, 3)) for metric in columns)]
        for label, scores in shown.items()
    ]
    return ["class", *columns.values()], rows


def score_table(
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    title: str = "",
    unit: str = "mm",
    tolerance: float = 1.0,
) -> Table:
    """The same for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    heading, rows = score_rows(metrics, unit, tolerance)
    table = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for number, name in enumerate(heading):
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold"
        )  # a long name goes on below, for an end that is cut off may be what tells it from the others
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
