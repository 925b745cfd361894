"""kanseg run: one command from a folder to a chosen model, which any stop may interrupt."""

from __future__ import annotations

import base64
import gc
import html
import io
import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from rich.console import Console
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.data.digests import file_digest
from kanseg.data.doctor import Diagnosis
from kanseg.data.findings import Finding
from kanseg.data.images import read_label, read_provenance
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.tables import read_rows
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.compare import load_scores
from kanseg.evaluation.folders import label_options
from kanseg.inference.ensemble import Loaded
from kanseg.inference.postprocess import apply_postprocessing
from kanseg.segmenter import Segmenter
from kanseg.training import pipeline
from kanseg.training.checkpoint import load_checkpoint
from kanseg.training.cross_validation import finished
from kanseg.training.pipeline import _examined, run_pipeline
from kanseg.training.run_folder import require_plan
from kanseg.training.run_report import write_report

QUICK = ["training.steps_per_epoch=4", "training.max_epochs=1", "data.workers=0", "data.folds=3"]


def run(balls, folder, *overrides, **options):
    """The pipeline with the small plan of the balls."""
    dataset, plan = balls
    (folder / "3d").mkdir(parents=True, exist_ok=True)
    if not (folder / "3d" / "plan.json").exists():
        plan.save(folder / "3d" / "plan.json")
    how = {"configurations": "3d", "console": Console(quiet=True), **options}
    return run_pipeline(dataset.source, folder, [*QUICK, *overrides], **how)


def run_in_process(balls, folder):
    gc.freeze()  # as in test_fit.py
    torch.set_num_threads(1)
    run(balls, folder)


@pytest.fixture(scope="module")
def done(balls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(balls, folder)


def test_the_folder_holds_a_model_that_predicts_and_a_report(balls, done, tmp_path):
    dataset, _ = balls
    folder, found = done
    assert found["choice"] == "3d"
    assert len(Loaded([folder]).files) == 3
    assert all(folder / "model" in file.parents for file in Loaded([folder]).files)
    shutil.copytree(folder / "model", tmp_path / "moved")
    moved = Loaded([tmp_path / "moved"])
    rules = json.loads((folder / "postprocessing.json").read_text())["rules"]
    assert moved.rules == rules == Loaded([folder]).rules
    calibration = json.loads((folder / "3d/calibration.json").read_text())
    assert moved.temperatures == pytest.approx([calibration["temperature"]])
    assert moved.quality == calibration["quality"]
    image = dataset.cases[0].images[0]
    told = CliRunner().invoke(
        app, ["predict", "-m", str(folder), "-i", str(image), "-o", str(tmp_path / "mask.nii.gz")]
    )
    assert told.exit_code == 0, told.output
    loaded = Segmenter.load(folder)
    assert np.array_equal(read_label(tmp_path / "mask.nii.gz"), loaded.predict(image))
    assert (len(loaded.network.members), loaded.rules) == (3, rules)
    report = (folder / "report.md").read_text()
    assert f"{found['dice']:.3f}" in report
    assert "6 unseen cases" in report


def test_every_label_map_tells_its_networks_and_its_image(balls, done, tmp_path):
    """Kept by a validation, or written by Python or the command line, which tell the same."""
    folder, _ = done
    case = balls[0].cases[0]
    kept = next(folder.glob(f"3d/fold_*/validation/{case.id}.nii.gz"))
    told = read_provenance(kept)
    assert told["models"] == [file_digest(kept.parents[1] / "best.safetensors")]
    assert told["images"] == [file_digest(case.images[0])]
    masks = [tmp_path / name for name in ("python.nii.gz", "command.nii.gz")]
    Segmenter.load(folder).predict(case.images[0], masks[0])
    words = ["predict", "-m", str(folder), "-i", str(case.images[0]), "-o", str(masks[1])]
    assert CliRunner().invoke(app, words).exit_code == 0
    one, other = map(read_provenance, masks)
    assert one == other
    assert one["models"] == [file_digest(file) for file in Loaded([folder]).files]
    assert one["images"] == told["images"]
    assert {**one, "models": told["models"], "post-processing": []} == told


def test_the_report_is_one_file_that_shows_all(balls, done, tmp_path):
    """Moved away from its run it still has its pictures, plan, splits, cost and versions."""
    _, plan = balls
    folder, found = done
    assert found["report"] == str(folder / "report.html")
    page = Path(shutil.copy(found["report"], tmp_path)).read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8  # Dice by case, volumes, four cases, reliability, curves
    for source in sources:
        picture = Picture.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert min(picture.size) > 200
    assert not re.search(r"<script|<link|@import|src=\"http", page)
    scores = read_rows(folder / "3d/cross_validation.csv")
    worst = min(scores, key=lambda row: float(row["dice"]))
    assert f"Worst case: {worst['case']}, mean Dice {float(worst['dice']):.3f}" in page
    for said in (
        *plan.reasons,
        "0.1.0",
        torch.__version__.partition("+")[0],
        "peak memory of the process",
        "3d/fold_2",
    ):
        assert said in html.unescape(page)
    splits = json.loads((folder / "3d/splits.json").read_text())
    assert all(", ".join(fold["val"]) in page for fold in splits)
    links = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text())
    assert len(links) == 8
    assert all((folder / link).is_file() for link in links)


