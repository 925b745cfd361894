"""Images with classes are read from the formats that they come in, and what does not fit is refused in words."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.data.class_loader import CHANGES, TrainingImages, covering, prepare, stored
from kanseg.data.class_plan import ClassPlan, plan_classes
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.image_classes import ImageClasses, is_classes, read_classes
from kanseg.data.plan import Plan
from kanseg.data.plans import load_plan
from kanseg.data.splits import split
from kanseg.errors import UsageError, UserError

generator = np.random.default_rng(0)


def pictures(count: int, *shape: int) -> np.ndarray:
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path) -> np.ndarray:
    images = pictures(6, 7, 5)
    for name, array in (("train-images-idx3-ubyte", images), ("t10k-images-idx3-ubyte", images[:2])):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    for name, count in (("train-labels-idx1-ubyte", 6), ("t10k-labels-idx1-ubyte", 2)):
        (folder / name).write_bytes(idx(np.arange(count, dtype=np.uint8) % 2))
    return images[3][None]


def cifar10(folder: Path) -> np.ndarray:
    below = folder / "cifar-10-batches-bin"
    below.mkdir()
    images = pictures(4, 3, 32, 32)
    rows = [bytes([number]) + image.tobytes() for number, image in zip((0, 1, 0, 1), images, strict=True)]
    (below / "data_batch_1.bin").write_bytes(b"".join(rows[:2]))
    (below / "data_batch_2.bin").write_bytes(b"".join(rows[2:]))
    (below / "test_batch.bin").write_bytes(rows[0])
    (below / "batches.meta.txt").write_text("cat\ndog\n")
    return images[3]


def cifar100(folder: Path) -> np.ndarray:
    images = pictures(4, 3, 32, 32)
    rows = [bytes([9, number]) + image.tobytes() for number, image in zip((0, 1, 0, 1), images, strict=True)]
    (folder / "train.bin").write_bytes(b"".join(rows))
    (folder / "fine_label_names.txt").write_text("cat\ndog\n")
    return images[3]


def cifar_python(folder: Path, hundred: bool) -> np.ndarray:
    below = folder / f"cifar-{100 if hundred else 10}-python"
    below.mkdir()
    images, labels = pictures(4, 3, 32, 32), "fine_labels" if hundred else "labels"
    files = {"meta": {"fine_label_names": ["cat", "dog"]}} if hundred else {}
    files = files or {"batches.meta": {"label_names": ["cat", "dog"]}}
    batches = (
        {"train": slice(0, 4)} if hundred else {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 4)}
    )
    batches["test" if hundred else "test_batch"] = slice(0, 1)
    for name, rows in batches.items():
        files[name] = {
            "data": images[rows].reshape(-1, 3072),
            labels: [0, 1, 0, 1][rows],
            "batch_label": name,
        }
    for name, content in files.items():
        (below / name).write_bytes(pickle.dumps(content, protocol=4))
    return images[3]


def medmnist(folder: Path, *shape: int) -> np.ndarray:
    images = pictures(4, *shape)
    labels = np.array([[0], [1], [0], [1]])
    parts = {f"{part}_images": images for part in ("train", "val", "test")}
    np.savez(
        folder / "nodulemnist3d.npz", **parts, **{name.replace("images", "labels"): labels for name in parts}
    )
    return images[3]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def class_folders(folder: Path) -> np.ndarray:
    images = pictures(4, 9, 8, 3)
    for number, image in enumerate(images):
        save(folder / ("cat", "dog")[number % 2] / f"{number}.png", image)
    return np.moveaxis(images[3], -1, 0)


def imagenet(folder: Path) -> np.ndarray:
    class_folders(folder / "val")
    return class_folders(folder / "train")


def tiny_imagenet(folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    images = pictures(4, 64, 64, 3)
    (folder / "wnids.txt").write_text("n01\nn02\n")
    (folder / "words.txt").write_text("n01\tcat, feline\nn02\tdog\n")
    for number, image in enumerate(images):
        save(folder / "train" / f"n0{1 + number % 2}" / "images" / f"{number}.png", image)
    save(folder / "val" / "images" / "v.png", images[0])
    (folder / "val" / "val_annotations.txt").write_text("v.png\tn01\t0\t0\t9\t9\n")
    return np.moveaxis(images[3], -1, 0)


def ham10000(folder: Path) -> np.ndarray:
    images = pictures(4, 6, 8, 3)
    rows = ["lesion_id,image_id,dx,age"]
    for number, image in enumerate(images):
        save(folder / f"HAM10000_images_part_{1 + number // 2}" / f"ISIC_{number}.png", image)
        rows.append(f"HAM_{number // 2},ISIC_{number},{('mel', 'nv')[number % 2]},40")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(rows))
    return np.moveaxis(images[3], -1, 0)


def volumes(folder: Path) -> np.ndarray:
    images = generator.normal(size=(4, 5, 6, 7)).astype(np.float32)
    for number, image in enumerate(images):
        path = folder / "train" / ("benign", "malignant")[number % 2] / f"{number}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(image, np.eye(4)), path)
    return images[3][None]


MAKERS: dict[str, tuple[Callable[[Path], np.ndarray], int, tuple[str, str]]] = {
    "mnist": (mnist, 2, ("0", "1")),
    "cifar10": (cifar10, 2, ("cat", "dog")),
    "cifar100": (cifar100, 2, ("cat", "dog")),
    "cifar10 python": (lambda folder: cifar_python(folder, False), 2, ("cat", "dog")),
    "cifar100 python": (lambda folder: cifar_python(folder, True), 2, ("cat", "dog")),
    "medmnist 2d": (lambda folder: np.moveaxis(medmnist(folder, 8, 8, 3), -1, 0), 2, ("benign", "malignant")),
    "medmnist 3d": (lambda folder: medmnist(folder, 8, 8, 8)[None], 3, ("benign", "malignant")),
    "class folders": (class_folders, 2, ("cat", "dog")),
    "imagenet": (imagenet, 2, ("cat", "dog")),
    "tiny imagenet": (tiny_imagenet, 2, ("cat (n01)", "dog (n02)")),
    "tiny imagenet as unpacked": (
        lambda folder: tiny_imagenet(folder / "tiny-imagenet-200"),
        2,
        ("cat (n01)", "dog (n02)"),
    ),
    "ham10000": (ham10000, 2, ("melanoma", "nevus")),
    "volumes": (volumes, 3, ("benign", "malignant")),
}
WITH_VALIDATION = ("medmnist 2d", "medmnist 3d", "imagenet", "tiny imagenet", "tiny imagenet as unpacked")


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_gives_its_images_and_classes(name: str, tmp_path: Path) -> None:
    make, dims, classes = MAKERS[name]
    image = make(tmp_path)
    dataset = read_classes(tmp_path)
    assert is_classes(tmp_path)
    assert (dataset.spatial_dims, dataset.label_names) == (dims, classes)
    assert bool(dataset.splits) == (name in WITH_VALIDATION)
    of_dog = [case for case in dataset.cases if case.values == (1,)]
    assert any(np.array_equal(dataset.read(case), image) for case in of_dog)
    assert all(case.values in ((0,), (1,)) for case in (*dataset.cases, *dataset.test_cases))


@pytest.mark.parametrize("name", MAKERS)
def test_a_plan_comes_back_from_its_file_and_normalises_what_it_looked_at(name: str, tmp_path: Path) -> None:
    MAKERS[name][0](tmp_path)
    dataset = read_classes(tmp_path)
    plan = plan_classes(dataset, tmp_path / "run")
    assert load_plan(tmp_path / "run" / "plan.json") == plan
    train = dataset.splits[0]["train"] if dataset.splits else [case.id for case in dataset.cases]
    images = [
        prepare(stored(dataset.read(case), plan), plan) for case in dataset.cases if case.id in set(train)
    ]
    values = np.stack([image.numpy() for image in images])
    assert values.shape[2:] == tuple(plan.patch_size)
    if name not in ("ham10000", "class folders", "imagenet"):  # those are cut
        axes = (0, *range(2, values.ndim))
        np.testing.assert_allclose(values.mean(axes), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(axes), 1, atol=1e-3)


def test_images_with_any_number_of_classes_are_read_from_arrays_and_tables(tmp_path: Path) -> None:
    labels = np.eye(14, dtype=int)[[0, 3, *range(14)]]
    labels[0, 5], labels[1] = 1, 0
    np.savez(tmp_path / "chestmnist.npz", train_images=pictures(16, 4, 4), train_labels=labels)
    arrays = read_classes(tmp_path / "chestmnist.npz")
    assert [case.values for case in arrays.cases[:3]] == [(0, 5), (), (0,)]
    assert arrays.label_names[5] == "nodule"
    for name in "abc":
        save(tmp_path / "table" / f"{name}.png", pictures(1, 4, 4)[0])
    rows = "image,classes\na.png,mass | edema\nb.png,\nc.png,mass\n"
    (tmp_path / "table" / "cases.csv").write_text(rows)
    table = read_classes(tmp_path / "table")
    assert table.label_names == ("edema", "mass")
    assert [case.values for case in table.cases] == [(0, 1), (), (1,)]
    plan = plan_classes(table)
    assert [plan.target(case.values).tolist() for case in table.cases] == [[1, 1], [0, 0], [0, 1]]
    assert "an image may have several classes, or none" in plan.reasons
    images = TrainingImages(table.read, table.cases, plan, changes=[], epoch_size=3, seed=0, balanced=True)
    assert images.pools == [[1], [0], [0, 2]]  # without a class, then one a class


def table(folder: Path, heading: str, *cells: str) -> ImageClasses:
    """A table of pictures a, b, ... with further cells."""
    rows = []
    for name, cell in zip("abcdefgh", cells, strict=False):
        save(folder / f"{name}.png", pictures(1, 4, 4)[0])
        rows.append(f"{name}.png{',' if ',' in heading else ';'}{cell}\n")
    (folder / "table.csv").write_text("".join([f"{heading}\n", *rows]))
    return read_classes(folder / "table.csv")


@pytest.mark.parametrize(
    "heading",
    ["image,class", "Image,Class", "IMAGE_ID,Diagnosis", "filename,label", "File Name,Target", "image,Label"],
)
def test_a_table_of_classes_is_known_by_usual_headings(tmp_path: Path, heading: str) -> None:
    dataset = table(tmp_path, heading, "cat", "dog", "cat")
    assert [case.values for case in dataset.cases] == [(0,), (1,), (0,)]
    assert dataset.label_names == ("cat", "dog")
    assert is_classes(tmp_path / "table.csv")


@pytest.mark.parametrize("heading", ["image,classes", "Image;Classes", "Image Index,Finding Labels"])
@pytest.mark.parametrize("sign", "|;")
def test_several_classes_stand_in_a_cell(tmp_path: Path, heading: str, sign: str) -> None:
    dataset = table(tmp_path, heading, f'"mass{sign} edema"', "edema", "", "mass")
    assert dataset.multilabel
    assert [case.values for case in dataset.cases] == [(0, 1), (0,), (), (1,)]


@pytest.mark.parametrize(
    ("heading", "cells", "message"),
    [
        (
            "image,class",
            ["mass;edema", "edema"],
            "has 'mass;edema' in its column class, which holds one class",
        ),
        (
            "image,class",
            ["mass|edema", "edema"],
            r"has 'mass\|edema' in its column class, which holds one class",
        ),
        ("image;classes", ["mass;edema", "edema"], "has 3 cells in line 2, and 2 columns"),
        ("image,classes", ['"mass, edema"', "edema"], "put . between the classes of an image, not a comma"),
        ("image,class,split", ["cat,train", "dog,other"], "split 'other' is none of train, val, test"),
    ],
)
def test_cells_that_mislead_are_named(tmp_path: Path, heading: str, cells: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        table(tmp_path, heading, *cells)
    assert "\n" not in str(caught.value)


def test_a_table_of_classes_says_parts_and_folds(tmp_path: Path) -> None:
    parts = ["cat,train", "dog,Training", "cat,Valid", "dog,TEST", "dog,"]
    dataset = table(tmp_path, "Image,Class,Split", *parts)
    assert dataset.splits == ({"train": ["a", "b", "e"], "val": ["c"]},)
    assert [case.id for case in dataset.test_cases] == ["d"]
    folds = ["cat,0,", "dog,0,", "cat,1,", "dog,1,", "cat,,test"]
    dataset = table(tmp_path, "image,class,Fold,split", *folds)
    assert [fold["val"] for fold in split(dataset)] == [["a", "b"], ["c", "d"]]
    assert [case.id for case in dataset.test_cases] == ["e"]
    shared = ["cat,0,p", "dog,0,q", "cat,1,p", "dog,1,r"]
    with pytest.raises(UserError, match="belong to one patient"):  # when it is planned
        plan_classes(table(tmp_path, "image,class,fold,patient", *shared))
    dataset = table(tmp_path, "image,class,fold", "cat,a", "dog,b", "cat,a")
    assert not dataset.splits
    assert "left aside" in dataset.notes[-1]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("sign", ",;")
def test_a_table_is_read_as_spreadsheets_and_pandas_write_it(tmp_path: Path, mark: str, sign: str) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png", pictures(1, 4, 4)[0])
    rows = ["", ",image,class,,", "0,a.png,cat,,", "1,b.png,dog,,", ",,,,", "2,c.png,cat,,", ",,,,", ""]
    (tmp_path / "table.csv").write_text(mark + "\r\n".join(rows).replace(",", sign), encoding="utf-8")
    dataset = read_classes(tmp_path / "table.csv")
    assert [(case.id, case.values) for case in dataset.cases] == [("a", (0,)), ("b", (1,)), ("c", (0,))]
    assert not dataset.splits


def test_labels_that_are_classes_and_labels_that_are_files_are_told_apart(tmp_path: Path) -> None:
    for name in ("cat/a", "dog/b", "cat/c", "a_mask", "b_mask", "c_mask"):
        save(tmp_path / f"{name}.png", pictures(1, 4, 4)[0] // 128)

    def among(heading: str, *cells: str) -> bool:
        rows = [f"{i},{c}\n" for i, c in zip(("cat/a.png", "dog/b.png", "cat/c.png"), cells, strict=True)]
        (tmp_path / "list.csv").write_text("".join([f"{heading}\n", *rows]))
        return is_classes(tmp_path / "list.csv")

    assert among("image,label", "cat", "dog", "cat")  # beside folders of these names
    assert among("image,label", *(300 * name for name in ("cat", "dog", "cat")))  # too long for a file
    for heading in ("image,label", "image,labels", "image,target"):
        assert not among(heading, "a_mask.png", "b_mask.png", "c_mask.png")
    for name in "abc":
        (tmp_path / "series" / name).mkdir(parents=True)
    assert not among("image,label", "series/a", "series/b", "series/c")
    assert not among("image,label,class", "series/a,x", "series/b,y", "series/c,x")


def test_two_folders_of_one_part_are_refused_by_name(tmp_path: Path) -> None:
    for part in ("train", "training"):
        for name in ("cat", "dog"):
            save(tmp_path / part / name / "1.png", pictures(1, 8, 8)[0])
    with pytest.raises(UserError, match=r"train and .*training all hold images"):
        read_classes(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "training" / name / "1.png").unlink()
    assert len(read_classes(tmp_path).cases) == 2


def test_the_binary_version_stands_for_the_same_cifar_alone(tmp_path: Path) -> None:
    cifar_python(tmp_path, False)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    records = [bytes([label]) + image.tobytes() for label, image in enumerate(pictures(10, 3072))]
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"".join(records))
    assert "binary" in read_classes(tmp_path).layout
    cifar_python(tmp_path, True)
    with pytest.raises(UserError, match=r"cifar-10-batches-bin and .*cifar-100-python all hold images"):
        read_classes(tmp_path)


def test_two_data_sets_of_arrays_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("FashionMNIST", "MNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        mnist(tmp_path / name / "raw")
    with pytest.raises(UserError, match=r"FashionMNIST.raw and .*MNIST.raw all hold images"):
        read_classes(tmp_path)


def test_a_file_called_test_is_no_part_of_the_data(tmp_path: Path) -> None:
    imagenet(tmp_path)
    (tmp_path / "test").write_text("how it was tested")
    assert not read_classes(tmp_path).test_cases


def test_patients_of_a_table_of_classes_that_are_odd_are_told(tmp_path: Path) -> None:
    dataset = table(
        tmp_path, "image,class,patient,split", "cat,P-01,", "dog,p1,", "cat,q,", "dog,q,", "dog,q,test"
    )
    assert any("'P-01' and 'p1' may be one patient" in note for note in dataset.notes)
    assert any(note.endswith("test images: q") for note in dataset.notes)


def test_masks_beside_a_table_with_a_diagnosis_are_for_segmentation(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", pictures(1, 4, 4)[0])
        save(tmp_path / f"{name}_mask.png", pictures(1, 4, 4)[0] // 128)
    (tmp_path / "cases.csv").write_text("image,diagnosis,patient\na,x,1\nb,y,2\n")
    assert not is_classes(tmp_path)
    assert [case.group for case in read_dataset(tmp_path).cases] == ["1", "2"]
    for layout in ("case/image", "case/label", "other/image", "other/label"):
        save(tmp_path / "cases" / f"{layout}.png", pictures(1, 4, 4)[0] // 128)
    for name in ("benign/a", "benign/a_mask", "normal/b", "normal/b_mask"):
        save(tmp_path / "sorted" / f"{name}.png", pictures(1, 4, 4)[0] // 128)
    assert not any(is_classes(tmp_path / name) for name in ("cases", "sorted"))
    with pytest.raises(UserError, match="images beside their masks: put all into one folder"):
        read_dataset(tmp_path / "sorted")
    for name in ("with_mask/with_mask_1", "without_mask/without_mask_1"):  # of faces
        save(tmp_path / "faces" / f"{name}.png", pictures(1, 4, 4)[0])
    assert read_classes(tmp_path / "faces").label_names == ("with_mask", "without_mask")
    rows = "a.png,a_mask.png\nb.png,b_mask.png\n"
    (tmp_path / "list.csv").write_text(f"image,label\n{rows}")
    assert not is_classes(tmp_path / "list.csv")


def test_what_lies_beside_the_folders_of_classes_is_told(tmp_path: Path) -> None:
    imagenet(tmp_path)
    save(tmp_path / "train" / "cow" / "deep" / "a.png", pictures(1, 4, 4)[0])
    save(tmp_path / "train" / "loose.png", pictures(1, 4, 4)[0])
    assert read_classes(tmp_path).notes == (
        "folders of train that hold no images themselves, or are called images or masks, are no classes: cow",
        "1 images of train lie in no folder of a class and are not used",
    )


def test_patients_of_test_images_are_known_by_the_pattern_too(tmp_path: Path) -> None:
    for part, number in (("Training", 1), ("Training", 2), ("Testing", 2), ("Testing", 3)):
        for name in ("cat", "dog"):
            save(tmp_path / part / name / f"p{number}_{name}.png", pictures(1, 4, 4)[0])
    dataset = read_classes(tmp_path, id_pattern=r"/(p\d)_")
    assert {case.group for case in dataset.test_cases} == {"p2", "p3"}
    assert dataset.notes == ("patients who have images to train on and test images: p2",)
    save(tmp_path / "Testing" / "cat" / "other.png", pictures(1, 4, 4)[0])
    dataset = read_classes(tmp_path, id_pattern=r"/(p\d)_")
    assert dataset.notes[0] == "the id pattern finds no patient in 1 test images: Testing/cat/other"
    assert {case.group for case in dataset.test_cases} == {"p2", "p3", "Testing/cat/other"}


def test_a_last_axis_of_length_one_holds_the_channel(tmp_path: Path) -> None:
    images = pictures(4, 6, 5, 1)
    np.savez(tmp_path / "grey.npz", train_images=images, train_labels=np.array([0, 1, 0, 1]))
    dataset = read_classes(tmp_path / "grey.npz")
    assert (dataset.spatial_dims, len(dataset.channel_names)) == (2, 1)
    np.testing.assert_array_equal(dataset.read(dataset.cases[1])[0], images[1, ..., 0])


def test_a_verb_for_label_maps_says_that_these_are_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "set")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "set"), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, UsageError)
    assert "has a class for each image, no label maps" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_task_is_refused_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path)
    plan_classes(read_classes(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match="The plan is for classification, and this is for segmentation alone"):
        Plan.load(tmp_path / "run" / "plan.json")


def test_segmentation_data_are_not_taken_for_classes(blobs: Path, shared_data: Path, tmp_path: Path) -> None:
    folders = [blobs, *(folder for folder in shared_data.iterdir() if folder.is_dir())]
    assert not [folder for folder in folders if is_classes(folder)]
    save(tmp_path / "images" / "a.png", pictures(1, 4, 4)[0])
    save(tmp_path / "masks" / "a.png", pictures(1, 4, 4)[0] // 128)
    assert not is_classes(tmp_path)
    assert read_dataset(tmp_path).cases


def test_images_of_a_lesion_stay_together_and_folds_are_alike(tmp_path: Path) -> None:
    ham10000(tmp_path)
    dataset = read_classes(tmp_path)
    for fold in split(dataset, folds=2):
        groups = [
            {case.group for case in dataset.cases if case.id in fold[part]} for part in ("train", "val")
        ]
        assert not groups[0] & groups[1]
        assert sorted(case.values[0] for case in dataset.cases if case.id in fold["val"]) == [0, 1]


def test_two_tables_of_images_in_one_folder_are_named(tmp_path: Path) -> None:
    """A second one that says the same is no question; each may be given itself, also without an ending."""
    ham10000(tmp_path)
    table, other = tmp_path / "HAM10000_metadata.csv", tmp_path / "HAM10000_metadata"
    other.write_bytes(table.read_bytes())
    (tmp_path / "HAM10000_metadata.zip").write_bytes(b"PK")
    assert len(read_classes(tmp_path).cases) == 4
    other.write_text("\n".join(table.read_text().splitlines()[:3]))
    with pytest.raises(
        UserError, match="several tables.*HAM10000_metadata, HAM10000_metadata.csv.*in place of"
    ):
        read_classes(tmp_path)
    assert is_classes(tmp_path)
    assert len(read_classes(table).cases) == 4
    assert len(read_classes(other).cases) == 2


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "data_batch_1"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        UserError, match=r"batches.meta is not read as CIFAR's python version.*Path.touch.*binary"
    ):
        read_classes(tmp_path)
    np.savez(
        tmp_path / "objects.npz", train_images=np.array([Trap()], dtype=object), train_labels=np.zeros(1)
    )
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_classes(tmp_path / "objects.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_cannot_pass_bytes_off_as_objects(tmp_path: Path) -> None:
    """An array of objects whose type denies it: its bytes would be taken for addresses."""

    class Type:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            build = np.ndarray.__reduce__(np.empty(0))[0]
            return build, (np.ndarray, (0,), b"b"), (1, (2,), Type(), False, b"\x41" * 16)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    batch = {"data": pictures(2, 3, 32, 32).reshape(2, -1), "labels": Forged()}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match="data_batch_1 is not read as CIFAR's python version.*OBJECT"):
        read_classes(tmp_path)


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, 257], [0, -1], [0], [0.0, 1.0]])
def test_labels_of_a_pickle_that_are_no_bytes_are_refused(labels: list[Any], tmp_path: Path) -> None:
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    batch = {"data": pictures(2, 3, 32, 32).reshape(2, -1), "labels": labels}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match="has no label of 0 to 255 for each of its 2 images"):
        read_classes(tmp_path)


def broken_idx(folder: Path) -> None:
    mnist(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(6, np.uint8))[:-1])


def broken_gzip(folder: Path) -> None:
    mnist(folder)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])


def broken_cifar(folder: Path) -> None:
    (folder / "train.bin").write_bytes(bytes(3000))


def several_labels(folder: Path) -> None:
    np.savez(folder / "chest.npz", train_images=pictures(2, 4, 4), train_labels=np.full((2, 14), 2))


def labels_of_other_shapes(folder: Path) -> None:
    labels = {"train_labels": np.ones((2, 14), int), "test_labels": np.ones((2, 13), int)}
    np.savez(folder / "chest.npz", train_images=pictures(2, 4, 4), test_images=pictures(2, 4, 4), **labels)


def labels_without_images(folder: Path) -> None:
    np.savez(folder / "short.npz", train_images=pictures(2, 4, 4), train_labels=np.arange(3))


def flat_validation(folder: Path) -> None:
    class_folders(folder / "train")
    save(folder / "val" / "a.png", pictures(1, 4, 4)[0])


def foreign_class(folder: Path) -> None:
    imagenet(folder)
    save(folder / "val" / "horse" / "a.png", pictures(1, 4, 4)[0])


def missing_image(folder: Path) -> None:
    (folder / "cases.csv").write_text("image,class\na.png,cat\n")


def ambiguous_image(folder: Path) -> None:
    for place in ("a", "b"):
        save(folder / place / "1.png", pictures(1, 4, 4)[0])
    (folder / "cases.csv").write_text("image,class\n1,cat\n")


def image_in_two_rows(folder: Path) -> None:
    save(folder / "1.png", pictures(1, 4, 4)[0])
    (folder / "cases.csv").write_text("image,class\n1,cat\n1,dog\n")


def nameless_class(folder: Path) -> None:
    save(folder / "1.png", pictures(1, 4, 4)[0])
    (folder / "cases.csv").write_text("image,class\n1, \n")


def empty_class(folder: Path) -> None:
    mnist(folder)
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).write_bytes(idx(np.full(6 if name[0] == "t" and "rain" in name else 2, 3, np.uint8)))


BROKEN = {
    broken_idx: "no whole idx file",
    broken_gzip: "cannot be read",
    broken_cifar: "no multiple of a record",
    several_labels: "labels that are not 0 or 1 for each class",
    labels_of_other_shapes: "labels of other shapes in its parts",
    labels_without_images: "2 images and 3 labels",
    flat_validation: "has no class folders. Sort",
    foreign_class: "is a class that is not in train",
    ambiguous_image: r"names the image '1', and .* has a/1.png, b/1.png",
    image_in_two_rows: "has several rows for the image '1'",
    nameless_class: "names no class for 1",
    missing_image: "names the image 'a.png'",
    empty_class: "no image to train on for: 0, 1, 2",
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_what_does_not_fit_is_said_in_one_sentence(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=BROKEN[make]) as caught:
        read_classes(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_recognised_names_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No layout was recognised. Expected: a folder a class"):
        read_classes(tmp_path)
    with pytest.raises(UserError, match="There is no such file"):
        read_classes(tmp_path / "nowhere")


def test_a_table_in_a_folder_that_is_not_recognised_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "classes.csv").write_text("image,class\nimages/a.png,one\n")
    with pytest.raises(UserError, match=r"Where classes.csv there lists the images, give that file"):
        list_dataset(tmp_path)


@pytest.fixture
def planned(tmp_path: Path) -> tuple[ClassPlan, TrainingImages]:
    class_folders(tmp_path)
    dataset = read_classes(tmp_path)
    plan = plan_classes(dataset)
    options = {"changes": ["flip", "shift"], "epoch_size": 3, "seed": 1}
    return plan, TrainingImages(dataset.read, dataset.cases, plan, **options)  # type: ignore[arg-type]


def test_every_image_is_seen_once_before_any_is_seen_again(planned: tuple[ClassPlan, TrainingImages]) -> None:
    _, images = planned
    seen = [images._next((place // 3, place % 3)) for place in range(12)]
    assert [sorted(seen[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert len({tuple(seen[start : start + 4]) for start in (0, 4, 8)}) > 1


def test_a_sample_depends_on_its_place_alone(planned: tuple[ClassPlan, TrainingImages]) -> None:
    _, images = planned
    first = images[2, 1]["image"]
    before = torch.rand(1, generator=torch.Generator().set_state(torch.get_rng_state()))
    assert torch.equal(images[2, 1]["image"], first)
    assert torch.equal(torch.rand(1), before)  # the numbers of the training are not touched
    assert not torch.equal(images[5, 1]["image"], first)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dims", [2, 3])
def test_changes_keep_kind_and_channels(change: str, dims: int, tmp_path: Path) -> None:
    medmnist(tmp_path, *[8] * dims, *([3] if dims == 2 else []))
    plan = plan_classes(read_classes(tmp_path))
    image = torch.randint(0, 256, (plan.in_channels, *[8] * dims), dtype=torch.uint8)
    if dims == 3 and change not in ("flip", "flips", "shift"):
        with pytest.raises(UsageError, match="is for 2D images"):
            CHANGES.create(change, plan)
        return
    sent = pickle.dumps(CHANGES.create(change, plan))  # as to processes that are not forked
    changed = pickle.loads(sent)(image)
    assert (changed.shape, changed.dtype) == (image.shape, image.dtype)


def test_images_of_any_size_are_covered_and_cut() -> None:
    assert covering(torch.rand(1, 10, 30), [8, 8]).shape == (1, 8, 24)
    assert covering(torch.rand(1, 4, 8, 6), [8, 8, 8]).shape == (1, 8, 16, 12)
