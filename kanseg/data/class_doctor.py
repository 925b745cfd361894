"""The doctor for images with classes: what is wrong with them, image by image, and between the parts of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kanseg.data.cases import Case
from kanseg.data.class_copies import Pair, across_parts, copies, patients_across
from kanseg.data.class_plan import as_channels, uneven
from kanseg.data.doctor import Diagnosis
from kanseg.data.findings import Finding
from kanseg.data.image_classes import ImageClasses, read_classes
from kanseg.errors import UserError
from kanseg.progress import progress

FEWEST = 5  # patients a class: as many as there are folds


def diagnose_classes(path: Path, *, id_pattern: str | None = None) -> Diagnosis:
    """Look at every image of a data set with classes; nothing of it is repaired."""
    try:
        dataset = read_classes(path, id_pattern=id_pattern)
    except UserError as error:
        return Diagnosis(path, "images with classes", 0, [Finding("layout", "", str(error))])
    cases = [*dataset.cases, *dataset.test_cases]
    findings = [found for case in progress(cases, "Examining") for found in _of_image(case, dataset)]
    same = None
    if all(found.kind != "unreadable image" for found in findings):
        same = copies(dataset)
        findings += _of_copies(dataset, same)
    if shared := patients_across(dataset):
        findings.append(Finding("patients in two parts", "", shared))
    findings += _of_classes(dataset)
    return Diagnosis(path, dataset.layout, len(cases), findings, copies=same)


def _of_image(case: Case, dataset: ImageClasses) -> Iterator[Finding]:
    try:
        image = dataset.read(case)
        as_channels(image, len(dataset.channel_names))
    except UserError as error:
        yield Finding("unreadable image", case.id, str(error))
        return
    if image.ndim != dataset.spatial_dims + 1:
        why = f"it is {image.ndim - 1}D, the others are {dataset.spatial_dims}D"
        yield Finding("unreadable image", case.id, why)
    elif not np.isfinite(image).all():
        yield Finding("values not finite", case.id, f"{int((~np.isfinite(image)).sum())} are NaN or infinite")
    elif image.min() == image.max():
        yield Finding("constant image", case.id, f"it has the value {image.flat[0]:g} everywhere")


def _of_copies(dataset: ImageClasses, pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Copies within a part, which a split keeps together, and what they contradict."""
    apart = set(across_parts(dataset, pairs))
    values = {case.id: case.values for case in (*dataset.cases, *dataset.test_cases)}
    for one, other in pairs:
        kind = "copy in another part" if (one, other) in apart else "copy"
        if values[one] != values[other]:
            kind = "copy with another class"
        yield Finding(
            kind, other, f"the image is that of '{one}', perhaps but for noise, size or compression"
        )


def _of_classes(dataset: ImageClasses) -> Iterator[Finding]:
    names: Sequence[str] = dataset.label_names
    if not dataset.splits:
        for number, name in enumerate(names):
            patients = {case.group for case in dataset.cases if number in case.values}
            if len(patients) < FEWEST:
                why = f"'{name}' has images of {len(patients)} patients: some of {FEWEST} folds validate without it"
                yield Finding("few images of a class", "", why)
    if said := uneven(dataset):
        yield Finding("uneven classes", "", said)
