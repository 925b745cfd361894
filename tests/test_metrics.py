"""Scores: MONAI's numbers where they are defined, closed forms, and the rules where MONAI has none."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from monai.metrics import utils as monai_distances
from monai.networks import one_hot
from PIL import Image as Picture
from scipy import ndimage

from kanseg.data.formats import read_dataset
from kanseg.data.images import Image, write_label
from kanseg.data.planner import make_plan
from kanseg.errors import UsageError, UserError
from kanseg.evaluation import pairs
from kanseg.evaluation.folders import evaluate_folders, label_options
from kanseg.evaluation.metrics import COLUMNS, METRICS, Label, evaluate_case, summarize_rows

SPACING = (1.0, 0.8, 2.5)


def cube(shape: tuple[int, ...], start: tuple[int, ...], side: int) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(s, s + side) for s in start)] = 1
    return labels


def ball(radius: float, size: int = 41) -> np.ndarray:
    distance = np.linalg.norm(np.indices((size,) * 3) - size // 2, axis=0)
    return (distance <= radius).astype(np.uint8)


def blocks(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random label map of three classes in coarse blocks that also touch the border."""
    coarse = np.random.default_rng(seed).integers(0, 4, [math.ceil(n / 4) for n in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(4, axis)
    return coarse[tuple(slice(n) for n in shape)]


def save(path: Path, labels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([*SPACING, 1.0]) if affine is None else affine), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases with two classes; predictions are right but for a shifted class in case c."""
    for name in "abc":
        truth = cube((12, 11, 10), (1, 1, 1), 4) + 2 * cube((12, 11, 10), (6, 6, 5), 4)
        save(tmp_path / "ref" / f"{name}.nii.gz", truth)
        save(tmp_path / "pred" / f"{name}.nii.gz", truth if name != "c" else np.roll(truth, 1, axis=0))
    return tmp_path / "pred", tmp_path / "ref"


@pytest.mark.parametrize("shape", [(13, 17, 11), (30, 22)])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_monai_on_the_whole_volume(shape: tuple[int, ...], seed: int) -> None:
    spacing = SPACING[: len(shape)]
    maps = [blocks(shape, 2 * seed), blocks(shape, 2 * seed + 1)]
    hot = [one_hot(torch.from_numpy(m)[None, None], 4) for m in maps]
    wanted = {
        "dice": compute_dice(*hot, include_background=False)[0],
        "iou": compute_iou(*hot, include_background=False)[0],
        "hd95": compute_hausdorff_distance(*hot, percentile=95, spacing=spacing)[0],
        "nsd": compute_surface_dice(*hot, class_thresholds=[1.5] * 3, spacing=spacing)[0],
    }
    scores = evaluate_case(*maps, spacing, [1, 2, 3], tolerance=1.5)
    for metric, values in wanted.items():
        found = [scores[label][metric] for label in (1, 2, 3)]
        np.testing.assert_allclose(found, values.numpy(), rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize("shape", [(13, 17, 11), (30, 22)])
@pytest.mark.parametrize("seed", [0, 1])
def test_distances_are_those_of_surface_voxels_by_scipy(shape: tuple[int, ...], seed: int) -> None:
    """The convention that the docstring names: faces make a surface, also at the end of the image; the larger side."""
    prediction, reference = (blocks(shape, 2 * seed + side) == 1 for side in (0, 1))
    spacing, cross = SPACING[: len(shape)], ndimage.generate_binary_structure(len(shape), 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask, cross) for mask in (prediction, reference)]
    maps = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    sides = [maps[1][surfaces[0]], maps[0][surfaces[1]]]
    tolerance = float(np.median(np.concatenate(sides)))  # that some distances are equal to
    scores = evaluate_case(prediction.astype(int), reference.astype(int), spacing, [1], tolerance + 1e-6)[1]
    assert scores["hd95"] == pytest.approx(max(np.percentile(side, 95) for side in sides), rel=1e-5)
    assert scores["nsd"] == pytest.approx(np.mean(np.concatenate(sides) <= tolerance + 1e-6))
    assert scores["assd"] == pytest.approx(np.mean(np.concatenate(sides)), rel=1e-5)


@pytest.mark.parametrize("shift", [1, 3, 7])
def test_shifted_cubes_have_their_closed_form(shift: int) -> None:
    side, shape = 8, (24, 12, 12)
    pair = cube(shape, (2, 2, 2), side), cube(shape, (2 + shift, 2, 2), side)
    spacing = (1.5, 1.0, 0.5)
    scores = evaluate_case(*pair, spacing, [1], tolerance=shift * 1.5 - 0.1)[1]
    assert scores["dice"] == pytest.approx((side - shift) / side)
    assert scores["iou"] == pytest.approx((side - shift) / (side + shift))
    assert scores["volume_ml"] == pytest.approx(side**3 * 0.75 / 1000)
    if shift < side - 1:  # the far face is more than a twentieth of the surface, and its way is the shift
        assert scores["hd95"] == pytest.approx(min(shift * 1.5, 8 * 1.5))
    assert 0 < scores["nsd"] < 1
    assert evaluate_case(*pair, spacing, [1], tolerance=shift * 1.5)[1]["nsd"] == 1


def test_concentric_balls_are_apart_by_their_radii() -> None:
    inner, outer = ball(9), ball(14)
    tight = evaluate_case(inner, outer, (1.0, 1.0, 1.0), [1], tolerance=3.0)[1]
    assert tight["hd95"] == pytest.approx(5.0, abs=0.7)
    assert tight["dice"] == pytest.approx(2 * inner.sum() / (inner.sum() + outer.sum()))
    assert tight["dice"] == pytest.approx(2 * 9**3 / (9**3 + 14**3), rel=0.02)
    assert tight["nsd"] == 0
    assert evaluate_case(inner, outer, (1.0, 1.0, 1.0), [1], tolerance=6.0)[1]["nsd"] == 1


def test_what_both_lack_is_right_and_what_one_lacks_is_worst() -> None:
    some, none = cube((10, 20, 20), (1, 1, 1), 3), np.zeros((10, 20, 20), np.uint8)
    perfect = {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "nsd": 1.0, "assd": 0.0}
    far = math.dist((0, 0, 0), (10, 16, 50))
    worst = {"dice": 0.0, "iou": 0.0, "hd95": far, "nsd": 0.0, "assd": far}
    for pair, wanted in (((none, none), perfect), ((some, none), worst), ((none, some), worst)):
        scores = evaluate_case(*pair, SPACING, [1])[1]
        assert {metric: scores[metric] for metric in METRICS} == pytest.approx(wanted)
    with pytest.raises(UserError, match="Shapes differ"):
        evaluate_case(some, none[:5], SPACING, [1])


def test_a_class_that_is_nowhere_lifts_no_mean(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folders(*folders, labels={"one": 1, "never": 9})
    assert summary["absent"] == ["never"]
    assert summary["metrics"]["mean"] == summary["metrics"]["one"]
    alone = evaluate_folders(*folders, labels={"never": 9})
    assert alone["absent"] == ["never"]
    assert alone["metrics"]["mean"]["dice"]["mean"] == 1


def test_folders_give_a_row_a_case_and_class_and_a_summary(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    summary = evaluate_folders(*folders, tmp_path / "scores")
    with (tmp_path / "scores" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["label"]) for row in rows] == [
        (case, label) for case in "abc" for label in ("label 1", "label 2")
    ]
    assert list(rows[0]) == ["case", "label", *COLUMNS]
    assert float(rows[0]["reference_volume_ml"]) == pytest.approx(64 * 2 / 1000)
    assert [float(row["dice"]) for row in rows] == [1, 1, 1, 1, 0.75, 0.75]
    assert json.loads((tmp_path / "scores" / "summary.json").read_text()) == summary
    dice = summary["metrics"]["label 1"]["dice"]
    assert (dice["mean"], dice["median"], dice["n"]) == (pytest.approx(11 / 12), 1.0, 3)
    assert 0.75 <= dice["ci95"][0] < dice["mean"] < dice["ci95"][1] <= 1
    assert summary["metrics"]["mean"]["hd95"]["mean"] == pytest.approx(1 / 3)
    assert summary["failed"] == {}
    assert evaluate_folders(*folders) == summary  # seeded


@pytest.mark.parametrize(
    ("suffix", "dims", "unit"), [(".png", 2, "pixels"), (".mha", 2, "mm"), (".nii.gz", 3, "mm")]
)
def test_lengths_are_named_by_their_unit(tmp_path: Path, suffix: str, dims: int, unit: str) -> None:
    """A picture has no spacing; a flat MHA has one."""
    path = tmp_path / f"a{suffix}"
    square = np.zeros((9, 9) if dims == 2 else (9, 9, 1), int)
    square[2:5, 2:5] = 1
    masks = [square, np.roll(square, 1, axis=0)]
    affine = np.diag([0.5, 0.5, 0.5, 1.0]) if unit == "mm" else np.eye(4)
    for name, mask in zip("ab", masks, strict=True):
        path = write_label(tmp_path / name / f"a{suffix}", mask, Image(mask[None], affine, path, dims))
    summary = evaluate_folders(tmp_path / "a", tmp_path / "b", tolerance=0.2)
    assert summary["unit"] == unit
    assert [key for key in summary if key.startswith("nsd_tolerance")] == [f"nsd_tolerance_{unit}"]
    assert summary["metrics"]["mean"]["hd95"]["mean"] == pytest.approx(1.0 if unit == "pixels" else 0.5)


def test_a_missing_or_broken_prediction_is_a_failure_with_dice_0(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    (pred / "a.nii.gz").unlink()
    whole = (pred / "b.nii.gz").read_bytes()
    (pred / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    shutil.copy(ref / "a.nii.gz", pred / "x.nii.gz")
    shutil.copy(ref / "a.nii.gz", ref / "d.nii.gz")
    (pred / "d.nii.gz").write_bytes(b"broken")
    summary = evaluate_folders(pred, ref)
    assert list(summary["failed"]) == ["a", "b", "d"]
    assert summary["failed"]["a"] == "no prediction"
    assert all(f"{name}.nii.gz cannot be read" in summary["failed"][name] for name in "bd")
    assert summary["predictions_without_reference"] == ["x"]
    assert summary["metrics"]["label 1"]["dice"]["mean"] == pytest.approx(0.75 / 4)
    assert summary["metrics"]["label 1"]["hd95"]["median"] == pytest.approx(
        math.dist((0, 0, 0), (12, 8.8, 25))
    )
    assert "NaN" not in json.dumps(summary)


def test_no_prediction_at_all_is_a_folder_of_failures(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    summary = evaluate_folders(tmp_path / "empty", folders[1])
    assert list(summary["failed"]) == ["a", "b", "c"]
    assert summary["metrics"]["mean"]["dice"]["mean"] == 0
    with pytest.raises(UserError, match="nowhere"):
        evaluate_folders(tmp_path / "nowhere", folders[1])
    with pytest.raises(UserError, match="holds no images"):
        evaluate_folders(folders[0], tmp_path / "empty")


def test_an_invented_class_counts_unless_the_labels_are_given(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    truth = np.asarray(nib.load(ref / "a.nii.gz").dataobj)
    save(pred / "a.nii.gz", np.where(truth == 1, 9, truth).astype(np.uint8))
    assert evaluate_folders(pred, ref)["metrics"]["label 9"]["dice"]["mean"] == pytest.approx(2 / 3)
    named = evaluate_folders(pred, ref, labels={"far": 2})
    assert list(named["metrics"]) == ["far", "mean"]


def test_another_grid_is_refused_and_nothing_is_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    truth = np.asarray(nib.load(ref / "b.nii.gz").dataobj)
    save(pred / "b.nii.gz", truth, np.diag([1, 1, 1, 1]))
    with pytest.raises(UserError, match="different grids"):
        evaluate_folders(pred, ref, tmp_path / "scores")
    save(pred / "b.nii.gz", truth[:-1])
    with pytest.raises(UserError, match="shapes"):
        evaluate_folders(pred, ref, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_all_cases_that_lie_elsewhere_are_named_at_once(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    for name in ("a", "b"):
        save(
            pred / f"{name}.nii.gz",
            np.asarray(nib.load(ref / f"{name}.nii.gz").dataobj),
            np.diag([1, 1, 1, 1]),
        )
    with pytest.raises(UserError, match=r"2 of \d+ cases lie elsewhere: .*a\.nii\.gz.*b\.nii\.gz"):
        evaluate_folders(pred, ref)


def test_every_frame_of_a_video_is_scored(tmp_path: Path) -> None:
    for frame in range(4):
        truth = np.zeros((8, 8), np.uint8)
        truth[2:5, 2:5] = 1
        for folder, label in (("ref", truth), ("pred", truth if frame == 0 else 1 - truth)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Picture.fromarray(label).save(tmp_path / folder / f"video_{frame:04d}.png")
    summary = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert summary["cases"] == 4
    assert summary["metrics"]["label 1"]["dice"]["mean"] == 0.25
    for frame in range(1, 4):
        (tmp_path / "pred" / f"video_{frame:04d}.png").unlink()
    alone = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert sorted(alone["failed"]) == [f"video_{frame:04d}" for frame in range(1, 4)]
    assert alone["metrics"]["label 1"]["dice"]["mean"] == 0.25


def test_a_name_of_two_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="name a twice"):
        label_options("a=1,a=2")


def test_two_files_are_a_pair_whatever_their_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(folders[0] / "c.nii.gz", tmp_path / "mine.nii.gz")
    summary = evaluate_folders(tmp_path / "mine.nii.gz", folders[1] / "c.nii.gz")
    assert summary["metrics"]["mean"]["dice"] == {
        "mean": 0.75, "ci95": [0.75, 0.75], "median": 0.75, "n": 1
    }  # fmt: skip


def test_pictures_pair_with_their_masks(tmp_path: Path) -> None:
    mask = cube((20, 30), (4, 5), 10) * 255
    for folder, name in (("pred", "p (1).png"), ("ref", "p (1)_mask.png")):
        (tmp_path / folder).mkdir()
        Picture.fromarray(mask).save(tmp_path / folder / name)
    summary = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert list(summary["metrics"]) == ["label 255", "mean"]
    assert summary["metrics"]["mean"]["dice"]["mean"] == 1


def test_labels_that_are_nearly_whole_numbers_are_rounded(shared_data: Path) -> None:
    mask = shared_data / "bad_inputs" / "nifti" / "brats_0001_brainmask_float64.nii.gz"
    summary = evaluate_folders(mask, mask)
    assert list(summary["labels"].values()) == [1]
    assert summary["metrics"]["mean"]["dice"]["mean"] == 1


def test_background_alone_is_nothing_to_score(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_folders(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    summary = evaluate_folders(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", labels={"tumour": 1})
    assert summary["metrics"]["tumour"]["dice"]["mean"] == 1


def test_scores_that_cannot_be_written_leave_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be made"):
        evaluate_folders(*folders, tmp_path / "file" / "scores")
    (tmp_path / "scores" / "cases.csv").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        evaluate_folders(*folders, tmp_path / "scores")
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["cases.csv"]


def test_without_spread_the_interval_is_the_mean(folders: tuple[Path, Path]) -> None:
    shutil.copy(folders[1] / "c.nii.gz", folders[0] / "c.nii.gz")
    assert evaluate_folders(*folders)["metrics"]["mean"]["dice"]["ci95"] == [1.0, 1.0]


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.05, 100)
    rows = [{"case": str(i), "label": "x", **dict.fromkeys(METRICS, v)} for i, v in enumerate(values)]
    low, high = summarize_rows(rows)["x"]["dice"]["ci95"]
    half = 1.96 * values.std() / 10
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


@pytest.mark.parametrize("labels", [None, {"one": 1, "both": (1, 2)}])
def test_a_label_map_is_opened_once_and_a_distance_measured_once(
    folders: tuple[Path, Path], labels: dict[str, Label] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HD95 and NSD go by the same distances, from each surface to the other; classes need no reading beforehand."""
    calls: dict[str, list[Any]] = {"read_image": [], "get_surface_distance": []}
    for module, (name, made) in zip((pairs, monai_distances), calls.items(), strict=True):
        done = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *what, made=made, done=done: made.append(what[0]) or done(*what),
        )
    evaluate_folders(*folders, labels=labels)
    assert sorted(calls["read_image"]) == sorted(path for folder in folders for path in folder.iterdir())
    assert len(calls["get_surface_distance"]) == 3 * 2 * 2  # cases, classes, ways


def test_classes_of_some_cases_count_in_all(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    save(prediction / "c.nii.gz", cube((12, 11, 10), (1, 1, 1), 4) * 7)
    found = evaluate_folders(prediction, reference)
    assert found == evaluate_folders(
        prediction, reference, labels={f"label {value}": value for value in (1, 2, 7)}
    ) | {"absent": []}
    assert found["metrics"]["label 7"]["dice"]["mean"] == pytest.approx(2 / 3)


def test_labels_are_read_from_text_or_a_plan(tmp_path: Path) -> None:
    assert label_options("1, 3")["labels"] == {"label 1": 1, "label 3": 3}
    assert label_options("tumour=2,edema=4")["labels"] == {"tumour": 2, "edema": 4}
    with pytest.raises(UsageError, match="tumour"):
        label_options("tumour")
    with pytest.raises(UserError, match="plan"):
        label_options(str(tmp_path))


def test_images_in_place_of_label_maps_are_refused_and_an_atlas_is_not(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    atlas = generator.integers(0, 200, (16, 16, 16)).astype(np.uint8)
    save(tmp_path / "masks" / "a.nii.gz", cube((16, 16, 16), (4, 4, 4), 6))
    save(tmp_path / "images" / "a.nii.gz", generator.integers(0, 255, (16, 16, 16)).astype(np.int16))
    save(tmp_path / "atlas" / "a.nii.gz", atlas)
    save(tmp_path / "half" / "a.nii.gz", np.where(atlas < 110, atlas, 0).astype(np.uint8))
    (tmp_path / "none").mkdir()
    for pair in (("masks", "images"), ("images", "masks")):
        with pytest.raises(UserError, match="images has 255 different values.*name the classes by --labels"):
            evaluate_folders(*(tmp_path / name for name in pair))
    assert evaluate_folders(tmp_path / "masks", tmp_path / "images", labels={"grey": 7})["cases"] == 1
    for name in ("half", "none"):
        assert len(evaluate_folders(tmp_path / name, tmp_path / "atlas")["labels"]) == 199


def test_the_plan_says_what_is_scored_and_what_is_ignored(tmp_path: Path, blobs: Path) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), ignore_value=9)
    found = label_options(str(plan.save(tmp_path / "plan.json")))
    assert found["labels"] == found["segments"] == {"near": 1, "far": 2}
    assert (found["ignore"], found["unions"]) == (9, {})
    assert label_options(None) == {}
