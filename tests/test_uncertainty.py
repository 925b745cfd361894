"""How sure a prediction is, against the formulas, and where it is written."""

from __future__ import annotations

import csv
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy
from test_predict import Brightness

from kanseg.data.images import read_image
from kanseg.data.plan import Plan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.inference.ensemble import combine_folders
from kanseg.inference.predict import predict, predict_folder
from kanseg.inference.uncertainty import QUALITY, doubt, expected_in_words, keep_quality, read_quality

NAMES = ("background", "left", "right")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_entropy_is_that_of_the_classes_in_parts_of_the_largest() -> None:
    chances = np.random.default_rng(0).dirichlet(np.ones(3), (4, 5)).transpose(2, 0, 1)
    chances[:, 0, 0], chances[:, 0, 1] = (1, 0, 0), 1 / 3
    found = doubt(chances, chances.argmax(0), (0, 1, 2), NAMES, regions=False, spacing=(1, 1)).entropy
    np.testing.assert_allclose(found, entropy(chances) / np.log(3), atol=1e-6)
    assert found[0, 0] == 0
    assert found[0, 1] == pytest.approx(1)


def test_regions_count_each_for_itself_and_the_least_sure_tells() -> None:
    chances = np.array([[0.0, 0.5], [0.5, 1.0], [0.25, 0.9]])  # background, two regions; two voxels
    found = doubt(chances, np.array([1, 2]), (0, 1, 2), NAMES, regions=True, spacing=(1,))
    binary = lambda p: entropy([p, 1 - p], base=2)  # noqa: E731
    np.testing.assert_allclose(found.entropy, [1.0, binary(0.9)], atol=1e-6)
    assert found.rows[0]["volume_ml"] == pytest.approx(0.001)  # 1/2 is not above it


def test_expected_dice_is_that_of_masks_drawn_from_the_probabilities() -> None:
    generator = np.random.default_rng(1)
    chance = np.clip(generator.normal(0.2, 0.4, (30, 30, 30)), 0, 1)
    labels = (chance > 0.5).astype(int)
    row = doubt([1 - chance, chance], labels, (0, 1), NAMES[:2], regions=False, spacing=(1, 2, 3)).rows[0]
    drawn = [generator.random(chance.shape) < chance for _ in range(50)]
    dice = [2 * (labels * d).sum() / (labels.sum() + d.sum()) for d in drawn]
    assert row["expected_dice"] == pytest.approx(np.mean(dice), abs=0.005)
    assert row["volume_ml"] == pytest.approx(labels.sum() * 6 / 1000)


def test_a_class_that_is_not_found_has_no_quality() -> None:
    chances = np.array([[0.9, 0.8], [0.1, 0.2]])
    rows = doubt(chances, np.zeros(2, int), (0, 7), NAMES[:2], regions=False, spacing=(1,)).rows
    assert rows == [{"class": "left", "volume_ml": 0, "expected_dice": None, "uncertainty": None}]


def test_predictions_carry_it_and_are_not_disturbed_by_it(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    cases, network = find_images(blobs / "imagesTr")[:2], Brightness()
    mapped = replace(plan, label_values=[0, 7, 300], label_dtype="uint16")
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        assert predict_folder(network, mapped, cases, folder, uncertainty=True) == {}
    rows = rows_of(folders[0] / QUALITY)
    assert [row["case"] for row in rows] == ["case_0", "case_0", "case_1", "case_1"]
    assert {row["class"] for row in rows} == set(plan.label_names[1:])
    found = read_image(folders[0] / "case_0_uncertainty.nii.gz")
    predicted = predict(network, cases[0], mapped)
    chances = np.stack([predicted.probability(k) for k in range(3)])
    np.testing.assert_allclose(found.array[0], entropy(chances) / np.log(3), atol=1e-5)
    np.testing.assert_allclose(found.affine, read_image(cases[0].images[0]).affine)
    assert combine_folders(folders, tmp_path / "both")["cases"] == 2
    predict_folder(network, mapped, cases[:1], folders[0], uncertainty=True)
    assert rows_of(folders[0] / QUALITY) == rows


def test_another_table_is_not_replaced(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    path = tmp_path / QUALITY
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is another table"):
        predict_folder(Brightness(), plan, find_images(blobs / "imagesTr"), tmp_path, uncertainty=True)
    assert path.read_text() == "a,b\n1,2\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_is_damaged_or_gone_is_noticed(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    cases, how = find_images(blobs / "imagesTr")[:1], {"settings": {}, "uncertainty": True}
    predict_folder(Brightness(), plan, cases, tmp_path, **how)
    table = (tmp_path / QUALITY).read_text()
    (tmp_path / QUALITY).unlink()
    predict_folder(Brightness(), plan, cases, tmp_path, **how)  # done, but for the table
    assert (tmp_path / QUALITY).read_text() == table
    (tmp_path / QUALITY).write_text(table + "a,b,1,2,3,4,5\n")
    with pytest.raises(UserError, match="is damaged"):
        predict_folder(Brightness(), plan, cases, tmp_path, **how)


def test_names_that_are_no_utf_8_keep_their_row(tmp_path: Path) -> None:
    name, row = os.fsdecode(b"M\xfcller"), {"class": "liver", "expected_dice": 0.5}
    for expected in (0.5, 0.25):
        keep_quality(tmp_path / QUALITY, name, [{**row, "expected_dice": expected}])
    assert [(row["case"], row["expected_dice"]) for row in read_quality(tmp_path / QUALITY)] == [
        (name, "0.25")
    ]


def test_files_are_known_by_their_own_names(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    case = find_images(blobs / "imagesTr")[:1]
    for name in ("p1", "p2"):
        predict_folder(Brightness(), plan, case, tmp_path / f"{name}.nii.gz", uncertainty=True)
    assert {row["case"] for row in rows_of(tmp_path / QUALITY)} == {"p1", "p2"}


def test_what_a_rule_removed_of_a_region_does_not_count() -> None:
    chances = np.array([[0.1, 0.1], [0.9, 0.9]])
    rows = doubt(chances, np.array([0, 1]), (0, 1), NAMES[:2], regions=True, spacing=(1,)).rows
    assert rows[0]["volume_ml"] == pytest.approx(0.001)


def test_the_line_of_expected_dice_says_that_it_is_not_calibrated() -> None:
    rows = [{"class": "liver", "expected_dice": 0.9}, {"class": "tumour", "expected_dice": None}]
    assert expected_in_words(rows) == "expected Dice (not calibrated): liver 0.900, tumour not found"


def keep_some(path: Path, first: int, start: Barrier) -> None:
    start.wait()
    row = {"class": "organ", "volume_ml": 1.0, "expected_dice": 0.5, "uncertainty": 0.1}
    for number in range(first, first + 50):
        keep_quality(path, f"case {number}", [row])


def test_several_processes_lose_no_row_of_the_table(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    args = [(tmp_path / QUALITY, 100 * k, start) for k in range(4)]
    writers = [context.Process(target=keep_some, args=one) for one in args]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_quality(tmp_path / QUALITY)) == 4 * 50
    assert [path.name for path in tmp_path.iterdir()] == [QUALITY]
