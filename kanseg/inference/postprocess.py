"""Post-processing of label maps: largest component, smallest size, filled holes, a class or all classes at once.

A rule is plain JSON: {"labels": [1, 2], "largest": true, "min_mm3": 100.0, "fill_holes": true}. It looks at all voxels
that hold one of its labels; what it removes becomes background, what it fills was background. Rules are chosen by the
Dice of cases that the network has not seen in training, as nnU-Net does (Isensee et al., Nature Methods 18, 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from kanseg.data.shelf import Shelf
from kanseg.errors import UserError, did_you_mean
from kanseg.evaluation.metrics import box_around, dice_of_values
from kanseg.files import parse_json, write_json
from kanseg.progress import progress

Rule = dict[str, Any]
Triple = tuple[np.ndarray, np.ndarray, Sequence[float]]  # prediction, reference, spacing
Pair = tuple[np.ndarray, np.ndarray] | Triple
Boxes = Sequence[Any]  # slices around each of the values 1, 2, ..., None for one that is not there
POSTPROCESSING = "postprocessing.json"  # in a folder of models: the rules that belong to them
KEYS = ("labels", "largest", "min_mm3", "fill_holes")
LEAST_GAIN = 1e-4  # of the mean Dice; a rule that gains less is noise
SHARES = (0.05, 0.2)  # of a class's median volume: the smallest sizes that are tried


def apply_postprocessing(
    labelmap: np.ndarray, rules: Sequence[Rule], spacing: Sequence[float] | None = None
) -> np.ndarray:
    """The label map (*S) after all rules, in their order; the given array is left as it is.

    Args:
        spacing: mm, one number an axis; default 1.
    """
    done = labelmap.copy()
    for rule in rules:
        check_rule(rule)
        mask = np.isin(done, rule["labels"])
        if not mask.any():
            continue
        box = ndimage.find_objects(mask.astype(np.uint8))[0]
        inside, view = mask[box], done[box]
        kept = _cleaned(inside, rule, spacing)
        view[inside & ~kept] = 0
        view[kept & ~inside & (view == 0)] = rule["labels"][0]
    return done


def save_rules(folder: Path, rules: Sequence[Rule]) -> Path:
    """Write the rules of the models in a folder."""
    return write_json(folder / POSTPROCESSING, {"rules": rules})


def load_rules(folder: Path) -> list[Rule] | None:
    """The rules that `save_rules` wrote, None where there are none."""
    file = folder / POSTPROCESSING
    if not file.is_file():
        return None
    return parse_json(file, "post-processing rules", "Correct or delete it.", _rules_in)


def _rules_in(values: Any) -> list[Rule]:
    rules = values["rules"] if isinstance(values, dict) and "rules" in values else values
    if not isinstance(rules, list):
        raise TypeError(f"a list was expected, not {str(rules)[:40]}")
    return rules


def check_rule(rule: Rule) -> None:
    """Raise `UserError` unless a rule read from a file is one."""
    labels = rule.get("labels") if isinstance(rule, dict) else None
    if not isinstance(labels, list) or not labels or not all(isinstance(value, int) for value in labels):
        raise UserError(
            f"Post-processing rule {rule!r} needs 'labels', e.g. {{'labels': [1], 'largest': true}}."
        )
    if not isinstance(rule.get("min_mm3", 0), int | float):
        raise UserError(f"Post-processing rule {rule!r} needs a number as 'min_mm3'.")
    for key in rule:
        if key not in KEYS:
            raise UserError(f"Post-processing rules have no key '{key}'.{did_you_mean(key, KEYS)}")


def choose_postprocessing(
    pairs: Iterable[Pair],
    labels: Mapping[str, int] | Sequence[int],
    memory: int | None = None,
    ignore: int | None = None,
) -> list[Rule]:
    """Rules that raise the mean Dice of unseen cases; [] where none does.

    First all labels together (one organ, whatever its parts), then each label alone, given what was chosen before.

    Args:
        pairs: (prediction, reference) or (prediction, reference, spacing in mm) of each case, label maps (*S).
        labels: the label values (or name -> value), without the background.
        memory: bytes that the label maps may take; beyond it they lie on the disk. Default all in memory.
        ignore: value in the references of voxels that do not count; the rules see predictions there, the Dice does not.
    """
    values = list(labels.values() if isinstance(labels, Mapping) else labels)
    cases = _Cases(memory)
    for prediction, reference, *spacing in pairs:
        cases.add(prediction, reference, spacing[0] if spacing else (1.0,) * prediction.ndim)
    rules: list[Rule] = []
    together = [values] if len(values) > 1 else []
    for group in progress([*together, *([value] for value in values)], "Choosing post-processing"):
        if not cases.predicted & set(group):  # no rule changes anything
            continue
        candidates = _candidates(group, cases.volumes(group))
        found = zip(cases, cases.boxes, strict=True)
        means = np.mean([_scores(case, boxes, group, candidates, ignore) for case, boxes in found], axis=0)
        best = int(means.argmax())  # the first candidate changes nothing
        if means[best] >= means[0] + LEAST_GAIN:
            rules.append(candidates[best])
            cases = cases.after(candidates[best])
    return rules


class _Cases:
    """Predictions with their references, as small numbers, in memory or on the disk."""

    def __init__(self, memory: int | None) -> None:
        self.memory, self.shelf = memory, Shelf(memory)
        self.spacings: list[Sequence[float]] = []
        self.counts: list[np.ndarray] = []  # voxels of each value in the reference
        self.boxes: list[list[Boxes]] = []  # in the prediction and in the reference
        self.predicted: set[int] = set()

    def add(self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> None:
        self.predicted.update(np.flatnonzero(np.bincount(prediction.ravel())).tolist())
        self.counts.append(np.bincount(reference.ravel()))
        self.spacings.append(spacing)
        most = max(prediction.max(initial=0), reference.max(initial=0))
        maps = [labels.astype(np.min_scalar_type(most)) for labels in (prediction, reference)]
        self.boxes.append([ndimage.find_objects(labels) for labels in maps])
        self.shelf.append(dict(zip(("prediction", "reference"), maps, strict=True)))

    def __iter__(self) -> Iterator[Triple]:
        for entry, spacing in zip(self.shelf, self.spacings, strict=True):
            yield np.asarray(entry["prediction"]), np.asarray(entry["reference"]), spacing

    def volumes(self, group: Sequence[int]) -> list[float]:
        """Of all labels of a group together in each reference, in mm3."""
        return [
            float(counts[[v for v in group if v < len(counts)]].sum() * np.prod(spacing))
            for counts, spacing in zip(self.counts, self.spacings, strict=True)
        ]

    def after(self, rule: Rule) -> _Cases:
        """The same with predictions that a rule has changed: no label leaves its box, and none is new."""
        changed = copy(self)
        changed.shelf = Shelf(self.memory)
        for prediction, reference, spacing in self:
            done = apply_postprocessing(prediction, [rule], spacing)
            changed.shelf.append({"prediction": done, "reference": reference})
        return changed


def _candidates(group: list[int], volumes: Sequence[float]) -> list[Rule]:
    """No change first; then components by size, holes, and both. Holes of several labels belong to none of them."""
    median = float(np.median([v for v in volumes if v] or [0.0]))
    sizes = [{"min_mm3": float(f"{median * share:.3g}")} for share in SHARES if median]
    parts: list[Rule] = [{}, {"largest": True}, *sizes]
    holes: list[Rule] = [{}, {"fill_holes": True}] if len(group) == 1 else [{}]
    return [{"labels": group, **part, **hole} for hole, part in product(holes, parts)]


def _scores(
    case: Triple, boxes: Sequence[Boxes], group: list[int], candidates: Sequence[Rule], ignore: int | None
) -> list[float]:
    """Dice (mean over the group's labels) of one case under each candidate."""
    prediction, reference, spacing = case
    found = [own[value - 1] for own in boxes for value in group if value <= len(own) and own[value - 1]]
    if not found:
        return [1.0] * len(candidates)
    box = box_around(found, prediction.shape)  # beyond it nothing can change
    inside, truth = prediction[box], reference[box]
    done = (apply_postprocessing(inside, [candidate], spacing) for candidate in candidates)
    known = slice(None) if ignore is None else truth != ignore
    return [float(np.mean(dice_of_values(labels[known], truth[known], group))) for labels in done]


def _cleaned(mask: np.ndarray, rule: Rule, spacing: Sequence[float] | None) -> np.ndarray:
    """The mask (*S) after one rule; voxels that touch by a corner are one component."""
    if rule.get("fill_holes"):
        mask = ndimage.binary_fill_holes(mask)
    smallest = rule.get("min_mm3") or 0
    if not rule.get("largest") and not smallest:
        return mask
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    voxel = float(np.prod(spacing)) if spacing is not None else 1.0
    kept = sizes * voxel >= smallest
    if rule.get("largest"):
        kept &= np.arange(count + 1) == sizes.argmax()
    kept[0] = False
    return kept[components]
