"""The plan: what a look at the data decides about spacing, patches, normalisation and the size of the network.

The rules follow nnU-Net's (Isensee et al., Nature Methods 18, 2021) in spirit and in words: median spacing, patches
as large as memory allows, an axis is halved only while it is about as fine as the others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.formats import Case, Dataset
from kanseg.data.images import SUFFIXES_NIFTI, check_pair, header_dtype, label_from, read_image, suffix_of
from kanseg.errors import UserError, did_you_mean
from kanseg.progress import progress

VERSION = 1
SAMPLES = 10_000  # intensities kept a case and channel
FEATURES = 32  # of the first stage; doubled at each halving
MOST_FEATURES = {2: 512, 3: 256}
MOST_STAGES = 6
COARSEST = {2: 8, 3: 4}  # voxels an axis of the coarsest map keeps
# Bytes of training memory a voxel of the batch and feature of the first stage: UKANet's peak resident memory.
BYTES_A_VOXEL = 330
EMPTY = 0.25  # share of zeros from which on an image counts as cut out
SHARE = 0.6  # of the memory at hand, the rest is for data, optimizer and the system
LARGEST_BATCH = {2: 12, 3: 2}
# Lists of a plan that have one entry for each entry of another.
PARALLEL = {"normalization": "channel_names", "label_names": "label_values"}
PARALLEL |= {"features_per_stage": "strides", "kernel_sizes": "strides"}
MODEL_OPTIONS = {
    "encoder": "reskanet10",
    "basis": "gram",
    "kan_stages": "deep",
    "bottleneck": True,
    "deep_supervision": True,
}


@dataclass
class Plan:
    """Everything that preprocessing, training and prediction must agree on; plan.json, and part of each checkpoint.

    `data` and `id_pattern` are what `read_dataset` was given. Lengths are in mm, axes in the order of `orientation`
    (R, A, S for volumes; rows, columns for pictures).
    `normalization` has one entry a channel: {"scheme": "zscore"} (of each image), {"scheme": "zscore_nonzero"}
    (of what is not 0, and 0 stays 0: images whose surroundings were cut away) or {"scheme": "ct", "lower", "upper",
    "mean", "std"} (clipped to the foreground's percentiles 0.5 and 99.5, then by its mean and spread).
    """

    dataset_name: str
    data: str
    layout: str
    spatial_dims: int
    channel_names: list[str]
    label_names: list[str]
    label_values: list[int]
    label_dtype: str
    spacing: list[float]
    patch_size: list[int]
    batch_size: int
    normalization: list[dict[str, Any]]
    features_per_stage: list[int]
    strides: list[list[int]]
    kernel_sizes: list[list[int]]
    mirror_axes: list[int] = field(default_factory=list)
    id_pattern: str | None = None
    orientation: str = "RAS"
    model: str = "ukanet"
    model_options: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, lists and dictionaries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`; keys that are unknown or missing, or do not fit together, raise `UserError`."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"A plan has no key '{key}'.{did_you_mean(key, known)}")
        try:
            plan = cls(**values)
            misfit = _misfit(plan)
        except TypeError as error:
            raise UserError(
                f"The plan is not complete, or has words for numbers: {error}. Run `kanseg plan` again."
            ) from error
        if misfit:
            raise UserError(
                f"The plan does not fit together: {misfit}. Correct it, or run `kanseg plan` again."
            )
        return plan

    def save(self, path: Path | str) -> Path:
        """Write plan.json, atomically."""
        from kanseg.training.files import write_json

        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read plan.json."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a plan ({error}). Run `kanseg plan` again.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no plan. Run `kanseg plan` again.")
        return cls.from_dict(values)


def _misfit(plan: Plan) -> str | None:
    """What a plan edited by hand has wrong, or None."""
    if plan.version != VERSION:
        return f"it has version {plan.version}, this kanseg knows {VERSION}"
    axes: dict[str, list[Any]] = {"spacing": [plan.spacing], "patch_size": [plan.patch_size]}
    axes |= {"strides": plan.strides, "kernel_sizes": plan.kernel_sizes}
    for key, rows in axes.items():
        if not all(len(row) == plan.spatial_dims and min(row) > 0 for row in rows):
            return f"{key} needs a positive number for each of {plan.spatial_dims} axes, but is {getattr(plan, key)}"
    for key, other in PARALLEL.items():
        if len(getattr(plan, key)) != len(getattr(plan, other)):
            return f"{key} has {len(getattr(plan, key))} entries, {other} has {len(getattr(plan, other))}"
    if plan.label_values != sorted(set(plan.label_values)):
        return f"label_values must rise, but are {plan.label_values}"
    return None if plan.batch_size > 0 else f"batch_size is {plan.batch_size}"


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Size, spacing, class frequencies and foreground intensities of every case; each pair is checked on the way."""
    cases: dict[str, dict[str, Any]] = {}
    intensities: list[list[np.ndarray]] = [[] for _ in dataset.channel_names]
    zeros: list[list[float]] = []  # share of voxels that are 0, a channel
    dtypes = set()
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
        array, label, spacing = _in_ras(image.array, image.affine, label, dataset.spatial_dims)
        foreground = label > 0
        zeros.append([float((channel == 0).mean()) for channel in array])
        for channel, samples in zip(array, intensities, strict=True):
            values = channel[foreground] if foreground.any() else channel.ravel()
            samples.append(generator.choice(values, min(SAMPLES, values.size), replace=False))
        if suffix_of(label_path(case)) in SUFFIXES_NIFTI:
            dtypes.add(np.dtype(header_dtype(label_path(case))))
        counts = {str(value): int((label == value).sum()) for value in dataset.label_values}
        cases[case.id] = {"size": list(label.shape), "spacing": spacing, "voxels": counts}
    return {
        "cases": cases,
        "channels": [
            {**_intensity(np.concatenate(samples)), "zeros": float(share)}
            for samples, share in zip(intensities, np.median(zeros, axis=0), strict=True)
        ],
        "label_dtype": _label_dtype(dtypes, dataset.label_values),
    }


def _in_ras(
    array: np.ndarray, affine: np.ndarray, label: np.ndarray, dims: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Image, label and spacing, axes in RAS order, as preprocessing puts them (flips do not matter here)."""
    if dims == 2:
        return array, label, [1.0, 1.0]
    import nibabel as nib

    order = np.argsort(nib.io_orientation(affine)[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    return array.transpose(0, *(order + 1)), label.transpose(order), [float(s) for s in spacing]


def label_path(case: Case) -> Path:
    """The label file of a case; `UserError` where it has none."""
    if case.label is None:
        raise UserError(f"{case.images[0]} has no label. Give its label, or leave the case out.")
    return case.label


def _intensity(values: np.ndarray) -> dict[str, float]:
    lower, median, upper = np.percentile(values, (0.5, 50, 99.5))
    numbers = {"mean": values.mean(), "std": values.std(), "median": median, "lower": lower, "upper": upper}
    return {name: float(number) for name, number in numbers.items()}


def _label_dtype(dtypes: set[np.dtype], values: Sequence[int]) -> str:
    """The integer type of the labels in the files, else the smallest that holds their values."""
    if len(dtypes) == 1 and (dtype := next(iter(dtypes))).kind in "iu" and dtype.itemsize <= 2:
        return dtype.name
    return np.result_type(np.min_scalar_type(max(values)), np.min_scalar_type(min(values))).name


def memory_at_hand() -> int:
    """Bytes: of the GPU where there is one, else of the main memory that is free."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def make_plan(dataset: Dataset, *, memory: int | None = None, dim: int | None = None) -> Plan:
    """Look at every case and decide; the reasons stand in the plan.

    Args:
        memory: bytes to stay within; default what is at hand.
        dim: 2 or 3; must be the dimension of the data.
    """
    if dim is not None and dim != dataset.spatial_dims:
        raise UserError(
            f"{dataset.name} is {dataset.spatial_dims}D and dim={dim} was asked for. Leave --dim away (auto), or give "
            f"{dim}D images."
        )
    seen = fingerprint(dataset)
    dims = dataset.spatial_dims
    spacings = np.array([case["spacing"] for case in seen["cases"].values()])
    sizes = np.array([case["size"] for case in seen["cases"].values()])
    spacing = _target_spacing(spacings)
    resampled = np.median(sizes * spacings / spacing, axis=0)
    budget = memory_at_hand() if memory is None else memory
    largest = budget * SHARE / (BYTES_A_VOXEL * FEATURES)
    patch, strides, kernels = _patch(resampled, spacing, largest / 2)
    voxels = math.prod(patch)
    batch = int(np.clip(largest // voxels, 1, LARGEST_BATCH[dims]))
    features = [min(FEATURES * 2**stage, MOST_FEATURES[dims]) for stage in range(len(strides))]
    normalization = [
        _normalization(name, seen["channels"][i]) for i, name in enumerate(dataset.channel_names)
    ]
    grid = f"spacing {_numbers(spacing)}: the median of {len(sizes)} cases"
    reasons = [
        grid if dims == 3 else f"pixels as they are: {len(sizes)} pictures without a physical spacing",
        f"patch {patch} of a median size {[round(float(s)) for s in resampled]} at that spacing, batch {batch}: "
        f"what {budget / 2**30:.1f} GiB allow",
        f"strides {strides}: an axis is halved while it is within twice the finest spacing and long enough",
        f"normalization {[n['scheme'] for n in normalization]} by channel {list(dataset.channel_names)}",
        *dataset.notes,
    ]
    summary = {"size": _range(sizes), "spacing": _range(spacings), "channels": seen["channels"]}
    summary["voxels"] = {
        name: int(np.median([case["voxels"][str(value)] for case in seen["cases"].values()]))
        for name, value in zip(dataset.label_names, dataset.label_values, strict=True)
    }
    return Plan(
        dataset_name=dataset.name,
        data=str(dataset.source),
        id_pattern=dataset.id_pattern,
        layout=dataset.layout,
        spatial_dims=dims,
        channel_names=list(dataset.channel_names),
        label_names=list(dataset.label_names),
        label_values=list(dataset.label_values),
        label_dtype=seen["label_dtype"],
        spacing=[float(s) for s in spacing],
        patch_size=patch,
        batch_size=batch,
        normalization=normalization,
        features_per_stage=features,
        strides=strides,
        kernel_sizes=kernels,
        mirror_axes=[0, 1] if dims == 2 else [],
        orientation="RAS" if dims == 3 else "",
        model_options=dict(MODEL_OPTIONS),
        memory_bytes=budget,
        fingerprint=summary,
        reasons=reasons,
    )


def _target_spacing(spacings: np.ndarray) -> np.ndarray:
    """Median an axis; the coarse axis of thick slices goes by its 10th percentile, so slices are not thrown away."""
    spacing = np.median(spacings, axis=0)
    worst = int(spacing.argmax())
    others = np.delete(spacing, worst)
    if spacing[worst] > 3 * others.max():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), others.max())
    return np.round(spacing, 4)


def _patch(
    size: np.ndarray, spacing: np.ndarray, largest: float
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """A patch that fits the median image and the budget, with the strides that divide it."""
    dims = len(size)
    patch = np.ceil(size).astype(float)
    while True:
        strides, kernels = _topology(patch, spacing)
        factor = np.prod(strides, axis=0)
        rounded = (np.ceil(patch / factor) * factor).astype(int)
        if math.prod(rounded) <= largest or (rounded <= factor * COARSEST[dims]).all():
            return rounded.tolist(), strides, kernels
        physical = patch * spacing
        axis = int(np.where(rounded > factor, physical, -1).argmax())
        patch[axis] = max(factor[axis], patch[axis] * 0.9)


def _topology(patch: np.ndarray, spacing: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
    """nnU-Net's rule: of the axes long enough to be halved, those within twice the finest spacing of them are."""
    dims = len(patch)
    size, step = patch.copy(), spacing.copy()
    wide = step <= 2 * step.min()  # kernel 3; once wide, an axis stays so
    strides, kernels = [[1] * dims], [np.where(wide, 3, 1).tolist()]
    while len(strides) < MOST_STAGES and (long := size / 2 >= COARSEST[dims]).any():
        factor = np.where(long & (step <= 2 * step[long].min()), 2, 1)
        size, step = size / factor, step * factor
        wide = wide | (step <= 2 * step.min())
        strides.append(factor.tolist())
        kernels.append(np.where(wide, 3, 1).tolist())
    if len(strides) == 1:
        strides.append([1] * dims)
        kernels.append([3] * dims)
    return strides, kernels


def _normalization(channel: str, intensity: dict[str, float]) -> dict[str, Any]:
    if channel.strip().upper() == "CT":
        keys = ("lower", "upper", "mean", "std")
        return {"scheme": "ct", **{key: intensity[key] for key in keys}}
    return {"scheme": "zscore_nonzero" if intensity["zeros"] >= EMPTY else "zscore"}


def _range(values: np.ndarray) -> dict[str, list[float]]:
    rows = {"min": values.min(axis=0), "median": np.median(values, axis=0), "max": values.max(axis=0)}
    return {name: [round(float(v), 4) for v in row] for name, row in rows.items()}


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{v:g}" for v in values) + " mm"
