"""Labels that are DICOM Segmentation objects (PS3.3 A.51) beside the series they were drawn on.

A file numbers its segments as it likes, and holds no more planes than it needs: what it says is known by the names of
the segments and by the grid of the image. highdicom (Bridge et al., arXiv 2106.07806) reads them: the extra `dicom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.formats import Case, Dataset, few, label_path
from kanseg.data.images import LPS_TO_RAS, Image, dicom_files, is_segmentation, suffix_of
from kanseg.data.labels import IGNORE
from kanseg.errors import UserError

BACKGROUND = "background"
OFF_GRID = 0.1  # voxels that a plane may lie beside one of the image
OTHER_VOXELS = 0.01  # of the image's, by which those of the file may differ in size or direction
HALF = 0.5  # a fraction from which on a voxel belongs


def are_segmentations(cases: Sequence[Case]) -> bool:
    """Whether there are labels that are DICOM-SEG."""
    return any(case.label is not None and suffix_of(case.label) == ".dcm" for case in cases)


def with_segments(dataset: Dataset) -> Dataset:
    """The data set with a class for each name of a segment in its files, numbered from 1 in alphabetic order.

    Names that differ by blanks or capitals alone are one class. What a dataset.json says of labels does not count: it
    speaks of numbers, which such files do not keep.

    Raises:
        UserError: some labels are no DICOM-SEG, a file is unreadable, a segment has no name or that of no class, or
            highdicom is not installed.
    """
    others = [case.id for case in dataset.cases if suffix_of(label_path(case)) != ".dcm"]
    if others:
        raise UserError(
            f"Some labels of {dataset.root} are DICOM-SEG and some are not ({few(others, 3)}). Give each kind a data "
            "set of its own."
        )
    spelt: dict[str, str] = {}
    for case in dataset.cases:
        path = label_path(case)
        for name in _segments(_opened(path, header=True)):
            if _key(name) in ("", BACKGROUND, IGNORE):
                raise UserError(
                    f"{path} has a segment called '{name}', which names no class. Give it another name."
                )
            spelt.setdefault(_key(name), name)
    names = [spelt[key] for key in sorted(spelt)]
    labels: dict[str, Any] = {
        "label_names": (BACKGROUND, *names),
        "label_values": tuple(range(len(names) + 1)),
    }
    return replace(dataset, **labels, regions=(), ignore_value=None)


def read_segments(path: Path, like: Image, names: Sequence[str]) -> np.ndarray:
    """The label map (*S) of a DICOM-SEG on the grid of its image; a segment is 1 + its place in `names`.

    Raises:
        UserError: segments that overlap, that `names` lacks, or that lie beside the voxels of the image; a file drawn
            on an image of another frame of reference.
    """
    file, keys = _opened(path), [_key(name) for name in names]
    _require_same_frame(file, path, like)
    labels = np.zeros(like.array.shape[1:], np.int32)
    for number, name in zip(file.segment_numbers, _segments(file), strict=True):
        if _key(name) not in keys:
            raise UserError(f"{path} has a segment '{name}', which is none of {few(names)}.")
        voxels = _voxels(file, int(number), path, like)
        taken = labels[voxels]
        value = 1 + keys.index(_key(name))
        clash = next((v for v in np.unique(taken).tolist() if v not in (0, value)), None)
        if clash is not None:
            raise UserError(
                f"{path}: the segments '{names[clash - 1]}' and '{name}' overlap in {int((taken == clash).sum())} "
                "voxels; a label map has one class a voxel. Decide in a viewer which of them a voxel belongs to."
            )
        labels[voxels] = value
    return labels


def _key(name: str) -> str:
    return " ".join(name.split()).casefold()


def require_highdicom(path: Path | str) -> Any:
    """The library that reads DICOM-SEG.

    Raises:
        UserError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise UserError(
            f"{path} is DICOM-SEG; reading it needs highdicom: pip install 'kanseg[dicom]'."
        ) from error
    return highdicom


def _opened(path: Path, *, header: bool = False) -> Any:
    """The file; with `header` its voxels stay on the disk until they are asked for."""
    highdicom = require_highdicom(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if not is_segmentation(path):
        raise UserError(
            f"{path} is no DICOM-SEG. Export the label as one (not as RTSTRUCT or image), or as NIfTI."
        )
    try:
        return highdicom.seg.segread(path, lazy_frame_retrieval=header)
    except Exception as error:  # of highdicom and pydicom, without a common class
        raise UserError(f"{path} cannot be read as DICOM-SEG ({error}). Export it again.") from error


def _segments(file: Any) -> list[str]:
    """Names of the segments, in their order."""
    return [
        " ".join(str(file.get_segment_description(n).segment_label).split()) for n in file.segment_numbers
    ]


def _require_same_frame(file: Any, path: Path, like: Image) -> None:
    """Two images of one frame of reference (a scan of one patient, lying still) have its identifier in common."""
    if not like.path.is_dir():
        return
    from pydicom import dcmread

    image = dcmread(dicom_files(like.path)[0], stop_before_pixels=True)
    frames = [str(header.get("FrameOfReferenceUID") or "") for header in (file, image)]
    if all(frames) and frames[0] != frames[1]:
        raise UserError(
            f"{path} was drawn on another scan than {like.path}: their frames of reference differ."
        )


def _voxels(file: Any, number: int, path: Path, like: Image) -> tuple[np.ndarray, ...]:
    """Indices of a segment's voxels in the image, an array an axis."""
    try:
        volume = file.get_volume(
            segment_numbers=[number], combine_segments=False, allow_missing_positions=True
        )
    except (RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: its planes make no volume ({error}). Export it as one, or as NIfTI."
        ) from error
    array = volume.array[..., 0]
    to_index = np.linalg.inv(like.affine) @ LPS_TO_RAS @ volume.affine
    steps = np.abs(to_index[:3, :3])[:, [size > 1 for size in array.shape]]
    if (np.abs(steps - (steps > HALF)) > OTHER_VOXELS).any():
        raise UserError(
            f"{path} has other voxels than {like.path}. Export it on the grid of the image, or as NIfTI."
        )
    inside = np.argwhere(array >= HALF)
    exact = inside @ to_index[:3, :3].T + to_index[:3, 3]
    index = np.rint(exact).astype(int)
    off = float(np.abs(exact - index).max(initial=0))
    beyond = ((index < 0) | (index >= like.array.shape[1:])).any()
    if off > OFF_GRID or beyond:
        why = "outside the image" if beyond else f"{off:.2f} voxels beside those of the image"
        raise UserError(f"{path} lies {why} {like.path}. Was it drawn on this series?")
    return tuple(index.T)
