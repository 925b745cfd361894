"""The fingerprint of a data set: what planning looks at, and what tells later whether the data are still the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from kanseg.data.cases import Case, Dataset, files_of, label_path
from kanseg.data.digests import file_digest, near_duplicates, signature, thumbnail
from kanseg.data.images import check_pair, header_dtype, label_from, read_image
from kanseg.data.labels import known_values, value_counts
from kanseg.data.suffixes import SUFFIXES_2D, SUFFIXES_NIFTI, suffix_of
from kanseg.data.values import ValuesSeen
from kanseg.errors import UserError
from kanseg.files import parse_json, write_json
from kanseg.progress import progress

FINGERPRINT = "fingerprint.json"
FAR = 1.6  # times the largest (or smallest) of the training, an axis or all, from where on an image counts as unlike it
SAMPLES = 10_000  # intensities kept a case and channel


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Size, spacing, class frequencies and digests of every case, and foreground intensities; pairs are checked.

    Returns:
        {"cases": id -> {"size", "spacing", "group", "files", "voxels" of each known value, "values" in the label},
        "channels", "label_dtype", "same": pairs of ids whose images are one}.
    """
    cases: dict[str, dict[str, Any]] = {}
    intensities: list[list[np.ndarray]] = [[] for _ in dataset.channel_names]
    zeros: list[list[float]] = []  # share of voxels that are 0, a channel
    middles: list[list[float]] = []  # what `_middle` gives, of what has channels to exchange
    thumbnails: dict[str, np.ndarray] = {}
    dtypes = set()
    values = known_values(dataset)
    generator = np.random.default_rng(0)
    for case in progress(dataset.cases, "Reading images"):
        image = read_image(case.images, dataset.spatial_dims)
        label_image = read_image(label_path(case), dataset.spatial_dims)
        check_pair(image, label_image)
        label = label_from(label_image)
        if image.array.shape[0] != len(dataset.channel_names):
            raise UserError(
                f"{image.path} has {image.array.shape[0]} channels, {len(dataset.channel_names)} are expected "
                f"({', '.join(dataset.channel_names)}). Give every case the same channels."
            )
        thumbnails[case.id] = thumbnail(image.array)
        counts = value_counts(label)
        array, label, spacing = _in_ras(image.array, image.affine, label, dataset.spatial_dims)
        foreground = (label > 0) & (label != dataset.ignore_value)
        zeros.append([float((channel == 0).mean()) for channel in array])
        if len(array) > 1:
            middles.append(list(map(_middle, array)))
        for channel, samples in zip(array, intensities, strict=True):
            inside = channel[foreground] if foreground.any() else channel.ravel()
            samples.append(generator.choice(inside, min(SAMPLES, inside.size), replace=False))
        if suffix_of(label_path(case)) in SUFFIXES_NIFTI:
            dtypes.add(np.dtype(header_dtype(label_path(case))))
        files = {
            str(path): {**signature(path), "sha256": file_digest(path)}
            for path in (*case.images, label_path(case))
        }
        cases[case.id] = {"size": list(label.shape), "spacing": spacing, "group": case.group, "files": files}
        cases[case.id]["voxels"] = {str(value): counts.get(value, 0) for value in values}
        cases[case.id]["values"] = list(counts)
    shares = np.median(zeros, axis=0)
    channels: list[dict[str, Any]] = [
        {**_intensity(np.concatenate(samples)), "zeros": float(share)}
        for samples, share in zip(intensities, shares, strict=True)
    ]
    for channel, middle in zip(channels, zip(*middles, strict=True), strict=False):
        channel["middle"] = [min(middle), max(middle)]
    return {
        "cases": cases,
        "channels": channels,
        "label_dtype": _label_dtype(dtypes, dataset.label_values),
        "same": [list(pair) for pair in near_duplicates(thumbnails)],
    }


def save_fingerprint(seen: dict[str, Any], run: Path) -> Path:
    """Write RUN/fingerprint.json: what later steps compare the data with. It names cases, so no model carries it."""
    return write_json(run / FINGERPRINT, {"cases": seen["cases"], "same": seen["same"]})


def load_fingerprint(run: Path) -> dict[str, Any] | None:
    """What `save_fingerprint` wrote, None where a run has none."""
    path = run / FINGERPRINT
    if not path.exists():
        return None
    return parse_json(
        path,
        "what the plan saw of the data",
        "Run `kanseg plan` again.",
        lambda seen: {"cases": dict(seen["cases"]), "same": list(seen["same"])},
    )


def values_seen(run: Path) -> ValuesSeen:
    """What tells the values in the label of a case as a run was planned with them; None where the file has changed.

    Pictures are None always: their palettes tell more.
    """
    cases = (load_fingerprint(run) or {"cases": {}})["cases"]

    def values(case: Case) -> tuple[int, ...] | None:
        seen, path = cases.get(case.id, {}), label_path(case)
        if "values" not in seen or suffix_of(path) in SUFFIXES_2D:
            return None
        then, now = list(seen["files"].values())[-1], signature(path)
        return tuple(seen["values"]) if now == {key: then[key] for key in now} else None

    return values


