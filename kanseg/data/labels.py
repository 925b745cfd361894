"""What the numbers in label files mean: classes, regions that overlap, and voxels that nobody annotated.

The grammar is nnU-Net's: {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
with `regions_class_order` [1, 2, 3]; the Decathlon's {"1": "organ"} is read as well. Regions are learnt one by one
(sigmoid outputs) and painted in their order, the later over the earlier, each with its own value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kanseg.errors import UsageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = "ignore"
# Parts of a glioma, and what stands beside it, as the years of BraTS and the Decathlon name them.
GLIOMA = {
    "edema": re.compile(r"\b(o?edema|ed|snfh)\b"),
    "core": re.compile(r"\b(necro\w*|ncr|netc?|non-?\s?enhanc\w*)\b"),
    "enhancing": re.compile(r"(?<!non[- ])\b(enhanc\w*|et)\b"),
    "beside": re.compile(r"\b(resection cavity|rc)\b"),
}
UNKNOWN = -1  # class number of voxels that nobody annotated
COUNTED = 1 << 20  # voxels at a time, for counting makes numbers of eight bytes
LARGEST = 1 << 16  # value that is counted by its place; others are sorted, which takes longer


class Labels(Protocol):
    """What a data set and a plan know of their labels.

    Attributes:
        label_names: name of each class, the background first.
        label_values: value that is written for each class, and read for it where there are no regions.
        regions: values in the files that belong to each class; empty where each class is the one of its value.
        ignore_value: value of voxels that count neither in the loss nor in a score.
    """

    @property
    def label_names(self) -> Sequence[str]: ...
    @property
    def label_values(self) -> Sequence[int]: ...
    @property
    def regions(self) -> Sequence[Sequence[int]]: ...
    @property
    def ignore_value(self) -> int | None: ...


def parse_labels_of(described: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """Fields of a `Dataset` from `labels`, `regions` and `regions_class_order` of a dataset.json.

    Raises:
        UserError: a class without a name or value of its own, or regions whose order of painting is not clear.
    """
    labels: dict[str, int | list[int]] = {}
    for key, value in described["labels"].items():
        name, number = (value, key) if re.fullmatch(r"-?\d+", str(key)) else (key, value)
        labels[str(name)] = _number(source, str(name), number, labels)
    ignore = labels.pop(IGNORE, None)
    if isinstance(ignore, list):
        raise UserError(f"{source}: '{IGNORE}' is one value, not {ignore}.")
    if described.get("regions"):
        labels = {name: labels[name] for name in labels if labels[name] == 0} | dict(described["regions"])
    if not any(isinstance(value, list) for value in labels.values()):
        names = {int(value): name for name, value in labels.items()}  # type: ignore[arg-type]
        names.setdefault(0, "background")
        values = sorted(names)
        return {
            "label_names": tuple(names[value] for value in values),
            "label_values": tuple(values),
            "ignore_value": ignore,
        }
    return {**regions_of(labels, described.get("regions_class_order"), source), "ignore_value": ignore}


def regions_of(labels: Mapping[str, Any], order: Sequence[int] | None, source: Path | str) -> dict[str, Any]:
    """Fields of a `Dataset` from regions by name; without `order` each is painted with a value of its own."""
    named = {name: _whole_numbers(source, name, value) for name, value in labels.items()}
    background = next((name for name, values in named.items() if values == (0,)), "background")
    named.pop(background, None)
    if order is None:
        later = [set().union(*map(set, list(named.values())[i + 1 :])) for i in range(len(named))]
        own = [sorted(set(values) - others) for values, others in zip(named.values(), later, strict=True)]
        if not all(own):
            hidden = list(named)[own.index([])]
            raise UserError(
                f"{source}: region '{hidden}' would be painted over by those after it. List the large regions before "
                "the small ones, or give regions_class_order, the value to paint for each."
            )
        order = [values[0] for values in own]
    if len(order) != len(named) or len(set(order)) != len(order) or 0 in order:
        raise UserError(
            f"{source}: regions_class_order {list(order)} needs one value of its own for each of the regions "
            f"{', '.join(named)}."
        )
    for (name, values), value in zip(named.items(), order, strict=True):
        if value not in values:
            raise UserError(
                f"{source}: region '{name}' of the values {list(values)} cannot be painted as {value}, none of "
                "them. Correct regions_class_order."
            )
    return {
        "label_names": (background, *named),
        "label_values": (0, *(int(value) for value in order)),
        "regions": ((0,), *named.values()),
    }


def given_regions(regions: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Fields of a `Dataset` from regions that a user names; one called ignore is the value that does not count.

    >>> given_regions({"ignore": [255]})
    {'ignore_value': 255}
    """
    others, found = dict(regions), {}
    if ignored := others.pop(IGNORE, ()):
        if len(ignored) > 1:
            raise UserError(f"regions: '{IGNORE}' is one value, not {list(ignored)}.")
        found = {"ignore_value": ignored[0]}
    return found | (regions_of({"background": 0, **others}, None, "regions") if others else {})


