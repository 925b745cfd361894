"""One temperature: found where it is known, honest on cases that it was not fitted on, and without effect on labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics.calibration import calibration_binning
from scipy.special import expit, softmax
from test_predict import OBLIQUE, Brightness

from kanseg.data.images import Image, read_image, write_array
from kanseg.data.plan import Plan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.inference.calibration import (
    BOUNDS,
    CALIBRATION,
    NEAR,
    VOXELS,
    Sample,
    calibrate,
    draw_sample,
    fit_temperature,
    near_structures,
    reliability,
    stored,
    surprise,
)
from kanseg.inference.predict import predict, predict_folder
from kanseg.training.calibrate import CASES, conclude_calibration, observe

TRUE = 1.8


def drawn(random: np.random.Generator, regions: bool, count: int = 4000, heat: float = TRUE) -> Sample:
    """Voxels whose classes are drawn from the logits' probabilities at a temperature."""
    logits = random.normal(0, 4, (count, 3)).astype(np.float32)
    if regions:
        truth = random.random(logits.shape) < expit(logits / heat)
    else:
        ends = softmax(logits / heat, axis=1).cumsum(axis=1)
        truth = np.eye(3, dtype=bool)[(random.random((count, 1)) > ends[:, :-1]).sum(axis=1)]
    return Sample(logits, truth, np.full(count, 1 / count, np.float32), random.random(count) < 0.5)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("heat", [0.6, 1.0, TRUE])
def test_the_temperature_that_voxels_were_drawn_with_is_found(regions: bool, heat: float) -> None:
    sample = drawn(np.random.default_rng(0), regions, 20_000, heat)
    found = fit_temperature(sample, regions)
    assert found == pytest.approx(heat, rel=0.05)
    around = [surprise(sample, found * factor, regions) for factor in (0.9, 1, 1.1)]
    assert min(around) == around[1]


def test_where_every_voxel_is_right_the_temperature_has_an_end() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    sample = Sample(logits, np.eye(2, dtype=bool), np.full(2, 0.5, np.float32), np.ones(2, bool))
    assert fit_temperature(sample, False) == pytest.approx(BOUNDS[0], rel=0.01)


def test_reliability_is_that_of_monai() -> None:
    random = np.random.default_rng(0)
    chance = random.random(500)
    truth = random.random(500) < chance**2
    error, curve = reliability(chance, truth, np.full(500, 0.002))
    said, was, count = calibration_binning(
        torch.from_numpy(chance)[None, None], torch.from_numpy(truth)[None, None], num_bins=10
    )
    np.testing.assert_allclose(curve, torch.stack([said, was, count / 500], -1)[0, 0], atol=1e-6)
    assert error == pytest.approx(float(((said - was).abs() * count / 500).sum()), abs=1e-6)


def test_a_weight_counts_as_so_many_voxels() -> None:
    random = np.random.default_rng(0)
    chance, truth = random.random(60), random.random(60) < 0.5
    times = random.integers(1, 5, 60)
    repeated = reliability(chance.repeat(times), truth.repeat(times), np.ones(times.sum()))
    np.testing.assert_allclose(reliability(chance, truth, times.astype(float))[0], repeated[0])


def test_what_is_told_of_a_fold_does_not_hang_on_its_own_temperature() -> None:
    """The temperature of a fold is that of the others alone, and only errors by it are told."""
    random = np.random.default_rng(0)
    folds = [[drawn(random, False, heat=heat)] for heat in (1.2, TRUE, 3.0)]
    found = calibrate(folds, ["one", "two"], False)
    for number, heat in enumerate(found["temperatures"]):
        others = [fold[0] for other, fold in enumerate(folds) if other != number]
        assert heat == pytest.approx(fit_temperature(Sample.joined(others), False))
    errors = np.mean(
        [surprise(fold[0], t, False) for fold, t in zip(folds, found["temperatures"], strict=True)]
    )
    assert found["nll"][1] == pytest.approx(errors, rel=1e-5)
    best = surprise(Sample.joined([fold[0] for fold in folds]), found["temperature"], False)
    assert best < found["nll"][1] < found["nll"][0]
    assert all(after < before for before, after in (one["ece_near"] for one in found["classes"].values()))


