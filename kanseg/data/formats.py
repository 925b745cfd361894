"""Folders of labelled images in the layouts that people have, read into one `Dataset`.

Medical Segmentation Decathlon and nnU-Net (`dataset.json`), `images/` beside `labels/` or `masks/`, one folder with
`x` and `x_mask`, one folder per case, a CSV, a MONAI datalist. What was recognised stands in `layout` and `notes`;
nothing is guessed in silence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from kanseg.data.case_folders import (
    CASE_LABEL,
    UNNAMED,
    by_channel,
    is_called_label,
    look_into,
    of_one_case,
    usual_channels,
)
from kanseg.data.colours import colour_names, require_classes
from kanseg.data.images import (
    FULL,
    LOSSY,
    SUFFIXES_2D,
    SUFFIXES_DICOM,
    colour_codes,
    is_dicom,
    is_no_image,
    is_segmentation,
    label_from,
    load_image,
    palette_numbers,
    read_image,
    stem_of,
    suffix_of,
)
from kanseg.data.labels import IGNORE, given_regions, known_values, parse_labels_of, unions
from kanseg.data.tables import (
    PARTS,
    TABLES,
    TEST,
    TRAIN,
    VAL,
    alike,
    columns_named,
    folds_of,
    group_columns,
    group_in,
    part_of,
    read_rows,
    told,
)
from kanseg.errors import UserError
from kanseg.progress import progress

CHANNEL = re.compile(r"^(.+)_(\d{4})$")
VOC_IMAGES, VOC_LABELS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
CITY_IMAGES, CITY_LABELS, CITY_IDS = "leftImg8bit", "gtFine", "_gtFine_labelIds"  # Cityscapes
IMAGE_FOLDERS = ("images", "imagesTr", "image", VOC_IMAGES, CITY_IMAGES)
LABEL_FOLDERS = ("labels", "masks", "labelsTr", "label", "mask", VOC_LABELS, CITY_LABELS)
LABEL_ENDINGS = ("", "_mask", "_label", "_seg", CITY_IDS)  # of a label file, behind the name of its image
LABEL_ENDING = re.compile(r"(_mask|_label|_seg)(_\d+)?$")
IMAGE_ENDING = re.compile(rf"(_image|_img|_{CITY_IMAGES})$")
CASE_IMAGE = re.compile(r"(image|img)(_\d{4})?")
MOST_VALUES = 1000  # distinct numbers in a label file; more is a picture, not a label map
COLOURS = ("red", "green", "blue")
GREY = 0x010101  # times a level of grey: its code as a colour
LAYOUTS = (
    "a folder with dataset.json (Medical Segmentation Decathlon, nnU-Net), a folder with images/ and labels/ (or "
    "masks/), both also in train/, val/ and test/ or with these or other folders below, PASCAL VOC's and Cityscapes' "
    "folders, one folder with x and x_mask (or x_label), one folder per case with image (or a file for each channel) "
    "and label, a .csv or .tsv with the columns image and label, or a datalist .json of MONAI; an image may be a "
    "folder with a DICOM series"
)


@dataclass(frozen=True)
class Case:
    """One image: a file with all channels or one a channel; its label, and the patient it belongs to.

    `values` are those that stand in its label file, once `read_dataset` has looked.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Labelled cases and what their numbers mean.

    Attributes:
        layout: what was recognised, in words.
        label_names, label_values, regions, ignore_value: see `kanseg.data.labels.Labels`.
        cases: with labels. `test_cases`: images alone, or with labels that nothing is trained on or chosen by.
        notes: what was detected or mapped.
        splits: that the data come with, each {"train": ids, "val": ids}; none: kanseg makes them.
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
    regions: tuple[tuple[int, ...], ...] = ()
    ignore_value: int | None = None
    splits: tuple[Mapping[str, Sequence[str]], ...] = ()

    @property
    def sources(self) -> Sequence[Case]:
        """What the files of the data set are digested by."""
        return self.cases


MOST_BESIDE = 4  # folders that are told apart as images and label maps
LOOKS, LOOKED_AT = 3, 256  # pictures that are looked at for that, and their pixels an axis
MOST_EDGE_VALUES = 16  # of a mask of 0 and 255; one with more values was resized
TWO_WAYS, BESIDE = "0 and 1, 0 and 255", "255 beside classes"  # what `mixed_masks` finds
COLUMNS = {  # of a list, and what else they may be called
    "image": ("image", "imagepath", "imagefile", "filename", "filepath", "file", "path"),
    "label": ("label", "mask", "labelpath", "maskpath", "labelfile", "maskfile"),
    **{name: (name,) for name in ("id", "fold", "split")},
}
CASE_COLUMNS = "id case caseid image imageid name file filename".split()  # of a table of patients
LISTED = ("training", "validation", "test", "testing")  # lists of a datalist
LISTS = (*TABLES, ".json")  # suffixes of a data set that is a file
BY_CLASS = "masks by class"  # a problem: label maps to be made of several files
UNUSED = "labels have no image and are not used"
PATIENTS_IN_PART = "for it lacks"  # in a note on a table of patients that does not say all
PATIENTS_ALIKE = "may be one patient each"  # in a note on names
PATIENTS_TESTED = "have images to train on and test images"
Data = TypeVar("Data", bound=Dataset)
Problem = Callable[..., None]  # of kind, case and message of what is wrong, and files that belong to it


def _refuse(kind: str, case: str, message: str, files: Sequence[Path] = ()) -> NoReturn:
    raise UserError(message)


def read_dataset(
    path: Path | str, *, id_pattern: str | None = None, regions: Mapping[str, Sequence[int]] | None = None
) -> Dataset:
    """Recognise the layout of a folder or list file, read it, and look into every label.

    Args:
        id_pattern: regular expression with one group that takes the patient from a case's id.
        regions: classes by name as lists of label values, in place of those that the data declares; see
            `kanseg.data.labels.given_regions`.

    Raises:
        UserError: nothing recognised, images without labels, values outside the declared set, no cases.
    """
    return with_values(list_dataset(path, id_pattern=id_pattern), regions)


def with_values(dataset: Dataset, regions: Mapping[str, Sequence[int]] | None = None) -> Dataset:
    """A data set that was listed, after a look into every label; see `read_dataset`."""
    declared = set(known_values(dataset))
    if regions:
        dataset = replace(dataset, **given_regions(regions))
        if not dataset.regions:  # nothing but what to ignore was given
            pairs = zip(dataset.label_names, dataset.label_values, strict=True)
            kept = {value: name for name, value in pairs if value != dataset.ignore_value}
            dataset = replace(dataset, label_names=tuple(kept.values()), label_values=tuple(kept))
    _require_files(dataset)
    dataset = _with_label_values(dataset)
    named = {value for values in (regions or {}).values() for value in values}
    foreign = named - declared - {value for case in dataset.cases for value in case.values}
    if foreign:
        raise UserError(
            f"The regions name {sorted(foreign)}, values that no label of {dataset.root} has. Correct them."
        )
    return dataset


