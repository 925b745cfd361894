"""Pictures in 2D: grey, colours, palettes and depths, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo

from kanseg.data.headers import PROVENANCE, About
from kanseg.data.suffixes import SUFFIXES_2D, SUFFIXES_TIFF, stem_of, suffix_of
from kanseg.errors import UserError

COLOURED = ("P", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of Pillow
DESCRIPTION, TIFF_REMARK = "Description", 270  # the key of PNG, the tag of TIFF
TURNED = 274  # the tag Orientation
TIFF_BITS = 258  # the tag BitsPerSample
TIFF_KIND = 339  # the tag SampleFormat: 1 unsigned, 2 signed
MISREAD = {(2, 8): np.int8, (1, 32): np.uint32}  # kind and bits that Pillow takes for the other kind
TIFF_EXTRA, UNSPECIFIED = 338, 0  # the tag ExtraSamples, and its value for what is not opacity


def read_picture(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The channels (C, *S) of a picture, and the numbers (*S) behind its colours where these stand in a palette.

    Grey is one channel, colour three; opacity is no channel, and what else a TIFF may hold is refused.
    """
    with Picture.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path} has {picture.n_frames} frames; one picture a file is expected.")
        if UNSPECIFIED in getattr(picture, "tag_v2", {}).get(TIFF_EXTRA, ()):
            raise UserError(
                f"{path} has channels that are neither grey, colour nor opacity. Save it without them, or each "
                f"channel as a file of its own, {stem_of(path)}_0000.tif, ..."
            )
        if picture.mode[0] not in "IF" and (";16" in str(picture.tile) or max(_bits(picture)) > 8):
            return _deep_colours(path), None
        indices = None
        if picture.mode == "P" and (np.ptp(_palette(picture), axis=1) > 0).any():  # else it only saves bytes
            indices = np.array(picture, dtype=np.float32)
        one_mode = {"P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "1": "L", "LA": "L"}.get(
            picture.mode
        )
        if one_mode:
            picture = picture.convert(one_mode)
        array = np.asarray(picture)
        if misread := MISREAD.get((*getattr(picture, "tag_v2", {}).get(TIFF_KIND, ()), *_bits(picture))):
            array = array.view(misread)
        array = array.astype(np.float32)
    channels = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return np.ascontiguousarray(channels), indices


def write_picture(path: Path, array: np.ndarray, about: About) -> None:
    """Write numbers (*S) or colours (C, *S); what they are and how they came to be stands in the header of PNG."""
    array = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if array.ndim == 3 else array
    if array.ndim == 3 and array.dtype != np.uint8:  # Pillow knows no colours of more bits
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint16), isVector=True), str(path))
        return
    picture = Picture.fromarray(array if array.dtype == np.uint8 else array.astype(np.uint16))
    if suffix_of(path) == ".png":
        text = PngInfo()
        text.add_text(DESCRIPTION, about.description)
        if about.provenance:
            text.add_text(PROVENANCE, about.provenance)
        picture.save(path, pnginfo=text)
    elif suffix_of(path) in SUFFIXES_TIFF:
        picture.save(path, description=about.description)
    else:
        picture.save(path)


def read_texts(path: Path) -> dict[str, str]:
    """What the header of a picture tells in words."""
    with Picture.open(path) as picture:
        return {DESCRIPTION: str(picture.getexif().get(TIFF_REMARK, ""))} | getattr(picture, "text", {})


def palette_numbers(path: Path) -> list[int]:
    """The numbers of a picture with a palette that stand in it, none of other files."""
    try:
        with Picture.open(path) as picture:
            return np.unique(np.array(picture)).tolist() if picture.mode == "P" else []
    except (OSError, SyntaxError, Picture.DecompressionBombError):
        return []


def in_colour(path: Path) -> bool:
    """Whether a picture is stored in colours or with a palette, by its header; False for what is no picture."""
    try:
        with Picture.open(path) as picture:
            return picture.mode in COLOURED
    except (OSError, SyntaxError, Picture.DecompressionBombError):  # whoever reads it says what is wrong
        return False


def is_turned(path: Path) -> bool:
    """Whether a photograph says that it is to be shown turned or mirrored; its pixels are read as they are stored."""
    if suffix_of(path) not in SUFFIXES_2D or not path.is_file():
        return False
    with Picture.open(path) as picture:
        return picture.getexif().get(TURNED, 1) > 1


def _palette(picture: Any) -> np.ndarray:
    """Colours (N, 3) in their order."""
    return np.array(picture.getpalette("RGB")).reshape(-1, 3)


def _bits(picture: Any) -> tuple[int, ...]:
    """Of each channel, where the file says it."""
    return getattr(picture, "tag_v2", {}).get(TIFF_BITS, (8,))


def _deep_colours(path: Path) -> np.ndarray:
    """Colours of 16 bits, of which Pillow would keep 8."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError:
        array = np.zeros(0)
    if array.dtype != np.uint16 or array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise UserError(
            f"{path} has 16 bits a channel, stored so that not all can be read, or is cut short. Save it as a plain "
            "16-bit RGB PNG, or with 8 bits."
        )
    return np.ascontiguousarray(np.moveaxis(array[..., :3], -1, 0), dtype=np.float32)
