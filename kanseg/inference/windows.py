"""Windows of images as a network gets them in prediction, for what looks into it: pruning, and scales of int8."""

from __future__ import annotations

from collections.abc import Sequence

from monai.transforms import RandSpatialCrop, SpatialPad
from torch import Tensor

from kanseg.data.cases import Case
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case
from kanseg.inference.logits import as_batch

WINDOWS = 16


def windows_of(cases: Sequence[Case], plan: Plan, count: int = WINDOWS) -> list[Tensor]:
    """Windows (1, C, *patch) at random places of preprocessed images, the same ones at every call.

    Every image gives as many, of more images than windows some at even distances. What is smaller than a window is
    padded with 0, as in prediction.
    """
    chosen = cases[:: -(-len(cases) // count)]
    pad = SpatialPad(plan.patch_size)
    crop = RandSpatialCrop(plan.patch_size, random_size=False)
    crop.set_random_state(0)
    found = []
    for number, case in enumerate(chosen):
        image = load_case(case, plan, with_label=False)[0]["image"].as_tensor()
        batch = as_batch(image[None], plan)
        for _ in range(number, count, len(chosen)):
            place = crop.R.randint(len(batch))
            found.append(crop(pad(batch[place])).as_subclass(Tensor)[None])
    return found
