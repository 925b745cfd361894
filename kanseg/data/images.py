"""Reading and writing images with their geometry: NIfTI, NRRD, MHA, DICOM folders, and 2D pictures.

Arrays are (C, *spatial) in the file's own axis order; `affine` maps voxel indices to millimetres in RAS+, whatever the
format says in its own convention. Every reader of kanseg goes through here, so training and prediction see the same.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Extension
from PIL import Image as Picture

from kanseg.data.class_names import label_table, segment_tags
from kanseg.data.dicom import is_no_image, is_segmentation, read_series
from kanseg.data.headers import PROVENANCE, About, header_tags
from kanseg.data.meta_image import read_meta_image
from kanseg.data.pictures import DESCRIPTION, is_turned, read_picture, read_texts, write_picture
from kanseg.data.slices import read_frames, times
from kanseg.data.suffixes import (
    LOSSY,
    SEG_NRRD,
    SEGMENTS,
    SUFFIXES_2D,
    SUFFIXES_3D,
    SUFFIXES_DICOM,
    SUFFIXES_ITK,
    SUFFIXES_NIFTI,
    SUFFIXES_SEGMENTS,
    SUFFIXES_TIFF,
    TWO_FILES,
    suffix_of,
)
from kanseg.errors import UserError, one_line
from kanseg.files import part_of

MILLIMETRES = {1: 1e3, 3: 1e-3}  # in metres and micrometres, by their numbers in NIfTI headers
UNIT_OF_LENGTH = 7  # the bits of xyzt_units that say it
PLACED_BY = (  # fields of a NIfTI header that say where its voxels lie
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
FULL = 255  # the brightest of 8 bits
BLOCK = 2**20  # bytes that are read at once where they are not kept
MOST_COLOURS = 256  # that tell classes apart in a label; more are a picture
SHOWN_COLOURS = 8  # of those in words
NUMBERS = "kanseg doctor DATA --fix OUT numbers the colours of a data set"
CONVERSION = f"kanseg convert DATA -o OUT makes a data set with label maps of one with {SEGMENTS}"
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # its remarks on odd headers go to stderr
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
COMMENT = 6  # the code of NIfTI's extension
LONGEST_IN_MHA = 2**15 - 1  # characters of a remark; ITK writes longer ones, and then cannot read the file
GRID_TOLERANCE = 1e-2  # mm between corresponding corners of two grids
PARTS_APART = "Save each colour or part as a channel."


@dataclass
class Image:
    """An image and where it lies: `array` (C, *spatial) float32, `affine` 4x4 in mm RAS+.

    `indices` (*spatial) are the numbers of a picture whose colours stand in a palette.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    spatial_dims: int
    indices: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """The voxels (C, *spatial) as of a label map: of a palette its numbers, not its colours."""
        return self.array if self.indices is None else self.indices[None]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm, one number an axis of the array."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0)[: self.spatial_dims])


def read_image(paths: Sequence[Path] | Path, spatial_dims: int | None = None) -> Image:
    """One image from one file (its channels on the 4th axis, or the colours of a picture) or from a file a channel.

    Args:
        paths: the file, the files of the channels in order, or a folder with one DICOM series.
        spatial_dims: what the caller needs; another dimension is refused.

    Raises:
        UserError: unreadable, cut short, structured (RGB) voxels, NaN or infinite voxels, channels on different
            grids, or another dimension than `spatial_dims`.
    """
    image = load_image(paths)
    if spatial_dims is not None and image.spatial_dims != spatial_dims:
        raise UserError(
            f"{image.path} is {image.spatial_dims}D, {spatial_dims}D was expected. Use a model and plan for "
            f"{image.spatial_dims}D images, or give {spatial_dims}D images."
        )
    bad = int((~np.isfinite(image.array)).sum())
    if bad:
        raise UserError(
            f"{image.path} has {bad} voxels that are NaN or infinite; finite numbers are needed. Replace them "
            "(e.g. by the background value) and save the image again."
        )
    return image


