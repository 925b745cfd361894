"""The plan: what a look at the data decides about spacing, patches, normalisation and the size of the network.

The rules follow nnU-Net's (Isensee et al., Nature Methods 18, 2021) in spirit and in words: median spacing, patches
as large as memory allows, an axis is halved only while it is about as fine as the others. What a step needs in memory
is measured by one where `make_plan` is given a way to; else it goes by a figure from earlier measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kanseg.data.cases import Dataset
from kanseg.data.fingerprint import fingerprint, save_fingerprint
from kanseg.data.formats import read_dataset
from kanseg.data.mirror import axes_of_network, mirror_axes, why_mirror
from kanseg.data.splits import check_leaks
from kanseg.data.stored_plan import StoredPlan
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import make_folder
from kanseg.memory import FITS, for_data, memory_at_hand, on_gpu, taken
from kanseg.progress import in_words

VERSION = 1
MOST_STAGES = 6
COARSEST = {2: 8, 3: 4}  # voxels an axis of the coarsest map keeps
# Bytes of training memory a voxel of the batch and feature of the first stage: UKANet's peak resident memory.
BYTES_A_VOXEL = 330
EMPTY = 0.25  # share of zeros from which on an image counts as cut out
SHARE = 0.6  # of the memory at hand where nothing is measured, the rest is for data, optimizer and the system
MEASURED_SHARE = 0.9  # of the memory where a step was measured
CACHE_SHARE = 0.25  # of the memory that prepared cases may take; the others wait on the disk
BYTES_A_CASE_VOXEL = 8  # of a prepared case beside its channels: label and the places of its foreground
# What a process that prepares patches takes of its own: beside what it shares, and for each voxel of a batch, with its
# two next batches: measured at 22 MiB, and at 81 to 94 bytes with one channel and 177 with four.
LOADER_BYTES, LOADER_BYTES_A_VOXEL, LOADER_BYTES_A_CHANNEL = 32 * 2**20, 60, 35
LOADERS = 1  # that a plan reckons with
LARGEST_BATCH = {2: 12, 3: 2}
LEAST_VOXELS = {2: 128**2, 3: 40**3}  # a patch that sees less (and less than the image) costs width first
LEAST_FEATURES = 8
LEAST_SHARE = 1 / 64  # of a volume that such a patch should see; coarser voxels are better than less
TRIALS = 4
BOUNDLESS = 1e15  # voxels
FIRST_STAGE = "lowres"  # of a cascade: its folder in that of the second stage
GLANCE = 1 / 4  # of a median image that a patch of the first stage sees
ENOUGH = 1.2  # times that share; more is paid for by voxels coarser than need be
LEAST_SAVED = 2  # times fewer voxels that it has; else it sees hardly more than the second
LEAST_STEPS = 250  # that a training of a given time should have; a smaller patch is better than fewer
THICK = 3  # times the other spacings: slices from there on count as thick
# Lists of a plan that have one entry for each entry of another.
PARALLEL = {"normalization": "channel_names", "label_names": "label_values"}
PARALLEL |= {"features_per_stage": "strides", "kernel_sizes": "strides"}
MODEL_OPTIONS = {
    "encoder": "reskanet10",
    "basis": "gram",
    "kan_stages": "coarse",
    "bottleneck": True,
    "deep_supervision": True,
}
LABEL_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
SCHEMES = {  # of normalization, and the numbers that each needs
    "zscore": (), "zscore_nonzero": (), "minmax": (), "fixed": ("mean", "std"), "ct": ("lower", "upper", "mean", "std"),
}  # fmt: skip
NAMED_SCHEMES: dict[str, dict[str, Any]] = {  # by names of channels, as nnU-Net has them
    "nonorm": {"scheme": "fixed", "mean": 0.0, "std": 1.0},
    "rgb_to_0_1": {"scheme": "fixed", "mean": 0.0, "std": 255.0},
    "rescale_to_0_1": {"scheme": "minmax"},
    "zscore": {"scheme": "zscore"},
}


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


def plan_run(
    dataset: Dataset, run: Path, *, seen: dict[str, Any] | None = None, cascade: bool = False, **how: Any
) -> Plan:
    """Plan, and write what later steps need to the run folder: plan.json and fingerprint.json.

    Args:
        seen: what `fingerprint` gave, if it is there already.
        cascade: two stages; the second is planned in `run`, the first in a folder there, see `first_stage`.
        how: see `make_plan`.
    """
    check_wishes(dataset, cascade=cascade, **how)
    seen = seen or fingerprint(dataset)
    plan = make_plan(dataset, seen=seen, cascade=cascade, **how)
    plans = {run: plan}
    if cascade:
        assert plan.previous_stage is not None
        asked = {key: how[key] for key in ("measure", "seconds") if key in how}
        plans[run / plan.previous_stage] = first_stage(plan, seen, **asked)
    for folder, one in plans.items():
        save_fingerprint(seen, make_folder(folder))
        one.save(folder / "plan.json")
    return plan


def planned_dataset(plan: Plan, run: Path | None = None) -> Dataset:
    """The data set of a plan, read as it was for planning in the folder `run`."""
    return read_dataset(plan.data, id_pattern=plan.id_pattern, regions=plan.given_regions, run=run)


def make_plan(
    dataset: Dataset,
    *,
    memory: int | None = None,
    dim: int | None = None,
    size: str = "standard",
    slices: int = 1,
    mirror: Sequence[int] | None = None,
    regions: dict[str, list[int]] | None = None,
    cascade: bool = False,
    seen: dict[str, Any] | None = None,
    measure: Callable[[Plan], Need] | None = None,
    seconds: float | None = None,
) -> Plan:
    """Look at every case and decide; the reasons stand in the plan.

    Args:
        memory: bytes to stay within; default what is at hand.
        dim: of the network; 2 with volumes learns them slice by slice. Default as the images are.
        size: preset in `SIZES`.
        slices: how many neighbouring slices the network sees at once, an odd number; more than 1 is 2.5D.
        mirror: axes of the image whose ends may be exchanged; default both of pictures and none of volumes, see
            `kanseg.data.mirror`.
        regions: as `read_dataset` was given them.
        cascade: the plan is that of a second stage; that of the first is made from it by `first_stage`.
        seen: what `fingerprint` gave, if it is there already.
        measure: memory and time of one training step of a plan, e.g. `kanseg.training.trial.measure_step`.
        seconds: that a training will last; where steps were measured, `LEAST_STEPS` of them fit into it.
    """
    dims, mirrored = check_wishes(dataset, dim=dim, size=size, slices=slices, mirror=mirror, cascade=cascade)
    seen = seen or fingerprint(dataset)
    spacings = np.array([case["spacing"] for case in seen["cases"].values()])
    sizes = np.array([case["size"] for case in seen["cases"].values()])
    summary = {"size": _range(sizes), "spacing": _range(spacings), "channels": seen["channels"]}
    summary["voxels"] = _median_voxels(dataset, seen)
    normalization = [
        _normalization(name, seen["channels"][i]) for i, name in enumerate(dataset.channel_names)
    ]
    axis = None
    if dims < dataset.spatial_dims:
        axis = _slice_axis(spacings)
        sizes, spacings = np.delete(sizes, axis, axis=1), np.delete(spacings, axis, axis=1)
    spacing = _target_spacing(spacings)
    resampled = np.median(sizes * spacings / spacing, axis=0)
    plan = Plan(
        dataset_name=dataset.name,
        data=str(dataset.source),
        id_pattern=dataset.id_pattern,
        layout=dataset.layout,
        spatial_dims=dims,
        channel_names=list(dataset.channel_names),
        label_names=list(dataset.label_names),
        label_values=list(dataset.label_values),
        regions=[list(region) for region in dataset.regions],
        given_regions=regions,
        ignore_value=dataset.ignore_value,
        label_dtype=seen["label_dtype"],
        spacing=[float(s) for s in spacing],
        patch_size=[1] * dims,
        batch_size=1,
        normalization=normalization,
        features_per_stage=[1],
        strides=[[1] * dims],
        kernel_sizes=[[1] * dims],
        mirror_axes=axes_of_network(mirrored, axis),
        slice_axis=axis,
        slices=slices,
        previous_stage=FIRST_STAGE if cascade else None,
        orientation="RAS" if dataset.spatial_dims == 3 else "",
        model_options={**MODEL_OPTIONS, "encoder": SIZES[size].encoder},
        size=size,
        memory_bytes=memory_at_hand() if memory is None else memory,
        fingerprint=summary,
    )
    plan, why = _within_memory(plan, resampled, _cache_bytes(seen, plan), measure, seconds)
    why_spacing = _why_spacing(plan, len(sizes))
    coarse = _enough_seen(plan, resampled)
    if coarse is not None:
        wish = "a longer training or more memory allow" if seconds else "more memory allows"
        why_spacing += (
            f"; coarsened to {_numbers(coarse)} mm so that a patch of what can be had here sees a "
            f"{1 / LEAST_SHARE:.0f}th of an image; {wish} finer voxels"
        )
        plan = replace(plan, spacing=[float(s) for s in coarse])
        resampled = np.median(sizes * spacings / coarse, axis=0)
        plan, why = _within_memory(plan, resampled, _cache_bytes(seen, plan), measure, seconds)
    plan.reasons = [
        why_spacing,
        *why,
        *_further_reasons(plan, seen),
        why_mirror(dataset.spatial_dims, dataset.label_names, mirrored),
    ]
    plan.reasons += [*_about_cascade(plan, resampled), *dataset.notes]
    return plan


def first_stage(
    plan: Plan,
    seen: dict[str, Any],
    *,
    measure: Callable[[Plan], Need] | None = None,
    seconds: float | None = None,
) -> Plan:
    """The plan of the first stage of a cascade: voxels so coarse that a patch sees about a quarter of a median image.

    Where a patch sees much of an image at its own spacing there is none, as in nnU-Net.

    Args:
        plan: of the second stage.
        seen, measure, seconds: see `make_plan`.

    Raises:
        UsageError: the second stage sees so much of an image that the first would have hardly fewer voxels.
    """
    extent = np.median(
        [np.multiply(case["size"], case["spacing"]) for case in seen["cases"].values()], axis=0
    )
    image = extent / plan.spacing
    if _saved(plan, image) < LEAST_SAVED:
        raise UsageError(
            f"A cascade has nothing to add here: a patch of {_numbers(plan.patch_size)} sees {_seen(plan, image):.0%} "
            f"of a median image of {_numbers(image.round())}, and it begins below {GLANCE / LEAST_SAVED:.1%}. Plan "
            "without."
        )
    voxels, most = math.prod(plan.patch_size), int(GLANCE * np.prod(image) / LEAST_SAVED)
    for _ in range(2):  # small prepared cases leave more memory to a patch, which may allow finer voxels
        coarse = _coarser(plan, image, GLANCE, voxels)
        first = replace(plan, previous_stage=None, spacing=[float(s) for s in coarse], reasons=[])
        first, why = _within_memory(first, extent / coarse, _cache_bytes(seen, first), measure, seconds)
        if _seen(first, extent / coarse) < ENOUGH * GLANCE:
            break
        voxels = min(math.prod(first.patch_size), most)
    view = f"first stage of a cascade, spacing {_numbers(coarse)} mm: a patch sees {_seen(first, extent / coarse):.0%}"
    return replace(first, reasons=[f"{view} of a median image", *why])


def _seen(plan: Plan, image: np.ndarray) -> float:
    """Share of an image of so many voxels that lies in a patch."""
    return min(1.0, math.prod(plan.patch_size) / float(np.prod(image)))


def _saved(plan: Plan, image: np.ndarray) -> float:
    """How many times fewer voxels a first stage would have."""
    return GLANCE / _seen(plan, image)


def _about_cascade(plan: Plan, image: np.ndarray) -> list[str]:
    """That a plan has a stage before it, or might have one as nnU-Net's plans would."""
    if plan.previous_stage:
        return [
            f"second stage of a cascade: the label map of {plan.previous_stage}, a channel of 0 and 1 for each class, "
            "is taken beside the image"
        ]
    if plan.spatial_dims < 3 or _saved(plan, image) < LEAST_SAVED:
        return []
    return [
        f"a patch sees {_seen(plan, image):.1%} of a median image: where the rest of it tells classes apart, a cascade "
        "of two resolutions may help (kanseg plan --cascade, kanseg run --configurations 3d,2d,cascade)"
    ]


