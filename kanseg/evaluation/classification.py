"""Scores of classifiers, and the tables that they are computed from: a row an image, a probability a class."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc

from kanseg.data.image_classes import CLASSES, SEPARATOR
from kanseg.data.tables import read_rows
from kanseg.errors import UserError
from kanseg.training.files import write_bytes
from kanseg.training.validate import bootstrap_interval

TOP = 5
THRESHOLD = 0.5  # of the probability of a class of which an image may have several
SCORES = ("accuracy", "exact", "top5", "balanced_accuracy", "auc")  # those in one line, where they are
IMAGE, CLASS = "image", "class"
PREFIX = "p "  # before the name of a class, over the column of its probabilities


def as_truth(values: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Which of `count` classes each image has, (N, count) of booleans."""
    truth = np.zeros((len(values), count), bool)
    for row, numbers in zip(truth, values, strict=True):
        row[list(numbers)] = True
    return truth


def class_scores(
    probabilities: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, top-5 accuracy, AUC and the recall of each class, where every image has one.

    Args:
        probabilities: (N, K); classes: (N,) numbers.
        groups: patient of each image; intervals are by patient.

    Returns:
        "images", "accuracy" with its 95 % interval "ci95", "top5" (where there are more classes), "auc" (one class
        against the rest, the mean over the classes that are there; None where one is alone), "balanced_accuracy"
        (mean recall), "recall" by class.
    """
    ranks = np.argsort(-probabilities, axis=1, kind="stable")
    hits = ranks == classes[:, None]
    top1 = hits[:, 0].astype(float)
    recall = {name: float(top1[classes == k].mean()) for k, name in enumerate(names) if (classes == k).any()}
    found = {
        "images": len(classes),
        "accuracy": float(top1.mean()),
        "ci95": _interval(top1, groups, seed),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        "auc": mean_auc(probabilities, classes[:, None] == np.arange(len(names))),
        "recall": recall,
    }
    return {**found, "top5": float(hits[:, :TOP].any(1).mean())} if len(names) > TOP else found


def label_scores(
    probabilities: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores where an image has any number of classes; a class is said to be there from a probability of 0.5 on.

    Args:
        probabilities, groups: as in `class_scores`.
        truth: which classes each image has, (N, K).

    Returns:
        "images", "accuracy" (share of right answers, over images and classes) with its 95 % interval "ci95", "exact"
        (share of images with all answers right), "auc" (mean over the classes that some images have and some have
        not), "classes": {"auc", "accuracy", "images" that have it} of each.
    """
    right = (probabilities >= THRESHOLD) == truth
    areas = class_aucs(probabilities, truth)
    each = zip(names, areas, right.mean(0), truth.sum(0), strict=True)
    return {
        "images": len(truth),
        "accuracy": float(right.mean()),
        "ci95": _interval(right.mean(1), groups, seed),
        "exact": float(right.all(1).mean()),
        "auc": mean_auc(probabilities, truth),
        "classes": {
            name: {
                "auc": None if np.isnan(area) else float(area),
                "accuracy": float(share),
                "images": int(count),
            }
            for name, area, share, count in each
        },
    }


def score_values(
    probabilities: np.ndarray,
    values: Sequence[Sequence[int]],
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    seed: int = 0,
    *,
    multilabel: bool = False,
) -> dict[str, Any]:
    """`class_scores`, or with `multilabel` `label_scores`, of images whose classes have these numbers."""
    if multilabel:
        return label_scores(probabilities, as_truth(values, len(names)), names, groups, seed)
    return class_scores(probabilities, np.array([one[0] for one in values]), names, groups, seed)


def _interval(right: np.ndarray, groups: Sequence[str] | None, seed: int) -> Any:
    return bootstrap_interval(right, groups or [str(i) for i in range(len(right))], seed)


def class_aucs(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, (K,); NaN where all images or none have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's, on classes that are not there
        areas = compute_roc_auc(
            torch.from_numpy(probabilities), torch.from_numpy(truth).long(), average="none"
        )
    return np.asarray(areas, dtype=float).reshape(-1)


def mean_auc(probabilities: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean of `class_aucs` over the classes that have one; None where none has."""
    areas = class_aucs(probabilities, truth)
    known = areas[~np.isnan(areas)]
    return float(known.mean()) if len(known) else None


def predictions_as_csv(
    ids: Sequence[str],
    probabilities: np.ndarray,
    names: Sequence[str],
    values: Sequence[Sequence[int]] | None = None,
    *,
    multilabel: bool = False,
) -> str:
    """A row an image: its id, the likeliest class, the probabilities, and the true class where it is known.

    With `multilabel` all classes of a probability from 0.5 on, with `SEPARATOR` between them.

    Args:
        values: numbers of the classes that each image has; none where they are not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{PREFIX}{name}" for name in names]
    reference = [] if values is None else ["reference"]
    writer.writerow([IMAGE, CLASSES if multilabel else CLASS, *columns, *reference])
    for number, (image, row) in enumerate(zip(ids, probabilities, strict=True)):
        said = np.flatnonzero(row >= THRESHOLD) if multilabel else [row.argmax()]
        known = [] if values is None else [_joined(values[number], names)]
        writer.writerow([image, _joined(said, names), *(f"{value:.6g}" for value in row), *known])
    return text.getvalue()


def _joined(numbers: Iterable[int], names: Sequence[str]) -> str:
    return SEPARATOR.join(names[number] for number in numbers)


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """What `predictions_as_csv` wrote: ids, probabilities (N, K), names of the classes."""
    rows = read_rows(path)
    names = [column[len(PREFIX) :] for column in rows[0] if column.startswith(PREFIX)] if rows else []
    if not names or IMAGE not in rows[0]:
        raise UserError(
            f"{path} is no table of `kanseg predict`: it needs the columns image and '{PREFIX}CLASS'."
        )
    try:
        values = np.array([[float(row[f"{PREFIX}{name}"]) for name in names] for row in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a probability that is no number ({error}). Predict again.") from error
    return [row[IMAGE] for row in rows], values, names


def evaluate_classes(
    prediction: Path, reference: Path, out: Path | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Score a table of `kanseg predict` against the classes of a data set; pairs by the ids of the images.

    Args:
        reference: a table (image, class), or any data set with classes.
        out: folder for summary.json.

    Returns:
        As `class_scores` or `label_scores`, and "without_reference", the images that are not scored.

    Raises:
        UserError: no image in common, a class that the classifier does not know, or one class an image in one of them
            and any number in the other.
    """
    from kanseg.data.image_classes import read_classes
    from kanseg.training.files import make_folder, write_json

    ids, probabilities, names = read_predictions(prediction)
    dataset = read_classes(reference)
    cases = {case.id: case for case in (*dataset.cases, *dataset.test_cases)}
    known = [number for number, name in enumerate(ids) if name in cases]
    if not known:
        raise UserError(
            f"No image of {prediction} is in {reference}: {ids[:2]} there, {list(cases)[:2]} here. Give the data set "
            "that was predicted."
        )
    several = CLASSES in read_rows(prediction)[0]
    if several != dataset.multilabel:
        kinds = {True: "any number of classes", False: "one class"}
        raise UserError(
            f"{prediction} says {kinds[several]} an image, and {reference} has {kinds[dataset.multilabel]}."
        )
    found = [[dataset.label_names[value] for value in cases[ids[i]].values] for i in known]
    if foreign := sorted(set().union(*found) - set(names)):
        raise UserError(
            f"{reference} has classes that the classifier does not know: {', '.join(foreign[:5])}."
        )
    values = [[names.index(name) for name in one] for one in found]
    patients = [cases[ids[i]].group for i in known]
    scores = score_values(probabilities[known], values, names, patients, seed, multilabel=several)
    scores["without_reference"] = [name for name in ids if name not in cases]
    if out is not None:
        write_json(make_folder(Path(out)) / "summary.json", scores)
    return scores


def write_predictions(
    path: Path,
    ids: Sequence[str],
    probabilities: np.ndarray,
    names: Sequence[str],
    values: Sequence[Sequence[int]] | None = None,
    *,
    multilabel: bool = False,
) -> Path:
    """Write `predictions_as_csv`, atomically."""
    text = predictions_as_csv(ids, probabilities, names, values, multilabel=multilabel)
    return write_bytes(path, text.encode())


def score_lines(scores: Mapping[str, Any]) -> str:
    """The scores in one line."""
    low, high = scores["ci95"]
    words = [f"{scores['images']} images: accuracy {scores['accuracy']:.4f} [{low:.4f}, {high:.4f}]"]
    words += [f"{name} {scores[name]:.4f}" for name in SCORES[1:] if scores.get(name) is not None]
    return ", ".join(words)
