"""How far two networks agree, by label maps of the same images, and what each of them costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kanseg.data.cases import Case
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case, restored_labels
from kanseg.evaluation.metrics import label_dice
from kanseg.inference.logits import whole_logits

TURNS = 3


def agreement(one: nn.Module, other: nn.Module, cases: Sequence[Case], plan: Plan) -> dict[str, Any]:
    """Label maps of images by both networks, on the images' own grids, before any post-processing.

    Returns:
        {"cases": ids, "voxels", "equal_labels": share of all voxels, "dice": mean over the cases by class (regions as
        wholes), 1 where neither map has it, "lowest_dice": of any class and case}.
    """
    equal = voxels = 0
    scores, values = [], np.asarray(plan.label_values, np.int32)
    for case in cases:
        item, _ = load_case(case, plan, with_label=False)
        batch = item["image"].as_tensor()[None]
        ours, theirs = (
            values[restored_labels(whole_logits(network, batch, plan), item, plan)]
            for network in (one, other)
        )
        equal, voxels = equal + int((ours == theirs).sum()), voxels + ours.size
        scores.append(label_dice(ours, theirs, plan))
    return {
        "cases": [case.id for case in cases],
        "voxels": voxels,
        "equal_labels": equal / voxels,
        "dice": dict(zip(plan.label_names[1:], np.mean(scores, 0).tolist(), strict=True)),
        "lowest_dice": float(np.min(scores)),
    }


@torch.inference_mode()
def seconds_a_window(networks: Mapping[str, nn.Module], window: Tensor) -> dict[str, float]:
    """The median time of a pass through each network, in turns, so that whatever else the machine does meets all."""
    spent: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + TURNS):
        for name, network in networks.items():
            begun = time.perf_counter()
            network(window)
            spent[name].append(time.perf_counter() - begun)
    return {name: round(median(some[1:]), 4) for name, some in spent.items()}