def check_size(size: str) -> None:
    """Raise `UsageError` with the nearest name unless a size is one of `SIZES`."""
    if size not in SIZES:
        raise UsageError(f"Unknown size '{size}'.{did_you_mean(size, SIZES)}")


def check_memory(memory: int | None) -> None:
    """Raise `UsageError` for less main memory (bytes) than this program takes before it has seen an image."""
    if memory is None or on_gpu():  # there it is the GPU's
        return
    program = taken()
    least = (program + LOADERS * LOADER_BYTES) / MEASURED_SHARE
    if memory < least:
        raise UsageError(
            f"--memory {memory / 2**20:.0f}M is too little: the program alone takes {program / 2**20:.0f} MiB before "
            f"the first image. No less than {least / 2**20:.0f}M can do; a small network with its images takes about "
            f"half as much again, {1.5 * least / 2**20:.0f}M."
        )


def check_wishes(
    dataset: Dataset,
    *,
    dim: int | None = None,
    size: str = "standard",
    slices: int = 1,
    mirror: Sequence[int] | None = None,
    cascade: bool = False,
    **_others: Any,
) -> tuple[int, list[int]]:
    """Dimension of the network and axes of the image to mirror along; see `make_plan`. No image is read.

    Raises:
        UserError: what is asked for does not fit the data set, or folds that come with it share a patient.
    """
    dims = dim or dataset.spatial_dims
    if dims > dataset.spatial_dims:
        raise UserError(
            f"{dataset.name} is {dataset.spatial_dims}D and dim={dim} was asked for. Leave --dim away (auto), or give "
            f"{dim}D images."
        )
    check_size(size)
    if slices < 1 or slices % 2 == 0 or (slices > 1 and dims == dataset.spatial_dims):
        raise UsageError(
            f"slices={slices} does not fit: an odd number is expected, and more than 1 only for volumes learnt slice "
            "by slice (--dim 2)."
        )
    if cascade and dims < 3:
        raise UsageError("A cascade is for volumes that are learnt in 3D. Plan without --cascade.")
    check_leaks(dataset.splits, dataset)
    return dims, mirror_axes(dataset.spatial_dims, dataset.label_names, mirror)


