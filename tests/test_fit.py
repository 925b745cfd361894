"""kanseg.training.fit: it learns, it survives kills, it goes on exactly, and it says what is wrong."""

from __future__ import annotations

import gc
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image as Picture
from rich.console import Console

from kanseg import files
from kanseg.config import load_config
from kanseg.data.loaders import Prepared
from kanseg.data.plan import Plan
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.metrics import bootstrap_interval, dice_of_values
from kanseg.training.checkpoint import load_checkpoint, load_model, read_info
from kanseg.training.fit import Trainer, fit
from kanseg.training.monitor import Monitor, draw_progress, read_log
from kanseg.training.optimizers import lr_factor, update_average
from kanseg.training.segmentation import Segmentation
from kanseg.training.state import State
from kanseg.training.stop import LAUNCHED
from kanseg.training.validate import affordable_cases, spread

SHORT = ["training.steps_per_epoch=4", "data.workers=0", "data.folds=3", "training.final_validation=false"]
pytestmark = pytest.mark.usefixtures("one_thread")


def train(balls, run, *overrides, **options):
    dataset, plan = balls
    config = load_config(overrides=[*SHORT, *overrides])
    return fit(config, plan, dataset, run, console=Console(quiet=True), **options)


STEPPED = "stepped"  # beside a run whose training has come to its steps


def train_in_process(dataset, plan, run, overrides, seconds_a_step, kill_at=-1):
    """Body of a process to kill; a step is slowed down so that signals meet every place.

    Args:
        kill_at: step, of all epochs, in which the process kills itself.
    """
    gc.freeze()  # what was imported: collections, of which there are many, take a second here otherwise
    torch.set_num_threads(1)
    step = Trainer._train_step

    def slow_step(self, batch):
        time.sleep(seconds_a_step)
        if self.state.updates == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(run).parent / STEPPED).touch()
        return step(self, batch)

    Trainer._train_step = slow_step
    fit(load_config(overrides=overrides), plan, dataset, run, resume=True, console=Console(quiet=True))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_it_learns_and_leaves_a_complete_run_folder(balls, tmp_path):
    run = tmp_path / "run"
    summary = train(
        balls,
        run,
        "training.max_epochs=5",
        "training.steps_per_epoch=15",
        "training.lr=0.01",
        "training.ema_decay=0.9",
        "training.final_validation=true",
    )
    fold = run / "fold_0"
    written = {path.name for path in fold.iterdir()}
    files = {"log.jsonl", "last.safetensors", "best.safetensors", "summary.json", "progress.png"}
    assert written == files | {"manifest.json", "validation", "calibration"}
    assert {path.name for path in run.iterdir()} == {"config.json", "plan.json", "splits.json", "fold_0"}
    assert summary == json.loads((fold / "summary.json").read_text())
    assert summary["dice"]["mean"] > 0.7
    assert summary["ci95"]["mean"][0] <= summary["dice"]["mean"] <= summary["ci95"]["mean"][1]
    records = read_log(fold / "log.jsonl")
    assert [record["epoch"] for record in records] == list(range(5))
    assert records[-1]["loss"] < records[0]["loss"]
    keys = {"loss", "lr", "dice", "mean_dice", "seconds", "total_seconds", "data_wait", "peak_memory_mb"}
    assert keys <= records[0].keys()
    assert summary["best_epoch_dice"] == max(record["mean_dice"] for record in records)


def test_the_checkpoint_alone_gives_the_model_its_plan_and_labels(balls, tmp_path):
    train(balls, tmp_path / "run", "training.max_epochs=1")
    model, plan, info = load_model(tmp_path / "run")
    assert plan == Plan.load(tmp_path / "run" / "plan.json")
    assert not model.training
    assert list(info["labels"].values()) == [0, 7]
    assert {"kanseg", "torch", "monai"} <= info["versions"].keys()
    assert model(torch.zeros(1, 1, 9, 10, 11)).shape == (1, 2, 9, 10, 11)


