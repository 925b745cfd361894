"""Dice, IoU, HD95, ASSD, NSD and volumes, a case and a class at a time, by MONAI's metrics on the images' own spacing.

What is undefined in MONAI is decided here, and never dropped: a structure that is absent from both label maps scores
perfectly; one that only one of them has gets Dice, IoU and NSD 0 and the image's diagonal as its distance; a missing
or unreadable prediction counts as an empty one and as a failure.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from kanseg.data.labels import COUNTED, Labels, class_values
from kanseg.errors import UserError
from kanseg.evaluation.lesions import COUNTS, lesion_counts
from kanseg.files import write_text

METRICS = ("dice", "iou", "hd95", "nsd", "assd")
COLUMNS = (*METRICS, "volume_ml", "reference_volume_ml")
UNIONS = "unions.csv"
RESAMPLES = 2000
TOLERANCE = 1.0
# Scores of what neither label map has.
NOWHERE = {
    "dice": 1.0,
    "iou": 1.0,
    "hd95": 0.0,
    "nsd": 1.0,
    "assd": 0.0,
    "volume_ml": 0.0,
    "reference_volume_ml": 0.0,
}

Label = int | tuple[int, ...]  # the value of a class, or all values of a region


def dice(one: Any, other: Any) -> float:
    """Dice of two masks, arrays or tensors; 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 1.0 if total == 0 else 2 * int((one & other).sum()) / total


def dice_of_values(prediction: np.ndarray, reference: np.ndarray, values: Sequence[int]) -> list[float]:
    """Dice of each value of two label maps without negative numbers, counted in one walk; 1 where it is in neither.

    >>> dice_of_values(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), [1, 2, 3])
    [0.6666666666666666, 0.6666666666666666, 1.0]
    """
    most = max(int(prediction.max(initial=0)), int(reference.max(initial=0)), *values) + 1
    totals, both = np.zeros(most, np.int64), np.zeros(most, np.int64)
    flat = (prediction.ravel(), reference.ravel())
    for start in range(0, prediction.size, COUNTED):  # for counting makes numbers of eight bytes
        ours, theirs = (labels[start : start + COUNTED] for labels in flat)
        for labels in (ours, theirs):
            totals += np.bincount(labels, minlength=most)
        both += np.bincount(ours[ours == theirs], minlength=most)
    return [2 * int(both[v]) / int(totals[v]) if totals[v] else 1.0 for v in values]


def label_dice(prediction: np.ndarray, reference: np.ndarray, labels: Labels) -> list[float]:
    """Dice of each class but the background, of label maps (*S) in the values of the files; regions as wholes."""
    if not labels.regions:
        if labels.ignore_value is not None:
            known = reference != labels.ignore_value
            prediction, reference = prediction[known], reference[known]
        return dice_of_values(prediction, reference, labels.label_values[1:])
    known = reference != labels.ignore_value if labels.ignore_value is not None else np.True_
    return [
        dice(np.isin(prediction, values) & known, np.isin(reference, values) & known)
        for values in class_values(labels).values()
    ]


def evaluate_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    labels: Sequence[Label],
    tolerance: float = TOLERANCE,
    *,
    lesions: bool = False,
) -> dict[Label, dict[str, float]]:
    """Scores of each label value or region.

    Args:
        prediction, reference: label maps (*S), 2D or 3D.
        spacing: mm, one number an axis; ones for pictures, whose lengths are in pixels.
        labels: the values to score; a tuple of values is one region.
        tolerance: of the normalised surface distance (NSD), in mm; of pictures in pixels.

    Returns:
        For each label dice, iou, nsd (0 to 1), hd95 and assd (mm), volume_ml, reference_volume_ml (2D: 1 mm thick).
        The surface of a mask are its voxels with a face (2D: an edge) to another value or to the end of the image;
        distances are those of voxel centres. hd95 is the larger of the two 95th percentiles, of the distances from
        one surface to the other and back; medpy takes one percentile of both together, which lies between them.
        nsd is the share of surface voxels of both that lie within the tolerance, itself
        included; DeepMind's surface-distance weighs pieces of surface by their area, and gives other numbers. assd is
        the mean of the distances of both surfaces together. With `lesions` also `kanseg.evaluation.lesions`' counts.
    """
    if prediction.shape != reference.shape:
        raise UserError(f"Shapes differ: prediction {prediction.shape}, reference {reference.shape}.")
    boxes = [ndimage.find_objects(labels) for labels in (prediction, reference)]  # found in one walk
    scores: dict[Label, dict[str, float]] = {}
    for label in labels:
        values = label if isinstance(label, tuple) else (label,)
        if min(values) > 0:
            found = [box[v - 1] for box in boxes for v in values if v <= len(box) and box[v - 1] is not None]
            box = box_around(found, prediction.shape)
        else:
            box = (slice(None),) * prediction.ndim
        ours, theirs = (np.isin(labels[box], values) for labels in (prediction, reference))
        scores[label] = _score(ours, theirs, spacing, tolerance, prediction.shape)
        if lesions:
            scores[label] |= lesion_counts(ours, theirs)
    return scores


