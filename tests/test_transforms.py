"""Preprocessing, the way back to the image's own grid, and augmentation."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from kanseg.data.cases import Case
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image, read_label, write_label
from kanseg.data.labels import class_numbers
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.transforms import (
    STRENGTHS,
    Item,
    augmentation,
    highest,
    load_case,
    normalize,
    preparation,
    preprocessing,
    require_albumentations,
    restore,
    restored_labels,
)
from kanseg.errors import UserError

TURN = np.linalg.qr(np.array([[-0.96, -0.2, 0.2], [0.25, -0.93, -0.27], [-0.13, 0.31, 0.94]]))[0]
GRIDS = {
    "LPS": np.diag([-1.0, -1.0, 1.5]),
    "PSR": np.array([[0, 0, 2.0], [-2.0, 0, 0], [0, 2.0, 0]]),
    "oblique with thick slices": TURN @ np.diag([0.9, 0.9, 3.0]),
    "oblique, mirrored": TURN @ np.diag([-0.9, 0.9, 2.0]),
    "sheared": np.array([[-0.9, 0.1, 0.3], [0.2, 1.1, -0.2], [-0.2, 0.3, 2.4]]),
}


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31)
    return replace(made, patch_size=[16, 16, 16])


def affine_of(grid: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = GRIDS[grid], (5, -20, 9)
    return affine


def at_voxels(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A linear function of the place in mm, which linear interpolation must reproduce."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return (voxels @ affine[:3, :3].T + affine[:3, 3]) @ np.array([1.0, 2.0, -1.5])


def preprocessed(array: np.ndarray, affine: np.ndarray, plan: Plan) -> Item:
    """Image and label from one array (*S), spatially preprocessed."""
    spatial = preprocessing(plan)
    tensor = torch.from_numpy(array.astype(np.float32)[None])
    item = {key: MetaTensor(tensor.clone(), affine=torch.from_numpy(affine)) for key in ("image", "label")}
    return {**spatial(item), "preprocessing": spatial}


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_every_voxel_keeps_its_place_in_the_world(plan: Plan, grid: str) -> None:
    shape, affine = (30, 34, 20), affine_of(grid)
    ramp = at_voxels(shape, affine)
    item = preprocessed(ramp, affine, replace(plan, spacing=[1.0, 1.0, 1.2]))
    image = item["image"]
    new = np.asarray(image.affine)
    np.testing.assert_allclose(np.linalg.norm(new[:3, :3], axis=0), [1.0, 1.0, 1.2], atol=1e-6)
    inside = (
        np.linalg.inv(affine)
        @ new
        @ np.vstack([np.indices(image.shape[1:]).reshape(3, -1), np.ones(image.numel())])
    )
    inside = np.all((inside[:3].T > 0) & (shape > inside[:3].T + 1), axis=1).reshape(image.shape[1:])
    wanted = at_voxels(tuple(image.shape[1:]), new)
    assert inside.sum() > 1000
    np.testing.assert_allclose(image[0].numpy()[inside], wanted[inside], atol=1e-3)
    back = restore(image.as_tensor(), item, plan)[0].numpy()
    core = (slice(4, -4),) * 3
    np.testing.assert_allclose(back[core], ramp[core], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_labels_survive_resampling_there_and_back(plan: Plan, shared_data: Path, grid: str) -> None:
    label = read_label(shared_data / "hippocampus" / "labelsTr" / "hippocampus_001.nii.gz")
    label = np.kron(label, np.ones((2, 2, 2), label.dtype))
    item = preprocessed(label, affine_of(grid), replace(plan, spacing=[1.0, 1.0, 1.2]))
    assert item["label"].shape[1:] != label.shape
    onehot = torch.stack([item["label"][0].as_tensor() == i for i in range(3)]).float()
    back = restored_labels(onehot, item, plan)
    assert all(dice(back == value, label == value) > 0.97 for value in (1, 2))


def test_real_psr_volume_comes_back_exactly(plan: Plan, shared_data: Path, tmp_path: Path) -> None:
    image = shared_data / "volumes_misc" / "ixi012_dlmuse" / "image.nii.gz"
    label = read_label(image.with_name("label.nii.gz")) % 3
    path = write_label(tmp_path / "label.nii.gz", label, read_image(image))
    item, _ = load_case(Case("a", (image,), path, "a"), replace(plan, spacing=[2.0, 2.0, 2.0]))
    assert item["image"].shape[1:] != label.shape
    onehot = torch.stack([item["label"][0].as_tensor() == i for i in range(3)]).float()
    np.testing.assert_array_equal(restored_labels(onehot, item, plan), label)


def test_normalisation_is_its_formula() -> None:
    image = torch.randn(2, 5, 5, 5) * 100
    ct = {"scheme": "ct", "lower": -50.0, "upper": 80.0, "mean": 10.0, "std": 20.0}
    done = normalize(image.clone(), [{"scheme": "zscore"}, ct])
    torch.testing.assert_close(done[0], (image[0] - image[0].mean()) / image[0].std(correction=0))
    torch.testing.assert_close(done[1], (image[1].clamp(-50, 80) - 10) / 20)
    fixed = {"scheme": "fixed", "mean": 3.0, "std": 255.0}
    done = normalize(image.clone(), [fixed, {"scheme": "minmax"}])
    torch.testing.assert_close(done[0], (image[0] - 3) / 255)
    torch.testing.assert_close(done[1], (image[1] - image[1].min()) / (image[1].max() - image[1].min()))
    for scheme in ("zscore", "zscore_nonzero", "minmax"):
        assert torch.isfinite(normalize(torch.zeros(1, 4, 4, 4), [{"scheme": scheme}])).all()


def test_what_was_cut_away_does_not_change_the_normalization() -> None:
    """More or less empty surroundings: the same organ gets the same numbers, and 0 stays 0."""
    organ = torch.randn(1, 6, 6, 6) * 20 + 300
    tight = normalize(torch.nn.functional.pad(organ, [2] * 6), [{"scheme": "zscore_nonzero"}])
    wide = normalize(torch.nn.functional.pad(organ, [9] * 6), [{"scheme": "zscore_nonzero"}])
    torch.testing.assert_close(tight[:, 2:8, 2:8, 2:8], wide[:, 9:15, 9:15, 9:15])
    torch.testing.assert_close(tight[:, 2:8, 2:8, 2:8].std(correction=0), torch.tensor(1.0))
    assert (wide[:, :9] == 0).all()


def test_values_that_the_plan_does_not_know_are_refused(plan: Plan, blobs: Path) -> None:
    case = read_dataset(blobs).cases[0]
    odd = replace(plan, label_values=[0, 7, 300])
    np.testing.assert_array_equal(class_numbers(np.array([7, 0, 300]), odd, "x"), [1, 0, 2])
    with pytest.raises(UserError, match=r"case_0.nii.gz has the values \[5\]"):
        class_numbers(np.array([0, 5]), odd, case.images[0])


def test_a_case_without_a_label_is_no_training_case(plan: Plan, blobs: Path) -> None:
    case = replace(read_dataset(blobs).cases[0], label=None)
    assert set(load_case(case, plan, with_label=False)[0]) == {"image", "preprocessing"}
    with pytest.raises(UserError, match="case_0.nii.gz has no label"):
        load_case(case, plan)


@pytest.mark.parametrize("strength", ["none", "standard", "strong"])
def test_augmentation_turns_image_and_label_together_and_repeats_by_seed(
    plan: Plan, blobs: Path, strength: str
) -> None:
    item = preparation(plan)(load_case(read_dataset(blobs).cases[0], plan)[0])
    item["image"] = item["label"].clone()  # so that the image shows where the label should be
    augment = augmentation(plan, strength=strength)
    for seed in range(10):
        (one,), (other,) = (augment.set_random_state(seed=seed)(item) for _ in range(2))
        assert all(torch.equal(one[key].as_tensor(), other[key].as_tensor()) for key in ("image", "label"))
        assert set(one["label"].unique().tolist()) <= {0, 1, 2}
        if (one["label"] == 2).sum() > 50:
            assert one["image"][one["label"] == 2].mean() > one["image"][one["label"] == 0].mean() + 1


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_turned_within_them_alone(
    plan: Plan, thick: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is one number a slice stays as it is; one that changes within them does not."""
    monkeypatch.setitem(STRENGTHS, "standard", replace(STRENGTHS["none"], affine=(1.0, 1.0), rotation=0.3))
    thin = replace(plan, mirror_axes=[], spacing=[5.0 if axis == thick else 1.0 for axis in range(3)])
    for axis in range(3):
        places = torch.arange(16).float().view([-1 if a == axis else 1 for a in range(3)])
        image = places.expand(1, 16, 16, 16).contiguous()
        item = preparation(thin)({key: MetaTensor(image.clone()) for key in ("image", "label")})
        (changed,) = augmentation(thin).set_random_state(seed=0)(item)
        assert torch.isclose(changed["image"].as_tensor(), image, atol=1e-3).all() == (axis == thick)


def test_the_other_albumentations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_albumentations()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(UserError, match="albumentationsx 2.1.0 .* pip uninstall albumentationsx"):
        require_albumentations()


def test_the_highest_class_is_found_without_lists_of_voxels() -> None:
    """Such a list, of a volume that a scanner gives, is six times the map."""
    maps = list(torch.randn(3, 40, 50, 60))
    with torch.profiler.profile(profile_memory=True) as profile:
        found = highest(maps)
    np.testing.assert_array_equal(found, torch.stack(maps).argmax(0))
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= maps[0].nbytes
