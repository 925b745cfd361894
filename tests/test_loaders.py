"""Batches: random patches that depend on the seed alone, and whole cases."""

from __future__ import annotations

import gc
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kanseg.data import loaders
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_label
from kanseg.data.loaders import Prepared, TrainLoader, val_loader
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.shelf import Shelf
from kanseg.data.transforms import augmentation, preparation
from kanseg.errors import UserError


def batch_of(loader: TrainLoader) -> dict[str, Tensor]:
    return next(loader.batches())


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31)
    return replace(made, patch_size=[16, 16, 16])


def test_a_patch_depends_on_seed_epoch_and_place_alone(plan: Plan, blobs: Path) -> None:
    cases = read_dataset(blobs).cases

    def batches(seed: int, epoch: int, workers: int) -> list[Tensor]:
        loader = TrainLoader(plan, cases, batch_size=2, steps=3, seed=seed, workers=workers)
        first = islice(loader.batches(epoch), 3)
        return [torch.cat([batch["image"], batch["label"]]) for batch in first]

    first = batches(0, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0, 1, 2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(0, 2, 0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(1, 1, 0), strict=True))


@pytest.mark.parametrize(("batches", "workers"), [(3, 0), (4, 1), (8, 3), (None, 0)])
def test_processes_are_as_many_as_the_shared_memory_of_a_container_takes(
    plan: Plan, blobs: Path, batches: int | None, workers: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Docker gives 64 MB, where four channels of 128^3 voxels take 67, some give none; the patches stay the same."""
    loader = TrainLoader(plan, read_dataset(blobs).cases, batch_size=2, steps=3, seed=0, workers=3)
    first = batch_of(loader)
    size = sum(value.nbytes for value in first.values())
    if batches is None:
        monkeypatch.setattr(loaders, "SHARED", blobs / "none")
    else:
        monkeypatch.setattr(loaders, "disk_usage", lambda path: SimpleNamespace(free=batches * size))
    made: list[int] = []
    made_by = loaders.DataLoader

    def counted(*args: Any, num_workers: int, **options: Any) -> Any:
        made.append(num_workers)
        return made_by(*args, num_workers=num_workers, **options)

    monkeypatch.setattr(loaders, "DataLoader", counted)
    again = batch_of(loader)
    assert made == [workers]
    assert all(torch.equal(first[key], again[key]) for key in first)
    told = " ".join(capsys.readouterr().err.split())
    assert ("--shm-size" in told) == (workers < 3)


def test_batches_go_on_from_any_step_over_the_ends_of_epochs(plan: Plan, blobs: Path) -> None:
    loader = TrainLoader(plan, read_dataset(blobs).cases, batch_size=2, steps=3, seed=0)
    straight = [batch["image"] for batch in islice(loader.batches(), 8)]
    later = [batch["image"] for batch in islice(loader.batches(epoch=1, step=1), 4)]
    assert all(torch.equal(a, b) for a, b in zip(straight[4:], later, strict=True))


def test_several_processes_see_what_one_with_the_whole_batch_sees(plan: Plan, blobs: Path) -> None:
    cases = read_dataset(blobs).cases
    whole = TrainLoader(plan, cases, batch_size=4, steps=2, seed=0)
    parts = [TrainLoader(plan, cases, batch_size=2, steps=2, seed=0, rank=r, ranks=2) for r in (0, 1)]
    for batch, *shares in zip(*(islice(x.batches(), 3) for x in (whole, *parts)), strict=True):
        assert torch.equal(batch["image"], torch.cat([share["image"] for share in shares]))


def test_balanced_patches_show_a_rare_class_as_often_as_a_common_one(plan: Plan) -> None:
    small = replace(plan, patch_size=[3, 3, 3])
    prepared = preparation(small, balanced=True)
    label = torch.zeros(1, 20, 20, 20)
    label[:, 2:18, 2:18, 2:10], label[:, 10, 10, 15] = 1, 2
    item = prepared({"image": label.clone(), "label": label})
    crop = augmentation(small, foreground=1.0, balanced=True, changes=False)
    crop.set_random_state(0)
    centres = [int(crop(item)[0]["label"][0, 1, 1, 1]) for _ in range(60)]
    assert 15 < centres.count(2) < 45
    assert centres.count(0) == 0


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_the_share_of_patches_in_the_foreground_is_as_asked(
    plan: Plan, blobs: Path, foreground: float
) -> None:
    small = replace(plan, patch_size=[3, 3, 3])
    loader = TrainLoader(
        small, read_dataset(blobs).cases, batch_size=20, steps=1, seed=0, foreground=foreground, changes=False
    )
    centres = batch_of(loader)["label"][:, 0, 1, 1, 1] > 0
    assert centres.float().mean() == foreground


def test_patches_hold_foreground_and_keep_image_and_label_together(plan: Plan, blobs: Path) -> None:
    loader = TrainLoader(plan, read_dataset(blobs).cases, batch_size=4, steps=10, seed=0)
    with_foreground, bright, dark = 0, [], []
    for batch in islice(loader.batches(), 10):
        assert batch["image"].shape == (4, 1, 16, 16, 16)
        assert batch["label"].shape == (4, 1, 16, 16, 16)
        with_foreground += int((batch["label"] > 0).flatten(1).any(1).sum())
        bright.append(batch["image"][batch["label"] == 2])
        dark.append(batch["image"][batch["label"] == 0])
    assert with_foreground >= 20
    assert torch.cat(bright).mean() > torch.cat(dark).mean() + 2


def test_cases_smaller_than_the_patch_are_padded(plan: Plan, blobs: Path) -> None:
    large = replace(plan, patch_size=[32, 40, 24])
    batch = batch_of(TrainLoader(large, read_dataset(blobs).cases[:2], batch_size=2, steps=1, seed=0))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 32, 40, 24)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 1])
def test_cases_of_one_value_give_patches_without_a_warning(plan: Plan, value: int) -> None:
    item = {"image": torch.randn(1, 20, 20, 20), "label": torch.full((1, 20, 20, 20), float(value))}
    for balanced in (False, True):
        crop = augmentation(plan, balanced=balanced, strength="none")
        (patch,) = crop(preparation(plan, balanced)(item))
        assert (torch.as_tensor(patch["label"]) == value).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_patches_are_the_same_in_processes_that_are_not_forked(plan: Plan, blobs: Path, dim: int) -> None:
    """As on macOS and Windows, where they get all by pickle; the files stay those of the training."""
    dataset = read_dataset(blobs)
    made = plan if dim == 3 else replace(make_plan(dataset, memory=2**31, dim=2), patch_size=[16, 16])
    prepared = Prepared(made)
    prepared.items = Shelf(limit=0)
    samples = TrainLoader(made, dataset.cases, batch_size=1, steps=1, seed=0, prepared=prepared).samples
    sent = pickle.dumps(samples)
    for _ in range(2):
        for one, other in zip(samples[3, 1].values(), pickle.loads(sent)[3, 1].values(), strict=True):
            assert torch.equal(one, other)
        gc.collect()


def test_nothing_to_train_on_is_said(plan: Plan) -> None:
    with pytest.raises(UserError, match="no cases to train on"):
        TrainLoader(plan, [], batch_size=2, steps=1, seed=0)


def test_pictures_are_augmented_by_albumentations(shared_data: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for path in sorted((shared_data / "busi" / folder).iterdir())[:4]:
            shutil.copy(path, tmp_path / folder)
    dataset = read_dataset(tmp_path)
    plan = replace(make_plan(dataset, memory=2**31), patch_size=[64, 64])
    loaders = [TrainLoader(plan, dataset.cases, batch_size=2, steps=2, seed=0, workers=w) for w in (0, 1)]
    for one, other in zip(*(islice(loader.batches(), 2) for loader in loaders), strict=True):
        assert one["image"].shape == (2, 1, 64, 64)
        assert set(one["label"].unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(one["image"], other["image"])


def test_validation_sees_whole_cases(plan: Plan, blobs: Path) -> None:
    case = read_dataset(blobs).cases[0]
    (batch,) = val_loader(plan, [case])
    assert batch["image"].shape == (1, 1, 20, 24, 18)
    label = torch.from_numpy(read_label(case.label)).flip((0, 1))  # LPS in the file, RAS in the network
    assert torch.equal(batch["label"][0, 0].int(), label)


@pytest.mark.parametrize("balanced", [False, True])
def test_cases_on_the_disk_give_the_same_patches(plan: Plan, blobs: Path, balanced: bool) -> None:
    cases = read_dataset(blobs).cases
    options = {"batch_size": 2, "steps": 3, "seed": 0, "balanced": balanced}
    loaders = [
        TrainLoader(replace(plan, memory_bytes=memory), cases, **options)  # type: ignore[arg-type]
        for memory in (0, 2**40, 1_000_000, 1)
    ]
    shelves = [loader.samples.items for loader in loaders]
    assert [shelf.on_disk() for shelf in shelves][:2] == [0, 0]  # type: ignore[attr-defined]
    assert 0 < shelves[2].on_disk() < len(cases) == shelves[3].on_disk()  # type: ignore[attr-defined]
    assert shelves[2].bytes <= 200_000  # type: ignore[attr-defined]
    batches = [loader.batches() for loader in loaders]
    for _ in range(4):
        first, *others = (next(batch) for batch in batches)
        for other in others:
            for key in first:
                torch.testing.assert_close(first[key], other[key], rtol=0, atol=0)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_case_is_prepared_once_for_all_folds_and_gives_the_same_patches(
    plan: Plan, blobs: Path, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, read, load = read_dataset(blobs).cases[:4], Counter[str](), loaders.load_case
    monkeypatch.setattr(loaders, "load_case", lambda case, plan: read.update([case.id]) or load(case, plan))
    prepared, how = loaders.Prepared(plan), {"batch_size": 3, "steps": 3, "seed": 0, "balanced": balanced}
    for own in (cases[:3], cases[1:], cases[:2]):
        shared = TrainLoader(plan, own, prepared=prepared, **how).batches()  # type: ignore[arg-type]
        assert max(read.values()) == 1
        before = read.copy()
        alone = TrainLoader(plan, own, **how).batches()  # type: ignore[arg-type]
        for one, other in zip(islice(shared, 4), islice(alone, 4), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        read.clear()
        read.update(before)
    assert len(read) == 4


def test_a_case_that_could_not_be_kept_is_prepared_again(
    plan: Plan, blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full in one fold must not let the next one take another case for it."""
    prepared, cases = loaders.Prepared(plan), read_dataset(blobs).cases[:2]
    with monkeypatch.context() as full:
        full.setattr(loaders.Shelf, "append", mock.Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            prepared.places(cases, balanced=False)
    assert prepared.places(cases, balanced=False) == [0, 1]


def test_validation_cases_on_the_disk_are_the_same(plan: Plan, blobs: Path) -> None:
    cases = read_dataset(blobs).cases[:2]
    kept, stored = (val_loader(replace(plan, memory_bytes=memory), cases) for memory in (0, 1))
    for one, other in zip(kept, stored, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