def box_around(boxes: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> tuple[slice, ...]:
    """The box of all boxes with a margin of one voxel: beyond it nothing counts, and distances cost time."""
    if not boxes:
        return (slice(0, 0),) * len(shape)
    return tuple(
        slice(max(0, min(b.start for b in axis) - 1), max(b.stop for b in axis) + 1)
        for axis in zip(*boxes, strict=True)
    )


def _score(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    tolerance: float,
    shape: Sequence[int],
) -> dict[str, float]:
    """Scores of two masks (*S), cut from images of `shape`."""
    voxel = math.prod(spacing) / 1000
    scores = {
        "volume_ml": float(prediction.sum() * voxel),
        "reference_volume_ml": float(reference.sum() * voxel),
    }
    if not prediction.any() and not reference.any():
        return dict(NOWHERE)
    if not prediction.any() or not reference.any():
        diagonal = math.hypot(*(n * s for n, s in zip(shape, spacing, strict=True)))
        return {"dice": 0.0, "iou": 0.0, "hd95": diagonal, "nsd": 0.0, "assd": diagonal, **scores}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's distances call a deprecated option of MONAI
        return {**_overlap_and_distance(prediction, reference, spacing, tolerance), **scores}


def _overlap_and_distance(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Scores of two masks that both hold something."""
    import torch  # here, for both take longer than all that reading tables needs
    from monai.metrics import compute_dice, compute_iou
    from monai.metrics.utils import get_surface_distance

    y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference))
    surfaces = [mask ^ ndimage.binary_erosion(mask) for mask in (prediction, reference)]
    apart = [  # measured once for all scores
        torch.from_numpy(get_surface_distance(one, other, "euclidean", list(spacing)))
        for one, other in (surfaces, surfaces[::-1])
    ]
    return {
        "dice": float(compute_dice(y_pred, y, ignore_empty=False)),
        "iou": float(compute_iou(y_pred, y, ignore_empty=False)),
        "hd95": max(float(torch.quantile(distances, 0.95)) for distances in apart),
        "nsd": float((torch.cat(apart) <= tolerance).sum() / sum(map(len, apart))),
        "assd": float(torch.cat(apart).mean()),
    }


def summarize_rows(
    rows: Sequence[Mapping[str, Any]],
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    aside: Sequence[str] = (),
) -> dict[str, dict[str, dict[str, Any]]]:
    """label -> metric -> {mean, ci95, median, n}; the label "mean" averages the classes of each case first.

    Args:
        aside: labels that this mean leaves out, unless they are all.
        groups: patient of each case; the intervals then draw whole patients, else cases.
    """
    cases = sorted({row["case"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    by_key = {(row["case"], row["label"]): row for row in rows}
    metrics = [m for m in METRICS if all(m in row for row in rows)]  # runs that began before have no ASSD
    columns = {name: [[by_key[case, name][m] for m in metrics] for case in cases] for name in labels}
    counted = [name for name in labels if name not in aside] or labels
    columns["mean"] = np.mean([columns[name] for name in counted], axis=0).tolist()
    _, index = np.unique([(groups or {}).get(case, case) for case in cases], return_inverse=True)
    sizes = np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (RESAMPLES, len(sizes)))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name, column in columns.items():
        values = np.array(column)
        sums = np.zeros((len(sizes), len(metrics)))
        np.add.at(sums, index, values)
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]
        low, high = np.percentile(means, (2.5, 97.5), axis=0)
        summary[name] = {
            metric: {
                "mean": float(values[:, i].mean()),
                "ci95": [float(low[i]), float(high[i])],
                "median": float(np.median(values[:, i])),
                "n": len(cases),
            }
            for i, metric in enumerate(metrics)
        }
    return summary


def bootstrap_interval(values: np.ndarray, groups: Iterable[str], seed: int) -> list[float]:
    """95 % percentile interval of the mean of `values`; whole groups (patients) are drawn."""
    _, index = np.unique(list(groups), return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return np.percentile(means, (2.5, 97.5)).tolist()


def summarize_unions(
    rows: Sequence[Mapping[str, Any]], seed: int = 0, groups: Mapping[str, str] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """As `summarize_rows`, without a mean over what overlaps."""
    found = summarize_rows(rows, seed, groups) if rows else {}
    return {name: scores for name, scores in found.items() if name != "mean"}


def part_rows(
    rows: Sequence[dict[str, Any]], names: Collection[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the classes `names`, and of their unions."""
    return [row for row in rows if row["label"] in names], [row for row in rows if row["label"] not in names]


def write_tables(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], together: Sequence[Mapping[str, Any]]
) -> None:
    """The table of the classes under its name, that of their unions, where there are, beside it."""
    write_text(folder / name, rows_as_csv(rows))
    if together:
        write_text(folder / UNIONS, rows_as_csv(together))


def absent_labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels that are in no reference: where no prediction has them either each case is right, which says nothing."""
    present = {row["label"] for row in rows if row["reference_volume_ml"]}
    return [name for name in dict.fromkeys(row["label"] for row in rows) if name not in present]


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a case and class, as in cases.csv."""
    text = io.StringIO()
    counted = [key for key in COUNTS if rows and key in rows[0]]
    writer = csv.DictWriter(text, ["case", "label", *COLUMNS, *counted], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
