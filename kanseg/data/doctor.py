"""The doctor: what is wrong with a data set, explained case by case, and a repaired copy of it.

The source is only read. `diagnose` looks at every file; `Diagnosis.fix` writes what can be repaired as a data set of
its own, without the cases that cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from kanseg.data.cases import PATIENTS_ALIKE, PATIENTS_TESTED, Case, Dataset, few
from kanseg.data.class_names import called, shared_names
from kanseg.data.colours import colour_names, label_colours, numbered
from kanseg.data.convert import Sample, convert, on_own_grid, write_dataset
from kanseg.data.digests import content_digest, joined, near_duplicates, thumbnail
from kanseg.data.formats import list_dataset
from kanseg.data.headers import header_tags, itk_header
from kanseg.data.images import (
    FULL,
    GRID_TOLERANCE,
    Image,
    colour_name,
    grid_distance,
    header_dtype,
    load_image,
    several_channels,
)
from kanseg.data.labels import known_values, value_counts
from kanseg.data.lists import LISTS
from kanseg.data.pairs import BY_CLASS, UNUSED
from kanseg.data.patients import PATIENTS_IN_PART
from kanseg.data.pictures import is_turned
from kanseg.data.segmentations import are_segmentations, with_segments
from kanseg.data.suffixes import LOSSY, SEGMENTS, SUFFIXES_2D, SUFFIXES_NIFTI, suffix_of
from kanseg.data.unlabelled import find_images
from kanseg.data.values import BESIDE, MOST_VALUES, TWO_WAYS, has_soft_edges, mixed_masks, undeclared
from kanseg.errors import UserError
from kanseg.progress import progress

ERROR, WARNING, NOTE = "error", "warning", "note"
LEFT_OUT = "the case is left out"
# What can be found: how bad it is (an error stops a training), and what a repair does about it, if anything.
KINDS: dict[str, tuple[str, str | None]] = {
    "layout": (ERROR, None),
    "patients": (ERROR, None),
    "patients in part": (WARNING, None),
    "patients alike": (WARNING, None),
    "patients in the test": (WARNING, None),
    "same name": (ERROR, None),
    "missing label": (ERROR, LEFT_OUT),
    "missing file": (ERROR, LEFT_OUT),
    "missing channel": (ERROR, LEFT_OUT),
    "no channel in the name": (ERROR, LEFT_OUT),
    "several series": (ERROR, LEFT_OUT),
    "segments": (ERROR, "they are joined by the names of their segments"),
    "label without image": (WARNING, "it is left out"),
    "several masks": (ERROR, "they are merged"),
    BY_CLASS: (ERROR, "they are numbered in the order of their folders' names"),
    "masks overlap": (WARNING, "the later class has what they share"),
    "unreadable": (ERROR, LEFT_OUT),
    "other dimension": (ERROR, LEFT_OUT),
    "other channels": (ERROR, LEFT_OUT),
    "not finite": (ERROR, "such voxels take the lowest finite value"),
    "4D with one channel": (NOTE, "it is saved as 3D"),
    "crooked axes": (WARNING, "they are turned to right angles"),
    "sheared axes": (WARNING, None),
    "extreme spacing": (WARNING, None),
    "turned by EXIF": (WARNING, None),
    "constant image": (WARNING, None),
    "different grids": (ERROR, LEFT_OUT),
    "grids differ by rounding": (ERROR, "the label takes the grid of its image"),
    "no label map": (ERROR, LEFT_OUT),
    "colours": (ERROR, "they are numbered, black is the background"),
    "colours for values": (ERROR, None),
    "lossy label": (ERROR, "it is split at the middle"),
    "soft edges": (WARNING, "it is split at the middle"),
    "float label": (NOTE, "it is saved as whole numbers"),
    "undeclared values": (ERROR, LEFT_OUT),
    "empty label": (WARNING, None),
    "class without a voxel": (WARNING, None),
    "no labels": (WARNING, None),
    "nothing to learn": (ERROR, None),
    "0 and 255": (NOTE, "255 becomes 1"),
    TWO_WAYS: (ERROR, "255 becomes 1"),
    BESIDE: (WARNING, None),
    "gaps in labels": (NOTE, "they are numbered 0, 1, 2, ..."),
    "duplicate": (ERROR, LEFT_OUT),
    "contradicting duplicates": (ERROR, "both are left out"),
    "near duplicate": (WARNING, "they become one patient"),
    "same patient": (WARNING, "they become one patient"),
    "folds share a patient": (ERROR, "the folds of the list are left aside"),
    "copied label": (WARNING, None),
    "left and right": (NOTE, None),
    "beginnings of names": (WARNING, None),
    # of images with classes (`kanseg.data.class_doctor`)
    "unreadable image": (ERROR, None),
    "values not finite": (ERROR, None),
    "patients in two parts": (ERROR, None),
    "copy with another class": (WARNING, None),
    "copy in another part": (WARNING, None),
    "few images of a class": (WARNING, None),
    "copy": (NOTE, None),
    "uneven classes": (NOTE, None),
}
TOLD = {  # kinds that the notes of a data set tell, by their words
    "label without image": UNUSED,
    "patients in part": PATIENTS_IN_PART,
    "patients alike": PATIENTS_ALIKE,
    "patients in the test": PATIENTS_TESTED,
}
CROOKED = 1e-4  # of the angles' cosines: what rounding leaves, and readers such as ITK refuse
SHEARED = 0.02
ROUNDING = 0.5  # of the finest voxel, between corners of two grids that are meant to be one
THINNEST, THICKEST, MOST_ANISOTROPIC = 0.01, 25.0, 20.0  # mm, mm, ratio
SIDES = re.compile(r"^(.*?)[_-]?(left|right|L|R)$")
NUMBERED = re.compile(r"^(\D*\d[^_-]*)[_-]")  # slide1 of slide1_x0_y0, patient001 of patient001_frame01
PATIENT_ID = "0010|0020"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind in `KINDS`, the case, what was found in words."""

    kind: str
    case: str
    message: str

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]

    @property
    def repair(self) -> str | None:
        return KINDS[self.kind][1]


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
    found.colours = label_colours([p for case in dataset.cases for p in _labels_of(case, masks)])
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
    samples = _Seen()
    kept = []
    for case in progress(dataset.cases, "Examining"):
        sample = None
        if not _hopeless(findings, case.id):
            own = masks.get(case.id, ())
            sample = examine(case, dataset, own, findings, found.colours, found.classes)
        if sample is not None:
            kept.append(replace(case, values=samples.add(case, sample)))
    _across(kept, samples, dataset, findings)
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


