"""Images with classes, in the layouts that such data have: folders, tables and arrays, read into one data set.

Folders: a folder a class, of pictures or, below train/, val/ and test/ (ImageNet), also of volumes; Tiny ImageNet's.
Tables: HAM10000's metadata, any CSV with the columns image and class (or label), or classes, of which an image may have
several.
Arrays (`kanseg.data.class_arrays`): MNIST's idx files, CIFAR-10 and -100 (binary or python version), MedMNIST's npz in
2D and 3D. No code that lies in a file is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.cases import COLOURS, Case, Dataset, by_pattern, few, noted, patient_notes, repeated
from kanseg.data.class_arrays import Found, find_arrays
from kanseg.data.digests import file_digest
from kanseg.data.images import read_image
from kanseg.data.layouts import beside_masks, with_masks
from kanseg.data.listing import IMAGE_FOLDERS, LABEL_FOLDERS, image_files, only
from kanseg.data.lists import are_paths
from kanseg.data.suffixes import SUFFIXES_2D, SUFFIXES_SEGMENTS, stem_of, suffix_of
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
)
from kanseg.errors import UsageError, UserError

SEGMENTATION = {
    name.lower() for name in (*LABEL_FOLDERS, *IMAGE_FOLDERS)
}  # names of folders that hold no class
CLASSES = "classes"
# Headings of tables, whatever their capitals, blanks and signs.
IMAGE_COLUMNS = "image imageid imageindex imagename imagepath filename filepath file path".split()
CLASS_COLUMNS = ("class", "dx", "diagnosis", "target", "label")
SEVERAL_COLUMNS = (CLASSES, "labels", "findinglabels")
SEPARATOR = "|"  # between the classes of one image
SEPARATORS = re.compile(r"[|;]")  # that tables of others have
HAM10000 = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "nevus",
    "vasc": "vascular lesion",
}
LAYOUTS = (
    "a folder a class (of volumes below train/, also val/, test/), Tiny ImageNet, HAM10000 (metadata and images), a "
    ".csv or .tsv with the columns image and class (or label; or classes, with | between them), MNIST's idx files, "
    "CIFAR's binary or python version, or MedMNIST's .npz"
)


@dataclass(frozen=True)
class ImageClasses(Dataset):
    """Images with a class each; a case's `values` are the number of its class, in the order of `label_names`.

    With `multilabel` an image has any number of classes, also none.

    `cases` are for training and validation; `test_cases` have their class too, and nothing is chosen by them.

    Attributes:
        arrays: images (N, *S) or (N, *S, C) by part, where they lie in no files of their own; a case's id is then
            PART-NUMBER.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    multilabel: bool = False

    @property
    def sources(self) -> Sequence[Case]:
        """What the files are digested by: arrays as a whole, else the cases."""
        return [Case(path.name, (path,), None, "") for path in self.files] or self.cases

    def read(self, case: Case) -> np.ndarray:
        """The image of a case as it is stored, (C, *S)."""
        part, _, number = case.id.rpartition("-")
        if part not in self.arrays:
            return read_image(case.images, self.spatial_dims).array
        image = self.arrays[part][int(number)]
        return image[None] if image.ndim == self.spatial_dims else np.moveaxis(image, -1, 0)


def is_classes(path: Path | str) -> bool:
    """Whether images with classes are recognised there, by names and a look at some pictures of a few folders."""
    return _recognised(Path(path)) is not None


def require_label_maps(path: Path | str) -> None:
    """Raise `UsageError` for images with classes, where label maps are needed."""
    if is_classes(path):
        raise UsageError(
            f"{path} has a class for each image, no label maps; `kanseg doctor`, `run`, `plan` and `train` are for it."
        )


def read_classes(path: Path | str, *, id_pattern: str | None = None) -> ImageClasses:
    """Recognise the layout and list the images; arrays are read now, images in files when they are asked for.

    Args:
        id_pattern: regular expression with one group that takes the patient from an image's id.

    Raises:
        UserError: nothing recognised, damaged files, a class without images, or labels that are no classes.
    """
    path = Path(path)
    read = _recognised(path)
    if read is None:
        why = "There is no such file or folder" if not path.exists() else "No layout was recognised"
        raise UserError(f"{path} holds no images with classes: {why}. Expected: {LAYOUTS}.")
    dataset = read()
    if len(dataset.label_names) < 2 and not dataset.multilabel:
        raise UserError(f"{path} has one class, {dataset.label_names}; there is nothing to tell apart.")
    if id_pattern is not None:
        dataset = by_pattern(dataset, id_pattern)
    dataset = noted(dataset, *patient_notes(dataset.cases, dataset.test_cases))
    return replace(dataset, source=path.resolve(), id_pattern=id_pattern)


