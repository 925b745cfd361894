"""Folds cover every case once and never part a patient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kanseg.data.formats import read_dataset
from kanseg.data.splits import check_leaks, split
from kanseg.errors import UserError
from kanseg.training.run_folder import read_splits


def test_splits_cover_every_case_once_and_repeat(blobs: Path) -> None:
    dataset = read_dataset(blobs)
    folds = split(dataset, folds=3, seed=1)
    assert sorted(case for fold in folds for case in fold["val"]) == [case.id for case in dataset.cases]
    assert folds == split(replace(dataset, cases=dataset.cases[::-1]), folds=3, seed=1)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == [case.id for case in dataset.cases]


def test_the_seed_deals_the_patients(shared_data: Path) -> None:
    dataset = read_dataset(shared_data / "hippocampus")
    assert split(dataset, seed=0) == split(dataset, seed=0)
    assert split(dataset, seed=0) != split(dataset, seed=1)
    sizes = [len(fold["val"]) for fold in split(dataset)]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_patients_are_refused(blobs: Path) -> None:
    with pytest.raises(UserError, match="3 patients, too few for 5 folds"):
        split(read_dataset(blobs), folds=5)


@pytest.mark.parametrize(("name", "patients"), [("hippocampus", 136), ("glas", 15), ("busi", None)])
def test_real_sets_are_split_by_patient(shared_data: Path, name: str, patients: int | None) -> None:
    dataset = read_dataset(shared_data / name)
    groups = {case.id: case.group for case in dataset.cases}
    assert patients in (None, len(set(groups.values())))
    assert len(set(groups.values())) < len(groups)
    for fold in split(dataset):
        assert not {groups[i] for i in fold["train"]} & {groups[i] for i in fold["val"]}


def test_both_hemispheres_of_a_subject_stay_together(shared_data: Path) -> None:
    """Numbers 2k - 1 and 2k of the hippocampus set are one person, as its README says."""
    numbers: dict[str, set[int]] = {}
    for case in read_dataset(shared_data / "hippocampus").cases:
        numbers.setdefault(case.group, set()).add((int(case.id[-3:]) + 1) // 2)
    assert all(len(subjects) == 1 for subjects in numbers.values())


def test_a_rare_class_is_spread_over_the_folds(blobs: Path) -> None:
    """Of 40 patients 5 have the lesion; every fold validates on one of them, and folds stay of one size."""
    case = read_dataset(blobs).cases[0]
    for seed in range(5):
        cases = tuple(
            replace(case, id=f"c{i:02d}", group=f"p{i // 2}", values=(0, 1, 2) if i // 2 % 8 == 0 else (0, 1))
            for i in range(80)
        )
        folds = split(replace(read_dataset(blobs), cases=cases), folds=5, seed=seed)
        lesions = {c.id for c in cases if 2 in c.values}
        assert [len(lesions & set(fold["val"])) for fold in folds] == [2] * 5
        assert {len(fold["val"]) for fold in folds} == {16}


def test_a_patient_of_many_scans_leaves_the_folds_of_one_size(blobs: Path) -> None:
    """One of six scans and twelve of one: dealt out in any other order, the last fold would be too large."""
    case = read_dataset(blobs).cases[0]
    groups = ["many"] * 6 + [f"p{i}" for i in range(12)]
    cases = tuple(replace(case, id=f"c{i:02d}", group=group) for i, group in enumerate(groups))
    for seed in range(5):
        folds = split(replace(read_dataset(blobs), cases=cases), folds=3, seed=seed)
        assert [len(fold["val"]) for fold in folds] == [6] * 3


def test_copies_of_one_image_stay_together(blobs: Path) -> None:
    dataset = read_dataset(blobs)
    for seed in range(4):
        for fold in split(dataset, folds=2, seed=seed, same=[("case_0", "case_4")]):
            assert len({"case_0", "case_1", "case_4", "case_5"} & set(fold["val"])) in (0, 4)


def test_a_split_that_shares_a_patient_is_refused(blobs: Path) -> None:
    dataset = read_dataset(blobs)
    good = split(dataset, folds=3)
    check_leaks(good, dataset)
    ids = [case.id for case in dataset.cases]
    bad = [*good[:1], {"train": ids[1:], "val": ids[:1]}]
    with pytest.raises(
        UserError, match="Fold 1 trains on 'case_1' and validates on 'case_0', .* one patient .'p0'"
    ):
        check_leaks(bad, dataset)
    parted = [{"train": ids[2:], "val": ids[:2]}]
    check_leaks(parted, dataset)
    with pytest.raises(UserError, match="Fold 0 .* are one image"):
        check_leaks(parted, dataset, [("case_0", "case_5")])


@pytest.mark.parametrize("content", ["", "[]", "5", '{"a": null}', '[{"train": []}]', "[" * 100_000])
def test_folds_that_are_none_are_refused_by_their_file(tmp_path: Path, content: str) -> None:
    """By training, prediction and report alike."""
    assert read_splits(tmp_path) == []
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(UserError, match=r"splits.json (cannot be read as a list of folds|holds no fold)"):
        read_splits(tmp_path)
