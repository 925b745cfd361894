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

from kanseg.data.formats import read_dataset
from kanseg.data.plan import make_plan
from kanseg.errors import UserError
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
