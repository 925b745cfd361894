"""Batches: random patches that depend on the seed alone, and whole cases."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kanseg.data.formats import read_dataset
from kanseg.data.images import read_label
from kanseg.data.loaders import train_loader, val_loader
from kanseg.data.plan import Plan, make_plan
from kanseg.errors import UserError


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31)
    return replace(made, patch_size=[16, 16, 16])


def test_a_patch_depends_on_seed_epoch_and_place_alone(plan: Plan, blobs: Path) -> None:
    cases = read_dataset(blobs).cases

    def batches(seed: int, epoch: int, workers: int) -> list[Tensor]:
        loader = train_loader(plan, cases, batch_size=2, steps=3, seed=seed, workers=workers)
        loader.set_epoch(epoch)
        return [torch.cat([batch["image"], batch["label"]]) for batch in loader]

    first = batches(0, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0, 1, 2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(0, 2, 0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(1, 1, 0), strict=True))


def test_patches_hold_foreground_and_keep_image_and_label_together(plan: Plan, blobs: Path) -> None:
    loader = train_loader(plan, read_dataset(blobs).cases, batch_size=4, steps=10, seed=0)
    with_foreground, bright, dark = 0, [], []
    for batch in loader:
        assert batch["image"].shape == (4, 1, 16, 16, 16)
        assert batch["label"].shape == (4, 1, 16, 16, 16)
        with_foreground += int((batch["label"] > 0).flatten(1).any(1).sum())
        bright.append(batch["image"][batch["label"] == 2])
        dark.append(batch["image"][batch["label"] == 0])
    assert with_foreground >= 20
    assert torch.cat(bright).mean() > torch.cat(dark).mean() + 2


def test_cases_smaller_than_the_patch_are_padded(plan: Plan, blobs: Path) -> None:
    large = replace(plan, patch_size=[32, 40, 24])
    loader = train_loader(large, read_dataset(blobs).cases[:2], batch_size=2, steps=1, seed=0)
    (batch,) = loader
    assert batch["image"].shape == batch["label"].shape == (2, 1, 32, 40, 24)


def test_nothing_to_train_on_is_said(plan: Plan) -> None:
    with pytest.raises(UserError, match="no cases to train on"):
        train_loader(plan, [], batch_size=2, steps=1, seed=0)


def test_pictures_are_augmented_by_albumentations(shared_data: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for path in sorted((shared_data / "busi" / folder).iterdir())[:4]:
            shutil.copy(path, tmp_path / folder)
    dataset = read_dataset(tmp_path)
    plan = replace(make_plan(dataset, memory=2**31), patch_size=[64, 64])
    loaders = [train_loader(plan, dataset.cases, batch_size=2, steps=2, seed=0, workers=w) for w in (0, 1)]
    for one, other in zip(*loaders, strict=True):
        assert one["image"].shape == (2, 1, 64, 64)
        assert set(one["label"].unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(one["image"], other["image"])


def test_validation_sees_whole_cases(plan: Plan, blobs: Path) -> None:
    case = read_dataset(blobs).cases[0]
    (batch,) = val_loader(plan, [case])
    assert batch["image"].shape == (1, 1, 20, 24, 18)
    label = torch.from_numpy(read_label(case.label)).flip((0, 1))  # LPS in the file, RAS in the network
    assert torch.equal(batch["label"][0, 0].int(), label)
