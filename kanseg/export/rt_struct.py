"""Label maps of a DICOM series as RT Structure Sets (PS3.3 A.19), which radiotherapy planning systems open.

A class is a structure: closed contours in the planes of the slices, halfway between its voxels and others. Filled by
the centres of voxels they give the label map again. A hole is joined to the contour around it by a line there and back
(the keyhole of PS3.3 C.8.8.6.3), so that every reader sees it, whatever it does with contours within contours.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from kanseg import __version__
from kanseg.data.class_names import class_colours
from kanseg.data.images import LPS_TO_RAS, Image
from kanseg.errors import UserError
from kanseg.export.dicom_seg import MAY_BE_EMPTY, frame_of, headers_of
from kanseg.files import make_folder, write_bytes

STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # what structure sets call the class of a study, long retired
DECIMALS = 3  # of mm
BEND = 0.25  # voxels that the line to a hole bends aside, so as not to go through centres


def write_structures(
    path: Path,
    labels: np.ndarray,
    source: Image,
    values: Sequence[int],
    names: Sequence[str],
    *,
    model: str = "kanseg",
    description: str = "",
) -> Path:
    """Write a label map (*S) of a DICOM series as structures of that series, in place or not at all.

    A class without voxels is a structure without contours. The same labels, series and description get the same UIDs.

    Args:
        source: the image that was read from the folder of the series, or from one DICOM file.
        values, names: of all classes, the first is the background.
        model: name for the planning system, e.g. that of the data set.
        description: kept as StructureSetDescription.

    Raises:
        UserError: the series lacks what structures have to refer to.
    """
    headers = headers_of(source)
    first, in_lps = headers[0], LPS_TO_RAS @ source.affine
    slices = _slices(headers, in_lps)
    first.FrameOfReferenceUID = frame_of(first)
    needed = ("StudyInstanceUID", "SeriesInstanceUID")
    if lacking := [key for key in needed if not first.get(key)] or (
        [] if slices else ["places of its slices"]
    ):
        raise UserError(
            f"{source.path} cannot carry RT structures: it has no {', '.join(lacking)}. Export the series with its "
            "full headers, or write --format nii.gz."
        )
    contours: dict[int, list[Dataset]] = {value: [] for value in values[1:]}
    for k, (image, shift) in slices.items():
        plane = labels[:, :, k]
        for value in {*np.unique(plane).tolist()} & {*contours}:
            contours[value] += [_contour(ring, k, in_lps, shift, image) for ring in outlines(plane == value)]
    made = _described(first, model, description, np.ascontiguousarray(labels).tobytes())
    made.ReferencedFrameOfReferenceSequence = [_references(first, [image for image, _ in slices.values()])]
    rois = [
        _structure(number, name, colour, contours[value], first.FrameOfReferenceUID)
        for number, (value, name, colour) in enumerate(
            zip(values[1:], names[1:], class_colours(len(names) - 1), strict=True), start=1
        )
    ]
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = map(
        list, zip(*rois, strict=True)
    )
    content = io.BytesIO()
    made.save_as(content, enforce_file_format=True)
    make_folder(path.parent)
    return write_bytes(path, content.getvalue())


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed contours (N, 2) of a mask (I, J), in voxels, a part each; its holes are joined to it by keyholes.

    >>> [ring.tolist() for ring in outlines(np.eye(3)[1:2] > 0)]
    [[[-0.5, 1.0], [0.0, 0.5], [0.5, 1.0], [0.0, 1.5]]]
    """
    around = contour_generator(z=np.pad(mask, 1).T.astype(float), fill_type=FillType.OuterOffset)
    rings = []
    for points, ends in zip(*around.filled(0.5, np.inf), strict=True):
        outer, *holes = [_corners(points[a : b - 1]) - 1 for a, b in pairwise(ends)]
        for hole in holes:
            apart = np.linalg.norm(outer[:, None] - hole[None], axis=-1)
            i, j = np.unravel_index(apart.argmin(), apart.shape)
            way = hole[j] - outer[i]
            bend = outer[i] + way / 2 + BEND * np.array([-way[1], way[0]]) / np.linalg.norm(way)
            outer = np.concatenate([outer[: i + 1], [bend], hole[j:], hole[: j + 1], [bend], outer[i:]])
        rings.append(outer)
    return rings


