"""kanseg.training.cross_validation: every case is predicted by a network that never saw it, come what may."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from kanseg.config import load_config
from kanseg.data import loaders
from kanseg.data.images import read_label
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.metrics import dice, summarize_rows
from kanseg.inference.calibration import CALIBRATION
from kanseg.inference.ensemble import Loaded
from kanseg.segmenter import Segmenter
from kanseg.training import cross_validation
from kanseg.training.checkpoint import load_checkpoint
from kanseg.training.cross_validation import cross_validate
from kanseg.training.fit import fit

QUICK = ["training.steps_per_epoch=4", "training.max_epochs=1", "data.workers=0", "data.folds=3"]


def validate(balls, run, *overrides, **options):
    dataset, plan = balls
    console = Console(quiet=True)
    return cross_validate(
        load_config(overrides=[*QUICK, *overrides]), plan, dataset, run, console=console, **options
    )


@pytest.fixture(scope="module")
def loaded():
    """How often each case was prepared for training or watching."""
    return Counter()


@pytest.fixture(scope="module")
def done(balls, tmp_path_factory, loaded):
    run, load = tmp_path_factory.mktemp("run"), loaders.load_case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "load_case", lambda case, plan: loaded.update([case.id]) or load(case, plan))
        return run, validate(balls, run)


def test_a_case_is_prepared_once_to_train_whatever_the_number_of_folds(balls, done, loaded):
    """And once more in the fold that it validates."""
    assert dict(loaded) == dict.fromkeys((case.id for case in balls[0].cases), 2)


def test_every_case_is_pooled_once_with_an_interval(balls, done):
    dataset, _ = balls
    run, found = done
    assert found["cases"] == len(dataset.cases) == 6
    assert found == json.loads((run / "cross_validation.json").read_text()) | {"folds": found["folds"]}
    scores = found["metrics"]["mean"]["dice"]
    assert scores["n"] == 6
    assert scores["ci95"][0] <= scores["mean"] <= scores["ci95"][1]
    rows = (run / "cross_validation.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {case.id for case in dataset.cases}


def test_the_kept_label_maps_are_what_the_folds_were_scored_by(balls, done):
    dataset, _ = balls
    run, found = done
    for fold, summary in found["folds"].items():
        for case in dataset.cases:
            path = run / f"fold_{fold}" / "validation" / f"{case.id}.nii.gz"
            assert path.exists() == (case.id in summary["cases"])
            if path.exists():
                mask, truth = read_label(path) == 7, read_label(case.label) == 7
                assert dice(mask, truth) == pytest.approx(summary["cases"][case.id]["label 7"])


def test_post_processing_is_stored_with_the_model_and_never_hurts(done):
    run, found = done
    assert Loaded([run]).rules == found["postprocessing"]
    assert found["metrics"]["mean"]["dice"]["mean"] >= found["dice_without_postprocessing"]
    assert len(Loaded([run]).files) == 3


def test_calibration_is_stored_with_the_model_and_saved_with_it(balls, done, tmp_path):
    """Six cases are too few to tell a Dice by, not for a temperature, and their volumes are those of the references."""
    run, _ = done
    kept = json.loads((run / CALIBRATION).read_text())
    assert kept["cases"] == kept["quality"]["cases"] == 6
    assert len(kept["temperatures"]) == 3
    sizes = [float((read_label(case.label) == 7).sum() / 1000) for case in balls[0].cases]
    assert kept["quality"]["classes"] == {"label 7": {"volume_ml": pytest.approx([min(sizes), max(sizes)])}}
    loaded = Loaded([run])
    assert loaded.temperatures == pytest.approx([kept["temperature"]])
    assert loaded.quality == kept["quality"]
    Segmenter.load(run).save(tmp_path / "saved")
    saved = Loaded([tmp_path / "saved"])
    assert (saved.temperatures, saved.quality) == (loaded.temperatures, loaded.quality)
    assert Loaded([run / "fold_1"]).temperatures == pytest.approx(loaded.temperatures)


def test_without_a_sample_of_every_case_nothing_is_calibrated(balls, done, tmp_path, capsys):
    """As of folds that an earlier version validated."""
    run = shutil.copytree(done[0], tmp_path / "run")
    (lost := next(run.glob("fold_1/calibration/*"))).unlink()
    assert validate(balls, run, resume=True)["metrics"] == done[1]["metrics"]
    said = " ".join(capsys.readouterr().err.split())
    assert "Probabilities are not calibrated" in said
    assert f"kept nothing for it of {lost.stem}. Train those folds anew" in said
    assert not (run / CALIBRATION).exists()
    assert Loaded([run]).temperatures == [1]


def test_finished_folds_are_left_alone_and_the_others_made(balls, done):
    run, found = done
    marks = {fold: (run / f"fold_{fold}/last.safetensors").stat().st_mtime_ns for fold in range(3)}
    with pytest.raises(UsageError, match="--resume"):
        validate(balls, run)
    (run / "fold_1/summary.json").unlink()
    (run / "fold_1/last.safetensors").unlink()
    again = validate(balls, run, resume=True)
    assert again["metrics"] == found["metrics"]
    for fold, mark in marks.items():
        assert ((run / f"fold_{fold}/last.safetensors").stat().st_mtime_ns == mark) == (fold != 1)


def test_a_fold_that_was_trained_without_its_last_validation_makes_it_up(balls, done, tmp_path):
    dataset, plan = balls
    overrides = [*QUICK, "training.final_validation=false"]
    fit(load_config(overrides=overrides), plan, dataset, tmp_path / "run", console=Console(quiet=True))
    assert validate(balls, tmp_path / "run", resume=True)["metrics"] == done[1]["metrics"]


def test_a_fold_that_fails_does_not_stop_the_others(balls, tmp_path, monkeypatch):
    for error in (UserError, ValueError, OSError):

        def failing(*arguments, fold, error=error, **options):
            if fold == 0:
                raise error("the loss became nan")
            return fit(*arguments, fold=fold, **options)

        monkeypatch.setattr(cross_validation, "fit", failing)
        found = validate(balls, tmp_path / "run", resume=True)
        kind = "" if error is UserError else f"{error.__name__}: "
        assert found["failed"] == {0: f"{kind}the loss became nan"}
        assert list(found["folds"]) == [1, 2]
        assert found["cases"] == 4
    monkeypatch.setattr(cross_validation, "fit", fit)
    healed = validate(balls, tmp_path / "run", resume=True)
    assert not healed["failed"]
    assert healed["cases"] == 6


def test_options_of_a_finished_fold_are_not_changed_silently(balls, done):
    run, _ = done
    with pytest.raises(UsageError, match=r"training\.lr=0\.001, not 0\.5.*--override"):
        validate(balls, run, "training.lr=0.5", resume=True)
    assert load_checkpoint(run / "fold_0/last.safetensors")[1]["config"]["training"]["lr"] == 0.001


def test_intervals_draw_whole_patients():
    rows = [{"case": f"c{i}", "label": "a", "dice": i % 2, "iou": 1, "hd95": 1, "nsd": 1} for i in range(16)]
    alone = summarize_rows(rows)["a"]["dice"]
    pairs = summarize_rows(rows, groups={f"c{i}": f"p{i // 2}" for i in range(16)})["a"]["dice"]
    assert alone["mean"] == pairs["mean"] == 0.5
    assert alone["ci95"][0] < 0.3
    assert np.allclose(pairs["ci95"], 0.5)


def test_a_segmenter_fits_all_folds(balls, tmp_path):
    dataset, plan = balls
    plan.save(tmp_path / "plan.json")
    quick = [*QUICK, "training.steps_per_epoch=1"]
    segmenter = Segmenter().fit(dataset.source, tmp_path, fold="all", overrides=quick)
    assert segmenter.summary["cases"] == 6
    assert segmenter.predict(dataset.cases[0].images[0]).shape == (14, 14, 14)
