"""Folders that nothing but their names describes: images beside labels, parts to train and test on, a folder a case."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np

from kanseg.data.case_folders import CASE_LABEL, UNNAMED, look_into, of_one_case, usual_channels
from kanseg.data.cases import (
    LAYOUTS,
    Case,
    Dataset,
    Problem,
    as_dataset,
    case_by_names,
    count_channels,
    few,
    repeated,
)
from kanseg.data.images import colour_codes, load_image
from kanseg.data.listing import (
    CASE_IMAGE,
    VOC_IMAGES,
    VOC_LABELS,
    VOC_LISTS,
    cases_of,
    folders_called,
    folders_in,
    image_files,
    in_tree,
    inner_folders,
    segmentations_in,
    series_of,
    too_many,
    with_names,
)
from kanseg.data.lists import LISTS
from kanseg.data.pairs import (
    IMAGE_ENDING,
    LABEL_ENDING,
    find_test_cases,
    in_two_folders,
    in_two_trees,
    label_names,
    require_channels,
    with_labels,
    with_test_labels,
    without_endings,
)
from kanseg.data.suffixes import stem_of
from kanseg.data.tables import PARTS, TEST, TRAIN, VAL
from kanseg.data.values import MOST_EDGE_VALUES
from kanseg.errors import UserError

MOST_BESIDE = 4  # folders that are told apart as images and label maps
LOOKS, LOOKED_AT = 3, 256  # pictures that are looked at for that, and their pixels an axis


def read_folders(root: Path, problem: Problem) -> Dataset:
    """images/ (or imagesTr/) beside labels/ or masks/, or all in one folder; cases.csv may give a group or patient."""
    if parts := _parts(root):
        return _read_parts(root, parts, problem)
    images, labels = folders_called(root)
    if images is None or labels is None:
        return _read_one_folder(root, problem)
    if images.name == VOC_IMAGES and labels.name == VOC_LABELS:
        return _read_voc(root, images, labels, problem)
    cases, unused = in_two_trees(images, labels, problem)
    layout = f"folders {images.name}/ and {labels.name}/"
    tests, others = with_test_labels(root, find_test_cases(root), {})
    return as_dataset(root.name, root, layout, cases, tests, None, [*unused, *others])


def _read_voc(root: Path, images: Path, labels: Path, problem: Problem) -> Dataset:
    """PASCAL VOC's folders: only some images have a label, and lists say which of them are to validate on."""
    masks = {stem_of(path) for path in image_files(labels)}
    files = image_files(images)
    labelled = [file for file in files if stem_of(file) in masks]
    cases, notes = in_two_folders(labelled, images, labels, problem)
    if others := len(files) - len(labelled):
        notes.append(f"{others} images have no label in {labels.name}/ and are not used")
    val = root / VOC_LISTS / "val.txt"
    validation = set(val.read_text(encoding="utf-8").split()) if val.is_file() else set()
    ids = [case.id for case in cases]
    folds, said = _own_fold(ids, validation, f"{VOC_LISTS}/val.txt")
    dataset = as_dataset(
        root.name, root, f"PASCAL VOC ({VOC_IMAGES}, {VOC_LABELS})", cases, [], None, [*notes, *said]
    )
    return replace(dataset, splits=folds)


