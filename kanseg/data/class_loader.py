"""From stored images to batches of a classifier: one preparation for training and prediction, and random changes.

Sample `i` of epoch `e` depends on (seed, e, i) alone. Every image is seen once before any is seen again, whatever the
number of steps an epoch has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from kanseg.data.cases import Case
from kanseg.data.class_plan import ClassPlan, as_channels
from kanseg.errors import UsageError, UserError
from kanseg.registry import Registry

Reader = Callable[[Case], np.ndarray]
Change = Callable[[Tensor], Tensor]  # of an image as it is stored, (C, *S)
CHANGES = Registry("change of images")
NO_CLASS = -1  # images that have none are drawn as if that was one
SHIFT = 8  # a share of 1 / SHIFT of an axis
INTERPOLATION = {2: "bilinear", 3: "trilinear"}
# Axes of an image, (C, *S), that a change turns round, by the dimension: what `kanseg predict --tta` looks at, too.
MIRRORING: dict[str, Callable[[int], Sequence[int]]] = {
    "flip": lambda dims: [dims],
    "flips": lambda dims: range(1, dims + 1),
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch on the CPU from a seed, within; outside they go on as they were."""
    generator = torch.default_generator  # torch.manual_seed also walks over all devices, 0.5 ms each time
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def prepare(image: Tensor, plan: ClassPlan) -> Tensor:
    """An image as it is stored, (C, *S) -> (C, *patch_size): scaled to cover it, cut about the middle, normalised."""
    image = covering(image.float(), plan.patch_size)
    for axis, size in enumerate(plan.patch_size, start=1):
        image = image.narrow(axis, (image.shape[axis] - size) // 2, size)
    numbers = torch.tensor([[one["mean"], one["std"]] for one in plan.normalization])
    mean, std = numbers.T.reshape(2, -1, *[1] * plan.spatial_dims)
    return (image - mean) / std


def covering(image: Tensor, size: Sequence[int]) -> Tensor:
    """The image scaled, all axes alike, so that it just covers `size`."""
    factor = max(wanted / had for wanted, had in zip(size, image.shape[1:], strict=True))
    scaled = [max(wanted, round(had * factor)) for wanted, had in zip(size, image.shape[1:], strict=True)]
    if scaled == list(image.shape[1:]):
        return image
    mode = INTERPOLATION[len(size)]
    return F.interpolate(image[None], size=scaled, mode=mode, align_corners=False, antialias=len(size) == 2)[
        0
    ]


def stored(image: np.ndarray, plan: ClassPlan) -> Tensor:
    """An image (C, *S) with the plan's channels; one of 8 bits is so again, as changes of colours need it."""
    image = as_channels(image, plan.in_channels)
    if (
        image.dtype != np.uint8
        and image.min() >= 0
        and image.max() <= 255
        and (image == np.rint(image)).all()
    ):
        image = image.astype(np.uint8)
    return torch.from_numpy(np.array(image if image.dtype == np.uint8 else image.astype(np.float32)))


class ImageBatches:
    """Prepared images of cases, (B, C, *patch_size).

    Args:
        read: gives the image of a case, (C, *S).
        workers: threads that read and prepare at the same time.
    """

    def __init__(self, read: Reader, plan: ClassPlan, workers: int = 1) -> None:
        self.read, self.plan, self.workers = read, plan, max(1, workers)

    def __call__(self, cases: Sequence[Case]) -> Tensor:
        """The batch of these cases."""
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self._prepared, cases)))

    def _prepared(self, case: Case) -> Tensor:
        return prepare(stored(self.read(case), self.plan), self.plan)


