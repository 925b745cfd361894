"""What headers of images tell beside the geometry; the voxels stay on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk

PROVENANCE = "kanseg"  # the key in headers


class About(NamedTuple):
    """What headers tell of an image that kanseg writes: a remark, names of its values, and JSON on how it was made."""

    description: str
    names: Mapping[int, str]
    provenance: str


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
