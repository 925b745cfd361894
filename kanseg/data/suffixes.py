"""What files are by their names."""

from __future__ import annotations

from pathlib import Path

SUFFIXES_NIFTI = (".nii.gz", ".nii")
SEG_NRRD = ".seg.nrrd"  # segmentations of 3D Slicer
SUFFIXES_ITK = (SEG_NRRD, ".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES_3D = (*SUFFIXES_NIFTI, *SUFFIXES_ITK)
DICOM = ".dcm"
RTSTRUCT = ".rtstruct.dcm"  # as kanseg names its own; others call theirs as they like
SUFFIXES_DICOM = (RTSTRUCT, DICOM)
SUFFIXES_SEGMENTS = (*SUFFIXES_DICOM, SEG_NRRD)  # of files that may tell classes by names, not by numbers
SEGMENTS = "DICOM-SEG, RTSTRUCT or .seg.nrrd"
SUFFIXES_2D = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SUFFIXES_TIFF = (".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")
TWO_FILES = {".mhd": ".mha", ".nhdr": ".nrrd"}  # a header beside its data cannot be replaced in one step


def suffix_of(path: Path) -> str:
    """The known suffix of a file name in lower case (".nii.gz" whole), or ""."""
    name = path.name.lower()
    return next((s for s in (*SUFFIXES_3D, *SUFFIXES_2D, *SUFFIXES_DICOM) if name.endswith(s)), "")


def stem_of(path: Path) -> str:
    """File name without its known suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]
