"""The numbers in label maps: which there are, and whether they are what the data set declares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kanseg.data.cases import Case, Dataset, few, label_path, noted
from kanseg.data.class_names import called, shared_names
from kanseg.data.colours import colour_names, require_classes
from kanseg.data.images import FULL, label_from, read_image
from kanseg.data.labels import IGNORE, given_regions, known_values, unions, value_counts
from kanseg.data.pictures import palette_numbers
from kanseg.data.suffixes import LOSSY, suffix_of
from kanseg.errors import UserError
from kanseg.progress import progress

MOST_VALUES = 1000  # distinct numbers in a label file; more is a picture, not a label map
GREY = 0x010101  # times a level of grey: its code as a colour
MOST_EDGE_VALUES = 16  # of a mask of 0 and 255; one with more values was resized
TWO_WAYS, BESIDE = "0 and 1, 0 and 255", "255 beside classes"  # what `mixed_masks` finds
ValuesSeen = Callable[[Case], tuple[int, ...] | None]  # values in the label of a case, where they are known


def with_values(
    dataset: Dataset,
    regions: Mapping[str, Sequence[int]] | None = None,
    seen: ValuesSeen = lambda case: None,
) -> Dataset:
    """A data set that was listed, after a look into every label whose values were not `seen`; see `read_dataset`."""
    declared = set(known_values(dataset))
    if regions:
        dataset = replace(dataset, **given_regions(regions))
        if not dataset.regions:  # nothing but what to ignore was given
            pairs = zip(dataset.label_names, dataset.label_values, strict=True)
            kept = {value: name for name, value in pairs if value != dataset.ignore_value}
            dataset = replace(dataset, label_names=tuple(kept.values()), label_values=tuple(kept))
    _require_files(dataset)
    dataset = _with_label_values(dataset, seen)
    named = {value for values in (regions or {}).values() for value in values}
    foreign = named - declared - {value for case in dataset.cases for value in case.values}
    if foreign:
        raise UserError(
            f"The regions name {sorted(foreign)}, values that no label of {dataset.root} has. Correct them."
        )
    return dataset


def _require_files(dataset: Dataset) -> None:
    for case in dataset.cases:
        if case.label is None:
            raise UserError(
                f"Case '{case.id}' of {dataset.root} has no label for {case.images[0]}. Add it to the list, or take "
                "the case out of the training list."
            )
        for path in (*case.images, case.label):
            if not path.exists():
                raise UserError(
                    f"Case '{case.id}' of {dataset.root} needs {path}, which is not there. Put it there, or take the "
                    "case out of the list."
                )


def _values_in(path: Path, spatial_dims: int, palette: dict[int, int]) -> set[int]:
    """Numbers in a label file; refuse what only looks like one; `palette` is that of the others."""
    image = read_image(path, spatial_dims)
    label = label_from(image)
    require_classes(image, palette)
    values = np.array(list(value_counts(label)))
    if len(values) > MOST_VALUES or values.min(initial=0) < 0:
        raise UserError(
            f"{path} is no label map: it has {len(values)} different values from {values.min()} to {values.max()}. "
            "Expected are few whole numbers from 0; is it an image?"
        )
    if suffix_of(path) in LOSSY and len(values) > 2:
        raise UserError(
            f"{path} has {len(values)} different values because JPEG changes numbers. Save labels as PNG."
        )
    if has_soft_edges(label, values):
        raise UserError(
            f"{path} has {len(values)} different values, mostly 255, as a resized mask has. Write two values, or "
            "let kanseg doctor DATA --fix OUT split them at the middle."
        )
    return {int(value) for value in values}


def has_soft_edges(label: np.ndarray, values: np.ndarray) -> bool:
    """Whether a label, of these values, is a mask of 0 and 255 with many numbers between them at its border."""
    if len(values) <= MOST_EDGE_VALUES or values[0] != 0 or values[-1] != FULL:
        return False
    return bool(np.count_nonzero(label > FULL / 2) > np.count_nonzero(label) / 2)


def mixed_masks(cases: Sequence[Case]) -> tuple[str, str]:
    """Whether labels hold 255 beside other values, or are masks of 0 and 255 in part: `BESIDE`, `TWO_WAYS` or ""."""
    beside = [case for case in cases if {FULL} < set(case.values) - {0}]
    if beside and 2 * max({v for case in cases for v in case.values} - {FULL}) + 1 < FULL:  # no level of grey
        who = f"{len(beside)} labels have 255 beside other classes"
        return BESIDE, f"{who}: if it marks what does not count, give --regions {IGNORE}={FULL}"
    full = [case.id for case in cases if set(case.values) - {0} == {FULL}]
    others = sorted({value for case in cases if case.id not in full for value in case.values} - {0})
    if not full or not others or FULL in others:
        return "", ""
    who = f"labels of {few(full, 3)} have the values 0 and 255, those of others 0 and {few([*map(str, others)])}"
    return (
        (TWO_WAYS, f"{who}: two ways to write one mask")
        if others == [1]
        else (BESIDE, f"{who}: is 255 a class of its own?")
    )


def _with_label_values(dataset: Dataset, seen: ValuesSeen) -> Dataset:
    """Look into the label files: which values stand there, and do they fit what is declared."""
    declared = set(known_values(dataset)) if dataset.label_values else set()
    accepted = declared | ({dataset.ignore_value} - {None})
    cases: list[Case] = []
    palette: dict[int, int] = {}
    for case in progress(dataset.cases, "Reading labels"):
        values = set(seen(case) or _values_in(label_path(case), dataset.spatial_dims, palette))
        if declared and not values <= accepted:
            raise UserError(undeclared(label_path(case), dataset, values - accepted))
        cases.append(replace(case, values=tuple(sorted(values))))
    if not declared:
        kind, said = mixed_masks(cases)
        if kind == TWO_WAYS:
            raise UserError(
                f"In {dataset.root}, {said}. Write all in one, or let kanseg doctor DATA --fix OUT do it."
            )
        dataset = noted(dataset, *([said] if kind == BESIDE and dataset.ignore_value != FULL else []))
        values_in_order = tuple(sorted({0}.union(*(case.values for case in cases)) - {dataset.ignore_value}))
        known = colour_names(dataset.root)
        colours = {value: palette.get(value, GREY * value) for value in values_in_order[1:]}
        by_colour = {value: known[code] for value, code in colours.items() if known.get(code)}
        told, several = shared_names(map(label_path, cases))
        if several:
            said = f"headers of label maps give several names to the values {few([*map(str, several)])}"
            dataset = noted(dataset, f"{said}, which are called by their numbers")
        names = called(values_in_order[1:], told | by_colour)
        dataset = replace(dataset, label_names=("background", *names), label_values=values_in_order)
    if len(dataset.label_values) < 2:
        raise UserError(f"The labels of {dataset.root} hold the background alone; there is nothing to learn.")
    return replace(dataset, cases=tuple(cases), notes=(*dataset.notes, *_label_notes(dataset)))


def undeclared(path: Path, dataset: Dataset, foreign: Collection[int]) -> str:
    """What is wrong with a label that has values which the data set does not declare, and what to do."""
    accepted = sorted({*known_values(dataset), dataset.ignore_value} - {None})  # type: ignore[type-var]
    where = "the regions do not name" if dataset.regions else "dataset.json does not declare"
    said = f"{path} has the values {sorted(foreign)[:5]}, which {where} ({accepted} are known). "
    numbers = palette_numbers(path)
    if numbers and set(numbers) <= set(accepted):
        return said + (
            f"They are the greys of a palette, whose numbers in this file are {numbers}. If those are meant, save the "
            "labels without a palette; if not, declare the greys."
        )
    return said + "Declare them, or correct the label."


def _label_notes(dataset: Dataset) -> list[str]:
    notes = []
    if dataset.regions:
        shown = "; ".join(
            f"{name}: {list(values)}, painted as {value}"
            for name, values, value in zip(
                dataset.label_names[1:], dataset.regions[1:], dataset.label_values[1:], strict=True
            )
        )
        notes.append(f"regions, each learnt for itself and painted in this order: {shown}")
    elif dataset.label_values != tuple(range(len(dataset.label_values))):
        shown = few([f"{value} -> {i}" for i, value in enumerate(dataset.label_values)])
        notes.append(f"label values are mapped for training ({shown}) and mapped back in every output")
    if together := unions(dataset):
        shown = "; ".join(f"{name}: {list(values)}" for name, values in together.items())
        notes.append(f"scored beside the classes, but no part of the mean: {shown}")
    if dataset.ignore_value is not None:
        notes.append(
            f"voxels of the value {dataset.ignore_value} (ignore) count neither in the loss nor in scores"
        )
    return notes
