"""The Dice of a prediction without its reference: found where it follows the probabilities, honest, and told."""

from __future__ import annotations

import io
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console
from test_predict import Brightness

from kanseg.data.plan import Plan
from kanseg.data.unlabelled import find_images
from kanseg.inference import predict as prediction
from kanseg.inference.predict import Prediction, predict, predict_folder
from kanseg.inference.quality import (
    COVERED,
    DOUBTFUL,
    FEWEST,
    Unseen,
    expected_dice,
    fit_quality,
    intensities,
    judge,
    volumes,
)
from kanseg.inference.uncertainty import QUALITY, doubt, read_quality

NAMES = ["near", "far"]


def unseen(count: int = 400, noise: float = 0.03, **other: Any) -> Unseen:
    """Cases of five folds whose Dice is 0.8 times what the probabilities expect, but for noise."""
    random = np.random.default_rng(0)
    expected = random.uniform(0.3, 1, (count, 2))
    dice = np.clip(0.8 * expected + random.normal(0, noise, expected.shape), 0, 1)
    sizes, values = random.uniform(1, 2, (count, 2)), random.uniform(-1, 1, (count, 1, 3))
    return replace(Unseen(expected, dice, sizes, values, np.arange(count) % 5), **other)


def test_the_line_and_its_errors_are_those_of_the_noise() -> None:
    for one in fit_quality(unseen(), NAMES)["classes"].values():
        assert (one["slope"], one["intercept"]) == pytest.approx((0.8, 0), abs=0.03)
        assert one["mae"] == pytest.approx(0.03 * np.sqrt(2 / np.pi), rel=0.1)
        assert one["spearman"] > 0.95
        assert one["covered"] == pytest.approx(COVERED, abs=0.04)
        assert (one["below"], one["above"]) == pytest.approx((-0.049, 0.049), abs=0.01)


def test_a_case_is_estimated_without_its_own_fold() -> None:
    """Where the Dice of a fold alone is otherwise, the others do not know it."""
    cases = unseen(noise=0)
    apart = cases.fold == 3
    cases.dice[apart] = 0
    found = fit_quality(cases, NAMES)["classes"]["near"]
    missed = (0.8 * cases.expected[apart, 0]).sum() / len(apart)  # lines of the others without it are exact
    others = [(cases.fold != fold) & ~apart for fold in (0, 1, 2, 4)]
    rest = sum(np.abs(0.8 * cases.expected[o, 0] * apart.mean()).sum() for o in others) / len(apart)
    assert found["mae"] >= missed
    assert found["mae"] <= missed + rest
    assert found["covered"] <= 0.81


def test_probabilities_that_tell_nothing_give_the_mean() -> None:
    random = np.random.default_rng(1)
    cases = unseen(dice=random.uniform(0, 1, (400, 2)))
    cases.dice[:, 0] = 1 - cases.expected[:, 0]
    found = fit_quality(cases, NAMES)["classes"]
    assert found["near"]["slope"] == 0
    assert found["near"]["intercept"] == pytest.approx(cases.dice[:, 0].mean())
    assert abs(found["far"]["spearman"] or 0) < 0.2


def test_a_line_that_does_not_hold_in_other_folds_is_none() -> None:
    """Fitted to all, it would slope upwards: the folds differ, and within each more is said where less is true."""
    cases = unseen()
    within = np.random.default_rng(2).uniform(-0.2, 0.2, (400, 2))
    step = cases.fold[:, None] * 0.02
    cases = replace(cases, expected=0.5 + step + within, dice=0.5 + 4 * step - 0.2 * within)
    found = fit_quality(cases, NAMES)
    assert all((one["slope"], one["spearman"]) == (0, None) for one in found["classes"].values())
    assert found["classes"]["near"]["intercept"] == pytest.approx(cases.dice[:, 0].mean())
    assert found["doubtful"] is None


