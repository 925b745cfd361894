"""The plan of the first stage of a cascade, which sees much of an image at once in coarse voxels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kanseg.data.plan import Plan
from kanseg.data.sizing import Need, cache_bytes, coarser, numbers, within_memory
from kanseg.errors import UsageError

FIRST_STAGE = "lowres"  # of a cascade: its folder in that of the second stage
GLANCE = 1 / 4  # of a median image that a patch of the first stage sees
ENOUGH = 1.2  # times that share; more is paid for by voxels coarser than need be
LEAST_SAVED = 2  # times fewer voxels that it has; else it sees hardly more than the second


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
            f"A cascade has nothing to add here: a patch of {numbers(plan.patch_size)} sees {_seen(plan, image):.0%} "
            f"of a median image of {numbers(image.round())}, and it begins below {GLANCE / LEAST_SAVED:.1%}. Plan "
            "without."
        )
    voxels, most = math.prod(plan.patch_size), int(GLANCE * np.prod(image) / LEAST_SAVED)
    for _ in range(2):  # small prepared cases leave more memory to a patch, which may allow finer voxels
        coarse = coarser(plan, image, GLANCE, voxels)
        first = replace(plan, previous_stage=None, spacing=[float(s) for s in coarse], reasons=[])
        first, why = within_memory(first, extent / coarse, cache_bytes(seen, first), measure, seconds)
        if _seen(first, extent / coarse) < ENOUGH * GLANCE:
            break
        voxels = min(math.prod(first.patch_size), most)
    view = f"first stage of a cascade, spacing {numbers(coarse)} mm: a patch sees {_seen(first, extent / coarse):.0%}"
    return replace(first, reasons=[f"{view} of a median image", *why])


def about_cascade(plan: Plan, image: np.ndarray) -> list[str]:
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


def _seen(plan: Plan, image: np.ndarray) -> float:
    """Share of an image of so many voxels that lies in a patch."""
    return min(1.0, math.prod(plan.patch_size) / float(np.prod(image)))


def _saved(plan: Plan, image: np.ndarray) -> float:
    """How many times fewer voxels a first stage would have."""
    return GLANCE / _seen(plan, image)