def test_patients_are_on_one_side_of_the_split_and_a_given_split_is_kept(balls, tmp_path):
    dataset, _ = balls
    train(balls, tmp_path / "run", "training.max_epochs=1")
    patient = {case.id: case.group for case in dataset.cases}
    for fold in json.loads((tmp_path / "run" / "splits.json").read_text()):
        assert not {patient[case] for case in fold["train"]} & {patient[case] for case in fold["val"]}
    own = [{"train": ["image0", "image1"], "val": ["image5"]}]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "splits.json").write_text(json.dumps(own))
    summary = train(balls, tmp_path / "own", "training.max_epochs=1", "training.final_validation=true")
    assert list(summary["cases"]) == ["image5"]
    (tmp_path / "own" / "splits.json").write_text(json.dumps([{"train": ["nobody"], "val": []}]))
    with pytest.raises(UserError, match="nobody"):
        train(balls, tmp_path / "own", "training.max_epochs=2", resume=True)


def test_a_training_on_all_cases_keeps_its_last_weights(balls, tmp_path):
    summary = train(balls, tmp_path / "run", "training.max_epochs=1", fold="final")
    assert summary["best_epoch"] is None
    assert (tmp_path / "run" / "fold_final" / "best.safetensors").exists()
    with pytest.raises(UsageError, match="no fold 3"):
        train(balls, tmp_path / "run", "training.max_epochs=1", fold=3)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_interrupted_training_ends_with_the_same_bits(balls, tmp_path, monkeypatch, workers):
    options = ("training.max_epochs=3", f"data.workers={workers}", "model.options.dropout=0.3")
    train(balls, tmp_path / "straight", *options)
    step, count = Trainer._train_step, 0

    def interrupted(self, batch):
        nonlocal count
        count += 1
        if count in (2, 4, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    for _ in range(3):
        with pytest.raises(SystemExit) as stop:
            train(balls, tmp_path / "stopped", *options, resume=True)
        assert stop.value.code == 143
    train(balls, tmp_path / "stopped", *options, resume=True)
    assert count == 12
    one, other = (
        load_checkpoint(tmp_path / name / "fold_0/last.safetensors") for name in ("straight", "stopped")
    )
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    logs = [read_log(tmp_path / name / "fold_0/log.jsonl") for name in ("straight", "stopped")]
    for key in ("epoch", "loss", "lr", "dice"):
        assert [record[key] for record in logs[0]] == [record[key] for record in logs[1]]


@pytest.mark.parametrize(
    "minutes",
    [
        pytest.param(1e-9, id="a checkpoint a step"),
        pytest.param(10, id="a checkpoint an epoch", marks=pytest.mark.slow),
    ],
)
def test_a_training_killed_at_several_steps_repeats_the_uninterrupted_loss_curve(
    balls, tmp_path, processes, minutes
):
    overrides = [
        *SHORT,
        "training.max_epochs=3",
        "model.options.dropout=0.3",
        f"training.save_minutes={minutes}",
    ]
    train(balls, tmp_path / "straight", *overrides)
    for kill_at in (1, 5, 11, -1):  # within epochs, and in the first and last step of one
        arguments = (*balls, tmp_path / "killed", overrides, 0.0, kill_at)
        process = processes.Process(target=train_in_process, args=arguments, daemon=True)
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_at >= 0 else 0)
    logs = [read_log(tmp_path / name / "fold_0/log.jsonl") for name in ("straight", "killed")]
    for key in ("epoch", "loss", "lr", "dice"):
        assert [record[key] for record in logs[0]] == [record[key] for record in logs[1]]
    one, other = (
        load_checkpoint(tmp_path / n / "fold_0/last.safetensors")[0] for n in ("straight", "killed")
    )
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_sigkill_at_any_moment_leaves_a_checkpoint_to_go_on_from(balls, tmp_path, processes):
    last = tmp_path / "run" / "fold_0" / "last.safetensors"
    overrides = [*SHORT, "training.max_epochs=1000", "training.steps_per_epoch=1"]
    chance, updates = random.Random(0), [0]

    def steps_done():
        return read_info(last)["state"]["updates"] if last.exists() else 0

    for _ in range(5):
        arguments = (*balls, tmp_path / "run", overrides, 0.0)
        process = processes.Process(target=train_in_process, args=arguments, daemon=True)
        process.start()
        wait_for(lambda: steps_done() > updates[-1])
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        updates.append(steps_done())
        load_model(last)
        load_model(tmp_path / "run")
    assert updates == sorted(set(updates))
    epochs = [record["epoch"] for record in read_log(last.parent / "log.jsonl")]
    assert epochs == list(range(len(epochs)))