def _recognised(path: Path) -> Callable[[], ImageClasses] | None:
    """What reads the layout that is found there."""
    for find, read in READERS:
        if found := find(path):
            return partial(read, path, found)
    return None


def _class_folders(path: Path) -> list[Path]:
    """Folders of images directly below, each a class; none where the names say that it is something else."""
    if not path.is_dir() or (path / "dataset.json").exists():
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if any(folder.name.lower() in SEGMENTATION for folder in folders):
        return []
    return [folder for folder in folders if image_files(folder)]


def _part_folders(path: Path) -> dict[str, Path]:
    """train/ and the like with class folders below, by part."""
    called: dict[str, list[Path]] = {}
    for folder in sorted(p for p in path.glob("*/") if p.name.lower() in PARTS):
        called.setdefault(PARTS[folder.name.lower()], []).append(folder)
    classes = [below for folder in called.get(TRAIN, ()) for below in _class_folders(folder)]
    if len(classes) < 2 or with_masks(classes) or beside_masks(classes):
        return {}
    return {part: only(list(filter(_class_folders, all_))) or all_[0] for part, all_ in called.items()}


def _picture_folders(path: Path) -> dict[str, Path]:
    """Class folders without train/ above: of pictures alone, as folders of volumes are rather those of patients."""
    folders = _class_folders(path)
    pictures = [suffix_of(image_files(folder)[0]) in SUFFIXES_2D for folder in folders]
    masks = with_masks(folders) or beside_masks(folders)
    return {"train": path} if len(folders) > 1 and all(pictures) and not masks else {}


def _read_folders(path: Path, parts: Mapping[str, Path]) -> ImageClasses:
    names = [folder.name for folder in _class_folders(parts["train"])]
    cases = {part: list(_folder_cases(folder, names)) for part, folder in parts.items()}
    if "val" in parts and not cases["val"]:
        raise UserError(
            f"{parts['val']} has no class folders. Sort its images into the folders {', '.join(names[:3])}, ... as in "
            f"{parts['train']}, or take it away."
        )
    notes = [said for folder in parts.values() for said in _passed_over(folder)]
    return make(path, "a folder a class", names, cases, notes)


