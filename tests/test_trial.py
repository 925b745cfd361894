"""Memory is measured by steps, and a training stays within what was given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from kanseg.config import load_config
from kanseg.data.formats import read_dataset
from kanseg.data.loaders import affordable_workers
from kanseg.data.planner import make_plan
from kanseg.data.sizing import loader_bytes
from kanseg.errors import UsageError, UserError
from kanseg.training.pipeline import run_pipeline
from kanseg.training.planning import plan_data
from kanseg.training.trial import measure_step

MIB = 2**20
# Runs `kanseg` as a process of its own does, and then says how much of the memory it has had at most.
MEASURED = """
import sys
from kanseg.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

TRIAL = """
from kanseg.memory import taken
from kanseg.training.trial import main
main()
print(taken("VmHWM"))
"""

# What the loader's process takes of its own, at most after a few batches.
LOADER = """
import sys
from pathlib import Path
from kanseg.data.loaders import TrainLoader
from kanseg.data.plan import Plan, planned_dataset
from torch.multiprocessing import active_children

plan = Plan.load(sys.argv[1])
loader = TrainLoader(plan, planned_dataset(plan).cases, batch_size=plan.batch_size, steps=99, seed=0, workers=1)
batches, most = loader.batches(), 0
for _ in range(6):
    next(batches)
    (child,) = active_children()
    lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
    most = max(most, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
print(most * 1024)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure by")


def test_a_trial_step_tells_program_and_voxels_apart(blobs: Path) -> None:
    plan = make_plan(read_dataset(blobs), memory=2**31)
    narrow = replace(plan, features_per_stage=[8, 16], strides=[[1] * 3, [2] * 3], kernel_sizes=[[3] * 3] * 2)
    need = measure_step(narrow)
    assert need.base > 200 * MIB  # torch alone
    assert 8 * 4 * 3 < need.per_voxel < 50_000  # at least a few maps of 8 channels


def test_a_trial_that_fails_says_why(blobs: Path) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), model_options={"basis": "no such basis"})
    with pytest.raises(UserError, match="A trial step failed: .*no such basis.* --no-trial"):
        measure_step(plan)


@pytest.mark.parametrize("size", ["large", "small"])
def test_a_trial_keeps_within_the_memory_of_the_plan_too(blobs: Path, size: str) -> None:
    """Also one of a network whose weights, copied as a checkpoint copies them, would be more: it takes no step."""
    plan = make_plan(read_dataset(blobs), memory=2**31, size=size)
    if size == "large":
        plan = replace(plan, features_per_stage=[48, 192, 768], strides=[[1] * 3, [2] * 3, [2] * 3])
        plan = replace(plan, kernel_sizes=[[3] * 3] * 3, patch_size=[16] * 3)
    done = subprocess.run(
        [sys.executable, "-c", TRIAL],
        input=json.dumps(plan.to_dict()),
        capture_output=True,
        text=True,
        check=True,
    )
    *_, told, peak = done.stdout.splitlines()
    need = json.loads(told)
    assert int(peak) < plan.memory_bytes
    assert (need["base"] > plan.memory_bytes) == (need["per_voxel"] == 0) == (size == "large")


def test_a_loader_takes_no_more_than_plans_reckon_with(blobs: Path, tmp_path: Path) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), patch_size=[64, 64, 64], batch_size=2)
    command = [sys.executable, "-c", LOADER, str(plan.save(tmp_path / "plan.json"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.split()[-1])
    print(json.dumps({"reckoned": loader_bytes(plan) // MIB, "taken": taken // MIB}))
    assert 0.3 * loader_bytes(plan) < taken < loader_bytes(plan)


def test_more_loaders_than_fit_are_not_started(blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), training_bytes=2**31 - 300 * MIB)
    many = replace(plan, patch_size=[64, 64, 64], batch_size=2)  # 48 + 32 MiB a process
    assert affordable_workers(many, 2, batch_size=2) == 2
    assert capsys.readouterr().err == ""
    assert affordable_workers(many, 8, batch_size=2) == 300 * MIB // loader_bytes(many)
    assert "data.workers=8 would pass the memory" in capsys.readouterr().err
    assert affordable_workers(many, 8, batch_size=16) == 1
    assert affordable_workers(many, 0, batch_size=16) == 0
    assert affordable_workers(replace(many, training_bytes=0), 8, batch_size=2) == 8  # nothing was measured


@pytest.mark.slow
def test_planning_and_training_stay_within_the_memory(tmp_path: Path) -> None:
    """Volumes whose cases alone take more than their share, and that would fill any memory as patches."""
    memory, generator = 1900, np.random.default_rng(0)  # MiB
    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for number in range(6):
        label = np.zeros((128, 144, 160), np.uint8)
        label[30:60, 40:80, 50:90] = 1
        image = generator.normal(size=label.shape).astype(np.float32) + label
        for folder, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "set" / folder / f"{number}.nii.gz")

    def peak(*arguments: object) -> float:
        command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)[0]) / 1024

    run = tmp_path / "run"
    assert peak("plan", tmp_path / "set", "-o", run, "--memory", f"{memory}M") < memory
    options = [
        "training.max_epochs=1",
        "training.steps_per_epoch=3",
        "data.folds=3",
        "training.validation_cases=1",
    ]
    taken = peak("train", run, *options)
    print(json.dumps({"allowed": memory, "taken": taken}))
    assert 0.6 * memory < taken < memory


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.options.strides=[[1,1],[2,2]]"], "strides"),
        (["model.options.kernel_sizes=[3,3]"], "kernel_sizes"),
        (["training.freeze=[encodr.*]"], "encodr"),
    ],
)
def test_options_that_the_network_refuses_are_refused_before_a_step_is_measured(
    blobs, tmp_path, monkeypatch, words, message
):
    """By a training that must plan first, and by `kanseg run`."""
    monkeypatch.setattr("kanseg.training.planning.measure_step", lambda plan: sys.exit("measured"))
    quiet = Console(quiet=True)
    with pytest.raises(UsageError, match=message):
        plan_data(blobs, tmp_path / "a", config=load_config("default", words), console=quiet)
    with pytest.raises(UsageError, match=f"Configuration 3d: .*{message}"):
        run_pipeline(blobs, tmp_path / "b", words, configurations="3d", console=quiet)
    with pytest.raises(SystemExit, match="measured"):
        plan_data(blobs, tmp_path / "a", config=load_config("default"), console=quiet)
