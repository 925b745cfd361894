"""Cases of a data set compared with each other: copies, patients, beginnings of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kanseg.data.cases import Case
from kanseg.data.convert import Sample
from kanseg.data.digests import content_digest, near_duplicates, thumbnail
from kanseg.data.findings import Finding
from kanseg.data.headers import header_tags
from kanseg.data.labels import value_counts

SIDES = re.compile(r"^(.*?)[_-]?(left|right|L|R)$")
NUMBERED = re.compile(r"^(\D*\d[^_-]*)[_-]")  # slide1 of slide1_x0_y0, patient001 of patient001_frame01
PATIENT_ID = "0010|0020"


class Seen:
    """What is kept of each case to compare it with the others."""

    def __init__(self) -> None:
        self.images: dict[str, list[str]] = {}  # digest -> cases
        self.labels: dict[str, list[str]] = {}
        self.label_of: dict[str, str] = {}
        self.thumbnails: dict[str, np.ndarray] = {}
        self.patients: dict[str, list[str]] = {}
        self.pairs: list[tuple[str, str]] = []
        self.contradicting: set[str] = set()

    def add(self, case: Case, sample: Sample) -> tuple[int, ...]:
        """Take a case in; the values of its label."""
        assert sample.label is not None
        self.images.setdefault(content_digest(sample.image.array), []).append(case.id)
        self.label_of[case.id] = content_digest(sample.label)
        if sample.label.any():
            self.labels.setdefault(self.label_of[case.id], []).append(case.id)
        self.thumbnails[case.id] = thumbnail(sample.image.array)
        if case.images[0].is_dir() and (patient := _patient_of(case.images[0])):
            self.patients.setdefault(patient, []).append(case.id)
        return tuple(value_counts(sample.label))


def compare(cases: Sequence[Case], seen: Seen, findings: list[Finding]) -> None:
    """Compare the cases with each other."""
    same: set[tuple[str, str]] = set()
    for first, *others in seen.images.values():
        for other in others:
            same.add((first, other))
            if seen.label_of[first] == seen.label_of[other]:
                findings.append(Finding("duplicate", other, f"image and label are those of '{first}'"))
            else:
                seen.contradicting |= {first, other}
                why = f"the image is that of '{first}', but its label is another"
                findings.append(Finding("contradicting duplicates", other, why))
    groups = {case.id: case.group for case in cases}
    for one, other in near_duplicates(seen.thumbnails):
        if (one, other) not in same and groups[one] != groups[other]:
            seen.pairs.append((one, other))
            why = f"the image is that of '{one}' but for noise, size or compression"
            findings.append(Finding("near duplicate", other, why))
    for digest, (first, *others) in seen.labels.items():
        for other in others:
            if not any({first, other} <= set(pair) for pair in same) and (first, other) not in seen.pairs:
                why = f"its label is voxel for voxel that of '{first}', the images differ"
                findings.append(Finding("copied label", other, f"{why} ({digest[:8]})"))
    for first, *others in seen.patients.values():
        for other in others:
            if groups[first] != groups[other]:
                seen.pairs.append((first, other))
                findings.append(Finding("same patient", other, f"its DICOM patient ID is that of '{first}'"))
    _sides(cases, findings)
    _beginnings(cases, findings)


def _sides(cases: Sequence[Case], findings: list[Finding]) -> None:
    """Hint at pairs such as 01L and 01R that are not known to be one patient."""
    sides: dict[str, list[str]] = {}
    for case in cases:
        if case.group == case.id and (match := SIDES.match(case.id)):
            sides.setdefault(match[1], []).append(case.id)
    pairs = [ids for ids in sides.values() if len(ids) > 1]
    if pairs:
        why = f"{len(pairs)} pairs such as {' and '.join(pairs[0])} may be one patient each; give --id-pattern then"
        findings.append(Finding("left and right", pairs[0][0], why))


def _beginnings(cases: Sequence[Case], findings: list[Finding]) -> None:
    """Hint at tiles of a slide or frames of a patient by their names, where no patient is known."""
    named = [NUMBERED.match(case.id) for case in cases if case.group == case.id]
    first = [match[1] for match in named if match]
    if len(first) == len(cases) >= 2 * len(set(first)) > 2:
        why = (
            f"{len(cases)} images have {len(set(first))} beginnings of names such as {first[0]}; if each is a patient "
            f"or a slide, give --id-pattern '{NUMBERED.pattern}', or images of one will be trained on and validated on"
        )
        findings.append(Finding("beginnings of names", "", why))


def _patient_of(folder: Path) -> str:
    """DICOM patient ID of a series, "" where there is none."""
    for file in sorted(folder.iterdir()):
        try:
            return header_tags(file).get(PATIENT_ID, "").strip()
        except RuntimeError:
            continue
    return ""
