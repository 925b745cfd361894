"""Labels that are DICOM Segmentation objects (PS3.3 A.51), RT Structure Sets (A.19) or 3D Slicer's .seg.nrrd.

A file numbers its segments as it likes, and holds no more planes than it needs: what it says is known by the names of
the segments and by the grid of the image. highdicom (Bridge et al., arXiv 2106.07806) reads DICOM-SEG: the extra
`dicom`. Contours of structures are filled by the centres of voxels; one within another cuts a hole. Slicer keeps a
number in one of several layers for each segment, and cuts the layers to what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread

from kanseg.data.cases import Case, Dataset, few, label_path
from kanseg.data.class_names import SEGMENT_NAME
from kanseg.data.dicom import dicom_files, is_segmentation, is_structures
from kanseg.data.headers import header_tags
from kanseg.data.images import LPS_TO_RAS, Image, read_layers
from kanseg.data.labels import IGNORE
from kanseg.data.suffixes import SEG_NRRD, SEGMENTS, SUFFIXES_SEGMENTS, stem_of, suffix_of
from kanseg.errors import UserError, did_you_mean

BACKGROUND = "background"
OFF_GRID = 0.1  # voxels that a plane may lie beside one of the image
OTHER_VOXELS = 0.01  # of the image's, by which those of the file may differ in size or direction
HALF = 0.5  # a fraction from which on a voxel belongs
ASIDE = (1.2e-5, 0.7e-5)  # voxels: no line there and back (a keyhole) goes exactly through such a place
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")  # contours that hold voxels


def are_segmentations(cases: Sequence[Case]) -> bool:
    """Whether there are labels that are DICOM-SEG, RTSTRUCT or .seg.nrrd."""
    return any(case.label is not None and suffix_of(case.label) in SUFFIXES_SEGMENTS for case in cases)


def with_segments(dataset: Dataset, only: Sequence[str] = ()) -> Dataset:
    """The data set with a class for each name of a segment in its files, numbered from 1 in alphabetic order.

    Names that differ by blanks or capitals alone are one class. What a dataset.json says of labels does not count: it
    speaks of numbers, which such files do not keep.

    Args:
        only: names of the segments that are classes, in the order of their numbers; others are left aside.

    Raises:
        UserError: some labels are nothing of the kind, a file is unreadable, a segment has no name or that
            of no class, no file has one that `only` names, or highdicom is not installed.
    """
    others = [case.id for case in dataset.cases if suffix_of(label_path(case)) not in SUFFIXES_SEGMENTS]
    if others:
        raise UserError(
            f"Some labels of {dataset.root} are {SEGMENTS} and some are not ({few(others, 3)}). Give each kind a data "
            "set of its own."
        )
    spelt: dict[str, str] = {}
    wanted = {_key(name): name for name in only}
    for case in dataset.cases:
        path = label_path(case)
        for name in _opened(path, header=True).names.values():
            if (key := _key(name)) in ("", BACKGROUND, IGNORE) and key in (wanted or (key,)):
                raise UserError(
                    f"{path} has a segment called '{name}', which names no class. Give it another name, or choose "
                    "segments with --only."
                )
            spelt.setdefault(key, name)
    if strange := [name for key, name in wanted.items() if key not in spelt]:
        raise UserError(
            f"No label of {dataset.root} has a segment '{strange[0]}'.{did_you_mean(strange[0], spelt.values())}"
        )
    names = [*wanted.values()] or [spelt[key] for key in sorted(spelt)]
    labels: dict[str, Any] = {
        "label_names": (BACKGROUND, *names),
        "label_values": tuple(range(len(names) + 1)),
    }
    return replace(dataset, **labels, regions=(), ignore_value=None)


def read_segments(path: Path, like: Image, names: Sequence[str], *, only: bool = False) -> np.ndarray:
    """The label map (*S) of such a file on the grid of its image; a segment is 1 + its place in `names`.

    Args:
        only: other segments are left aside, and of those that overlap the later in `names` has the voxel.

    Raises:
        UserError: segments that overlap, that `names` lacks, or that lie beside the voxels of the image; a file drawn
            on an image of another frame of reference.
    """
    file, keys = _opened(path), [_key(name) for name in names]
    _require_same_frame(file, path, like)
    labels = np.zeros(like.array.shape[1:], np.int32)
    found = {number: _key(name) for number, name in file.names.items()}
    if strange := [file.names[number] for number, key in found.items() if key not in keys and not only]:
        raise UserError(f"{path} has a segment '{strange[0]}', which is none of {few(names)}.")
    numbers = [number for number, key in found.items() if key in keys]
    for number in sorted(numbers, key=lambda number: keys.index(found[number])) if only else numbers:
        voxels = file.voxels(number, path, like)
        taken = labels[voxels]
        value = 1 + keys.index(found[number])
        clash = next((v for v in np.unique(taken).tolist() if v not in (0, value)), None)
        if clash is not None and not only:
            raise UserError(
                f"{path}: the segments '{names[clash - 1]}' and '{file.names[number]}' overlap in "
                f"{int((taken == clash).sum())} voxels; a label map has one class a voxel. Choose the segments that "
                "are classes with kanseg convert --only, the last of which has the voxel, or part them in a viewer."
            )
        labels[voxels] = value
    if numbers and isinstance(file, Structures) and not labels.any():
        _refuse_place(path, like, "outside the image")
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


def _opened(path: Path, *, header: bool = False) -> Segments | Structures | Layers:
    """The file; with `header` its voxels stay on the disk until they are asked for."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if not is_segmentation(path):
        raise UserError(
            f"{path} is neither DICOM-SEG nor RTSTRUCT. Export the label as one, not as an image, or as NIfTI."
        )
    if suffix_of(path) == SEG_NRRD:
        return Layers(path)
    structures = is_structures(path)
    highdicom: Any = None if structures else require_highdicom(path)
    try:
        file = (
            Structures(dcmread(path))
            if structures
            else Segments(highdicom.seg.segread(path, lazy_frame_retrieval=header))
        )
        len(file.names)  # are read here, for a file that was cut short lacks what they need
        return file
    except Exception as error:  # of highdicom and pydicom, without a common class
        kind = "RTSTRUCT" if structures else "DICOM-SEG"
        raise UserError(f"{path} cannot be read as {kind} ({error}). Export it again.") from error


