"""Where the slices of a DICOM series and the frames of a DICOM file lie; refused is what is no regular volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from kanseg.errors import UserError

RADIOGRAPHS = "CR DX IO MG PX RF RG XA".split()  # modalities whose numbers mean brightness alone
SIDEWAYS = 1.0  # mm that a slice may lie beside the normal of the first
AGAIN = "Export the series again, or convert it with a tool that repairs it."
OF_FRAMES = {  # what a frame tells: the sequence that it stands in, and how many numbers where nothing is told
    "ImagePositionPatient": ("PlanePositionSequence", []),
    "ImageOrientationPatient": ("PlaneOrientationSequence", []),
    "PixelSpacing": ("PixelMeasuresSequence", []),
    "SliceThickness": ("PixelMeasuresSequence", []),
    "RescaleSlope": ("PixelValueTransformationSequence", [1.0]),
    "RescaleIntercept": ("PixelValueTransformationSequence", [0.0]),
}
SCALES, LUT = ("RescaleSlope", "RescaleIntercept"), "ModalityLUTSequence"
SLICE_VECTOR = 0x00540080
SPACING = "PixelSpacing"
PLACES = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    SPACING: 2,
}  # and how many numbers each has
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
IN_HEADERS = (
    *"Rows Columns NumberOfFrames SamplesPerPixel BitsAllocated PhotometricInterpretation PixelData".split(),
    *(*PLACES, *GROUPS, *SCALES, LUT, "SliceThickness", "SpacingBetweenSlices", "Modality"),
    *("DetectorInformationSequence", "FrameIncrementPointer", "SliceVector"),
)


def in_order(folder: Path, names: Sequence[str]) -> list[str]:
    """Files of single slices by their positions; refused is what is no regular volume, or tells too little of it."""
    headers = [_header(Path(name)) for name in names]
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise UserError(
            f"{folder} has {len(names)} files of one series, some of them of several frames; one file is expected. "
            "Give each a folder of its own."
        )
    told = [_place(Path(name), header) for name, header in zip(names, headers, strict=True)]
    positions, orientations, spacings = map(np.array, zip(*told, strict=True))
    order = _order(positions, orientations)
    _require_box(folder, positions[order], orientations[order])
    _require_same(folder, "pixels", [(header.Rows, header.Columns) for header in headers])
    _require_same(folder, "mm a pixel", list(map(tuple, spacings)))
    return [names[number] for number in order]


def read_frames(source: Path, file: Path) -> sitk.Image:
    """The image of one DICOM file, of several frames by their own places and scales: ITK takes them as the first is."""
    header = _header(file)
    image = sitk.ReadImage(str(file))
    count = int(header.get("NumberOfFrames") or 1)
    frames = _frames(file, header)
    if count == 1:
        return _with_thickness(image, header, frames)
    frames = frames or _nuclear(header, count)
    if len(frames) != count or not all(frame[name] for frame in frames for name in PLACES):
        raise UserError(
            f"{file} has {count} frames that do not tell where they lie (moments of a film?); one volume is expected. "
            f"{AGAIN}"
        )
    image = _scaled(image, [(*frame["RescaleSlope"], *frame["RescaleIntercept"]) for frame in frames])
    return _stacked(
        source, image, *map(np.array, zip(*(_place(file, frame) for frame in frames), strict=True))
    )


def _header(file: Path) -> Any:
    """What a DICOM file tells of its pixels and where they lie; the pixels stay on the disk.

    Raises:
        UserError: the file is damaged, holds fewer pixels than it says, of which ITK fills up the rest with those of
            another slice, or is MONOCHROME1, whose numbers ITK inverts; that is right for radiographs alone, whose
            numbers have no unit.
    """
    import pydicom

    try:
        header = pydicom.dcmread(file, force=True, defer_size=1024, specific_tags=list(IN_HEADERS))
        pixels: Any = header.get_item("PixelData", keep_deferred=True)
        kind = str(header.get("PhotometricInterpretation"))
        samples = 2 if kind.endswith("422") else int(header.get("SamplesPerPixel") or 1)
        bits = header.Rows * header.Columns * samples * header.BitsAllocated
        needed = bits * int(header.get("NumberOfFrames") or 1) // 8
        for scale in SCALES:  # GDCM would take 1 and 0 for what is no number
            float(header.get(scale) or 0)
    except Exception as error:  # of pydicom, which has no common class
        raise UserError(
            f"{file} cannot be read as DICOM ({error}). Copy it again from its source."
        ) from error
    if pixels is not None and pixels.length < needed:  # of compressed ones it is the largest number
        raise UserError(
            f"{file} is cut short: it holds {pixels.length} bytes of pixels, {needed} are expected. Copy it again from "
            "its source."
        )
    if kind == "MONOCHROME1" and header.get("Modality") not in RADIOGRAPHS:
        raise UserError(f"{file} is MONOCHROME1 (low numbers are bright); MONOCHROME2 is expected. {AGAIN}")
    if header.get(LUT) and header.get("Modality") not in RADIOGRAPHS:  # which ITK leaves aside
        raise UserError(
            f"{file} tells what its numbers mean by a table ({LUT}); a scale is expected. {AGAIN}"
        )
    return header


def _place(source: Path, told: Any) -> list[np.ndarray]:
    """Position, orientation and spacing of a slice or frame; `UserError` where one lacks or cannot be."""
    numbers = []
    for keyword, count in PLACES.items():
        try:
            found = np.array(told.get(keyword) or [], float).ravel()
        except ValueError:
            found = np.array([np.nan])
        if not found.size:
            raise UserError(f"{source} lacks {keyword}: where its slice lies is not known. {AGAIN}")
        if len(found) != count or not np.isfinite(found).all() or (keyword == SPACING and found.min() <= 0):
            raise UserError(f"{source} has no usable {keyword}: where its slice lies is not known. {AGAIN}")
        numbers.append(found)
    return numbers


def _require_same(source: Path, what: str, sizes: Sequence[tuple[float, ...]]) -> None:
    """Raise `UserError` where slices are not as large as the first, of which alone ITK takes the size of a pixel."""
    for size in sizes:
        if not np.allclose(size, sizes[0], rtol=1e-3):
            raise UserError(
                f"{source} mixes slices of {times(sizes[0])} and of {times(size)} {what}; one volume is expected. "
                f"{AGAIN}"
            )


def times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _order(positions: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """Of slices, along the normal of the first."""
    return np.argsort(positions @ np.cross(orientations[0, :3], orientations[0, 3:]), kind="stable")


def _with_thickness(image: sitk.Image, header: Any, frames: Sequence[dict[str, list[float]]]) -> sitk.Image:
    """A slice alone, whose neighbours tell no spacing: ITK takes 1 mm where the scanner tells no gap."""
    told = [header.get("SliceThickness"), *(number for frame in frames for number in frame["SliceThickness"])]
    thickness = next(filter(None, told), None)
    if image.GetDimension() == 3 and thickness and not header.get("SpacingBetweenSlices"):
        image.SetSpacing([*image.GetSpacing()[:2], float(thickness)])
    return image


def _frames(file: Path, header: Any) -> list[dict[str, list[float]]]:
    """The numbers of `OF_FRAMES` that each frame tells, or all of them together, in the order of the file."""
    try:
        shared, frames = (header.get(group) or [] for group in GROUPS)
        found = []
        for frame in frames:
            numbers = {name: default for name, (_, default) in OF_FRAMES.items()}
            for part in (*shared, frame):
                for name, (group, _) in OF_FRAMES.items():
                    for item in part.get(group) or []:
                        if item.get(name) is not None:
                            numbers[name] = [float(number) for number in np.atleast_1d(item[name].value)]
            found.append(numbers)
    except Exception as error:  # of pydicom, which has no common class
        raise UserError(
            f"{file} cannot be read as DICOM ({error}). Copy it again from its source."
        ) from error
    return found


def _nuclear(header: Any, count: int) -> list[dict[str, list[float]]]:
    """As `_frames`, of a reconstruction of nuclear medicine (SPECT); none where it is gated or tells too little.

    Its detector's place is that of the first slice, the others follow at the distance between slices along the normal
    of that one (DICOM PS3.3, C.8.4.11 and C.8.4.15), backwards where the distance is negative.
    """
    detectors, slices = header.get("DetectorInformationSequence") or [], header.get("SliceVector")
    gap, pixels = header.get("SpacingBetweenSlices"), header.get("PixelSpacing")
    only_slices = header.get("FrameIncrementPointer") == SLICE_VECTOR and slices is not None
    if len(detectors) != 1 or not (gap and pixels and only_slices):
        return []
    told = [detectors[0].get(name) for name in (*PLACES,)[:2]]
    numbers = np.atleast_1d(slices).astype(int).tolist()
    if not all(told) or sorted(numbers) != list(range(1, count + 1)):
        return []
    first, orientation = (np.array(one, float) for one in told)
    step = float(gap) * np.cross(orientation[:3], orientation[3:])
    alike = {
        "ImageOrientationPatient": orientation.tolist(),
        "PixelSpacing": [float(size) for size in pixels],
    }
    alike |= {name: default for name, (_, default) in OF_FRAMES.items() if default}
    return [{**alike, "ImagePositionPatient": (first + (number - 1) * step).tolist()} for number in numbers]


def _scaled(image: sitk.Image, scales: Sequence[tuple[float, ...]]) -> sitk.Image:
    """By each frame's own slope and intercept, where all were scaled by those of the first."""
    if len(set(scales)) == 1 or scales[0][0] == 0 or image.GetNumberOfComponentsPerPixel() > 1:
        return image
    slope, intercept = (np.array(numbers).reshape(-1, 1, 1) for numbers in zip(*scales, strict=True))
    stored = (sitk.GetArrayFromImage(image).astype(np.float64) - intercept[0]) / slope[0]
    scaled = sitk.GetImageFromArray((stored * slope + intercept).astype(np.float32))
    scaled.CopyInformation(image)
    return scaled


