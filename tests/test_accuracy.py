"""The protocol of pipelines/benchmarks/accuracy.py: every case once, by networks of one budget, and nothing twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines" / "benchmarks"))

from accuracy import KAN, RECIPES, TWIN, Bench, Recipe, pooled_iou

from kanseg.training.monitor import LOG

SMALL = {"patch_size": [16] * 3, "batch_size": 1, "features_per_stage": [4, 8], "strides": [[1] * 3, [2] * 3]}
ROWS = {"ukanet": KAN, "plain twin": TWIN, "plain, as many parameters": {**TWIN, "match": "ukanet"}}


@pytest.fixture
def bench(blobs: Path, tmp_path: Path) -> Any:
    recipe = Recipe(ROWS, minutes=0.01, folds=3, plan={**SMALL, "kernel_sizes": [[3] * 3] * 2})
    return Bench(recipe, blobs, tmp_path / "runs", tmp_path / "results", "honest", [])


def test_twins_differ_by_the_basis_alone_or_have_as_many_parameters(bench: Any) -> None:
    ours, twin, equal = (bench.parameters(bench.network(row)) for row in ROWS)
    assert twin < ours
    assert abs(equal - ours) < abs(twin - ours)
    assert bench.network("plain, as many parameters")["options"]["basis"] is None
    assert bench.network("plain, as many parameters")["options"]["features_per_stage"][0] == 4


def test_every_case_is_scored_once_unseen_and_a_finished_fold_is_not_trained_again(
    bench: Any, capsys
) -> None:
    rows, names = ["ukanet", "plain twin"], {case.id for case in bench.dataset.cases}
    assert bench.missing(rows, None) == [(row, fold) for fold in range(3) for row in rows]
    for row, fold in bench.missing(rows, None):
        bench.train(row, fold, None, 2)
    assert bench.missing(rows, None) == []
    bench.conclude()
    shown = capsys.readouterr().out
    table = json.loads((bench.results / "table.json").read_text())
    for row in table:
        folds = [json.loads((bench.kept(row["row"], fold) / "summary.json").read_text()) for fold in range(3)]
        cases = {case: scores for fold in folds for case, scores in fold["cases"].items()}
        assert set(cases) == names
        assert sum(len(fold["cases"]) for fold in folds) == len(names)
        for label, mean in row["dice"].items():
            assert mean == pytest.approx(np.mean([scores[label] for scores in cases.values()]))
            assert row["ci95"][label][0] <= mean <= row["ci95"][label][1]
        assert row["steps"] == [2, 2, 2]
        assert row["patients"] == 3
        assert row["gflops"] > 0
        assert row["row"] in shown
    difference = table[1]["first row less this one"]
    assert {row["n"] for row in difference} == {6}
    assert difference[0]["difference"] == pytest.approx(
        table[0]["dice"][difference[0]["class"]] - table[1]["dice"][difference[0]["class"]], abs=1e-4
    )


def test_a_fold_that_was_stopped_goes_on_and_its_clock_too(bench: Any) -> None:
    bench.train("ukanet", 0, None, 2)
    kept, fold = bench.kept("ukanet", 0) / "summary.json", bench.out / "ukanet" / "fold_0"
    whole = json.loads(kept.read_text())
    kept.unlink()
    manifest = json.loads((fold / "manifest.json").read_text())
    for session in manifest["sessions"]:
        del session["peak_memory_mb"]  # it is written at the end, which a kill prevents
    (fold / "manifest.json").write_text(json.dumps(manifest))
    record = json.loads((fold / LOG).read_text().splitlines()[-1])
    (fold / LOG).write_text(json.dumps({**record, "total_seconds": 1000.0}) + "\n")
    bench.train("ukanet", 0, None, 2)
    again = json.loads(kept.read_text())
    assert again["cases"] == whole["cases"]
    assert again["processor_seconds"] >= 1000
    assert again["peak_memory_mb"] == record["peak_memory_mb"]


def test_the_budget_is_time_of_one_thread(bench: Any) -> None:
    seconds = bench.step_seconds()
    assert set(seconds) == set(ROWS)
    assert bench.step_seconds() == seconds  # measured once a folder
    (bench.out / "step_seconds.json").write_text(json.dumps(dict.fromkeys(ROWS, 0.2)))
    bench.train("ukanet", 0, 0.01, None)
    assert json.loads((bench.kept("ukanet", 0) / "summary.json").read_text())["steps"] == 3


def test_pooled_iou_counts_the_pixels_of_a_batch_together() -> None:
    small, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    small[0, 0] = True
    assert pooled_iou([(small, full), (full, full)]) == pytest.approx(17 / 32)  # and not (1/16 + 1) / 2
    assert pooled_iou([(full, full)] * 8 + [(small, full)]) == pytest.approx((1 + 1 / 16) / 2)  # batches of 8


def test_the_flattering_protocol_parts_images_not_patients(blobs: Path, tmp_path: Path) -> None:
    recipe = Recipe(ROWS, minutes=0.01, folds=3, plan={**SMALL, "kernel_sizes": [[3] * 3] * 2})
    bench = Bench(recipe, blobs, tmp_path / "runs", tmp_path / "results", "u-kan", [])
    assert set(bench.groups.values()) == {case.id for case in bench.dataset.cases}
    assert "training.validate_every=1" in bench.overrides


def test_recipes_match_rows_that_they_have() -> None:
    for recipe in RECIPES.values():
        assert {row["match"] for row in recipe.rows.values() if "match" in row} <= set(recipe.rows)
