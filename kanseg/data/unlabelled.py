"""Images to predict: a file, a folder, or folders with a case each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kanseg.data.case_folders import by_channel, is_called_label, look_into, of_one_case
from kanseg.data.cases import Case, case_by_names
from kanseg.data.dicom import is_no_image
from kanseg.data.listing import (
    CASE_IMAGE,
    by_number,
    cases_of,
    channel_of,
    folders_called,
    folders_in,
    image_files,
    in_tree,
    segmentations_in,
    special_files,
    with_dicom,
)
from kanseg.data.suffixes import SEGMENTS, stem_of
from kanseg.errors import UserError


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
        counts = [len(paths) for paths in by_number(files).values()]
        return cases_of(files, join=channels is None or set(counts) == {1})
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())]
    series = with_dicom(folders)
    if not series and (cases := _in_case_folders(path, names)):
        return cases
    if not series and not _inner(path) and folders_called(path)[1] is None and (cases := in_tree(path)):
        return cases
    if not series:
        but = f", but {SEGMENTS}, which no images are read from" if segmentations_in(path) else ""
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
    cases = [case_by_names(name or folder, one, names) for name, one in found.items()]
    inside = {image for case in cases for image in case.images}
    left = [file for file in files if file not in inside and not is_called_label(file)]
    return sorted(
        [*cases, *(Case(stem_of(f), (f,), None, stem_of(f)) for f in left)], key=lambda case: case.id
    )


def _in_case_folders(path: Path, names: Sequence[str]) -> list[Case]:
    """A case for each folder: its images by the names of channels, or those called image, or its only image."""
    cases = []
    for folder in folders_in(path):
        files = image_files(folder)
        images = [file for file in files if CASE_IMAGE.fullmatch(stem_of(file))]
        others = [file for file in files if not is_called_label(file)]
        if found := of_one_case(files, names):
            cases.append(case_by_names(folder.name, found, names))
        elif images or len(others) == 1:
            cases.append(Case(folder.name, tuple(images or others), None, folder.name))
    return cases


def labels_in_case_folders(path: Path) -> dict[str, Path]:
    """The label map of each folder that has one, by the folder's name."""
    found = {folder.name: look_into(image_files(folder)).labels for folder in folders_in(path)}
    return {name: labels[0] for name, labels in found.items() if len(labels) == 1}


def _joined(files: Sequence[Path], channels: int) -> list[Case]:
    """Files numbered from _0000 on as channels of one image each, where some image has all of them.

    What is left over (a file without a number, an image that lacks a channel) is a case too, and fails by itself.
    """
    numbered: dict[str, dict[int, Path]] = {}
    for file in files:
        if own := channel_of(file):
            numbered.setdefault(own[0], {})[own[1]] = file
    if not any(sorted(found) == list(range(channels)) for found in numbered.values()):
        return cases_of(
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
    loose = [file.name for file in special_files(path) if not is_no_image(file)]
    folders = [f"{f.name}/" for f in folders_in(path) if image_files(f) or with_dicom([f])]
    return [*([f"{len(loose)} .dcm files"] if loose else []), *folders]


def _inner(folder: Path) -> str:
    """A sentence that names the folders of images in a data set."""
    found = [str(folder / name) for name in ("imagesTs", "imagesTr", "images") if (folder / name).is_dir()]
    return f" Did you mean {' or '.join(found)}?" if found else ""