def load_image(paths: Sequence[Path] | Path) -> Image:
    """As `read_image`, whatever the dimension and the voxels."""
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    images = [_read_one(path) for path in paths]
    first = images[0]
    if len(images) == 1:
        return first
    for other in images[1:]:
        check_pair(first, other)
    return Image(np.concatenate([i.array for i in images]), first.affine, first.path, first.spatial_dims)


def read_label(path: Path, spatial_dims: int | None = None) -> np.ndarray:
    """A label map, (*spatial) int32, with the values that are in the file.

    Whole numbers stored as floats are rounded (0.99999997 is 1). Of a picture with a palette the numbers count. Colour
    masks are accepted where their colours agree.

    Raises:
        UserError: as `read_image`, or values that are no whole numbers.
    """
    return label_from(read_image(path, spatial_dims))


def label_from(image: Image) -> np.ndarray:
    """The label map in an image that was read."""
    array = image.labels
    if len(array) > 1 and (array != array[0]).any():
        raise UserError(f"{image.path} has {several_channels(image)}")
    labels = np.empty(array.shape[1:], np.int32)
    for plane, whole in zip(array[0], labels, strict=True):  # without copies of a large volume
        rounded = np.rint(plane)
        if (off := np.abs(plane - rounded) > 1e-3).any():
            raise UserError(
                f"{image.path} is no label map: it holds {plane[off].flat[0]:g}; whole numbers are expected."
            )
        whole[...] = rounded
    return labels


def several_channels(image: Image) -> str:
    """What a picture in colour or a volume with channels has in place of labels, and what to do, in words."""
    told = f"{len(image.array)} channels that differ"
    if image.spatial_dims == 3 or len(image.array) != 3 or image.array.max() > FULL:
        return f"{told}; a label map has one number a voxel. Save it with one channel."
    colours = [colour_name(code) for code in np.unique(colour_codes(image.array)).tolist()]
    if suffix_of(image.path) in LOSSY or len(colours) > MOST_COLOURS:
        return f"{told}, {len(colours)} colours; a label map has one number a voxel. Is it an image?"
    return (
        f"the colours {', '.join(colours[:SHOWN_COLOURS])}{', ...' * (len(colours) > SHOWN_COLOURS)}; a label map has "
        f"one number a voxel. {NUMBERS}."
    )


def colour_codes(array: np.ndarray) -> np.ndarray:
    """A number (*S) for each colour of a picture (1 or 3, *S) of 8 bits: that which #804080 writes."""
    red, green, blue = np.broadcast_to(array, (3, *array.shape[1:])).astype(np.int64)
    return (red << 16) | (green << 8) | blue


def colour_name(code: int) -> str:
    """As the web writes it.

    >>> colour_name(0x804080)
    '#804080'
    """
    return f"#{code:06x}"


