"""Dice, IoU, HD95, ASSD, NSD and volumes, a case and a class at a time, by MONAI's metrics on the images' own spacing.

What is undefined in MONAI is decided here, and never dropped: a structure that is absent from both label maps scores
perfectly; one that only one of them has gets Dice, IoU and NSD 0 and the image's diagonal as its distance; a missing
or unreadable prediction counts as an empty one and as a failure.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice, compute_iou
from monai.metrics.utils import get_surface_distance
from scipy import ndimage

from kanseg.data.beside import is_beside
from kanseg.data.cases import few, repeated
from kanseg.data.class_names import called, shared_names
from kanseg.data.colours import BLACK, colour_names, label_colours, numbered, require_classes
from kanseg.data.dicom import is_structures
from kanseg.data.images import CONVERSION, Image, check_pair, colour_name, label_from, read_image
from kanseg.data.labels import COUNTED, Labels, class_values, unions, value_counts
from kanseg.data.listing import image_files, segmentations_in
from kanseg.data.plan import Plan
from kanseg.data.segmentations import read_segments, require_highdicom
from kanseg.data.suffixes import SEGMENTS, SUFFIXES_2D, SUFFIXES_DICOM, stem_of, suffix_of
from kanseg.data.unlabelled import find_images, labels_in_case_folders
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.lesions import COUNTS, lesion_counts, summarize_lesions
from kanseg.files import make_folder, write_json, write_text
from kanseg.progress import progress

METRICS = ("dice", "iou", "hd95", "nsd", "assd")
COLUMNS = (*METRICS, "volume_ml", "reference_volume_ml")
UNIONS = "unions.csv"
RESAMPLES = 2000
TOLERANCE = 1.0
ENDINGS = ("_mask", "_label", "_seg")
MOST_ALONE = 100  # values that one side alone has; grey values of an image are more
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
ALIKE = 0.5  # share of equal neighbours, of which label maps have more


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
    y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference))
    surfaces = [mask ^ ndimage.binary_erosion(mask) for mask in (prediction, reference)]
    apart = [  # measured once for both scores
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


def label_options(text: str | None) -> dict[str, Any]:
    """Options of `evaluate_folders` from "1,2", from "tumour=1,edema=2", or from a run folder or its plan.json.

    >>> label_options("1,edema=2,whole=1+2")
    {'labels': {'label 1': 1, 'edema': 2, 'whole': (1, 2)}}
    """
    if text is None:
        return {}
    pairs = [part.rpartition("=") for part in text.split(",")]
    if twice := repeated(name.strip() for name, equals, _ in pairs if equals):
        raise UsageError(
            f"Labels '{text}' name {', '.join(twice)} twice. Give every class a name of its own."
        )
    if all(re.fullmatch(r"\d+(\+\d+)*", value.strip()) for _, _, value in pairs):
        return {
            "labels": {name.strip() or f"label {value.strip()}": _label(value) for name, _, value in pairs}
        }
    path = Path(text)
    if not path.exists():
        raise UsageError(f"Labels '{text}' are not of the form 1,2 or name=1,name=2, nor a run folder.")
    return options_of(Plan.load(_plan_file(path)))


def options_of(labels: Labels) -> dict[str, Any]:
    """Options of `evaluate_folders` for the classes of a plan: labels, their unions and segments, what to ignore."""
    values = class_values(labels)
    return {
        "labels": {name: found if len(found) > 1 else found[0] for name, found in values.items()},
        "unions": unions(labels),
        "segments": dict(zip(values, labels.label_values[1:], strict=True)),
        "ignore": labels.ignore_value,
    }


def _plan_file(path: Path) -> Path:
    """The plan that a file or a run folder stands for; of `kanseg run` the first, for all have the same classes."""
    if not path.is_dir():
        return path
    plans = sorted(path.glob("*/plan.json")) if (path / "run.json").is_file() else []
    return plans[0] if plans else path / "plan.json"


def _label(text: str) -> Label:
    values = tuple(int(value) for value in text.split("+"))
    return values if len(values) > 1 else values[0]


def evaluate_folders(
    prediction: Path | str,
    reference: Path | str,
    out: Path | str | None = None,
    *,
    labels: Mapping[str, Label] | None = None,
    unions: Mapping[str, tuple[int, ...]] | None = None,
    segments: Mapping[str, int] | None = None,
    ignore: int | None = None,
    tolerance: float = TOLERANCE,
    lesions: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Score a folder of label maps (or one file) against its references; pairs by file name without suffix.

    A prediction that is missing or unreadable counts as an empty one and as a failure. Predictions may be DICOM-SEG,
    RTSTRUCT or .seg.nrrd; they are laid on the grids of the references, which are label maps.

    Args:
        out: folder for cases.csv (a row a case and class), unions.csv (the like, where there are) and summary.json.
        labels: name -> value (or values, of a region) of the classes to score; default every value but 0 in the
            references and predictions.
        unions: name -> values of structures that are scored beside the classes and are no part of the mean.
        segments: name -> value of the segments of such files; default the `labels` that have one value.
        ignore: value in the references of voxels that do not count.
        lesions: count connected pieces, too, see `kanseg.evaluation.lesions`.

    Returns:
        The summary: mean, median and 95 % bootstrap interval of the mean of each metric, a class and over classes
        ("metrics"), a union ("unions"), lesions of each ("lesions"), with the failed cases.

    Raises:
        UserError: nothing to score, a reference that cannot be read, label maps on different grids (all such cases are
            looked for), images in place of label maps, or segmentations without `labels` or `segments`.
    """
    if segmentations_in(Path(reference)):
        raise UserError(
            f"{reference} holds {SEGMENTS}; references are label maps. {CONVERSION}, in its labelsTr."
        )
    references = _label_maps(Path(reference))
    single = {name: value for name, value in (labels or {}).items() if isinstance(value, int)}
    predictions, read = _predictions(Path(prediction), segments or single)
    references = _called_alike(references, predictions)
    predictions = _called_alike(predictions, references)
    if Path(prediction).is_file() and Path(reference).is_file():
        predictions = dict(zip(references, predictions.values(), strict=True))
    failures = {name: "no prediction" for name in references if name not in predictions}
    paired = [path for name, path in predictions.items() if name in references]
    sides = {reference: list(references.values()), prediction: paired}
    known = colour_names(Path(reference), Path(reference).parent, Path(prediction))
    by_colour = bool(single) and all(name[:1] == "#" or name in known.values() for name in single)
    colours = {side: label_colours(paths, coded=by_colour) for side, paths in sides.items()}
    coded = dict[Path | str, dict[int, int]]()
    if any(colours.values()):
        if not labels and all(colours.values()):  # they are numbered among themselves
            every = sorted(set[int]().union(*colours.values()) - {BLACK})
            labels = single = {known.get(code, colour_name(code)): n for n, code in enumerate(every, start=1)}
        values = segments or single
        coded = {side: _colour_values(side, codes, values, known) for side, codes in colours.items()}
    together = dict(unions or {})
    scores: dict[str, dict[Label, dict[str, float]]] = {}
    elsewhere: list[str] = []
    found: dict[Path | str, set[int]] = {side: set() for side in sides}  # values, where no classes are given
    palette: dict[int, int] = {}
    for case, path in progress(references.items(), "Scoring"):
        target = read_image(path)
        truth = _labels_in(target, coded.get(reference))
        if not coded.get(reference):
            require_classes(target, palette)
        guess = np.zeros_like(truth)
        if case not in failures:
            try:
                image = read(predictions[case], target)
                guess = _labels_in(image, coded.get(prediction))
            except UserError as error:
                failures[case] = str(error)
            else:
                elsewhere += _apart(target, image)
        wanted: Collection[Label] = list((labels or {}).values())
        if not labels:
            maps = {reference: truth} | ({} if case in failures else {prediction: guess})
            own = {side: set(value_counts(label)) for side, label in maps.items()}
            found |= {side: found[side] | values for side, values in own.items()}
            for side, label in maps.items():
                _refuse_image(side, label, found)
            wanted = set[int]().union(*own.values()) - {0}
        if elsewhere:  # there is nothing to score, but there may be more of them
            continue
        if ignore is not None:
            guess, truth = (np.where(truth == ignore, 0, array) for array in (guess, truth))
        wanted = [*wanted, *together.values()]
        scores[case] = evaluate_case(guess, truth, target.spacing, wanted, tolerance, lesions=lesions)
    every = sorted(set[int]().union(*found.values()) - {0})
    classes = labels or _called(every, sides.values())
    names = {name: value for name, value in classes.items() if value != ignore}
    if not names:
        raise UserError(f"{reference} holds the background alone; there is nothing to score. Give --labels.")
    if elsewhere:
        raise UserError(
            f"{len(elsewhere)} of {len(references)} cases lie elsewhere: {' '.join(elsewhere[:5])}"
        )
    nowhere = NOWHERE | (dict.fromkeys(COUNTS, 0) if lesions else {})
    scored = [
        {"case": case, "label": name, **by_label.get(value, nowhere)}
        for case, by_label in scores.items()
        for name, value in {**names, **together}.items()
    ]
    rows, union_rows = part_rows(scored, names)
    surplus = sorted(set(predictions) - set(references))
    absent = absent_labels(rows) if labels else []  # else a prediction has it, and that counts
    unit = "pixels" if suffix_of(target.path) in SUFFIXES_2D else "mm"
    summary = {
        "cases": len(references),
        "failed": failures,
        "predictions_without_reference": surplus,
        "labels": dict(names),
        "absent": absent,
        "unit": unit,
        f"nsd_tolerance_{unit}": tolerance,
        "interval": f"95 % bootstrap interval of the mean over cases, {RESAMPLES} resamples, seed {seed}",
        "metrics": summarize_rows(rows, seed, aside=absent),
        "unions": summarize_unions(union_rows, seed),
    }
    if lesions:
        drawn = np.random.default_rng(seed).integers(0, len(references), (RESAMPLES, len(references)))
        summary["lesions"] = summarize_lesions(scored, drawn)
    if out is not None:
        folder = make_folder(Path(out))
        write_tables(folder, "cases.csv", rows, union_rows)
        write_json(folder / "summary.json", summary)
    return summary


