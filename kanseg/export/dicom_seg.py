"""Label maps of a DICOM series as DICOM Segmentation objects (PS3.3 A.51), which PACS and viewers lay over the series.

highdicom (Bridge et al., arXiv 2106.07806) writes them: the extra `dicom`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kanseg import __version__
from kanseg.data.class_names import class_colours
from kanseg.data.dicom import dicom_files
from kanseg.data.images import LPS_TO_RAS, Image
from kanseg.data.suffixes import DICOM, RTSTRUCT, SUFFIXES_DICOM, suffix_of
from kanseg.errors import UserError
from kanseg.files import make_folder, write_bytes

# Words in a name -> category and type of the code dictionary (SNOMED CT); other names are looked up as they are.
ABNORMAL = "MorphologicallyAbnormalStructure"
WORDS = {
    **dict.fromkeys(("tumour", "tumor", "cancer", "neoplasm", "metastasis"), (ABNORMAL, "Neoplasm")),
    **dict.fromkeys(("lesion", "lesions"), (ABNORMAL, "Lesion")),
    **dict.fromkeys(("edema", "oedema"), (ABNORMAL, "Edema")),
}
ANATOMY = "AnatomicalStructure"
SIDES = {"left": "Left", "l": "Left", "right": "Right", "r": "Right"}  # words of a name -> modifier (CID 244)
ROUNDING = 1e-4  # mm between a slice and the even row of a volume
DECIMALS = 6  # digits that a number of DICOM has room for
MAY_BE_EMPTY = (
    "PatientID PatientName PatientBirthDate PatientSex StudyID StudyDate StudyTime AccessionNumber "
    "ReferringPhysicianName".split()
)


def write_segmentation(
    path: Path,
    labels: np.ndarray,
    source: Image,
    values: Sequence[int],
    names: Sequence[str],
    *,
    model: str = "kanseg",
    description: str = "",
) -> Path:
    """Write a label map (*S) of a DICOM series as segments of that series, in place or not at all.

    The same labels, series and description get the same UIDs, so that sending a result twice does not double it.

    Args:
        source: the image that was read from the folder of the series, or from one DICOM file.
        values, names: of all classes, the first is the background.
        model: name for the viewer, e.g. that of the data set.
        description: kept as ImageComments.

    Raises:
        UserError: highdicom is not installed, or the series lacks what a segmentation has to repeat.
    """
    check_series(source.path)
    import highdicom
    import pydicom

    numbers = np.zeros(labels.shape, np.uint8 if len(values) <= 256 else np.uint16)
    for number, value in enumerate(values[1:], start=1):
        numbers[labels == value] = number
    entropy = hashlib.sha256(numbers.tobytes() + description.encode()).hexdigest()
    try:
        in_lps = LPS_TO_RAS @ source.affine
        series = [_completed(header, in_lps) for header in headers_of(source)]
        about = [series[0].SeriesInstanceUID, entropy]
        volume = highdicom.Volume(
            np.ascontiguousarray(numbers.transpose()),
            affine=in_lps[:, [2, 1, 0, 3]],
            coordinate_system="PATIENT",
            frame_of_reference_uid=series[0].FrameOfReferenceUID,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of patients that are no names, and the like
            made = highdicom.seg.Segmentation(
                source_images=series,
                pixel_array=volume,
                segmentation_type="BINARY",
                segment_descriptions=_segments(highdicom, names[1:], model, about),
                series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=[*about, "series"]),
                series_number=1000 + int(getattr(series[0], "SeriesNumber", 0) or 0) % 1000,
                sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=[*about, "instance"]),
                instance_number=1,
                manufacturer="kanseg",
                manufacturer_model_name=model[:64],
                software_versions=__version__,
                device_serial_number=entropy[:16],
                content_description=f"Segmentation by {model}"[:64],
                series_description=f"kanseg {model}"[:64],
                omit_empty_frames=bool(numbers.any()),
            )
    except (AttributeError, ValueError, TypeError, KeyError, pydicom.errors.InvalidDicomError) as error:
        raise UserError(
            f"{source.path} cannot carry a DICOM-SEG: {error}. Export the series with its full headers, or write "
            "--format nii.gz."
        ) from error
    made.ImageComments = description
    content = io.BytesIO()
    made.save_as(content)
    make_folder(path.parent)
    return write_bytes(path, content.getvalue())


def headers_of(source: Image) -> list[Any]:
    """Headers of the images of a series, in the order of its slices, or of its one file."""
    from pydicom import dcmread

    files = dicom_files(source.path) if source.path.is_dir() else [source.path]
    return [dcmread(file, stop_before_pixels=True) for file in files]


def _completed(header: Any, affine: np.ndarray) -> Any:
    """With what a segmentation repeats and anonymisers like to remove, the places of the slices, texts in UTF-8.

    Args:
        affine: from voxels to mm in DICOM's axes (LPS).
    """
    spacing = float(np.linalg.norm(affine[:3, 2]))
    for keyword in MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    header.decode()
    header.SpecificCharacterSet = "ISO_IR 192"
    header.FrameOfReferenceUID = frame_of(header)
    if "PerFrameFunctionalGroupsSequence" not in header:
        _place(header, affine)
        header.SliceThickness = header.get("SliceThickness") or spacing
        header.SpacingBetweenSlices = spacing  # by their positions; what headers say is often the gap between
        return header
    shared, frames = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence
    for keyword in (
        "PixelMeasuresSequence",
        "PlaneOrientationSequence",
    ):  # what all share may stand with each
        if keyword not in shared and keyword in frames[0]:
            setattr(shared, keyword, getattr(frames[0], keyword))
    shared.PixelMeasuresSequence[0].SpacingBetweenSlices = round(spacing, DECIMALS)
    for frame in frames:
        for plane in frame.get("PlanePositionSequence") or []:
            _place(plane, affine)
    return header


def frame_of(header: Any) -> str:
    """The frame of reference of an image; of one that an anonymiser left without, one that goes with its series."""
    from pydicom.uid import generate_uid

    return str(
        header.get("FrameOfReferenceUID")
        or generate_uid(entropy_srcs=[header.get("SeriesInstanceUID", ""), "frame"])
    )


def _place(plane: Any, affine: np.ndarray) -> None:
    """Put a slice where the volume has it: highdicom tells of which image a plane is by the place, to `ROUNDING`."""
    if plane.get("ImagePositionPatient"):
        stated = np.array(plane.ImagePositionPatient, float)
        number = np.rint(np.linalg.solve(affine, [*stated, 1])[2])
        place = affine[:3, 2] * number + affine[:3, 3]
        if np.abs(place - stated).max() > ROUNDING:
            plane.ImagePositionPatient = place.round(DECIMALS).tolist()


def check_series(path: Path, suffix: str = DICOM) -> None:
    """Raise `UserError` if an image cannot have label maps of that suffix.

    It must be a folder with a DICOM series or a DICOM file, and DICOM-SEG needs a library that may not be installed.
    """
    kind = "RTSTRUCT" if suffix == RTSTRUCT else "DICOM-SEG"
    if not path.is_dir() and suffix_of(path) not in SUFFIXES_DICOM:
        raise UserError(
            f"{path} is no DICOM series, and {kind} refers to one. Give the folder of a series, a DICOM file, or "
            "write another format."
        )
    if suffix != RTSTRUCT and importlib.util.find_spec("highdicom") is None:
        raise UserError("DICOM-SEG needs highdicom: pip install 'kanseg[dicom]'.")


def _segments(highdicom: Any, names: Sequence[str], model: str, about: Sequence[str]) -> list[Any]:
    """With colours, which the standard leaves open: some viewers (OHIF's issue 3939) hang without."""
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"kanseg {model}"[:64], family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    found = []
    for number, (name, colour) in enumerate(zip(names, class_colours(len(names)), strict=True), start=1):
        category, kind, side = code_of(name)
        made = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=getattr(codes.SCT, category),
            segmented_property_type=getattr(codes.SCT, kind),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            tracking_id=name[:64],
            tracking_uid=generate_uid(entropy_srcs=[*about, str(number)]),
            display_color=highdicom.color.CIELabColor.from_rgb(*(255 * part for part in colour[:3])),
        )
        if side:  # for which highdicom has no argument
            modifier = highdicom.sr.CodedConcept.from_code(getattr(codes.SCT, side))
            made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        found.append(made)
    return found


def code_of(name: str) -> tuple[str, str, str]:
    """Category, type and side of a name in pydicom's code dictionary (CID 7192); others are anatomical structures.

    >>> code_of("kidney_left"), code_of("Left Ventricle"), code_of("label 3")
    (('AnatomicalStructure', 'Kidney', 'Left'), ('AnatomicalStructure', 'LeftVentricle', ''), \
('AnatomicalStructure', 'AnatomicalStructure', ''))
    """
    from pydicom.sr.codedict import codes

    words = re.findall(r"[^\W_]+", name.lower())
    sides = {SIDES[word] for word in words if word in SIDES}
    side = sides.pop() if len(sides) == 1 else ""
    for word in words:
        if word in WORDS:
            return (*WORDS[word], side)
    others = " ".join(word for word in words if word not in SIDES)
    kind, known = "".join(map(str.capitalize, re.findall(r"[^\W\d]+", others))), codes.cid7192.dir()
    if side + kind in known:
        return ANATOMY, side + kind, ""
    return ANATOMY, kind if kind in known else ANATOMY, side
