"""Scores of classifiers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import entr

from kanseg.data.image_classes import SEPARATOR
from kanseg.errors import UserError
from kanseg.evaluation.class_tables import (
    PATIENT,
    REFERENCE,
    THRESHOLD,
    read_predictions,
    write_predictions,
)
from kanseg.evaluation.metrics import bootstrap_interval
from kanseg.files import make_folder, write_json

TOP = 5
AREAS = 500  # resamples of an AUC
MOST_RANKED = 2_000_000  # probabilities from which on that takes too long
SCORES = ("accuracy", "exact", "top5", "balanced_accuracy", "auc")  # those in one line, where they are
CASES = "cases.csv"  # of an evaluation


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
        (mean recall), "recall" by class, and "classes": {"images", "recall", "precision", "auc"} of each, None where
        there is nothing to tell it by.
    """
    ranks = np.argsort(-probabilities, axis=1, kind="stable")
    hits = ranks == classes[:, None]
    top1 = hits[:, 0].astype(float)
    truth = classes[:, None] == np.arange(len(names))
    recall = {name: float(top1[classes == k].mean()) for k, name in enumerate(names) if (classes == k).any()}
    found = {
        "images": len(classes),
        "accuracy": float(top1.mean()),
        "ci95": _interval(top1, groups, seed),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        "auc": mean_auc(probabilities, truth),
        "recall": recall,
        "classes": class_rows(probabilities, truth, names),
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
        not), "classes": {"images" that have it, "accuracy", "recall", "precision", "auc"} of each.
    """
    right = (probabilities >= THRESHOLD) == truth
    rows = class_rows(probabilities, truth, names, multilabel=True)
    return {
        "images": len(truth),
        "accuracy": float(right.mean()),
        "ci95": _interval(right.mean(1), groups, seed),
        "exact": float(right.all(1).mean()),
        "auc": mean_auc(probabilities, truth),
        "classes": {
            name: {**rows[name], "accuracy": float(share)}
            for name, share in zip(names, right.mean(0), strict=True)
        },
    }


def answers(probabilities: np.ndarray, *, multilabel: bool = False) -> np.ndarray:
    """Which classes are said of each image, (N, K) of booleans: the likeliest, or all from a probability of 0.5 on."""
    if multilabel:
        return probabilities >= THRESHOLD
    return np.asarray(probabilities.argmax(1)[:, None] == np.arange(probabilities.shape[1]))


def class_rows(
    probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str], *, multilabel: bool = False
) -> dict[str, dict[str, Any]]:
    """Of each class "images", "recall", "precision" and "auc"; None where there is nothing to tell it by."""
    truth = truth.astype(bool)
    said, areas = answers(probabilities, multilabel=multilabel), class_aucs(probabilities, truth)
    right, there, claimed = (said & truth).sum(0), truth.sum(0), said.sum(0)
    return {
        name: {
            "images": int(there[k]),
            "recall": float(right[k] / there[k]) if there[k] else None,
            "precision": float(right[k] / claimed[k]) if claimed[k] else None,
            "auc": None if np.isnan(areas[k]) else float(areas[k]),
        }
        for k, name in enumerate(names)
    }


def score_intervals(
    probabilities: np.ndarray,
    truth: np.ndarray,
    groups: Sequence[str],
    seed: int = 0,
    *,
    multilabel: bool = False,
) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the scores of `SCORES` that there are; whole groups (patients) are drawn.

    The AUC is that of weighted images; it has no interval where there are more than `MOST_RANKED` probabilities.
    """
    images, classes = truth.shape
    said = answers(probabilities, multilabel=multilabel)
    right = said == truth
    means = {"accuracy": right.mean(1) if multilabel else right.all(1).astype(float)}
    if multilabel:
        means["exact"] = right.all(1).astype(float)
    elif classes > TOP:
        ranks = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        means["top5"] = np.take_along_axis(truth, ranks, 1).any(1).astype(float)
    found = {name: bootstrap_interval(values, groups, seed) for name, values in means.items()}
    _, index = np.unique(list(groups), return_inverse=True)
    count, generator = int(index.max()) + 1, np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {"balanced_accuracy": [], "auc": []}
    ranked = images * classes <= MOST_RANKED
    orders = [np.argsort(column, kind="stable") for column in probabilities.T] if ranked else []
    for _ in range(AREAS):
        weight = np.bincount(generator.integers(0, count, count), minlength=count)[index].astype(float)
        if not multilabel:
            there = weight @ truth
            recalls = (weight @ (said & truth))[there > 0] / there[there > 0]
            drawn["balanced_accuracy"].append(float(recalls.mean()))
        areas = (
            [_weighted_auc(*column, weight) for column in zip(probabilities.T, truth.T, orders, strict=True)]
            if ranked
            else []
        )
        if known := [area for area in areas if area is not None]:
            drawn["auc"].append(float(np.mean(known)))
    return found | {
        name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in drawn.items() if values
    }


def _weighted_auc(
    chances: np.ndarray, truth: np.ndarray, order: np.ndarray, weight: np.ndarray
) -> float | None:
    """Area under the ROC curve of images that count `weight` times; ties count half. None where a side is empty."""
    chances, truth, weight = chances[order], truth[order], weight[order]
    _, tie = np.unique(chances, return_inverse=True)
    ours, theirs = np.bincount(tie, weight * truth), np.bincount(tie, weight * ~truth)
    total = ours.sum() * theirs.sum()
    below = np.cumsum(theirs) - theirs / 2
    return float(ours @ below / total) if total else None


