"""What may be mirrored is: in training and in prediction, along the axes of the plan and no others."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kanseg.data.formats import read_dataset
from kanseg.data.mirror import mirror_axes, pairs_of_sides
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.transforms import augmentation, load_case, preparation
from kanseg.errors import UsageError, UserError
from kanseg.inference.logits import whole_logits
from kanseg.models import create_model
from kanseg.training.pipeline import run_pipeline


@pytest.fixture
def sided(blobs: Path, tmp_path: Path) -> Path:
    """The blobs with labels that tell left from right."""
    shutil.copytree(blobs, tmp_path / "sided")
    described = json.loads((blobs / "dataset.json").read_text())
    described["labels"] = {"0": "background", "1": "left_kidney", "2": "right_kidney"}
    (tmp_path / "sided" / "dataset.json").write_text(json.dumps(described))
    return tmp_path / "sided"


def test_prediction_averages_over_every_mirroring_of_the_planned_axes(blobs: Path) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31, mirror=[0, 2]), patch_size=[20, 24, 18])
    torch.manual_seed(0)
    model = create_model(
        "ukanet", spatial_dims=3, in_channels=1, out_channels=3, features_per_stage=[4, 8]
    ).eval()
    image = torch.randn(1, 1, 20, 24, 18)  # one window, so the mean is that of whole images
    flips = [f for count in range(3) for f in itertools.combinations((2, 4), count)]
    with torch.no_grad():
        expected = torch.stack([model(image.flip(f)).flip(f) for f in flips]).mean(0)
    found, without = (torch.stack([*whole_logits(model, image, plan, tta=tta)]) for tta in (True, False))
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, without, atol=1e-3)


@pytest.mark.parametrize("axes", [[], [1], [0, 2]])
def test_training_flips_along_the_planned_axes_alone(blobs: Path, axes: list[int]) -> None:
    dataset = read_dataset(blobs)
    plan = make_plan(dataset, memory=2**31, mirror=axes)
    assert plan.mirror_axes == axes
    item = preparation(plan)(load_case(dataset.cases[0], plan)[0])
    still = replace(plan, mirror_axes=[])
    flips = [
        f for count in range(len(axes) + 1) for f in itertools.combinations([a + 1 for a in axes], count)
    ]
    seen = set()
    for seed in range(40):
        patches = []
        for one in (plan, still):
            changes = augmentation(one)
            changes.set_random_state(seed=seed)
            patches.append(torch.as_tensor(np.asarray(changes(item)[0]["label"])))
        seen |= {flip for flip in flips if torch.equal(patches[0], patches[1].flip(flip))}
    assert seen >= set(flips)


def test_slices_keep_the_axes_that_they_have(blobs: Path) -> None:
    plan = make_plan(read_dataset(blobs), memory=2**31, dim=2, mirror=[0, 2])  # slices across axis 2
    assert plan.slice_axis == 2
    assert plan.mirror_axes == [0]


def test_labels_of_sides_are_never_exchanged(sided: Path, tmp_path: Path) -> None:
    dataset = read_dataset(sided)
    with pytest.raises(UsageError, match="'left_kidney' where 'right_kidney'"):
        make_plan(dataset, memory=2**31, mirror=[0, 1])
    plan = make_plan(dataset, memory=2**31, mirror=[1, 2])
    assert plan.mirror_axes == [1, 2]
    assert any("sides apart" in reason for reason in make_plan(dataset, memory=2**31).reasons)
    assert mirror_axes(2, ["background", "lung L", "lung R"], None) == []
    assert mirror_axes(2, ["background", "gland"], None) == [0, 1]
    pairs = pairs_of_sides(["Left-Lung", "rightLung", "l_eye", "r_eye", "left_out"])
    assert pairs == [("Left-Lung", "rightLung"), ("l_eye", "r_eye")]


def test_axes_that_are_not_there_are_refused(blobs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mirror 3: the axes of 3D images are 0"):
        make_plan(read_dataset(blobs), memory=2**31, mirror=[3])
    plan = make_plan(read_dataset(blobs), memory=2**31)
    replace(plan, mirror_axes=[3]).save(tmp_path / "plan.json")
    with pytest.raises(UserError, match="mirror_axes are axes of the network, 0 to 2"):
        Plan.load(tmp_path / "plan.json")


def test_a_run_keeps_the_axes_and_refuses_others_later(blobs: Path, tmp_path: Path) -> None:
    options = ["training.steps_per_epoch=1", "training.max_epochs=1", "data.workers=0", "data.folds=2"]
    options += ["inference.tta=true", "inference.overlap=0"]
    how = {"configurations": "2d", "size": "small", "console": Console(quiet=True)}
    run_pipeline(blobs, tmp_path, options, mirror=[0], **how)
    assert Plan.load(tmp_path / "2d" / "plan.json").mirror_axes == [0]
    with pytest.raises(UsageError, match="mirror"):
        run_pipeline(blobs, tmp_path, options, mirror=[0, 1], **how)
