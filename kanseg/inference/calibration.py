"""Probabilities that mean what they say: one temperature, fitted on cases that the network has not seen.

Logits are divided by it before the softmax (of regions: the sigmoid), so the likeliest class stays the likeliest. It is
the one with the least negative log-likelihood, a convex problem in its inverse (Guo et al., ICML 2017, arXiv
1706.04599), of the voxels of whole images as they are: sums of probabilities, volumes and the Dice that they expect,
count every voxel. As few of them decide, half of a case's sample is drawn near its structures, and weights make up for
it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage
from scipy.special import expit, log_expit, log_softmax, softmax

from kanseg.data.labels import Labels, class_values
from kanseg.errors import UserError
from kanseg.files import read_json

if TYPE_CHECKING:
    from kanseg.inference.predict import Part

CALIBRATION = "calibration.json"  # beside the folds or models that it belongs to
VOXELS, FEWEST, NUMBERS = 2048, 256, 2**17  # voxels of a case: at most, at least, and of all classes together
NEAR = 5  # voxels along the finest axis that reach from a structure, told or true, into what is near
BOUNDS = (0.1, 10.0)  # of the temperature: where no voxel is wrong, none would be cold enough
BINS = 10  # of probabilities


@dataclass(frozen=True)
class Sample:
    """Voxels of one image or several, with what the network said and what was there.

    Attributes:
        logits: (N, K) float32.
        truth: (N, K) bool, which classes a voxel has; one of them where they are no regions.
        weight: (N,) float32, share of its image's voxels that each stands for; 1 in all for each image.
        near: (N,) bool, whether it lies near a structure.
    """

    logits: np.ndarray
    truth: np.ndarray
    weight: np.ndarray
    near: np.ndarray

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """All voxels of several."""
        return cls(*(np.concatenate([getattr(s, field.name) for s in samples]) for field in fields(cls)))


def draw_sample(
    part: Part, source_affine: np.ndarray, labels: np.ndarray, reference: np.ndarray, plan: Labels, name: str
) -> Sample:
    """Voxels of a predicted case, drawn by its name: half of them near its structures, half elsewhere.

    Logits are interpolated where the voxels of the image's own grid lie, as `kanseg.data.transforms.restore` does.

    Args:
        labels, reference: label maps (*S) on the image's own grid, in the values of the files.
    """
    count = len(part.logits)
    known = np.ones(reference.shape, bool) if plan.ignore_value is None else reference != plan.ignore_value
    spacing = np.linalg.norm(source_affine[:3, :3], axis=0)[: labels.ndim]
    background = plan.label_values[0]
    near = near_structures(((reference != background) & known) | (labels != background), spacing)
    random, wanted = np.random.default_rng(zlib.crc32(name.encode())), VOXELS // 2
    wanted = min(wanted, max(FEWEST, NUMBERS // count) // 2)
    places, weights, beside = [], [], []
    for mask, is_near in ((near & known, True), (~near & known, False)):
        chosen = _chosen(mask, wanted, random)
        places.append(chosen)
        weights.append(np.full(len(chosen), mask.sum() / max(1, known.sum()) / max(1, len(chosen))))
        beside.append(np.full(len(chosen), is_near))
    where = np.concatenate(places)
    there = reference[tuple(where.T)]
    truth = np.stack([np.zeros(len(there), bool), *(np.isin(there, v) for v in class_values(plan).values())])
    truth[0] = ~truth[1:].any(axis=0)
    at = _on_the_grid_of(part, source_affine, where)
    logits = [
        ndimage.map_coordinates(part.logits[k].float().cpu().numpy(), at, order=1, mode="nearest")
        for k in range(count)
    ]
    weight = np.concatenate(weights).astype(np.float32)
    return Sample(np.stack(logits, axis=1), np.ascontiguousarray(truth.T), weight, np.concatenate(beside))


def near_structures(mask: np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mask (*S) and what is within `NEAR` voxels of the finest axis of it, along each axis.

    >>> near_structures(np.arange(16) == 8, [1.0]).nonzero()[0]
    array([ 3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13])
    """
    reach = [max(1, round(NEAR * min(spacing) / length)) for length in spacing]
    near = np.zeros(mask.shape, np.uint8)
    for box in ndimage.find_objects(mask.astype(np.uint8)):
        wide = tuple(slice(max(0, s.start - r), s.stop + r) for s, r in zip(box, reach, strict=True))
        ndimage.maximum_filter(
            mask[wide].view(np.uint8), [2 * r + 1 for r in reach], output=near[wide], mode="constant"
        )
    return near.view(bool)