def test_where_folds_contradict_each_other_nothing_is_calibrated() -> None:
    """The temperature of one fold makes the other less likely than none."""
    random = np.random.default_rng(0)
    found = calibrate([[drawn(random, False, heat=heat)] for heat in (0.5, 2.0)], ["one", "two"], False)
    assert found["temperatures"] == pytest.approx([2.0, 0.5], rel=0.1)
    assert found["nll"][1] > found["nll"][0]
    assert found["temperature"] == 1


@pytest.fixture
def case(plan: Plan, tmp_path: Path):
    """An image on an oblique grid whose voxels all differ, its prediction (the image as logits), and a reference."""
    shape = (30, 28, 20)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_array(
        tmp_path / "x.nii.gz", image, Image(image[None], OBLIQUE, tmp_path / "x.nii.gz", 3), image.dtype
    )

    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([-x, x, 0 * x], dim=1)

    raw = replace(plan, normalization=[{"scheme": "fixed", "mean": 0.0, "std": 1.0}], spacing=[1.1, 1.0, 2.0])
    predicted = predict(Same(), find_images(tmp_path / "x.nii.gz")[0], raw)
    reference = np.zeros(shape, int)
    reference[12:15, 10:14, 9:12], reference[13, 12, 10] = 1, 2
    return predicted, image, reference


def test_a_sample_has_the_logits_and_classes_of_the_images_own_voxels(case) -> None:
    """Which voxel was drawn is told by its logit: the image is linear, and so is the way to the network's grid."""
    predicted, image, reference = case
    part, labels = predicted.parts[0], np.zeros(reference.shape, int)
    sample = draw_sample(part, predicted.source.affine, labels, reference, part.plan, "a")
    at = np.unravel_index(sample.logits[:, 1].round().astype(int).clip(0, image.size - 1), image.shape)
    inside = np.all([(a > 2) & (a < n - 3) for a, n in zip(at, image.shape, strict=True)], axis=0)
    assert inside.sum() > VOXELS / 2
    np.testing.assert_array_equal(sample.truth.argmax(1)[inside], reference[at][inside])
    assert {0, 1} <= set(sample.truth.argmax(1)[inside])
    near = near_structures(reference > 0, np.linalg.norm(OBLIQUE[:3, :3], axis=0))
    np.testing.assert_array_equal(sample.near[inside], near[at][inside])


def test_weights_make_up_for_how_voxels_are_drawn(case) -> None:
    predicted, _, reference = case
    part, labels = predicted.parts[0], np.zeros(reference.shape, int)
    sample = draw_sample(part, predicted.source.affine, labels, reference, part.plan, "a")
    assert len(sample.weight) == VOXELS
    assert sample.near.mean() == 0.5
    assert sample.weight.sum() == pytest.approx(1, rel=1e-5)
    near = near_structures(reference > 0, np.linalg.norm(OBLIQUE[:3, :3], axis=0))
    assert sample.weight[sample.near].sum() == pytest.approx(near.mean(), rel=1e-5)
    share = sample.weight[sample.truth[:, 1]].sum()
    assert share == pytest.approx((reference == 1).mean(), rel=0.35)  # as often as in the image


def test_what_nobody_annotated_is_not_drawn(case) -> None:
    predicted, _, reference = case
    part = predicted.parts[0]
    part.plan = replace(part.plan, ignore_value=9)
    known = np.zeros(reference.shape, bool)
    known[10:16, 8:16, 8:13] = True
    masked = np.where(known, reference, 9)
    sample = draw_sample(part, predicted.source.affine, masked * 0, masked, part.plan, "a")
    assert len(sample.weight) == known.sum()
    np.testing.assert_allclose(sample.weight, 1 / known.sum(), rtol=1e-5)
    empty = draw_sample(part, predicted.source.affine, masked * 0, reference * 0 + 9, part.plan, "a")
    assert empty.logits.shape == (0, 3)


