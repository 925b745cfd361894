"""The fingerprint: what was looked at, which images are one, and whether the data are still those of the plan."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kanseg.data import values
from kanseg.data.digests import near_duplicates, thumbnail
from kanseg.data.fingerprint import (
    check_unchanged,
    exchanged_channels,
    fingerprint,
    load_fingerprint,
    unlike_training,
)
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image
from kanseg.data.plan import planned_dataset
from kanseg.data.planner import plan_run
from kanseg.errors import UserError


@pytest.fixture
def copy(blobs: Path, tmp_path: Path) -> Path:
    shutil.copytree(blobs, tmp_path / "set")
    return tmp_path / "set"


def test_the_same_data_pass_also_after_a_copy_that_changes_times(copy: Path, tmp_path: Path) -> None:
    plan_run(read_dataset(copy), tmp_path / "run", memory=2**31)
    check_unchanged(read_dataset(copy), tmp_path / "run")
    for path in copy.rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    check_unchanged(read_dataset(copy), tmp_path / "run")
    check_unchanged(read_dataset(copy), tmp_path / "elsewhere")  # a run without a fingerprint asks nothing


def change_label(root: Path) -> None:
    path = root / "labelsTr" / "case_2.nii.gz"
    file = nib.load(path)
    nib.save(nib.Nifti1Image(np.flip(np.asarray(file.dataobj), 0).copy(), file.affine), path)


def described(root: Path, change: dict) -> None:
    file = root / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_label, "case_2.nii.gz of case_2 has changed"),
        (
            lambda root: described(root, {"subjects": {"case_0": "other"}}),
            "case_0 belonged to 'p0' and belongs to",
        ),
        (
            lambda root: described(
                root, {"training": json.loads((root / "dataset.json").read_text())["training"][1:]}
            ),
            "case_0 is gone",
        ),
    ],
)
def test_a_plan_for_data_that_changed_is_refused_with_the_difference(
    copy: Path, tmp_path: Path, change: object, message: str
) -> None:
    plan_run(read_dataset(copy), tmp_path / "run", memory=2**31)
    change(copy)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"is not as it was planned in .*{message}"):
        check_unchanged(read_dataset(copy), tmp_path / "run")


def test_a_label_that_changed_within_its_size_is_refused(copy: Path, tmp_path: Path) -> None:
    path, sizes = copy / "labelsTr" / "case_2.nii.gz", []
    for change in (lambda root: None, change_label):
        change(copy)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
        sizes.append(path.stat().st_size)
        if len(sizes) == 1:
            plan_run(read_dataset(copy), tmp_path / "run", memory=2**31)
    assert sizes[0] == sizes[1]
    with pytest.raises(UserError, match=r"case_2\.nii\.gz of case_2 has changed"):
        check_unchanged(read_dataset(copy), tmp_path / "run")


def test_training_refuses_changed_data_and_leaking_splits(copy: Path, tmp_path: Path) -> None:
    from kanseg.config import load_config
    from kanseg.training.run_folder import run_splits

    run, config = tmp_path / "run", load_config(overrides=["data.folds=3"])
    plan_run(read_dataset(copy), run, memory=2**31)
    splits = run_splits(read_dataset(copy), config, run)
    ids = [case.id for case in read_dataset(copy).cases]
    (run / "splits.json").write_text(json.dumps([*splits[:2], {"train": ids[1:], "val": ids[:1]}]))
    with pytest.raises(UserError, match="Fold 2 trains on 'case_1' and validates on 'case_0'"):
        run_splits(read_dataset(copy), config, run)
    (run / "splits.json").unlink()
    change_label(copy)
    with pytest.raises(UserError, match="case_2 has changed"):
        run_splits(read_dataset(copy), config, run)


def test_copies_under_other_names_stay_on_one_side_of_every_fold(copy: Path, tmp_path: Path) -> None:
    from kanseg.config import load_config
    from kanseg.training.run_folder import run_splits

    noise = np.random.default_rng(0).normal(0, 0.01, (20, 24, 18))
    first, other = (nib.load(copy / "imagesTr" / f"case_{i}.nii.gz") for i in (0, 3))
    array = (np.asarray(first.dataobj) + noise).astype(np.float32)
    nib.save(nib.Nifti1Image(array, other.affine), copy / "imagesTr" / "case_3.nii.gz")
    plan = plan_run(read_dataset(copy), tmp_path / "run", memory=2**31)
    assert "case_0 = case_3" in " ".join(plan.reasons)
    assert (load_fingerprint(tmp_path / "run") or {})["same"] == [["case_0", "case_3"]]
    config = load_config(overrides=["data.folds=2"])
    for fold in run_splits(read_dataset(copy), config, tmp_path / "run"):
        assert ("case_0" in fold["val"]) == ("case_3" in fold["val"])


def test_no_model_carries_the_names_of_cases(copy: Path, tmp_path: Path) -> None:
    plan_run(read_dataset(copy), tmp_path / "run", memory=2**31)
    assert "case_" not in (tmp_path / "run" / "plan.json").read_text()
    assert "case_0" in (tmp_path / "run" / "fingerprint.json").read_text()


@pytest.mark.parametrize("name", ["hippocampus", "busi", "glas", "chase_db1", "drive"])
def test_different_patients_of_real_sets_are_no_duplicates(shared_data: Path, name: str) -> None:
    root = shared_data / name
    folder = root / ("imagesTr" if (root / "imagesTr").exists() else "images")
    images = {path.name: read_image(path).array for path in sorted(folder.iterdir())[:120]}
    thumbnails = {key: thumbnail(array) for key, array in images.items()}
    assert near_duplicates(thumbnails) == []
    generator = np.random.default_rng(0)
    for key in list(images)[:5]:  # the same picture, noisier, darker, a little cut
        array = images[key][..., 1:, 1:] if images[key].ndim == 3 else images[key]
        array = 0.8 * array + generator.normal(0, 0.03 * array.std(), array.shape)
        assert near_duplicates({**thumbnails, "copy": thumbnail(array)}) == [(key, "copy")]


def test_the_numbers_of_the_fingerprint_are_those_of_the_files(blobs: Path) -> None:
    dataset = read_dataset(blobs)
    seen = fingerprint(dataset)
    for case in dataset.cases:
        label = np.asarray(nib.load(case.label).dataobj)
        entry = seen["cases"][case.id]
        assert entry["size"] == list(label.shape)
        assert entry["spacing"] == [1.0, 1.0, 1.5]
        assert entry["voxels"] == {str(v): int((label == v).sum()) for v in (0, 1, 2)}
        assert set(case.values) == {0, 1, 2}
    assert seen["same"] == []


def test_labels_that_a_run_was_planned_with_are_not_opened_again_unless_they_change(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened, read = tmp_path / "run", [], values.read_image
    plan = plan_run(read_dataset(copy), run, memory=2**31)
    monkeypatch.setattr(values, "read_image", lambda path, dims: opened.append(path) or read(path, dims))
    whole = planned_dataset(plan)
    assert len(opened) == len(whole.cases)
    opened.clear()
    assert planned_dataset(plan, run) == whole
    assert not opened
    label = whole.cases[1].label
    assert label is not None
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.minimum(np.asarray(image.dataobj), 1), image.affine), label)
    assert planned_dataset(plan, run).cases[1].values == (0, 1)
    assert opened == [label]


def test_an_image_unlike_those_of_the_training_is_told_in_whatever_order_its_axes_lie() -> None:
    size = {"min": [31, 40, 24], "max": [43, 59, 47]}
    seen = {"size": size, "spacing": {"min": [1.0] * 3, "max": [1.0] * 3}}
    turned = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])  # axes A, I, R
    assert unlike_training((35, 50, 36), np.eye(4), seen) is None
    assert unlike_training((50, 36, 35), turned, seen) is None
    assert unlike_training((70, 100, 72), np.diag([0.5, 0.5, 0.5, 1]), seen) is None
    said = unlike_training((170, 220, 160), np.eye(4), seen)
    assert said is not None
    assert "170 x 220 x 160 mm" in said
    assert "31-43 x 40-59 x 24-47 mm" in said
    assert "crop" in str(unlike_training((35, 20, 36), np.eye(4), seen))
    assert "coarser" in str(unlike_training((35, 25, 36), np.diag([1.0, 2.0, 1.0, 1.0]), seen))
    assert unlike_training((35, 50), np.eye(4), seen) is None  # a plan of volumes says nothing of pictures
    flat = {"size": {"min": [90, 90], "max": [256, 200]}, "spacing": {"min": [1.0] * 2, "max": [1.0] * 2}}
    assert unlike_training((256, 200), np.eye(4), flat) is None
    assert "pixels" in str(unlike_training((2000, 1500), np.eye(4), flat))
    assert unlike_training((9, 9, 9), np.eye(4), {}) is None


def test_an_image_a_little_too_large_along_every_axis_is_told() -> None:
    """No axis is far out, and the whole is nearly twice the largest image of the training."""
    seen = {
        "size": {"min": [31, 40, 24], "max": [43, 59, 47]},
        "spacing": {"min": [1.0] * 3, "max": [1.0] * 3},
    }
    assert "58 x 53 x 72 mm" in str(unlike_training((58, 53, 72), np.eye(4), seen))
    assert unlike_training((46, 60, 50), np.eye(4), seen) is None
    assert "26 x 33 x 19 mm" in str(unlike_training((26, 33, 19), np.eye(4), seen))
    both = str(unlike_training((58, 53, 36), np.diag([1.0, 1.0, 2.0, 1.0]), seen))
    assert "58 x 53 x 72 mm" in both
    assert "coarser" in both


def test_exchanged_channels_are_told_and_others_are_not(shared_data: Path) -> None:
    """Photographs of the retina written blue first, as OpenCV does with colours of others."""
    dataset = read_dataset(shared_data / "chase_db1")
    cases = dataset.cases[::2]
    seen, names = fingerprint(replace(dataset, cases=cases[:8])), dataset.channel_names
    unseen = [read_image(case.images).array for case in cases[8:]]
    assert not any(exchanged_channels(array, seen, names) for array in unseen)
    told = [exchanged_channels(array[::-1], seen, names) for array in unseen]
    assert len(list(filter(None, told))) >= len(unseen) / 2
    assert "'red' and 'blue'" in str(next(filter(None, told)))
    assert (
        exchanged_channels(unseen[0][::-1], {"channels": [{"mean": 1.0}] * 3}, names) is None
    )  # an older plan
    assert exchanged_channels(unseen[0][:1], {"channels": seen["channels"][:1]}, names) is None
