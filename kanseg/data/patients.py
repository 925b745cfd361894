"""The table of patients beside a folder of images, cases.csv."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kanseg.data.cases import Dataset, Problem, few, noted, require_one_patient
from kanseg.data.suffixes import stem_of
from kanseg.data.tables import columns_named, group_columns, group_in, read_rows

CASE_COLUMNS = "id case caseid image imageid name file filename".split()  # of a table of patients
PATIENTS_IN_PART = "for it lacks"  # in a note on a table of patients that does not say all


def with_patients(dataset: Dataset, table: Path, problem: Problem) -> Dataset:
    """With the patients that a table beside the images names; what it does not say, or cannot, is told."""
    rows = read_rows(table) if table.is_file() else []
    if not rows:
        return dataset
    columns, keys = group_columns(rows[0]), columns_named(rows[0], *CASE_COLUMNS)
    if unread := columns_named(rows[0], "fold", "split"):
        where = "they count in a list, a .csv with the columns image and label"
        dataset = noted(dataset, f"the columns {' and '.join(unread)} of {table.name} are not read; {where}")
    if not columns or not keys:
        lacking = "of patients (patient, subject or group)" if keys else "of cases (id, case or image)"
        return noted(dataset, f"{table.name} is not used, {PATIENTS_IN_PART} a column {lacking}")
    key, column = keys[0], columns[0]
    patients: dict[str, set[str]] = {}
    for row in (row for row in rows if row[key]):
        patients.setdefault(stem_of(Path(row[key])), set()).update({group_in(row, columns)} - {""})
    for name, found in patients.items():
        require_one_patient(table, name, found, problem)
    groups = {name: min(found) for name, found in patients.items() if found}
    if not groups:
        return noted(
            dataset, f"{table.name} is not used, {PATIENTS_IN_PART} a patient in its column '{column}'"
        )
    known = [case.id for case in dataset.cases if case.id in groups]
    others = [case.id for case in dataset.cases if case.id not in groups]
    if not known:
        problem(
            "patients",
            "",
            f"{table} names the {column} of {few(list(groups), 3)}, but the cases are called {few(others, 3)}. Give "
            "both the same names (spreadsheets like to remove leading zeros), or give --id-pattern.",
        )
    cases, tests = (
        tuple(replace(case, group=groups.get(case.id, case.group)) for case in part)
        for part in (dataset.cases, dataset.test_cases)
    )
    count = len({groups[name] for name in known})
    text = f"column '{column}' of {table.name} keeps the images of {count} patients together"
    if others:
        text += (
            f", but not all, {PATIENTS_IN_PART} {len(others)} cases, each a patient then: {few(others, 3)}"
        )
    return noted(replace(dataset, cases=cases, test_cases=tests), text)