def write_label(
    path: Path,
    labels: np.ndarray,
    like: Image,
    dtype: str = "uint8",
    description: str = "",
    *,
    names: Mapping[int, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a label map on the grid of `like`, atomically; the suffix of `path` decides the format.

    NIfTI from NIfTI keeps the header (sform, qform, codes, units); other formats keep origin, direction and spacing.
    Headers of NIfTI and NRRD tell the `names` of the values, see `kanseg.data.class_names`, and those of PNG, too, how
    the label map came to be (`provenance`, written as JSON).

    Raises:
        UserError: the shape is not that of `like`, values do not fit `dtype`, or the file cannot be written; then
            nothing is left behind.
    """
    return write_array(path, labels, like, np.dtype(dtype), description, names=names, provenance=provenance)


def write_array(
    path: Path,
    array: np.ndarray,
    like: Image,
    dtype: np.dtype,
    description: str = "",
    *,
    names: Mapping[int, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write numbers (*S), or (C, *S) to NIfTI or as colours, on the grid of `like`; see `write_label`."""
    path = Path(path)
    suffix = suffix_of(path)
    if array.shape[-like.spatial_dims :] != like.array.shape[1:]:
        raise UserError(f"{path}: shape {array.shape} is not that of {like.path}, {like.array.shape[1:]}")
    if np.issubdtype(dtype, np.integer) and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise UserError(f"{path}: values {array.min()} to {array.max()} do not fit {dtype}")
    writers = {**dict.fromkeys(SUFFIXES_NIFTI, _write_nifti), **dict.fromkeys(SUFFIXES_ITK, _write_itk)}
    writers |= dict.fromkeys(SUFFIXES_2D, _write_flat)
    for unfit in (*TWO_FILES, *LOSSY):
        del writers[unfit]
    if suffix not in writers:
        why = " (JPEG would change them)" if suffix in LOSSY else ""
        raise UserError(f"{path}: unknown format to write{why}. Known: {', '.join(sorted(writers))}.")
    if suffix == SEG_NRRD and like.spatial_dims == 2:
        raise UserError(
            f"{path}: segments of 3D Slicer are volumes, {like.path} is a picture. Write .png instead."
        )
    flat = array.ndim == 2 or (array.ndim == 3 and len(array) == 3 and like.spatial_dims == 2)
    if suffix in SUFFIXES_2D and (not flat or array.max(initial=0) > np.iinfo(np.uint16).max):
        raise UserError(
            f"{path}: a picture holds 2D labels or colours up to 65535, these are {array.ndim}D up to "
            f"{array.max(initial=0)}. Write .nii.gz instead."
        )
    about = About(description, names or {}, json.dumps(provenance, default=str) if provenance else "")
    temporary = part_of(path, suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[suffix](temporary, array.astype(dtype), like, about)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be written: {one_line(error)}. Free space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # after success it is gone already
            temporary.unlink()
    return path


def _write_nifti(path: Path, array: np.ndarray, like: Image, about: About) -> None:
    if array.ndim > like.spatial_dims:
        array = np.moveaxis(array, 0, -1)
    out = nib.Nifti1Image(array, like.affine, None)
    if suffix_of(like.path) in SUFFIXES_NIFTI and like.path.is_file():
        header = nib.load(like.path).header
        out = nib.Nifti1Image(array, None, None)  # an affine of its own would be written over what is kept
        for field in PLACED_BY:
            out.header[field] = header[field]
        out.header["pixdim"][:4] = header["pixdim"][:4]
    out.header["descrip"] = about.description[:79].encode("ascii", "replace")
    if about.names:
        out.header.extensions.append(label_table(about.names))
    if about.provenance:
        out.header.extensions.append(Nifti1Extension(COMMENT, about.provenance.encode()))
    nib.save(out, path)


def _write_itk(path: Path, array: np.ndarray, like: Image, about: About) -> None:
    image = sitk.GetImageFromArray(array.transpose())
    affine = LPS_TO_RAS @ like.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing[: like.spatial_dims]])
    image.SetOrigin([float(o) for o in affine[: like.spatial_dims, 3]])
    direction = (affine[:3, :3] / spacing)[: like.spatial_dims, : like.spatial_dims]
    image.SetDirection([float(d) for d in direction.flatten()])
    tags = {"description": about.description, PROVENANCE: about.provenance}
    if about.names and array.ndim == 3 and suffix_of(path) in (SEG_NRRD, ".nrrd"):
        tags |= segment_tags(array, about.names)
    for key, told in tags.items():
        if told and (len(told) <= LONGEST_IN_MHA or suffix_of(path) != ".mha"):
            image.SetMetaData(key, told)
    sitk.WriteImage(image, str(path), True)


def _write_flat(path: Path, array: np.ndarray, like: Image, about: About) -> None:
    write_picture(path, array, about)


def read_description(path: Path) -> str:
    """The remark in the header of an image that kanseg wrote; "" where there is none, or no such file."""
    suffix = suffix_of(path)
    try:
        if suffix in SUFFIXES_NIFTI:
            return bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode("ascii", "replace")
        if suffix in SUFFIXES_ITK:
            return header_tags(path).get("description", "")
        if suffix in SUFFIXES_DICOM:
            import pydicom

            header = pydicom.dcmread(path, stop_before_pixels=True)
            return str(header.get("ImageComments") or header.get("StructureSetDescription", ""))
        return read_texts(path).get(DESCRIPTION, "")
    except Exception:  # of nibabel, ITK and Pillow, without a common class: what cannot be read has no remark
        return ""


def read_layers(path: Path) -> Image:
    """The numbers of a segmentation of 3D Slicer (layers, *S): what they mean, its header tells."""
    return _read_one(path, layers=True)


def read_provenance(path: Path) -> dict[str, Any]:
    """How a label map that kanseg wrote came to be, by its header; {} where that tells nothing of it."""
    try:
        if suffix_of(path) in SUFFIXES_NIFTI:
            extensions = nib.load(path).header.extensions
            texts = [one.content for one in extensions if one.get_code() == COMMENT]
        elif suffix_of(path) in SUFFIXES_ITK:
            texts = [header_tags(path).get(PROVENANCE, "")]
        else:
            texts = [read_texts(path).get(PROVENANCE, "")]
        found = [json.loads(text.strip(b"\0") if isinstance(text, bytes) else text) for text in texts if text]
    except Exception:  # of nibabel, ITK, Pillow and json, without a common class: of others
        return {}
    return next((one for one in found if isinstance(one, dict) and PROVENANCE in one), {})


def _read_one(path: Path, *, layers: bool = False) -> Image:
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if path.is_dir():
        return _read_itk(path, read_series(path))
    suffix = suffix_of(path)
    if suffix == "":
        known = ", ".join((*SUFFIXES_3D, *SUFFIXES_2D))
        raise UserError(f"{path}: unknown format. Known: {known}, and folders with one DICOM series.")
    try:
        if suffix in SUFFIXES_NIFTI:
            return _read_nifti(path)
        if suffix in SUFFIXES_2D:
            array, indices = read_picture(path)
            return Image(array, np.eye(4), path, 2, indices)
        if suffix in SUFFIXES_SEGMENTS and is_no_image(path) and not layers:
            what = (
                f"a segmentation. {CONVERSION}"
                if is_segmentation(path)
                else "a DICOM object without an image"
            )
            raise UserError(f"{path} is {what}.")
        if suffix in (".mha", ".mhd"):
            return _read_itk(path, read_meta_image(path))
        if suffix in SUFFIXES_DICOM:
            return _read_itk(path, read_frames(path, path))
        return _read_itk(path, sitk.ReadImage(str(path)))
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}. Allow reading it.") from error
    except MemoryError as error:
        raise UserError(
            f"{path} does not fit into the memory, or its header says that it is larger than it is. Cut it to what is "
            "needed, or copy it again from its source."
        ) from error
    except Picture.DecompressionBombError as error:
        raise UserError(
            f"{path} is too large for a picture ({one_line(error)}). Cut it into several."
        ) from error
    except Exception as error:  # the errors of nibabel, ITK, Pillow and zlib share no base class
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). It is cut short, damaged, or not what its suffix says"
            f"{' (numbers of 64 bits are not read)' * (suffix in SUFFIXES_TIFF)}. Copy it again from its source."
        ) from error