def test_few_cases_give_no_line() -> None:
    cases = unseen(3 * FEWEST)
    cases.expected[FEWEST - 1 :, 0] = np.nan
    found = fit_quality(cases, NAMES)["classes"]
    assert "slope" not in found["near"]
    assert found["near"]["volume_ml"] == [cases.volumes[:, 0].min(), cases.volumes[:, 0].max()]
    assert "slope" in found["far"]
    lonely = fit_quality(replace(cases, fold=np.zeros(30)), NAMES)
    assert not any("slope" in one for one in lonely["classes"].values())
    assert lonely["doubtful"] is None


def test_as_many_unseen_cases_are_doubtful_as_said() -> None:
    cases = unseen()
    found = fit_quality(cases, NAMES)
    lines = [[found["classes"][name][key] for name in NAMES] for key in ("slope", "intercept")]
    means = (cases.expected * lines[0] + lines[1]).mean(axis=1)
    assert (means < found["doubtful"]).mean() == pytest.approx(DOUBTFUL, abs=0.01)


@pytest.mark.parametrize("regions", [[], [[0], [1, 2], [2]]])
def test_expected_dice_is_that_of_the_uncertainty(plan: Plan, blobs: Path, regions: list[list[int]]) -> None:
    """Where the image is on the network's grid already; temperatures do not count, nor does a class not found."""

    class Shy(Brightness):
        def forward(self, x):
            logits = super().forward(x)
            logits[:, 2] -= 0.0 if self.training else self.less
            return logits

    network = Shy()
    own = replace(plan, regions=regions)
    image = find_images(blobs / "imagesTr")[0]
    for network.less in (0.0, 50.0):
        predicted = predict(network, image, own, temperatures=[3.0])
        cold = predict(network, image, own)
        labels = cold.labels()
        how: dict[str, Any] = {"regions": bool(regions), "spacing": cold.source.spacing}
        chances = [cold.probability(number) for number in range(3)]
        rows = doubt(chances, labels, own.label_values, own.label_names, **how).rows
        found = expected_dice(predicted)
        for value, size, row in zip(found, volumes(labels, cold.source.spacing, own), rows, strict=True):
            if row["expected_dice"] is None:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(row["expected_dice"], abs=1e-4)
            if not regions:
                assert size == pytest.approx(row["volume_ml"])
        assert np.isnan(found[1]) == bool(network.less)


def learnt(plan: Plan, images: list[Any], dice: float = 0.7) -> dict[str, Any]:
    """As of cases that are like these images."""
    told = [predict(Brightness(), image, plan) for image in images]
    sizes = np.array([volumes(one.labels(), one.source.spacing, plan) for one in told])
    line = {"slope": 0.0, "intercept": dice, "below": -0.2, "above": 0.1}
    seen = np.array([intensities(one) for one in told])
    classes = zip(NAMES, sizes.min(0).tolist(), sizes.max(0).tolist(), strict=True)
    return {
        "cases": len(images),
        "intensities": [seen.min(0).tolist(), seen.max(0).tolist()],
        "doubtful": 0.5,
        "classes": {name: {"volume_ml": [least, most], **line} for name, least, most in classes},
    }


def test_images_like_the_training_give_estimates_and_no_notes(plan: Plan, blobs: Path) -> None:
    images = find_images(blobs / "imagesTr")
    quality = learnt(plan, images[:4])
    for image in images:
        predicted = predict(Brightness(), image, plan)
        verdict = judge(predicted, predicted.labels(), quality)
        assert not verdict.notes
        assert not verdict.doubtful
        assert [(row["expected_dice"], row["low"], row["high"]) for row in verdict.rows] == [
            pytest.approx((0.7, 0.5, 0.8))
        ] * 2


