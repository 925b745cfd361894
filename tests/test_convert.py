"""A data set is the same in every layout: voxels, grids, labels, regions, patients."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

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


def pictures(root: Path, channels: int, most: int) -> Path:
    """Pictures with a file a channel, and labels."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        for number in range(channels):
            array = random.integers(0, most, (9, 8)).astype(np.uint16 if most > 256 else np.uint8)
            Picture.fromarray(array).save(root / "images" / f"{name}_{number:04d}.png")
        Picture.fromarray(random.integers(0, 2, (9, 8)).astype(np.uint8)).save(
            root / "labels" / f"{name}.png"
        )
    return root


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(("channels", "most"), [(1, 255), (2, 255), (3, 255), (3, 60000), (4, 255)])
def test_pictures_keep_any_number_of_channels(tmp_path: Path, to: str, channels: int, most: int) -> None:
    root = pictures(tmp_path / "set", channels, most)
    convert(read_dataset(root), tmp_path / "out", to)
    made = read_dataset(tmp_path / "out")
    for one, other in zip(read_dataset(root).cases, made.cases, strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(read_image(one.images).array, read_image(other.images).array)
    assert len(made.channel_names) == channels


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", ["nnunet", "folders", "msd"])
def test_test_images_keep_their_labels_and_patients(
    blobs: Path, tmp_path: Path, layout: str, to: str
) -> None:
    source = tmp_path / "set"
    convert(read_dataset(blobs), source, "msd" if layout == "msd" else "nnunet")
    described = json.loads((source / "dataset.json").read_text())
    ending = ".nii.gz" if layout == "msd" else "_0000.nii.gz"
    for folder, suffix in (("images", ending), ("labels", ".nii.gz")):
        (source / f"{folder}Ts").mkdir()
        for number in (4, 5):
            (source / f"{folder}Tr" / f"case_{number}{suffix}").rename(
                source / f"{folder}Ts" / f"case_{number}{suffix}"
            )
    (source / "labelsTs" / "case_5.nii.gz").unlink()
    if layout == "msd":
        listed = [entry["image"].replace("Tr", "Ts") for entry in described["training"][4:]]
        described |= {"training": described["training"][:4], "test": listed}
    (source / "dataset.json").write_text(json.dumps(described))
    if layout == "folders":
        (source / "dataset.json").unlink()
    dataset = read_dataset(source)
    made = convert(dataset, tmp_path / "out", to)
    assert (made["training"], made["test"], made["test_labels"]) == (4, 2, 1)
    again = read_dataset(tmp_path / "out").test_cases
    assert [case.id for case in again] == ["case_4", "case_5"]
    assert [case.group for case in again] == [case.group for case in dataset.test_cases]
    label = again[0].label
    np.testing.assert_array_equal(read_label(label), read_label(blobs / "labelsTr" / "case_4.nii.gz"))  # type: ignore[arg-type]
    assert again[1].label is None
    (source / "labelsTs" / "odd.nii.gz").write_bytes((source / "labelsTs" / "case_4.nii.gz").read_bytes())
    assert any(
        "test labels have no image and are not used: odd" in note for note in read_dataset(source).notes
    )


@pytest.mark.parametrize("to", LAYOUTS)
def test_names_that_look_like_others_keep_their_labels_and_patients(
    blobs: Path, tmp_path: Path, to: str
) -> None:
    dataset = read_dataset(blobs)
    names = ["a", "a_mask", "a_1", "a.png", "a_0000", "b.png"]
    cases = tuple(
        replace(case, id=name, group=str(i // 2))
        for i, (case, name) in enumerate(zip(dataset.cases, names, strict=True))
    )
    convert(replace(dataset, cases=cases), tmp_path / "out", to)
    made = {case.id: case for case in read_dataset(tmp_path / "out").cases}
    assert {name: case.group for name, case in made.items()} == {case.id: case.group for case in cases}
    for case in cases:
        np.testing.assert_array_equal(read_label(case.label), read_label(made[case.id].label))  # type: ignore[arg-type]


def test_images_that_would_be_written_over_or_outside_are_refused(blobs: Path, tmp_path: Path) -> None:
    dataset = read_dataset(blobs)
    first, second = dataset.cases[:2]
    for changes, message in (
        ({"test_cases": (first, replace(second, id=first.id))}, "several images called 'case_0'"),
        ({"test_cases": (replace(second, id=first.id, group="other"),)}, "several images called 'case_0'"),
        ({"cases": (replace(first, id="../x"),)}, "'../x' cannot be the name of a file"),
        ({"cases": (replace(first, id=".x"),)}, "'.x' cannot be the name of a file"),
        ({"cases": (replace(first, images=first.images * 2),)}, "has 2 channels, expected are 1"),
    ):
        with pytest.raises(UserError, match=message):
            convert(replace(dataset, **changes), tmp_path / "out", "msd")
        assert not list(tmp_path.iterdir())


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