def _colour_values(
    side: Path | str, colours: Sequence[int], values: Mapping[str, int], names: Mapping[int, str]
) -> dict[int, int]:
    """Value of each colour of the label maps of one side, {} where they are numbers.

    Args:
        values: of classes, by the names of colours in `names` or as the web writes them.
    """
    if not colours:
        return {}
    found = {code: values.get(names.get(code, ""), values.get(colour_name(code))) for code in colours}
    found[BLACK] = 0
    if missing := [colour_name(code) for code, value in found.items() if value is None]:
        example = ",".join(f"{name}={number}" for number, name in enumerate(missing[:2], start=1))
        raise UserError(
            f"{side} has the colours {few(missing, 5)}, and the other side numbers. Say which number each has: "
            f"--labels with the folder of a run that was trained on such labels, or '{example},...'."
        )
    return {code: value for code, value in found.items() if value is not None}


def _labels_in(image: Image, coded: Mapping[int, int] | None) -> np.ndarray:
    """The label map in an image, whose classes may be told by colours."""
    return numbered(image, coded) if coded else label_from(image)


Reader = Callable[[Path, Image], Image]  # of a prediction, beside its reference


def _predictions(prediction: Path, segments: Mapping[str, int]) -> tuple[dict[str, Path], Reader]:
    """Label maps by name, or DICOM-SEG, RTSTRUCT and .seg.nrrd where there are some, and how they are read."""
    files = segmentations_in(prediction)
    if not files:
        return _label_maps(prediction) if _any(prediction) else {}, lambda path, _: read_image(path)
    if prediction.is_dir() and (others := [p.name for p in image_files(prediction) if not is_beside(p)]):
        raise UserError(
            f"{prediction} holds {SEGMENTS} and label maps ({few(others, 3)}). Give one kind at a time."
        )
    if not segments:
        raise UserError(
            f"{prediction} is {SEGMENTS}, whose segments have names and no values. Say which value of the "
            "references each has: --labels with the run folder, or name=1,name=2."
        )
    if any(suffix_of(file) in SUFFIXES_DICOM and not is_structures(file) for file in files):
        require_highdicom(prediction)
    return {_stem(stem_of(path)): path for path in files}, partial(_laid_on, segments)