def parse_regions(text: str) -> dict[str, list[int]]:
    """Regions from the command line.

    >>> parse_regions("whole=1+2+4,enhancing=4")
    {'whole': [1, 2, 4], 'enhancing': [4]}
    """
    regions = {}
    for part in text.split(","):
        name, _, values = part.partition("=")
        if not name.strip() or not re.fullmatch(r"\d+(\+\d+)*", values.strip()):
            raise UsageError(f"Regions '{text}' are not of the form whole=1+2+4,enhancing=4.")
        regions[name.strip()] = [int(value) for value in values.split("+")]
    return regions


def known_values(labels: Labels) -> list[int]:
    """Values of the annotated voxels in the files, rising: class number i of `class_numbers` is entry i."""
    return sorted(
        {0, *(v for region in labels.regions for v in region)} if labels.regions else labels.label_values
    )


def class_values(labels: Labels) -> dict[str, tuple[int, ...]]:
    """Values in the files that belong to each class but the background, by name."""
    regions = labels.regions or [(value,) for value in labels.label_values]
    return dict(zip(labels.label_names[1:], map(tuple, regions[1:]), strict=True))


def unions(labels: Labels) -> dict[str, tuple[int, ...]]:
    """Structures that are scored beside the classes they consist of, by name; of most data none.

    Where the classes are the parts of a glioma, edema, enhancing tumour, necrosis or non-enhancing tumour, and nothing
    else but a resection cavity, these are BraTS's whole tumour and tumour core.

    Source: Menze et al. 2015, IEEE TMI 34(10), 1993-2024, section III.
    """
    if labels.regions:
        return {}
    parts: dict[str, set[int]] = {part: set() for part in GLIOMA}
    for name, values in class_values(labels).items():
        found = [part for part, said in GLIOMA.items() if said.search(name.lower())]
        if len(found) != 1:
            return {}
        parts[found[0]] |= set(values)
    parts.pop("beside")
    if not all(parts.values()):
        return {}
    core = parts["core"] | parts["enhancing"]
    return {"whole tumour": tuple(sorted(core | parts["edema"])), "tumour core": tuple(sorted(core))}


def painted(label: np.ndarray, labels: Labels) -> np.ndarray:
    """A label map (*S) in the values of predictions: regions painted over each other in their order."""
    if not labels.regions:
        return label
    result = np.zeros_like(label)
    for region, value in zip(labels.regions[1:], labels.label_values[1:], strict=True):
        result[np.isin(label, region)] = value
    return result


def class_numbers(label: np.ndarray, labels: Labels, path: Path | str) -> np.ndarray:
    """Values in a file -> places in `known_values`, (*S) float32, `UNKNOWN` where the ignore label is.

    Raises:
        UserError: a value that is not known.
    """
    known = known_values(labels)
    foreign = sorted(value_counts(label).keys() - {*known, labels.ignore_value})
    if foreign:
        raise UserError(
            f"{path} has the values {foreign[:5]}, which the plan does not know (it has {known}). Correct the label, "
            "or plan again."
        )
    numbers = np.empty(label.shape, np.float32)
    for number, plane in enumerate(label):  # places of a whole volume have eight bytes each
        numbers[number] = np.where(plane == labels.ignore_value, UNKNOWN, np.searchsorted(known, plane))
    return numbers


def value_counts(label: np.ndarray) -> dict[int, int]:
    """How many voxels of a label map have each of its values, which rise.

    >>> value_counts(np.array([[2, 0], [2, 2]]))
    {0: 1, 2: 3}
    """
    if label.min(initial=0) < 0 or label.max(initial=0) > LARGEST:
        values, counts = np.unique(label, return_counts=True)
    else:
        flat, counts = label.ravel(), np.zeros(int(label.max(initial=0)) + 1, np.int64)
        for start in range(0, flat.size, COUNTED):
            counts += np.bincount(flat[start : start + COUNTED], minlength=len(counts))
        values = np.flatnonzero(counts)
        counts = counts[values]
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def targets(numbers: Tensor, labels: Labels) -> Tensor:
    """What the loss compares with: class numbers (1, *S) as they are, for regions memberships (K, *S); -1 unknown."""
    import torch  # here, for it takes longer than all that looking at data needs

    if not labels.regions:
        return numbers
    known = known_values(labels)
    table = torch.tensor([[float(value in region) for value in known] for region in labels.regions])
    table[0] = 1 - table[1:].amax(0)  # the background is what no region has
    table = torch.cat(
        [table, torch.full((len(table), 1), float(UNKNOWN))], dim=1
    )  # index -1 is the last column
    return table[:, numbers[0].long()]


def _number(source: Path | str, name: str, value: Any, labels: Mapping[str, Any]) -> int | list[int]:
    if isinstance(value, list):
        number: Any = list(_whole_numbers(source, name, value))
    else:
        number = int(value) if str(value).isdigit() else None
    if number is None or name in labels or number in labels.values():
        raise UserError(
            f"{source}: label '{name}' has the value {value!r}; each label needs a name and a whole number from 0 of "
            "its own, or a list of them (a region)."
        )
    return number


def _whole_numbers(source: Path | str, name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(str(v).isdigit() for v in values):
        raise UserError(f"{source}: region '{name}' is {value!r}; a list of whole numbers is expected.")
    return tuple(sorted({int(v) for v in values}))
