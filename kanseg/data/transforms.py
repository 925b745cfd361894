"""Preprocessing, its inverse, and augmentation, by MONAI's transforms (in 2D, albumentations turns and flips).

`load_case` is the one way from files to network input, in training and in prediction; `restore` is the way back to the
image's own grid.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    RandSmoothDeformd,
    Spacingd,
    SpatialPadd,
    Transform,
)
from torch import Tensor

from kanseg.data.cascade import PREVIOUS, DamagedLabels
from kanseg.data.cases import COLOURS, Case, few, label_path
from kanseg.data.images import Image, check_pair, label_from, read_image
from kanseg.data.labels import class_numbers, known_values
from kanseg.data.listing import channel_of, numbers_beside
from kanseg.data.plan import Plan
from kanseg.data.resample import ResampleAlongAxes
from kanseg.errors import UserError

KEYS = ("image", "label")
MODES = {"image": "bilinear", "label": "nearest", PREVIOUS: "nearest"}  # of interpolation
Item = dict[str, Any]
LINEAR = {2: "bilinear", 3: "trilinear"}
BLUR = (0.5, 1.0)  # sigma in voxels
FIELD = 10  # voxels between the points that a smooth deformation is drawn at


@dataclass(frozen=True)
class Strength:
    """How much patches are changed: probabilities, and how far each change goes. Pairs are for 2D and 3D.

    Attributes:
        affine, rotation, scale: probability, radians in 3D (twice that in 2D), share of the size.
        deform, reach: probability and voxels of a smooth deformation.
        noise, blur, brightness, coarse, gamma, colour: probabilities; `coarse` is a lower resolution, `colour` another
            factor and offset for each channel of a colour picture (stains, white balance).
        border, missing: probabilities, see `kanseg.data.cascade.DamagedLabels`; nnU-Net's.
        noise_std, brightness_range, gamma_range, colour_range: what they are drawn from.
    """

    affine: tuple[float, float] = (0.4, 0.3)
    rotation: float = 0.26
    scale: tuple[float, float] = (0.2, 0.15)
    deform: tuple[float, float] = (0.1, 0.0)
    reach: float = 1.5
    noise: float = 0.15
    blur: float = 0.1
    brightness: float = 0.15
    coarse: float = 0.1
    gamma: float = 0.15
    colour: float = 0.0
    border: float = 0.4
    missing: float = 0.2
    noise_std: float = 0.1
    brightness_range: float = 0.25
    gamma_range: tuple[float, float] = (0.7, 1.5)
    colour_range: tuple[float, float] = (0.25, 0.5)


# "strong" is for few cases or long trainings, which else learn them by heart.
STRENGTHS = {
    "none": Strength((0, 0), 0, (0, 0), (0, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "standard": Strength(),
    "strong": Strength(
        affine=(0.8, 0.8), rotation=0.4, scale=(0.3, 0.25), deform=(0.3, 0.4), reach=2.0, noise=0.25, blur=0.2,
        brightness=0.3, coarse=0.25, gamma=0.3, colour=0.5, noise_std=0.15, brightness_range=0.3,
        gamma_range=(0.6, 1.7),
    ),
}  # fmt: skip


def keys_of(plan: Plan) -> tuple[str, ...]:
    """What of a case lies on the grid of its image: in a cascade also what the stage before said."""
    return (*KEYS, PREVIOUS) if plan.previous_stage else KEYS


def preprocessing(plan: Plan) -> Compose:
    """The spatial part: axes in RAS order and the plan's spacing; pictures stay as they are. Invertible.

    Volumes that are learnt slice by slice keep the distance of their slices.
    """
    if plan.image_dims == 2:
        return Compose([])
    keys = keys_of(plan)
    modes = [MODES[key] for key in keys]
    spacing = list(plan.spacing)
    if plan.slice_axis is not None:
        spacing.insert(plan.slice_axis, -1.0)  # MONAI: not positive is as it is
    spaced = Spacingd(keys, spacing, mode=modes, padding_mode="border", allow_missing_keys=True)
    spaced.spacing_transform.sp_resample = ResampleAlongAxes(dtype=np.float64)
    return Compose(
        [Orientationd(keys, axcodes=plan.orientation, labels=None, allow_missing_keys=True), spaced]
    )


def load_case(
    case: Case,
    plan: Plan,
    *,
    with_label: bool = True,
    look: Callable[[Image], None] | None = None,
    previous: np.ndarray | None = None,
) -> tuple[Item, Image]:
    """Read and preprocess: {"image": (C, *S) float32, "label": (1, *S) numbers of `kanseg.data.labels.class_numbers`}.

    In a cascade "previous" has the label map of the stage before, in numbers as "label". Also given is the image that
    was read, for its grid: its numbers may be normalised already.

    Args:
        look: is shown the image as it was read.
        previous: label map of the stage before on the image's own grid; default the one that the case names.

    Raises:
        UserError: files that cannot be read or do not fit the plan or each other.
    """
    source = read_image(case.images, plan.image_dims)
    named = {own[1] for own in map(channel_of, case.images) if own}
    gap = len(case.images) > 1 and bool(named) and named != set(range(len(case.images)))
    if gap or len(source.array) != len(plan.channel_names):
        missing = [f"{name} (_{i:04d})" for i, name in enumerate(plan.channel_names) if i not in named]
        apart = not named and plan.image_dims == 3 and len(source.array) < len(plan.channel_names)
        colours = len(plan.channel_names) == 3 and plan.image_dims == 2
        surplus = [f"_{i:04d}" for i in numbers_beside(case.images[0]) if i >= len(plan.channel_names)]
        shown = ", ".join(f"_{i:04d}" for i in sorted(named))
        if surplus and len(case.images) == 1:  # all images have some, or the others would have been joined
            raise UserError(
                f"{source.path} is not joined with the other channels of its image: {few(surplus)} is too many for "
                f"the {len(plan.channel_names)} that the model takes ({', '.join(plan.channel_names)}). Take it away."
            )
        raise UserError(
            f"{source.path} has {len(source.array)} channels{f' ({shown})' if gap else ''}, the model expects "
            f"{len(plan.channel_names)} "
            f"({', '.join(plan.channel_names)}). Give images like those it was trained on"
            f"{f'; what is missing: {few(missing)}' if named and missing else ''}"
            f"{'; convert grey pictures to colours' if colours else ''}"
            f"{'; files of one channel each are called x_0000, x_0001, ... in this order' if apart else ''}."
        )
    if look is not None:
        look(source)
    affine = torch.from_numpy(source.affine)
    item: Item = {"image": MetaTensor(torch.from_numpy(source.array), affine=affine)}
    if with_label:
        item["label"] = _numbers(label_path(case), source, plan)
    if plan.previous_stage:
        found = case.previous if previous is None else previous
        if found is None:
            raise UserError(
                f"{source.path}: the network is the second of a cascade, and the label map of its first stage, "
                f"{plan.previous_stage}, is missing. Predict with the whole run or model."
            )
        item[PREVIOUS] = _numbers(found, source, plan)
    spatial = preprocessing(plan)
    item = {**spatial(item), "preprocessing": spatial}  # MONAI inverts with the instance that was applied
    item["image"] = normalize(item["image"], plan.normalization)
    return item, source


def _numbers(labels: Path | np.ndarray, source: Image, plan: Plan) -> MetaTensor:
    """Class numbers (1, *S) of a label map on the grid of its image."""
    path = source.path
    if isinstance(labels, Path):
        image = read_image(labels, plan.image_dims)
        check_pair(source, image)
        labels, path = label_from(image), image.path
    numbers = class_numbers(labels, plan, path)
    return MetaTensor(torch.from_numpy(numbers[None]), affine=torch.from_numpy(source.affine))


def normalize(image: Tensor, schemes: Sequence[Mapping[str, Any]]) -> Tensor:
    """Channel by channel, in place, as `kanseg.data.plan.Plan` says."""
    for channel, scheme in enumerate(schemes):
        values = image[channel]
        if scheme["scheme"] == "ct":
            values.clamp_(scheme["lower"], scheme["upper"])
            mean, std = scheme["mean"], scheme["std"]
        elif scheme["scheme"] == "fixed":
            mean, std = scheme["mean"], scheme["std"]
        elif scheme["scheme"] == "minmax":
            mean, std = values.min(), values.max() - values.min()
        elif scheme["scheme"] == "zscore":
            mean, std = values.mean(), values.std(correction=0)
        elif scheme["scheme"] == "zscore_nonzero":
            inside = values != 0
            chosen = values[inside] if inside.any() else values.flatten()
            mean, std = chosen.mean(), chosen.std(correction=0)
            values.masked_fill_(~inside, mean)
        else:
            raise UserError(
                f"Unknown normalization '{scheme['scheme']}' in the plan. "
                "Known: ct, fixed, minmax, zscore, zscore_nonzero."
            )
        values.sub_(mean).div_(max(float(std), 1e-6))
    return image


def restore(values: Tensor, item: Item, plan: Plan) -> Tensor:
    """Network output (K, *S) back on the image's own grid, (K, *original) on the CPU, by linear interpolation."""
    if plan.image_dims == 2:
        return values.cpu()
    image = item["image"]
    tracked = MetaTensor(values.cpu(), affine=image.affine, applied_operations=list(image.applied_operations))
    return item["preprocessing"].inverse({"image": tracked})["image"].as_tensor()