def test_the_report_tells_volumes_settings_times_and_every_case(balls, done):
    """The mean difference and the limits of agreement are those of the label maps, counted here by hand."""
    dataset, plan = balls
    page = (done[0] / "report.md").read_text()
    rules = json.loads((done[0] / "3d/postprocessing.json").read_text())["rules"]
    said, true = [], []
    for case in dataset.cases:
        reference = nib.load(case.label)
        (file,) = (done[0] / "3d").glob(f"fold_*/validation/{case.id}.nii.gz")
        mask = apply_postprocessing(np.asarray(nib.load(file).dataobj), rules, reference.header.get_zooms())
        for labels, volumes in ((mask, said), (np.asarray(reference.dataobj), true)):
            sizes = [(labels == value).sum() for value in plan.label_values[1:]]
            volumes.append(np.array(sizes) * np.prod(reference.header.get_zooms()) / 1000)
    difference = np.array(said) - np.array(true)
    spread = 1.96 * difference.std(axis=0, ddof=1)
    rows = [
        line.strip("| ").split(" | ")
        for line in page.partition("### Volumes")[2].partition("###")[0].splitlines()
    ]
    rows = {row[0]: row for row in rows if row[0] in plan.label_names}
    for number, name in enumerate(plan.label_names[1:]):
        found = [float(word) for word in (*rows[name][1:4], *rows[name][4].split(" to "))]
        mean = difference[:, number].mean()
        wanted = [np.mean(true, axis=0)[number], np.mean(said, axis=0)[number], mean]
        wanted += [mean - spread[number], mean + spread[number]]
        assert found == pytest.approx(wanted, rel=0.006, abs=1e-9)
    manifest = json.loads((done[0] / "3d/fold_0/manifest.json").read_text())
    assert manifest["sessions"][0]["began"][:16].replace("T", " ") in page
    assert f"lr {manifest['config']['training']['lr']}" in page
    assert all(f"| {case.id} |" in page for case in dataset.cases)
    assert "`3d/cross_validation.csv`" in page
    assert "NSD (1 mm)" in page


def test_a_report_is_made_anew_from_what_is_there(balls, done, tmp_path):
    folder = Path(shutil.copytree(done[0], tmp_path / "run"))
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "report")
    one = write_report(folder).read_text()  # the data are read as the plan says
    assert one == Path(done[1]["report"]).read_text().replace(str(done[0]), str(folder))
    single = write_report(folder / "3d").read_text()  # as of `kanseg train -f all`
    assert "6 unseen cases" in single
    assert single.count("<img") == 8
    with pytest.raises(UserError, match=r"holds no plan.json"):
        write_report(folder / "model")


def test_a_report_says_when_folds_were_scored_after_the_pooling(balls, done, tmp_path):
    folder = Path(shutil.copytree(done[0] / "3d", tmp_path / "a run"))
    before = write_report(folder).read_text()
    assert "cases have scores now" not in before
    assert before.count("<img") == 8  # a blank in the name breaks no picture
    file = folder / "cross_validation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cases": 4}))
    assert "6 cases have scores now" in write_report(folder).read_text()


def test_called_again_it_does_nothing_anew_and_says_the_same(balls, done):
    folder, found = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("last.safetensors")}
    began = time.monotonic()
    assert run(balls, folder) == found
    assert time.monotonic() - began < 5
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("last.safetensors")} == before


