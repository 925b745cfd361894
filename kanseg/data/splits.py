"""Training and validation cases: parted by patient, alike in the classes they hold, and checked for leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kanseg.data.cases import Dataset
from kanseg.data.digests import joined
from kanseg.errors import UserError

Split = dict[str, list[str]]
Pairs = Iterable[Sequence[str]]


def split(dataset: Dataset, *, folds: int = 5, seed: int = 0, same: Pairs = ()) -> list[Split]:
    """`folds` splits, each {"train": ids, "val": ids}; every case validates once and no group is ever parted.

    Groups are shuffled by `seed` and dealt out, those with the rarest class first and the largest of them before the
    others, to the fold that lacks that class most (Sechidis et al., ECML PKDD 2011), so folds are alike in classes and
    differ by few cases.

    A data set that comes with its splits keeps them, if they part no patient.

    Args:
        same: pairs of ids whose images are one (see `kanseg.data.digests`); they stay together too.

    Raises:
        UserError: fewer groups (patients) than folds, or splits of the data set's own that share one.
    """
    if dataset.splits:
        own = [{part: list(ids) for part, ids in fold.items()} for fold in dataset.splits]
        check_leaks(own, dataset, same)
        return own
    groups: dict[str, list[str]] = {}
    for case, group in joined({case.id: case.group for case in dataset.cases}, same).items():
        groups.setdefault(group, []).append(case)
    if len(groups) < folds:
        raise UserError(
            f"{dataset.name} has {len(groups)} patients, too few for {folds} folds. "
            f"Set data.folds={max(2, len(groups))} or fewer, or add data."
        )
    names = sorted(groups)
    np.random.default_rng(seed).shuffle(names)
    names.sort(key=lambda name: -len(groups[name]))
    values = {case.id: set(case.values) for case in dataset.cases}
    present = {name: set().union(*(values[case] for case in groups[name])) for name in names}
    validation: list[list[str]] = [[] for _ in range(folds)]
    held: list[Counter[int | None]] = [Counter() for _ in range(folds)]  # cases with a class, in each fold
    for name, value in _rarest_first(names, present):
        chosen = min(range(folds), key=lambda fold: (held[fold][value], len(validation[fold])))
        validation[chosen].extend(groups[name])
        held[chosen].update(number for case in groups[name] for number in values[case])
    held_out = [set(ids) for ids in validation]
    return [
        {"train": sorted(c.id for c in dataset.cases if c.id not in ids), "val": sorted(ids)}
        for ids in held_out
    ]


def _rarest_first(names: Sequence[str], present: Mapping[str, set[int]]) -> Iterable[tuple[str, int | None]]:
    """Each group once, with the class it is dealt out for: that of the fewest groups that are left."""
    left = list(names)
    while left:
        counts: dict[int, int] = {}
        for name in left:
            for value in present[name]:
                counts[value] = counts.get(value, 0) + 1
        rarest = min(counts, key=lambda value: (counts[value], -value)) if counts else None
        chosen = {name: rarest for name in left if rarest is None or rarest in present[name]}
        yield from chosen.items()
        left = [name for name in left if name not in chosen]


def check_leaks(splits: Sequence[Mapping[str, Sequence[str]]], dataset: Dataset, same: Pairs = ()) -> None:
    """Raise `UserError` if a patient, or one image under two names, is on both sides of a fold."""
    groups = joined({case.id: case.group for case in dataset.cases}, same)
    own = {case.id: case.group for case in dataset.cases}
    for number, fold in enumerate(splits):
        training = {groups[case]: case for case in fold["train"] if case in groups}
        for case in fold["val"]:
            if (other := training.get(groups.get(case, ""))) is not None:
                shared = (
                    f"belong to one patient ('{own[case]}')" if own[case] == own[other] else "are one image"
                )
                raise UserError(
                    f"Fold {number} trains on '{other}' and validates on '{case}', which {shared}; its scores would be "
                    "too good. Move one of them, or delete splits.json (or the folds of the list) to split anew."
                )