def _parts(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """Folders of images and labels by part: those in train/, val/ and test/, or those that have such folders."""
    found: dict[str, tuple[Path, Path | None]] = {}
    images, labels = folders_called(root)
    for folder in folders_in(images or root) if not (images and image_files(images)) else ():
        part = PARTS.get(folder.name.lower().rstrip("0123456789"))  # train2017
        own = (folder, labels / folder.name if labels else None)
        if images is None:
            inside, own_labels = folders_called(folder)
            own = (inside or folder, own_labels)
        if part is None or not (image_files(own[0]) or inner_folders(own[0])):
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
            found[part], unused = in_two_trees(images, labels, problem)
            notes += unused
        elif part == TEST:
            found[part] = in_tree(images)
        else:
            raise UserError(
                f"{images} has no labels beside it, as those to train on have. Add them, or take it away."
            )
    if repeated(case.id for cases in found.values() for case in cases):
        for part, cases in found.items():
            found[part] = with_names(cases, f"{part}_{{}}".format)
    layout = f"images and labels in {', '.join(parts)}"
    cases = [*found[TRAIN], *found[VAL]]
    folds, said = _own_fold([case.id for case in cases], {case.id for case in found[VAL]}, VAL)
    dataset = as_dataset(root.name, root, layout, cases, found[TEST], None, [*notes, *said])
    return replace(dataset, splits=folds)


def _own_fold(
    ids: Sequence[str], validation: Collection[str], where: str
) -> tuple[tuple[Mapping[str, Sequence[str]], ...], list[str]]:
    """The fold of data that say what to validate on, and a note on it; none where that is nothing or all."""
    fold = {TRAIN: [i for i in ids if i not in validation], VAL: [i for i in ids if i in validation]}
    if not all(fold.values()):
        return (), []
    return (fold,), [f"one fold, which validates on the {len(fold[VAL])} images of {where}"]


def _read_one_folder(root: Path, problem: Problem) -> Dataset:
    """x.png (or x_image.png) beside x_mask.png, x_label.png or x_seg.png; x.nrrd beside 3D Slicer's x.seg.nrrd."""
    files = image_files(root)
    masks = [file for file in files if LABEL_ENDING.search(stem_of(file))]
    images = [file for file in files if file not in masks]
    masks += segmentations_in(root)
    cases = without_endings(cases_of(images, join=False))
    if not any(label_names(case.id, {stem_of(mask) for mask in masks}) for case in cases):
        return _read_case_folders(root, problem)
    cases, unused = with_labels(cases, masks, {}, problem)
    return as_dataset(root.name, root, "images and masks in one folder", cases, [], None, unused)


def _read_case_folders(root: Path, problem: Problem) -> Dataset:
    """A folder a case: NAME/image.nii.gz (or image_0000.nii.gz, ..., or a DICOM series, in a folder or not) beside
    NAME/label.nii.gz (or mask, seg, or the one DICOM-SEG, RTSTRUCT or .seg.nrrd, beside which one image needs no name).
    """
    cases = []
    for folder in folders_in(root):
        files = image_files(folder)
        images = [file for file in files if CASE_IMAGE.fullmatch(stem_of(file))]
        labels = [file for file in files if CASE_LABEL.fullmatch(stem_of(file))]
        _require_single_names(folder, images, problem)
        if not images:
            series = series_of(folder)
            images = [path for path in series if len(series) == 1 or CASE_IMAGE.fullmatch(path.name)]
            if series and not images:
                problem("several series", folder.name, too_many(folder, series))
        if not labels:
            labels = segmentations_in(folder)
            images = images or files[: bool(labels and len(files) == 1)]
        if not images:
            continue
        cases.append(Case(folder.name, tuple(images), _one_label(folder, labels, problem), folder.name))
    require_channels(cases, None, problem)
    if not cases and (dataset := _read_named_folders(root, problem)):
        return dataset
    if not any(case.label for case in cases):
        several = [folder for folder in folders_in(root) if len(image_files(folder)) > 1]
        hint = f" If its folders are classes, put them into {root / 'train'}." if len(several) > 1 else ""
        if with_masks(several):
            hint = " Its folders hold images beside their masks: put all into one folder."
        if pair := beside_masks(several):
            looks = f"{pair[0].name}/ looks like images and {pair[1].name}/ like their label maps"
            hint = f" {looks}: call them images/ and labels/, with files of the same names."
        if lists := sorted(file.name for file in root.iterdir() if file.suffix.lower() in LISTS):
            hint += f" Where {few(lists, 3)} there lists the images, give that file in place of the folder."
        raise UserError(f"{root} has no layout that kanseg knows.{hint} Expected: {LAYOUTS}.")
    return as_dataset(root.name, root, "one folder per case with image and label", cases, [], None, [])


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
    files = {folder: image_files(folder) for folder in folders_in(root)}
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
        cases.append(case_by_names(folder.name, images, names, _one_label(folder, found.labels, problem)))
    if not cases:
        return None
    layout = f"one folder per case with label and a file for each channel ({few(names)})"
    named = names if len(names) == count_channels(cases) and names != UNNAMED else None
    return as_dataset(root.name, root, layout, cases, [], named, [])


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
