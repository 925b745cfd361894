"""Tables of classifiers: a row an image, a probability a class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kanseg.data.image_classes import CLASSES, SEPARATOR
from kanseg.data.tables import read_rows
from kanseg.errors import UserError
from kanseg.files import SURROGATES, write_text

IMAGE, CLASS, REFERENCE, PATIENT = "image", "class", "reference", "patient"
PREDICTIONS = "predictions.csv"  # of a classifier
PREFIX = "p "  # before the name of a class, over the column of its probabilities
DIGEST = "made_from"  # over the column that tells what a row depends on
THRESHOLD = 0.5  # of the probability of a class of which an image may have several


def write_predictions(
    path: Path,
    ids: Sequence[str],
    probabilities: np.ndarray,
    names: Sequence[str],
    values: Sequence[Sequence[int]] | None = None,
    *,
    multilabel: bool = False,
    more: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """A row an image: its id, the likeliest class, the probabilities, and the true class where it is known; atomically.

    With `multilabel` all classes of a probability from 0.5 on, with `SEPARATOR` between them.

    Args:
        values: numbers of the classes that each image has; none where they are not known.
        more: further columns by name.
    """
    more = more or {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{PREFIX}{name}" for name in names]
    reference = [] if values is None else [REFERENCE]
    writer.writerow([IMAGE, CLASSES if multilabel else CLASS, *columns, *reference, *more])
    for number, (image, row) in enumerate(zip(ids, probabilities, strict=True)):
        said = np.flatnonzero(row >= THRESHOLD) if multilabel else [row.argmax()]
        known = [] if values is None else [_joined(values[number], names)]
        further = [column[number] for column in more.values()]
        writer.writerow([image, _joined(said, names), *(f"{value:.6g}" for value in row), *known, *further])
    return write_text(path, text.getvalue())


def _joined(numbers: Iterable[int], names: Sequence[str]) -> str:
    return SEPARATOR.join(names[number] for number in numbers)


class Predictions(NamedTuple):
    """A table of a classifier: ids, probabilities (N, K), names of the classes, and its rows as they stand there."""

    ids: list[str]
    probabilities: np.ndarray
    names: list[str]
    rows: list[dict[str, str]]

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return CLASSES in self.rows[0]


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` wrote."""
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
    return Predictions([row[IMAGE] for row in rows], values, names, rows)


def is_predictions(path: Path) -> bool:
    """Whether a CSV is a table of a classifier, by its first line; a file that cannot be read is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors=SURROGATES) as file:
            columns = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return False
    return columns[:1] == [IMAGE] and any(column.startswith(PREFIX) for column in columns)


def find_table(path: Path) -> Path | None:
    """The table of a classifier that is given, or lies in a folder."""
    return next((file for file in (path, path / PREDICTIONS) if is_predictions(file)), None)


def find_tables(paths: Sequence[Path]) -> list[Path]:
    """The tables of classifiers, of given ones or folders with one; none where a path is neither."""
    places = [find_table(path) for path in paths]
    return [] if None in places else [place for place in places if place is not None]


def read_made(path: Path) -> tuple[list[str] | None, dict[str, tuple[np.ndarray, str]]]:
    """Classes of a table that is there, and by image its probabilities and what they were made from ("" unknown).

    None in place of the classes: it is no table of `kanseg predict`.
    """
    try:
        ids, probabilities, names, rows = read_predictions(path)
    except UserError:
        return None, {}
    made = (row.get(DIGEST) or "" for row in rows)
    return names, {name: (row, one) for name, row, one in zip(ids, probabilities, made, strict=True)}
