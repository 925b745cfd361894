"""How far two networks agree: label maps of the same images by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from kanseg.data.cases import Case
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case, restored_labels
from kanseg.evaluation.metrics import dice_of_values
from kanseg.inference.logits import predict_logits


def agreement(one: nn.Module, other: nn.Module, cases: Sequence[Case], plan: Plan) -> dict[str, Any]:
    """Label maps of images by both networks, on the images' own grids, before any post-processing.

    Returns:
        {"cases": ids, "voxels", "equal_labels": share of all voxels, "dice": mean over the cases by class, 1 where
        neither map has it, "lowest_dice": of any class and case}.
    """
    equal = voxels = 0
    scores = []
    for case in cases:
        item, _ = load_case(case, plan, with_label=False)
        batch = item["image"].as_tensor()[None]
        maps = [restored_labels(predict_logits(network, batch, plan)[0], item, plan) for network in (one, other)]
        equal, voxels = equal + int((maps[0] == maps[1]).sum()), voxels + maps[0].size
        scores.append(dice_of_values(*maps, range(1, len(plan.label_names))))
    return {
        "cases": [case.id for case in cases],
        "voxels": voxels,
        "equal_labels": equal / voxels,
        "dice": dict(zip(plan.label_names[1:], np.mean(scores, 0).tolist(), strict=True)),
        "lowest_dice": float(np.min(scores)),
    }
