"""Scores are MONAI's where MONAI defines them, known where geometry gives them, and never silently absent."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDiceMetric

from kanseg.errors import UserError
from kanseg.evaluation.metrics import evaluate_case, evaluate_folders
from kanseg.evaluation.report import picture, score_table

SPACING = (1.0, 0.7, 2.5)


def blob(shift: int = 0, size: tuple[int, ...] = (24, 26, 16)) -> np.ndarray:
    generator = np.random.default_rng(3)
    labels = np.zeros(size, np.uint8)
    labels[5 + shift : 14 + shift, 6:16, 4:10] = 1
    labels[15:20, 8:20, 5:12] = 2
    labels[generator.random(size) < 0.01] = 1
    return labels


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_scores_are_monais(spacing: tuple[float, ...]) -> None:
    prediction, reference = blob(2), blob()
    ours = evaluate_case(prediction, reference, spacing, [1, 2], tolerance=1.0)
    pair = [
        torch.nn.functional.one_hot(torch.tensor(a).long(), 3).movedim(-1, 0)[None]
        for a in (prediction, reference)
    ]
    metrics = {
        "dice": DiceMetric(include_background=False),
        "iou": MeanIoU(include_background=False),
        "hd95": HausdorffDistanceMetric(include_background=False, percentile=95),
        "nsd": SurfaceDiceMetric([1.0, 1.0], include_background=False),
    }
    for name, metric in metrics.items():
        theirs = metric(*pair, spacing=spacing) if name in ("hd95", "nsd") else metric(*pair)
        for i, label in enumerate((1, 2)):
            assert ours[label][name] == pytest.approx(float(theirs[0, i]), abs=1e-6), (name, label)


def test_shifted_cubes_have_the_scores_of_geometry() -> None:
    reference, prediction = np.zeros((2, 30, 30, 30), np.uint8)
    reference[5:15, 5:15, 5:15] = 1
    prediction[9:19, 5:15, 5:15] = 1
    scores = evaluate_case(prediction, reference, (0.5, 1.0, 1.0), [1])[1]
    assert scores["dice"] == pytest.approx(0.6)
    assert scores["iou"] == pytest.approx(6 / 14)
    assert scores["hd95"] == pytest.approx(4 * 0.5)
    assert scores["volume_ml"] == pytest.approx(0.5)


def test_absent_structures_never_give_nan() -> None:
    empty, full = np.zeros((10, 10, 10), np.uint8), np.zeros((10, 10, 10), np.uint8)
    full[2:5, 2:5, 2:5] = 1
    diagonal = math.sqrt(3 * 20**2)
    for pair in ((empty, full), (full, empty)):
        scores = evaluate_case(*pair, (2.0, 2.0, 2.0), [1])[1]
        assert (scores["dice"], scores["iou"], scores["nsd"]) == (0, 0, 0)
        assert scores["hd95"] == pytest.approx(diagonal)
    both = evaluate_case(empty, empty, (2.0, 2.0, 2.0), [1])[1]
    assert (both["dice"], both["iou"], both["nsd"], both["hd95"]) == (1, 1, 1, 0)


def test_pictures_are_scored_too() -> None:
    reference, prediction = np.zeros((2, 20, 20), np.uint8)
    reference[4:10, 4:10] = prediction[4:10, 6:12] = 1
    assert evaluate_case(prediction, reference, (1.0, 1.0), [1])[1]["dice"] == pytest.approx(4 / 6)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for folder, shift in (("pred", 1), ("ref", 0)):
        (tmp_path / folder).mkdir()
        for name in "abcd":
            nib.save(
                nib.Nifti1Image(blob(shift), np.diag([*SPACING, 1.0])), tmp_path / folder / f"{name}.nii.gz"
            )
    return tmp_path / "pred", tmp_path / "ref"


def test_folders_give_a_row_a_case_and_class(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = evaluate_folders(*folders, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "cases.csv").open()))
    assert [(r["case"], r["label"]) for r in rows] == [(c, f"label {v}") for c in "abcd" for v in (1, 2)]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    one = evaluate_case(blob(1), blob(), SPACING, [1])[1]
    assert float(rows[0]["dice"]) == pytest.approx(one["dice"], rel=1e-5)
    assert summary["metrics"]["label 1"]["dice"]["mean"] == pytest.approx(one["dice"])
    assert not summary["failed"]


def test_a_missing_or_broken_prediction_counts_as_a_failure(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    (prediction / "a.nii.gz").unlink()
    (prediction / "b.nii.gz").write_bytes(b"broken")
    summary = evaluate_folders(prediction, reference)
    assert summary["failed"]["a"] == "no prediction"
    assert "cannot be read" in summary["failed"]["b"]
    good = evaluate_case(blob(1), blob(), SPACING, [2])[2]["dice"]
    assert summary["metrics"]["label 2"]["dice"]["mean"] == pytest.approx(good / 2)
    assert summary["metrics"]["label 2"]["hd95"]["n"] == 4


def test_interval_holds_the_mean_and_shrinks_to_it_without_spread(folders: tuple[Path, Path]) -> None:
    low, high = evaluate_folders(*folders)["metrics"]["mean"]["dice"]["ci95"]
    assert low == pytest.approx(high)
    nib.save(nib.Nifti1Image(blob(3), np.diag([*SPACING, 1.0])), folders[0] / "a.nii.gz")
    score = evaluate_folders(*folders)["metrics"]["mean"]["dice"]
    assert score["ci95"][0] < score["mean"] < score["ci95"][1]


def test_different_grids_are_refused_and_surplus_is_named(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    nib.save(nib.Nifti1Image(blob(), np.eye(4)), prediction / "extra.nii.gz")
    assert evaluate_folders(prediction, reference)["predictions_without_reference"] == ["extra"]
    nib.save(nib.Nifti1Image(blob()[1:], np.eye(4)), prediction / "a.nii.gz")
    with pytest.raises(UserError, match="different grids"):
        evaluate_folders(prediction, reference)


def test_two_single_files_are_a_pair(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folders(folders[0] / "a.nii.gz", folders[1] / "b.nii.gz")
    assert summary["cases"] == 1
    assert not summary["failed"]


@pytest.mark.parametrize("dims", [2, 3])
def test_picture_shows_every_class(tmp_path: Path, dims: int) -> None:
    from PIL import Image as Picture

    image = np.random.default_rng(0).normal(size=(24, 26, 16))
    labels = blob()
    if dims == 2:
        image, labels = image[..., 6], labels[..., 6]
    path = picture(
        image, labels, labels, tmp_path / "p.png", spacing=SPACING[:dims], label_names=["-", "one", "two"]
    )
    pixels = np.asarray(Picture.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    spread = pixels.max(axis=1) - pixels.min(axis=1)
    assert (spread > 60).mean() > 0.01  # colours over a grey image


def test_table_has_a_row_a_class(folders: tuple[Path, Path]) -> None:
    assert score_table(evaluate_folders(*folders)["metrics"]).row_count == 3