def test_a_fold_whose_weights_are_damaged_is_named_and_trained_again_when_it_is_gone(balls, done, tmp_path):
    folder = Path(shutil.copytree(done[0], tmp_path / "run"))
    best = folder / "3d/fold_1/best.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"fold_1/best.safetensors is damaged"):
        run(balls, folder)
    shutil.rmtree(best.parent)
    assert run(balls, folder)["dice"] == done[1]["dice"]
    kept = [load_checkpoint(file / "3d/fold_1/best.safetensors")[0] for file in (folder, done[0])]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_other_options_are_named_and_taken_by_override(balls, done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "run")
    with pytest.raises(UsageError, match=r"training\.max_epochs=.*--override"):
        run(balls, folder, "training.max_epochs=2")
    run(balls, folder, "training.max_epochs=2", override=True)
    assert load_checkpoint(folder / "3d/fold_1/last.safetensors")[1]["state"]["epoch"] == 2


def test_the_folds_that_a_run_began_with_are_those_that_it_goes_on_with(balls, done, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "run")
    found = run(balls, folder, "data.folds=2", override=True)
    assert found["dice"] == done[1]["dice"]
    assert json.loads((folder / "3d/config.json").read_text())["data"]["folds"] == 3


def test_what_one_of_the_networks_does_not_take_is_refused_before_the_first_trains(balls, done, tmp_path):
    (tmp_path / "2d").mkdir()
    make_plan(balls[0], memory=2**30, dim=2).save(tmp_path / "2d" / "plan.json")
    with pytest.raises(UsageError, match=r"2d: .* is a 3D network.*--configurations 3d"):
        run(balls, tmp_path, f"training.weights={done[0] / '3d'}", configurations="3d,2d")
    assert not list(tmp_path.glob("*/fold_*"))


def test_minutes_are_shared_out_over_all_trainings(balls, tmp_path):
    run(balls, tmp_path, minutes=0.06, final="all")
    config = json.loads((tmp_path / "3d/config.json").read_text())
    assert config["training"]["max_minutes"] == pytest.approx(0.06 / 4)  # three folds and the final one
    (model,) = Loaded([tmp_path]).files
    last = load_checkpoint(tmp_path / "3d/fold_final/best.safetensors")[0]
    assert all(torch.equal(value, last[name]) for name, value in load_checkpoint(model)[0].items())


def test_killed_anywhere_it_ends_with_the_same_scores(balls, done, tmp_path, processes):
    folder = tmp_path / "run"
    for mark in ("3d/fold_0/last.safetensors", "3d/fold_1/log.jsonl", "3d/fold_2/validation"):
        process = processes.Process(target=run_in_process, args=(balls, folder), daemon=True)
        process.start()
        while not (folder / mark).exists() and process.is_alive():
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    found = run(balls, folder)
    assert found["dice"] == done[1]["dice"]
    for path in sorted((done[0] / "3d").glob("fold_*/validation/*.nii.gz")):
        assert np.array_equal(read_label(path), read_label(folder / path.relative_to(done[0])))


def test_a_fold_that_fails_is_the_end_s_error_after_all_else_is_done_and_the_next_call_makes_up_for_it(
    balls, done, tmp_path
):
    folder = shutil.copytree(done[0], tmp_path / "run")
    shutil.rmtree(folder / "3d/fold_1")
    (folder / "3d/fold_1").touch()  # where a folder is to be made
    arguments = ["run", str(balls[0].source), "-o", str(folder), "--configurations", "3d", "--json", *QUICK]
    ended = CliRunner().invoke(app, arguments)
    assert isinstance(ended.exception, UserError)
    assert re.search(r"\(fold 1 of 3d: .*File exists.*\)\. The same command goes on", str(ended.exception))
    found = json.loads(ended.stdout)
    assert "File exists" in found["failed"]["fold 1 of 3d"]
    assert found["dice"] > 0
    assert len(Loaded([folder]).files) == 2
    assert "**Fold 1 failed:**" in (folder / "report.md").read_text()
    (folder / "3d/fold_1").unlink()
    assert run(balls, folder)["dice"] == done[1]["dice"]
    assert len(Loaded([folder]).files) == 3


def test_what_a_fold_was_before_it_was_trained_anew_is_no_result(balls, done, tmp_path):
    """A kill may come between the last fold and the result of all."""
    folder = shutil.copytree(done[0], tmp_path / "run")
    splits = json.loads((folder / "3d/splits.json").read_text())
    before = finished(folder / "3d", splits)
    assert before == json.loads((folder / "3d/cross_validation.json").read_text())
    summary = folder / "3d/fold_1/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"minutes": 1.5}))
    assert finished(folder / "3d", splits) is None