def _plain(name: Any) -> str:
    return " ".join(str(name or "").split())


@dataclass(frozen=True)
class Segments:
    """A DICOM-SEG: which segments it has, and where."""

    file: Any

    @cached_property
    def names(self) -> Mapping[int, str]:
        """Name of each segment by its number, in their order."""
        return {
            int(n): _plain(self.file.get_segment_description(n).segment_label)
            for n in self.file.segment_numbers
        }

    @property
    def frame(self) -> str:
        """Its frame of reference."""
        return str(self.file.get("FrameOfReferenceUID") or "")

    def voxels(self, number: int, path: Path, like: Image) -> tuple[np.ndarray, ...]:
        """Indices of a segment's voxels in the image, an array an axis."""
        try:
            volume = self.file.get_volume(
                segment_numbers=[number], combine_segments=False, allow_missing_positions=True
            )
        except (RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: its planes make no volume ({error}). Export it as one, or as NIfTI."
            ) from error
        return _laid_on(volume.array[..., 0] >= HALF, LPS_TO_RAS @ volume.affine, path, like)


@dataclass(frozen=True)
class Layers:
    """A segmentation of 3D Slicer: which segments its header tells, and where they are in its layers."""

    path: Path
    frame = ""

    @cached_property
    def _tags(self) -> Mapping[str, str]:
        try:
            return header_tags(self.path)
        except RuntimeError as error:
            raise UserError(f"{self.path} is damaged or not what its suffix says. Save it again.") from error

    @cached_property
    def names(self) -> Mapping[int, str]:
        """Name of each segment by its number in the header."""
        found = {
            int(match[1]): _plain(name)
            for key, name in self._tags.items()
            if (match := SEGMENT_NAME.fullmatch(key))
        }
        if not found:
            raise UserError(
                f"{self.path} has no segments in its header, as 3D Slicer writes. If it is a label map, call it "
                f"{stem_of(self.path)}.nrrd."
            )
        return dict(sorted(found.items()))

    @cached_property
    def image(self) -> Image:
        """Its layers."""
        return read_layers(self.path)

    def voxels(self, number: int, path: Path, like: Image) -> tuple[np.ndarray, ...]:
        """Indices of a segment's voxels in the image, an array an axis."""
        of = f"Segment{number}_"  # Slicer before 4.11 has a layer of ones for each
        layer, value = self._tags.get(f"{of}Layer", str(number)), self._tags.get(f"{of}LabelValue", "1")
        if not (layer.isdecimal() and value.isdecimal() and int(layer) < len(self.image.array)):
            raise UserError(f"{path} has no layer {layer} for '{self.names[number]}'. Save it again.")
        return _laid_on(self.image.array[int(layer)] == int(value), self.image.affine, path, like)


