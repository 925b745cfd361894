"""Preprocessing and its inverse, loading, and prediction on the image's own grid."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kanseg.data.formats import Case, find_images, read_dataset
from kanseg.data.images import read_image, read_label, write_label
from kanseg.data.loaders import train_loader, val_loader
from kanseg.data.plan import Plan, make_plan
from kanseg.data.transforms import load_case, normalize, restored_labels
from kanseg.errors import UserError
from kanseg.inference.predict import predict_case, predict_folder, predict_logits

LPS = np.diag([-1.0, -1.0, 1.5, 1.0])
OBLIQUE = np.array(
    [[-0.9, 0.1, 0.3, 12], [0.2, 1.1, -0.2, -30], [-0.2, 0.3, 2.4, 7], [0, 0, 0, 1]], dtype=float
)


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31)
    return replace(made, patch_size=[16, 16, 16])


class Brightness(nn.Module):
    """A stand-in whose answer is known: class 1 where the normalised image is high, class 2 where it is highest."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([1.0 - x, x, 2 * x - 2.2], dim=1)


def by_brightness(image: np.ndarray) -> np.ndarray:
    x = (image - image.mean()) / image.std()
    return np.argmax([1.0 - x, x, 2 * x - 2.2], axis=0)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([-1, -1, 1.5, 1]),
        np.diag([1, 1, 1.5, 1]),
        np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]]),
    ],
    ids=["LPS", "RAS", "PIL"],
)
def test_prediction_on_turned_axes_is_exact(plan: Plan, tmp_path: Path, affine: np.ndarray) -> None:
    array = np.random.default_rng(0).normal(size=(18, 17, 19)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine.astype(float)), tmp_path / "scan.nii.gz")
    case = find_images(tmp_path / "scan.nii.gz")[0]
    labels, image = predict_case(Brightness(), case, plan)
    np.testing.assert_array_equal(labels, by_brightness(array))
    np.testing.assert_allclose(image.affine, affine)


def test_labels_survive_resampling_there_and_back(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    label = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    for folder, array in (("i", label.astype(np.float32)), ("l", label.astype(np.uint8))):
        (tmp_path / folder).mkdir()
        nib.save(
            nib.Nifti1Image(np.kron(array, np.ones((2, 2, 2), array.dtype)), OBLIQUE),
            tmp_path / folder / "a.nii.gz",
        )
    case = Case("a", (tmp_path / "i" / "a.nii.gz",), tmp_path / "l" / "a.nii.gz", "a")
    item, source = load_case(case, plan)
    assert item["image"].shape[1:] != source.array.shape[1:]
    onehot = torch.nn.functional.one_hot(item["label"][0].as_tensor().long(), 3).movedim(-1, 0).float()
    back, wanted = restored_labels(onehot, item, plan), read_label(case.label)
    assert back.shape == wanted.shape
    for value in (1, 2):
        overlap = (
            2
            * ((back == value) & (wanted == value)).sum()
            / ((back == value).sum() + (wanted == value).sum())
        )
        assert overlap > 0.93  # nearest neighbour there, linear back


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
    assert torch.isfinite(normalize(torch.zeros(1, 4, 4, 4), [{"scheme": "zscore"}])).all()


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


def test_an_image_smaller_than_the_patch_is_predicted(plan: Plan) -> None:
    logits = predict_logits(Brightness(), torch.randn(1, 1, 5, 20, 3), plan)
    assert logits.shape == (1, 3, 5, 20, 3)


def test_mirroring_averages_over_the_plans_axes(plan: Plan) -> None:
    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(x.shape[2], dtype=x.dtype).view(1, 1, -1, 1, 1).expand_as(x).clone()

    image = torch.zeros(1, 1, 16, 16, 16)
    assert predict_logits(Ramp(), image, plan, tta=True).std() > 1  # the plan mirrors nothing
    mirrored = predict_logits(Ramp(), image, replace(plan, mirror_axes=[0]), tta=True)
    torch.testing.assert_close(mirrored, torch.full_like(mirrored, 7.5))


def test_a_folder_goes_on_when_a_case_fails(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(blobs / "imagesTr", scans)
    whole = (scans / "case_1.nii.gz").read_bytes()
    (scans / "case_1.nii.gz").write_bytes(whole[: len(whole) // 2])
    mapped = replace(plan, label_values=[0, 7, 300], label_dtype="uint16")
    failures = predict_folder(Brightness(), mapped, find_images(scans), tmp_path / "out", probabilities=True)
    assert list(failures) == ["case_1"]
    assert not list((tmp_path / "out").glob("case_1*"))
    assert not list((tmp_path / "out").glob(".part*"))
    mask = nib.load(tmp_path / "out" / "case_0.nii.gz")
    assert mask.get_data_dtype() == np.uint16
    assert set(np.unique(mask.dataobj)) <= {0, 7, 300}
    np.testing.assert_allclose(mask.affine, nib.load(scans / "case_0.nii.gz").affine)
    chances = [read_image(p).array for p in sorted((tmp_path / "out").glob("case_0_prob_*"))]
    np.testing.assert_allclose(sum(chances), 1, atol=1e-5)


def test_dicom_is_predicted_to_nifti_on_its_grid(plan: Plan, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "dicom" / "mr_hippocrop_1"
    assert not predict_folder(Brightness(), plan, find_images(folder), tmp_path)
    mask, scan = read_image(tmp_path / "mr_hippocrop_1.nii.gz"), read_image(folder)
    assert mask.array.shape == scan.array.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)


def test_images_that_do_not_fit_the_model_are_refused(plan: Plan, blobs: Path, shared_data: Path) -> None:
    with pytest.raises(UserError, match="is 3D, 2D was expected"):
        predict_case(Brightness(), find_images(blobs / "imagesTr")[0], replace(plan, spatial_dims=2))
    four = find_images(shared_data / "bad_inputs" / "nifti" / "dmri_4d_image.nii.gz")[0]
    with pytest.raises(UserError, match="has 4 channels, the model expects 1"):
        predict_case(Brightness(), four, plan)