def _stacked(
    source: Path, image: sitk.Image, positions: np.ndarray, orientations: np.ndarray, pixels: np.ndarray
) -> sitk.Image:
    """The frames in the order of their positions, forwards or backwards as in the file, where these say they lie."""
    order = _order(positions, orientations)
    _require_box(source, positions[order], orientations[order])
    _require_same(source, "mm a pixel", list(map(tuple, pixels)))
    if (np.diff(order) < 0).all():
        order = order[::-1]
    rows, columns = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(rows, columns)
    step = (positions[order[-1]] - positions[order[0]]) @ normal / (len(order) - 1)
    array = sitk.GetArrayFromImage(image)[order]
    stacked = sitk.GetImageFromArray(array, isVector=image.GetNumberOfComponentsPerPixel() > 1)
    stacked.SetSpacing([pixels[0, 1], pixels[0, 0], abs(step)])
    stacked.SetOrigin(positions[order[0]].tolist())
    stacked.SetDirection(np.column_stack([rows, columns, np.sign(step) * normal]).ravel().tolist())
    return stacked


def _require_box(source: Path, positions: np.ndarray, orientations: np.ndarray) -> None:
    """Raise `UserError` where slices, in their order, are no regular volume."""
    if np.ptp(orientations, axis=0).max() > 1e-3:
        raise UserError(f"{source} mixes slices of different orientation; one volume is expected. {AGAIN}")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    if np.abs(along).min() < 1e-3:
        raise UserError(
            f"{source} has several slices at one position (several stacks or times?); one volume is expected. {AGAIN}"
        )
    if np.ptp(np.abs(along)) > 0.05 * np.median(np.abs(along)):
        shown = ", ".join(f"{step:.2f}" for step in sorted(set(np.round(np.abs(along), 2))))
        raise UserError(f"{source} misses slices: the distances between them are {shown} mm. {AGAIN}")
    sideways = np.linalg.norm(steps - np.outer(along, normal), axis=1)
    shifts = positions - positions[0]
    places = shifts @ normal
    uneven = np.abs(places - np.linspace(0, places[-1], len(places))).max()
    if uneven > 0.25 * np.median(np.abs(along)):
        raise UserError(
            f"{source} has slices up to {uneven:.2f} mm beside an even row; one distance is expected. {AGAIN}"
        )
    astray = np.linalg.norm(shifts - np.outer(places, normal), axis=1).max()
    if sideways.max() > 0.02 * np.abs(along).max() or astray > SIDEWAYS:
        raise UserError(
            f"{source} was taken with a tilted gantry (slices shift sideways); a box is expected. {AGAIN}"
        )