def _passed_over(folder: Path) -> list[str]:
    """Notes on what lies beside the class folders and is not read."""
    classes = {found.name for found in _class_folders(folder)}
    others = sorted({p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."} - classes)
    loose, where = len(image_files(folder)), folder.name
    why = "hold no images themselves, or are called images or masks,"
    notes = [f"folders of {where} that {why} are no classes: {few(others, 3)}"] * bool(others)
    return notes + [f"{loose} images of {where} lie in no folder of a class and are not used"] * bool(loose)


def _folder_cases(folder: Path, names: Sequence[str]) -> Iterable[Case]:
    for below in _class_folders(folder):
        if below.name not in names:
            raise UserError(f"{below} is a class that is not in train/. Known: {', '.join(list(names)[:8])}.")
        for file in image_files(below):
            name = f"{folder.name}/{below.name}/{stem_of(file)}"
            yield Case(name, (file,), None, name, (names.index(below.name),))


def _tiny_imagenet(path: Path) -> Path | None:
    wanted = ("wnids.txt", "train", "val/val_annotations.txt")
    roots = (path, path / "tiny-imagenet-200")  # the archive has one folder
    return next((root for root in roots if all((root / name).exists() for name in wanted)), None)


def _read_tiny_imagenet(path: Path, root: Path) -> ImageClasses:
    """train/WNID/images/*.JPEG and a table of val/images; test/ has no classes and is not used."""
    names = (root / "wnids.txt").read_text(encoding="utf-8").split()
    rows = [line.split("\t") for line in (root / "val/val_annotations.txt").read_text("utf-8").splitlines()]
    words = _words(root / "words.txt")
    train = [
        (file, names.index(name)) for name in names for file in image_files(root / "train" / name / "images")
    ]
    val = [(root / "val" / "images" / row[0], names.index(row[1])) for row in rows if len(row) > 1]
    cases = {
        part: [Case(f"{part}/{stem_of(f)}", (f,), None, f"{part}/{stem_of(f)}", (n,)) for f, n in found]
        for part, found in (("train", train), ("val", val))
    }
    return make(path, "Tiny ImageNet", [words.get(name, name) for name in names], cases)


def _words(path: Path) -> dict[str, str]:
    """WordNet id -> its first word and the id, where there is the table."""
    if not path.is_file():
        return {}
    rows = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {key: f"{words.partition(',')[0]} ({key})" for key, _, words in rows}


def _tables(path: Path) -> list[Path]:
    """Tables of images and classes: the file itself, or those beside them (cases.csv, HAM10000's metadata)."""
    if any((path / name).is_dir() for name in LABEL_FOLDERS):
        return []
    known = path.parent if path.is_file() else path
    found, beside = [], [known / "cases.csv", *sorted(known.glob("HAM10000_metadata*"))]
    for file in [path] if path.is_file() else beside:
        ending = file.suffix.lower()
        if file.is_file() and (ending in TABLES or (file in beside and ending in ("", ".tab", ".txt"))):
            rows = read_rows(file)
            if rows and columns_named(rows[0], *IMAGE_COLUMNS) and _class_column(rows, file.parent):
                if file == path / "cases.csv" and with_masks([path, *path.rglob("*")]):  # one of patients
                    return []
                found.append(file)
    return found


def _class_column(rows: Sequence[Mapping[str, str]], root: Path) -> str | None:
    """The column of the class, or of the classes; none where one of them names the label maps of the images."""
    found = columns_named(rows[0], *CLASS_COLUMNS, *SEVERAL_COLUMNS)
    if any(are_paths((row[column] for row in rows), root) for column in found):
        return None
    for column in columns_named(found, "label"):
        if len({row[column] for row in rows}) == len(rows):  # rather label maps that are not there
            found.remove(column)
    return found[0] if found else None


def _read_table(path: Path, tables: Sequence[Path]) -> ImageClasses:
    table = tables[0]
    if len(set(map(file_digest, tables))) > 1:
        raise UserError(
            f"{path} has several tables of images and classes, {few([file.name for file in tables])}. Give the one "
            f"that counts in place of the folder, e.g. {table}, or take the others away."
        )
    rows = read_rows(table)
    key, kind = columns_named(rows[0], *IMAGE_COLUMNS)[0], _class_column(rows, table.parent) or ""
    id_, split, fold = ((columns_named(rows[0], name) or [""])[0] for name in ("id", "split", "fold"))
    groups, root = group_columns(rows[0], "lesionid"), table.parent
    files: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        if suffix_of(file) not in ("", *SUFFIXES_SEGMENTS):
            files.setdefault(stem_of(file), []).append(file)
    shown = HAM10000 if columns_named([kind], "dx") else {}
    several = bool(columns_named([kind], *SEVERAL_COLUMNS))
    of_row = [split_classes(row[kind]) if several else [row[kind]] for row in rows]
    if empty := [row[key] for row, found in zip(rows, of_row, strict=True) if not several and not found[0]]:
        raise UserError(f"{table} names no class for {few(empty, 3)}. Fill it in, or take the row out.")
    classes = sorted(set().union(*of_row))
    _require_single(classes, several, kind, table)
    if twice := repeated(row[key] for row in rows):
        raise UserError(
            f"{table} has several rows for the image '{twice[0]}'. Give it one; several classes of an image stand in a "
            f"column {CLASSES}, with {SEPARATOR} between them."
        )
    fold_of: dict[str, str] = {}
    cases: dict[str, list[Case]] = {TRAIN: []}
    for row, found in zip(rows, of_row, strict=True):
        exact = root / row[key]
        fitting = [exact] if exact.is_file() else files.get(stem_of(exact), [])
        if not fitting:
            raise UserError(
                f"{table} names the image '{row[key]}', which is not in {root}. Add it, or take the row out."
            )
        fitting = [file for file in fitting if file.name == exact.name] or fitting
        if len(fitting) > 1 and len(set(map(file_digest, fitting))) > 1:
            names = few([str(file.relative_to(root)) for file in fitting])
            raise UserError(
                f"{table} names the image '{row[key]}', and {root} has {names}. Name it by its path there."
            )
        file = fitting[0]
        part = part_of(row.get(split), table)
        name = row.get(id_) or stem_of(file)
        patient = group_in(row, groups) or name
        values = tuple(sorted(classes.index(one) for one in found))
        cases.setdefault(part, []).append(Case(name, (file,), None, patient, values))
        if part != TEST:
            fold_of[name] = row.get(fold, "")
    layout = "HAM10000" if shown else "a table of images and classes"
    notes = [f"column '{groups[0]}' keeps the images of one {groups[0]} together"] if groups else []
    folds, said = folds_of(fold_of, {case.id for case in cases.get(VAL, ())})
    dataset = make(path, layout, [shown.get(name, name) for name in classes], cases, [*notes, *said])
    return replace(dataset, multilabel=several, splits=folds)


def _require_single(classes: Sequence[str], several: bool, column: str, table: Path) -> None:
    """Raise `UserError` where a class is rather several, with a sign between them."""
    for name in classes:
        if not several and SEPARATORS.search(name):
            raise UserError(
                f"{table} has '{name}' in its column {column}, which holds one class an image. Call the column "
                f"{CLASSES} where an image may have several."
            )
        if several and "," in name and {part.strip() for part in name.split(",")} & set(classes):
            raise UserError(
                f"{table} has '{name}' in its column {column}; put {SEPARATOR} between the classes of an image, not a "
                "comma."
            )


def split_classes(text: str) -> list[str]:
    """The classes of an image that a table names, each once.

    >>> split_classes("edema|mass"), split_classes("mass; edema; mass"), split_classes("")
    (['edema', 'mass'], ['mass', 'edema'], [])
    """
    return list(dict.fromkeys(name for part in SEPARATORS.split(text) if (name := part.strip())))


def _read_arrays(path: Path, found: Found) -> ImageClasses:
    arrays = found()
    names, images = arrays.names, arrays.images
    several = arrays.labels["train"].ndim == 2
    cases = {
        part: [
            Case(f"{part}-{i:06d}", (arrays.files[0],), None, f"{part}-{i:06d}", _values(label))
            for i, label in enumerate(arrays.labels[part])
        ]
        for part in images
    }
    dataset = make(path, arrays.layout, names, cases, dims=arrays.spatial_dims, channels=arrays.channels)
    return replace(dataset, arrays=images, files=tuple(arrays.files), multilabel=several)


def _values(label: np.ndarray) -> tuple[int, ...]:
    """Numbers of the classes of a label: a number, or 0 and 1 for each."""
    return tuple(np.flatnonzero(label).tolist()) if label.ndim else (int(label),)


def make(
    path: Path,
    layout: str,
    names: Sequence[str],
    cases: Mapping[str, Sequence[Case]],
    notes: Sequence[str] = (),
    *,
    dims: int | None = None,
    channels: int | None = None,
) -> ImageClasses:
    """The data set of cases by part ("train", "val", "test"); dimension and channels are the first image's."""
    train, val = list(cases["train"]), list(cases.get("val", []))
    present = {number for case in train for number in case.values}
    if missing := [name for number, name in enumerate(names) if number not in present]:
        raise UserError(
            f"{path} has no image to train on for: {', '.join(missing[:5])}. Add some, or drop the class."
        )
    for name in repeated(case.id for part in cases.values() for case in part):
        raise UserError(f"{path} has two images called '{name}'. Give every image a name of its own.")
    if dims is None or channels is None:
        dims = 2 if suffix_of(train[0].images[0]) in SUFFIXES_2D else 3
        channels = max(
            len(read_image(case.images, dims).array) for case in train[:: max(1, len(train) // 8)][:8]
        )
    given = {"train": [case.id for case in train], "val": [case.id for case in val]}
    return ImageClasses(
        name=path.stem,
        root=path if path.is_dir() else path.parent,
        layout=f"{layout}: {', '.join(f'{len(part)} {name}' for name, part in cases.items())}",
        spatial_dims=dims,
        channel_names=COLOURS if channels == 3 else tuple(f"channel {i}" for i in range(channels)),
        label_names=tuple(names),
        label_values=tuple(range(len(names))),
        cases=(*train, *val),
        test_cases=tuple(cases.get("test", ())),
        notes=tuple(notes),
        splits=(given,) if val else (),
    )


# How a layout is found by names (what is found goes to the reader), and read; the first that fits.
READERS: Sequence[tuple[Callable[[Path], Any], Callable[[Path, Any], ImageClasses]]] = (
    (find_arrays, _read_arrays),
    (_tiny_imagenet, _read_tiny_imagenet),
    (_tables, _read_table),
    (_part_folders, _read_folders),
    (_picture_folders, _read_folders),
)
