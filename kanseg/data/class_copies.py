"""What planning keeps of images with classes: digests that tell whether they changed, and which of them are copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kanseg.data.cases import Case, few
from kanseg.data.digests import content_digest, file_digest, near_duplicates, signature, thumbnail
from kanseg.data.image_classes import ImageClasses
from kanseg.progress import progress

MOST_FILES = 50_000  # images in files that are looked at
MOST_THUMBNAILS = 10_000  # images that are compared in detail
DETAILED = {2: 64, 3: 32}  # voxels an axis from which on a thumbnail tells an image from one of the same kind
Pair = tuple[str, str]


def class_fingerprint(dataset: ImageClasses, same: Sequence[Pair] | None = None) -> dict[str, Any] | None:
    """As `kanseg.data.fingerprint.fingerprint`, of images with classes; None where there are too many of them.

    Args:
        same: what `copies` gave, if it is there already.

    Returns:
        {"cases": id -> {"group", "classes", "files"}, "same": pairs of ids whose images are one, also of test images}.
    """
    if not dataset.arrays and len(dataset.cases) > MOST_FILES:
        return None
    kept: dict[str, dict[str, Any]] = {}
    for case in progress(dataset.sources, "Reading files"):
        files = {str(path): {**signature(path), "sha256": file_digest(path)} for path in case.images}
        kept[case.id] = {"group": case.group, "classes": list(case.values), "files": files}
    return {"cases": kept, "same": copies(dataset) if same is None else list(same)}


def copies(dataset: ImageClasses) -> list[Pair]:
    """Pairs of ids whose images are the same, or, where they show enough, the same but for noise or size."""
    cases = [*dataset.cases, *dataset.test_cases]
    detailed = len(cases) <= MOST_THUMBNAILS
    by_content: dict[str, list[str]] = {}
    thumbnails: dict[str, np.ndarray] = {}
    for case in progress(cases, "Looking for copies"):
        if not (dataset.arrays or detailed):  # the files tell as much, and are read faster
            by_content.setdefault("".join(map(file_digest, case.images)), []).append(case.id)
            continue
        image = dataset.read(case)
        by_content.setdefault(content_digest(image), []).append(case.id)
        if detailed and min(image.shape[1:]) >= DETAILED[dataset.spatial_dims]:
            thumbnails[case.id] = thumbnail(image)
    pairs = [(first, other) for first, *others in by_content.values() for other in others]
    return [*pairs, *(pair for pair in near_duplicates(thumbnails) if pair not in set(pairs))]


def across_parts(dataset: ImageClasses, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of an image to train on (or of validation) and one of a part that the data set holds apart from it."""
    part = {case.id: "train" for case in dataset.cases}
    for number, split in enumerate(dataset.splits):  # of several folds each validates on its own images
        part |= dict.fromkeys(split["val"], f"val {number}")
    part |= {case.id: "test" for case in dataset.test_cases}
    return [pair for pair in pairs if part[pair[0]] != part[pair[1]]]


def patients_across(dataset: ImageClasses) -> str:
    """What is wrong where a patient has images to train on and to test on; "" where none has."""
    known = {case.group: case for case in dataset.cases}
    shared: list[tuple[Case, Case]] = [
        (known[case.group], case) for case in dataset.test_cases if case.group in known
    ]
    if not shared:
        return ""
    one, other = shared[0]
    return (
        f"{len(shared)} test images are of patients to train on ({few(sorted({c.group for _, c in shared}), 3)}), e.g. "
        f"'{other.id}' and '{one.id}'"
    )