def _laid_on(mask: np.ndarray, affine: np.ndarray, path: Path, like: Image) -> tuple[np.ndarray, ...]:
    """Indices in an image of the voxels of a mask on another grid, whose voxels are those of the image or a part."""
    to_index = np.linalg.inv(like.affine) @ affine
    steps = np.abs(to_index[:3, :3])[:, [size > 1 for size in mask.shape]]
    if (np.abs(steps - (steps > HALF)) > OTHER_VOXELS).any():
        raise UserError(
            f"{path} has other voxels than {like.path}. Export it on the grid of the image, or as NIfTI."
        )
    inside = np.argwhere(mask)
    exact = inside @ to_index[:3, :3].T + to_index[:3, 3]
    index = np.rint(exact).astype(int)
    off = float(np.abs(exact - index).max(initial=0))
    beyond = ((index < 0) | (index >= like.array.shape[1:])).any()
    if off > OFF_GRID or beyond:
        _refuse_place(
            path, like, "outside the image" if beyond else f"{off:.2f} voxels beside those of the image"
        )
    return tuple(index.T)


@dataclass(frozen=True)
class Structures:
    """An RT Structure Set: which structures have closed contours, and where."""

    file: Any

    @cached_property
    def names(self) -> Mapping[int, str]:
        """Name of each structure by its number, in their order."""
        return {
            int(one.ROINumber): _plain(one.get("ROIName"))
            for one in self.file.get("StructureSetROISequence") or ()
            if self._contours.get(int(one.ROINumber))
        }

    @property
    def frame(self) -> str:
        """Its frame of reference; "" where it has several."""
        references = self.file.get("ReferencedFrameOfReferenceSequence") or ()
        frames = {str(one.get("FrameOfReferenceUID") or "") for one in references}
        return str(self.file.get("FrameOfReferenceUID") or "") or (frames.pop() if len(frames) == 1 else "")

    @cached_property
    def _contours(self) -> Mapping[int, list[Any]]:
        """Of each structure the points of its closed contours, x y z x y z ... in mm (LPS)."""
        found: dict[int, list[Any]] = {}
        for one in self.file.get("ROIContourSequence") or ():
            found.setdefault(int(one.ReferencedROINumber), []).extend(
                contour.ContourData
                for contour in one.get("ContourSequence") or ()
                if contour.get("ContourGeometricType") in CLOSED and contour.get("ContourData")
            )
        return found

    def voxels(self, number: int, path: Path, like: Image) -> tuple[np.ndarray, ...]:
        """Indices of the voxels in the image whose centres lie within an odd number of contours, an array an axis."""
        to_index = np.linalg.inv(like.affine) @ LPS_TO_RAS
        shape = like.array.shape[1:]
        planes: dict[int, np.ndarray] = {}
        for contour in self._contours[number]:
            if len(contour) % 3:
                raise UserError(
                    f"{path} has a contour of {len(contour)} numbers, not three a point. Export it again."
                )
            points = np.array(contour, float).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]
            k = round(points[:, 2].mean())
            off = float(np.abs(points[:, 2] - k).max())
            if off > OFF_GRID:
                _refuse_place(path, like, f"{off:.2f} slices beside those of the image")
            if 0 <= k < shape[2]:  # an image may be a part of what was drawn on
                _fill(planes.setdefault(k, np.zeros(shape[:2], bool)), points[:, :2])
        inside = [np.argwhere(plane[..., None]) + np.array((0, 0, k)) for k, plane in planes.items()]
        return tuple(np.concatenate([np.zeros((0, 3), int), *inside]).T)


def _fill(plane: np.ndarray, ring: np.ndarray) -> None:
    """Turn the voxels of a plane over whose centres lie within a ring (N, 2)."""
    from matplotlib.path import Path as Outline

    low = np.ceil(ring.min(0)).clip(0).astype(int)
    high = np.floor(ring.max(0)).astype(int) + 1
    part = plane[low[0] : max(high[0], 0), low[1] : max(high[1], 0)]
    if part.size:
        centres = np.indices(part.shape).reshape(2, -1).T + low + ASIDE
        part ^= Outline(ring).contains_points(centres).reshape(part.shape)


def _refuse_place(path: Path, like: Image, where: str) -> None:
    raise UserError(f"{path} lies {where} {like.path}. Was it drawn on this series?")


def _require_same_frame(file: Segments | Structures | Layers, path: Path, like: Image) -> None:
    """Two images of one frame of reference (a scan of one patient, lying still) have its identifier in common."""
    if not like.path.is_dir():
        return
    image = dcmread(dicom_files(like.path)[0], stop_before_pixels=True)
    frames = [file.frame, str(image.get("FrameOfReferenceUID") or "")]
    if all(frames) and frames[0] != frames[1]:
        raise UserError(
            f"{path} was drawn on another scan than {like.path}: their frames of reference differ."
        )