def list_dataset(path: Path | str, *, id_pattern: str | None = None, problem: Problem = _refuse) -> Dataset:
    """Recognise the layout of a folder or list file; no label is opened.

    Args:
        problem: called with what is wrong with a case, which is then left as it is; default raises `UserError`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}. Expected: {LAYOUTS}.")
    if path.is_file() and path.suffix.lower() not in LISTS:
        raise UserError(f"{path} is one file, not a data set. Expected: {LAYOUTS}.")
    if path.is_file():
        dataset = _read_csv(path) if path.suffix.lower() in TABLES else _read_datalist(path, _load_json(path))
    elif (path / "dataset.json").is_file():
        dataset = _read_described(path, _load_json(path / "dataset.json"), problem)
    else:
        dataset = _read_folders(path, problem)
    if not dataset.cases:
        raise UserError(f"{path} holds no labelled images. Expected: {LAYOUTS}.")
    if path.is_dir() and id_pattern is None and all(case.group == case.id for case in dataset.cases):
        dataset = _with_patients(dataset, path / "cases.csv", problem)
    elif (path / "cases.csv").is_file():
        other = "--id-pattern says" if id_pattern is not None else "dataset.json says"
        dataset = noted(dataset, f"cases.csv is not used, for {other} whose images they are")
    for name in repeated(case.id for case in dataset.cases):
        images = [case.images for case in dataset.cases if case.id == name]
        advice = "Give every case a name of its own (in lists: 'id')."
        if len(set(images)) < len(images):
            advice = "One image is listed twice, perhaps to train on and to validate on; leave one."
        problem("same name", name, f"{path} has several cases called '{name}'. {advice}")
    if id_pattern is not None:
        dataset = by_pattern(dataset, id_pattern)
    dataset = noted(dataset, *patient_notes(dataset.cases, dataset.test_cases))
    return replace(dataset, source=path.resolve(), id_pattern=id_pattern)


def patient_notes(cases: Sequence[Case], tests: Sequence[Case]) -> list[str]:
    """What is odd about the patients of a data set: names that are nearly the same, and patients in the test."""
    notes = []
    if pairs := alike(case.group for case in cases):
        shown = few([" and ".join(f"'{name}'" for name in names) for names in pairs])
        notes.append(
            f"{shown} {PATIENTS_ALIKE}: their names differ by capitals, blanks, signs or zeros alone. Write them alike "
            "if so; they are not kept together"
        )
    known = {case.group for case in (*cases, *tests) if case.group != case.id}
    if both := sorted(known & {case.group for case in cases} & {case.group for case in tests}):
        notes.append(f"patients who {PATIENTS_TESTED}: {few(both, 3)}")
    return notes


def find_images(path: Path | str, *, channels: int | None = None, names: Sequence[str] = ()) -> list[Case]:
    """Images to predict: a file, a folder of images (`_0000` channels joined), or folders with one DICOM series each.

    Also a folder for each case, see `kanseg.data.case_folders`; label maps in them are left aside. Else images in
    folders of any names, by which their ids then begin.

    Args:
        names: of the model's channels. Files called by them (CASE-t1c, CASE-flair) are joined.
        channels: how many the model takes. Files numbered `_0000`, `_0001`, ... are joined only where some image has
            just so many of them (for one channel: every image); otherwise they are images of their own, such as the
            frames of a video.

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
    files = image_files(path)
    if len(names) > 1 and (cases := _joined_by_name(files, names, path.resolve().name)):
        return cases
    if files and channels is not None and channels > 1:
        return _joined(files, channels)
    if files:
        counts = [len(paths) for paths in _by_channel(files).values()]
        return _cases(files, join=channels is None or set(counts) == {1})
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())]
    series = _with_dicom(folders)
    if not series and (cases := _in_case_folders(path, names)):
        return cases
    if not series and not _inner(path) and _both_called(path)[1] is None and (cases := _in_tree(path)):
        return cases
    if not series:
        but = (
            ", but DICOM-SEG or RTSTRUCT, which label maps are not read from"
            if segmentations_in(path)
            else ""
        )
        raise UserError(
            f"{path} holds no images{but}.{_inner(path)} Known are NIfTI, NRRD, MHA, PNG, JPG, TIF, and DICOM series."
        )
    names = ["_".join(folder.relative_to(path).parts) or folder.resolve().name for folder in series]
    return [Case(name, (folder,), None, name) for name, folder in zip(names, series, strict=True)]


def _joined_by_name(files: Sequence[Path], names: Sequence[str], folder: str) -> list[Case]:
    """Files called by the names of channels as images, where one has all of them; [] where none has.

    What is left over is a case too, as in `_joined`, but for label maps.
    """
    found = by_channel(files, names)
    if all(len(one) < len(names) for one in found.values()):
        return []
    cases = [_by_names(name or folder, one, names) for name, one in found.items()]
    inside = {image for case in cases for image in case.images}
    left = [file for file in files if file not in inside and not is_called_label(file)]
    return sorted(
        [*cases, *(Case(stem_of(f), (f,), None, stem_of(f)) for f in left)], key=lambda case: case.id
    )


def _in_case_folders(path: Path, names: Sequence[str]) -> list[Case]:
    """A case for each folder: its images by the names of channels, or those called image, or its only image."""
    cases = []
    for folder in _folders_in(path):
        files = image_files(folder)
        images = [file for file in files if CASE_IMAGE.fullmatch(stem_of(file))]
        others = [file for file in files if not is_called_label(file)]
        if found := of_one_case(files, names):
            cases.append(_by_names(folder.name, found, names))
        elif images or len(others) == 1:
            cases.append(Case(folder.name, tuple(images or others), None, folder.name))
    return cases


def labels_in_case_folders(path: Path) -> dict[str, Path]:
    """The label map of each folder that has one, by the folder's name."""
    found = {folder.name: look_into(image_files(folder)).labels for folder in _folders_in(path)}
    return {name: labels[0] for name, labels in found.items() if len(labels) == 1}


def _by_names(id_: str, found: Mapping[str, Path], names: Sequence[str], label: Path | None = None) -> Case:
    return Case(id_, tuple(found[name] for name in names if name in found), label, id_)


def _joined(files: Sequence[Path], channels: int) -> list[Case]:
    """Files numbered from _0000 on as channels of one image each, where some image has all of them.

    What is left over (a file without a number, an image that lacks a channel) is a case too, and fails by itself.
    """
    numbered: dict[str, dict[int, Path]] = {}
    for file in files:
        if own := channel_of(file):
            numbered.setdefault(own[0], {})[own[1]] = file
    if not any(sorted(found) == list(range(channels)) for found in numbered.values()):
        return _cases(
            files, join=all(set(found) == {0} for found in numbered.values())
        )  # colours in one file
    cases = {
        name: Case(name, tuple(found[n] for n in sorted(found)), None, name)
        for name, found in numbered.items()
    }
    inside = {path for case in cases.values() for path in case.images}
    for file in (file for file in files if file not in inside):
        name = stem_of(file)
        name = file.name.replace(".", "_") if name in cases else name
        cases[name] = Case(name, (file,), None, name)
    return sorted(cases.values(), key=lambda case: case.id)


def passed_over(path: Path) -> list[str]:
    """What `find_images` leaves aside in a folder where it takes files: DICOM files, and folders with images."""
    if not path.is_dir() or not image_files(path):
        return []
    loose = [file.name for file in _dcm_in(path) if not is_no_image(file)]
    folders = [f"{f.name}/" for f in _folders_in(path) if image_files(f) or _with_dicom([f])]
    return [*([f"{len(loose)} .dcm files"] if loose else []), *folders]


