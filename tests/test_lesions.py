"""Lesions: each is found or missed as a whole, each predicted piece is right or false."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.evaluation.folders import evaluate_folders
from kanseg.evaluation.lesions import lesion_counts, summarize_lesions
from kanseg.evaluation.metrics import evaluate_case


def save(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Of three cases 3 + 1 + 0 lesions, of which 2 are found, and 4 predicted pieces, of which 2 are false."""
    truth, guess = np.zeros((3, 20, 8, 8)), np.zeros((3, 20, 8, 8))
    truth[0, 1:3, 1:3, 1:3] = truth[0, 6:8, 1:3, 1:3] = truth[0, 12:14, 1:3, 1:3] = 1
    guess[0, 2:7, 2, 2] = 1  # one piece that finds two lesions
    guess[0, 17, 6, 6] = 1
    truth[1, 4, 4, 4] = 1
    guess[2, 3, 3, 3] = 1
    guess[0, 12, 5, 5] = 2  # of another class
    for number, name in enumerate("abc"):
        save(tmp_path / "pred" / f"{name}.nii.gz", guess[number])
        save(tmp_path / "ref" / f"{name}.nii.gz", truth[number])
    return tmp_path / "pred", tmp_path / "ref"


def test_lesions_of_all_cases_are_counted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = evaluate_folders(*folders, tmp_path / "out", labels={"lesion": 1}, lesions=True)
    found = summary["lesions"]["lesion"]
    counts = {key: found[key] for key in ("lesions", "lesions_found", "pieces", "pieces_false")}
    assert counts == {"lesions": 4, "lesions_found": 2, "pieces": 3, "pieces_false": 2}
    values = {key: found[key]["value"] for key in ("sensitivity", "precision", "f1", "false_per_case")}
    assert values == pytest.approx(
        {"sensitivity": 1 / 2, "precision": 1 / 3, "f1": 0.4, "false_per_case": 2 / 3}
    )
    assert all(
        found[key]["ci95"][0] <= values[key] <= found[key]["ci95"][1]
        for key in ("precision", "false_per_case")
    )
    with (tmp_path / "out" / "cases.csv").open() as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert [int(rows["a"][key]) for key in counts] == [3, 2, 2, 1]
    assert "lesions" not in evaluate_folders(*folders, labels={"lesion": 1})


def test_pieces_that_touch_by_a_corner_are_one() -> None:

    rng = np.random.default_rng(0)
    for dims in (2, 3):
        for _ in range(5):
            reference = ndimage.binary_dilation(rng.random((24,) * dims) > 0.985)
            prediction = reference & (rng.random(reference.shape) > 0.1)
            counts = lesion_counts(prediction, reference)
            around = np.ones((3,) * dims)
            numbers, lesions = ndimage.label(reference, around)
            count = ndimage.label(prediction, around)[1]
            assert counts["lesions"] == lesions
            assert counts["pieces"] == count
            assert counts["pieces_false"] == 0
            found = sum(bool(prediction[numbers == n].any()) for n in range(1, lesions + 1))
            assert counts["lesions_found"] == found


def test_what_is_divided_by_nothing_is_unknown() -> None:
    rows = [{"case": "a", "label": "x", **lesion_counts(np.zeros((3, 3), bool), np.zeros((3, 3), bool))}]
    found = summarize_lesions(rows, np.zeros((10, 1), int))["x"]
    assert found["sensitivity"] is None
    assert found["precision"] is None
    assert found["false_per_case"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    rows = [{"case": "a", "label": "x", **lesion_counts(np.eye(3) > 0, np.eye(3)[::-1] * 0 > 0)}]
    assert summarize_lesions(rows, np.zeros((10, 1), int))["x"]["precision"]["value"] == 0


def test_the_command_tells_them(folders: tuple[Path, Path]) -> None:
    how = ["evaluate", *map(str, folders), "--labels", "lesion=1", "--lesions"]
    shown = CliRunner().invoke(app, how)
    assert shown.exit_code == 0
    told = " ".join((shown.stdout + shown.stderr).split())
    assert "lesion: 2 of 4 lesions found (sensitivity 0.50" in told
    assert "2 of 3 pieces false (precision 0.33" in told
    result = json.loads(CliRunner().invoke(app, [*how, "--json"]).stdout)
    assert result["lesions"]["lesion"]["lesions_found"] == 2


def test_lesions_of_a_region_are_those_of_its_values_together() -> None:
    reference = np.zeros((9, 9), int)
    reference[1:3, 1:4], reference[1:3, 4:6] = 1, 2
    prediction = np.where(reference == 2, 2, 0)
    scores = evaluate_case(prediction, reference, (1.0, 1.0), [1, 2, (1, 2)], lesions=True)
    assert [scores[label]["lesions"] for label in (1, 2, (1, 2))] == [1, 1, 1]
    assert [scores[label]["lesions_found"] for label in (1, 2, (1, 2))] == [0, 1, 1]
