"""The plan of a classifier: size of its images, normalisation of their channels, and a network that suits both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kanseg.data.cases import few
from kanseg.data.image_classes import ImageClasses
from kanseg.data.splits import check_leaks
from kanseg.data.stored_plan import StoredPlan
from kanseg.errors import UserError
from kanseg.files import make_folder
from kanseg.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
SAMPLES = 512  # images that are looked at
LARGEST = {2: 224, 3: 64}  # voxels an axis, where images differ in size
SMALL = 64  # from there on an encoder goes down faster
ENCODERS = ("reskanet10", "reskanet18x224p")  # for small images, and for larger ones
BATCH = {2: 64, 3: 16}
LEAST_STD = 1e-6
UNEVEN = 3  # times as many images in the largest class as in the smallest


@dataclass
class ClassPlan(StoredPlan):
    """Everything that preparing an image, training and prediction must agree on.

    Images are scaled to cover `patch_size` and cut to it about their middle; channels are then normalised by
    `normalization`, {"mean", "std"} of the values as they are stored. With `multilabel` an image has any number of
    classes, each of which is there or not.
    """

    task: ClassVar[str] = "classification"
    # What a plan of segmentation says besides, for those who ask both.
    slices: ClassVar[int] = 1
    regions: ClassVar[Sequence[Sequence[int]]] = ()
    ignore_value: ClassVar[int | None] = None

    dataset_name: str
    data: str
    layout: str
    spatial_dims: int
    channel_names: list[str]
    label_names: list[str]
    patch_size: list[int]
    batch_size: int
    normalization: list[dict[str, float]]
    id_pattern: str | None = None
    model: str = "classifier"
    model_options: dict[str, Any] = field(default_factory=dict)
    multilabel: bool = False
    reasons: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def label_values(self) -> list[int]:
        """The number of each class."""
        return list(range(len(self.label_names)))

    @property
    def metric(self) -> str:
        """Of its validations."""
        return "auc" if self.multilabel else "accuracy"

    @property
    def image_dims(self) -> int:
        """Dimension of the images."""
        return self.spatial_dims

    @property
    def in_channels(self) -> int:
        """Channels that the network takes."""
        return len(self.channel_names)

    def target(self, values: Sequence[int]) -> Tensor:
        """What is learned of an image of these classes: their number, (), or with `multilabel` 0 and 1, (K,)."""
        import torch

        if not self.multilabel:
            return torch.tensor(values[0])
        return torch.zeros(len(self.label_names)).index_fill(0, torch.tensor(values, dtype=torch.long), 1.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, (N, K) -> (N, K); they add up to 1 where an image has one class."""
        return logits.sigmoid() if self.multilabel else logits.softmax(1)

    def misfit(self) -> str | None:
        """What a plan edited by hand has wrong, or None."""
        if self.version != VERSION:
            return f"it has version {self.version}, this kanseg knows {VERSION}"
        if len(self.patch_size) != self.spatial_dims or min(self.patch_size) < 1:
            return f"patch_size needs a positive number for each of {self.spatial_dims} axes, but is {self.patch_size}"
        if len(self.normalization) != len(self.channel_names):
            return f"normalization has {len(self.normalization)} entries, channel_names has {len(self.channel_names)}"
        if any(set(one) != {"mean", "std"} or one["std"] <= 0 for one in self.normalization):
            return f"normalization needs a mean and a positive std a channel, but is {self.normalization}"
        return None if self.batch_size > 0 else f"batch_size is {self.batch_size}"

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, lists and dictionaries, with the task that tells it from other plans."""
        return {"task": self.task, **super().to_dict()}


def plan_classes(
    dataset: ImageClasses, run: Path | None = None, *, same: Sequence[tuple[str, str]] | None = None
) -> ClassPlan:
    """Look at some images to train on and decide; RUN/plan.json is written where a run folder is given.

    With it RUN/fingerprint.json, of all images: copies stay on one side of a split that kanseg makes.

    Args:
        same: what `kanseg.data.class_copies.copies` gave, if it is there already.

    Raises:
        UserError: a patient has images to train on and to test on, also in folds that come with the data, or an image
            cannot be read.
    """
    from kanseg.data.class_copies import across_parts, class_fingerprint, patients_across
    from kanseg.data.fingerprint import save_fingerprint

    if shared := patients_across(dataset):
        raise UserError(f"{dataset.source}: {shared}. The scores would be too good. Move them to one part.")
    check_leaks(dataset.splits, dataset)
    dims = dataset.spatial_dims
    alone = len(dataset.splits) == 1  # of several folds each validates on what others train on
    train = dataset.splits[0]["train"] if alone else [case.id for case in dataset.cases]
    known = {case.id: case for case in dataset.cases}
    chosen = train[:: -(-len(train) // SAMPLES)]
    sizes, sums = [], []
    for name in progress(chosen, "Reading images"):
        image = as_channels(dataset.read(known[name]).astype(np.float32), len(dataset.channel_names))
        sizes.append(image.shape[1:])
        flat = image.reshape(len(image), -1)
        sums.append((flat.mean(1), (flat**2).mean(1)))
    mean, square = np.mean(sums, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, LEAST_STD))
    size, why = _size(np.array(sizes), dims)
    plan = ClassPlan(
        dataset_name=dataset.name,
        data=str(dataset.source),
        layout=dataset.layout,
        spatial_dims=dims,
        channel_names=list(dataset.channel_names),
        label_names=list(dataset.label_names),
        patch_size=size,
        batch_size=BATCH[dims],
        normalization=[{"mean": float(m), "std": float(s)} for m, s in zip(mean, std, strict=True)],
        id_pattern=dataset.id_pattern,
        multilabel=dataset.multilabel,
        model_options={"encoder": ENCODERS[max(size) > SMALL], "basis": "gram", "bottleneck": True},
        reasons=[
            f"images of {' x '.join(map(str, size))}: {why}",
            f"channels by mean and spread of {len(chosen)} images",
            *(["an image may have several classes, or none"] if dataset.multilabel else []),
            *filter(None, [uneven(dataset)]),
            *dataset.notes,
        ],
    )
    if run is not None:
        seen = class_fingerprint(dataset, same)
        if seen is None:
            plan.reasons.append(f"{len(dataset.cases)} images are too many to look for copies among them")
        else:
            apart = across_parts(dataset, seen["same"])
            if apart:
                told = few([f"'{one}' and '{other}'" for one, other in apart], 2)
                plan.reasons.append(
                    f"{len(apart)} images lie in two parts or folds of the data (train, val, test), as copies, which "
                    f"makes scores too good: {told}"
                )
            if dataset.splits:  # they are the data's own, and only told of
                seen["same"] = [pair for pair in seen["same"] if pair not in set(apart)]
            save_fingerprint(seen, make_folder(run))
        plan.save(make_folder(run) / "plan.json")
    return plan


def uneven(dataset: ImageClasses) -> str:
    """What to do where some class has far more images than another; "" where none has."""
    if dataset.multilabel:
        return ""
    counts = Counter(case.values[0] for case in dataset.cases)
    (most, high), (least, low) = counts.most_common()[0], counts.most_common()[-1]
    if high < UNEVEN * low:
        return ""
    names = dataset.label_names
    return (
        f"classes are uneven, {names[most]} has {high} images and {names[least]} {low}: training.balanced=true draws "
        "all classes equally often"
    )


def as_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """An image (C, *S) with another number of channels: grey as colour, or the mean of colours as grey."""
    if len(image) == channels:
        return image
    if 1 not in (len(image), channels):
        raise UserError(
            f"An image has {len(image)} channels, {channels} are expected. Give all the same channels."
        )
    return np.repeat(image, channels, axis=0) if len(image) == 1 else image.mean(axis=0, keepdims=True)


def _size(sizes: np.ndarray, dims: int) -> tuple[list[int], str]:
    """The common size, else the median short side for all axes, within `LARGEST`."""
    if (sizes == sizes[0]).all():
        return [int(n) for n in sizes[0]], "all are of this size"
    side = int(min(LARGEST[dims], np.median(sizes.min(axis=1))))
    return (
        [side] * dims,
        f"they differ ({sizes.min(0).tolist()} to {sizes.max(0).tolist()}), and are scaled and cut to it",
    )
