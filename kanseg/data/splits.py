"""Training and validation cases, parted by patient."""

from __future__ import annotations

import numpy as np

from kanseg.data.formats import Dataset
from kanseg.errors import UserError


def split(dataset: Dataset, *, folds: int = 5, seed: int = 0) -> list[dict[str, list[str]]]:
    """`folds` splits, each {"train": ids, "val": ids}; every case validates once and no group is ever parted.

    Groups are shuffled by `seed` and dealt out, the largest first, so folds differ by few cases.

    Raises:
        UserError: fewer groups (patients) than folds.
    """
    groups: dict[str, list[str]] = {}
    for case in dataset.cases:
        groups.setdefault(case.group, []).append(case.id)
    if len(groups) < folds:
        raise UserError(
            f"{dataset.name} has {len(groups)} patients, too few for {folds} folds. "
            f"Set data.folds={max(2, len(groups))} or fewer, or add data."
        )
    names = sorted(groups)
    np.random.default_rng(seed).shuffle(names)
    names.sort(key=lambda name: -len(groups[name]))
    validation: list[list[str]] = [[] for _ in range(folds)]
    for name in names:
        min(validation, key=len).extend(groups[name])
    return [
        {"train": sorted(c.id for c in dataset.cases if c.id not in set(ids)), "val": sorted(ids)}
        for ids in validation
    ]