def examine(
    case: Case,
    dataset: Dataset,
    masks: Sequence[Path],
    findings: list[Finding],
    colours: Sequence[int] = (),
    classes: Sequence[str] = (),
) -> Sample | None:
    """Read and repair one case; None where that cannot be. What is wrong is added to `findings`.

    Args:
        masks: its label files where there are several.
        colours: of all labels, where these are pictures in colour.
        classes: names of the folders of `masks`, where these say the class.
    """

    def note(kind: str, message: str) -> None:
        findings.append(Finding(kind, case.id, message))

    paths = _labels_of(case, {case.id: masks})
    for file in (*case.images, *paths):
        if not file.exists():
            note("missing file", f"{file} is not there")
            return None
    try:
        image = load_image(case.images)
        labels = [load_image(file) for file in paths]
    except UserError as error:
        note("different grids" if "different grids" in str(error) else "unreadable", str(error))
        return None
    repaired = _repaired_image(image, case, dataset, note)
    if repaired is None or not labels:
        return None
    numbers = [_repaired_label(label, (image, repaired), colours, note) for label in labels]
    usable = [number for number in numbers if number is not None]
    if len(usable) < len(numbers):
        return None
    if classes:
        if (np.sum([mask > 0 for mask in usable], axis=0) > 1).any():
            note("masks overlap", f"{few([str(path) for path in paths], 3)} share voxels")
        places = [1 + classes.index(path.parent.name) for path in paths]
        usable = [np.where(mask > 0, place, 0) for mask, place in zip(usable, places, strict=True)]
    merged = np.max(usable, axis=0)
    if dataset.label_values:
        accepted = {*known_values(dataset), dataset.ignore_value}
        foreign = value_counts(merged).keys() - accepted
        if foreign:
            note("undeclared values", undeclared(paths[0], dataset, foreign))
            return None
    if not merged.any():
        note("empty label", f"{paths[0]} holds the background alone")
    return Sample(case.id, repaired, merged, case.group)