def _corners(ring: np.ndarray) -> np.ndarray:
    """A ring without the points that lie on straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _slices(headers: Sequence[Dataset], affine: np.ndarray) -> dict[int, tuple[Dataset, np.ndarray]]:
    """Number of a slice in the volume -> reference to its image, and how far (mm) the image lies from the even row."""
    places = [(header, 0, header) for header in headers]
    if frames := headers[0].get("PerFrameFunctionalGroupsSequence"):
        places = [
            (headers[0], number, frame.get("PlanePositionSequence", [Dataset()])[0])
            for number, frame in enumerate(frames, start=1)
        ]
    found = {}
    for header, number, place in places:
        if not place.get("ImagePositionPatient"):
            return {}
        stated = np.array(place.ImagePositionPatient, float)
        k = round(float(np.linalg.solve(affine, [*stated, 1])[2]))
        image = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = (
            header.SOPClassUID,
            header.SOPInstanceUID,
        )
        if number:
            image.ReferencedFrameNumber = number
        found[k] = image, stated - (affine @ [0, 0, k, 1])[:3]
    return dict(sorted(found.items()))


def _described(first: Dataset, model: str, description: str, labels: bytes) -> Dataset:
    """The object without structures: patient and study of the series, a series of its own."""
    about = [first.SeriesInstanceUID, hashlib.sha256(labels + description.encode()).hexdigest(), "RTSTRUCT"]
    now, made = datetime.now(), Dataset()
    first.decode()
    for keyword in MAY_BE_EMPTY:
        setattr(made, keyword, first.get(keyword, ""))
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID, made.SOPInstanceUID = (
        RTStructureSetStorage,
        generate_uid(entropy_srcs=[*about, "instance"]),
    )
    made.StudyInstanceUID, made.FrameOfReferenceUID = first.StudyInstanceUID, first.FrameOfReferenceUID
    made.PositionReferenceIndicator = first.get("PositionReferenceIndicator", "")
    made.SeriesInstanceUID = generate_uid(entropy_srcs=[*about, "series"])
    made.SeriesNumber = 2000 + int(first.get("SeriesNumber") or 0) % 1000
    made.SeriesDescription = f"kanseg {model}"[:64]
    made.Modality, made.InstanceNumber, made.OperatorsName = "RTSTRUCT", 1, ""
    made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions = "kanseg", model[:64], __version__
    made.StructureSetLabel, made.StructureSetDescription = f"kanseg {model}"[:16].strip(), description
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.InstanceCreationDate, made.InstanceCreationTime = made.StructureSetDate, made.StructureSetTime
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return made


def _references(first: Dataset, images: list[Dataset]) -> Dataset:
    """What the structures were drawn on: frame of reference, study, series, images."""
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = first.SeriesInstanceUID, images
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = STUDY_COMPONENT, first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    return frame


def _structure(
    number: int, name: str, colour: Sequence[float], contours: list[Dataset], frame: str
) -> tuple[Dataset, Dataset, Dataset]:
    """One structure in the three sequences that tell of it: its name, its contours, what it is."""
    one, drawn, seen = Dataset(), Dataset(), Dataset()
    one.ROINumber, one.ReferencedFrameOfReferenceUID, one.ROIName = number, frame, name[:64]
    one.ROIGenerationAlgorithm, one.ROIGenerationDescription = "AUTOMATIC", f"kanseg {__version__}"
    drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, [round(255 * part) for part in colour[:3]]
    if contours:
        drawn.ContourSequence = contours
    seen.ObservationNumber, seen.ReferencedROINumber = number, number
    seen.RTROIInterpretedType, seen.ROIInterpreter = "", ""
    return one, drawn, seen


def _contour(ring: np.ndarray, k: int, affine: np.ndarray, shift: np.ndarray, image: Dataset) -> Dataset:
    points = ring @ affine[:3, :2].T + affine[:3, 2] * k + affine[:3, 3] + shift
    contour = Dataset()
    contour.ContourImageSequence = [image]
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(ring)
    contour.ContourData = points.round(DECIMALS).ravel().tolist()
    return contour
