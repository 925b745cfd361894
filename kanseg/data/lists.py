"""Data sets that are lists: a CSV, a MONAI datalist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kanseg.data.cases import LAYOUTS, Case, Dataset, as_dataset, few, require_file_name
from kanseg.data.listing import channel_of
from kanseg.data.suffixes import stem_of, suffix_of
from kanseg.data.tables import (
    PARTS,
    TABLES,
    TEST,
    TRAIN,
    VAL,
    columns_named,
    folds_of,
    group_columns,
    group_in,
    part_of,
    read_rows,
    told,
)
from kanseg.errors import UserError

COLUMNS = {  # of a list, and what else they may be called
    "image": ("image", "imagepath", "imagefile", "filename", "filepath", "file", "path"),
    "label": ("label", "mask", "labelpath", "maskpath", "labelfile", "maskfile"),
    **{name: (name,) for name in ("id", "fold", "split")},
}
LISTED = ("training", "validation", "test", "testing")  # lists of a datalist
LISTS = (*TABLES, ".json")  # suffixes of a data set that is a file


def _entries(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise UserError(f"{file}: '{key}' must be a list of images, found {type(entries).__name__}.")
    return entries


def _listed(root: Path, entry: Any, groups: dict[str, str]) -> Case:
    """One entry of a list: a path, or {"image": path or paths, "label": path}."""
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{root}: entry {entry!r} is neither a path nor has it an 'image' and a 'label'.")
    images = entry.get("image")
    images = images if isinstance(images, list) else [images]
    label = entry.get("label")
    if not images or not all(isinstance(i, str) and i for i in images) or not isinstance(label, str | None):
        raise UserError(
            f"{root}: entry {entry} needs a path (or a list of paths) as 'image', and one as 'label'."
        )
    paths = tuple(_inside(root, image) for image in images)
    numbered = channel_of(paths[0]) if len(paths) > 1 else None
    name = str(entry["id"]) if told(entry.get("id")) else numbered[0] if numbered else stem_of(paths[0])
    if told(entry.get("id")):
        require_file_name(name)
    group = group_in(entry, group_columns(entry)) or groups.get(name, name)
    return Case(name, paths, _inside(root, label) if label else None, str(group))


def _inside(root: Path, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() else root / name


def are_paths(cells: Iterable[str], root: Path) -> bool:
    """Whether cells of a table name images or label maps, by their endings or as they lie in `root`.

    A folder counts where each cell names another, as of series; else it is rather that of a class.
    """
    cells = list(filter(None, cells))
    found = set(cells)
    there = os.path.exists if len(found) == len(cells) else os.path.isfile  # no error for a long text
    return any(suffix_of(Path(cell)) or there(_inside(root, cell)) for cell in found)


def read_csv(path: Path) -> Dataset:
    rows = read_rows(path)
    found = [(name, columns_named(rows[0] if rows else (), *names)) for name, names in COLUMNS.items()]
    columns = {named[0]: name for name, named in found if named}
    if not {"image", "label"} <= set(columns.values()):
        there = ", ".join(rows[0]) if rows else "no row"
        raise UserError(
            f"{path} needs the columns image and label (also image_2, ..., group, id, fold, split), found: {there}."
        )
    further = [c for c in rows[0] if c.lower().startswith("image_") and not columns_named([c], "imageid")]
    further = [column for column in further if column not in columns]
    numbers = {column: int(column[6:]) for column in further if column[6:].isdecimal()}
    unread = [c for c in further if c not in numbers and not are_paths((r[c] for r in rows), path.parent)]
    notes = [f"the columns {', '.join(unread)} name no images and are not read"] if unread else []
    named = [column for column in further if column not in {*numbers, *unread}]
    channels = ["image", *sorted(numbers, key=lambda column: numbers[column]), *named]
    lists: dict[str, list[Any]] = {TRAIN: [], VAL: [], TEST: []}
    for row in ({columns.get(column, column): cell for column, cell in row.items()} for row in rows):
        entry = {**row, "image": [row[channel] for channel in channels if row.get(channel)]}
        lists[part_of(row.get("split"), path)].append(entry)
    return _listed_dataset(path, "CSV (columns image, label)", lists, notes)


def read_datalist(path: Path, content: Any) -> Dataset:
    if not isinstance(content, dict) or "training" not in content:
        raise UserError(f"{path} is no datalist: it has no 'training' list. Expected: {LAYOUTS}.")
    return _listed_dataset(
        path, "MONAI datalist (JSON)", lists_by_part(path, content), note_on_unread(content)
    )


def lists_by_part(file: Path, content: dict[str, Any]) -> dict[str, list[Any]]:
    """The entries of a datalist by part."""
    lists: dict[str, list[Any]] = {TRAIN: [], VAL: [], TEST: []}
    for key in LISTED:
        lists[PARTS[key]] += _entries(file, content, key)
    return lists


def note_on_unread(content: dict[str, Any]) -> list[str]:
    """A note on lists of images that have other names than those that are read."""
    images = [
        key
        for key, some in content.items()
        if key not in LISTED
        and isinstance(some, list)
        and any(isinstance(e, dict) and "image" in e for e in some)
    ]
    return [f"the lists {', '.join(images)} are not read; known are {', '.join(LISTED)}"] if images else []


def cases_of_lists(
    root: Path, lists: Mapping[str, Sequence[Any]], groups: dict[str, str]
) -> tuple[list[Case], list[Case], Sequence[Mapping[str, Sequence[str]]], list[str]]:
    """Cases, test cases and folds of lists by part, and what is to be said of the folds."""
    training, validation, tests = (
        [_listed(root, entry, groups) for entry in lists[part]] for part in (TRAIN, VAL, TEST)
    )
    cases, entries = [*training, *validation], [*lists[TRAIN], *lists[VAL]]
    without = [case for case in validation if case.label is None]
    numbers = [entry.get("fold") if isinstance(entry, dict) else None for entry in entries]
    fold_of = {case.id: number for case, number in zip(cases, numbers, strict=True) if case.label}
    folds, notes = folds_of(fold_of, {case.id for case in validation if case.label})
    cases = [*training, *(case for case in validation if case.label)]
    return cases, [*tests, *without], folds, [*notes, *_without_label(without)]


def _without_label(cases: Sequence[Case]) -> list[str]:
    """A note on images of a list that have none."""
    shown = few([case.id for case in cases], 3)
    return [f"{len(cases)} images of the list have no label and are not trained on: {shown}"] if cases else []


def _listed_dataset(
    path: Path, layout: str, lists: Mapping[str, Sequence[Any]], notes: Sequence[str]
) -> Dataset:
    cases, tests, folds, said = cases_of_lists(path.parent, lists, {})
    without = [case for case in cases if case.label is None]
    labelled, said = [case for case in cases if case.label], [*notes, *said, *_without_label(without)]
    dataset = as_dataset(path.stem, path.parent, layout, labelled, [*tests, *without], None, said)
    return replace(dataset, splits=tuple(folds))