@dataclass(frozen=True)
class Need:
    """What training needs, in bytes: base + per_voxel * voxels of the batch, and at any patch at least `least`.

    A step takes `overhead` seconds and `seconds` for each voxel of its batch; 0 where that is not known.
    """

    base: float
    per_voxel: float
    least: float = 0.0
    seconds: float = 0.0
    overhead: float = 0.0

    def voxels_within(self, seconds: float) -> float:
        """Of a step of so many seconds; where the overhead takes most of them, as many as take as long as that."""
        return max(seconds - self.overhead, self.overhead) / self.seconds


def _within_memory(
    plan: Plan,
    image: np.ndarray,
    cache: int,
    measure: Callable[[Plan], Need] | None,
    seconds: float | None = None,
) -> tuple[Plan, list[str]]:
    """The plan with the largest patch, batch and width that the memory (and the time) allows, and why.

    Args:
        image: median size of an image at the plan's spacing.
        cache: bytes that prepared cases will take; they and their loaders are in main memory, also beside a GPU.
        seconds: see `make_plan`.
    """
    need = Need(0, 0)
    loaders = 0 if on_gpu() else LOADERS
    cache = 0 if on_gpu() else cache
    features = SIZES[plan.size].features
    per_voxel = float(BYTES_A_VOXEL * features)
    sized = most = _sized(plan, image, features, plan.memory_bytes * SHARE / per_voxel)
    budget = f"{plan.memory_bytes / 2**30:.1f} GiB"
    said = f"{budget}, at {per_voxel / 1e3:.0f} kB a voxel as a rule"
    narrowed = "a patch sees enough of the image"
    for _ in range(TRIALS if measure else 0):
        assert measure is not None
        need, features = measure(sized), sized.features_per_stage[0]
        fixed = need.base + cache + loaders * LOADER_BYTES
        rest = plan.memory_bytes * MEASURED_SHARE - fixed
        least = fixed + max(0.0, need.least - need.base)
        missing = least - plan.memory_bytes * MEASURED_SHARE
        if missing > 0 and features <= LEAST_FEATURES:
            parts = "the program, the prepared cases" if loaders else "the program"
            given, taken, enough = (b / 2**20 for b in (plan.memory_bytes, least, least / MEASURED_SHARE))
            raise UserError(
                f"{given:.0f} MiB are too few: {parts} and the narrowest network take {taken:.0f} MiB, and a tenth is "
                f"kept free. Give at least {enough:.0f} MiB with --memory."
            )
        said = (
            f"{budget}: trial steps took {need.per_voxel / 1e3:.1f} kB a voxel beside {need.base / 2**30:.2f} GiB"
            + (f", prepared cases take {cache / 2**30:.2f} GiB" if loaders else "")
        )
        last = sized
        if missing > 0:  # the network itself is too large, whatever the patch
            narrowed = "it fits into the memory by itself, its averages and its checkpoints"
            sized = most = _sized(plan, image, features // 2, sized.batch_size * math.prod(sized.patch_size))
            continue
        voxels = rest / (need.per_voxel + loaders * _loader_bytes_a_voxel(plan))
        most = _sized(plan, image, features, voxels)
        if seconds and need.seconds:
            voxels = min(voxels, need.voxels_within(seconds / LEAST_STEPS))
        sized = _sized(plan, image, features, voxels)
        sized.training_bytes = int(need.base + cache + need.per_voxel * _voxels(sized))
        if sized.features_per_stage == last.features_per_stage and sized.strides == last.strides:
            break
    patch, size = _numbers(sized.patch_size), _numbers(image.round())
    why = f"patch {patch} of a median image {size} at that spacing, batch {sized.batch_size}, "
    reasons = [
        why
        + f"{', '.join(map(str, sized.features_per_stage))} features: {_limit(sized, most, image, seconds)} {said}"
    ]
    if need.seconds:
        step = need.overhead + need.seconds * _voxels(sized)
        within = f"; {seconds / step:.0f} fit into the time" if seconds else ""
        reasons.append(f"a step takes about {in_words(step)} here, a hundred {in_words(100 * step)}{within}")
    if sized.features_per_stage[0] < SIZES[plan.size].features:
        reasons.append(f"narrower than size '{plan.size}', so that {narrowed}")
    return sized, reasons


def _limit(plan: Plan, most: Plan, image: np.ndarray, seconds: float | None) -> str:
    """What keeps a plan from a larger patch, in words that go on with a memory; `most` is what fits into that."""
    found, allowed, whole = (
        (one.patch_size, one.batch_size, one.features_per_stage)
        for one in (plan, most, _sized(plan, image, plan.features_per_stage[0], BOUNDLESS))
    )
    if found != allowed:
        return f"small enough for many steps in {in_words(seconds or 0)} of training; more would fit into"
    return "the whole image in the largest batch, which fits into" if found == whole else "what fits into"


def loader_bytes(plan: Plan, batch_size: int | None = None) -> int:
    """What one process that prepares patches takes of its own."""
    return LOADER_BYTES + _voxels(
        replace(plan, batch_size=batch_size or plan.batch_size)
    ) * _loader_bytes_a_voxel(plan)


def _loader_bytes_a_voxel(plan: Plan) -> int:
    channels = len(plan.channel_names) * plan.slices + bool(plan.previous_stage)
    return LOADER_BYTES_A_VOXEL + LOADER_BYTES_A_CHANNEL * channels


def _voxels(plan: Plan) -> int:
    """Of a batch."""
    return plan.batch_size * math.prod(plan.patch_size)


def _sized(plan: Plan, image: np.ndarray, features: int, voxels: float) -> Plan:
    """Patch, batch, strides and width for so many voxels a step of a network with `features` in its first stage."""
    dims, spacing = plan.spatial_dims, np.array(plan.spacing)
    least = min(LEAST_VOXELS[dims], float(np.prod(image)) / 2)
    while True:
        patch, strides, kernels = _patch(image, spacing, voxels / 2)
        if math.prod(patch) < least:  # rather one large patch than two small ones
            patch, strides, kernels = _patch(image, spacing, voxels)
        if math.prod(patch) >= least or features <= LEAST_FEATURES:
            break
        features, voxels = features // 2, voxels * 2  # memory goes by their product
    most = SIZES[plan.size].most_features[dims] * features // SIZES[plan.size].features
    return replace(
        plan,
        patch_size=patch,
        batch_size=int(np.clip(voxels // math.prod(patch), 1, LARGEST_BATCH[dims])),
        strides=strides,
        kernel_sizes=kernels,
        features_per_stage=[min(features * 2**stage, most) for stage in range(len(strides))],
    )


def _cache_bytes(seen: dict[str, Any], plan: Plan) -> int:
    """What prepared cases take in memory, at most the share that the loader keeps there."""
    maps = len(plan.channel_names) + bool(plan.previous_stage)
    bytes_a_voxel = 4 * maps + BYTES_A_CASE_VOXEL
    total = sum(_resampled_voxels(case, plan) for case in seen["cases"].values()) * bytes_a_voxel
    return int(min(total, CACHE_SHARE * plan.memory_bytes))


def _whole_image_bytes(seen: dict[str, Any], plan: Plan) -> float:
    """Logits of the largest image."""
    return 4 * len(plan.label_names) * max(_resampled_voxels(case, plan) for case in seen["cases"].values())


def _resampled_voxels(case: dict[str, Any], plan: Plan) -> float:
    """Voxels of a case at the plan's spacing."""
    target = list(plan.spacing)
    if plan.slice_axis is not None:
        target.insert(plan.slice_axis, case["spacing"][plan.slice_axis])
    return float(np.prod(np.array(case["size"]) * np.array(case["spacing"]) / np.array(target)))


def _slice_axis(spacings: np.ndarray) -> int:
    """Across the thickest slices; of equal axes the last, which gives axial slices."""
    spacing = np.median(spacings, axis=0)
    return int(np.flatnonzero(spacing >= 0.999 * spacing.max())[-1])


def _median_voxels(dataset: Dataset, seen: dict[str, Any]) -> dict[str, int]:
    """Median number of voxels of each class."""
    regions = dataset.regions or [(value,) for value in dataset.label_values]
    return {
        name: int(np.median([sum(case["voxels"][str(v)] for v in region) for case in seen["cases"].values()]))
        for name, region in zip(dataset.label_names, regions, strict=True)
    }


def _why_spacing(plan: Plan, cases: int) -> str:
    if plan.image_dims == 2:
        return f"pixels as they are: {cases} pictures without a physical spacing"
    spacing = np.array(plan.spacing)
    why = f"spacing {_numbers(spacing)} mm: the median of {cases} cases"
    if spacing.max() > THICK * np.sort(spacing)[-2]:
        why += "; slices are thick: their distance goes by its 10th percentile, and they are halved in plane first"
    return why


def _further_reasons(plan: Plan, seen: dict[str, Any]) -> list[str]:
    """Of what goes neither by spacing nor by memory, and what else there is to know."""
    channels = zip(plan.channel_names, plan.normalization, strict=True)
    schemes = ", ".join(f"{name} by {how['scheme']}" for name, how in channels)
    strides = ", ".join(map(_numbers, plan.strides))
    reasons = [
        f"strides {strides}: an axis is halved while it is within twice the finest spacing and long enough",
        f"normalization: {schemes}",
    ]
    if plan.slice_axis is not None:
        many = f", each with its neighbours, {plan.slices} in all" if plan.slices > 1 else ""
        reasons.append(f"volumes are learnt slice by slice across axis {'RAS'[plan.slice_axis]}{many}")
    room = for_data(plan.memory_bytes)
    if room and (whole := _whole_image_bytes(seen, plan)) > FITS * room:
        reasons.append(
            f"the largest image has {whole / 2**30:.1f} GiB of logits ({len(plan.label_names)} classes): where they do "
            "not fit into the memory, predictions keep them on the disk"
        )
    if seen["same"]:
        shown = ", ".join(f"{one} = {other}" for one, other in seen["same"][:3])
        reasons.append(f"{len(seen['same'])} pairs of images are the same and stay together: {shown}")
    return reasons


def _target_spacing(spacings: np.ndarray) -> np.ndarray:
    """Median an axis; the coarse axis of thick slices goes by its 10th percentile, so slices are not thrown away."""
    spacing = np.median(spacings, axis=0)
    worst = int(spacing.argmax())
    others = np.delete(spacing, worst)
    if spacing[worst] > THICK * others.max():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), others.max())
    return np.round(spacing, 4)


def _enough_seen(plan: Plan, image: np.ndarray) -> np.ndarray | None:
    """The spacing at which a small patch sees `LEAST_SHARE` of a volume; None if it does now.

    A tiny patch counts as one of an eighth of `LEAST_VOXELS`: voxels must not get larger than what is to be seen.

    Args:
        image: median size of an image at the plan's spacing.
    """
    seen = max(math.prod(plan.patch_size), LEAST_VOXELS[plan.spatial_dims] // 8)
    enough = seen >= min(LEAST_VOXELS[plan.spatial_dims], float(np.prod(image)) * LEAST_SHARE)
    return None if plan.image_dims == 2 or enough else _coarser(plan, image, LEAST_SHARE, seen)


def _coarser(plan: Plan, image: np.ndarray, share: float, seen: int) -> np.ndarray:
    """The spacing at which so many voxels are that share of an image, the finest axes first.

    Args:
        image: median size of an image at the plan's spacing.
    """
    excess = float(np.prod(image)) * share / seen
    fine = np.array(plan.spacing)
    low, high = fine.min(), fine.max() * excess
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.prod(np.maximum(fine, middle) / fine) < excess else (low, middle)
    return np.round(np.maximum(fine, high), 4)


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
    kind = channel.strip().lower()
    if kind == "ct":
        keys = ("lower", "upper", "mean", "std")
        return {"scheme": "ct", **{key: intensity[key] for key in keys}}
    if kind in NAMED_SCHEMES:
        return dict(NAMED_SCHEMES[kind])
    return {"scheme": "zscore_nonzero" if intensity["zeros"] >= EMPTY else "zscore"}


def _range(values: np.ndarray) -> dict[str, list[float]]:
    rows = {"min": values.min(axis=0), "median": np.median(values, axis=0), "max": values.max(axis=0)}
    return {name: [round(float(v), 4) for v in row] for name, row in rows.items()}


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
