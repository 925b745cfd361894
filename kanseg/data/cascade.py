"""What the second network of a cascade sees of the label map of the first: a channel of 0 and 1 for each class.

Label maps travel as class numbers, one channel beside the image, and become channels at the door of the network, so
that many classes take no more memory than few. In training they are damaged at random, or the second network would
learn to copy what it should correct (nnU-Net's cascade does the like; Isensee et al., Nature Methods 18, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from scipy import ndimage
from torch import Tensor

from kanseg.data.labels import class_values, known_values
from kanseg.data.plan import Plan

PREVIOUS = "previous"  # in a prepared case: the label map of the stage before, (1, *S) class numbers
FARTHEST = 3  # voxels that a border is moved
SMALL = 0.15  # of a patch: larger pieces are not taken away
MORPHOLOGY: tuple[Callable[..., np.ndarray], ...] = (
    ndimage.binary_dilation,
    ndimage.binary_erosion,
    ndimage.binary_opening,
    ndimage.binary_closing,
)


def with_previous(sample: Mapping[str, Any]) -> Tensor:
    """The image of a sample or batch with the label map of the stage before, if any, as last channel (C + 1, *S)."""
    image, *numbers = (sample[key].as_subclass(Tensor) for key in ("image", PREVIOUS) if key in sample)
    return torch.cat([image, numbers[0].to(image)], dim=-4) if numbers else image  # all are volumes


def network_input(image: Tensor, plan: Plan) -> Tensor:
    """What the network takes of windows (N, C, *S): (N, in_channels, *S).

    Of a cascade the last channel, the class numbers of the stage before, becomes one of 0 and 1 for each class but the
    background; regions, which overlap, are those that the number belongs to.
    """
    if plan.previous_stage is None:
        return image
    known = known_values(plan)
    rows = [[float(value in values) for value in known] for values in class_values(plan).values()]
    table = torch.tensor(rows, dtype=image.dtype, device=image.device)
    return torch.cat([image[:, :-1], table[:, image[:, -1].long()].movedim(0, 1)], dim=1)


class DamagedLabels(RandomizableTransform):
    """Moves borders of classes in the label map of the stage before, and takes small pieces away, at random.

    Args:
        classes: how many numbers the map may have, the background's 0 among them.
        border: probability that the classes of a patch are dilated, eroded, opened or closed, each by itself.
        missing: probability that a connected piece of a class, no larger than `SMALL`, is taken away.
    """

    def __init__(self, classes: int, border: float, missing: float) -> None:
        super().__init__()
        self.classes, self.border, self.missing = classes, border, missing

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        before = item[PREVIOUS]
        numbers = np.array(before[0])
        changes = [
            change
            for chance, change in ((self.border, self._moved), (self.missing, self._without_piece))
            if self.R.random_sample() < chance
        ]
        for change in changes:
            for number in range(1, self.classes):
                inside = numbers == number
                if inside.any():
                    after = change(inside)
                    numbers[inside & ~after] = 0
                    numbers[after & ~inside] = number
        damaged = torch.as_tensor(before).clone()
        damaged[0] = torch.from_numpy(numbers)
        return {**item, PREVIOUS: damaged} if changes else item

    def _moved(self, mask: np.ndarray) -> np.ndarray:
        change = MORPHOLOGY[self.R.randint(len(MORPHOLOGY))]
        grown = np.pad(mask, FARTHEST, mode="edge")  # or the ends of a patch would count as borders
        inside = (slice(FARTHEST, -FARTHEST),) * mask.ndim
        return change(grown, iterations=int(self.R.randint(1, FARTHEST + 1)))[inside]

    def _without_piece(self, mask: np.ndarray) -> np.ndarray:
        pieces, _ = ndimage.label(mask)
        sizes = np.bincount(pieces.ravel())
        small = np.flatnonzero(sizes <= SMALL * mask.size)
        small = small[small > 0]
        return mask if not small.size else mask & (pieces != self.R.choice(small))