def restored_labels(logits: Iterable[Tensor], item: Item, plan: Plan) -> np.ndarray:
    """Class numbers on the image's own grid from K maps (*S), one class at a time so that memory stays small."""
    maps = (restore(values[None].float(), item, plan)[0] for values in logits)
    return highest(maps, 0.0 if plan.regions else None).numpy()


def highest(maps: Iterable[Tensor], threshold: float | None = None) -> Tensor:
    """Class numbers (*S) int16 from a map (*S) of each class in turn: the highest.

    Args:
        threshold: of regions: the last one above it wins, whatever the first map, the background's, says.
    """
    labels = best = torch.empty(0)
    for number, values in enumerate(maps):
        if number == 0:
            labels = torch.zeros(values.shape, dtype=torch.int16, device=values.device)
            best = values.clone() if threshold is None else torch.full_like(values, threshold)
            continue
        higher = values > best
        labels.masked_fill_(higher, number)  # by an index it would take six times the map
        if threshold is None:
            torch.where(higher, values, best, out=best)
    return labels


def augmentation(
    plan: Plan,
    *,
    foreground: float = 0.5,
    balanced: bool = False,
    changes: bool = True,
    strength: str = "standard",
) -> Compose:
    """Patches from prepared cases: a crop that holds foreground in a share of the patches, then random changes.

    Returns a list with one sample, as MONAI's crop does. Seeded by `Compose.set_random_state`.

    Args:
        foreground: share of the patches whose centre lies in the foreground.
        balanced: every foreground class of the case is as likely a centre as any other.
        changes: False for the crop alone; what changes the patches then runs in batches on the device.
        strength: key of `STRENGTHS`.
    """
    sliced = [] if plan.slice_axis is None else [SlicesAsChannels(plan.slice_axis)]
    amount = STRENGTHS[strength]
    crop = [_balanced_crop(plan, foreground) if balanced else _crop(plan, foreground), *sliced]
    if plan.previous_stage:
        crop.append(DamagedLabels(len(known_values(plan)), amount.border, amount.missing))
    if not changes:
        return Compose(crop)
    spatial = [AlbumentationsSpatial(plan, amount)] if plan.spatial_dims == 2 else _spatial(plan, amount)
    intensity = [
        RandGaussianNoised("image", prob=amount.noise, std=amount.noise_std),
        RandGaussianSmoothd("image", prob=amount.blur, sigma_x=BLUR, sigma_y=BLUR, sigma_z=BLUR),
        RandScaleIntensityd("image", factors=amount.brightness_range, prob=amount.brightness),
        RandSimulateLowResolutiond(
            "image", prob=amount.coarse, zoom_range=(0.5, 1.0), upsample_mode=LINEAR[plan.spatial_dims]
        ),
        RandAdjustContrastd("image", prob=amount.gamma, gamma=amount.gamma_range, retain_stats=True),
    ]
    if coloured(plan):
        factor, offset = amount.colour_range
        intensity += [
            RandScaleIntensityd("image", factors=factor, prob=amount.colour, channel_wise=True),
            RandShiftIntensityd("image", offsets=offset, prob=amount.colour, channel_wise=True),
        ]
    return Compose([*crop, *spatial, *intensity])


