"""Files and folders with images, by what they are called, and the cases that they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from kanseg.data.cases import Case, Problem, few, refuse
from kanseg.data.dicom import is_dicom, is_no_image, is_segmentation
from kanseg.data.suffixes import SUFFIXES_SEGMENTS, stem_of, suffix_of
from kanseg.errors import UserError

CHANNEL = re.compile(r"^(.+)_(\d{4})$")
VOC_IMAGES, VOC_LABELS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
CITY_IMAGES, CITY_LABELS, CITY_IDS = "leftImg8bit", "gtFine", "_gtFine_labelIds"  # Cityscapes
IMAGE_FOLDERS = ("images", "imagesTr", "image", VOC_IMAGES, CITY_IMAGES)
LABEL_FOLDERS = ("labels", "masks", "labelsTr", "label", "mask", VOC_LABELS, CITY_LABELS)
CASE_IMAGE = re.compile(r"(image|img)(_\d{4})?")


def _may_be_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    return is_dicom(path) and not is_no_image(path)


def image_files(folder: Path) -> list[Path]:
    """Images directly in a folder, links to nothing among them; hidden files and other things are passed over."""
    named = (p for p in folder.iterdir() if suffix_of(p) not in ("", *SUFFIXES_SEGMENTS) and p.name[0] != ".")
    return sorted(p for p in named if p.is_file() or (p.is_symlink() and not p.exists()))


def series_cases(folder: Path, problem: Problem = refuse) -> list[Case]:
    """A case for each folder with one DICOM series, however deep that lies in it."""
    found = {path.name: series_of(path) for path in folders_in(folder)}
    for name, series in found.items():
        if len(series) > 1:
            problem("several series", name, too_many(folder / name, series))
    return [Case(name, (series[0],), None, name) for name, series in found.items() if series]


def too_many(folder: Path, series: Sequence[Path]) -> str:
    shown = few([str(one.relative_to(folder)) for one in series], 3)
    return f"{folder} has {len(series)} folders with DICOM series ({shown}); one is expected. Take the others away."


def series_of(folder: Path) -> list[Path]:
    """The folders with DICOM images in a folder, itself among them."""
    below = sorted(path for path in folder.rglob("*") if path.is_dir())
    hidden = {path for path in below if any(part[0] == "." for part in path.relative_to(folder).parts)}
    return with_dicom(path for path in (folder, *below) if path not in hidden)


def with_dicom(folders: Iterable[Path]) -> list[Path]:
    """The folders that hold DICOM images themselves."""
    return [folder for folder in folders if any(map(_may_be_dicom, folder.iterdir()))]


def special_files(folder: Path) -> list[Path]:
    """Files that are no plain images by their names: of DICOM, which may be some, and segmentations of 3D Slicer."""
    return sorted(p for p in folder.iterdir() if suffix_of(p) in SUFFIXES_SEGMENTS and p.name[0] != ".")


def segmentations_in(path: Path) -> list[Path]:
    """The DICOM-SEG, RTSTRUCT and .seg.nrrd of a folder, or the file itself where it is one."""
    files = special_files(path) if path.is_dir() else [path] if suffix_of(path) in SUFFIXES_SEGMENTS else []
    return [file for file in files if file.is_file() and is_segmentation(file)]


def folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def by_number(files: Sequence[Path]) -> dict[str, list[Path]]:
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


def cases_of(files: Sequence[Path], *, join: bool = True, problem: Problem = refuse) -> list[Case]:
    """A case for each file, or for each group of nnU-Net channels."""
    channels = by_number(files) if join else {}
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


def files_with_numbers(files: Sequence[Path], problem: Problem) -> list[Path]:
    """The files whose names have a channel, where that is most of them; what is wrong with the others is said."""
    numbered = [file for file in files if channel_of(file)]
    if 2 * len(numbered) <= len(files):
        return list(files)
    for file in files:
        if file not in numbered:
            why = f"{file} has no channel in its name, such as _0000, which {len(numbered)} others have; rename it"
            problem("no channel in the name", stem_of(file), why)
    return numbered


def in_tree(folder: Path) -> list[Case]:
    """Images without labels, with ids as `in_two_trees` gives them."""
    inner = inner_folders(folder)
    below = (with_names(in_tree(one), partial(name_below, one)) for one in inner)
    return [case for cases in below for case in cases] if inner else cases_of(image_files(folder))


def inner_folders(folder: Path) -> list[Path]:
    """Folders with images, however deep, in a folder that has none itself; a picture beside a series is none."""
    if image_files(folder):
        return []
    inner = [one for one in folders_in(folder) if not with_dicom([one])]
    return [one for one in inner if image_files(one) or inner_folders(one)]


def name_below(folder: Path, case: str) -> str:
    return case if case.startswith(f"{folder.name}_") else f"{folder.name}_{case}"


def with_names(cases: Iterable[Case], name: Callable[[str], str]) -> list[Case]:
    names = ((case, name(case.id)) for case in cases)
    return [replace(case, id=new, group=new) for case, new in names]


def folders_called(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of images and of labels, by their names."""
    return _called(root, IMAGE_FOLDERS), _called(root, (*LABEL_FOLDERS, "annotations"))


def _called(root: Path, names: Sequence[str]) -> Path | None:
    """The folder that has one of these names, in any capitals; of several the one that holds images."""
    folders = folders_in(root)
    there = [folder for name in names for folder in folders if folder.name.lower() == name.lower()]
    if len(there) < 2:
        return there[0] if there else None
    holding = [
        folder for folder in there if image_files(folder) or series_of(folder) or special_files(folder)
    ]
    return only(holding) or there[0]


def only(found: Sequence[Path]) -> Path | None:
    """The one place where something was found, also under two names (a link); `UserError` names several."""
    if len({folder.resolve() for folder in found}) > 1:
        raise UserError(
            f"{' and '.join(map(str, found))} all hold images, and only one of them would be read. Leave one, or put "
            "all into one."
        )
    return found[0] if found else None