class TrainingImages(Dataset):
    """Prepared images after random changes: {"image": (C, *patch_size), "label": `plan.target`, "seed": ()}.

    Args:
        read: as in `ImageBatches`.
        changes: names in `CHANGES`, in their order.
        epoch_size: samples that an epoch asks for.
        balanced: draw every class as often as any other, instead of every image once.
    """

    def __init__(
        self,
        read: Reader,
        cases: Sequence[Case],
        plan: ClassPlan,
        *,
        changes: Sequence[str],
        epoch_size: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        if not cases:
            raise UserError("There are no images to train on.")
        self.read, self.cases, self.plan = read, cases, plan
        self.changes: list[Change] = [CHANGES.create(name, plan) for name in changes]
        self.epoch_size, self.seed, self.balanced = epoch_size, seed, balanced
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        pools: dict[int, list[int]] = {}
        for place, case in enumerate(cases):
            for number in case.values or (NO_CLASS,):
                pools.setdefault(number, []).append(place)
        self.pools = [pools[number] for number in sorted(pools)]

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        random = np.random.default_rng((self.seed, *place))
        case = self.cases[self._draw(random) if self.balanced else self._next(place)]
        seed = int(random.integers(2**31))
        with seeded(seed):
            image = stored(self.read(case), self.plan)
            for change in self.changes:
                image = change(image)
        return {
            "image": prepare(image, self.plan),
            "label": self.plan.target(case.values),
            "seed": torch.tensor(seed),
        }

    def _next(self, place: tuple[int, int]) -> int:
        """Each pass over the images is a shuffle of its own."""
        passes, within = divmod(place[0] * self.epoch_size + place[1], len(self.cases))
        if self.order[0] != passes:
            self.order = passes, np.random.default_rng((self.seed, passes)).permutation(len(self.cases))
        return int(self.order[1][within])

    def _draw(self, random: np.random.Generator) -> int:
        pool = self.pools[random.integers(len(self.pools))]
        return int(pool[random.integers(len(pool))])


@CHANGES.register("flip")
def flip(plan: ClassPlan) -> Change:
    """Left and right exchanged, or the last axis turned round, half the time."""
    return v2.RandomHorizontalFlip()


@CHANGES.register("flips")
def flips(plan: ClassPlan) -> Change:
    """Each axis turned round half the time: for images without a direction, as of skin."""
    return _turned_round


@CHANGES.register("shift")
def shift(plan: ClassPlan) -> Change:
    """Moved by up to an eighth of each axis; zeros come in."""
    return _shifted


# Not within those that make them, or they could not go to processes that are not forked.
def _turned_round(image: Tensor) -> Tensor:
    return image.flip([axis for axis in range(1, image.dim()) if torch.rand(()) < 0.5])


def _shifted(image: Tensor) -> Tensor:
    most = [size // SHIFT for size in image.shape[1:]]
    moved = F.pad(image, [side for pad in reversed(most) for side in (pad, pad)])
    for axis, pad in enumerate(most, start=1):
        moved = moved.narrow(axis, int(torch.randint(2 * pad + 1, ())), image.shape[axis])
    return moved


PICTURES: dict[str, tuple[str, Callable[[ClassPlan], Change]]] = {
    "resized_crop": (
        "A random part (8 to 100 % of the area) at the plan's size (Szegedy et al., arXiv 1409.4842).",
        lambda plan: v2.RandomResizedCrop(plan.patch_size, antialias=True),
    ),
    "autoaugment_cifar10": (
        "AutoAugment's policy for CIFAR-10 (Cubuk et al., arXiv 1805.09501).",
        lambda plan: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ),
    "autoaugment_imagenet": (
        "AutoAugment's policy for ImageNet (Cubuk et al., arXiv 1805.09501).",
        lambda plan: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    ),
    "randaugment": (
        "RandAugment (Cubuk et al., arXiv 1909.13719), two changes of strength 9.",
        lambda plan: v2.RandAugment(),
    ),
}


def _register(name: str, description: str, make: Callable[[ClassPlan], Change]) -> None:
    @CHANGES.register(name)
    def build(plan: ClassPlan) -> Change:
        if plan.spatial_dims != 2:
            raise UsageError(
                f"The change '{name}' is for 2D images, these are {plan.spatial_dims}D. Take flips or shift."
            )
        return make(plan)

    build.__doc__ = description


for _name, (_description, _make) in PICTURES.items():
    _register(_name, _description, _make)
