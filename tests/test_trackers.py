"""Trackers get the numbers, and none of them ever stops a training; the manifest tells what a training was."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from kanseg.config import load_config
from kanseg.data.fingerprint import fingerprint
from kanseg.errors import UserError
from kanseg.training import manifest, trackers
from kanseg.training.manifest import Energy, Manifest, digests
from kanseg.training.monitor import read_log
from kanseg.training.trackers import TRACKERS


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_never_stops_the_training(fit_balls, monkeypatch, name):
    def broken(folder, config):
        def track(numbers, epoch):
            raise ConnectionError("no network")

        return track

    def dead(folder, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    for number, start in enumerate((broken, dead)):
        monkeypatch.setitem(TRACKERS, name, start)
        options = ("training.max_epochs=1", "training.steps_per_epoch=1", f"logging.{name}=true")
        assert fit_balls(*options, fold=number, resume=True)["epochs"] == 1


def test_a_server_that_is_down_never_stops_the_training(fit_balls, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    assert fit_balls("training.max_epochs=1", "logging.mlflow=true")["epochs"] == 1
    assert time.monotonic() - began < 30


def test_a_tracker_that_is_not_installed_is_one_clear_message(fit_balls, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kanseg\[wandb\]'"):
        fit_balls("training.max_epochs=1", "logging.wandb=true")


def test_mlflow_holds_the_log(fit_balls, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    fit_balls("training.max_epochs=2", "logging.mlflow=true", "logging.project=balls")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/fold_0/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("balls").experiment_id])
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    assert history == [
        (record["epoch"], record["loss"]) for record in read_log(tmp_path / "run/fold_0/log.jsonl")
    ]
    assert run.data.params["training.loss"] == "dice_ce"


def test_tensorboard_holds_the_log(fit_balls, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit_balls("training.max_epochs=2", "logging.tensorboard=true")
    events = accumulator.EventAccumulator(str(tmp_path / "run/fold_0/tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in read_log(tmp_path / "run/fold_0/log.jsonl")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_wandb_works_offline(fit_balls, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit_balls("training.max_epochs=1", "logging.wandb=true")
    (folder,) = (tmp_path / "run/fold_0/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_the_manifest_tells_what_the_training_was(fit_balls, balls, tmp_path):
    fit_balls("training.max_epochs=1", "data.seed=3")
    fit_balls("training.max_epochs=2", resume=True)
    told = json.loads((tmp_path / "run/fold_0/manifest.json").read_text())
    assert told["seed"] == 3
    assert torch.__version__.startswith(told["versions"]["torch"])
    assert len(told["sessions"]) == 2
    assert told["sessions"][1]["minutes"] >= told["sessions"][0]["minutes"]
    assert told["sessions"][1]["peak_memory_mb"] > 0
    case = balls[0].cases[0]
    assert told["data"]["cases"][case.id] == digests([case])["cases"][case.id]
    assert {"processor", "cores", "memory_bytes", "device"} <= told["hardware"].keys()


def test_seeds_of_a_training_leave_the_split_alone(fit_balls, tmp_path):
    found = {}
    for seed in (0, 1):
        run = tmp_path / f"seed_{seed}"
        fit_balls("training.max_epochs=1", f"training.seed={seed}", "data.seed=3", run=run)
        (record,) = read_log(run / "fold_0/log.jsonl")
        found[seed] = (run / "splits.json").read_text(), record["loss"]
        assert json.loads((run / "fold_0/manifest.json").read_text())["seed"] == seed
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_changed_file_changes_the_digest(balls, tmp_path):
    from dataclasses import replace

    case = balls[0].cases[0]
    copy = tmp_path / "image.nii.gz"
    copy.write_bytes(case.images[0].read_bytes())
    same = replace(case, images=(copy,))
    assert digests([same]) == digests([case])
    copy.write_bytes(copy.read_bytes() + b"x")
    assert digests([same])["sha256"] != digests([case])["sha256"]
    known = fingerprint(balls[0])
    assert digests(balls[0].cases, known) == digests(balls[0].cases)


def test_files_that_a_plan_has_digested_are_not_read_again_by_whatever_path_it_knew_them(balls, monkeypatch):
    """A plan of DATA by a relative path names other paths than the training, which goes by the whole ones."""
    cases, known = balls[0].cases, fingerprint(balls[0])["cases"]
    wanted = digests(cases)
    monkeypatch.setattr(manifest, "file_digest", None)
    for entry in known.values():
        entry["files"] = {f"relative/{name}": file for name, file in entry["files"].items()}
    assert digests(cases, {"cases": known}) == wanted


def test_energy_is_counted_over_the_wrap_of_the_counter_and_unknown_where_nothing_is_told(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(manifest, "RAPL", tmp_path)
    assert Energy(torch.device("cpu")).used() == {"energy_joules": None, "energy_source": []}
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000")
    (package / "energy_uj").write_text("9000000")
    energy = Energy(torch.device("cpu"))
    (package / "energy_uj").write_text("1500000")
    assert energy.used() == {"energy_joules": 2.5, "energy_source": ["RAPL"]}
    (package / "energy_uj").write_text("2000000")
    assert energy.used()["energy_joules"] == 3.0


def test_a_manifest_that_a_kill_cut_short_is_made_anew(balls, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("{")
    Manifest(path, digests(balls[0].cases[:1]), torch.device("cpu"), config=load_config().model_dump()).write(
        minutes=1
    )
    assert len(json.loads(path.read_text())["sessions"]) == 1


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    code = (
        "import torch; from kanseg.training.monitor import peak_memory_mb; from kanseg.memory import taken\n"
        "print(peak_memory_mb(torch.device('cpu')), taken() / 2**20)"
    )
    ballast = np.ones(2**27)  # 1 GiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, now = map(float, done.stdout.split())
    assert abs(peak - now) < ballast.nbytes / 2**21
