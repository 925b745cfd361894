"""Folders with a dataset.json: the Medical Segmentation Decathlon's, which list their files, and nnU-Net's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kanseg.data.cases import LAYOUTS, Dataset, Problem, as_dataset, refuse, require_one_patient
from kanseg.data.labels import parse_labels_of
from kanseg.data.listing import cases_of, files_with_numbers, image_files
from kanseg.data.lists import cases_of_lists, lists_by_part, note_on_unread
from kanseg.data.pairs import find_test_cases, require_channels, with_labels, with_test_labels
from kanseg.data.suffixes import stem_of
from kanseg.errors import UserError


def read_described(root: Path, described: Any, problem: Problem) -> Dataset:
    """A folder with dataset.json: the Decathlon's lists its files, nnU-Net's names its labels."""
    file = root / "dataset.json"
    if (
        not isinstance(described, dict)
        or not isinstance(described.get("labels"), dict)
        or not described["labels"]
    ):
        raise UserError(f'{file} lacks \'labels\', e.g. {{"0": "background", "1": "organ"}}.')
    labels = parse_labels_of(described, file)
    groups = _subjects(file, described.get("subjects") or {})
    channels = _channel_names(file, described)
    splits: Sequence[Mapping[str, Sequence[str]]] = ()
    if "training" in described:
        cases, tests, splits, notes = cases_of_lists(root, lists_by_part(file, described), groups)
        notes += note_on_unread(described)
        layout = "Medical Segmentation Decathlon (dataset.json with a list of files)"
    else:
        cases = cases_of(files_with_numbers(image_files(_folder(root, "imagesTr")), problem), problem=problem)
        require_channels(cases, channels, problem)
        cases, notes = with_labels(cases, image_files(_folder(root, "labelsTr")), groups, problem)
        tests = find_test_cases(root)
        layout = "nnU-Net raw (dataset.json, imagesTr with _0000 names, labelsTr)"
    tests, unused = with_test_labels(root, tests, groups)
    notes += unused
    count = len(described.get("training") or cases)
    if isinstance(described.get("numTraining"), int) and described["numTraining"] != count:
        notes.append(f"dataset.json says numTraining {described['numTraining']}; {count} cases are there")
    if groups:
        present = {groups[case.id] for case in cases if case.id in groups}
        notes.append(f"{len(present)} subjects from dataset.json keep their images together")
    name = str(described.get("name", root.name))
    own = _described_splits(file, described.get("splits") or [], {case.id for case in cases})
    return replace(
        as_dataset(name, root, layout, cases, tests, channels, notes), splits=own or tuple(splits), **labels
    )


def _described_splits(file: Path, content: Any, cases: set[str]) -> tuple[dict[str, list[str]], ...]:
    """The folds that `kanseg.data.convert` wrote down of a list."""
    try:
        found = [
            {part: [str(c) for c in fold[part] if c in cases] for part in ("train", "val")}
            for fold in content
        ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{file}: 'splits' is not a list of folds with 'train' and 'val'. Correct or delete it."
        ) from error
    return tuple(fold for fold in found if all(fold.values()))


def _channel_names(file: Path, described: dict[str, Any]) -> tuple[str, ...] | None:
    """From nnU-Net's `channel_names` or the Decathlon's `modality`, {"0": "MRI"}; None where it is not said."""
    names = described.get("channel_names") or described.get("modality")
    if names is None:
        return None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(str(i) for i in range(len(names))):
        raise UserError(
            f'{file}: the channels are {names!r}; expected is a name for each number from 0, e.g. {{"0": "MRI"}}.'
        )
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _subjects(file: Path, subjects: Any) -> dict[str, str]:
    """Case id -> subject, from `subjects` (subject -> ids, or id -> subject)."""
    if not isinstance(subjects, dict):
        raise UserError(
            f'{file}: \'subjects\' must name the cases of each subject, e.g. {{"p1": ["case_1"]}}.'
        )
    groups: dict[str, str] = {}
    for key, value in subjects.items():
        pairs = (
            [(str(case), str(key)) for case in value] if isinstance(value, list) else [(str(key), str(value))]
        )
        for case, subject in pairs:
            require_one_patient(file, case, {groups.get(case, subject), subject}, refuse)
            groups[case] = subject
    # files may stand for cases
    return {stem_of(Path(case)): subject for case, subject in groups.items()} | groups


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise UserError(f"{root} has a dataset.json but no folder {name}. Expected: {LAYOUTS}.")
    return root / name
