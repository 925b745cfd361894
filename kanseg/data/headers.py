"""Headers of files that ITK reads; the voxels stay on the disk."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk


def itk_header(path: Path | str) -> sitk.ImageFileReader:
    """The size, channels and tags of a file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def header_tags(path: Path | str) -> dict[str, str]:
    """What a header tells beside the geometry."""
    header = itk_header(path)
    return {key: header.GetMetaData(key) for key in header.GetMetaDataKeys()}
