"""Folders of labelled images in the layouts that people have, read into one `Dataset`.

Medical Segmentation Decathlon and nnU-Net (`dataset.json`), `images/` beside `labels/` or `masks/`, a CSV, a MONAI
datalist. What was recognised is said aloud in `layout` and `notes`; nothing is guessed in silence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.images import SUFFIXES_2D, read_image, read_label, stem_of, suffix_of
from kanseg.errors import UserError
from kanseg.progress import progress

CHANNEL = re.compile(r"^(.+)_(\d{4})$")
LABEL_FOLDERS = ("labels", "masks", "labelsTr", "label", "mask")
COLOURS = ("red", "green", "blue")
LAYOUTS = (
    "a folder with dataset.json (Medical Segmentation Decathlon, nnU-Net), a folder with images/ and labels/ (or "
    "masks/), a .csv with the columns image and label, or a datalist .json of MONAI"
)


@dataclass(frozen=True)
class Case:
    """One image: a file with all channels or one a channel; its label, and the patient it belongs to."""

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str


@dataclass(frozen=True)
class Dataset:
    """Labelled cases and what their numbers mean.

    Attributes:
        layout: what was recognised, in words.
        label_names: name of each class; 0 is the background.
        label_values: the value that stands for each class in the label files; training sees 0 ... K - 1.
        cases: with labels. `test_cases`: images alone.
        notes: what was detected or mapped.
        source: what `read_dataset` was given, and id_pattern with it: enough to read the same again.
    """

    name: str
    root: Path
    layout: str
    spatial_dims: int
    channel_names: tuple[str, ...]
    label_names: tuple[str, ...]
    label_values: tuple[int, ...]
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...]
    notes: tuple[str, ...]
    source: Path = Path()
    id_pattern: str | None = None


def read_dataset(path: Path | str, *, id_pattern: str | None = None) -> Dataset:
    """Recognise the layout of a folder or list file and read it.

    Args:
        id_pattern: regular expression with one group that takes the patient from a case's id.

    Raises:
        UserError: nothing recognised, images without labels, values outside the declared set, no cases.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}. Expected: {LAYOUTS}.")
    if path.is_file():
        dataset = _read_csv(path) if path.suffix.lower() == ".csv" else _read_datalist(path, _load_json(path))
    elif (path / "dataset.json").is_file():
        dataset = _read_described(path, _load_json(path / "dataset.json"))
    else:
        dataset = _read_folders(path)
    if not dataset.cases:
        raise UserError(f"{path} holds no labelled images. Expected: {LAYOUTS}.")
    repeated = _repeated(case.id for case in dataset.cases)
    if repeated:
        raise UserError(
            f"{path} has several cases called '{repeated[0]}'. Give every case a name of its own."
        )
    if id_pattern is not None:
        dataset = replace(dataset, cases=tuple(_by_pattern(case, id_pattern) for case in dataset.cases))
    _require_files(dataset)
    return replace(_with_label_values(dataset), source=path.resolve(), id_pattern=id_pattern)


def find_images(path: Path | str) -> list[Case]:
    """Images to predict: a file, a folder of images (`_0000` channels joined), or a folder with a DICOM series.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"There is no {path}. Give an image, a folder of images, or a folder with a DICOM series."
        )
    if path.is_file():
        return [Case(stem_of(path), (path,), None, stem_of(path))]
    cases = _cases_in(path)
    if cases:
        return cases
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    series = [folder for folder in folders if any(_may_be_dicom(p) for p in folder.iterdir())]
    if not series:
        raise UserError(
            f"{path} holds no images. Known are NIfTI, NRRD, MHA, PNG, JPG, TIF, and DICOM series."
        )
    return [Case(folder.name, (folder,), None, folder.name) for folder in series]


def _may_be_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith("."):
        return False
    if suffix_of(path) == ".dcm":
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _cases_in(folder: Path) -> list[Case]:
    """Images directly in a folder, the channels of nnU-Net's `_0000` names joined."""
    files = sorted(
        p for p in folder.iterdir() if p.is_file() and suffix_of(p) not in ("", ".dcm") and p.name[0] != "."
    )
    numbered = [CHANNEL.match(stem_of(p)) for p in files]
    if files and all(numbered) and any(match[2] == "0000" for match in numbered if match):
        channels: dict[str, list[Path]] = {}
        for file, match in zip(files, numbered, strict=True):
            channels.setdefault(match[1] if match else file.stem, []).append(file)
        return [Case(name, tuple(paths), None, name) for name, paths in channels.items()]
    return [Case(stem_of(p), (p,), None, stem_of(p)) for p in files]


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}). Repair it.") from error