def test_sigterm_saves_within_the_epoch_and_exits_with_143(balls, tmp_path, processes):
    last = tmp_path / "run" / "fold_0" / "last.safetensors"
    overrides = [*SHORT, "training.max_epochs=1000", "training.steps_per_epoch=50"]
    process = processes.Process(
        target=train_in_process, args=(*balls, tmp_path / "run", overrides, 0.05), daemon=True
    )
    process.start()
    wait_for((tmp_path / STEPPED).exists)
    time.sleep(1)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert 0 < load_checkpoint(last)[1]["state"]["step"] < 50
    assert not (last.parent / ".lock").exists()


@pytest.mark.parametrize(
    ("number", "left"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_while_data_are_read_is_heeded_at_once(balls, tmp_path, monkeypatch, number, left):
    """Many cases take long to read, and a second Ctrl-C should not be needed; there is nothing to save."""
    went_on = []

    def interrupted(*cases):
        os.kill(os.getpid(), number)
        went_on.append(True)

    monkeypatch.setattr(Prepared, "places", interrupted)
    with pytest.raises(left):
        train(balls, tmp_path / "run")
    assert not went_on
    assert not (tmp_path / "run/fold_0/.lock").exists()


def launch_and_wait(*arguments):
    """Body of a process that starts a training, as torchrun does, and waits for it."""
    os.environ[LAUNCHED] = "none"
    process = multiprocessing.get_context("fork").Process(target=train_in_process, args=arguments)
    process.start()
    process.join()


def test_a_training_whose_launcher_is_killed_saves_and_ends(balls, tmp_path, processes):
    last = tmp_path / "run" / "fold_0" / "last.safetensors"
    overrides = [*SHORT, "training.max_epochs=1000", "training.steps_per_epoch=50"]
    launcher = processes.Process(target=launch_and_wait, args=(*balls, tmp_path / "run", overrides, 0.02))
    launcher.start()
    wait_for((tmp_path / STEPPED).exists)
    (worker,) = psutil.Process(launcher.pid).children()
    time.sleep(0.5)
    launcher.kill()
    try:
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    finally:
        worker.kill()
    assert 0 < load_checkpoint(last)[1]["state"]["step"] < 50
    assert not (last.parent / ".lock").exists()


def test_a_signal_that_ends_the_workers_during_a_validation_is_a_stop_and_no_failure(
    balls, tmp_path, monkeypatch
):
    def interrupted(self, model, item, device):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    monkeypatch.setattr(Segmentation, "score", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(balls, tmp_path / "run", "training.max_epochs=1")
    assert stop.value.code == 143
    assert not (tmp_path / "run/fold_0/.lock").exists()


def test_a_second_training_in_the_folder_is_refused(balls, tmp_path):
    run = tmp_path / "run"
    train(balls, run, "training.max_epochs=1")
    with pytest.raises(UsageError, match="--resume"):
        train(balls, run, "training.max_epochs=1")
    with pytest.raises(UsageError, match="other options"):
        train(balls, run, "training.max_epochs=1", "training.lr=0.5", fold=1)
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    with files.locked(run / "fold_0"), pytest.raises(UserError, match="runs in"):
        train(balls, run, "training.max_epochs=2", "training.lr=0.5", resume=True, override=True)
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before  # nor does the first one change


@pytest.mark.parametrize("damage", [b'{"epoch": 2, "lo', b"[1]\n", b"\xff\xfe\n", b"{}\n"])
def test_a_log_is_read_up_to_its_first_damaged_line(tmp_path, damage):
    whole = b'{"epoch": 0, "loss": 1}\n{"epoch": 1, "loss": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + damage)
    assert [record["epoch"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1]


def test_a_summary_that_was_damaged_is_made_again(balls, tmp_path):
    run = tmp_path / "run"
    summary = train(balls, run, "training.max_epochs=1")
    (run / "fold_0" / "summary.json").write_text('{"a":')
    assert train(balls, run, "training.max_epochs=1", resume=True) == summary


def test_damaged_weights_of_a_finished_training_are_noticed_and_trained_again(balls, tmp_path):
    run = tmp_path / "run"
    best = run / "fold_0" / "best.safetensors"
    summary = train(balls, run, "training.max_epochs=1")
    whole = best.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        best.write_bytes(damaged)
        with pytest.raises(UserError, match=r"best.safetensors is damaged.*delete .*fold_0"):
            train(balls, run, "training.max_epochs=1", resume=True)
    best.write_bytes(whole)
    assert train(balls, run, "training.max_epochs=1", resume=True) == summary
    shutil.rmtree(best.parent)
    again = train(balls, run, "training.max_epochs=1", resume=True)
    assert again["best_epoch_dice"] == summary["best_epoch_dice"]
    state = {**json.loads((best.parent / "summary.json").read_text()), "updates": 1}  # of an earlier end
    (best.parent / "summary.json").write_text(json.dumps(state))
    assert train(balls, run, "training.max_epochs=1", resume=True) == again


def test_a_finished_training_goes_on_when_it_gets_more_time(balls, tmp_path):
    run = tmp_path / "run"
    train(balls, run, "training.max_epochs=1")
    assert train(balls, run, "training.max_epochs=1", resume=True)["epochs"] == 1
    assert train(balls, run, "training.max_epochs=2", resume=True)["epochs"] == 2
    with pytest.raises(UsageError, match=r"training\.loss"):
        train(balls, run, "training.loss=dice", resume=True)


@pytest.mark.parametrize(
    "override", ["training.max_epoch=1", "model.name=ukante", "model.options.basis=grma"]
)
def test_an_unknown_name_is_refused_before_anything_is_written(balls, tmp_path, override):
    with pytest.raises(UsageError, match="Did you mean"):
        train(balls, tmp_path / "run", override)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit_the_model_are_refused_before_anything_is_written(balls, tmp_path):
    with pytest.raises(UsageError, match="features_per_stage"):
        train(balls, tmp_path / "run", "model.options.features_per_stage=[4,8]")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_other_data_is_refused(balls, tmp_path):
    dataset, plan = balls
    with pytest.raises(UserError, match="label_values"):
        train((dataset, replace(plan, label_values=[0, 1])), tmp_path / "run")
    with pytest.raises(UserError, match="channel_names"):
        train((dataset, replace(plan, channel_names=["T1", "T2"])), tmp_path / "run")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_stop_being_finite_stop_the_run_with_their_place(balls, tmp_path, monkeypatch, what):
    step = Trainer._train_step

    def poisoned(self, batch):
        if self.state.updates == 5 and what == "loss":
            batch[0]["image"][:] = math.nan
        elif self.state.updates == 5:
            next(self.model.parameters()).register_hook(lambda grad: grad * math.inf)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    with pytest.raises(UserError, match=f"{what} became .* in epoch 1, step 1"):
        train(balls, tmp_path / "run", "training.max_epochs=2")
    assert load_checkpoint(tmp_path / "run/fold_0/last.safetensors")[1]["state"]["epoch"] == 1


def test_a_full_disk_leaves_the_last_checkpoint(balls, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(balls, run, "training.max_epochs=1")
    before = (run / "fold_0" / "last.safetensors").read_bytes()
    write = files.os.fsync

    def full(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name.startswith(".last.safetensors.") and name.endswith(".part"):
            raise OSError(28, "No space left on device")
        write(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell one file from another")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        train(balls, run, "training.max_epochs=2", resume=True)
    assert (run / "fold_0" / "last.safetensors").read_bytes() == before
    assert not list(run.rglob("*.part"))
    assert not list(run.rglob(".lock"))


def test_a_last_checkpoint_that_lost_its_optimizer_is_refused(balls, tmp_path):
    train(balls, tmp_path / "run", "training.max_epochs=1")
    fold = tmp_path / "run" / "fold_0"
    (fold / "last.safetensors").write_bytes((fold / "best.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"last\.safetensors"):
        train(balls, tmp_path / "run", "training.max_epochs=2", resume=True)


def test_plain_lines_tell_loss_dice_and_time_left(balls, tmp_path):
    dataset, plan = balls
    with (tmp_path / "out.txt").open("w+") as out:
        config = load_config(overrides=[*SHORT, "training.max_epochs=2"])
        fit(config, plan, dataset, tmp_path / "run", console=Console(file=out, force_terminal=False))
        out.seek(0)
        lines = out.read().splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert all(word in lines[0] for word in ("loss", "Dice", "lr", "left"))


def test_time_counts_over_resumes_and_ends_the_training(balls, tmp_path):
    options = load_config(overrides=["training.max_minutes=0.05"]).training
    assert State(seconds=1.5).fraction(options) == pytest.approx(0.5)
    began = time.monotonic()
    summary = train(balls, tmp_path / "run", "training.max_minutes=0.05")
    assert 0.05 <= summary["minutes"] < (time.monotonic() - began) / 60
    assert train(balls, tmp_path / "run", resume=True)["updates"] == summary["updates"]


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [lr_factor(fraction / 1000) for fraction in range(1001)]
    assert 0 < factors[0] < factors[19]
    assert factors[20] == max(factors)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] == 0
    assert lr_factor(0.5, warmup=0) == 0.5**0.9


def test_the_average_of_constant_weights_is_those_weights():
    model = torch.nn.BatchNorm1d(2)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 5):
        model.num_batches_tracked += 1
        update_average(average, model, 0.9, step)
    assert all(torch.equal(average[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.weight.fill_(3.0)
    update_average(average, model, 0.9, 10_000)
    assert average["weight"].tolist() == pytest.approx([1.2, 1.2])


def test_a_young_average_is_the_mean_over_few_steps():
    """Were it as slow as later on, the random weights of the start would still be in it."""
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.ones_(model.weight)
    left = 1.0
    for step in range(1, 9):
        update_average(average, model, 0.999, step)
        left *= (1 + step) / (10 + step)
        assert average["weight"].item() == pytest.approx(1 - left)


def test_dice_of_classes_absent_from_both_is_one_and_missed_ones_zero():
    prediction, reference = np.array([[0, 1, 1]]), np.array([[0, 1, 2]])
    assert dice_of_values(prediction, reference, [1, 2, 3]) == pytest.approx([2 / 3, 0.0, 1.0])


def test_the_interval_draws_patients_not_images():
    values = np.array([0.0, 1.0] * 8)
    low, high = bootstrap_interval(values, [str(i) for i in range(16)], 0)
    assert low < 0.3 < 0.7 < high
    assert bootstrap_interval(values, [str(i // 2) for i in range(16)], 0) == [0.5, 0.5]


def test_the_watched_cases_are_spread_over_all():
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(10), None) == range(10)


def test_large_images_are_watched_by_few_cases_while_training_goes_on(balls):
    _, plan = balls
    large = {"size": {"median": [240, 240, 155]}, "spacing": {"median": [1.0, 1.0, 1.0]}}
    volumes = replace(plan, patch_size=[48, 48, 48], spacing=[1.0] * 3, fingerprint=large)
    windows = 7 * 7 * 4  # steps of 36 voxels
    assert affordable_cases(volumes, patches=200) == 600 // windows
    assert affordable_cases(volumes, patches=2) == 2
    coarse = replace(volumes, spacing=[2.0] * 3)
    assert affordable_cases(coarse, patches=200) == 600 // (3 * 3 * 2)
    slices = replace(volumes, spatial_dims=2, slice_axis=2, patch_size=[240, 240], spacing=[1.0, 1.0])
    assert affordable_cases(slices, patches=1200) == 3600 // 155
    assert affordable_cases(replace(plan, fingerprint={}), patches=200) is None


@pytest.mark.filterwarnings("error::UserWarning")
def test_hundreds_of_classes_leave_lines_short_and_room_for_the_curves(tmp_path: Path) -> None:
    scores = {f"label {number}": number / 200 for number in range(1, 200)}
    record = {
        "epoch": 0,
        "loss": 1.0,
        "lr": 0.1,
        "dice": scores,
        "mean_dice": 0.5,
        "seconds": 1.0,
        "data_wait": 0.0,
    }
    lines = io.StringIO()
    with Monitor(tmp_path, load_config(), console=Console(file=lines)) as monitor:
        monitor.epoch({**record, "total_seconds": 1.0}, 0.5)
        monitor.picture(every=60)
        assert not (tmp_path / "progress.png").exists()
        monitor.picture()
    assert "Dice 0.500 (lowest of 199: label 1 0.005, label 2 0.010, label 3 0.015)" in lines.getvalue()
    assert read_log(tmp_path / "log.jsonl")[0]["dice"] == scores
    assert (tmp_path / "progress.png").stat().st_size > 0


def test_the_picture_of_a_training_has_a_panel_for_scores_only_where_there_are_some() -> None:
    scored = [{"epoch": 0, "loss": 2.0, "dice": {"a": 0.5}}, {"epoch": 1, "loss": 1.0, "dice": {}}]
    bare = [{**record, "dice": {}} for record in scored]
    both, alone = (Picture.open(io.BytesIO(draw_progress(records))) for records in (scored, bare))
    assert both.width > 1.5 * alone.width