def _labels_of(case: Case, masks: Mapping[str, Sequence[Path]]) -> list[Path]:
    return list(masks.get(case.id) or ([case.label] if case.label else []))


class _Seen:
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


def _across(cases: Sequence[Case], seen: _Seen, dataset: Dataset, findings: list[Finding]) -> None:
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


def _repaired_image(image: Image, case: Case, dataset: Dataset, note: Any) -> Image | None:
    if image.spatial_dims != dataset.spatial_dims:
        note(
            "other dimension",
            f"{image.path} is {image.spatial_dims}D, the others are {dataset.spatial_dims}D",
        )
        return None
    if len(image.array) != len(dataset.channel_names):
        expected = f"{len(dataset.channel_names)} ({', '.join(dataset.channel_names)})"
        note("other channels", f"{image.path} has {len(image.array)} channels, expected are {expected}")
        return None
    bad = ~np.isfinite(image.array)
    if bad.all():
        note("unreadable", f"{image.path} has no finite voxel")
        return None
    if bad.any():
        note("not finite", f"{image.path} has {int(bad.sum())} voxels that are NaN or infinite")
        image = replace(image, array=np.where(bad, image.array[~bad].min(), image.array))
    if any(map(is_turned, case.images)):
        said = "is to be shown turned (EXIF), and is taken as it is stored; was its label drawn so?"
        note("turned by EXIF", f"{image.path} {said}")
    if image.array.min() == image.array.max():
        note("constant image", f"{image.path} has the value {image.array.flat[0]:g} everywhere")
    if any(_is_4d_with_one(path) for path in case.images):
        note("4D with one channel", f"{image.path} is stored as 4D with a last axis of length 1")
        image = on_own_grid(image)
    return image if image.spatial_dims == 2 else _straightened(image, note)


def _straightened(image: Image, note: Any) -> Image:
    """Look at the grid: spacing, and angles between the axes."""
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if (
        spacing.min() < THINNEST
        or spacing.max() > THICKEST
        or spacing.max() / spacing.min() > MOST_ANISOTROPIC
    ):
        shown = " x ".join(f"{s:g}" for s in spacing)
        note("extreme spacing", f"{image.path} has voxels of {shown} mm; is the unit millimetres?")
    axes = image.affine[:3, :3] / spacing
    off = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if off < CROOKED:
        return image
    if off > SHEARED:
        note(
            "sheared axes",
            f"{image.path} has axes far from right angles (cosine {off:.3f}), as of a tilt",
        )
        return image
    note("crooked axes", f"{image.path} has axes that are not quite at right angles (cosine {off:.2g})")
    left, _, right = np.linalg.svd(axes)
    affine = image.affine.copy()
    affine[:3, :3] = left @ right * spacing
    middle = (np.array(image.array.shape[1:]) - 1) / 2
    affine[:3, 3] += (image.affine[:3, :3] - affine[:3, :3]) @ middle
    return on_own_grid(image, affine=affine)


