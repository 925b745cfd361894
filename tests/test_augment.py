"""Changes of patches in batches: they depend on the seed of each patch alone and move image and label alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from monai.data import MetaTensor

from kanseg.data.cases import COLOURS
from kanseg.data.formats import read_dataset
from kanseg.data.planner import make_plan
from kanseg.data.transforms import STRENGTHS, augmentation, preparation
from kanseg.training import augment
from kanseg.training.augment import BatchAugmentation
from kanseg.training.checkpoint import load_checkpoint

INTENSITY = ("noise", "blur", "brightness", "coarse", "gamma")
SIZES = {2: (24, 20), 3: (16, 20, 12)}


@pytest.fixture(scope="module")
def plans(blobs):
    plan = make_plan(read_dataset(blobs), memory=2**31)
    flat = replace(plan, spatial_dims=2, spacing=[1.0, 1.0], mirror_axes=[0, 1])
    return {2: flat, 3: replace(plan, mirror_axes=[0, 1, 2])}


def batch_of(dims, count=16):
    centre = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in SIZES[dims]], indexing="ij"))
    label = ((centre - 0.3).square().sum(0) < 0.2).float().expand(count, 1, *SIZES[dims])
    return {"image": 3 * label + 0.05, "label": label, "seed": torch.arange(count)}


OFF = {"affine": (0.0, 0.0), "deform": (0.0, 0.0), **dict.fromkeys((*INTENSITY, "colour"), 0.0)}


def only(monkeypatch, **probabilities):
    monkeypatch.setitem(STRENGTHS, "standard", replace(STRENGTHS["standard"], **{**OFF, **probabilities}))


@pytest.mark.parametrize("strength", ["standard", "strong"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_is_changed_alike_whatever_batch_it_is_in(plans, dims, strength):
    change, batch = BatchAugmentation(plans[dims], strength), batch_of(dims)
    whole = change(batch)
    halves = [change({key: value[part] for key, value in batch.items()}) for part in (slice(7), slice(7, 16))]
    for key in ("image", "label"):
        assert torch.allclose(whole[key], torch.cat([half[key] for half in halves]), atol=1e-5)
    assert not torch.allclose(whole["image"][0], whole["image"][1])
    assert torch.equal(batch["image"], batch_of(dims)["image"])


@pytest.mark.parametrize("kind", ["affine", "deform"])
@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_move_together_and_no_class_is_made_up(plans, dims, kind, monkeypatch):
    only(monkeypatch, **{kind: (1.0, 1.0)})
    changed = BatchAugmentation(plans[dims])(batch_of(dims))
    assert set(changed["label"].unique().tolist()) == {0.0, 1.0}
    assert ((changed["image"] > 1.55).float() - changed["label"]).abs().mean() < 0.02
    moved = (changed["label"] != batch_of(dims)["label"]).flatten(1).any(1)
    assert moved.all()


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_turned_within_them_alone(plans, thick, monkeypatch):
    """An image that is one number a slice stays as it is; one that changes within them does not."""
    only(monkeypatch, affine=(1.0, 1.0), scale=(0.0, 0.0))
    plan = replace(plans[3], mirror_axes=[], spacing=[5.0 if axis == thick else 1.0 for axis in range(3)])
    change, batch = BatchAugmentation(plan), batch_of(3)
    for axis in range(3):
        places = torch.arange(SIZES[3][axis]).float().view([-1 if a == axis else 1 for a in range(3)])
        image = places.expand(16, 1, *SIZES[3])
        still = torch.isclose(change({**batch, "image": image})["image"], image, atol=1e-3)
        assert still.all() == (axis == thick)


@pytest.mark.parametrize("dims", [2, 3])
def test_without_chance_nothing_changes_but_the_flips(plans, dims, monkeypatch):
    only(monkeypatch)
    batch = batch_of(dims)
    still = BatchAugmentation(replace(plans[dims], mirror_axes=[]))(batch)
    assert torch.allclose(still["image"], batch["image"], atol=1e-4)
    flipped = BatchAugmentation(plans[dims])(batch)
    axes = [tuple(a + 1 for a in range(dims) if number >> a & 1) for number in range(2**dims)]
    pairs = zip(flipped["label"], batch["label"], strict=True)
    kinds = {next(a for a in axes if torch.equal(x, y.flip(a))) for x, y in pairs}
    assert len(kinds) > 2


@pytest.mark.parametrize("name", INTENSITY)
@pytest.mark.parametrize("dims", [2, 3])
def test_each_change_of_intensity_leaves_the_label_and_stays_finite(plans, dims, name, monkeypatch):
    only(monkeypatch, **{name: 1.0})
    batch = batch_of(dims)
    batch["image"] = batch["image"] + 0.1 * torch.randn(batch["image"].shape)
    changed = BatchAugmentation(replace(plans[dims], mirror_axes=[]))(batch)
    assert torch.equal(changed["label"], batch["label"])
    assert torch.isfinite(changed["image"]).all()
    assert not torch.allclose(changed["image"], batch["image"], atol=1e-2)
    correlation = torch.corrcoef(torch.stack([changed["image"].flatten(), batch["image"].flatten()]))[0, 1]
    assert correlation > 0.8


def on_the_device(plan, batch):
    return BatchAugmentation(plan)(batch)["image"]


def by_the_loader(plan, batch):
    change = augmentation(plan).set_random_state(seed=0)
    item = {key: MetaTensor(batch[key][0]) for key in ("image", "label")}
    return torch.stack([change(preparation(plan)(item))[0]["image"].as_tensor() for _ in batch["image"]])


@pytest.mark.parametrize(("factor", "offset"), [(0.25, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("changed", [on_the_device, by_the_loader])
def test_each_colour_of_a_picture_gets_a_factor_and_an_offset_of_its_own(
    plans, changed, factor, offset, monkeypatch
):
    """As a stain or a lamp does; channels of other kinds keep their proportions."""
    reach = {"colour": 1.0, "colour_range": (factor, offset)}
    monkeypatch.setitem(STRENGTHS, "standard", replace(STRENGTHS["none"], **reach))
    plan = replace(plans[2], mirror_axes=[], patch_size=SIZES[2])
    picture, other = (replace(plan, channel_names=names) for names in (list(COLOURS), ["T1", "T2", "FLAIR"]))
    image = torch.randn(1, 3, *SIZES[2]).expand(16, -1, -1, -1)
    batch = {**batch_of(2), "image": image}
    assert torch.allclose(changed(other, batch), image, atol=1e-5)
    old, new = image.flatten(2), changed(picture, batch).flatten(2)
    slope = new.std(-1) / old.std(-1)
    shift = new.mean(-1) - slope * old.mean(-1)
    assert torch.allclose(new, slope[..., None] * old + shift[..., None], atol=1e-4)  # a straight line
    for found, most in ((slope - 1, factor), (shift, offset)):
        assert found.abs().max() <= most + 1e-4
        assert found.std(1).mean() >= 0.2 * most  # another one in each channel


def test_no_change_is_left_at_strength_none_but_the_flips(plans):
    batch = batch_of(3)
    still = BatchAugmentation(replace(plans[3], mirror_axes=[]), "none")(batch)
    assert all(torch.allclose(still[key], batch[key], atol=1e-4) for key in batch)


def test_a_smooth_deformation_moves_by_voxels_at_most_its_reach(plans, monkeypatch):
    only(monkeypatch, deform=(1.0, 1.0), reach=1.0)
    batch = batch_of(3)
    places = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SIZES[3]], indexing="ij"))
    batch["image"] = places.expand(16, *places.shape).clone()  # every voxel knows where it was
    change = BatchAugmentation(replace(plans[3], mirror_axes=[]))
    moved = change(batch)["image"] - batch["image"]
    assert moved.abs().max() < 1 + 1e-3
    assert moved.abs().amax((1, 2, 3, 4)).min() > 0.2
    inner = moved[:, :, 2:-2, 2:-2, 2:-2]  # at the border nothing comes from beyond it
    assert all(inner.diff(dim=axis).abs().max() < 0.25 for axis in (2, 3, 4))  # neighbours move alike


def test_a_constant_image_survives_gamma_and_blur(plans):
    change = BatchAugmentation(plans[3])
    flat = torch.full((1, *SIZES[3]), 2.0)
    assert torch.allclose(augment._gamma(flat, 1.4), flat)
    assert torch.allclose(change._blurred(flat, 0.8), flat, atol=1e-5)


def test_a_training_with_changes_on_the_device_is_resumed_to_the_bit(fit_balls, tmp_path):
    options = ("training.augment=device", "training.schedule=constant", "training.warmup=0")
    again = tmp_path / "again"
    fit_balls(*options, "training.max_epochs=1", run=again)
    fit_balls(*options, "training.max_epochs=2", run=again, resume=True)
    straight = tmp_path / "straight"
    fit_balls(*options, "training.max_epochs=2", run=straight)
    one, two = (load_checkpoint(run / "fold_0/last.safetensors")[0] for run in (again, straight))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