def test_what_is_unlike_the_training_is_told(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    raw = replace(plan, normalization=[{"scheme": "fixed", "mean": 0.0, "std": 1.0}])
    images = find_images(blobs / "imagesTr")
    quality = learnt(raw, images, dice=0.3)
    scan = nib.load(images[0].images[0])
    bright = np.asarray(scan.dataobj) + 40
    nib.save(nib.Nifti1Image(bright.astype(np.float32), scan.affine), tmp_path / "bright.nii.gz")
    predicted = predict(Brightness(), find_images(tmp_path / "bright.nii.gz")[0], raw)
    verdict = judge(predicted, predicted.labels(), quality)
    assert sum("is unlike the training: percentile" in note for note in verdict.notes) == 1
    assert any(note.startswith("near was not found, in the training cases it has") for note in verdict.notes)
    assert any("far has" in note for note in verdict.notes)
    predicted.parts[0].plan = replace(raw, ignore_value=9)  # where images were annotated in parts
    assert verdict.notes[:1] == judge(predicted, predicted.labels(), quality).notes
    assert verdict.rows[0]["expected_dice"] is None
    assert "expected Dice 0.30 is lower than of 95% of unseen" in verdict.doubtful


def test_a_folder_has_the_table_and_doubtful_cases_are_said(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    images = find_images(blobs / "imagesTr")
    for dice in (0.7, 0.3):
        told: dict[str, Any] = {}
        console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
        how: dict[str, Any] = {"quality": learnt(plan, images, dice), "judged": told.__setitem__}
        predict_folder(Brightness(), plan, images[:2], tmp_path / "out", console=console, **how)
        rows = read_quality(tmp_path / "out" / QUALITY)
        assert [(row["case"], row["class"]) for row in rows] == [
            (case.id, name) for case in images[:2] for name in NAMES
        ]
        assert {(row["expected_dice"], row["uncertainty"]) for row in rows} == {(str(dice), "")}
        assert [bool(row["notes"]) for row in rows] == [dice < 0.5] * 4
        assert console.export_text().count("check it: expected Dice") == 2 * (dice < 0.5)
        assert list(told) == [case.id for case in images[:2]]


def test_one_file_has_no_table_beside_it_unless_it_is_asked_for(
    plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    images = find_images(blobs / "imagesTr")
    quality = learnt(plan, images)
    out = tmp_path / "mask.nii.gz"
    predict_folder(Brightness(), plan, images[:1], out, quality=quality)
    assert list(tmp_path.iterdir()) == [out]
    predict_folder(Brightness(), plan, images[:1], out, quality=quality, uncertainty=True)
    rows = read_quality(tmp_path / QUALITY)
    assert {(row["expected_dice"], row["low"]) for row in rows} == {("0.7", "0.5")}
    assert all(row["uncertainty"] for row in rows)


def test_logits_of_a_case_are_gone_when_the_next_is_predicted(
    plan: Plan, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, made, kept = find_images(blobs / "imagesTr"), prediction.predict, list[weakref.ref]()

    def watched(*given: Any, **how: Any) -> Prediction:
        assert [ref() for ref in kept] == [None] * len(kept)
        found = made(*given, **how)
        kept.append(weakref.ref(found.parts[0].logits))
        return found

    monkeypatch.setattr(prediction, "predict", watched)
    how: dict[str, Any] = {"quality": learnt(plan, images), "uncertainty": True, "probabilities": True}
    assert not predict_folder(Brightness(), plan, images[:3], tmp_path, **how)
    assert len(kept) == 3


def test_a_case_that_the_table_lacks_is_predicted_again(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    images = find_images(blobs / "imagesTr")
    predict_folder(Brightness(), plan, images[:2], tmp_path, settings={})  # by a model that told none
    for again in (0, 2):
        console = Console(record=True, width=200, file=io.StringIO())
        how: dict[str, Any] = {"settings": {}, "quality": learnt(plan, images), "console": console}
        predict_folder(Brightness(), plan, images[:2], tmp_path, **how)
        assert console.export_text().count("is there already") == again
        assert {row["case"] for row in read_quality(tmp_path / QUALITY)} == {"case_0", "case_1"}


def test_a_table_of_fewer_columns_is_gone_on_with(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    (tmp_path / QUALITY).write_text("case,class,volume_ml,expected_dice,uncertainty\nold,near,1,0.9,0.1\n")
    images = find_images(blobs / "imagesTr")
    predict_folder(Brightness(), plan, images[:1], tmp_path, quality=learnt(plan, images))
    rows = read_quality(tmp_path / QUALITY)
    assert [row["case"] for row in rows] == ["case_0", "case_0", "old"]
    assert rows[-1]["expected_dice"] == "0.9"
