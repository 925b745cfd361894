"""Several processes under `accelerate launch`, on the CPU over gloo: the loss curve of one with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import kanseg
from kanseg.errors import UsageError
from kanseg.progress import note
from kanseg.training.checkpoint import load_checkpoint, load_model
from kanseg.training.monitor import read_log
from kanseg.training.parallel import launched, once

OPTIONS = [
    "training.max_epochs=2",
    "training.steps_per_epoch=3",
    "training.loss=dice_ce",
    "data.workers=0",
    "data.folds=3",
    "model.options.features_per_stage=[4,8]",
    "model.options.strides=[1,2]",
    "model.options.kernel_sizes=[3,3]",
    "model.options.deep_supervision=false",
]


def launch(processes: int, *arguments: object, sharded: bool = False) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of the command line; where there is no GPU its processes compute on the CPU."""
    with started(processes, *arguments, sharded=sharded) as launcher:
        out, err = launcher.communicate(timeout=300)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err)


def started(processes: int, *arguments: object, sharded: bool = False) -> subprocess.Popen[str]:
    """The launcher, at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = ["--use_fsdp", "--fsdp_version", 2] if sharded else ["--multi_gpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--mixed_precision", "no"]
    command += ["--num_processes", processes, "--num_machines", 1, "--main_process_port", port]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", 1, "-m", "kanseg.cli", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(kanseg.__file__).parents[1]), *sys.path]),
    }
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], env=environment, **pipes)


@pytest.fixture(scope="module")
def alone(blobs, tmp_path_factory):
    """A run of one process with a batch of 2."""
    from kanseg.cli import app

    run = tmp_path_factory.mktemp("alone") / "run"
    app(
        ["train", str(blobs), *OPTIONS, "training.batch_size=2", "-o", str(run), "--json"],
        standalone_mode=False,
    )
    return run


@pytest.mark.parametrize(
    ("sharded", "resume"),
    [
        pytest.param(False, False, id="DDP"),
        pytest.param(False, True, id="DDP resumed", marks=pytest.mark.slow),
        pytest.param(True, True, id="FSDP resumed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_loss_curve_of_one_with_the_whole_batch(
    blobs, alone, tmp_path, sharded, resume
):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    run = tmp_path / "run"
    words = ("train", blobs, *OPTIONS, "training.batch_size=1", "-o", run)
    done = launch(2, *words, sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read_log(folder / "fold_0" / "log.jsonl") for folder in (alone, run)]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["mean_dice"] == pytest.approx(other["mean_dice"], abs=5e-3)
    one, other = (load_checkpoint(folder / "fold_0/last.safetensors")[0] for folder in (alone, run))
    assert {name for name in one if not name.startswith("rng")} == {
        n for n in other if not n.startswith("rng")
    }
    assert all(one[name].shape == other[name].shape for name in one)
    assert {"rng.0.torch", "rng.1.torch"} <= other.keys()
    summaries = [json.loads((folder / "fold_0/summary.json").read_text()) for folder in (alone, run)]
    assert summaries[0]["cases"].keys() == summaries[1]["cases"].keys()
    load_model(run)
    if not resume:
        return
    words = [word.replace("max_epochs=2", "max_epochs=3") for word in map(str, words)]
    resumed = launch(2, *words, "--resume", sharded=sharded)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [record["epoch"] for record in read_log(run / "fold_0/log.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(blobs, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    options = ["training.max_epochs=1000", "training.batch_size=1", *OPTIONS[1:]]
    last = tmp_path / "run/fold_0/last.safetensors"
    with started(2, "train", blobs, *options, "-o", tmp_path / "run") as launcher:
        while not last.exists():
            assert launcher.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(launcher.pid).children()
        launcher.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, 60)
    alive = [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    for worker in alive:
        worker.kill()
    assert not alive
    assert load_checkpoint(last)[1]["state"]["updates"] > 0
    assert not (last.parent / ".lock").exists()


@pytest.mark.slow
def test_variables_of_other_launchers_make_no_further_processes(fit_balls, monkeypatch, capsys):
    """As in a step of Slurm's, or a shell within another training."""
    for name in ("LOCAL_RANK", "RANK", "PMI_RANK"):
        monkeypatch.setenv(name, "3")
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    fit_balls("training.max_epochs=1")
    note("told")
    assert "told" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match="WORLD_SIZE=4 .* without .*MASTER_ADDR, MASTER_PORT .* unset WORLD_SIZE"
    ):
        once(lambda: None)
    for name, value in {"LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == 4  # as scripts of jobs start them, without torchrun


def test_two_processes_train_a_classifier_as_one_does(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    labels = np.arange(32)[:, None] % 2
    images = (labels[..., None] * 90 + np.random.default_rng(0).integers(0, 100, (32, 8, 8))).astype(np.uint8)
    parts = {
        f"{part}_{kind}": array
        for part in ("train", "val")
        for kind, array in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "classes.npz", **parts)
    options = ["model=classifier", "model.options.encoder=plainkanet4", "model.options.bottleneck=false"]
    options += [
        "model.options.encoder_options={layers:[4,8,8,8]}",
        "model.options.norm=instance",
        *OPTIONS[:2],
    ]
    options += ["model.options.head_dropout=0", "data.workers=0"]
    logs, summaries = [], []
    for processes, batch in ((1, 8), (2, 4)):
        run = tmp_path / str(processes)
        words = ["train", tmp_path / "classes.npz", *options, f"training.batch_size={batch}", "-o", run]
        if processes == 1:
            from kanseg.cli import app

            app([str(word) for word in [*words, "--json"]], standalone_mode=False)
        else:
            done = launch(2, *words)
            assert done.returncode == 0, done.stderr[-3000:]
        logs.append(read_log(run / "fold_0" / "log.jsonl"))
        summaries.append(json.loads((run / "fold_0" / "summary.json").read_text()))
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["accuracy"] == other["accuracy"]
    assert summaries[0]["images"] == summaries[1]["images"] == 32
    assert summaries[0]["auc"] == pytest.approx(summaries[1]["auc"], abs=1e-3)


@pytest.mark.slow
def test_the_whole_pipeline_runs_in_two_processes(blobs, tmp_path):
    """One of them plans, splits, chooses and reports; both train every fold."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    run = tmp_path / "run"
    options = ["training.max_epochs=1", "training.steps_per_epoch=2", "data.workers=0", "data.folds=2"]
    how = ["--size", "small", "--memory", "4G", "--configurations", "2d"]
    done = launch(2, "run", blobs, "-o", run, *how, *options, "inference.overlap=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "2d/cross_validation.json").read_text())["cases"] == 6
    assert "6 unseen cases" in (run / "report.html").read_text()
    assert done.stdout.count("Chosen: 2d") == 1
