"""How large a step may be: patch, batch, strides and width of a network for the memory and the time that there are.

What a step needs is measured by one where a plan is made with a way to (`measure`); else it goes by a figure from
earlier measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kanseg.data.plan import SIZES, Plan
from kanseg.errors import UsageError, UserError
from kanseg.memory import on_gpu, taken
from kanseg.progress import in_words

MOST_STAGES = 6
COARSEST = {2: 8, 3: 4}  # voxels an axis of the coarsest map keeps
# Bytes of training memory a voxel of the batch and feature of the first stage: UKANet's peak resident memory.
BYTES_A_VOXEL = 330
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
TRIALS = 4
BOUNDLESS = 1e15  # voxels
LEAST_STEPS = 250  # that a training of a given time should have; a smaller patch is better than fewer


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


def within_memory(
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
    patch, size = numbers(sized.patch_size), numbers(image.round())
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


def cache_bytes(seen: dict[str, Any], plan: Plan) -> int:
    """What prepared cases take in memory, at most the share that the loader keeps there."""
    maps = len(plan.channel_names) + bool(plan.previous_stage)
    bytes_a_voxel = 4 * maps + BYTES_A_CASE_VOXEL
    total = sum(resampled_voxels(case, plan) for case in seen["cases"].values()) * bytes_a_voxel
    return int(min(total, CACHE_SHARE * plan.memory_bytes))


def whole_image_bytes(seen: dict[str, Any], plan: Plan) -> float:
    """Logits of the largest image."""
    return 4 * len(plan.label_names) * max(resampled_voxels(case, plan) for case in seen["cases"].values())


def resampled_voxels(case: dict[str, Any], plan: Plan) -> float:
    """Voxels of a case at the plan's spacing."""
    target = list(plan.spacing)
    if plan.slice_axis is not None:
        target.insert(plan.slice_axis, case["spacing"][plan.slice_axis])
    return float(np.prod(np.array(case["size"]) * np.array(case["spacing"]) / np.array(target)))


def numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def coarser(plan: Plan, image: np.ndarray, share: float, seen: int) -> np.ndarray:
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
