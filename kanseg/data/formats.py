"""Folders of labelled images in the layouts that people have, read into one `Dataset`.

Medical Segmentation Decathlon and nnU-Net (`dataset.json`), `images/` beside `labels/` or `masks/`, one folder with
`x` and `x_mask`, one folder per case, a CSV, a MONAI datalist. What was recognised stands in `layout` and `notes`;
nothing is guessed in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kanseg.data.cases import LAYOUTS, Dataset, Problem, by_pattern, noted, patient_notes, refuse, repeated
from kanseg.data.described import read_described
from kanseg.data.fingerprint import values_seen
from kanseg.data.layouts import read_folders
from kanseg.data.lists import LISTS, read_csv, read_datalist
from kanseg.data.patients import with_patients
from kanseg.data.tables import TABLES
from kanseg.data.values import with_values
from kanseg.errors import UserError
from kanseg.files import parse_json

JSON = ("JSON", "Repair it.")  # what a list or a description of cases is, and what to do where it is not


def read_dataset(
    path: Path | str,
    *,
    id_pattern: str | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    run: Path | None = None,
) -> Dataset:
    """Recognise the layout of a folder or list file, read it, and look into every label.

    Args:
        id_pattern: regular expression with one group that takes the patient from a case's id.
        regions: classes by name as lists of label values, in place of those that the data declares; see
            `kanseg.data.labels.given_regions`.
        run: folder of a run that was planned with these data: labels that have not changed since are not opened.

    Raises:
        UserError: nothing recognised, images without labels, values outside the declared set, no cases.
    """
    listed = list_dataset(path, id_pattern=id_pattern)
    return with_values(listed, regions, *([values_seen(run)] if run else []))


def list_dataset(path: Path | str, *, id_pattern: str | None = None, problem: Problem = refuse) -> Dataset:
    """Recognise the layout of a folder or list file; no label is opened.

    Args:
        problem: called with what is wrong with a case, which is then left as it is; default raises `UserError`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}. Expected: {LAYOUTS}.")
    if path.is_file() and path.suffix.lower() not in LISTS:
        raise UserError(f"{path} is one file, not a data set. Expected: {LAYOUTS}.")
    if path.is_file():
        dataset = (
            read_csv(path) if path.suffix.lower() in TABLES else read_datalist(path, parse_json(path, *JSON))
        )
    elif (path / "dataset.json").is_file():
        dataset = read_described(path, parse_json(path / "dataset.json", *JSON), problem)
    else:
        dataset = read_folders(path, problem)
    if not dataset.cases:
        raise UserError(f"{path} holds no labelled images. Expected: {LAYOUTS}.")
    if path.is_dir() and id_pattern is None and all(case.group == case.id for case in dataset.cases):
        dataset = with_patients(dataset, path / "cases.csv", problem)
    elif (path / "cases.csv").is_file():
        other = "--id-pattern says" if id_pattern is not None else "dataset.json says"
        dataset = noted(dataset, f"cases.csv is not used, for {other} whose images they are")
    for name in repeated(case.id for case in dataset.cases):
        images = [case.images for case in dataset.cases if case.id == name]
        advice = "Give every case a name of its own (in lists: 'id')."
        if len(set(images)) < len(images):
            advice = "One image is listed twice, perhaps to train on and to validate on; leave one."
        problem("same name", name, f"{path} has several cases called '{name}'. {advice}")
    if id_pattern is not None:
        dataset = by_pattern(dataset, id_pattern)
    dataset = noted(dataset, *patient_notes(dataset.cases, dataset.test_cases))
    return replace(dataset, source=path.resolve(), id_pattern=id_pattern)
