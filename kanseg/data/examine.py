"""One case as the doctor sees it: read, judged and repaired, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from kanseg.data.cases import Case, Dataset, few
from kanseg.data.colours import numbered
from kanseg.data.convert import Sample, on_own_grid
from kanseg.data.findings import Finding
from kanseg.data.headers import itk_header
from kanseg.data.images import (
    GRID_TOLERANCE,
    Image,
    grid_distance,
    header_dtype,
    load_image,
    several_channels,
)
from kanseg.data.labels import known_values, value_counts
from kanseg.data.pictures import is_turned
from kanseg.data.suffixes import LOSSY, SUFFIXES_2D, SUFFIXES_NIFTI, suffix_of
from kanseg.data.values import MOST_VALUES, has_soft_edges, undeclared
from kanseg.errors import UserError

CROOKED = 1e-4  # of the angles' cosines: what rounding leaves, and readers such as ITK refuse
SHEARED = 0.02
ROUNDING = 0.5  # of the finest voxel, between corners of two grids that are meant to be one
THINNEST, THICKEST, MOST_ANISOTROPIC = 0.01, 25.0, 20.0  # mm, mm, ratio


def examine(
    case: Case,
    dataset: Dataset,
    masks: Sequence[Path],
    findings: list[Finding],
    colours: Sequence[int] = (),
    classes: Sequence[str] = (),
) -> Sample | None:
    """Read and repair one case; None where that cannot be. What is wrong is added to `findings`.

    Args:
        masks: its label files where there are several.
        colours: of all labels, where these are pictures in colour.
        classes: names of the folders of `masks`, where these say the class.
    """

    def note(kind: str, message: str) -> None:
        findings.append(Finding(kind, case.id, message))

    paths = labels_of(case, {case.id: masks})
    for file in (*case.images, *paths):
        if not file.exists():
            note("missing file", f"{file} is not there")
            return None
    try:
        image = load_image(case.images)
        labels = [load_image(file) for file in paths]
    except UserError as error:
        note("different grids" if "different grids" in str(error) else "unreadable", str(error))
        return None
    repaired = _repaired_image(image, case, dataset, note)
    if repaired is None or not labels:
        return None
    numbers = [_repaired_label(label, (image, repaired), colours, note) for label in labels]
    usable = [number for number in numbers if number is not None]
    if len(usable) < len(numbers):
        return None
    if classes:
        if (np.sum([mask > 0 for mask in usable], axis=0) > 1).any():
            note("masks overlap", f"{few([str(path) for path in paths], 3)} share voxels")
        places = [1 + classes.index(path.parent.name) for path in paths]
        usable = [np.where(mask > 0, place, 0) for mask, place in zip(usable, places, strict=True)]
    merged = np.max(usable, axis=0)
    if dataset.label_values:
        accepted = {*known_values(dataset), dataset.ignore_value}
        foreign = value_counts(merged).keys() - accepted
        if foreign:
            note("undeclared values", undeclared(paths[0], dataset, foreign))
            return None
    if not merged.any():
        note("empty label", f"{paths[0]} holds the background alone")
    return Sample(case.id, repaired, merged, case.group)


def labels_of(case: Case, masks: Mapping[str, Sequence[Path]]) -> list[Path]:
    return list(masks.get(case.id) or ([case.label] if case.label else []))


def _repaired_image(image: Image, case: Case, dataset: Dataset, note: Any) -> Image | None:
    if image.spatial_dims != dataset.spatial_dims:
        note(
            "other dimension",
            f"{image.path} is {image.spatial_dims}D, the others are {dataset.spatial_dims}D",
        )
        return None
    if len(image.array) != len(dataset.channel_names):
        expected = f"{len(dataset.channel_names)} ({', '.join(dataset.channel_names)})"
        note("other channels", f"{image.path} has {len(image.array)} channels, expected are {expected}")
        return None
    bad = ~np.isfinite(image.array)
    if bad.all():
        note("unreadable", f"{image.path} has no finite voxel")
        return None
    if bad.any():
        note("not finite", f"{image.path} has {int(bad.sum())} voxels that are NaN or infinite")
        image = replace(image, array=np.where(bad, image.array[~bad].min(), image.array))
    if any(map(is_turned, case.images)):
        said = "is to be shown turned (EXIF), and is taken as it is stored; was its label drawn so?"
        note("turned by EXIF", f"{image.path} {said}")
    if image.array.min() == image.array.max():
        note("constant image", f"{image.path} has the value {image.array.flat[0]:g} everywhere")
    if any(_is_4d_with_one(path) for path in case.images):
        note("4D with one channel", f"{image.path} is stored as 4D with a last axis of length 1")
        image = on_own_grid(image)
    return image if image.spatial_dims == 2 else _straightened(image, note)


def _straightened(image: Image, note: Any) -> Image:
    """Look at the grid: spacing, and angles between the axes."""
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if (
        spacing.min() < THINNEST
        or spacing.max() > THICKEST
        or spacing.max() / spacing.min() > MOST_ANISOTROPIC
    ):
        shown = " x ".join(f"{s:g}" for s in spacing)
        note("extreme spacing", f"{image.path} has voxels of {shown} mm; is the unit millimetres?")
    axes = image.affine[:3, :3] / spacing
    off = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if off < CROOKED:
        return image
    if off > SHEARED:
        note(
            "sheared axes",
            f"{image.path} has axes far from right angles (cosine {off:.3f}), as of a tilt",
        )
        return image
    note("crooked axes", f"{image.path} has axes that are not quite at right angles (cosine {off:.2g})")
    left, _, right = np.linalg.svd(axes)
    affine = image.affine.copy()
    affine[:3, :3] = left @ right * spacing
    middle = (np.array(image.array.shape[1:]) - 1) / 2
    affine[:3, 3] += (image.affine[:3, :3] - affine[:3, :3]) @ middle
    return on_own_grid(image, affine=affine)


def _is_4d_with_one(path: Path) -> bool:
    if suffix_of(path) in SUFFIXES_NIFTI:
        shape = nib.load(path).shape
    elif suffix_of(path) in SUFFIXES_2D or path.is_dir():
        return False
    else:
        shape = itk_header(path).GetSize()
    return len(shape) > 3 and shape[-1] == 1


def _repaired_label(
    label: Image, images: Sequence[Image], colours: Sequence[int], note: Any
) -> np.ndarray | None:
    """Whole numbers (*S) on the grid of the image (as it was, and repaired), or None."""
    image = images[0]
    distance = min(grid_distance(one, label) for one in images)
    finest = min(image.spacing)
    if distance > ROUNDING * finest:
        shapes = f"shapes {image.array.shape[1:]} and {label.array.shape[1:]}"
        what = shapes if np.isinf(distance) else f"corners are up to {distance:.3g} mm apart"
        note(
            "different grids",
            f"{label.path} does not lie on the grid of its image: {what}; resample one of them",
        )
        return None
    if distance > GRID_TOLERANCE:
        note("grids differ by rounding", f"{label.path} lies {distance:.3g} mm off the grid of its image")
    if colours and suffix_of(label.path) not in LOSSY:
        return numbered(label, dict(zip(colours, range(len(colours)), strict=True)))
    array = label.labels
    if len(array) > 1 and (array != array[0]).any():
        note("no label map", f"{label.path} has {several_channels(label)}")
        return None
    values = np.unique(array[0])
    if suffix_of(label.path) in LOSSY and len(values) > 2:
        note("lossy label", f"{label.path} has {len(values)} different values because JPEG changes numbers")
        return _split(array[0])
    if has_soft_edges(array[0], values):
        note(
            "soft edges",
            f"{label.path} has {len(values)} values, mostly {values[-1]:g}, as a resized mask has",
        )
        return _split(array[0])
    rounded = np.rint(values)
    if not np.isfinite(values).all() or np.abs(values - rounded).max() > 1e-3 or rounded.min() < 0:
        note(
            "no label map",
            f"{label.path} holds {values[0]:g} to {values[-1]:g}; whole numbers from 0 are expected",
        )
        return None
    if len(values) > MOST_VALUES:
        note("no label map", f"{label.path} has {len(values)} different values; is it an image?")
        return None
    dtype = header_dtype(label.path)
    if dtype is not None and np.issubdtype(dtype, np.floating):
        note("float label", f"{label.path} is stored as {dtype}")
    return np.rint(array[0]).astype(np.int32)


def _split(mask: np.ndarray) -> np.ndarray:
    """1 above the middle of a mask's values, 0 below."""
    return np.where(mask > (mask.min() + mask.max()) / 2, 1, 0).astype(np.int32)
