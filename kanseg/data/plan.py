"""The plan: what preprocessing, training and prediction of a data set must agree on.

It is made by `kanseg.data.planner`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kanseg.data.cases import Dataset
from kanseg.data.formats import read_dataset
from kanseg.data.stored_plan import StoredPlan
from kanseg.errors import UsageError, did_you_mean

VERSION = 1
# Lists of a plan that have one entry for each entry of another.
PARALLEL = {"normalization": "channel_names", "label_names": "label_values"}
PARALLEL |= {"features_per_stage": "strides", "kernel_sizes": "strides"}
LABEL_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
SCHEMES = {  # of normalization, and the numbers that each needs
    "zscore": (), "zscore_nonzero": (), "minmax": (), "fixed": ("mean", "std"), "ct": ("lower", "upper", "mean", "std"),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A preset: channels of the first stage (doubled at each halving), of the widest (by dimension), and depth."""

    features: int
    most_features: dict[int, int]
    encoder: str


SIZES = {
    "small": Size(16, {2: 256, 3: 128}, "reskanet10"),
    "standard": Size(32, {2: 512, 3: 256}, "reskanet10"),
    "large": Size(48, {2: 768, 3: 384}, "reskanet18"),
}


def check_size(size: str) -> None:
    """Raise `UsageError` with the nearest name unless a size is one of `SIZES`."""
    if size not in SIZES:
        raise UsageError(f"Unknown size '{size}'.{did_you_mean(size, SIZES)}")


@dataclass
class Plan(StoredPlan):
    """Everything that preprocessing, training and prediction must agree on; plan.json, and part of each checkpoint.

    Of `memory_bytes` that may be taken, `training_bytes` are what training will take without its loaders, where a step
    was measured.

    `data`, `id_pattern` and `given_regions` are what `read_dataset` was given. Lengths are in mm, axes in the order of
    `orientation` (R, A, S for volumes; rows, columns for pictures). `spatial_dims` is the network's dimension: where it
    is 2 and `slice_axis` is set, volumes are learnt slice by slice across that axis, each slice with its neighbours as
    further channels, `slices` in all. `regions` and `ignore_value`: see `kanseg.data.labels.Labels`.
    `normalization` has one entry a channel: {"scheme": "zscore"} (of each image), {"scheme": "zscore_nonzero"}
    (of what is not 0, and 0 stays 0: images whose surroundings were cut away), {"scheme": "ct", "lower", "upper",
    "mean", "std"} (clipped to the foreground's percentiles 0.5 and 99.5, then by its mean and spread), {"scheme":
    "minmax"} (of each image, to 0 ... 1) or {"scheme": "fixed", "mean", "std"} (of all images alike).
    `previous_stage` makes it the second stage of a cascade: it names the folder of the first, beside this plan or in a
    model's folder, whose label map the network takes beside the image.
    """

    task: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "dice"  # of its validations

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
    regions: list[list[int]] = field(default_factory=list)
    given_regions: dict[str, list[int]] | None = None
    ignore_value: int | None = None
    slice_axis: int | None = None
    slices: int = 1
    previous_stage: str | None = None
    orientation: str = "RAS"
    model: str = "ukanet"
    model_options: dict[str, Any] = field(default_factory=dict)
    size: str = "standard"
    memory_bytes: int = 0
    training_bytes: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def image_dims(self) -> int:
        """Dimension of the images: 3 also where they are learnt slice by slice."""
        return self.spatial_dims if self.slice_axis is None else 3

    @property
    def unit(self) -> str:
        """Of lengths; pictures have no physical spacing."""
        return "pixels" if self.image_dims == 2 else "mm"

    @property
    def in_channels(self) -> int:
        """Channels that the network takes: those of the image for each slice that it sees at once, and in a cascade one
        for each class of the stage before but the background.
        """
        classes = len(self.label_names) - 1 if self.previous_stage else 0
        return len(self.channel_names) * self.slices + classes

    def misfit(self) -> str | None:
        """What a plan edited by hand has wrong, or None."""
        return _misfit(self)


def _misfit(plan: Plan) -> str | None:
    if plan.version != VERSION:
        return f"it has version {plan.version}, this kanseg knows {VERSION}"
    axes: dict[str, list[Any]] = {"spacing": [plan.spacing], "patch_size": [plan.patch_size]}
    axes |= {"strides": plan.strides, "kernel_sizes": plan.kernel_sizes}
    for key, rows in axes.items():
        if not all(len(row) == plan.spatial_dims and all(0 < n < math.inf for n in row) for row in rows):
            return f"{key} needs a positive number for each of {plan.spatial_dims} axes, but is {getattr(plan, key)}"
    for key, other in PARALLEL.items():
        if len(getattr(plan, key)) != len(getattr(plan, other)):
            return f"{key} has {len(getattr(plan, key))} entries, {other} has {len(getattr(plan, other))}"
    if plan.regions:
        if len(plan.regions) != len(plan.label_names):
            return f"regions has {len(plan.regions)} entries, label_names has {len(plan.label_names)}"
    elif plan.label_values != sorted(set(plan.label_values)):
        return f"label_values must rise, but are {plan.label_values}"
    if plan.slice_axis is not None and (plan.spatial_dims != 2 or plan.slice_axis not in (0, 1, 2)):
        return f"slice_axis {plan.slice_axis} needs spatial_dims 2 and one of the axes 0, 1, 2"
    if plan.slices < 1 or plan.slices % 2 == 0 or (plan.slices > 1 and plan.slice_axis is None):
        return f"slices must be odd, and 1 where there is no slice_axis, but is {plan.slices}"
    if plan.previous_stage is not None:
        if plan.spatial_dims != 3:
            return "previous_stage is for networks in 3D"
        if plan.previous_stage in ("", "..") or Path(plan.previous_stage).name != plan.previous_stage:
            return f"previous_stage is the name of a folder, not '{plan.previous_stage}'"
    if not set(plan.mirror_axes) <= set(range(plan.spatial_dims)):
        return (
            f"mirror_axes are axes of the network, 0 to {plan.spatial_dims - 1}, but are {plan.mirror_axes}"
        )
    if plan.label_dtype not in LABEL_DTYPES:
        return f"label_dtype is one of {', '.join(LABEL_DTYPES)}, not '{plan.label_dtype}'"
    for scheme in plan.normalization:
        if (needed := SCHEMES.get(str(scheme.get("scheme")))) is None:
            return f"a normalization is one of {', '.join(SCHEMES)}, not {scheme}"
        if not all(isinstance(scheme.get(key), int | float) and math.isfinite(scheme[key]) for key in needed):
            return f"the normalization '{scheme['scheme']}' needs the numbers {', '.join(needed)}, but is {scheme}"
    return None if plan.batch_size > 0 else f"batch_size is {plan.batch_size}"


def planned_dataset(plan: Plan, run: Path | None = None) -> Dataset:
    """The data set of a plan, read as it was for planning in the folder `run`."""
    return read_dataset(plan.data, id_pattern=plan.id_pattern, regions=plan.given_regions, run=run)