def _chosen(mask: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """At most so many voxels of a mask (*S), each as likely as any, (N, axes); memory for the places of a plane."""
    counts = mask.reshape(len(mask), -1).sum(axis=1)
    ends = counts.cumsum()
    ranks = np.sort(random.choice(ends[-1], min(count, int(ends[-1])), replace=False))
    planes = np.searchsorted(ends, ranks, side="right")
    found = [
        np.flatnonzero(mask[plane])[ranks[planes == plane] - (ends[plane] - counts[plane])]
        for plane in np.unique(planes)
    ]
    flat = np.concatenate(found) if found else np.zeros(0, int)
    return np.stack([planes, *np.unravel_index(flat, mask.shape[1:])], axis=1)


def _on_the_grid_of(part: Part, affine: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Voxels (N, axes) of the image's own grid on that of the network, (axes, N)."""
    if part.plan.image_dims == 2:
        return where.T
    way = np.linalg.inv(np.asarray(part.item["image"].affine, dtype=float)) @ affine
    return way[:3, :3] @ where.T + way[:3, 3:]


def chances(logits: np.ndarray, temperature: float, regions: bool) -> np.ndarray:
    """Probabilities (N, K - 1) of the classes without the background."""
    scaled = logits / temperature
    return expit(scaled[:, 1:]) if regions else softmax(scaled, axis=1)[:, 1:]


def surprise(sample: Sample, temperature: float, regions: bool) -> float:
    """Negative log-likelihood in nats, a voxel of an image on average; of regions the mean of theirs."""
    scaled = sample.logits / temperature
    if regions:
        told = np.where(sample.truth, log_expit(scaled), log_expit(-scaled))[:, 1:].mean(axis=1)
    else:
        told = log_softmax(scaled, axis=1)[sample.truth]
    return -float(np.average(told, weights=sample.weight))


def fit_temperature(sample: Sample, regions: bool) -> float:
    """The temperature, within `BOUNDS`, that makes the truth likeliest."""
    from scipy.optimize import minimize_scalar  # what only reads temperatures starts without

    low, high = BOUNDS
    found = minimize_scalar(
        lambda inverse: surprise(sample, 1 / inverse, regions), bounds=(1 / high, 1 / low), method="bounded"
    )
    return float(1 / found.x)


def reliability(chance: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> tuple[float, list[list[float]]]:
    """The expected calibration error of a class, and [mean probability, share that was, weight] of each bin with any.

    Args:
        chance, truth, weight: (N,): what was said, whether it was so, and what each counts.
    """
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    total = np.bincount(bins, weight, BINS)
    filled = total > 0
    said, was = (np.bincount(bins, weight * v, BINS)[filled] / total[filled] for v in (chance, truth))
    share = total[filled] / total.sum()
    return float(np.sum(share * np.abs(said - was))), np.stack([said, was, share], axis=1).tolist()


def calibrate(folds: Sequence[Sequence[Sample]], names: Sequence[str], regions: bool) -> dict[str, Any]:
    """The temperature of all samples, and how well probabilities hold before it and after, in cases it did not see.

    Args:
        folds: samples of the held-out cases of each fold, two folds at least.
        names: of the classes, without the background.

    Returns:
        "temperature", that of all, or 1 where unseen cases are no likelier by it; "temperatures", of all but each fold;
        "nll" [before, after]; "classes": of each "ece" (of whole images), "ece_near" (near structures), and "curve"
        (there), each [before, after]. What is after is by the temperature of the other folds.
    """
    apart = [
        fit_temperature(Sample.joined([s for other in folds if other is not fold for s in other]), regions)
        for fold in folds
    ]
    pooled = [Sample.joined(fold) for fold in folds]
    whole = Sample.joined(pooled)
    sides = [[1.0] * len(folds), apart]
    told = [
        np.concatenate([chances(s.logits, t, regions) for s, t in zip(pooled, side, strict=True)])
        for side in sides
    ]
    cases = [len(fold) for fold in folds]
    nll = [
        float(np.average([surprise(s, t, regions) for s, t in zip(pooled, side, strict=True)], weights=cases))
        for side in sides
    ]
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        truth = whole.truth[:, number + 1]
        everywhere = [reliability(said[:, number], truth, whole.weight)[0] for said in told]
        near = [
            reliability(said[whole.near, number], truth[whole.near], whole.weight[whole.near])
            for said in told
        ]
        found[name] = {"ece": everywhere, "ece_near": [n[0] for n in near], "curve": [n[1] for n in near]}
    return {
        "temperature": fit_temperature(whole, regions) if nll[1] < nll[0] else 1.0,
        "temperatures": apart,
        "cases": sum(cases),
        "voxels": len(whole.weight),
        "nll": nll,
        "classes": found,
    }


def known_of(info: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What is known of the calibration of a network: in the JSON of its checkpoint, its folder or that of its model.

    Raises:
        UserError: it is something else.
    """
    own = file.absolute().parent
    return stored(info, (own, own.parent))


def quality_of(info: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What `kanseg.inference.quality.judge` needs: of the model of a network, else its own; {} without.

    Raises:
        UserError: it is something else.
    """
    own = file.absolute().parent
    return stored(info, (own.parent, own)).get("quality") or {}


def stored(info: Mapping[str, Any], places: Iterable[Path]) -> dict[str, Any]:
    """What the JSON of a checkpoint, or else the first of the folders with any, knows of calibration; {} without.

    Raises:
        UserError: it is something else.
    """
    known, source = info.get("calibration"), "The checkpoint"
    file = next((place / CALIBRATION for place in places if (place / CALIBRATION).exists()), None)
    if known is None and file is not None:
        known, source = read_json(file), str(file)
    elif known is None:
        return {}
    value = known.get("temperature", 1.0) if isinstance(known, dict) else None
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(
            f"{source} is to hold a temperature above 0. It is damaged: copy it again, or take it away."
        )
    assert isinstance(known, dict)
    return known