def test_a_kill_while_a_finished_run_is_called_again_leaves_a_whole_model_or_none(
    balls, done, tmp_path, monkeypatch
):
    folder = shutil.copytree(done[0], tmp_path / "run")
    networks = len(Loaded([folder]).files)
    remove = shutil.rmtree

    def killed(path, **how):
        if any(Path(path).glob("fold_*")):
            remove(next(Path(path).glob("fold_*")))
            raise KeyboardInterrupt
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run(balls, folder)
    monkeypatch.undo()
    assert len(Loaded([folder / "model"]).files) == networks
    run(balls, folder)
    assert len(Loaded([folder]).files) == networks
    assert not list(folder.glob(".model*"))


def test_a_second_one_in_the_folder_is_refused(balls, done):
    from kanseg.files import locked

    with locked(done[0]), pytest.raises(UserError, match="runs in"):
        run(balls, done[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configurations": "4d"}, "Unknown configuration '4d'"),
        ({"final": "none"}, "--final is folds or all"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(balls, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run_pipeline(balls[0].source, tmp_path / "run", console=Console(quiet=True), **options)
    assert not (tmp_path / "run").exists()


def test_data_with_errors_are_repaired_and_trained_on_without_a_word_of_the_user(balls, tmp_path):
    dataset, plan = balls
    plan = replace(plan, label_values=[0, 1])  # a repaired copy numbers its classes 0, 1, 2, ...
    shutil.copytree(dataset.source.parent, tmp_path / "data")
    image = nib.load(dataset.cases[3].images[0])
    spoilt = np.array(image.dataobj)
    spoilt[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(spoilt, image.affine), tmp_path / "data/image3.nii.gz")
    found = run((replace(dataset, source=tmp_path / "data/cases.csv"), plan), tmp_path / "run")
    told = json.loads((tmp_path / "run/doctor.json").read_text())
    assert {finding["case"] for finding in told["findings"] if finding["severity"] == "error"} == {"image3"}
    assert "6 unseen cases" in (tmp_path / "run/report.md").read_text()
    assert found["choice"] == "3d"
    (tmp_path / "data").rename(tmp_path / "moved")  # it goes on where data and run have moved
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again = run((replace(dataset, source=tmp_path / "moved/cases.csv"), plan), tmp_path / "elsewhere")
    assert again["configurations"] == found["configurations"]
    nib.save(image, tmp_path / "moved/image3.nii.gz")
    with pytest.raises(UserError, match=r"changed since .*image3\.nii\.gz"):
        run((replace(dataset, source=tmp_path / "moved/cases.csv"), plan), tmp_path / "elsewhere")


def test_a_single_patient_is_trained_on_without_validation(balls, tmp_path):
    dataset, plan = balls
    lines = dataset.source.read_text().splitlines()
    shutil.copytree(dataset.source.parent, tmp_path / "data")
    (tmp_path / "data/cases.csv").write_text("\n".join(lines[:3]))  # the head, and two images of one patient
    found = run((replace(dataset, source=tmp_path / "data/cases.csv"), plan), tmp_path / "run")
    assert found["dice"] is None
    assert len(Loaded([tmp_path / "run"]).files) == 1
    assert "one patient" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_both_dimensions_and_their_ensemble_compete_on_volumes(blobs, tmp_path):
    options = [*QUICK, "data.folds=2"]
    found = run_pipeline(blobs, tmp_path, options, size="small", console=Console(quiet=True))
    assert set(found["configurations"]) == {"3d", "2d", "ensemble"}
    assert found["dice"] == max(found["configurations"].values())
    splits = [json.loads((tmp_path / name / "splits.json").read_text()) for name in ("3d", "2d")]
    assert splits[0] == splits[1]
    assert len(list((tmp_path / "ensemble/validation").iterdir())) == 6
    loaded = Loaded([tmp_path])
    assert len(loaded.files) == (4 if found["choice"] == "ensemble" else 2)
    known = {
        name: json.loads((tmp_path / name / "calibration.json").read_text())
        for name in found["configurations"]
    }
    assert "temperature" not in known["ensemble"]
    names = ("3d", "2d") if found["choice"] == "ensemble" else (found["choice"],)
    assert loaded.temperatures == pytest.approx([known[name]["temperature"] for name in names])
    assert loaded.quality == known[found["choice"]]["quality"]


def test_a_repaired_copy_does_not_hide_that_the_data_changed(blobs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(blobs, data)
    image = nib.load(data / "imagesTr" / "case_0.nii.gz")
    spoilt = np.asarray(image.dataobj, np.float32)
    spoilt[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(spoilt, image.affine), data / "imagesTr" / "case_0.nii.gz")
    console = Console(quiet=True)
    first = _examined(data, tmp_path / "run", None, console)
    assert first == _examined(data, tmp_path / "run", None, console)
    nib.save(image, data / "imagesTr" / "case_0.nii.gz")
    with pytest.raises(UserError, match=r"changed since .*case_0\.nii\.gz"):
        _examined(data, tmp_path / "run", None, console)


def test_options_of_a_plan_that_is_made_are_not_ignored(balls, done):
    folder, _ = done
    for option in ({"size": "large"}, {"memory": 2**30}, {"mirror": [0]}):
        with pytest.raises(UsageError, match="Choose another folder"):
            run(balls, folder, override=True, **option)


def test_the_folder_stands_for_its_choice_or_names_its_trainings(done):
    folder, found = done
    assert load_scores(folder) == load_scores(folder / found["choice"])
    assert label_options(str(folder))["labels"] == label_options(str(folder / "3d"))["labels"]
    with pytest.raises(UsageError, match=f"Its trainings are {folder / '3d'}"):
        require_plan(folder, "")


def test_regions_of_the_command_line_fit_a_repaired_copy_too(blobs, tmp_path):
    """Labels 2 and 5, and a voxel that is no number: the copy numbers its labels 1 and 2, and so do the regions."""
    data = Path(shutil.copytree(blobs, tmp_path / "data"))
    for path in sorted((data / "labelsTr").iterdir()):
        label = nib.load(path)
        nib.save(
            nib.Nifti1Image(np.array([0, 2, 5], np.uint8)[np.asarray(label.dataobj)], label.affine), path
        )
    described = json.loads((data / "dataset.json").read_text())
    described["labels"] = {"0": "background", "2": "near", "5": "far"}
    (data / "dataset.json").write_text(json.dumps(described))
    image = nib.load(data / "imagesTr/case_0.nii.gz")
    spoilt = np.array(image.dataobj)
    spoilt[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(spoilt, image.affine), data / "imagesTr/case_0.nii.gz")
    options = [*QUICK, "data.folds=2", "inference.overlap=0", "training.steps_per_epoch=1"]
    how = {"configurations": "2d", "size": "small", "console": Console(quiet=True)}
    run_pipeline(data, tmp_path / "run", options, regions={"both": [2, 5], "far": [5]}, **how)
    plan = Plan.load(tmp_path / "run/2d/plan.json")
    assert plan.regions == [[0], [1, 2], [2]]
    scores = json.loads((tmp_path / "run/2d/cross_validation.json").read_text())["metrics"]
    assert set(scores) == {"both", "far", "mean"}
    assert "both" in (tmp_path / "run/report.html").read_text()


def test_the_folder_of_a_single_training_is_refused(balls, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="is a run of kanseg plan and train.*Choose another folder"):
        run_pipeline(balls[0].source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_what_ends_a_run_is_named_and_not_what_could_be_repaired(balls, tmp_path, monkeypatch):
    kinds = [
        Finding("missing label", "a", "a has no label"),
        Finding("layout", "", "labels are strange"),
    ]
    monkeypatch.setattr(pipeline, "diagnose", lambda *a, **k: Diagnosis(Path("x"), "folders", 1, kinds))
    with pytest.raises(UserError, match="labels are strange"):
        run_pipeline(balls[0].source, tmp_path / "run", console=Console(quiet=True))


def test_the_report_has_words_and_no_code(done):
    page = (done[0] / "report.md").read_text()
    assert "Dice before post-processing" in page
    for code in ("{'", "[]", "None", "not told"):
        assert code not in page


def test_energy_is_a_column_where_it_was_measured_and_a_line_where_not(balls, done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    for joules, expected in ((None, (0, 1)), (7200, (1, 0))):
        manifest = folder / "3d/fold_0/manifest.json"
        for path in folder.glob("*/fold_*/manifest.json"):
            known = json.loads(path.read_text()) | {"energy_joules": joules if path == manifest else None}
            path.write_text(json.dumps(known))
        page = write_report(folder, balls[0]).with_suffix(".md").read_text()
        assert (page.count("energy (Wh)"), page.count("The energy was not measured")) == expected
    assert "| 2.0 |" in page