def _inner(folder: Path) -> str:
    """A sentence that names the folders of images in a data set."""
    found = [str(folder / name) for name in ("imagesTs", "imagesTr", "images") if (folder / name).is_dir()]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _may_be_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    return is_dicom(path) and not is_no_image(path)


def image_files(folder: Path) -> list[Path]:
    """Images directly in a folder, links to nothing among them; hidden files and other things are passed over."""
    named = (p for p in folder.iterdir() if suffix_of(p) not in ("", *SUFFIXES_DICOM) and p.name[0] != ".")
    return sorted(p for p in named if p.is_file() or (p.is_symlink() and not p.exists()))


def _series_cases(folder: Path, problem: Problem = _refuse) -> list[Case]:
    """A case for each folder with one DICOM series, however deep that lies in it."""
    found = {path.name: _series_of(path) for path in _folders_in(folder)}
    for name, series in found.items():
        if len(series) > 1:
            problem("several series", name, _too_many(folder / name, series))
    return [Case(name, (series[0],), None, name) for name, series in found.items() if series]


def _too_many(folder: Path, series: Sequence[Path]) -> str:
    shown = few([str(one.relative_to(folder)) for one in series], 3)
    return f"{folder} has {len(series)} folders with DICOM series ({shown}); one is expected. Take the others away."


def _series_of(folder: Path) -> list[Path]:
    """The folders with DICOM images in a folder, itself among them."""
    below = sorted(path for path in folder.rglob("*") if path.is_dir())
    hidden = {path for path in below if any(part[0] == "." for part in path.relative_to(folder).parts)}
    return _with_dicom(path for path in (folder, *below) if path not in hidden)


def _with_dicom(folders: Iterable[Path]) -> list[Path]:
    """The folders that hold DICOM images themselves."""
    return [folder for folder in folders if any(map(_may_be_dicom, folder.iterdir()))]


def _dcm_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if suffix_of(p) in SUFFIXES_DICOM and p.name[0] != ".")