def _read_nifti(path: Path) -> Image:
    file = nib.load(path)
    dtype = file.get_data_dtype()
    needed, held = file.dataobj.offset + prod(file.shape) * dtype.itemsize, path.stat().st_size
    if path.name.lower().endswith(".gz"):  # nibabel stops before the checksum at the end of the stream
        with gzip.open(path) as stream:
            content = stream.read(needed)
            held = len(content)
            while stream.read(BLOCK):
                pass
        file = type(file).from_bytes(content)
    if held < needed:  # nibabel would take the memory for all that the header says
        raise UserError(
            f"{path} cannot be read (it holds {held} bytes, {needed} are expected of {times(file.shape)} voxels). It "
            "is cut short, or its header is wrong. Copy it again from its source."
        )
    if dtype.fields is not None or np.issubdtype(dtype, np.complexfloating):
        raise UserError(
            f"{path} has structured or complex voxels ({dtype}), e.g. RGB; one number a voxel is expected. "
            f"{PARTS_APART}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        array = np.asarray(file.dataobj, dtype=np.float32)
    affine = np.array(file.affine, dtype=np.float64)
    affine[:3] *= MILLIMETRES.get(int(file.header["xyzt_units"]) & UNIT_OF_LENGTH, 1.0)
    return _as_image(array, affine, path)


def _as_image(array: np.ndarray, affine: np.ndarray, path: Path) -> Image:
    """3D -> one channel; 4D -> the 4th axis holds channels; trailing axes of length 1 do not count."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise UserError(
            f"{path} has shape {array.shape}; a 3D volume, or 4D with channels last, is expected."
        )
    channels = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    return Image(np.ascontiguousarray(channels), _usable(affine, path), path, 3)


def _usable(affine: np.ndarray, path: Path) -> np.ndarray:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path} has no usable geometry (affine {affine.tolist()}). Repair its header.")
    return affine


def _read_itk(path: Path, image: sitk.Image) -> Image:
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise UserError(f"{path} has complex voxels; one number a voxel is expected. {PARTS_APART}")
    if 0 in array.shape:
        raise UserError(f"{path} has no voxel (shape {array.shape[::-1]}). Copy it again from its source.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        array = array.astype(np.float32)
    colours = image.GetNumberOfComponentsPerPixel() > 1
    array = np.moveaxis(array, -1, 0) if colours else array[None]
    array = array.transpose(0, *range(array.ndim - 1, 0, -1))
    dims = image.GetDimension()
    if dims == 4:
        raise UserError(f"{path} is a 4D file; give one 3D file a channel.")
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(dims, dims)
    affine[:dims, :dims] = direction * np.array(image.GetSpacing())
    affine[:dims, 3] = image.GetOrigin()
    return Image(np.ascontiguousarray(array), _usable(LPS_TO_RAS @ affine, path), path, dims)


def grid_distance(one: Image, other: Image) -> float:
    """Largest distance in mm between corresponding corners of two grids; infinite where the shapes differ."""
    shape = one.array.shape[1:]
    if shape != other.array.shape[1:]:
        return np.inf
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1)[:3]], indexing="ij")).reshape(3, -1)
    shift = one.affine - other.affine
    return float(np.abs(shift[:3, :3] @ corners + shift[:3, 3:]).max())


def check_pair(one: Image, other: Image) -> None:
    """Raise `UserError` unless two images, or an image and its label, lie on one grid."""
    distance = grid_distance(one, other)
    if distance <= GRID_TOLERANCE:
        return
    shapes = [image.array.shape[1:] for image in (one, other)]
    what = (
        f"shapes {shapes[0]} and {shapes[1]}"
        if np.isinf(distance)
        else f"grids up to {distance:.3g} mm apart"
    )
    turned = next((image.path for image in (one, other) if is_turned(image.path)), None)
    way = f"{turned} is to be shown turned (EXIF): save it so." if turned else "Resample one to the other."
    raise UserError(
        f"{one.path} and {other.path} lie on different grids: {what}; one grid is expected. {way}"
    )


def in_ras(image: Image, array: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """An array (*S) on the grid of a volume with its axes turned to run right, front, up, and its spacing in mm.

    Pictures stay as they are. Oblique axes take the nearest of the three.
    """
    if image.spatial_dims == 2:
        return array, list(image.spacing)
    turn = nib.io_orientation(image.affine)
    order = np.argsort(turn[:, 0])
    return nib.apply_orientation(array, turn), [image.spacing[axis] for axis in order]


def header_dtype(path: Path) -> Any:
    """The type that a NIfTI file stores, None for other formats."""
    return nib.load(path).get_data_dtype() if suffix_of(path) in SUFFIXES_NIFTI else None