def test_near_is_as_far_in_mm_along_every_axis() -> None:
    mask = np.zeros((30, 30, 30), bool)
    mask[15, 15, 15] = True
    found = near_structures(mask, (1.0, 2.5, 20.0))
    reach = [np.ptp(axis) // 2 for axis in found.nonzero()]
    assert reach == [NEAR, 2, 1]
    assert not near_structures(np.zeros((4, 4), bool), (1, 1)).any()


@pytest.mark.parametrize("regions", [[], [[0], [1, 2], [2]]])
def test_probabilities_soften_and_labels_stay(plan: Plan, blobs: Path, regions: list[list[int]]) -> None:
    network = Brightness()
    own = replace(plan, regions=regions)
    image = find_images(blobs / "imagesTr")[0]
    plain, warm = predict(network, image, own), predict(network, image, own, temperatures=[TRUE])
    np.testing.assert_array_equal(plain.labels(), warm.labels())
    item, logits = warm.parts[0].item, torch.stack(list(warm.parts[0].logits))
    assert item["image"].shape[1:] == logits.shape[1:]
    wanted = logits / TRUE
    wanted = wanted.sigmoid() if regions else wanted.softmax(0)
    for number in range(1, 3):
        chance = warm.parts[0].chance(number)
        torch.testing.assert_close(chance, wanted[number])
        was = plain.parts[0].chance(number)
        assert (((chance > 0.5) == (was > 0.5)) | bool(not regions)).all()
    if not regions:
        told = [warm.probability(number) for number in range(3)]
        np.testing.assert_allclose(np.sum(told, axis=0), 1, atol=1e-5)
        assert (np.max(told, axis=0) <= np.max([plain.probability(k) for k in range(3)], axis=0) + 1e-5).all()


def test_labels_of_networks_of_several_plans_stay(plan: Plan, blobs: Path) -> None:
    class Other(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x).flip(1)

    image, networks = find_images(blobs / "imagesTr")[0], [Brightness(), Other()]
    plans = [plan, replace(plan, patch_size=[8, 8, 8])]
    plain = predict(networks, image, plans)
    warm = predict(networks, image, plans, temperatures=[3.0, 0.4])
    np.testing.assert_array_equal(plain.labels(), warm.labels())
    assert not np.allclose(plain.probability(1), warm.probability(1), atol=1e-2)


def test_maps_of_probability_and_doubt_are_calibrated(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    case = find_images(blobs / "imagesTr")[:1]
    how = {"probabilities": True, "uncertainty": True}
    predict_folder(Brightness(), plan, case, tmp_path / "plain", **how)
    predict_folder(Brightness(), plan, case, tmp_path / "warm", temperatures=[TRUE], **how)
    predicted = predict(Brightness(), case[0], plan, temperatures=[TRUE])
    (one,) = (tmp_path / "warm").glob("*_prob_near*")
    np.testing.assert_allclose(read_image(one).array[0], predicted.probability(1), atol=1e-6)
    doubt = [read_image(tmp_path / f / "case_0_uncertainty.nii.gz").array for f in ("plain", "warm")]
    assert doubt[1].mean() > doubt[0].mean()
    labels = [read_image(tmp_path / f / "case_0.nii.gz").array for f in ("plain", "warm")]
    np.testing.assert_array_equal(*labels)


def test_a_case_that_validates_in_two_folds_counts_once(case, tmp_path: Path) -> None:
    """Folds that come with data may share cases; the last one's label map is scored."""
    predicted, _, reference = case
    plan, names = predicted.parts[0].plan, [f"case{number}" for number in range(6)]
    splits = [{"train": [], "val": names[:4]}, {"train": [], "val": names[3:]}]
    for fold, entry in enumerate(splits):
        for name in entry["val"]:
            observe(predicted, reference, reference, name, tmp_path / f"fold_{fold}" / CASES)
    row = {"dice": 0.8, "reference_volume_ml": 1.0}
    rows = [{"case": name, "label": label, **row} for name in names for label in plan.label_names[1:]]
    conclude_calibration(tmp_path, plan, rows, splits, [tmp_path])
    found = json.loads((tmp_path / CALIBRATION).read_text())
    assert (found["cases"], found["quality"]["cases"]) == (6, 6)
    assert found["voxels"] == 6 * VOXELS


def test_a_temperature_that_is_none_is_refused(tmp_path: Path) -> None:
    assert stored({}, [tmp_path]) == {}
    assert stored({"calibration": {"temperature": 2.0}}, [tmp_path])["temperature"] == 2
    for text in ('{"temperature": 0}', '{"temperature": "hot"}', "[]", "{", '{"temperature": NaN}'):
        (tmp_path / CALIBRATION).write_text(text)
        with pytest.raises(UserError, match=r"calibration\.json is to hold a temperature above 0"):
            stored({}, [tmp_path])
    (tmp_path / CALIBRATION).write_text(json.dumps({"temperature": 1.5}))
    assert stored({}, [tmp_path / "none", tmp_path]) == {"temperature": 1.5}
    assert stored({"calibration": {"temperature": 2.0}}, [tmp_path]) == {"temperature": 2.0}