def segmentations_in(path: Path) -> list[Path]:
    """The DICOM-SEG and RTSTRUCT of a folder, or the file itself where it is one."""
    files = _dcm_in(path) if path.is_dir() else [path] if suffix_of(path) in SUFFIXES_DICOM else []
    return [file for file in files if file.is_file() and is_segmentation(file)]


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _by_channel(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files named as nnU-Net does, name -> files of its channels; empty unless every file is, from _0000 on."""
    channels: dict[str, list[Path]] = {}
    found = list(map(channel_of, files))
    for file, own in zip(files, found, strict=True):
        if own is None:
            return {}
        channels.setdefault(own[0], []).append(file)
    return channels if any(own and own[1] == 0 for own in found) else {}


def channel_of(file: Path) -> tuple[str, int] | None:
    """Name of the image and number of the channel of a file called as nnU-Net calls it, NAME_0001; None of others."""
    match = CHANNEL.match(stem_of(file))
    return (match[1], int(match[2])) if match else None


def numbers_beside(image: Path) -> list[int]:
    """Numbers of the channels that lie in the folder of an image under its name, none if it has no number itself."""
    if not (own := channel_of(image)) or not image.parent.is_dir():
        return []
    found = map(channel_of, image_files(image.parent))
    return sorted(other[1] for other in found if other and other[0] == own[0])


def _cases(files: Sequence[Path], *, join: bool = True, problem: Problem = _refuse) -> list[Case]:
    """A case for each file, or for each group of nnU-Net channels."""
    channels = _by_channel(files) if join else {}
    for name, paths in channels.items():
        numbers = [own[1] for own in map(channel_of, paths) if own]
        if numbers != list(range(len(paths))):
            problem(
                "missing channel",
                name,
                f"Image '{name}' in {paths[0].parent} has the channels {numbers}; 0, 1, ... without gaps and each "
                "once are expected. Add the missing file, or remove the surplus one.",
            )
    if channels:
        return [Case(name, tuple(paths), None, name) for name, paths in channels.items()]
    return [Case(stem_of(p), (p,), None, stem_of(p)) for p in files]


def _numbered(files: Sequence[Path], problem: Problem) -> list[Path]:
    """The files whose names have a channel, where that is most of them; what is wrong with the others is said."""
    numbered = [file for file in files if channel_of(file)]
    if 2 * len(numbered) <= len(files):
        return list(files)
    for file in files:
        if file not in numbered:
            why = f"{file} has no channel in its name, such as _0000, which {len(numbered)} others have; rename it"
            problem("no channel in the name", stem_of(file), why)
    return numbered


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # of any encoding that JSON may have
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}). Repair it.") from error


def _read_described(root: Path, described: Any, problem: Problem) -> Dataset:
    """A folder with dataset.json: the Decathlon's lists its files, nnU-Net's names its labels."""
    file = root / "dataset.json"
    if (
        not isinstance(described, dict)
        or not isinstance(described.get("labels"), dict)
        or not described["labels"]
    ):
        raise UserError(f'{file} lacks \'labels\', e.g. {{"0": "background", "1": "organ"}}.')
    labels = parse_labels_of(described, file)
    groups = _subjects(file, described.get("subjects") or {})
    channels = _channel_names(file, described)
    splits: Sequence[Mapping[str, Sequence[str]]] = ()
    if "training" in described:
        cases, tests, splits, notes = _of_lists(root, _lists(file, described), groups)
        notes += _unread(described)
        layout = "Medical Segmentation Decathlon (dataset.json with a list of files)"
    else:
        cases = _cases(_numbered(image_files(_folder(root, "imagesTr")), problem), problem=problem)
        _require_channels(cases, channels, problem)
        cases, notes = _paired(cases, image_files(_folder(root, "labelsTr")), groups, problem)
        tests = _test_cases(root)
        layout = "nnU-Net raw (dataset.json, imagesTr with _0000 names, labelsTr)"
    tests, unused = _with_test_labels(root, tests, groups)
    notes += unused
    count = len(described.get("training") or cases)
    if isinstance(described.get("numTraining"), int) and described["numTraining"] != count:
        notes.append(f"dataset.json says numTraining {described['numTraining']}; {count} cases are there")
    if groups:
        present = {groups[case.id] for case in cases if case.id in groups}
        notes.append(f"{len(present)} subjects from dataset.json keep their images together")
    name = str(described.get("name", root.name))
    own = _described_splits(file, described.get("splits") or [], {case.id for case in cases})
    return replace(
        _dataset(name, root, layout, cases, tests, channels, notes), splits=own or tuple(splits), **labels
    )


def _described_splits(file: Path, content: Any, cases: set[str]) -> tuple[dict[str, list[str]], ...]:
    """The folds that `kanseg.data.convert` wrote down of a list."""
    try:
        found = [
            {part: [str(c) for c in fold[part] if c in cases] for part in ("train", "val")}
            for fold in content
        ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{file}: 'splits' is not a list of folds with 'train' and 'val'. Correct or delete it."
        ) from error
    return tuple(fold for fold in found if all(fold.values()))


def _require_channels(cases: Sequence[Case], names: tuple[str, ...] | None, problem: Problem) -> None:
    """In nnU-Net's layout a channel is a file: name those that a case lacks, and those that it has in surplus.

    Expected are as many files as channels have names, or as most cases have: one file may hold all channels.
    """
    counts = [len(case.images) for case in cases]
    most = max(sorted(counts, reverse=True), key=counts.count, default=0)
    named = names is not None and len(names) in counts
    expected: Sequence[str] = names if names is not None and named else ("",) * most
    for case in cases:
        found = map(channel_of, case.images)
        numbers = [own[1] if own else place for place, own in enumerate(found)]
        missing = [number for number in range(len(expected)) if number not in numbers]
        surplus = [number for number in numbers if number >= len(expected)]
        if missing and len(expected) > 1:  # else the number may be that of a frame
            shown = ", ".join(f"{expected[n]} (_{n:04d})" if named else f"_{n:04d}" for n in missing)
            problem(
                "missing channel",
                case.id,
                f"Image '{case.id}' in {case.images[0].parent} lacks the channel {shown}. Add the file, or take the "
                "case out.",
            )
        elif surplus and len(case.images) > len(expected):
            shown = ", ".join(f"_{number:04d}" for number in surplus)
            whose = f"dataset.json names {', '.join(expected)}" if named else f"most have {len(expected)}"
            problem(
                "other channels",
                case.id,
                f"Image '{case.id}' in {case.images[0].parent} has a channel {shown} too many: {whose}. Remove the "
                "file, or take the case out.",
            )


def _entries(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise UserError(f"{file}: '{key}' must be a list of images, found {type(entries).__name__}.")
    return entries


def _test_cases(root: Path) -> list[Case]:
    folder = root / "imagesTs"
    if not folder.is_dir():
        return []
    return [*_cases(image_files(folder)), *_series_cases(folder)]


def _with_test_labels(
    root: Path, tests: Sequence[Case], groups: Mapping[str, str]
) -> tuple[list[Case], list[str]]:
    """Test images with their labels in labelsTs, where they are, and a note on labels that belong to none."""
    folder = root / "labelsTs"
    files = {stem_of(p): p for p in (*image_files(folder), *_dcm_in(folder))} if folder.is_dir() else {}
    found = {case.id: (_label_names(case.id, files) or [""])[0] for case in tests}
    tests = [
        replace(case, label=case.label or files.get(found[case.id]), group=groups.get(case.id, case.group))
        for case in tests
    ]
    unused = sorted(set(files) - {*found.values(), *(stem_of(c.label) for c in tests if c.label)})
    return tests, [f"{len(unused)} test {UNUSED}: {', '.join(unused[:3])}"] if unused else []


def _channel_names(file: Path, described: dict[str, Any]) -> tuple[str, ...] | None:
    """From nnU-Net's `channel_names` or the Decathlon's `modality`, {"0": "MRI"}; None where it is not said."""
    names = described.get("channel_names") or described.get("modality")
    if names is None:
        return None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(str(i) for i in range(len(names))):
        raise UserError(
            f'{file}: the channels are {names!r}; expected is a name for each number from 0, e.g. {{"0": "MRI"}}.'
        )
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _subjects(file: Path, subjects: Any) -> dict[str, str]:
    """Case id -> subject, from `subjects` (subject -> ids, or id -> subject)."""
    if not isinstance(subjects, dict):
        raise UserError(
            f'{file}: \'subjects\' must name the cases of each subject, e.g. {{"p1": ["case_1"]}}.'
        )
    groups: dict[str, str] = {}
    for key, value in subjects.items():
        pairs = (
            [(str(case), str(key)) for case in value] if isinstance(value, list) else [(str(key), str(value))]
        )
        for case, subject in pairs:
            _require_one_patient(file, case, {groups.get(case, subject), subject}, _refuse)
            groups[case] = subject
    # files may stand for cases
    return {stem_of(Path(case)): subject for case, subject in groups.items()} | groups


def _require_one_patient(source: Path, case: str, patients: Collection[str], problem: Problem) -> None:
    if len(patients) > 1:
        who = " and ".join(f"'{patient}'" for patient in sorted(patients))
        problem("patients", case, f"{source} gives the case '{case}' several patients, {who}. Leave one.")


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
    group = group_in(entry, group_columns(entry)) or groups.get(name, name)
    return Case(name, paths, _inside(root, label) if label else None, str(group))


def _inside(root: Path, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() else root / name


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise UserError(f"{root} has a dataset.json but no folder {name}. Expected: {LAYOUTS}.")
    return root / name


def _paired(
    cases: Sequence[Case], labels: Sequence[Path], groups: dict[str, str], problem: Problem
) -> tuple[list[Case], list[str]]:
    """Images with the labels of the same name (or name + _mask), and a note on labels that belong to none."""
    files: dict[str, list[Path]] = {}
    for path in labels:
        files.setdefault(stem_of(path), []).append(path)
    ids = {case.id for case in cases}
    of_case = {  # a_mask belongs to a, unless there is an image a_mask
        name: [n for n in _label_names(name, files) if n == name or n not in ids] for name in ids
    }
    unused = set(files) - {names[0] for names in of_case.values() if names}
    paired = []
    for case in cases:
        numbered = re.compile(re.escape(case.id) + r"(_mask|_label|_seg)?_\d+")
        names = [*of_case[case.id], *(name for name in sorted(unused) if numbered.fullmatch(name))]
        masks = [path for name in names for path in files[name]]
        if len(masks) > 1:
            problem(
                "several masks",
                case.id,
                f"{case.images[0]} has {len(masks)} masks ({', '.join(p.name for p in masks)}); one label map an image "
                "is expected. Merge them into one file.",
                masks,
            )
        unused -= set(names)
        label = masks[0] if masks else None
        paired.append(replace(case, label=label, group=groups.get(case.id, case.group)))
    without = [case for case in paired if case.label is None]
    for case in without:
        problem(
            "missing label",
            case.id,
            f"{len(without)} of {len(paired)} images have no label in {labels[0].parent if labels else 'the folder'}, "
            f"the first is {without[0].images[0]}. Expected there: {without[0].id} with the suffix of the labels. Add "
            "it, or take the image away.",
        )
    shown = ", ".join(sorted(unused)[:3])
    return paired, [f"{len(unused)} {UNUSED}: {shown}"] if unused else []


def _label_names(case: str, files: Iterable[str]) -> list[str]:
    """Names of the label files that are called as the case is."""
    return [case + ending for ending in LABEL_ENDINGS if case + ending in files]


def _read_folders(root: Path, problem: Problem) -> Dataset:
    """images/ (or imagesTr/) beside labels/ or masks/, or all in one folder; cases.csv may give a group or patient."""
    if parts := _parts(root):
        return _read_parts(root, parts, problem)
    images, labels = _both_called(root)
    if images is None or labels is None:
        return _read_one_folder(root, problem)
    if images.name == VOC_IMAGES and labels.name == VOC_LABELS:
        return _read_voc(root, images, labels, problem)
    cases, unused = _in_two_trees(images, labels, problem)
    layout = f"folders {images.name}/ and {labels.name}/"
    tests, others = _with_test_labels(root, _test_cases(root), {})
    return _dataset(root.name, root, layout, cases, tests, None, [*unused, *others])


def _in_two_trees(images: Path, labels: Path, problem: Problem) -> tuple[list[Case], list[str]]:
    """As `_in_two_folders`; where `images` has nothing but folders of images, of each with that of `labels`.

    Ids then begin with the names of these folders.
    """
    inner = _inner_folders(images)
    if not inner:
        return _in_two_folders(image_files(images), images, labels, problem)
    cases: list[Case] = []
    notes = [_of_inner(images, inner)]
    for folder in inner:
        beside = labels / folder.name
        if not beside.is_dir():
            raise UserError(f"{folder} has no labels beside it, in {beside}. Add them, or take it away.")

        def of_folder(kind: str, case: str, *what: Any, folder: Path = folder) -> None:
            problem(kind, _below(folder, case), *what)

        found, said = _in_two_trees(folder, beside, of_folder)
        cases += _renamed(found, partial(_below, folder))
        notes += said
    return cases, notes


def _in_tree(folder: Path) -> list[Case]:
    """Images without labels, with ids as `_in_two_trees` gives them."""
    inner = _inner_folders(folder)
    below = (_renamed(_in_tree(one), partial(_below, one)) for one in inner)
    return [case for cases in below for case in cases] if inner else _cases(image_files(folder))


def _inner_folders(folder: Path) -> list[Path]:
    """Folders with images, however deep, in a folder that has none itself; a picture beside a series is none."""
    if image_files(folder):
        return []
    inner = [one for one in _folders_in(folder) if not _with_dicom([one])]
    return [one for one in inner if image_files(one) or _inner_folders(one)]


def _below(folder: Path, case: str) -> str:
    return case if case.startswith(f"{folder.name}_") else f"{folder.name}_{case}"


def _renamed(cases: Iterable[Case], name: Callable[[str], str]) -> list[Case]:
    names = ((case, name(case.id)) for case in cases)
    return [replace(case, id=new, group=new) for case, new in names]


def _of_inner(images: Path, inner: Sequence[Path]) -> str:
    """A note on folders of images that may be those of patients."""
    names = [folder.name for folder in inner]
    pattern = (
        "'^([^_]+)_'"
        if not any("_" in name for name in names)
        else f"'^({'|'.join(map(re.escape, names))})_'"
    )
    return (
        f"the images of {images.name}/ lie in {len(names)} folders, {few(names, 3)}, by which their names begin; if "
        f"each is a patient, give --id-pattern {pattern}"
    )


def _in_two_folders(
    files: Sequence[Path], images: Path, labels: Path, problem: Problem
) -> tuple[list[Case], list[str]]:
    """Cases of the files, and of the series in `images`, with their labels, and a note on labels of none."""
    masks = [*image_files(labels), *_dcm_in(labels)]
    ids = [mask for mask in masks if stem_of(mask).endswith(CITY_IDS)]
    masks = ids or masks  # not colours and instances, which lie beside
    by_class = {} if masks else _masks_by_class(files, labels)
    if by_class:
        masks = [own[0] for own in by_class.values()]
    named = {stem_of(p) for p in masks}
    stems = [IMAGE_ENDING.sub("", stem_of(file)) for file in files]
    own = bool(files) and all(_label_names(stem, named) for stem in stems)  # x_0000 may be a frame
    cases = _named(_cases(files, join=not own, problem=problem))
    cases += _series_cases(images, problem)
    _require_channels(cases, None, problem)
    cases, notes = _paired(cases, masks, {}, problem)
    names = few(sorted({mask.parent.name for own in by_class.values() for mask in own}), 5)
    said = (
        f"{labels} has a folder of masks for each class ({names}), and one label map an image is expected. kanseg "
        "doctor DATA --fix OUT makes one, as kanseg run does."
    )
    for case in cases:
        if drawn := by_class.get(stem_of(case.label) if case.label else ""):
            problem(BY_CLASS, case.id, said, drawn)
    return cases, notes


def _masks_by_class(images: Sequence[Path], labels: Path) -> dict[str, list[Path]]:
    """The masks of each name in the folders of `labels`, where some image has masks in several of them."""
    found: dict[str, list[Path]] = {}
    for folder in _inner_folders(labels):
        for file in image_files(folder):
            found.setdefault(stem_of(file), []).append(file)
    own = [_label_names(IMAGE_ENDING.sub("", stem_of(image)), found) for image in images]
    return found if any(len(found[name]) > 1 for names in own for name in names) else {}


def _read_voc(root: Path, images: Path, labels: Path, problem: Problem) -> Dataset:
    """PASCAL VOC's folders: only some images have a label, and lists say which of them are to validate on."""
    masks = {stem_of(path) for path in image_files(labels)}
    files = image_files(images)
    labelled = [file for file in files if stem_of(file) in masks]
    cases, notes = _in_two_folders(labelled, images, labels, problem)
    if others := len(files) - len(labelled):
        notes.append(f"{others} images have no label in {labels.name}/ and are not used")
    val = root / VOC_LISTS / "val.txt"
    validation = set(val.read_text(encoding="utf-8").split()) if val.is_file() else set()
    ids = [case.id for case in cases]
    folds, said = _own_fold(ids, validation, f"{VOC_LISTS}/val.txt")
    dataset = _dataset(
        root.name, root, f"PASCAL VOC ({VOC_IMAGES}, {VOC_LABELS})", cases, [], None, [*notes, *said]
    )
    return replace(dataset, splits=folds)


def _parts(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """Folders of images and labels by part: those in train/, val/ and test/, or those that have such folders."""
    found: dict[str, tuple[Path, Path | None]] = {}
    images, labels = _both_called(root)
    for folder in _folders_in(images or root) if not (images and image_files(images)) else ():
        part = PARTS.get(folder.name.lower().rstrip("0123456789"))  # train2017
        own = (folder, labels / folder.name if labels else None)
        if images is None:
            inside, own_labels = _both_called(folder)
            own = (inside or folder, own_labels)
        if part is None or not (image_files(own[0]) or _inner_folders(own[0])):
            continue
        if part in found:
            raise UserError(
                f"{found[part][0]} and {own[0]} are both for {part}. Leave one, or put all into one."
            )
        found[part] = (own[0], own[1] if own[1] and own[1].is_dir() else None)
    return found if found.get(TRAIN, (root, None))[1] else {}


def _read_parts(root: Path, parts: Mapping[str, tuple[Path, Path | None]], problem: Problem) -> Dataset:
    """The images of each part; where several parts have images of one name, all begin with that of their part."""
    found: dict[str, list[Case]] = {TRAIN: [], VAL: [], TEST: []}
    notes: list[str] = []
    for part, (images, labels) in parts.items():
        if labels:
            found[part], unused = _in_two_trees(images, labels, problem)
            notes += unused
        elif part == TEST:
            found[part] = _in_tree(images)
        else:
            raise UserError(
                f"{images} has no labels beside it, as those to train on have. Add them, or take it away."
            )
    if repeated(case.id for cases in found.values() for case in cases):
        for part, cases in found.items():
            found[part] = _renamed(cases, f"{part}_{{}}".format)
    layout = f"images and labels in {', '.join(parts)}"
    cases = [*found[TRAIN], *found[VAL]]
    folds, said = _own_fold([case.id for case in cases], {case.id for case in found[VAL]}, VAL)
    dataset = _dataset(root.name, root, layout, cases, found[TEST], None, [*notes, *said])
    return replace(dataset, splits=folds)


def _own_fold(
    ids: Sequence[str], validation: Collection[str], where: str
) -> tuple[tuple[Mapping[str, Sequence[str]], ...], list[str]]:
    """The fold of data that say what to validate on, and a note on it; none where that is nothing or all."""
    fold = {TRAIN: [i for i in ids if i not in validation], VAL: [i for i in ids if i in validation]}
    if not all(fold.values()):
        return (), []
    return (fold,), [f"one fold, which validates on the {len(fold[VAL])} images of {where}"]


def _both_called(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of images and of labels, by their names."""
    return _called(root, IMAGE_FOLDERS), _called(root, (*LABEL_FOLDERS, "annotations"))


def _called(root: Path, names: Sequence[str]) -> Path | None:
    """The folder that has one of these names, in any capitals; of several the one that holds images."""
    folders = _folders_in(root)
    there = [folder for name in names for folder in folders if folder.name.lower() == name.lower()]
    if len(there) < 2:
        return there[0] if there else None
    holding = [folder for folder in there if image_files(folder) or _series_of(folder) or _dcm_in(folder)]
    return only(holding) or there[0]


def only(found: Sequence[Path]) -> Path | None:
    """The one place where something was found, also under two names (a link); `UserError` names several."""
    if len({folder.resolve() for folder in found}) > 1:
        raise UserError(
            f"{' and '.join(map(str, found))} all hold images, and only one of them would be read. Leave one, or put "
            "all into one."
        )
    return found[0] if found else None


def _read_one_folder(root: Path, problem: Problem) -> Dataset:
    """x.png (or x_image.png) beside x_mask.png, x_label.png or x_seg.png."""
    files = image_files(root)
    masks = [file for file in files if LABEL_ENDING.search(stem_of(file))]
    images = [file for file in files if file not in masks]
    cases = _named(_cases(images, join=False))
    if not any(_label_names(case.id, {stem_of(mask) for mask in masks}) for case in cases):
        return _read_case_folders(root, problem)
    cases, unused = _paired(cases, masks, {}, problem)
    return _dataset(root.name, root, "images and masks in one folder", cases, [], None, unused)


def _read_case_folders(root: Path, problem: Problem) -> Dataset:
    """A folder a case: NAME/image.nii.gz (or image_0000.nii.gz, ..., or a DICOM series, in a folder or not) beside
    NAME/label.nii.gz (or mask, seg, or the one DICOM-SEG or RTSTRUCT).
    """
    cases = []
    for folder in _folders_in(root):
        files = image_files(folder)
        images = [file for file in files if CASE_IMAGE.fullmatch(stem_of(file))]
        labels = [file for file in files if CASE_LABEL.fullmatch(stem_of(file))]
        _require_single_names(folder, images, problem)
        if not images:
            series = _series_of(folder)
            images = [path for path in series if len(series) == 1 or CASE_IMAGE.fullmatch(path.name)]
            if series and not images:
                problem("several series", folder.name, _too_many(folder, series))
        labels = labels or segmentations_in(folder)
        if not images:
            continue
        cases.append(Case(folder.name, tuple(images), _one_label(folder, labels, problem), folder.name))
    _require_channels(cases, None, problem)
    if not cases and (dataset := _read_named_folders(root, problem)):
        return dataset
    if not any(case.label for case in cases):
        several = [folder for folder in _folders_in(root) if len(image_files(folder)) > 1]
        hint = f" If its folders are classes, put them into {root / 'train'}." if len(several) > 1 else ""
        if with_masks(several):
            hint = " Its folders hold images beside their masks: put all into one folder."
        if pair := beside_masks(several):
            looks = f"{pair[0].name}/ looks like images and {pair[1].name}/ like their label maps"
            hint = f" {looks}: call them images/ and labels/, with files of the same names."
        raise UserError(f"{root} has no layout that kanseg knows.{hint} Expected: {LAYOUTS}.")
    return _dataset(root.name, root, "one folder per case with image and label", cases, [], None, [])


def _require_single_names(folder: Path, files: Sequence[Path], problem: Problem) -> None:
    for name in repeated(map(stem_of, files)):
        why = f"{folder} has several files called '{name}'; which is the image? Take the others away."
        problem("same name", folder.name, why)


def _one_label(folder: Path, labels: Sequence[Path], problem: Problem) -> Path | None:
    if len(labels) != 1:
        kind = "several masks" if labels else "missing label"
        said = f"{folder} has {len(labels)} label maps; one, e.g. label.nii.gz, is expected."
        problem(kind, folder.name, said, labels)
    return labels[0] if labels else None


def _read_named_folders(root: Path, problem: Problem) -> Dataset | None:
    """A folder a case whose files are called by their channels, see `kanseg.data.case_folders`."""
    files = {folder: image_files(folder) for folder in _folders_in(root)}
    seen = {folder: look_into(own) for folder, own in files.items() if own}
    names = usual_channels(seen.values())
    cases = []
    for folder, found in seen.items() if names else ():
        images = of_one_case(files[folder], names)
        if names == UNNAMED and len(found.others) == 1:
            images = dict(zip(names, found.others.values(), strict=True))
        if not images and not found.labels:
            continue
        _require_single_names(folder, files[folder], problem)
        if missing := [name for name in names if name not in images]:
            why = f"{folder} lacks the channel {few(missing)}, which most cases have."
            problem("missing channel", folder.name, f"{why} Add the file, or take the case out.")
        if surplus := [file.name for file in found.others.values() if file not in images.values()]:
            why = f"{folder} has {few(surplus, 3)} beside the channels of most cases ({few(names)})."
            problem("other channels", folder.name, f"{why} Take it away, or the case out.")
        cases.append(_by_names(folder.name, images, names, _one_label(folder, found.labels, problem)))
    if not cases:
        return None
    layout = f"one folder per case with label and a file for each channel ({few(names)})"
    named = names if len(names) == _channels(cases) and names != UNNAMED else None
    return _dataset(root.name, root, layout, cases, [], named, [])


def beside_masks(folders: Sequence[Path]) -> tuple[Path, Path] | None:
    """A folder of pictures and one of their label maps, by a look at some; None where no two are such.

    They have as many files, or files of the same names, and one has few values where the other has many.
    """
    stems = {folder: set(map(stem_of, image_files(folder))) for folder in folders}
    few_values = cache(_few_values)
    for images, labels in permutations(stems if len(stems) <= MOST_BESIDE else (), 2):
        shared = 2 * len(stems[images] & stems[labels]) > len(stems[labels])
        alike = shared or len(stems[images]) == len(stems[labels])
        if alike and few_values(labels) and not few_values(images):
            return images, labels
    return None


def _few_values(folder: Path) -> bool:
    """Whether the first pictures of a folder have few values or colours each, and some more than one."""
    counts = []
    for path in image_files(folder)[:LOOKS]:
        try:
            codes = colour_codes(load_image([path]).array)
        except UserError:
            return False
        if codes.ndim != 2:
            return False
        rows, columns = (max(1, size // LOOKED_AT) for size in codes.shape)
        counts.append(len(np.unique(codes[::rows, ::columns])))
    return 1 < max(counts, default=0) <= MOST_EDGE_VALUES


def with_masks(folders: Iterable[Path]) -> bool:
    """Whether images lie beside their label maps in a folder, by the names there."""
    for folder in (folder for folder in folders if folder.is_dir()):
        stems = {IMAGE_ENDING.sub("", stem_of(file)) for file in image_files(folder)}
        pairs = any(LABEL_ENDING.search(stem) and LABEL_ENDING.sub("", stem) in stems for stem in stems)
        whole = any(map(CASE_IMAGE.fullmatch, stems)) and any(map(CASE_LABEL.fullmatch, stems))
        called = look_into(image_files(folder))
        if pairs or whole or (called.labels and called.others) or (folder / "dataset.json").exists():
            return True
    return False


def are_paths(cells: Iterable[str], root: Path) -> bool:
    """Whether cells of a table name images or label maps, by their endings or as they lie in `root`.

    A folder counts where each cell names another, as of series; else it is rather that of a class.
    """
    cells = list(filter(None, cells))
    found = set(cells)
    there = os.path.exists if len(found) == len(cells) else os.path.isfile  # no error for a long text
    return any(suffix_of(Path(cell)) or there(_inside(root, cell)) for cell in found)


def _named(cases: Sequence[Case]) -> list[Case]:
    """Cases without the ending _image or _img in their names."""
    return _renamed(cases, partial(IMAGE_ENDING.sub, ""))


def _with_patients(dataset: Dataset, table: Path, problem: Problem) -> Dataset:
    """With the patients that a table beside the images names; what it does not say, or cannot, is told."""
    rows = read_rows(table) if table.is_file() else []
    if not rows:
        return dataset
    columns, keys = group_columns(rows[0]), columns_named(rows[0], *CASE_COLUMNS)
    if unread := columns_named(rows[0], "fold", "split"):
        where = "they count in a list, a .csv with the columns image and label"
        dataset = noted(dataset, f"the columns {' and '.join(unread)} of {table.name} are not read; {where}")
    if not columns or not keys:
        lacking = "of patients (patient, subject or group)" if keys else "of cases (id, case or image)"
        return noted(dataset, f"{table.name} is not used, {PATIENTS_IN_PART} a column {lacking}")
    key, column = keys[0], columns[0]
    patients: dict[str, set[str]] = {}
    for row in (row for row in rows if row[key]):
        patients.setdefault(stem_of(Path(row[key])), set()).update({group_in(row, columns)} - {""})
    for name, found in patients.items():
        _require_one_patient(table, name, found, problem)
    groups = {name: min(found) for name, found in patients.items() if found}
    if not groups:
        return noted(
            dataset, f"{table.name} is not used, {PATIENTS_IN_PART} a patient in its column '{column}'"
        )
    known = [case.id for case in dataset.cases if case.id in groups]
    others = [case.id for case in dataset.cases if case.id not in groups]
    if not known:
        problem(
            "patients",
            "",
            f"{table} names the {column} of {few(list(groups), 3)}, but the cases are called {few(others, 3)}. Give "
            "both the same names (spreadsheets like to remove leading zeros), or give --id-pattern.",
        )
    cases, tests = (
        tuple(replace(case, group=groups.get(case.id, case.group)) for case in part)
        for part in (dataset.cases, dataset.test_cases)
    )
    count = len({groups[name] for name in known})
    text = f"column '{column}' of {table.name} keeps the images of {count} patients together"
    if others:
        text += (
            f", but not all, {PATIENTS_IN_PART} {len(others)} cases, each a patient then: {few(others, 3)}"
        )
    return noted(replace(dataset, cases=cases, test_cases=tests), text)


def noted(dataset: Data, *notes: str) -> Data:
    """The data set with further notes."""
    return replace(dataset, notes=(*dataset.notes, *notes))


def _read_csv(path: Path) -> Dataset:
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


def _read_datalist(path: Path, content: Any) -> Dataset:
    if not isinstance(content, dict) or "training" not in content:
        raise UserError(f"{path} is no datalist: it has no 'training' list. Expected: {LAYOUTS}.")
    return _listed_dataset(path, "MONAI datalist (JSON)", _lists(path, content), _unread(content))


def _lists(file: Path, content: dict[str, Any]) -> dict[str, list[Any]]:
    """The entries of a datalist by part."""
    lists: dict[str, list[Any]] = {TRAIN: [], VAL: [], TEST: []}
    for key in LISTED:
        lists[PARTS[key]] += _entries(file, content, key)
    return lists


def _unread(content: dict[str, Any]) -> list[str]:
    """A note on lists of images that have other names than those that are read."""
    images = [
        key
        for key, some in content.items()
        if key not in LISTED
        and isinstance(some, list)
        and any(isinstance(e, dict) and "image" in e for e in some)
    ]
    return [f"the lists {', '.join(images)} are not read; known are {', '.join(LISTED)}"] if images else []


def _of_lists(
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
    cases, tests, folds, said = _of_lists(path.parent, lists, {})
    without = [case for case in cases if case.label is None]
    labelled, said = [case for case in cases if case.label], [*notes, *said, *_without_label(without)]
    dataset = _dataset(path.stem, path.parent, layout, labelled, [*tests, *without], None, said)
    return replace(dataset, splits=tuple(folds))


def _dataset(
    name: str,
    root: Path,
    layout: str,
    cases: Sequence[Case],
    tests: Sequence[Case],
    channel_names: tuple[str, ...] | None,
    notes: Sequence[str],
) -> Dataset:
    flat = {suffix_of(image) in SUFFIXES_2D for case in cases for image in case.images}
    if len(flat) > 1:
        raise UserError(f"{root} mixes 2D pictures and volumes; give each a data set of its own.")
    if channel_names is None:
        count = _channels(cases)
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
        (),
        (),
        tuple(cases),
        tuple(tests),
        tuple(notes),
    )


def _channels(cases: Sequence[Case]) -> int:
    """Channels of most of the first three cases that can be read; two that agree are enough."""
    found: list[int] = []
    for case in cases:
        try:
            found.append(len(load_image(case.images).array))
        except UserError:
            continue  # whoever reads it for good says what is wrong
        if found.count(found[-1]) == 2 or len(found) == 3:
            break
    return max(found, key=found.count, default=1)


def by_pattern(dataset: Data, pattern: str) -> Data:
    """With the patients that are found in the ids of its cases; of test images some may lack one, which is told."""

    def patient(case: Case) -> str:
        try:
            match = re.search(pattern, case.id)
            return (match[1] if match else "") or ""
        except (re.error, IndexError) as error:
            raise UserError(f"id pattern '{pattern}' needs one group, e.g. '(.+)_left' ({error}).") from error

    for case in (case for case in dataset.cases if not patient(case)):
        raise UserError(f"id pattern '{pattern}' finds no patient in the case '{case.id}'.")
    if others := [case.id for case in dataset.test_cases if not patient(case)]:
        said = f"the id pattern finds no patient in {len(others)} test images: {few(others, 3)}"
        dataset = noted(dataset, said)
    cases, tests = (
        tuple(replace(case, group=patient(case) or case.group) for case in part)
        for part in (dataset.cases, dataset.test_cases)
    )
    return replace(dataset, cases=cases, test_cases=tests)


def repeated(names: Iterable[str]) -> list[str]:
    """Names that were there before, each time."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _require_files(dataset: Dataset) -> None:
    for case in dataset.cases:
        if case.label is None:
            raise UserError(
                f"Case '{case.id}' of {dataset.root} has no label for {case.images[0]}. Add it to the list, or take "
                "the case out of the training list."
            )
        for path in (*case.images, case.label):
            if not path.exists():
                raise UserError(
                    f"Case '{case.id}' of {dataset.root} needs {path}, which is not there. Put it there, or take the "
                    "case out of the list."
                )


def _values_in(path: Path, spatial_dims: int, palette: dict[int, int]) -> set[int]:
    """Numbers in a label file; refuse what only looks like one; `palette` is that of the others."""
    image = read_image(path, spatial_dims)
    label = label_from(image)
    require_classes(image, palette)
    values = np.unique(label)
    if len(values) > MOST_VALUES or values.min(initial=0) < 0:
        raise UserError(
            f"{path} is no label map: it has {len(values)} different values from {values.min()} to {values.max()}. "
            "Expected are few whole numbers from 0; is it an image?"
        )
    if suffix_of(path) in LOSSY and len(values) > 2:
        raise UserError(
            f"{path} has {len(values)} different values because JPEG changes numbers. Save labels as PNG."
        )
    if has_soft_edges(label, values):
        raise UserError(
            f"{path} has {len(values)} different values, mostly 255, as a resized mask has. Write two values, or "
            "let kanseg doctor DATA --fix OUT split them at the middle."
        )
    return {int(value) for value in values}


def has_soft_edges(label: np.ndarray, values: np.ndarray) -> bool:
    """Whether a label, of these values, is a mask of 0 and 255 with many numbers between them at its border."""
    if len(values) <= MOST_EDGE_VALUES or values[0] != 0 or values[-1] != FULL:
        return False
    return bool(np.count_nonzero(label > FULL / 2) > np.count_nonzero(label) / 2)


def mixed_masks(cases: Sequence[Case]) -> tuple[str, str]:
    """Whether labels hold 255 beside other values, or are masks of 0 and 255 in part: `BESIDE`, `TWO_WAYS` or ""."""
    beside = [case for case in cases if {FULL} < set(case.values) - {0}]
    if beside and 2 * max({v for case in cases for v in case.values} - {FULL}) + 1 < FULL:  # no level of grey
        who = f"{len(beside)} labels have 255 beside other classes"
        return BESIDE, f"{who}: if it marks what does not count, give --regions {IGNORE}={FULL}"
    full = [case.id for case in cases if set(case.values) - {0} == {FULL}]
    others = sorted({value for case in cases if case.id not in full for value in case.values} - {0})
    if not full or not others or FULL in others:
        return "", ""
    who = f"labels of {few(full, 3)} have the values 0 and 255, those of others 0 and {few([*map(str, others)])}"
    return (
        (TWO_WAYS, f"{who}: two ways to write one mask")
        if others == [1]
        else (BESIDE, f"{who}: is 255 a class of its own?")
    )


def _with_label_values(dataset: Dataset) -> Dataset:
    """Look into the label files: which values stand there, and do they fit what is declared."""
    declared = set(known_values(dataset)) if dataset.label_values else set()
    accepted = declared | ({dataset.ignore_value} - {None})
    cases: list[Case] = []
    palette: dict[int, int] = {}
    for case in progress(dataset.cases, "Reading labels"):
        values = _values_in(label_path(case), dataset.spatial_dims, palette)
        if declared and not values <= accepted:
            raise UserError(undeclared(label_path(case), dataset, values - accepted))
        cases.append(replace(case, values=tuple(sorted(values))))
    if not declared:
        kind, said = mixed_masks(cases)
        if kind == TWO_WAYS:
            raise UserError(
                f"In {dataset.root}, {said}. Write all in one, or let kanseg doctor DATA --fix OUT do it."
            )
        dataset = noted(dataset, *([said] if kind == BESIDE and dataset.ignore_value != FULL else []))
        values_in_order = tuple(sorted({0}.union(*(case.values for case in cases)) - {dataset.ignore_value}))
        known = colour_names(dataset.root)
        colours = [palette.get(value, GREY * value) for value in values_in_order[1:]]
        pairs = zip(colours, values_in_order[1:], strict=True)
        names = ("background", *(known.get(colour, f"label {value}") for colour, value in pairs))
        dataset = replace(dataset, label_names=names, label_values=values_in_order)
    if len(dataset.label_values) < 2:
        raise UserError(f"The labels of {dataset.root} hold the background alone; there is nothing to learn.")
    return replace(dataset, cases=tuple(cases), notes=(*dataset.notes, *_label_notes(dataset)))


def undeclared(path: Path, dataset: Dataset, foreign: Collection[int]) -> str:
    """What is wrong with a label that has values which the data set does not declare, and what to do."""
    accepted = sorted({*known_values(dataset), dataset.ignore_value} - {None})  # type: ignore[type-var]
    where = "the regions do not name" if dataset.regions else "dataset.json does not declare"
    said = f"{path} has the values {sorted(foreign)[:5]}, which {where} ({accepted} are known). "
    numbers = palette_numbers(path)
    if numbers and set(numbers) <= set(accepted):
        return said + (
            f"They are the greys of a palette, whose numbers in this file are {numbers}. If those are meant, save the "
            "labels without a palette; if not, declare the greys."
        )
    return said + "Declare them, or correct the label."


def _label_notes(dataset: Dataset) -> list[str]:
    notes = []
    if dataset.regions:
        shown = "; ".join(
            f"{name}: {list(values)}, painted as {value}"
            for name, values, value in zip(
                dataset.label_names[1:], dataset.regions[1:], dataset.label_values[1:], strict=True
            )
        )
        notes.append(f"regions, each learnt for itself and painted in this order: {shown}")
    elif dataset.label_values != tuple(range(len(dataset.label_values))):
        shown = few([f"{value} -> {i}" for i, value in enumerate(dataset.label_values)])
        notes.append(f"label values are mapped for training ({shown}) and mapped back in every output")
    if together := unions(dataset):
        shown = "; ".join(f"{name}: {list(values)}" for name, values in together.items())
        notes.append(f"scored beside the classes, but no part of the mean: {shown}")
    if dataset.ignore_value is not None:
        notes.append(
            f"voxels of the value {dataset.ignore_value} (ignore) count neither in the loss nor in scores"
        )
    return notes


def few(names: Sequence[str], count: int = 12) -> str:
    """A list in words, cut where it grows long.

    >>> few(["a", "b", "c"], 2)
    'a, b, ... (3 in all)'
    """
    return (
        ", ".join(names) if len(names) <= count else f"{', '.join(names[:count])}, ... ({len(names)} in all)"
    )


def files_of(case: Case) -> list[Path]:
    """The images of a case, and its label where it has one."""
    return [*case.images, *([case.label] if case.label else [])]


def label_path(case: Case) -> Path:
    """The label file of a case; `UserError` where it has none."""
    if case.label is None:
        raise UserError(f"{case.images[0]} has no label. Give its label, or leave the case out.")
    return case.label