def _read_described(root: Path, described: dict[str, Any]) -> Dataset:
    """A folder with dataset.json: the Decathlon's lists its files, nnU-Net's names its labels."""
    if not isinstance(described, dict) or "labels" not in described:
        raise UserError(
            f'{root / "dataset.json"} lacks \'labels\', e.g. {{"0": "background", "1": "organ"}}.'
        )
    names, values = _labels(root, described["labels"])
    channels = described.get("channel_names") or described.get("modality") or {"0": "image"}
    channel_names = tuple(str(channels[key]) for key in sorted(channels, key=int))
    groups = _subjects(described)
    if "training" in described:
        cases = [_listed(root, entry, groups) for entry in described["training"]]
        tests = [_listed(root, entry, groups) for entry in described.get("test", [])]
        layout = "Medical Segmentation Decathlon (dataset.json with a list of files)"
    else:
        cases = _paired(_cases_in(_folder(root, "imagesTr")), _folder(root, "labelsTr"), groups)
        tests = _cases_in(root / "imagesTs") if (root / "imagesTs").is_dir() else []
        layout = "nnU-Net raw (dataset.json, imagesTr with _0000 names, labelsTr)"
    notes = (
        [f"{len(set(groups.values()))} subjects from dataset.json keep their images together"]
        if groups
        else []
    )
    return _dataset(
        str(described.get("name", root.name)), root, layout, cases, tests, channel_names, names, values, notes
    )


