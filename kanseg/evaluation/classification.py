"""Scores of classifiers, and the tables that they are computed from: a row an image, a probability a class."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc

from kanseg.data.formats import read_rows
from kanseg.errors import UserError
from kanseg.training.files import write_bytes
from kanseg.training.validate import bootstrap_interval

TOP = 5
IMAGE, CLASS = "image", "class"
PREFIX = "p "  # before the name of a class, over the column of its probabilities


def class_scores(
    probabilities: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, top-5 accuracy, AUC and the recall of each class.

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
        "ci95": bootstrap_interval(top1, groups or [str(i) for i in range(len(top1))], seed),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        "auc": mean_auc(probabilities, classes),
        "recall": recall,
    }
    return {**found, "top5": float(hits[:, :TOP].any(1).mean())} if len(names) > TOP else found


def mean_auc(probabilities: np.ndarray, classes: np.ndarray) -> float | None:
    """Area under the ROC curve of each class against the rest, the mean over the classes that are there."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(classes).long(), probabilities.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's, on classes that are not there
        areas = compute_roc_auc(torch.from_numpy(probabilities), one_hot, average="none")
    known = np.asarray(areas)[~np.isnan(areas)]
    return float(known.mean()) if len(known) else None


def predictions_as_csv(
    ids: Sequence[str], probabilities: np.ndarray, names: Sequence[str], classes: Sequence[int] | None = None
) -> str:
    """A row an image: its id, the likeliest class, the probabilities, and the true class where it is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [IMAGE, CLASS, *(f"{PREFIX}{name}" for name in names), *(["reference"] if classes else [])]
    )
    for number, (name, row) in enumerate(zip(ids, probabilities, strict=True)):
        known = [names[classes[number]] if classes[number] >= 0 else ""] if classes else []
        writer.writerow([name, names[int(row.argmax())], *(f"{value:.6g}" for value in row), *known])
    return text.getvalue()


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


def reference_classes(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Class and patient of each image, both by its id: of a table (image, class) or any data set with classes."""
    from kanseg.data.image_classes import read_classes

    dataset = read_classes(path)
    cases = (*dataset.cases, *dataset.test_cases)
    classes = {case.id: dataset.label_names[case.values[0]] for case in cases}
    return classes, {case.id: case.group for case in cases}


def evaluate_classes(
    prediction: Path, reference: Path, out: Path | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Score a table of `kanseg predict` against the classes of a data set; pairs by the ids of the images.

    Args:
        out: folder for summary.json.

    Returns:
        As `class_scores`, and "without_reference", the images that are not scored.

    Raises:
        UserError: no image in common, or a class that the classifier does not know.
    """
    from kanseg.training.files import make_folder, write_json

    ids, probabilities, names = read_predictions(prediction)
    classes, groups = reference_classes(reference)
    known = [number for number, name in enumerate(ids) if name in classes]
    if not known:
        raise UserError(
            f"No image of {prediction} is in {reference}: {ids[:2]} there, {list(classes)[:2]} here. Give the data set "
            "that was predicted."
        )
    foreign = sorted({classes[ids[i]] for i in known} - set(names))
    if foreign:
        raise UserError(
            f"{reference} has classes that the classifier does not know: {', '.join(foreign[:5])}."
        )
    numbers = np.array([names.index(classes[ids[i]]) for i in known])
    patients = [groups[ids[i]] for i in known]
    scores = class_scores(probabilities[known], numbers, names, patients, seed)
    found = {**scores, "without_reference": [name for name in ids if name not in classes]}
    if out is not None:
        write_json(make_folder(Path(out)) / "summary.json", found)
    return found


def write_predictions(
    path: Path,
    ids: Sequence[str],
    probabilities: np.ndarray,
    names: Sequence[str],
    classes: Sequence[int] | None = None,
) -> Path:
    """Write `predictions_as_csv`, atomically."""
    return write_bytes(path, predictions_as_csv(ids, probabilities, names, classes).encode())


def score_lines(scores: Mapping[str, Any]) -> str:
    """The scores in one line."""
    low, high = scores["ci95"]
    words = [f"{scores['images']} images: accuracy {scores['accuracy']:.4f} [{low:.4f}, {high:.4f}]"]
    words += [
        f"{name} {scores[name]:.4f}"
        for name in ("top5", "balanced_accuracy", "auc")
        if scores.get(name) is not None
    ]
    return ", ".join(words)
