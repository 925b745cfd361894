"""Logits of whole images: the mean over windows, the same in memory and on the disk, within what is allowed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from test_cli import kanseg

from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.transforms import restore
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.inference.logits import InMemory, OnDisk, whole_logits
from kanseg.inference.predict import predict, predict_case
from kanseg.memory import fits, free_memory, spill_folder
from kanseg.models import create_model
from kanseg.training.checkpoint import BEST, build_model, load_model, named, save_checkpoint

SMALL = {"features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [3, 3]}
MEGA = 2**20
CHILD = """
import sys
from kanseg.cli import main
from kanseg.inference.ensemble import Loaded
from kanseg.memory import taken
import kanseg.data.transforms

run, image, out, room = sys.argv[1:]
Loaded([run])
base = taken("VmRSS")
sys.argv = ["kanseg", "predict", "-m", run, "-i", image, "-o", out, "--overlap", "0"]
sys.argv += ["--memory", str(base + int(room))] if int(room) else []
main_exit = None
try:
    main()
except SystemExit as exit:
    main_exit = exit.code
print(taken("VmHWM") - base, main_exit)
"""


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31, mirror=[0, 1])
    return replace(made, patch_size=[16, 16, 16])


def network(dims: int, channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("ukanet", spatial_dims=dims, in_channels=channels, out_channels=3, **SMALL).eval()


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
def test_windows_are_blended_as_monai_does(plan: Plan, blending: str) -> None:
    model, image = network(3), torch.randn(1, 1, 27, 33, 11)  # one axis smaller than the window, unevenly
    with torch.no_grad():
        expected = sliding_window_inference(image, plan.patch_size, 2, model, overlap=0.4, mode=blending)
    found = whole_logits(model, image, plan, overlap=0.4, blending=blending)
    torch.testing.assert_close(torch.stack(list(found)), expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["volume", "thin", "slices"])
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("hold", [False, True])
def test_the_disk_holds_what_memory_would(
    plan: Plan, blobs: Path, kind: str, tta: bool, hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(1, 1, 21, 25, 11 if kind == "thin" else 18)
    if kind == "slices":
        image = image[..., :5]
        flat = make_plan(read_dataset(blobs), memory=2**31, dim=2, slices=3, mirror=[0, 1])
        plan = replace(flat, patch_size=[16, 16])
    model = network(plan.spatial_dims, plan.in_channels)
    seen: list[tuple[int, int]] = []
    room = 8 * len(plan.label_names) * image.numel() if hold else 2**10  # for some planes, or for none
    whole = 4 * len(plan.label_names) * image.numel()
    monkeypatch.setattr("kanseg.inference.logits.fits", lambda size, memory: size < memory and size != whole)
    kept = whole_logits(model, image, plan, tta=tta, memory=room, watch=lambda *at: seen.append(at))
    monkeypatch.undo()
    assert isinstance(kept, OnDisk)
    assert (kept.held is not None) == hold
    assert seen[-1][0] == seen[-1][1]
    wanted = whole_logits(model, image, plan, tta=tta)
    assert isinstance(wanted, InMemory)
    for one, other in zip(kept, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("regions", [False, True])
def test_label_map_and_probabilities_do_not_depend_on_where_logits_lie(
    plan: Plan, blobs: Path, regions: bool
) -> None:
    case = read_dataset(blobs).cases[0]
    other = replace(plan, spacing=[1.3, 1.0, 1.5], regions=[[0], [1, 2], [2]] if regions else [])
    in_memory, on_disk = (predict(network(3), case, other, memory=memory) for memory in (None, 2**20))
    assert (in_memory.labels() == on_disk.labels()).mean() > 0.9999
    chances = [np.stack([p.probability(k) for k in range(3)]) for p in (in_memory, on_disk)]
    np.testing.assert_allclose(*chances, atol=1e-4)
    plain = torch.stack(list(on_disk.parts[0].logits))
    alone = plain.sigmoid() if regions else plain.softmax(0)
    background = 1 - alone[1:].amax(0) if regions else alone[0]
    item = on_disk.parts[0].item
    np.testing.assert_allclose(restore(background[None], item, other)[0], chances[1][0], atol=1e-4)
    np.testing.assert_allclose(restore(alone[2:], item, other)[0], chances[1][2], atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_are_refused(plan: Plan, value: float) -> None:
    model = network(3)
    next(model.parameters()).data.view(-1)[0] = value
    with pytest.raises(UserError, match="values that are not finite"):
        whole_logits(model, torch.randn(1, 1, 16, 16, 16), plan)


def test_what_is_free_or_allowed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(100 * MEGA)
    assert not fits(free_memory())
    assert not fits(200 * MEGA, memory=2**30)  # the interpreter with torch is half of it, or more
    assert fits(10 * MEGA, memory=2**30)


FREED = """
import torch
from kanseg.memory import fits, taken
from kanseg.training.devices import keep_freed_memory
keep_freed_memory()
parts = [torch.ones(2**18) for _ in range(300)]  # 300 MiB
allowed = taken() + 100 * 2**20
assert not fits(100 * 2**20, allowed)
kept = parts[-1]  # nor does it lie at the end of the heap
del parts
assert fits(100 * 2**20, allowed)
assert kept.sum() == 2**18
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back to Linux alone")
def test_what_was_freed_and_kept_counts_as_free() -> None:
    # In a process of its own: what other tests freed would count.
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_disk_without_room_is_one_line(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**30, 2**30 - 10, 10))
    with pytest.raises(UserError, match="Name a larger disk by TMPDIR, or give more --memory"):
        whole_logits(network(3), torch.randn(1, 1, 64, 64, 64), plan, memory=2**20)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="the system has no file system in memory")