def coloured(plan: Plan) -> bool:
    """Whether images are colour pictures, whose channels a stain or a lamp shifts against each other."""
    return plan.image_dims == 2 and tuple(plan.channel_names) == COLOURS


def _spatial(plan: Plan, amount: Strength) -> list[Transform]:
    """Changes of place of volumes."""
    keys = keys_of(plan)
    modes = [MODES[key] for key in keys]
    turns: dict[str, Any] = {"rotate_range": rotation(plan, amount), "scale_range": (amount.scale[1],) * 3}
    transforms: list[Transform] = [
        RandAffined(keys, prob=amount.affine[1], mode=modes, padding_mode="border", **turns)
    ]
    if amount.deform[1]:
        points = [max(2, round(size / FIELD)) for size in plan.patch_size]
        transforms.append(
            RandSmoothDeformd(
                keys,
                plan.patch_size,
                points,
                field_mode="trilinear",
                prob=amount.deform[1],
                def_range=2 * amount.reach / max(plan.patch_size),  # the patch counts as 2 wide
                grid_mode=modes,
            )
        )
    return [*transforms, *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in plan.mirror_axes)]


def _crop(plan: Plan, foreground: float) -> Transform:
    return RandCropByPosNegLabeld(
        keys_of(plan),
        "label",
        _patch(plan),
        pos=foreground,
        neg=1 - foreground,
        fg_indices_key="label_fg_indices",
        bg_indices_key="label_bg_indices",
    )


