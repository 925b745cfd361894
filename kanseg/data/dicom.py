"""DICOM: what kinds of objects files hold, and the one series of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk

from kanseg.data.headers import itk_header
from kanseg.data.slices import in_order, read_frames
from kanseg.data.suffixes import SEG_NRRD, SUFFIXES_DICOM, suffix_of
from kanseg.errors import UserError, one_line

# DICOM objects that lie beside images and hold none: directory, presentation states, reports, documents, RT
NO_IMAGES = (
    "1.2.840.10008.1.3.10",
    *("1.2.840.10008.5.1.4.1.1." + n for n in ("11.", "66", "88.", "104.", "481.")),
)
SHOWN_SERIES, UID_END = 6, 12  # that are named of several series, and of an identifier
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7", STRUCTURES)
SOP_CLASS = 0x00080016  # the tag SOPClassUID


def is_no_image(path: Path) -> bool:
    """Whether a file is a segmentation, or another object of DICOM that lies beside images: a report, ..."""
    return suffix_of(path) == SEG_NRRD or sop_class(path).startswith(NO_IMAGES)


def is_segmentation(path: Path) -> bool:
    """Whether a file is a Segmentation object of DICOM, a structure set or a segmentation of 3D Slicer."""
    return suffix_of(path) == SEG_NRRD or sop_class(path).startswith(SEGMENTATIONS)


def is_structures(path: Path) -> bool:
    """Whether a DICOM file is an RT Structure Set."""
    return sop_class(path).startswith(STRUCTURES)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its name or by its first bytes."""
    if suffix_of(path) in SUFFIXES_DICOM:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def dicom_files(folder: Path) -> list[str]:
    """Files of the one DICOM series of a folder, in the order of the slices."""
    reader = sitk.ImageSeriesReader()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    series = [reader.GetGDCMSeriesFileNames(str(folder), one) for one in reader.GetGDCMSeriesIDs(str(folder))]
    series = [names for names in series if not is_no_image(Path(names[0]))]
    if not series:
        raise UserError(f"{folder} has no DICOM series; one is expected.")
    if len(series) > 1:
        told = "; ".join(map(_series_in_words, series[:SHOWN_SERIES])) + "; ..." * (
            len(series) > SHOWN_SERIES
        )
        raise UserError(
            f"{folder} has {len(series)} DICOM series; one is expected. Move the files of each into a folder of its "
            f"own: {told}."
        )
    return list(series[0])


def read_series(folder: Path) -> sitk.Image:
    """One DICOM series of a folder; spacing along the slices comes from their positions."""
    reader = sitk.ImageSeriesReader()
    names = dicom_files(folder)
    try:
        _require_readable(folder, names)
        if len(names) == 1:
            return read_frames(folder, Path(names[0]))
        reader.SetFileNames(in_order(folder, names))
        if itk_header(names[0]).GetNumberOfComponents() == 1:  # grey, or all slices get the type of the first
            reader.SetOutputPixelType(sitk.sitkFloat32)
        return reader.Execute()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder} cannot be read as DICOM ({one_line(error)}). Copy it again from its source, or save it "
            "uncompressed."
        ) from error


def _series_in_words(names: Sequence[str]) -> str:
    """What a person tells the series of some files by: description, modality, size, identifier."""
    import pydicom

    file = Path(names[0])
    header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
    called = header.get("SeriesDescription") or header.get("ProtocolName") or "without a description"
    count = f"{len(names)} files such as {file.name}" if len(names) > 1 else f"the file {file.name}"
    uid = str(header.get("SeriesInstanceUID") or "")
    return f"{called} ({header.get('Modality') or 'no modality'}, {count}, series ...{uid[-UID_END:]})"


def sop_class(path: Path) -> str:
    """What kind of DICOM object a file holds, as it says itself: it may refer to others. "" where it is none."""
    from pydicom.filereader import read_partial

    try:
        with path.open("rb") as file:
            header = read_partial(file, stop_when=lambda tag, vr, length: tag > SOP_CLASS, force=True)
        return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    except OSError:
        raise
    except Exception:  # of pydicom, which has no common class
        return ""


def _require_readable(folder: Path, names: Sequence[str]) -> None:
    """GDCM passes over files that are cut short; a slice at the end would be lost without a gap to show it."""
    known, kind = {Path(name).name for name in names}, sop_class(Path(names[0]))
    for path in sorted(folder.iterdir()):
        if path.name not in known and _claims_an_image(path, kind):
            raise UserError(
                f"{path} cannot be read as DICOM. It is cut short or damaged. Copy it again from its source."
            )


def _claims_an_image(path: Path, kind: str) -> bool:
    """Whether a file is called DICOM, or is some, and neither hidden nor an object of a kind without images.

    Args:
        kind: the SOP class of images, which may be a maker's own.
    """
    if path.name[0] == "." or not path.is_file() or not is_dicom(path):
        return False
    from pydicom.uid import UID

    own = sop_class(path)
    is_image = own in ("", kind) or UID(own).name.endswith("Image Storage")
    return is_image and not own.startswith(NO_IMAGES)
