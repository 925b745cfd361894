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
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Extension
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo

from kanseg.data.class_names import label_table, segment_tags
from kanseg.data.headers import header_tags, itk_header
from kanseg.data.meta_image import read_meta_image
from kanseg.errors import UserError
from kanseg.training.files import part_of

MILLIMETRES = {1: 1e3, 3: 1e-3}  # in metres and micrometres, by their numbers in NIfTI headers
UNIT_OF_LENGTH = 7  # the bits of xyzt_units that say it
PLACED_BY = (  # fields of a NIfTI header that say where its voxels lie
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
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
COLOURED = ("P", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of Pillow
SHOWN_SERIES, UID_END = 6, 12  # that are named of several series, and of an identifier
FULL = 255  # the brightest of 8 bits
BLOCK = 2**20  # bytes that are read at once where they are not kept
MOST_COLOURS = 256  # that tell classes apart in a label; more are a picture
SHOWN_COLOURS = 8  # of those in words
TWO_FILES = {".mhd": ".mha", ".nhdr": ".nrrd"}  # a header beside its data cannot be replaced in one step
# DICOM objects that lie beside images and hold none: directory, presentation states, reports, documents, RT
NO_IMAGES = (
    "1.2.840.10008.1.3.10",
    *("1.2.840.10008.5.1.4.1.1." + n for n in ("11.", "66", "88.", "104.", "481.")),
)
NUMBERS = "kanseg doctor DATA --fix OUT numbers the colours of a data set"
CONVERSION = f"kanseg convert DATA -o OUT makes a data set with label maps of one with {SEGMENTS}"
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7", STRUCTURES)
RADIOGRAPHS = "CR DX IO MG PX RF RG XA".split()  # modalities whose numbers mean brightness alone
SOP_CLASS = 0x00080016  # the tag SOPClassUID
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # its remarks on odd headers go to stderr
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
TIFF_REMARK = 270  # the tag ImageDescription
TURNED = 274  # the tag Orientation
TIFF_BITS = 258  # the tag BitsPerSample
TIFF_KIND = 339  # the tag SampleFormat: 1 unsigned, 2 signed
MISREAD = {(2, 8): np.int8, (1, 32): np.uint32}  # kind and bits that Pillow takes for the other kind
TIFF_EXTRA, UNSPECIFIED = 338, 0  # the tag ExtraSamples, and its value for what is not opacity
PROVENANCE, COMMENT = "kanseg", 6  # the key in headers, and the code of NIfTI's extension
GRID_TOLERANCE = 1e-2  # mm between corresponding corners of two grids
SIDEWAYS = 1.0  # mm that a slice may lie beside the normal of the first
PARTS_APART = "Save each colour or part as a channel."
AGAIN = "Export the series again, or convert it with a tool that repairs it."


class About(NamedTuple):
    """What headers tell of an image that kanseg writes: a remark, names of its values, and JSON on how it was made."""

    description: str
    names: Mapping[int, str]
    provenance: str


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


def suffix_of(path: Path) -> str:
    """The known suffix of a file name in lower case (".nii.gz" whole), or ""."""
    name = path.name.lower()
    return next((s for s in (*SUFFIXES_3D, *SUFFIXES_2D, *SUFFIXES_DICOM) if name.endswith(s)), "")


def stem_of(path: Path) -> str:
    """File name without its known suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


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
        _require_same_grid(first, other)
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


def palette_numbers(path: Path) -> list[int]:
    """The numbers of a picture with a palette that stand in it, none of other files."""
    try:
        with Picture.open(path) as picture:
            return np.unique(np.array(picture)).tolist() if picture.mode == "P" else []
    except (OSError, SyntaxError, Picture.DecompressionBombError):
        return []


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


def in_colour(path: Path) -> bool:
    """Whether a picture is stored in colours or with a palette, by its header; False for what is no picture."""
    try:
        with Picture.open(path) as picture:
            return picture.mode in COLOURED
    except (OSError, SyntaxError, Picture.DecompressionBombError):  # whoever reads it says what is wrong
        return False


def check_pair(image: Image, label: Image | np.ndarray, label_path: Path | None = None) -> None:
    """Raise `UserError` unless image and label have one shape and, where known, one grid."""
    if isinstance(label, Image):
        _require_same_grid(image, label)
    elif image.array.shape[1:] != label.shape:
        raise UserError(
            f"{image.path} has shape {image.array.shape[1:]} and its label {label_path or ''} {label.shape}; one shape "
            "is needed. Resample the label to the grid of the image."
        )


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
    writers |= dict.fromkeys(SUFFIXES_2D, _write_picture)
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
            f"{path} cannot be written: {_reason(error)}. Free space or choose another folder."
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
    for key in filter(tags.get, tags):
        image.SetMetaData(key, tags[key])
    sitk.WriteImage(image, str(path), True)


def _write_picture(path: Path, array: np.ndarray, like: Image, about: About) -> None:
    array = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if array.ndim == 3 else array
    if array.ndim == 3 and array.dtype != np.uint8:  # Pillow knows no colours of more bits
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint16), isVector=True), str(path))
        return
    picture = Picture.fromarray(array if array.dtype == np.uint8 else array.astype(np.uint16))
    if suffix_of(path) == ".png":
        text = PngInfo()
        text.add_text("Description", about.description)
        if about.provenance:
            text.add_text(PROVENANCE, about.provenance)
        picture.save(path, pnginfo=text)
    elif suffix_of(path) in SUFFIXES_TIFF:
        picture.save(path, description=about.description)
    else:
        picture.save(path)


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
        with Picture.open(path) as picture:
            return str(
                getattr(picture, "text", {}).get("Description") or picture.getexif().get(TIFF_REMARK, "")
            )
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
            with Picture.open(path) as picture:
                texts = [getattr(picture, "text", {}).get(PROVENANCE, "")]
        found = [json.loads(text.strip(b"\0") if isinstance(text, bytes) else text) for text in texts if text]
    except Exception:  # of nibabel, ITK, Pillow and json, without a common class: of others
        return {}
    return next((one for one in found if isinstance(one, dict) and PROVENANCE in one), {})


def _read_one(path: Path, *, layers: bool = False) -> Image:
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if path.is_dir():
        return _read_dicom(path)
    suffix = suffix_of(path)
    if suffix == "":
        known = ", ".join((*SUFFIXES_3D, *SUFFIXES_2D))
        raise UserError(f"{path}: unknown format. Known: {known}, and folders with one DICOM series.")
    try:
        if suffix in SUFFIXES_NIFTI:
            return _read_nifti(path)
        if suffix in SUFFIXES_2D:
            return _read_picture(path)
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
            return _read_itk(path, _read_frames(path, path))
        return _read_itk(path, sitk.ReadImage(str(path)))
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}. Allow reading it.") from error
    except MemoryError as error:
        raise UserError(
            f"{path} does not fit into the memory, or its header says that it is larger than it is. Cut it to what is "
            "needed, or copy it again from its source."
        ) from error
    except Picture.DecompressionBombError as error:
        raise UserError(
            f"{path} is too large for a picture ({_reason(error)}). Cut it into several."
        ) from error
    except Exception as error:  # the errors of nibabel, ITK, Pillow and zlib share no base class
        raise UserError(
            f"{path} cannot be read ({_reason(error)}). It is cut short, damaged, or not what its suffix says"
            f"{' (numbers of 64 bits are not read)' * (suffix in SUFFIXES_TIFF)}. Copy it again from its source."
        ) from error


def _reason(error: Exception) -> str:
    """What an error says, in one line; of ITK's many lines the last one that does not guess at errno."""
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Reason:" not in line]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, RuntimeError) else " ".join(lines)


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
            f"{path} cannot be read (it holds {held} bytes, {needed} are expected of {_times(file.shape)} voxels). It "
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


def _read_picture(path: Path) -> Image:
    """Grey is one channel, colour three; opacity is no channel, and what else a TIFF may hold is refused."""
    with Picture.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path} has {picture.n_frames} frames; one picture a file is expected.")
        if UNSPECIFIED in getattr(picture, "tag_v2", {}).get(TIFF_EXTRA, ()):
            raise UserError(
                f"{path} has channels that are neither grey, colour nor opacity. Save it without them, or each "
                f"channel as a file of its own, {stem_of(path)}_0000.tif, ..."
            )
        if picture.mode[0] not in "IF" and (";16" in str(picture.tile) or max(_bits(picture)) > 8):
            return Image(_deep_colours(path), np.eye(4), path, 2)
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
    return Image(np.ascontiguousarray(channels), np.eye(4), path, 2, indices)


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


def _read_dicom(folder: Path) -> Image:
    """One DICOM series of a folder; spacing along the slices comes from their positions."""
    reader = sitk.ImageSeriesReader()
    names = dicom_files(folder)
    try:
        _require_readable(folder, names)
        if len(names) == 1:
            image = _read_frames(folder, Path(names[0]))
        else:
            reader.SetFileNames(_in_order(folder, names))
            grey = itk_header(names[0]).GetNumberOfComponents() == 1
            if grey:  # or all slices would get the type of the first, whatever their scales
                reader.SetOutputPixelType(sitk.sitkFloat32)
            image = reader.Execute()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder} cannot be read as DICOM ({_reason(error)}). Copy it again from its source, or save it "
            "uncompressed."
        ) from error
    return _read_itk(folder, image)


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


