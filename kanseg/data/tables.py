"""Tables and lists of images: their columns however they are spelt, and what they say of patients, parts and folds."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kanseg.errors import UserError
from kanseg.progress import note

TABLES = (".csv", ".tsv")  # suffixes
TRAIN, VAL, TEST = "train", "val", "test"
PARTS = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL}
PARTS |= {"test": TEST, "testing": TEST}
FOLDS_ASIDE = "folds are left aside, for not every labelled case has a whole number, or all have the same"
Fold = dict[str, list[str]]
_told: set[Path] = set()  # tables of which it was said how they are read


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a header, parted by commas, semicolons or tabs; columns without a name are left out.

    Raises:
        UserError: unreadable, two columns of one name, or a row with more cells than there are columns.
    """
    lines = io.StringIO(text_of(path), newline="")
    heading = next(filter(str.strip, lines), "")
    lines.seek(0)
    delimiter = max("\t;,", key=heading.count)
    rows = csv.reader(lines, delimiter=delimiter)
    try:
        columns = next(([cell.strip() for cell in cells] for cells in rows if any(map(str.strip, cells))), [])
        if twice := sorted({column for column in columns if column and columns.count(column) > 1}):
            raise UserError(f"{path} has several columns called '{twice[0]}'. Give each a name of its own.")
        found = []
        for cells in rows:
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise UserError(
                    f"{path} has {len(cells)} cells in line {rows.line_num}, and {len(columns)} columns. Put "
                    f"quotes around a cell that holds a {delimiter!r}."
                )
            padded = zip(columns, [*cells, *[""] * len(columns)], strict=False)
            if any(cell.strip() for cell in cells):
                found.append({column: cell.strip() for column, cell in padded if column})
        return found
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV ({error}).") from error


def text_of(path: Path) -> str:
    """The text of a table in UTF-8, in UTF-16 with its mark, or in Windows-1252, which is then said.

    Raises:
        UserError: no such file, or no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if encoding == "cp1252" and path not in _told:
            _told.add(path)
            note(
                f"{path} is no UTF-8; it is read as Windows-1252. Where letters are wrong, save it as UTF-8."
            )
        return text
    raise UserError(
        f"{path} is no text in UTF-8, UTF-16 with its mark, or Windows-1252. Save the table as CSV in UTF-8."
    )


def columns_named(columns: Iterable[Any], *names: str) -> list[str]:
    """The columns of those names, in their order, whatever capitals, blanks and signs the columns have.

    >>> columns_named(["Image ID", "Class", "class_2"], "class", "imageid")
    ['Class', 'Image ID']
    """
    plain: dict[str, str] = {}
    for column in map(str, columns):
        plain.setdefault(re.sub(r"[\W_]", "", column.lower()), column)
    return [plain[name] for name in names if name in plain]


def group_columns(columns: Iterable[Any], *more: str) -> list[str]:
    """The columns of a table that say whose image it is: group, patient, Patient_ID, subject, ... or one of `more`.

    A column Group may well be that of a study; only one that is called just group, kanseg's own word, is taken.
    """
    columns = list(columns)
    own = ["group"] if "group" in columns else []
    return own + columns_named(columns, "patient", "patientid", "subject", "subjectid", *more)


def group_in(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """What the first of the columns that says something says; 0 is something."""
    return next((str(row[column]).strip() for column in columns if told(row.get(column))), "")


def told(value: Any) -> bool:
    """Whether a cell or an entry says anything."""
    return value is not None and str(value).strip() != ""


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ by capitals, blanks, signs or leading zeros alone, those of one kind together.

    >>> alike(["Pat-007", "pat7", "pat70", "7_1", "71"])
    [['Pat-007', 'pat7']]
    """
    spelt: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(set(names)):
        text = unicodedata.normalize("NFKC", name).casefold()
        parts = re.findall(r"\d+|[^\W\d_]+", text)
        spelt.setdefault(tuple(part.lstrip("0") or "0" for part in parts) or (text,), []).append(name)
    return [found for found in spelt.values() if len(found) > 1]


def part_of(word: Any, source: Path) -> str:
    """What a column split says: `TRAIN` (also where it says nothing), `VAL` or `TEST`."""
    part = PARTS.get(str(word).strip().lower()) if told(word) else TRAIN
    if part is None:
        raise UserError(
            f"{source}: split '{word}' is none of train, val, test. Correct it; folds stand in a column fold."
        )
    return part


def folds_of(numbers: Mapping[str, Any], validation: Collection[str]) -> tuple[tuple[Fold, ...], list[str]]:
    """The folds of a list, and a note on them: those that its cases are numbered by, else one for its own validation.

    Args:
        numbers: what each labelled case says of its fold, None or "" for nothing.
        validation: cases that the list validates on.
    """
    fold_of = {case: _whole(number) for case, number in numbers.items()}
    found = sorted({number for number in fold_of.values() if number is not None})
    if len(found) > 1 and None not in fold_of.values():
        folds = [_fold(numbers, {c for c, own in fold_of.items() if own == number}) for number in found]
        among = any(set(fold[VAL]) == set(validation) for fold in folds) or not validation
        beside = "" if among else f", and its {len(validation)} validation cases are parted as they say"
        return tuple(folds), [f"{len(folds)} folds, those of the list{beside}"]
    numbered = any(map(told, numbers.values()))
    own = _fold(numbers, validation)
    if all(own.values()):
        note = f"one fold, which validates on the {len(own[VAL])} validation cases of the list"
        return (own,), [f"{note}; its {FOLDS_ASIDE}" if numbered else note]
    if validation and len(validation) == len(numbers):
        return (), ["the list has nothing but validation cases; splits are made by patient"]
    return (), [f"the list's {FOLDS_ASIDE}; splits are made by patient"] if numbered else []


def _fold(cases: Iterable[str], held_out: Collection[str]) -> Fold:
    return {TRAIN: [c for c in cases if c not in held_out], VAL: [c for c in cases if c in held_out]}


def _whole(value: Any) -> int | None:
    """A number of a fold; None for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None