def _balanced_crop(plan: Plan, foreground: float) -> Transform:
    classes = len(known_values(plan))
    return RandCropByLabelClassesd(
        keys_of(plan),
        "label",
        _patch(plan),
        ratios=[1 - foreground, *[foreground / (classes - 1)] * (classes - 1)],
        num_classes=classes,
        indices_key="label_cls_indices",
        warn=False,
    )


def preparation(plan: Plan, balanced: bool = False) -> Compose:
    """What `augmentation` needs and no epoch changes: cases at least a patch large, where foreground is."""
    classes = len(known_values(plan))
    indices = ClassesToIndicesd("label", num_classes=classes) if balanced else AnnotatedPlaces()
    beyond = [] if plan.slice_axis is None else [NeighboursBeyond(plan)]
    return Compose([*beyond, SpatialPadd(keys_of(plan), _patch(plan)), indices])


class AnnotatedPlaces(Transform):
    """Where foreground and background are, as MONAI's crop takes it; what nobody annotated is neither.

    A case without any annotation is background all over. Where a case lacks one of the two, the other stands in for
    it, as in MONAI's crop, which would warn of it at every patch.
    """

    def __call__(self, item: Item) -> Item:
        label = np.asarray(item["label"]).ravel()
        foreground, background = (np.flatnonzero(found) for found in (label > 0, label == 0))
        if not foreground.size + background.size:
            background = np.arange(label.size)
        foreground, background = (
            a if a.size else b for a, b in ((foreground, background), (background, foreground))
        )
        places = {"label_fg_indices": foreground, "label_bg_indices": background}
        return {**item, **{key: torch.from_numpy(found) for key, found in places.items()}}


def _patch(plan: Plan) -> list[int]:
    """The patch to cut from a prepared case, in its own dimension."""
    patch = list(plan.patch_size)
    if plan.slice_axis is not None:
        patch.insert(plan.slice_axis, plan.slices)
    return patch


