"""Comparisons find a difference that is there, none that is not, and count patients, not scans."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image as Picture
from rich.console import Console
from scipy.stats import ttest_rel, wilcoxon

from kanseg.data.formats import read_dataset
from kanseg.data.planner import make_plan
from kanseg.errors import UserError
from kanseg.evaluation.compare import compare, comparison_table, load_scores
from kanseg.evaluation.folders import evaluate_folders, label_options
from kanseg.evaluation.metrics import COLUMNS, METRICS


def table(folder: Path, dice: np.ndarray, cases: list[str] | None = None) -> Path:
    """cases.csv of an evaluation, (cases, classes) Dice; the distance falls as Dice rises."""
    folder.mkdir(parents=True, exist_ok=True)
    names = cases or [f"c{i:02d}" for i in range(len(dice))]
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "label", *COLUMNS])
        writer.writeheader()
        for name, row in zip(names, dice, strict=True):
            for number, value in enumerate(row):
                far = 10 * (1 - value)
                scores = {
                    "dice": value,
                    "iou": value / (2 - value),
                    "hd95": far,
                    "nsd": value,
                    "assd": far / 2,
                }
                writer.writerow({"case": name, "label": f"organ {number}", **scores})
    return folder


def random_dice(seed: int, cases: int = 30, classes: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.6, 0.9, (cases, classes))


def test_numbers_are_those_of_the_formulas(tmp_path: Path) -> None:
    one, other = random_dice(0), random_dice(1)
    result = compare(table(tmp_path / "a", one), table(tmp_path / "b", other))
    rows = {(row["class"], row["metric"]): row for row in result["rows"]}
    assert len(rows) == 3 * len(METRICS)
    for number in range(2):
        row = rows[f"organ {number}", "dice"]
        difference = one[:, number] - other[:, number]
        assert row["difference"] == pytest.approx(difference.mean())
        assert row["p"] == pytest.approx(wilcoxon(difference).pvalue)
        assert (row["wins"], row["losses"]) == ((difference > 0).sum(), (difference < 0).sum())
        far = rows[f"organ {number}", "hd95"]  # which falls as Dice rises, so the same cases are won
        assert (far["wins"], far["losses"]) == (row["wins"], row["losses"])
        low, high = ttest_rel(one[:, number], other[:, number]).confidence_interval()
        np.testing.assert_allclose(row["ci95"], [low, high], atol=0.006)  # close to normal with 30 cases
    ps = sorted(rows[f"organ {number}", "dice"]["p"] for number in range(2))
    holm = sorted(rows[f"organ {number}", "dice"]["p_holm"] for number in range(2))
    assert holm == pytest.approx([min(1, 2 * ps[0]), max(min(1, 2 * ps[0]), ps[1])])
    mean = rows["mean", "dice"]
    assert mean["difference"] == pytest.approx((one - other).mean())


def test_a_true_difference_is_found_on_the_right_side(tmp_path: Path) -> None:
    base = random_dice(0)
    noise = np.random.default_rng(2).normal(0, 0.01, base.shape)
    better, worse = table(tmp_path / "a", base + 0.02 + noise), table(tmp_path / "b", base)
    for one, other, side in ((better, worse, "a"), (worse, better, "b"), (worse, worse, "")):
        rows = compare(one, other)["rows"]
        assert {row["better"] for row in rows} == {side}  # also for distances, where less is better


def test_no_number_is_cut_in_a_terminal_of_80_letters(tmp_path: Path) -> None:
    """Least p, long distances and names of classes included."""
    base = random_dice(0)
    noise = np.random.default_rng(2).normal(0, 0.001, base.shape)
    result = compare(table(tmp_path / "a", base + 0.02 + noise), table(tmp_path / "b", base))
    for row in result["rows"]:
        row["class"] = row["class"].replace("organ", "a structure of a long name, left and right")
        if row["metric"] in ("hd95", "assd"):
            row["mean_a"] += 200
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(result))
    shown = console.file.getvalue()
    assert "…" not in shown
    (row,) = (row for row in result["rows"] if (row["class"], row["metric"]) == ("mean", "hd95"))
    assert f"{row['mean_a']:.2f}" in shown
    assert f"{row['p_holm']:.2g}" in shown
    assert "30 cases, 95 %" in shown  # whose patients nobody knows


def test_the_picture_says_who_a_and_b_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    sides = [table(tmp_path / name, random_dice(seed)) for seed, name in enumerate(("kan", "plain"))]
    compare(*sides, tmp_path / "out")
    said = figures[0].get_suptitle()
    assert said.index("kan") < said.index("plain")


def test_scans_of_one_patient_count_once(tmp_path: Path) -> None:
    """Eight scans of each of four patients: 32 differences, but four patients prove nothing."""
    shifts = np.repeat([0.05, 0.04, 0.03, -0.01], 8)[:, None]
    base = random_dice(0, 32, 1)
    one, other = table(tmp_path / "a", base + shifts), table(tmp_path / "b", base)
    (alone,) = (row for row in compare(one, other)["rows"] if row["metric"] == "dice")
    cases = {f"c{i:02d}": {"group": f"p{i // 8}"} for i in range(32)}
    (one / "fingerprint.json").write_text(json.dumps({"cases": cases, "same": []}))
    result = compare(one, other)
    (grouped,) = (row for row in result["rows"] if row["metric"] == "dice")
    assert result["patients"] == 4
    assert alone["better"] == "a"
    assert grouped["better"] == ""
    assert np.ptp(grouped["ci95"]) > 1.5 * np.ptp(alone["ci95"])


@pytest.mark.parametrize("place", ["chosen", "ensemble", "fold"])
def test_the_patients_of_a_run_are_those_of_its_configurations(tmp_path: Path, place: str) -> None:
    base = random_dice(0, 8, 1)
    cases = {f"c{i:02d}": {"group": f"p{i // 4}"} for i in range(8)}
    sides = []
    for name, scores in (("one", base + 0.01), ("other", base)):
        run = tmp_path / name
        (run / "3d").mkdir(parents=True)
        (run / "3d" / "fingerprint.json").write_text(json.dumps({"cases": cases, "same": []}))
        if place == "fold":
            sides.append(table(run / "3d" / "fold_0", scores))
            continue
        chosen = "3d" if place == "chosen" else "ensemble"
        table(run / chosen, scores)
        (run / "choice.json").write_text(json.dumps({"choice": chosen}))
        sides.append(run)
    assert compare(*sides)["patients"] == 2


def test_cases_that_only_one_side_has_are_named(tmp_path: Path) -> None:
    one = table(tmp_path / "a", random_dice(0, 4), ["w", "x", "y", "z"])
    other = table(tmp_path / "b", random_dice(1, 3), ["x", "y", "v"])
    result = compare(one, other, tmp_path / "out")
    assert (result["only_in_a"], result["only_in_b"], result["cases"]) == (["w", "z"], ["v"], 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"comparison.{s}" for s in ("csv", "json", "png")
    ]
    assert Picture.open(tmp_path / "out" / "comparison.png").size[0] > 500
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    assert comparison_table(result).row_count == len(result["rows"])
    with pytest.raises(UserError, match="no case in common"):
        compare(one, table(tmp_path / "c", random_dice(0, 1), ["other"]))


def test_label_maps_are_scored_against_their_references(blobs: Path, tmp_path: Path) -> None:
    result = compare(blobs / "labelsTr", blobs / "labelsTr", reference=blobs / "labelsTr")
    assert all(row["difference"] == 0 and row["p"] == 1 for row in result["rows"])
    evaluate_folders(blobs / "labelsTr", blobs / "labelsTr", tmp_path / "scores")
    assert load_scores(tmp_path / "scores") == load_scores(blobs / "labelsTr", blobs / "labelsTr")


def test_label_maps_that_one_side_lacks_do_not_count(blobs: Path, tmp_path: Path) -> None:
    for name, cases in {"a": (0, 1, 2), "b": (1, 2, 3), "c": (4,)}.items():
        (tmp_path / name).mkdir()
        for case in cases:
            shutil.copy(blobs / "labelsTr" / f"case_{case}.nii.gz", tmp_path / name)
    result = compare(tmp_path / "a", tmp_path / "b", reference=blobs / "labelsTr")
    assert (result["cases"], result["only_in_a"], result["only_in_b"]) == (2, ["case_0"], ["case_3"])
    assert {row["n"] for row in result["rows"]} == {2}
    with pytest.raises(UserError, match="no case in common"):
        compare(tmp_path / "a", tmp_path / "c", reference=blobs / "labelsTr")


def test_runs_are_compared_by_their_validation(tmp_path: Path) -> None:
    for run, shift in (("one", 0.1), ("two", 0.0)):
        for fold in range(2):
            folder = tmp_path / run / f"fold_{fold}"
            folder.mkdir(parents=True)
            cases = {f"c{fold}{i}": {"near": 0.5 + shift + 0.01 * i, "far": 0.6 + shift} for i in range(5)}
            (folder / "summary.json").write_text(json.dumps({"cases": cases}))
    result = compare(tmp_path / "one", tmp_path / "two")
    assert result["cases"] == 10
    assert {row["class"] for row in result["rows"]} == {"near", "far", "mean"}
    assert all(row["difference"] == pytest.approx(0.1) and row["better"] == "a" for row in result["rows"])


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", "case,label,dice\nx,y,z\n"])
def test_what_has_no_scores_is_explained(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cases.csv").write_text(content)
    with pytest.raises(UserError, match="no scores|no table of scores"):
        load_scores(tmp_path)


def test_voxels_that_a_plan_ignores_count_in_no_comparison(tmp_path: Path, blobs: Path) -> None:
    """One prediction differs from the other only where nobody annotated."""
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), ignore_value=9)
    how = label_options(str(plan.save(tmp_path / "plan.json")))
    for name in ("reference", "a", "b"):
        (tmp_path / name).mkdir()
    for path in (blobs / "labelsTr").iterdir():
        image = nib.load(path)
        truth, unknown = np.asarray(image.dataobj), np.zeros(image.shape, bool)
        unknown[:4] = True
        maps = {"reference": np.where(unknown, 9, truth), "a": truth, "b": np.where(unknown, 1, truth)}
        for name, labels in maps.items():
            nib.save(nib.Nifti1Image(labels.astype(np.uint8), image.affine), tmp_path / name / path.name)
    result = compare(tmp_path / "a", tmp_path / "b", reference=tmp_path / "reference", **how)
    assert {row["class"] for row in result["rows"]} == {"near", "far", "mean"}
    assert all(row["mean_a"] == row["mean_b"] == 1 for row in result["rows"] if row["metric"] == "dice")


@pytest.mark.parametrize("patients", [1, 5, 6])
def test_too_few_patients_for_the_test_are_told(tmp_path: Path, patients: int) -> None:
    """One side wins each case, and no p below 0.05 can come of fewer than six."""
    better = random_dice(0, cases=patients, classes=1)
    result = compare(table(tmp_path / "a", better), table(tmp_path / "b", better - 0.1))
    few = patients < 6
    assert ("too few patients" in str(comparison_table(result).title)) == few
    row = result["rows"][0]
    assert row["p"] == pytest.approx(2 / 2**patients)
    assert (row["p"] >= 0.05) == few