def test_what_does_not_fit_goes_to_no_file_system_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert spill_folder() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", "/dev/shm")  # a wish
    assert spill_folder() == "/dev/shm"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert spill_folder() == str(tmp_path)


WINDOW = """
import sys, torch
from kanseg.data.plan import Plan
from kanseg.inference.logits import bytes_of_window, whole_logits
from kanseg.memory import taken
from kanseg.models import create_model

plan = Plan.load(sys.argv[1])
sizes = {"features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [3, 3]}
model, image = create_model("ukanet", 3, 1, len(plan.label_names), **sizes).eval(), torch.randn(1, 1, 64, 64, 64)
whole_logits(model, image[..., :16, :16, :16], plan)
base = taken("VmRSS")
whole_logits(model, image, plan, overlap=0.0, memory=base + 16 * 2**20)
print((taken("VmHWM") - base) / bytes_of_window(plan))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory")
@pytest.mark.slow
def test_hundreds_of_classes_take_what_is_said_of_a_window(plan: Plan, tmp_path: Path) -> None:
    """Beyond it some MiB that do not grow with the classes; of the 200 classes of the image 210 MB lie on the disk."""
    names = [f"label {k}" for k in range(200)]
    replace(plan, label_names=names, label_values=list(range(200)), patch_size=[32] * 3).save(
        tmp_path / "plan.json"
    )
    command = [sys.executable, "-c", WINDOW, tmp_path / "plan.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory")
def test_predicting_many_classes_stays_within_the_memory(plan: Plan, tmp_path: Path) -> None:
    """100 classes of 72^3 voxels are 142 MiB of logits; 110 MiB are allowed beside the program."""
    classes, room = 100, 110 * MEGA
    names = [f"label {k}" for k in range(classes)]
    many = replace(plan, label_names=names, label_values=list(range(classes)), patch_size=[24] * 3)
    many = replace(many, spacing=[1.0, 1.0, 1.0])
    spec = {"name": "ukanet", "spatial_dims": 3, "in_channels": 1, "out_channels": classes, "options": SMALL}
    info = json.loads(json.dumps({"model": spec, "plan": many.to_dict()}))
    save_checkpoint(tmp_path / BEST, named("model", build_model(spec).state_dict()), info)
    scan = np.random.default_rng(0).normal(size=(72, 72, 72)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "scan.nii.gz")
    out = tmp_path / "out.nii.gz"
    command = [sys.executable, "-c", CHILD, tmp_path / BEST, tmp_path / "scan.nii.gz", out, room]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-2])
    print(f"peak {peak / MEGA:.0f} MiB beside the program")
    assert peak < room < classes * scan.nbytes
    little = kanseg(
        "predict", "-m", tmp_path / BEST, "-i", tmp_path / "scan.nii.gz", "-o", out, "--memory", "1M"
    )
    wanted = re.search(r"one window of 100 classes take, (\d+)M", little.stderr)
    assert wanted is not None, little.stderr
    window = 2 * classes * 24**3 * 4  # as the network makes it, and as it is added up
    assert int(wanted[1]) * MEGA > window
    model, _, _ = load_model(tmp_path / BEST)
    (case,) = find_images(tmp_path / "scan.nii.gz")
    labels, _ = predict_case(model, case, many, overlap=0)
    assert (labels == np.asarray(nib.load(out).dataobj)).mean() > 0.9999