def slices_as_channels(image: Tensor, plan: Plan) -> Tensor:
    """A volume as a batch of pictures, (C, *S) -> (slices, C * plan.slices, *S without the slice axis).

    The neighbours of a slice are further channels of it; beyond the ends the last slice stands in.
    """
    assert plan.slice_axis is not None
    stack = torch.as_tensor(image).movedim(plan.slice_axis + 1, 0)
    places = torch.arange(len(stack))[:, None] + torch.arange(plan.slices) - plan.slices // 2
    return stack[places.clamp(0, len(stack) - 1)].flatten(1, 2)


class NeighboursBeyond(Transform):
    """Repeat the first and last slice, so that every slice can be the middle of a patch."""

    def __init__(self, plan: Plan) -> None:
        assert plan.slice_axis is not None
        self.axis, self.count = plan.slice_axis + 1, plan.slices // 2

    def __call__(self, item: Item) -> Item:
        grown = {}
        for key in KEYS:
            size = item[key].shape[self.axis]
            places = torch.arange(-self.count, size + self.count).clamp(0, size - 1)
            grown[key] = item[key].index_select(self.axis, places)
        return {**item, **grown}


class SlicesAsChannels(Transform):
    """A patch of a few slices becomes a picture with that many times the channels, and the label of its middle."""

    def __init__(self, axis: int) -> None:
        self.axis = axis + 1

    def __call__(self, item: Item) -> Item:
        image, label = (torch.as_tensor(np.asarray(item[key])).movedim(self.axis, 0) for key in KEYS)
        return {**item, "image": image.flatten(0, 1), "label": label[len(label) // 2]}


def rotation(plan: Plan, amount: Strength) -> tuple[float, ...]:
    """Radians an axis: about all of a volume, of thick slices only within them; one in 2D."""
    if plan.spatial_dims == 2:
        return (2 * amount.rotation,)
    coarse = int(np.argmax(plan.spacing))
    if plan.spacing[coarse] <= 3 * min(plan.spacing):
        return (amount.rotation,) * 3
    return tuple(amount.rotation if axis == coarse else 0.0 for axis in range(3))


class AlbumentationsSpatial(RandomizableTransform):
    """Turns, flips and elastic changes of 2D patches by albumentations (MIT, 2.0.8)."""

    def __init__(self, plan: Plan, amount: Strength) -> None:
        super().__init__()
        require_albumentations()
        import albumentations

        flips = [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
        (turn,), size = rotation(plan, amount), 1 + amount.scale[0]
        degrees = float(np.degrees(turn))
        affine = {
            "rotate": (-degrees, degrees),
            "scale": (2 - size, size),
            "border_mode": 2,
            "p": amount.affine[0],
        }
        self.transform = albumentations.Compose(
            [
                *(flip for axis, flip in zip((1, 0), flips, strict=True) if axis in plan.mirror_axes),
                albumentations.Affine(**affine),
                albumentations.ElasticTransform(alpha=20, sigma=8, border_mode=2, p=amount.deform[0]),
            ]
        )

    def __call__(self, item: Item) -> Item:
        self.transform.set_random_seed(int(self.R.randint(2**31)))
        image = np.moveaxis(np.asarray(item["image"]), 0, -1)
        changed = self.transform(image=np.ascontiguousarray(image), mask=np.asarray(item["label"][0]))
        picture = changed["image"] if changed["image"].ndim == 3 else changed["image"][..., None]
        return {
            **item,
            "image": torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, -1, 0))),
            "label": torch.from_numpy(np.ascontiguousarray(changed["mask"][None])),
        }


def require_albumentations() -> None:
    """Make sure of the MIT-licensed albumentations, and that it asks the network nothing."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        version = importlib.metadata.version("albumentationsx")
    except importlib.metadata.PackageNotFoundError:
        return
    raise UserError(
        f"albumentationsx {version} (AGPL) is installed; kanseg works with albumentations 2.0.8 (MIT) alone. Run: "
        "pip uninstall albumentationsx; pip install --force-reinstall albumentations==2.0.8"
    )