def confusion(probabilities: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """Images by true class (row) and said class (column), (K, K)."""
    found = np.bincount(classes * count + probabilities.argmax(1), minlength=count * count)
    return np.asarray(found.reshape(count, count))


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
    import torch
    from monai.metrics import compute_roc_auc

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


@dataclass
class Scored:
    """Predicted images whose classes are known: `values` are their numbers in `names`, `groups` the patients."""

    ids: list[str]
    probabilities: np.ndarray
    names: list[str]
    values: list[tuple[int, ...]]
    groups: list[str]
    multilabel: bool = False

    @property
    def truth(self) -> np.ndarray:
        """Which classes each image has, (N, K) of booleans."""
        return as_truth(self.values, len(self.names))

    def scores(self, seed: int = 0) -> dict[str, Any]:
        """As `score_values`, with the "intervals" of its scores."""
        how: dict[str, Any] = {"multilabel": self.multilabel}
        found = score_values(self.probabilities, self.values, self.names, self.groups, seed, **how)
        return found | {
            "intervals": score_intervals(self.probabilities, self.truth, self.groups, seed, **how)
        }

    def write(self, path: Path, more: Mapping[str, Sequence[Any]] | None = None) -> Path:
        """See `write_predictions`; with the column patient."""
        more = {PATIENT: self.groups, **(more or {})}
        how: dict[str, Any] = {"multilabel": self.multilabel, "more": more}
        return write_predictions(path, self.ids, self.probabilities, self.names, self.values, **how)


def read_scored(path: Path) -> Scored:
    """A table that knows the true classes: of a training's held-out images, or what `Scored.write` wrote."""
    table = read_predictions(path)
    ids, probabilities, names, rows = table
    if REFERENCE not in rows[0]:
        raise UserError(
            f"{path} does not tell the true classes. Score it first: kanseg evaluate {path} DATA -o SCORES."
        )
    several = table.multilabel
    said = [[*filter(None, row[REFERENCE].split(SEPARATOR))] if several else [row[REFERENCE]] for row in rows]
    if foreign := sorted({name for one in said for name in one} - set(names)):
        raise UserError(f"{path} has the class '{foreign[0]}', which has no column of probabilities.")
    values = [tuple(names.index(name) for name in one) for one in said]
    groups = [row.get(PATIENT) or name for name, row in zip(ids, rows, strict=True)]
    return Scored(ids, probabilities, names, values, groups, several)


def entropy(probabilities: np.ndarray, *, multilabel: bool = False) -> np.ndarray:
    """Shannon's of each row (N, K) -> (N,), 0 where one class is certain, 1 where all are alike.

    With `multilabel` the largest of the classes, of which each is there or not.
    """
    if multilabel:
        both = np.stack([probabilities, 1 - probabilities])
        return np.asarray(entr(both).sum(0).max(1) / np.log(2))
    return np.asarray(entr(probabilities).sum(1) / np.log(probabilities.shape[1]))


def evaluate_classes(
    prediction: Path, reference: Path, out: Path | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Score a table of `kanseg predict` against the classes of a data set; pairs by the ids of the images.

    Args:
        reference: a table (image, class), or any data set with classes.
        out: folder for summary.json and cases.csv, which is the table with the true classes.

    Returns:
        As `Scored.scores`, "without_reference", the images that are not scored, and "without_prediction", those of the
        reference (of its test images where only such were predicted) that the table lacks.

    Raises:
        UserError: no image in common, a class that the classifier does not know, or one class an image in one of them
            and any number in the other.
    """
    from kanseg.data.image_classes import read_classes

    table = read_predictions(prediction)
    ids, probabilities, names, _ = table
    dataset = read_classes(reference)
    cases = {case.id: case for case in (*dataset.cases, *dataset.test_cases)}
    known = [number for number, name in enumerate(ids) if name in cases]
    if not known:
        raise UserError(
            f"No image of {prediction} is in {reference}: {ids[:2]} there, {list(cases)[:2]} here. Give the data set "
            "that was predicted."
        )
    several = table.multilabel
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
    values = [tuple(names.index(name) for name in one) for one in found]
    patients = [cases[ids[i]].group for i in known]
    scored = Scored([ids[i] for i in known], probabilities[known], names, values, patients, several)
    scores = scored.scores(seed)
    scores["without_reference"] = [name for name in ids if name not in cases]
    predicted = set(ids)
    part = dataset.test_cases if predicted.isdisjoint(c.id for c in dataset.cases) else cases.values()
    scores["without_prediction"] = [case.id for case in part if case.id not in predicted]
    if out is not None:
        write_json(make_folder(Path(out)) / "summary.json", scores)
        scored.write(Path(out) / CASES)
    return scores


def score_lines(scores: Mapping[str, Any]) -> str:
    """The scores in one line."""
    shown = (f"{name} {score}" for name, score in shown_scores(scores).items())
    return f"{scores['images']} images: {', '.join(shown)}"


def shown_scores(scores: Mapping[str, Any], digits: int = 4) -> dict[str, str]:
    """Each score of `SCORES` that there is, as mean [95 % interval] where that is known."""
    limits = {"accuracy": scores["ci95"], **scores.get("intervals", {})}
    found = {}
    for name in SCORES:
        if scores.get(name) is not None:
            between = ", ".join(f"{limit:.{digits}f}" for limit in limits.get(name, ()))
            found[name] = f"{scores[name]:.{digits}f}{f' [{between}]' if between else ''}"
    return found


def shown_classes(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table of the classes."""
    columns = [
        key
        for key in ("recall", "precision", "accuracy", "auc")
        if key in next(iter(scores["classes"].values()))
    ]
    rows = [
        [
            name,
            str(row["images"]),
            *("-" if row[key] is None else f"{row[key]:.3f}" for key in columns),
        ]
        for name, row in scores["classes"].items()
    ]
    return ["class", "images", *(key.upper() if key == "auc" else key for key in columns)], rows
