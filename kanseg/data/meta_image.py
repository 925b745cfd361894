"""MHA and MHD files. What is damaged or missing in them ITK reads as whatever lies in memory, often without a word."""

from __future__ import annotations

import mmap
import os
import re
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from kanseg.errors import UserError

YES = rb"[ \t]*[=:][ \t]*[Tt1]"
COMPRESSED = re.compile(rb"^CompressedData" + YES, re.MULTILINE)
BIG_ENDIAN = re.compile(rb"^(BinaryData|Element)ByteOrderMSB" + YES, re.MULTILINE)
VOXELS = re.compile(
    rb"^ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t]*\r?\n", re.MULTILINE
)  # the last line of a header
HERE = "LOCAL"  # what it says where voxels follow the header
SLICES = re.compile(r"LIST\b|.*%")  # where each slice has a file
ZLIB_OR_GZIP = 47


def read_meta_image(path: Path) -> sitk.Image:
    """The image in an MHA or MHD file.

    Raises:
        UserError: the file of the voxels is not there, or slices are missing.
        ValueError, zlib.error: compressed voxels are damaged.
        RuntimeError: what ITK finds wrong.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        named = VOXELS.search(content)
        header = content[: named.end()] if named else b""
        where = os.fsdecode(named[1]) if named else HERE
        packed, listed = COMPRESSED.search(header), where.startswith("LIST")
        rest = content[len(header) :] if packed or listed else b""  # of others a second volume in memory
    beside = path.parent / where
    if where != HERE and not SLICES.match(where) and not beside.is_file():
        raise UserError(
            f"The voxels of {path} lie in {where}, as it says, which is not there. Put it beside {path.name}."
        )
    image = sitk.ReadImage(str(path))
    slices, depth = rest.count(b"\n"), image.GetSize()[-1]
    if listed and slices < depth:
        raise UserError(f"{path} lists {slices} slices, {depth} are expected. Complete the list.")
    if packed:
        found = zlib.decompress(rest if where == HERE else beside.read_bytes(), wbits=ZLIB_OR_GZIP)
        voxels = sitk.GetArrayViewFromImage(image)
        told = np.frombuffer(found, voxels.dtype.newbyteorder(">" if BIG_ENDIAN.search(header) else "<"))
        if not np.array_equal(told, voxels.ravel(), equal_nan=True):
            raise ValueError("its compressed voxels are not those that its header tells of")
    return image