def _label_maps(path: Path) -> dict[str, Path]:
    """Label maps by name, each file for itself: one numbered _0000 may be the frame of a video."""
    files = [file for file in image_files(path) if not is_beside(file)] if path.is_dir() else []
    if path.is_dir() and not files and (labels := labels_in_case_folders(path)):
        return labels
    if not files:
        return {_stem(case.id): case.images[0] for case in find_images(path)}
    return {_stem(stem_of(file)): file for file in files}


def _called_alike(maps: Mapping[str, Path], others: Mapping[str, Path]) -> dict[str, Path]:
    """Label maps, those called as their images are (x_0000) without that number where the other side has x."""
    short = {name: name.removesuffix("_0000") for name in maps}
    return {
        short[name] if name not in others and short[name] in others else name: path
        for name, path in maps.items()
    }


def _laid_on(segments: Mapping[str, int], path: Path, target: Image) -> Image:
    """A DICOM-SEG, RTSTRUCT or .seg.nrrd as a label map on the grid of another one."""
    values = np.array([0, *segments.values()])
    return replace(target, array=values[read_segments(path, target, list(segments))][None], path=path)


def _apart(one: Image, other: Image) -> list[str]:
    """What parts two images that should lie on one grid, if anything."""
    try:
        check_pair(one, other)
    except UserError as error:
        return [str(error)]
    return []


def _any(folder: Path) -> bool:
    """Whether there is any prediction at all: an empty folder is a folder of failures, a missing one a mistake."""
    return not folder.is_dir() or any(path.is_file() for path in folder.iterdir())


def _stem(name: str) -> str:
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name


def _called(values: Sequence[int], sides: Iterable[Sequence[Path]]) -> dict[str, Label]:
    """Names of values: those that the headers of label maps tell, the references' first, or numbers."""
    told: dict[int, str] = {}
    for paths in sides:
        told = shared_names(paths)[0] | told
    return dict(zip(called(values, told), values, strict=True))


def _refuse_image(side: Path | str, label: np.ndarray, found: Mapping[Path | str, set[int]]) -> None:
    """Raise `UserError` where one side has many values, few of them are the other's, and this one is an image."""
    shared, values = set.intersection(*found.values()), found[side]
    many = all(found.values()) and len(values - shared) > max(MOST_ALONE, len(shared))
    if many and _changes_everywhere(label):
        raise UserError(
            f"{side} has {len(values)} different values, the other side {len(shared)} of them: are these images "
            "instead of label maps? Give the folder of label maps, or name the classes by --labels."
        )


def _changes_everywhere(label: np.ndarray) -> bool:
    """Whether neighbours differ more often than not, as in an image; within a structure labels are all alike."""
    inside = (label[1:] != 0) & (label[:-1] != 0)
    return bool(inside.any()) and float((label[1:] == label[:-1])[inside].mean()) < ALIKE


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