def _labels(root: Path, labels: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and values by value: the Decathlon writes {"1": "organ"}, nnU-Net {"organ": 1}."""
    pairs = []
    for key, value in labels.items():
        number, name = (key, value) if str(key).lstrip("-").isdigit() else (value, key)
        if isinstance(number, list):
            raise UserError(
                f"{root / 'dataset.json'}: label '{name}' is a region {number}; overlapping regions are not supported "
                "yet. Give each class one value."
            )
        pairs.append((int(number), str(name)))
    pairs.sort()
    if pairs[0][0] != 0:
        pairs.insert(0, (0, "background"))
    return tuple(name for _, name in pairs), tuple(number for number, _ in pairs)


def _subjects(described: dict[str, Any]) -> dict[str, str]:
    """Case id -> subject, from `subjects` (subject -> ids, or id -> subject)."""
    groups: dict[str, str] = {}
    for key, value in (described.get("subjects") or {}).items():
        if isinstance(value, list):
            groups.update({stem_of(Path(str(case))): str(key) for case in value})
        else:
            groups[stem_of(Path(str(key)))] = str(value)
    return groups


def _listed(root: Path, entry: Any, groups: dict[str, str]) -> Case:
    """One entry of a list: a path, or {"image": path or paths, "label": path}."""
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, dict) or "image" not in entry:
        raise UserError(f"{root}: entry {entry!r} has no 'image'.")
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    paths = tuple(_inside(root, image) for image in images)
    stem = CHANNEL.sub(r"\1", stem_of(paths[0])) if len(paths) > 1 else stem_of(paths[0])
    name = str(entry.get("id") or stem)
    label = _inside(root, entry["label"]) if entry.get("label") else None
    group = entry.get("group") or entry.get("patient") or entry.get("subject") or groups.get(name, name)
    return Case(name, paths, label, str(group))


def _inside(root: Path, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() else root / name


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise UserError(f"{root} has a dataset.json but no folder {name}. Expected: {LAYOUTS}.")
    return root / name


def _paired(cases: Sequence[Case], labels: Path, groups: dict[str, str]) -> list[Case]:
    """Images with the labels of the same name (or name + _mask)."""
    files = {stem_of(p): p for p in sorted(labels.iterdir()) if suffix_of(p) and p.name[0] != "."}
    _refuse_several_masks(cases, files)
    files = {
        **{name.removesuffix(end): p for end in ("_mask", "_label", "_seg") for name, p in files.items()},
        **files,
    }
    paired = [replace(c, label=files.get(c.id), group=groups.get(c.id, c.group)) for c in cases]
    without = [case for case in paired if case.label is None]
    if without:
        raise UserError(
            f"{len(without)} of {len(paired)} images have no label in {labels}, the first is {without[0].images[0]}. "
            f"Expected there: {without[0].id} with the suffix of the labels. Add it, or take the image away."
        )
    return paired


def _refuse_several_masks(cases: Sequence[Case], files: dict[str, Path]) -> None:
    """One label an image: `x_mask` and `x_mask_1` for one x are two."""
    for case in cases:
        pattern = re.compile(re.escape(case.id) + r"(_mask|_label|_seg)?(_\d+)?")
        masks = [path for name, path in files.items() if pattern.fullmatch(name)]
        if len(masks) > 1:
            raise UserError(
                f"{case.images[0]} has {len(masks)} masks ({', '.join(p.name for p in masks)}); one label map an "
                "image is expected. Merge them into one file."
            )


def _read_folders(root: Path) -> Dataset:
    """images/ (or imagesTr/) beside labels/ or masks/; cases.csv beside them may give a group or patient."""
    images = next((root / name for name in ("images", "imagesTr") if (root / name).is_dir()), None)
    labels = next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
    if images is None or labels is None:
        raise UserError(f"{root} has no layout that kanseg knows. Expected: {LAYOUTS}.")
    groups, notes = {}, []
    table = root / "cases.csv"
    if table.is_file():
        rows = _rows(table)
        column = next((c for c in ("group", "patient", "subject") if rows and c in rows[0]), None)
        key = next((c for c in ("id", "case", "image", "name", "file") if rows and c in rows[0]), None)
        if column and key:
            groups = {stem_of(Path(row[key])): row[column] for row in rows}
            notes.append(f"column '{column}' of cases.csv keeps the images of one {column} together")
    cases = _paired(_cases_in(images), labels, groups)
    tests = _cases_in(root / "imagesTs") if (root / "imagesTs").is_dir() else []
    layout = f"folders {images.name}/ and {labels.name}/"
    return _dataset(root.name, root, layout, cases, tests, None, None, None, notes)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}).") from error


def _read_csv(path: Path) -> Dataset:
    rows = _rows(path)
    if not rows or "image" not in rows[0]:
        found = ", ".join(rows[0]) if rows else "an empty file"
        raise UserError(
            f"{path} needs the columns image and label (also image_2, ..., group, id), found: {found}."
        )
    columns = ["image", *sorted(c for c in rows[0] if re.fullmatch(r"image_\d+", c or ""))]
    entries = [{**row, "image": [row[c] for c in columns if row.get(c)]} for row in rows]
    return _listed_dataset(path, "CSV (columns image, label)", entries, [])


def _read_datalist(path: Path, content: Any) -> Dataset:
    if not isinstance(content, dict) or "training" not in content:
        raise UserError(f"{path} is no datalist: it has no 'training' list. Expected: {LAYOUTS}.")
    held_out = content.get("test") or content.get("testing") or []
    entries = [*content["training"], *content.get("validation", [])]
    return _listed_dataset(path, "MONAI datalist (JSON)", entries, held_out)


def _listed_dataset(path: Path, layout: str, entries: Sequence[Any], held_out: Sequence[Any]) -> Dataset:
    cases = [_listed(path.parent, entry, {}) for entry in entries]
    tests = [*(_listed(path.parent, e, {}) for e in held_out), *(c for c in cases if c.label is None)]
    return _dataset(
        path.stem, path.parent, layout, [c for c in cases if c.label], tests, None, None, None, []
    )


def _dataset(
    name: str,
    root: Path,
    layout: str,
    cases: Sequence[Case],
    tests: Sequence[Case],
    channel_names: tuple[str, ...] | None,
    label_names: tuple[str, ...] | None,
    label_values: tuple[int, ...] | None,
    notes: Sequence[str],
) -> Dataset:
    flat = {suffix_of(image) in SUFFIXES_2D for case in cases for image in case.images}
    if len(flat) > 1:
        raise UserError(f"{root} mixes 2D pictures and volumes; give each a data set of its own.")
    if channel_names is None and cases and all(image.exists() for image in cases[0].images):
        count = len(read_image(cases[0].images).array)
        colours = flat == {True} and count == 3
        channel_names = (
            COLOURS if colours else tuple(f"image {i + 1}" if i else "image" for i in range(count))
        )
    return Dataset(
        name,
        root,
        layout,
        2 if flat == {True} else 3,
        channel_names or ("image",),
        label_names or (),
        label_values or (),
        tuple(cases),
        tuple(tests),
        tuple(notes),
    )


def _by_pattern(case: Case, pattern: str) -> Case:
    try:
        match = re.search(pattern, case.id)
        group = match[1] if match else None
    except (re.error, IndexError) as error:
        raise UserError(f"id pattern '{pattern}' needs one group, e.g. '(.+)_left' ({error}).") from error
    if group is None:
        raise UserError(f"id pattern '{pattern}' does not match the case '{case.id}'.")
    return replace(case, group=group)


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _require_files(dataset: Dataset) -> None:
    for case in dataset.cases:
        for path in (*case.images, case.label):
            if path is None or not path.exists():
                raise UserError(f"Case '{case.id}' of {dataset.root} needs {path}, which is not there.")


def _with_label_values(dataset: Dataset) -> Dataset:
    """Look into the label files: which values stand there, and do they fit what is declared."""
    declared = set(dataset.label_values)
    found: set[int] = set()
    cases = dataset.cases
    for case in progress(cases, "Reading labels"):
        values = {int(v) for v in np.unique(read_label(case.label, dataset.spatial_dims))}
        if declared and not values <= declared:
            raise UserError(
                f"{case.label} has the values {sorted(values - declared)[:5]}, which dataset.json does not declare "
                f"(it has {sorted(declared)}). Declare them, or correct the label."
            )
        found |= values
    if declared:
        names = dataset.label_names
        values_in_order = dataset.label_values
    else:
        values_in_order = tuple(sorted(found | {0}))
        names = ("background", *(f"label {value}" for value in values_in_order[1:]))
    notes = list(dataset.notes)
    if len(values_in_order) < 2:
        raise UserError(f"The labels of {dataset.root} hold the background alone; there is nothing to learn.")
    if values_in_order != tuple(range(len(values_in_order))):
        shown = ", ".join(f"{value} -> {i}" for i, value in enumerate(values_in_order))
        notes.append(f"label values are mapped for training ({shown}) and mapped back in every output")
    return replace(dataset, label_names=names, label_values=values_in_order, notes=tuple(notes))
