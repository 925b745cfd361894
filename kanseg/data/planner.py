"""From a look at the data to a plan: spacing, patches, normalisation and the size of the network, and why.

The rules follow nnU-Net's (Isensee et al., Nature Methods 18, 2021) in spirit and in words: median spacing, patches
as large as memory allows, an axis is halved only while it is about as fine as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.cases import Dataset
from kanseg.data.fingerprint import fingerprint, save_fingerprint
from kanseg.data.first_stage import FIRST_STAGE, about_cascade, first_stage
from kanseg.data.mirror import axes_of_network, mirror_axes, why_mirror
from kanseg.data.plan import SIZES, Plan, check_size
from kanseg.data.sizing import (
    LEAST_VOXELS,
    Need,
    cache_bytes,
    coarser,
    numbers,
    whole_image_bytes,
    within_memory,
)
from kanseg.data.splits import check_leaks
from kanseg.errors import UsageError, UserError
from kanseg.files import make_folder
from kanseg.memory import FITS, for_data, memory_at_hand

EMPTY = 0.25  # share of zeros from which on an image counts as cut out
LEAST_SHARE = 1 / 64  # of a volume that such a patch should see; coarser voxels are better than less
THICK = 3  # times the other spacings: slices from there on count as thick
MODEL_OPTIONS = {
    "encoder": "reskanet10",
    "basis": "gram",
    "kan_stages": "coarse",
    "bottleneck": True,
    "deep_supervision": True,
}
NAMED_SCHEMES: dict[str, dict[str, Any]] = {  # by names of channels, as nnU-Net has them
    "nonorm": {"scheme": "fixed", "mean": 0.0, "std": 1.0},
    "rgb_to_0_1": {"scheme": "fixed", "mean": 0.0, "std": 255.0},
    "rescale_to_0_1": {"scheme": "minmax"},
    "zscore": {"scheme": "zscore"},
}


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
    plans = {}
    if cascade:
        assert plan.previous_stage is not None
        asked = {key: how[key] for key in ("measure", "seconds") if key in how}
        plans[run / plan.previous_stage] = first_stage(plan, seen, **asked)
    plans[run] = plan  # the last: where it stands, all is planned
    for folder, one in plans.items():
        save_fingerprint(seen, make_folder(folder))
        one.save(folder / "plan.json")
    return plan


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
    plan, why = within_memory(plan, resampled, cache_bytes(seen, plan), measure, seconds)
    why_spacing = _why_spacing(plan, len(sizes))
    coarse = _enough_seen(plan, resampled)
    if coarse is not None:
        wish = "a longer training or more memory allow" if seconds else "more memory allows"
        why_spacing += (
            f"; coarsened to {numbers(coarse)} mm so that a patch of what can be had here sees a "
            f"{1 / LEAST_SHARE:.0f}th of an image; {wish} finer voxels"
        )
        plan = replace(plan, spacing=[float(s) for s in coarse])
        resampled = np.median(sizes * spacings / coarse, axis=0)
        plan, why = within_memory(plan, resampled, cache_bytes(seen, plan), measure, seconds)
    plan.reasons = [
        why_spacing,
        *why,
        *_further_reasons(plan, seen),
        why_mirror(dataset.spatial_dims, dataset.label_names, mirrored),
    ]
    plan.reasons += [*about_cascade(plan, resampled), *dataset.notes]
    return plan


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
    why = f"spacing {numbers(spacing)} mm: the median of {cases} cases"
    if spacing.max() > THICK * np.sort(spacing)[-2]:
        why += "; slices are thick: their distance goes by its 10th percentile, and they are halved in plane first"
    return why


def _further_reasons(plan: Plan, seen: dict[str, Any]) -> list[str]:
    """Of what goes neither by spacing nor by memory, and what else there is to know."""
    channels = zip(plan.channel_names, plan.normalization, strict=True)
    schemes = ", ".join(f"{name} by {how['scheme']}" for name, how in channels)
    strides = ", ".join(map(numbers, plan.strides))
    reasons = [
        f"strides {strides}: an axis is halved while it is within twice the finest spacing and long enough",
        f"normalization: {schemes}",
    ]
    if plan.slice_axis is not None:
        many = f", each with its neighbours, {plan.slices} in all" if plan.slices > 1 else ""
        reasons.append(f"volumes are learnt slice by slice across axis {'RAS'[plan.slice_axis]}{many}")
    room = for_data(plan.memory_bytes)
    if room and (whole := whole_image_bytes(seen, plan)) > FITS * room:
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
    return None if plan.image_dims == 2 or enough else coarser(plan, image, LEAST_SHARE, seen)


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
