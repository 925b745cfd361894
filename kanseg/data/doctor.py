"""The doctor: what is wrong with a data set, explained case by case, and a repaired copy of it.

The source is only read. `diagnose` looks at every file; `Diagnosis.fix` writes what can be repaired as a data set of
its own, without the cases that cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.alike import Seen, compare
from kanseg.data.cases import PATIENTS_ALIKE, PATIENTS_TESTED, Case, Dataset, few
from kanseg.data.class_names import called, shared_names
from kanseg.data.colours import colour_names, label_colours
from kanseg.data.convert import Sample, convert, write_dataset
from kanseg.data.digests import joined
from kanseg.data.examine import examine, labels_of
from kanseg.data.findings import ERROR, LEFT_OUT, Finding
from kanseg.data.formats import list_dataset
from kanseg.data.images import FULL, colour_name, load_image
from kanseg.data.labels import known_values
from kanseg.data.lists import LISTS
from kanseg.data.pairs import BY_CLASS, UNUSED
from kanseg.data.patients import PATIENTS_IN_PART
from kanseg.data.segmentations import are_segmentations, with_segments
from kanseg.data.suffixes import SEGMENTS
from kanseg.data.unlabelled import find_images
from kanseg.data.values import TWO_WAYS, mixed_masks
from kanseg.errors import UserError
from kanseg.progress import progress

TOLD = {  # kinds that the notes of a data set tell, by their words
    "label without image": UNUSED,
    "patients in part": PATIENTS_IN_PART,
    "patients alike": PATIENTS_ALIKE,
    "patients in the test": PATIENTS_TESTED,
}


@dataclass
class Diagnosis:
    """All findings of a data set, and what a repaired copy of it would hold.

    Attributes:
        dataset: with the cases that remain, in groups that are joined where images belong to one patient; None where
            nothing was recognised.
        masks: case -> its several label files.
        colours: of labels that are pictures in colour; a repaired label has their places here.
        classes: names of the folders that label files lie in by class; a repaired label has their places here, from 1.
        copies: pairs of images with classes that are the same; None where it was not looked.
    """

    source: Path
    layout: str
    cases: int
    findings: list[Finding] = field(default_factory=list)
    dataset: Dataset | None = None
    masks: dict[str, list[Path]] = field(default_factory=dict)
    colours: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    copies: list[tuple[str, str]] | None = None

    @property
    def mapped(self) -> dict[int, int]:
        """Values of labels that a repair changes."""
        return {FULL: 1} if any(finding.kind == TWO_WAYS for finding in self.findings) else {}

    @property
    def errors(self) -> list[Finding]:
        """What stops a training."""
        return [finding for finding in self.findings if finding.severity == ERROR]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = [{**asdict(f), "severity": f.severity, "repair": f.repair} for f in self.findings]
        kept = len(self.dataset.cases) if self.dataset else 0
        return {
            "source": str(self.source),
            "layout": self.layout,
            "cases": self.cases,
            "cases_after_repair": kept,
            "errors": len(self.errors),
            "findings": found,
        }

    def fix(self, out: Path | str) -> dict[str, Any]:
        """Write a repaired copy in the Decathlon's layout; see `kanseg.data.convert.write_dataset`.

        Raises:
            UserError: no case can be repaired, what is wrong concerns all cases, or `out` is not a new folder.
        """
        beyond = [finding for finding in self.errors if finding.repair is None]
        if beyond or self.dataset is None or not self.dataset.cases:
            why = beyond[0].message if beyond else "no case is left"
            raise UserError(f"{self.source} cannot be repaired: {why}")
        if are_segmentations(self.dataset.cases):
            return convert(self.dataset, out, "msd")
        return write_dataset(self.dataset, out, "msd", self._samples(self.dataset), consecutive=True)

    def _samples(self, dataset: Dataset) -> Iterator[Sample]:
        if self.mapped:  # the files have other values than the repaired ones
            dataset = replace(dataset, label_values=())
        for case in progress(dataset.cases, "Repairing"):
            sample = examine(case, dataset, self.masks.get(case.id, ()), [], self.colours, self.classes)
            if sample is None:
                raise UserError(f"{case.images[0]} has changed since it was examined. Start again.")
            assert sample.label is not None
            for value, other in self.mapped.items():
                sample.label[sample.label == value] = other
            yield sample


def diagnose(path: Path | str, *, id_pattern: str | None = None) -> Diagnosis:
    """Look at every image and label of a data set.

    Raises:
        UserError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}.")
    findings: list[Finding] = []
    masks: dict[str, list[Path]] = {}

    def note(kind: str, case: str, message: str, files: Sequence[Path] = ()) -> None:
        findings.append(Finding(kind, case, message))
        if kind in ("several masks", BY_CLASS):
            masks[case] = list(files)

    try:
        dataset = list_dataset(path, id_pattern=id_pattern, problem=note)
    except UserError as error:
        return _images_alone(path, str(error), findings)
    found = Diagnosis(path, dataset.layout, len(dataset.cases), findings, masks=masks)
    if are_segmentations(dataset.cases):
        try:
            found.dataset = with_segments(dataset)
        except UserError as error:
            findings.append(Finding("layout", "", str(error)))
        else:
            classes = few(found.dataset.label_names[1:])
            said = f"the labels are {SEGMENTS}, of {classes}; examine the copy with label maps, too"
            findings.append(Finding("segments", "", said))
        return found
    for kind, mark in TOLD.items():
        findings += [Finding(kind, "", said) for said in dataset.notes if mark in said]
    if any(finding.kind == BY_CLASS for finding in findings):
        found.classes = tuple(sorted({file.parent.name for files in masks.values() for file in files}))
        names = ("background", *found.classes)
        dataset = replace(dataset, label_names=names, label_values=tuple(range(len(names))))
    found.colours = label_colours([p for case in dataset.cases for p in labels_of(case, masks)])
    if found.colours:
        said = f"labels have the colours {few([*map(colour_name, found.colours)])} in place of numbers"
        if dataset.label_values:
            findings.append(
                Finding("colours for values", "", f"{said}; paint them with those of dataset.json")
            )
            return found
        findings.append(Finding("colours", "", said))
        known = colour_names(dataset.root)
        names = ("background", *(known.get(code, colour_name(code)) for code in found.colours[1:]))
        dataset = replace(dataset, label_names=names, label_values=tuple(range(len(names))))
    samples = Seen()
    kept = []
    for case in progress(dataset.cases, "Examining"):
        sample = None
        if not _hopeless(findings, case.id):
            own = masks.get(case.id, ())
            sample = examine(case, dataset, own, findings, found.colours, found.classes)
        if sample is not None:
            kept.append(replace(case, values=samples.add(case, sample)))
    compare(kept, samples, findings)
    out = {f.case for f in findings if f.repair == LEFT_OUT} | samples.contradicting
    groups = joined({case.id: case.group for case in kept}, samples.pairs)
    cases = tuple(replace(case, group=groups[case.id]) for case in kept if case.id not in out)
    if not dataset.label_values:
        kind, said = mixed_masks(cases)
        if kind:
            findings.append(Finding(kind, "", said))
        changed = found.mapped
        cases = tuple(replace(c, values=tuple(sorted({changed.get(v, v) for v in c.values}))) for c in cases)
    for number, fold in enumerate(dataset.splits):
        train, val = ({groups[case] for case in fold[part] if case in groups} for part in ("train", "val"))
        if shared := sorted(train & val):
            why = f"fold {number} of the list trains and validates on {few(shared, 3)}, one patient or copies each"
            findings.append(Finding("folds share a patient", "", why))
            dataset = replace(dataset, splits=())
    found.dataset = _labelled(dataset, cases)
    _of_labels(found.dataset, findings)
    return found