def _is_4d_with_one(path: Path) -> bool:
    if suffix_of(path) in SUFFIXES_NIFTI:
        shape = nib.load(path).shape
    elif suffix_of(path) in SUFFIXES_2D or path.is_dir():
        return False
    else:
        shape = itk_header(path).GetSize()
    return len(shape) > 3 and shape[-1] == 1


def _repaired_label(
    label: Image, images: Sequence[Image], colours: Sequence[int], note: Any
) -> np.ndarray | None:
    """Whole numbers (*S) on the grid of the image (as it was, and repaired), or None."""
    image = images[0]
    distance = min(grid_distance(one, label) for one in images)
    finest = min(image.spacing)
    if distance > ROUNDING * finest:
        shapes = f"shapes {image.array.shape[1:]} and {label.array.shape[1:]}"
        what = shapes if np.isinf(distance) else f"corners are up to {distance:.3g} mm apart"
        note(
            "different grids",
            f"{label.path} does not lie on the grid of its image: {what}; resample one of them",
        )
        return None
    if distance > GRID_TOLERANCE:
        note("grids differ by rounding", f"{label.path} lies {distance:.3g} mm off the grid of its image")
    if colours and suffix_of(label.path) not in LOSSY:
        return numbered(label, dict(zip(colours, range(len(colours)), strict=True)))
    array = label.labels
    if len(array) > 1 and (array != array[0]).any():
        note("no label map", f"{label.path} has {several_channels(label)}")
        return None
    values = np.unique(array[0])
    if suffix_of(label.path) in LOSSY and len(values) > 2:
        note("lossy label", f"{label.path} has {len(values)} different values because JPEG changes numbers")
        return _split(array[0])
    if has_soft_edges(array[0], values):
        note(
            "soft edges",
            f"{label.path} has {len(values)} values, mostly {values[-1]:g}, as a resized mask has",
        )
        return _split(array[0])
    rounded = np.rint(values)
    if not np.isfinite(values).all() or np.abs(values - rounded).max() > 1e-3 or rounded.min() < 0:
        note(
            "no label map",
            f"{label.path} holds {values[0]:g} to {values[-1]:g}; whole numbers from 0 are expected",
        )
        return None
    if len(values) > MOST_VALUES:
        note("no label map", f"{label.path} has {len(values)} different values; is it an image?")
        return None
    dtype = header_dtype(label.path)
    if dtype is not None and np.issubdtype(dtype, np.floating):
        note("float label", f"{label.path} is stored as {dtype}")
    return np.rint(array[0]).astype(np.int32)


def _split(mask: np.ndarray) -> np.ndarray:
    """1 above the middle of a mask's values, 0 below."""
    return np.where(mask > (mask.min() + mask.max()) / 2, 1, 0).astype(np.int32)


def _patient_of(folder: Path) -> str:
    """DICOM patient ID of a series, "" where there is none."""
    for file in sorted(folder.iterdir()):
        try:
            return header_tags(file).get(PATIENT_ID, "").strip()
        except RuntimeError:
            continue
    return ""


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


def rows(found: Diagnosis, shown: int = 3) -> list[tuple[str, str, str, str]]:
    """For a table: severity, kind with its count, what was found (the first few), and the repair."""
    findings, root = found.findings, f"{found.source}/"
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    order: Mapping[str, int] = {severity: place for place, severity in enumerate((ERROR, WARNING, NOTE))}
    table = []
    for kind, group in sorted(by_kind.items(), key=lambda item: order[item[1][0].severity]):
        messages = [f"{f.case}: {f.message}" if f.case else f.message for f in group[:shown]]
        messages = [message.replace(root, "") for message in messages]
        if len(group) > shown:
            messages.append(f"and {len(group) - shown} more")
        count = f"{kind} ({len(group)})" if len(group) > 1 else kind
        table.append((group[0].severity, count, "\n".join(messages), group[0].repair or "not by kanseg"))
    return table
