"""Scores of a folder of label maps against its references: a table, and a summary with intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.cases import repeated
from kanseg.data.class_names import called, shared_names
from kanseg.data.images import Image, check_pair
from kanseg.data.labels import Labels, class_values, unions, value_counts
from kanseg.data.plan import Plan
from kanseg.data.suffixes import SUFFIXES_2D, suffix_of
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.lesions import COUNTS, summarize_lesions
from kanseg.evaluation.metrics import (
    NOWHERE,
    RESAMPLES,
    TOLERANCE,
    Label,
    absent_labels,
    evaluate_case,
    part_rows,
    summarize_rows,
    summarize_unions,
    write_tables,
)
from kanseg.evaluation.pairs import Pairs, pair_files
from kanseg.files import make_folder, write_json
from kanseg.progress import progress

MOST_ALONE = 100  # values that one side alone has; grey values of an image are more
ALIKE = 0.5  # share of equal neighbours, of which label maps have more
Scores = dict[str, dict[Label, dict[str, float]]]  # of each case and class


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
    sides = Path(reference), Path(prediction)
    pairs = pair_files(*sides, labels or {}, segments or {})
    scores, failures, values = _scored(pairs, sides, unions or {}, ignore, tolerance, lesions)
    classes = pairs.classes or _called(values, (list(pairs.references.values()), pairs.paired))
    names = {name: value for name, value in classes.items() if value != ignore}
    if not names:
        raise UserError(f"{reference} holds the background alone; there is nothing to score. Give --labels.")
    nowhere = NOWHERE | (dict.fromkeys(COUNTS, 0) if lesions else {})
    scored = [
        {"case": case, "label": name, **by_label.get(value, nowhere)}
        for case, by_label in scores.items()
        for name, value in {**names, **(unions or {})}.items()
    ]
    rows, union_rows = part_rows(scored, names)
    absent = absent_labels(rows) if pairs.classes else []  # else a prediction has it, and that counts
    unit = "pixels" if all(suffix_of(path) in SUFFIXES_2D for path in pairs.references.values()) else "mm"
    summary = {
        "cases": len(scores),
        "failed": failures,
        "predictions_without_reference": sorted(set(pairs.predictions) - set(pairs.references)),
        "labels": dict(names),
        "absent": absent,
        "unit": unit,
        f"nsd_tolerance_{unit}": tolerance,
        "interval": f"95 % bootstrap interval of the mean over cases, {RESAMPLES} resamples, seed {seed}",
        "metrics": summarize_rows(rows, seed, aside=absent),
        "unions": summarize_unions(union_rows, seed),
    }
    if lesions:
        drawn = np.random.default_rng(seed).integers(0, len(scores), (RESAMPLES, len(scores)))
        summary["lesions"] = summarize_lesions(scored, drawn)
    if out is not None:
        folder = make_folder(Path(out))
        write_tables(folder, "cases.csv", rows, union_rows)
        write_json(folder / "summary.json", summary)
    return summary


def _scored(
    pairs: Pairs,
    sides: tuple[Path, Path],
    together: Mapping[str, tuple[int, ...]],
    ignore: int | None,
    tolerance: float,
    lesions: bool,
) -> tuple[Scores, dict[str, str], list[int]]:
    """Scores of every case, why some have no prediction, and the values in all of them where no classes are given."""
    scores: Scores = {}
    failures: dict[str, str] = {}
    elsewhere: list[str] = []
    found: tuple[set[int], set[int]] = (set(), set())  # values of each side
    for case in progress(pairs.references, "Scoring"):
        truth, target = pairs.reference(case)
        maps = [truth]
        try:
            guess, image = pairs.prediction(case, target)
        except UserError as error:
            failures[case] = str(error)
            guess = np.zeros_like(truth)
        else:
            maps.append(guess)
            elsewhere += _apart(target, image)
        wanted = list(pairs.classes.values()) or _values_in(maps, found, sides)
        if elsewhere:  # there is nothing to score, but there may be more of them
            continue
        if ignore is not None:
            guess, truth = (np.where(truth == ignore, 0, array) for array in (guess, truth))
        wanted += together.values()
        scores[case] = evaluate_case(guess, truth, target.spacing, wanted, tolerance, lesions=lesions)
    if elsewhere:
        count = f"{len(elsewhere)} of {len(pairs.references)} cases lie elsewhere"
        raise UserError(f"{count}: {' '.join(elsewhere[:5])}")
    return scores, failures, sorted(set.union(*found) - {0})


def _values_in(maps: Sequence[np.ndarray], found: Sequence[set[int]], sides: Sequence[Path]) -> list[Label]:
    """Values of a case but the background; those of each side are added to `found`, and an image is refused."""
    own = [set(value_counts(label)) for label in maps]
    for values, new in zip(found, own, strict=False):
        values |= new
    for number, label in enumerate(maps):
        _refuse_image(sides[number], label, found[number], found[1 - number])
    return list(set[int]().union(*own) - {0})


def _apart(one: Image, other: Image) -> list[str]:
    """What parts two images that should lie on one grid, if anything."""
    try:
        check_pair(one, other)
    except UserError as error:
        return [str(error)]
    return []


def _called(values: Sequence[int], sides: Iterable[Sequence[Path]]) -> dict[str, Label]:
    """Names of values: those that the headers of label maps tell, the references' first, or numbers."""
    told: dict[int, str] = {}
    for paths in sides:
        told = shared_names(paths)[0] | told
    return dict(zip(called(values, told), values, strict=True))


def _refuse_image(side: Path, label: np.ndarray, values: set[int], others: set[int]) -> None:
    """Raise `UserError` where one side has many values, few of them are the other's, and this one is an image."""
    shared = values & others
    many = bool(others) and len(values - shared) > max(MOST_ALONE, len(shared))
    if many and _changes_everywhere(label):
        raise UserError(
            f"{side} has {len(values)} different values, the other side {len(shared)} of them: are these images "
            "instead of label maps? Give the folder of label maps, or name the classes by --labels."
        )


def _changes_everywhere(label: np.ndarray) -> bool:
    """Whether neighbours differ more often than not, as in an image; within a structure labels are all alike."""
    inside = (label[1:] != 0) & (label[:-1] != 0)
    return bool(inside.any()) and float((label[1:] == label[:-1])[inside].mean()) < ALIKE


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