def _labelled(dataset: Dataset, cases: tuple[Case, ...]) -> Dataset:
    """The data set with these cases, and names for label values that nobody declared: those in headers, or numbers."""
    if not dataset.label_values:
        values = tuple(sorted({0}.union(*(case.values for case in cases))))
        told, _ = shared_names(case.label for case in cases if case.label)
        names = ("background", *called(values[1:], told))
        dataset = replace(dataset, label_names=names, label_values=values)
    return replace(dataset, cases=cases)


def _of_labels(dataset: Dataset, findings: list[Finding]) -> None:
    """Look at the values of all labels together."""
    found = sorted({0}.union(*(case.values for case in dataset.cases)) - {dataset.ignore_value})
    known = known_values(dataset)
    if dataset.cases and len(found) < 2:
        findings.append(Finding("nothing to learn", "", "all labels hold the background alone"))
    elif found == [0, 255]:
        findings.append(Finding("0 and 255", "", "masks have the values 0 and 255"))
    elif known != list(range(len(known))):
        findings.append(Finding("gaps in labels", "", f"label values are {few([*map(str, known)])}"))
    if missing := [value for value in known if value not in found and found[1:]]:
        said = f"declared, and in no label: {few([*map(str, missing)])}"
        findings.append(Finding("class without a voxel", "", said))


def _hopeless(findings: Sequence[Finding], case: str) -> bool:
    return any(finding.case == case and finding.repair == LEFT_OUT for finding in findings)


def _images_alone(path: Path, why: str, findings: list[Finding]) -> Diagnosis:
    """No layout with labels was recognised: say so, and whether the images that are there can be read."""
    try:
        cases = [] if path.suffix.lower() in LISTS else find_images(path)
    except UserError:
        cases = []
    findings.append(Finding("no labels" if cases and path.is_dir() else "layout", "", why))
    for case in progress(cases, "Examining"):
        try:
            image = load_image(case.images)
        except UserError as error:
            findings.append(Finding("unreadable", case.id, str(error)))
            continue
        if not np.isfinite(image.array).all():
            findings.append(
                Finding("not finite", case.id, f"{image.path} has voxels that are NaN or infinite")
            )
    return Diagnosis(path, "no layout that kanseg knows", len(cases), findings)
