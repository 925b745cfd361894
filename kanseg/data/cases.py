"""A data set: its cases, what their labels mean, and how what was found in files becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from kanseg.data.images import load_image
from kanseg.data.suffixes import SUFFIXES_2D, suffix_of
from kanseg.data.tables import alike
from kanseg.errors import UserError

COLOURS = ("red", "green", "blue")
LAYOUTS = (
    "a folder with dataset.json (Medical Segmentation Decathlon, nnU-Net), a folder with images/ and labels/ (or "
    "masks/), both also in train/, val/ and test/ or with these or other folders below, PASCAL VOC's and Cityscapes' "
    "folders, one folder with x and x_mask (or x_label), one folder per case with image (or a file for each channel) "
    "and label, a .csv or .tsv with the columns image and label, or a datalist .json of MONAI; an image may be a "
    "folder with a DICOM series"
)
PATIENTS_ALIKE = "may be one patient each"  # in a note on names
PATIENTS_TESTED = "have images to train on and test images"


@dataclass(frozen=True)
class Case:
    """One image: a file with all channels or one a channel; its label, and the patient it belongs to.

    `values` are those that stand in its label file, once `read_dataset` has looked. `previous` is the label map that
    the first stage of a cascade made of it.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    values: tuple[int, ...] = ()
    previous: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Labelled cases and what their numbers mean.

    Attributes:
        layout: what was recognised, in words.
        label_names, label_values, regions, ignore_value: see `kanseg.data.labels.Labels`.
        cases: with labels. `test_cases`: images alone, or with labels that nothing is trained on or chosen by.
        notes: what was detected or mapped.
        splits: that the data come with, each {"train": ids, "val": ids}; none: kanseg makes them.
        source: what `read_dataset` was given, and id_pattern with it: enough to read the same again.
    """

    name: str
    root: Path
    layout: str
    spatial_dims: int
    channel_names: tuple[str, ...]
    label_names: tuple[str, ...]
    label_values: tuple[int, ...]
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...]
    notes: tuple[str, ...]
    source: Path = Path()
    id_pattern: str | None = None
    regions: tuple[tuple[int, ...], ...] = ()
    ignore_value: int | None = None
    splits: tuple[Mapping[str, Sequence[str]], ...] = ()

    @property
    def sources(self) -> Sequence[Case]:
        """What the files of the data set are digested by."""
        return self.cases


Data = TypeVar("Data", bound=Dataset)

Problem = Callable[..., None]  # of kind, case and message of what is wrong, and files that belong to it


def refuse(kind: str, case: str, message: str, files: Sequence[Path] = ()) -> NoReturn:
    raise UserError(message)


def patient_notes(cases: Sequence[Case], tests: Sequence[Case]) -> list[str]:
    """What is odd about the patients of a data set: names that are nearly the same, and patients in the test."""
    notes = []
    if pairs := alike(case.group for case in cases):
        shown = few([" and ".join(f"'{name}'" for name in names) for names in pairs])
        notes.append(
            f"{shown} {PATIENTS_ALIKE}: their names differ by capitals, blanks, signs or zeros alone. Write them alike "
            "if so; they are not kept together"
        )
    known = {case.group for case in (*cases, *tests) if case.group != case.id}
    if both := sorted(known & {case.group for case in cases} & {case.group for case in tests}):
        notes.append(f"patients who {PATIENTS_TESTED}: {few(both, 3)}")
    return notes


def case_by_names(
    id_: str, found: Mapping[str, Path], names: Sequence[str], label: Path | None = None
) -> Case:
    return Case(id_, tuple(found[name] for name in names if name in found), label, id_)


def require_file_name(id_: str) -> str:
    """The id of a case; `UserError` where a file could not be called by it, or would lie in another folder."""
    if Path(id_).name != id_ or id_[0] == "." or "\\" in id_ or "\0" in id_:
        raise UserError(
            f"The case '{id_}' cannot be the name of a file. Take its slashes and first dot away."
        )
    return id_


def require_one_patient(source: Path, case: str, patients: Collection[str], problem: Problem) -> None:
    if len(patients) > 1:
        who = " and ".join(f"'{patient}'" for patient in sorted(patients))
        problem("patients", case, f"{source} gives the case '{case}' several patients, {who}. Leave one.")


def noted(dataset: Data, *notes: str) -> Data:
    """The data set with further notes."""
    return replace(dataset, notes=(*dataset.notes, *notes))


def as_dataset(
    name: str,
    root: Path,
    layout: str,
    cases: Sequence[Case],
    tests: Sequence[Case],
    channel_names: tuple[str, ...] | None,
    notes: Sequence[str],
) -> Dataset:
    flat = {suffix_of(image) in SUFFIXES_2D for case in cases for image in case.images}
    if len(flat) > 1:
        raise UserError(f"{root} mixes 2D pictures and volumes; give each a data set of its own.")
    if channel_names is None:
        count = count_channels(cases)
        colours = flat == {True} and count == 3
        channel_names = (
            COLOURS if colours else tuple(f"image {i + 1}" if i else "image" for i in range(count))
        )
    return Dataset(
        name,
        root,
        layout,
        2 if flat == {True} else 3,
        channel_names or ("image",),
        (),
        (),
        tuple(cases),
        tuple(tests),
        tuple(notes),
    )


def count_channels(cases: Sequence[Case]) -> int:
    """Channels of most of the first three cases that can be read; two that agree are enough."""
    found: list[int] = []
    for case in cases:
        try:
            found.append(len(load_image(case.images).array))
        except UserError:
            continue  # whoever reads it for good says what is wrong
        if found.count(found[-1]) == 2 or len(found) == 3:
            break
    return max(found, key=found.count, default=1)


def by_pattern(dataset: Data, pattern: str) -> Data:
    """With the patients that are found in the ids of its cases; of test images some may lack one, which is told."""

    def patient(case: Case) -> str:
        try:
            match = re.search(pattern, case.id)
            return (match[1] if match else "") or ""
        except (re.error, IndexError) as error:
            raise UserError(f"id pattern '{pattern}' needs one group, e.g. '(.+)_left' ({error}).") from error

    for case in (case for case in dataset.cases if not patient(case)):
        raise UserError(f"id pattern '{pattern}' finds no patient in the case '{case.id}'.")
    if others := [case.id for case in dataset.test_cases if not patient(case)]:
        said = f"the id pattern finds no patient in {len(others)} test images: {few(others, 3)}"
        dataset = noted(dataset, said)
    cases, tests = (
        tuple(replace(case, group=patient(case) or case.group) for case in part)
        for part in (dataset.cases, dataset.test_cases)
    )
    return replace(dataset, cases=cases, test_cases=tests)


def repeated(names: Iterable[str]) -> list[str]:
    """Names that were there before, each time."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def few(names: Sequence[str], count: int = 12) -> str:
    """A list in words, cut where it grows long.

    >>> few(["a", "b", "c"], 2)
    'a, b, ... (3 in all)'
    """
    return (
        ", ".join(names) if len(names) <= count else f"{', '.join(names[:count])}, ... ({len(names)} in all)"
    )


def files_of(case: Case) -> list[Path]:
    """The images of a case, and its label where it has one."""
    return [*case.images, *([case.label] if case.label else [])]


def label_path(case: Case) -> Path:
    """The label file of a case; `UserError` where it has none."""
    if case.label is None:
        raise UserError(f"{case.images[0]} has no label. Give its label, or leave the case out.")
    return case.label