def _series_in_words(names: Sequence[str]) -> str:
    """What a person tells the series of some files by: description, modality, size, identifier."""
    import pydicom

    file = Path(names[0])
    header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
    called = header.get("SeriesDescription") or header.get("ProtocolName") or "without a description"
    count = f"{len(names)} files such as {file.name}" if len(names) > 1 else f"the file {file.name}"
    uid = str(header.get("SeriesInstanceUID") or "")
    return f"{called} ({header.get('Modality') or 'no modality'}, {count}, series ...{uid[-UID_END:]})"


def is_no_image(path: Path) -> bool:
    """Whether a file is a segmentation, or another object of DICOM that lies beside images: a report, ..."""
    return suffix_of(path) == SEG_NRRD or _sop_class(path).startswith(NO_IMAGES)


def is_segmentation(path: Path) -> bool:
    """Whether a file is a Segmentation object of DICOM, a structure set or a segmentation of 3D Slicer."""
    return suffix_of(path) == SEG_NRRD or _sop_class(path).startswith(SEGMENTATIONS)


def is_structures(path: Path) -> bool:
    """Whether a DICOM file is an RT Structure Set."""
    return _sop_class(path).startswith(STRUCTURES)


def _sop_class(path: Path) -> str:
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
    known, kind = {Path(name).name for name in names}, _sop_class(Path(names[0]))
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

    own = _sop_class(path)
    is_image = own in ("", kind) or UID(own).name.endswith("Image Storage")
    return is_image and not own.startswith(NO_IMAGES)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its name or by its first bytes."""
    if suffix_of(path) in SUFFIXES_DICOM:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _in_order(folder: Path, names: Sequence[str]) -> list[str]:
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
                f"{source} mixes slices of {_times(sizes[0])} and of {_times(size)} {what}; one volume is expected. "
                f"{AGAIN}"
            )


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _order(positions: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """Of slices, along the normal of the first."""
    return np.argsort(positions @ np.cross(orientations[0, :3], orientations[0, 3:]), kind="stable")


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


def _read_frames(source: Path, file: Path) -> sitk.Image:
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


def _with_thickness(image: sitk.Image, header: Any, frames: Sequence[dict[str, list[float]]]) -> sitk.Image:
    """A slice alone, whose neighbours tell no spacing: ITK takes 1 mm where the scanner tells no gap."""
    told = [header.get("SliceThickness"), *(number for frame in frames for number in frame["SliceThickness"])]
    thickness = next(filter(None, told), None)
    if image.GetDimension() == 3 and thickness and not header.get("SpacingBetweenSlices"):
        image.SetSpacing([*image.GetSpacing()[:2], float(thickness)])
    return image


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


def grid_distance(one: Image, other: Image) -> float:
    """Largest distance in mm between corresponding corners of two grids; infinite where the shapes differ."""
    shape = one.array.shape[1:]
    if shape != other.array.shape[1:]:
        return np.inf
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1)[:3]], indexing="ij")).reshape(3, -1)
    shift = one.affine - other.affine
    return float(np.abs(shift[:3, :3] @ corners + shift[:3, 3:]).max())


def _require_same_grid(one: Image, other: Image) -> None:
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


def is_turned(path: Path) -> bool:
    """Whether a photograph says that it is to be shown turned or mirrored; its pixels are read as they are stored."""
    if suffix_of(path) not in SUFFIXES_2D or not path.is_file():
        return False
    with Picture.open(path) as picture:
        return picture.getexif().get(TURNED, 1) > 1


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
