"""A data set is the same in every layout: voxels, grids, labels, regions, patients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kanseg.data.convert import LAYOUTS, convert
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image, read_label
from kanseg.data.labels import class_values
from kanseg.errors import UserError


def same(one: Path, other: Path) -> None:
    """Cases, patients, classes, voxels and grids agree; label values may be renumbered."""
    first, second = read_dataset(one), read_dataset(other)
    assert first.channel_names == second.channel_names
    assert first.label_names == second.label_names
    assert (first.ignore_value is None) == (second.ignore_value is None)
    cases = {case.id: case for case in second.cases}
    assert set(cases) == {case.id for case in first.cases}
    names = [class_values(dataset) for dataset in (first, second)]
    for case in first.cases[:4]:
        there = cases[case.id]
        assert there.group == case.group
        images = [read_image(c.images) for c in (case, there)]
        np.testing.assert_array_equal(images[0].array, images[1].array)
        np.testing.assert_allclose(images[0].affine, images[1].affine, atol=1e-5)
        labels = [read_label(c.label) for c in (case, there)]  # type: ignore[arg-type]
        unknown = [label == d.ignore_value for label, d in zip(labels, (first, second), strict=True)]
        np.testing.assert_array_equal(*unknown)
        for name in names[0]:
            masks = [np.isin(label, values[name]) for label, values in zip(labels, names, strict=True)]
            np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_other_layout_holds_the_same(blobs: Path, tmp_path: Path, to: str) -> None:
    made = convert(read_dataset(blobs), tmp_path / "out", to)
    assert (made["training"], made["layout"]) == (6, to)
    same(blobs, tmp_path / "out")


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("name", ["glas", "chase_db1"])
def test_pictures_and_patients_too(shared_data: Path, tmp_path: Path, to: str, name: str) -> None:
    few = tmp_path / "few"
    for folder in ("images", "masks"):
        (few / folder).mkdir(parents=True)
        for path in sorted((shared_data / name / folder).iterdir())[:4]:
            shutil.copy(path, few / folder)
    if (shared_data / name / "cases.csv").exists():
        shutil.copy(shared_data / name / "cases.csv", few)
    convert(read_dataset(few), tmp_path / "out", to)
    same(few, tmp_path / "out")


@pytest.mark.parametrize("to", LAYOUTS)
def test_regions_the_ignore_label_and_channels_survive(blobs: Path, tmp_path: Path, to: str) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    described = json.loads((root / "dataset.json").read_text())
    for entry in described["training"]:
        entry["image"] = [entry["image"], entry["image"]]
        entry["id"] = Path(entry["label"]).name.split(".")[0]
    described |= {"modality": {"0": "T1", "1": "T2"}}
    described |= {
        "labels": {"background": 0, "both": [1, 2], "far": 2, "ignore": 5},
        "regions_class_order": [1, 2],
    }
    (root / "dataset.json").write_text(json.dumps(described))
    for path in (root / "labelsTr").iterdir():
        file = nib.load(path)
        label = np.asarray(file.dataobj).copy()
        label[:2] = 5
        nib.save(nib.Nifti1Image(label, file.affine), path)
    convert(read_dataset(root), tmp_path / "out", to)
    same(root, tmp_path / "out")
    again = read_dataset(tmp_path / "out")
    assert len(again.regions) == 3
    if to == "nnunet":  # the values of its labels are consecutive, the one to ignore is the highest
        values = np.unique(read_label(tmp_path / "out" / "labelsTr" / "case_0.nii.gz"))
        np.testing.assert_array_equal(values, np.arange(len(values)))
        assert again.ignore_value == values.max()
    assert "subjects" in json.loads((tmp_path / "out" / "dataset.json").read_text())


def test_nnunet_values_are_consecutive(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "volumes_misc" / "ct_trunk_totalseg"
    (tmp_path / "list.csv").write_text(f"image,label\n{folder / 'image.nii.gz'},{folder / 'label.nii.gz'}\n")
    convert(read_dataset(tmp_path / "list.csv"), tmp_path / "out", "nnunet")
    values = np.unique(read_label(tmp_path / "out" / "labelsTr" / "image.nii.gz"))
    np.testing.assert_array_equal(values, np.arange(42))
    assert read_image(tmp_path / "out" / "imagesTr" / "image_0000.nii.gz").array.min() < 0


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_held_out_label_with_a_foreign_value_is_refused(blobs: Path, tmp_path: Path, to: str) -> None:
    shutil.copytree(blobs, tmp_path / "data")
    described = json.loads((tmp_path / "data" / "dataset.json").read_text())
    held_out = described["training"].pop()
    described["test"] = [held_out]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(described))
    path = tmp_path / "data" / held_out["label"]
    stored = nib.load(path)
    array = np.asarray(stored.dataobj).copy()
    array[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(array, stored.affine), path)
    with pytest.raises(UserError, match=r"has the values \[9\]"):
        convert(read_dataset(tmp_path / "data"), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_or_into_the_source(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    for inside in (root, root / "out"):
        with pytest.raises(UserError, match="lies inside"):
            convert(read_dataset(root), inside, "msd")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert(read_dataset(root), tmp_path / "full", "msd")


def test_what_fails_leaves_nothing(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    dataset = read_dataset(root)
    (root / "imagesTr" / "case_5.nii.gz").write_bytes(b"cut")
    with pytest.raises(UserError, match="case_5"):
        convert(dataset, tmp_path / "out", "msd")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_unknown_layout_is_named(blobs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown layout 'nnunt'. Did you mean 'nnunet'"):
        convert(read_dataset(blobs), tmp_path / "out", "nnunt")
