"""Images and the label maps that belong to them, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kanseg.data.cases import Case, Problem, few
from kanseg.data.listing import (
    CITY_IDS,
    CITY_IMAGES,
    cases_of,
    channel_of,
    image_files,
    inner_folders,
    name_below,
    series_cases,
    special_files,
    with_names,
)
from kanseg.data.suffixes import stem_of
from kanseg.errors import UserError

LABEL_ENDINGS = ("", "_mask", "_label", "_seg", CITY_IDS)  # of a label file, behind the name of its image
LABEL_ENDING = re.compile(r"(_mask|_label|_seg)(_\d+)?$")
IMAGE_ENDING = re.compile(rf"(_image|_img|_{CITY_IMAGES})$")
BY_CLASS = "masks by class"  # a problem: label maps to be made of several files
UNUSED = "labels have no image and are not used"


def require_channels(cases: Sequence[Case], names: tuple[str, ...] | None, problem: Problem) -> None:
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


def find_test_cases(root: Path) -> list[Case]:
    folder = root / "imagesTs"
    if not folder.is_dir():
        return []
    return [*cases_of(image_files(folder)), *series_cases(folder)]


def with_test_labels(
    root: Path, tests: Sequence[Case], groups: Mapping[str, str]
) -> tuple[list[Case], list[str]]:
    """Test images with their labels in labelsTs, where they are, and a note on labels that belong to none."""
    folder = root / "labelsTs"
    files = {stem_of(p): p for p in (*image_files(folder), *special_files(folder))} if folder.is_dir() else {}
    found = {case.id: (label_names(case.id, files) or [""])[0] for case in tests}
    tests = [
        replace(case, label=case.label or files.get(found[case.id]), group=groups.get(case.id, case.group))
        for case in tests
    ]
    unused = sorted(set(files) - {*found.values(), *(stem_of(c.label) for c in tests if c.label)})
    return tests, [f"{len(unused)} test {UNUSED}: {', '.join(unused[:3])}"] if unused else []


def with_labels(
    cases: Sequence[Case], labels: Sequence[Path], groups: dict[str, str], problem: Problem
) -> tuple[list[Case], list[str]]:
    """Images with the labels of the same name (or name + _mask), and a note on labels that belong to none."""
    files: dict[str, list[Path]] = {}
    for path in labels:
        files.setdefault(stem_of(path), []).append(path)
    ids = {case.id for case in cases}
    of_case = {  # a_mask belongs to a, unless there is an image a_mask
        name: [n for n in label_names(name, files) if n == name or n not in ids] for name in ids
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


def label_names(case: str, files: Iterable[str]) -> list[str]:
    """Names of the label files that are called as the case is."""
    return [case + ending for ending in LABEL_ENDINGS if case + ending in files]


def in_two_trees(images: Path, labels: Path, problem: Problem) -> tuple[list[Case], list[str]]:
    """As `in_two_folders`; where `images` has nothing but folders of images, of each with that of `labels`.

    Ids then begin with the names of these folders.
    """
    inner = inner_folders(images)
    if not inner:
        return in_two_folders(image_files(images), images, labels, problem)
    cases: list[Case] = []
    notes = [_of_inner(images, inner)]
    for folder in inner:
        beside = labels / folder.name
        if not beside.is_dir():
            raise UserError(f"{folder} has no labels beside it, in {beside}. Add them, or take it away.")

        def of_folder(kind: str, case: str, *what: Any, folder: Path = folder) -> None:
            problem(kind, name_below(folder, case), *what)

        found, said = in_two_trees(folder, beside, of_folder)
        cases += with_names(found, partial(name_below, folder))
        notes += said
    return cases, notes


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


def in_two_folders(
    files: Sequence[Path], images: Path, labels: Path, problem: Problem
) -> tuple[list[Case], list[str]]:
    """Cases of the files, and of the series in `images`, with their labels, and a note on labels of none."""
    masks = [*image_files(labels), *special_files(labels)]
    ids = [mask for mask in masks if stem_of(mask).endswith(CITY_IDS)]
    masks = ids or masks  # not colours and instances, which lie beside
    by_class = {} if masks else _masks_by_class(files, labels)
    if by_class:
        masks = [own[0] for own in by_class.values()]
    named = {stem_of(p) for p in masks}
    stems = [IMAGE_ENDING.sub("", stem_of(file)) for file in files]
    own = bool(files) and all(label_names(stem, named) for stem in stems)  # x_0000 may be a frame
    cases = without_endings(cases_of(files, join=not own, problem=problem))
    cases += series_cases(images, problem)
    require_channels(cases, None, problem)
    cases, notes = with_labels(cases, masks, {}, problem)
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
    for folder in inner_folders(labels):
        for file in image_files(folder):
            found.setdefault(stem_of(file), []).append(file)
    own = [label_names(IMAGE_ENDING.sub("", stem_of(image)), found) for image in images]
    return found if any(len(found[name]) > 1 for names in own for name in names) else {}


def without_endings(cases: Sequence[Case]) -> list[Case]:
    """Cases without the ending _image or _img in their names."""
    return with_names(cases, partial(IMAGE_ENDING.sub, ""))
