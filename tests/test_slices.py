"""Volumes learnt slice by slice, alone (2D) or with their neighbours (2.5D)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image
from kanseg.data.loaders import TrainLoader, val_loader
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.transforms import slices_as_channels
from kanseg.data.unlabelled import find_images
from kanseg.inference.logits import whole_logits
from kanseg.inference.predict import predict_case


def plan_for(blobs: Path, axis: int = 2, slices: int = 1) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31, dim=2, slices=slices)
    spacing = [1.0, 1.0, 1.5]
    del spacing[axis]
    return replace(made, slice_axis=axis, spacing=spacing, patch_size=[16, 16])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 3, 5])
def test_each_slice_comes_with_its_neighbours(blobs: Path, axis: int, slices: int) -> None:
    volume = torch.randn(2, 7, 8, 9)
    stack = slices_as_channels(volume, plan_for(blobs, axis, slices))
    assert stack.shape[:2] == (volume.shape[axis + 1], 2 * slices)
    for place in range(len(stack)):
        for offset in range(slices):
            there = min(
                max(place + offset - slices // 2, 0), len(stack) - 1
            )  # the last slice stands in beyond the ends
            wanted = volume.select(axis + 1, there)
            torch.testing.assert_close(stack[place, 2 * offset : 2 * offset + 2], wanted)


class Middle(nn.Module):
    """A network whose answer is known: by the brightness of the middle slice, or of the mean of all it sees."""

    def __init__(self, slices: int, mean: bool = False) -> None:
        super().__init__()
        self.slices, self.mean = slices, mean

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        assert x.shape[1] == self.slices
        x = x.mean(1, keepdim=True) if self.mean else x[:, self.slices // 2 :][:, :1]
        return torch.cat([1.0 - x, x, 2 * x - 2.2], dim=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 3])
def test_a_volume_is_predicted_slice_by_slice_on_its_own_grid(blobs: Path, axis: int, slices: int) -> None:
    case = find_images(blobs / "imagesTr" / "case_1.nii.gz")[0]
    labels, image = predict_case(Middle(slices), case, plan_for(blobs, axis, slices), overlap=0.25)
    x = (image.array[0] - image.array.mean()) / image.array.std()
    np.testing.assert_array_equal(labels, np.argmax([1.0 - x, x, 2 * x - 2.2], axis=0))
    assert labels.shape == read_image(case.images).array.shape[1:]


def test_neighbours_count(blobs: Path) -> None:
    plan = plan_for(blobs, 2, 3)
    image = torch.randn(1, 1, 20, 24, 18)
    logits = whole_logits(Middle(3, mean=True), image, plan)
    padded = torch.cat([image[..., :1], image, image[..., -1:]], -1)
    mean = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    torch.testing.assert_close(logits[1], mean[0, 0])


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("balanced", [False, True])
def test_training_patches_are_pictures_with_the_label_of_their_middle(
    blobs: Path, slices: int, axis: int, balanced: bool
) -> None:
    plan = plan_for(blobs, axis, slices)
    cases = read_dataset(blobs).cases[:3]
    options = {"batch_size": 2, "steps": 6, "seed": 0, "balanced": balanced}
    batch = next(TrainLoader(plan, cases, **options).batches())  # type: ignore[arg-type]
    assert batch["image"].shape == (2, slices, 16, 16)
    assert batch["label"].shape == (2, 1, 16, 16)
    plain = TrainLoader(plan, cases, changes=False, **options).batches()  # type: ignore[arg-type]
    seen = set()
    for _ in range(6):
        batch = next(plain)
        middle, label = batch["image"][:, slices // 2], batch["label"][:, 0]
        for value in (1, 2):  # balls are brighter than what is around them, in the slice they belong to
            if (label == value).sum() > 10:
                assert middle[label == value].mean() > middle[label == 0].mean() + 0.5
                seen.add(value)
    assert seen


def test_validation_cases_stay_whole(blobs: Path) -> None:
    (batch,) = val_loader(plan_for(blobs, 2, 3), read_dataset(blobs).cases[:1])
    assert batch["image"].shape == (1, 1, 20, 24, 18) == batch["label"].shape


@pytest.mark.parametrize("slices", [1, 3])
def test_a_network_learns_slices(blobs: Path, tmp_path: Path, slices: int, quick_learner: list[str]) -> None:
    from kanseg.config import load_config
    from kanseg.inference.ensemble import Loaded
    from kanseg.training.fit import fit

    config = load_config(
        overrides=[
            *quick_learner,
            "training.steps_per_epoch=70",
            "training.batch_size=4",
        ]
    )
    dataset = read_dataset(blobs)
    summary = fit(config, plan_for(blobs, 2, slices), dataset, tmp_path / "run", fold=0)
    assert summary["dice"]["mean"] > 0.5
    loaded = Loaded([tmp_path / "run"])
    labels, _ = predict_case(loaded.networks, dataset.cases[0], loaded.plans)
    assert labels.shape == (20, 24, 18)