def check_unchanged(dataset: Dataset, run: Path) -> None:
    """Raise `UserError` with the difference if the data are not those that the run was planned for.

    A file that has its size and time of change is taken as it was; any other is compared by its digest.
    """
    seen = load_fingerprint(run)
    if seen is None:
        return
    planned, found = seen["cases"], {case.id: case for case in dataset.sources}
    differences = [f"{name} is gone" for name in planned if name not in found]
    differences += [f"{name} is new" for name in found if name not in planned]
    for name in found:
        if name in planned:
            differences += _differences(name, planned[name], found[name])
    if differences:
        shown = "; ".join(differences[:5])
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"{dataset.root} is not as it was planned in {run}: {shown}{more}. Put the data back, or plan anew in "
            "another run folder."
        )


def _differences(name: str, planned: dict[str, Any], case: Case) -> list[str]:
    found = []
    if planned["group"] != case.group:
        found.append(f"{name} belonged to '{planned['group']}' and belongs to '{case.group}' now")
    if planned.get("classes", list(case.values)) != list(case.values):
        found.append(f"the class of {name} has changed")
    paths = files_of(case)
    if len(paths) != len(planned["files"]):
        return [*found, f"{name} had {len(planned['files'])} files and has {len(paths)} now"]
    for path, file in zip(paths, planned["files"].values(), strict=True):
        now = signature(path)
        same = now == {key: file[key] for key in now}
        if not same and (now["bytes"] != file["bytes"] or file_digest(path) != file["sha256"]):
            what = "label" if path == case.label else "image"
            found.append(f"the {what} {path.name} of {name} has changed")
    return found


def unlike_training(size: Sequence[int], affine: np.ndarray, seen: Mapping[str, Any]) -> str | None:
    """How an image's extent or spacing lies far outside what a network was trained on, or None.

    Args:
        size: voxels an axis, 2 or 3.
        seen: `fingerprint` of a plan: ranges of "size" and "spacing", axes in RAS order.
    """
    if not {"size", "spacing"} <= seen.keys() or len(seen["size"]["min"]) != len(size):
        return None  # a plan without ranges, or one that learns slices
    unit, spacing, shape = "pixels", np.ones(len(size)), np.array(size)
    if len(size) == 3:
        order = np.argsort(nib.io_orientation(affine)[:, 0])
        unit, spacing, shape = "mm", np.linalg.norm(affine[:3, :3], axis=0)[order], shape[order]
    low, high = (np.array(seen["size"][end]) * seen["spacing"][end] for end in ("min", "max"))
    extent = shape * spacing
    larger, smaller, said = extent / high, low / extent, []
    if max(*larger, *smaller, larger.prod(), smaller.prod()) > FAR:
        ranges = " x ".join(f"{a:.0f}-{b:.0f}" for a, b in zip(low, high, strict=True))
        measures = " x ".join(f"{length:.0f}" for length in extent)
        said = [
            f"it measures {measures} {unit}, training images {ranges} {unit}: crop it alike, or check the result"
        ]
    if (spacing > FAR * np.array(seen["spacing"]["max"])).any():
        shown = " x ".join(f"{length:.2g}" for length in spacing)
        coarsest = " x ".join(f"{length:.2g}" for length in seen["spacing"]["max"])
        said.append(
            f"its voxels of {shown} mm are coarser than any of the training ({coarsest} mm): check the result"
        )
    return "; ".join(said) or None


def exchanged_channels(array: np.ndarray, seen: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """How two channels of an image (C, *S) lie in each other's range of the training and not in their own, or None.

    Args:
        seen: `fingerprint` of a plan: ranges of the "middle" of each channel over the cases.
    """
    ranges = [channel.get("middle") for channel in seen.get("channels", ())]
    if len(array) < 2 or len(ranges) != len(array) or None in ranges:
        return None  # nothing to exchange, or a plan without ranges
    middles = list(map(_middle, array))

    def like(number: int, other: int) -> bool:
        low, high = ranges[other]
        return bool(low <= middles[number] <= high)

    for one in range(len(array)):
        for two in range(one):
            if like(one, two) and like(two, one) and not like(one, one) and not like(two, two):
                told = f"'{names[two]}' and '{names[one]}' look like each other in the training"
                return f"{told}: are these channels exchanged?"
    return None


def _middle(channel: np.ndarray) -> float:
    """Median of what is not 0."""
    values = channel[channel != 0]
    return float(np.median(values)) if values.size else 0.0


def _in_ras(
    array: np.ndarray, affine: np.ndarray, label: np.ndarray, dims: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Image, label and spacing, axes in RAS order, as preprocessing puts them (flips do not matter here)."""
    if dims == 2:
        return array, label, [1.0, 1.0]
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    return array.transpose(0, *(order + 1)), label.transpose(order), [float(s) for s in spacing]


def _intensity(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.percentile(values, (0.5, 50, 99.5))
    numbers = {"mean": values.mean(), "std": values.std(), "median": median, "lower": lower, "upper": upper}
    return {name: float(number) for name, number in numbers.items()}


def _label_dtype(dtypes: set[np.dtype], values: Sequence[int]) -> str:
    """The integer type of the labels in the files, else the smallest that holds their values."""
    if len(dtypes) == 1 and (dtype := next(iter(dtypes))).kind in "iu" and dtype.itemsize <= 2:
        return dtype.name
    return np.result_type(np.min_scalar_type(max(values)), np.min_scalar_type(min(values))).name
