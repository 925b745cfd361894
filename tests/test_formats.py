"""Every layout is recognised and told; what does not fit is explained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from kanseg.data.cases import Dataset
from kanseg.data.convert import convert
from kanseg.data.doctor import diagnose
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.image_classes import is_classes
from kanseg.data.labels import regions_of
from kanseg.data.planner import check_wishes
from kanseg.data.splits import split
from kanseg.data.suffixes import stem_of
from kanseg.data.unlabelled import find_images, labels_in_case_folders
from kanseg.errors import UserError


def volumes(folder: Path, names: list[str], values: tuple[int, ...] = (), dtype: type = np.uint8) -> Path:
    """Small volumes; with `values` they are label maps that hold those values."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        array = np.random.default_rng(i).normal(size=(6, 5, 4)).astype(np.float32)
        if values:
            array = np.resize(np.array((0, *values), dtype=dtype), (6, 5, 4))
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_decathlon(blobs: Path) -> None:
    dataset = read_dataset(blobs)
    assert "Decathlon" in dataset.layout
    assert dataset.label_names == ("background", "near", "far")
    assert dataset.channel_names == ("MRI",)
    assert [case.group for case in dataset.cases] == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_nnunet_joins_channels(tmp_path: Path) -> None:
    volumes(tmp_path / "imagesTr", ["a_0000", "a_0001", "b_0000", "b_0001"])
    volumes(tmp_path / "labelsTr", ["a", "b"], (1,))
    described = {
        "channel_names": {"0": "T1", "1": "CT"},
        "labels": {"background": 0, "organ": 1},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    dataset = read_dataset(tmp_path)
    assert "nnU-Net" in dataset.layout
    assert dataset.channel_names == ("T1", "CT")
    assert [len(case.images) for case in dataset.cases] == [2, 2]
    assert dataset.label_names == ("background", "organ")


@pytest.mark.parametrize("labels", ["labels", "masks"])
def test_folders(tmp_path: Path, labels: str) -> None:
    volumes(tmp_path / "images", ["a", "b"])
    volumes(tmp_path / labels, ["a", "b"], (1, 4))
    dataset = read_dataset(tmp_path)
    assert labels in dataset.layout
    assert dataset.label_values == (0, 1, 4)
    assert "4 -> 2" in " ".join(dataset.notes)


def test_two_folders_of_images_or_of_labels_are_refused_by_name(tmp_path: Path) -> None:
    for folder, values in (("images", ()), ("masks", (1,)), ("imagesTr", ())):
        volumes(tmp_path / folder, ["a", "b"], values)
    (tmp_path / "labels").mkdir()  # holds nothing
    with pytest.raises(UserError, match=r"images and .*imagesTr all hold images, and only one"):
        read_dataset(tmp_path)
    shutil.rmtree(tmp_path / "imagesTr")
    (tmp_path / "imagesTr").symlink_to("images")  # the same under another name
    assert "masks/" in read_dataset(tmp_path).layout
    volumes(tmp_path / "labels", ["a"], (1,))
    with pytest.raises(UserError, match=r"labels and .*masks all hold images"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_list_is_read_in_the_encoding_that_it_has(tmp_path: Path, encoding: str) -> None:
    volumes(tmp_path, ["Größe", "b"])
    volumes(tmp_path / "labels", ["Größe", "b"], (1,))
    rows = ["image,label,patient", *(f"{n}.nii.gz,labels/{n}.nii.gz,Müller" for n in ("Größe", "b"))]
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding=encoding)
    cases = read_dataset(tmp_path / "list.csv").cases
    assert [(case.id, case.group) for case in cases] == [("Größe", "Müller"), ("b", "Müller")]


@pytest.mark.parametrize("content", [b"image,label\0\n", b"\xff\xfea", b"image,\x81\xff"])
def test_a_list_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"list.csv is no text in UTF-8.* Save the table as CSV in UTF-8"):
        read_dataset(tmp_path / "list.csv")


def test_one_folder_for_all_and_a_folder_a_case(shared_data: Path, tmp_path: Path) -> None:
    volumes(tmp_path / "flat", ["a_image", "b_image"])
    volumes(tmp_path / "flat", ["a_label", "b_seg"], (1,))
    dataset = read_dataset(tmp_path / "flat")
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert [case.label.name for case in dataset.cases if case.label] == ["a_label.nii.gz", "b_seg.nii.gz"]
    for name in "xy":
        volumes(tmp_path / "nested" / name, ["image_0000", "image_0001"])
        volumes(tmp_path / "nested" / name, ["mask"], (1,))
    dataset = read_dataset(tmp_path / "nested")
    assert [(case.id, len(case.images)) for case in dataset.cases] == [("x", 2), ("y", 2)]
    real = read_dataset(shared_data / "volumes_misc")
    assert len(real.cases) == 7
    assert "one folder per case" in real.layout
    (tmp_path / "nested" / "x" / "mask.nii.gz").unlink()
    with pytest.raises(UserError, match="x has 0 label maps"):
        read_dataset(tmp_path / "nested")


def test_a_channel_that_a_case_lacks_is_named(tmp_path: Path) -> None:
    volumes(tmp_path / "imagesTr", ["a_0000", "a_0001", "b_0000"])
    volumes(tmp_path / "labelsTr", ["a", "b"], (1,))
    described = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "organ": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="'b' .* lacks the channel FLAIR ._0001"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("c", "said"),
    [
        (["c_0000"], "'c' .* lacks the channel (FLAIR .)?_0001"),
        (
            ["c_0000", "c_0001", "c_0002"],
            "'c' .* has a channel _0002 too many: (dataset.json names T1, FLAIR|most have 2)",
        ),
    ],
)
def test_the_case_whose_channels_are_others_is_named_and_no_other(
    tmp_path: Path, c: list[str], said: str, named: bool
) -> None:
    volumes(tmp_path / "imagesTr", ["a_0000", "a_0001", "b_0000", "b_0001", *c])
    volumes(tmp_path / "labelsTr", ["a", "b", "c"], (1,))
    if named:
        described = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "organ": 1}}
        (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=said):
        read_dataset(tmp_path)
    told: list[str] = []
    list_dataset(tmp_path, problem=lambda kind, case, why: told.append(case))
    assert set(told) == {"c"}


def test_a_gap_in_the_channels_of_a_case_folder_is_named(tmp_path: Path) -> None:
    for case, numbers in {"a": (0, 1), "b": (0, 1), "c": (0, 2)}.items():
        volumes(tmp_path / case, [f"image_{number:04d}" for number in numbers])
        volumes(tmp_path / case, ["label"], (1,))
    with pytest.raises(UserError, match="'c' .* lacks the channel _0001"):
        read_dataset(tmp_path)


def case_folders(root: Path, channels: list[str], ending: str = "{}", label: str = "seg") -> Path:
    """Three cases, each in a folder, with a file for each channel and a label map, named by `ending`."""
    for case in ("pat_1", "pat_2", "pat_3"):
        volumes(root / case, [ending.format(channel, case=case) for channel in channels])
        volumes(root / case, [ending.format(label, case=case)], (1,))
    return root


@pytest.mark.parametrize("ending", ["{case}-{}", "{case}_v2_{}", "{}"])
@pytest.mark.parametrize(
    ("channels", "label"),
    [(["t1c", "t1n", "t2f", "t2w"], "seg"), (["T1", "gd_T1"], "mask"), (["imaging"], "segmentation")],
)
def test_a_folder_a_case_with_a_file_a_channel(
    tmp_path: Path, channels: list[str], label: str, ending: str
) -> None:
    """As BraTS and KiTS have them; the same names are found again in what is to be predicted."""
    root = case_folders(tmp_path / "data", channels, ending, label)
    dataset = read_dataset(root)
    assert dataset.channel_names == tuple(sorted(name.lower() for name in channels))
    files = [ending.format(name, case="pat_1") for name in sorted(channels, key=str.lower)]
    assert [stem_of(image) for image in dataset.cases[0].images] == files
    assert [case.label.parent.name for case in dataset.cases if case.label] == ["pat_1", "pat_2", "pat_3"]
    assert not is_classes(root)
    assert labels_in_case_folders(root) == {case.id: case.label for case in dataset.cases}
    names = dataset.channel_names
    wanted = {case.id: case.images for case in dataset.cases}
    assert {case.id: case.images for case in find_images(root, channels=len(names), names=names)} == wanted
    if len(names) > 1:
        (one,) = find_images(root / "pat_1", channels=len(names), names=names)
        assert one.images == wanted["pat_1"]
    if ending != "{}" and len(names) > 1:  # all cases in one folder
        for folder in sorted(root.iterdir()):
            for file in folder.iterdir():
                shutil.copy(file, tmp_path / file.name)
        flat = find_images(tmp_path, channels=len(names), names=names)
        assert [[image.name for image in case.images] for case in flat] == [
            [image.name for image in images] for images in wanted.values()
        ]


def test_channels_that_a_case_folder_lacks_or_has_too_many_are_named(tmp_path: Path) -> None:
    root = case_folders(tmp_path, ["flair", "t1"])
    (root / "pat_2" / "t1.nii.gz").unlink()
    with pytest.raises(UserError, match="pat_2 lacks the channel t1, which most cases have"):
        read_dataset(root)
    assert [(f.kind, f.case) for f in diagnose(root).findings][:1] == [("missing channel", "pat_2")]
    (case,) = (case for case in find_images(root, channels=2, names=["FLAIR", "T1"]) if case.id == "pat_2")
    assert [path.name for path in case.images] == ["flair.nii.gz"]  # and fails by itself
    volumes(root / "pat_2", ["t1", "t2"])
    with pytest.raises(UserError, match=r"pat_2 has t2.nii.gz beside the channels of most cases .flair, t1."):
        read_dataset(root)
    (root / "pat_2" / "t2.nii.gz").unlink()
    (root / "pat_3" / "seg.nii.gz").unlink()
    with pytest.raises(UserError, match="pat_3 has 0 label maps"):
        read_dataset(root)


def test_the_only_image_of_a_case_folder_may_have_any_name(tmp_path: Path) -> None:
    for case in "abc":
        volumes(tmp_path / case, [f"scan of {case}"])
        volumes(tmp_path / case, ["seg"], (1,))
    dataset = read_dataset(tmp_path)
    assert [(case.id, len(case.images)) for case in dataset.cases] == [("a", 1), ("b", 1), ("c", 1)]
    assert dataset.channel_names == ("image",)
    assert [c.images for c in find_images(tmp_path, names=["image"])] == [c.images for c in dataset.cases]


def test_csv_with_groups_and_datalist(tmp_path: Path) -> None:
    volumes(tmp_path / "scans", ["a", "b", "c"])
    volumes(tmp_path / "truth", ["a", "b"], (1,))
    rows = "image,label,patient\nscans/a.nii.gz,truth/a.nii.gz,x\nscans/b.nii.gz,truth/b.nii.gz,x\nscans/c.nii.gz,,y\n"
    (tmp_path / "list.csv").write_text(rows)
    dataset = read_dataset(tmp_path / "list.csv")
    assert [case.group for case in dataset.cases] == ["x", "x"]
    assert [case.id for case in dataset.test_cases] == ["c"]
    entries = [{"image": f"scans/{n}.nii.gz", "label": f"truth/{n}.nii.gz"} for n in "ab"]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    assert len(read_dataset(tmp_path / "list.json").cases) == 2


def listed(root: Path, entries: list, **lists: list) -> Path:
    volumes(root / "scans", list("abcd"))
    volumes(root / "truth", list("abcd"), (1,))
    paths = {n: {"image": f"scans/{n}.nii.gz", "label": f"truth/{n}.nii.gz"} for n in "abcd"}
    content = {"training": entries, **lists}
    content = {name: [paths[n] | rest for n, rest in some] for name, some in content.items()}
    (root / "list.json").write_text(json.dumps(content))
    return root / "list.json"


@pytest.mark.parametrize("name", ["../out", "a/b", ".a", "a\\b"])
def test_ids_of_a_list_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Label maps are called by them."""
    (tmp_path / "list.csv").write_text(f"id,image,label\n{name},x.nii.gz,y.nii.gz\n")
    with pytest.raises(UserError, match="cannot be the name of a file"):
        read_dataset(tmp_path / "list.csv")


def test_the_folds_of_a_datalist_are_used(tmp_path: Path) -> None:
    dataset = read_dataset(listed(tmp_path, [(n, {"fold": i % 2}) for i, n in enumerate("abcd")]))
    folds = [{"train": ["b", "d"], "val": ["a", "c"]}, {"train": ["a", "c"], "val": ["b", "d"]}]
    assert split(dataset, folds=5) == folds
    assert "2 folds" in dataset.notes[-1]


def test_the_validation_list_of_a_datalist_is_its_fold(tmp_path: Path) -> None:
    dataset = read_dataset(listed(tmp_path, [("a", {}), ("c", {})], validation=[("b", {}), ("d", {})]))
    assert split(dataset) == [{"train": ["a", "c"], "val": ["b", "d"]}]


def test_folds_of_a_list_that_share_a_patient_are_refused(tmp_path: Path) -> None:
    shared = [(n, {"fold": i % 2, "patient": "p" if n in "ab" else n}) for i, n in enumerate("abcd")]
    dataset = read_dataset(listed(tmp_path, shared))
    with pytest.raises(UserError, match="belong to one patient"):
        split(dataset)
    with pytest.raises(UserError, match="belong to one patient"):
        check_wishes(dataset)  # when it is planned, before an image is read


@pytest.mark.parametrize("names", [(1, 2, 9, 10), ("1", "2", "9.0", " 10"), (1.0, 2, 9, 10)])
def test_folds_of_a_list_are_numbers_of_any_kind_in_their_order(tmp_path: Path, names: tuple) -> None:
    dataset = read_dataset(listed(tmp_path, [(n, {"fold": f}) for n, f in zip("dcba", names, strict=True)]))
    assert [fold["val"] for fold in split(dataset)] == [["d"], ["c"], ["b"], ["a"]]


@pytest.mark.parametrize("names", [(0, 0, 0, 0), ("train", "train", "val", "val"), (0, 1, None, 1)])
def test_folds_of_a_list_that_are_none_are_left_aside_aloud(tmp_path: Path, names: tuple) -> None:
    dataset = read_dataset(listed(tmp_path, [(n, {"fold": f}) for n, f in zip("abcd", names, strict=True)]))
    assert not dataset.splits
    assert "left aside" in dataset.notes[-1]


def test_a_copy_keeps_the_folds_of_a_list(tmp_path: Path) -> None:
    file = listed(tmp_path, [(n, {"fold": i % 2}) for i, n in enumerate("abcd")])
    for to in ("msd", "nnunet"):
        convert(read_dataset(file), tmp_path / to, to)
        assert split(read_dataset(tmp_path / to)) == split(read_dataset(file))


FOLDS = [{"fold": i % 2} for i in range(3)]
SPLITS_OF_LISTS = {  # entries of a, b, c; those of the list validation; folds that come of it, and what is said once
    "folds of all": (FOLDS, [("d", {"fold": 2})], [["a", "c"], ["b"], ["d"]], "3 folds, those of the list"),
    "validation is no fold": (FOLDS, [("d", {"fold": 1})], [["a", "c"], ["b", "d"]], "parted as they say"),
    "folds of some": (
        FOLDS,
        [("d", {})],
        [["d"]],
        "one fold, which validates on the 1 .* its folds are left aside",
    ),
    "one number for all": ([{"fold": 0}] * 3, [], [], "the list's folds are left aside"),
    "validation alone": ([{}] * 3, [("d", {})], [["d"]], "one fold, which validates on the 1"),
    "nothing": ([{}] * 3, [], [], None),
}


@pytest.mark.parametrize("name", SPLITS_OF_LISTS)
@pytest.mark.parametrize("described", [False, True])
def test_one_note_says_what_the_splits_of_a_list_are(tmp_path: Path, name: str, described: bool) -> None:
    entries, validation, folds, said = SPLITS_OF_LISTS[name]
    file = listed(tmp_path, list(zip("abc", entries, strict=True)), validation=validation)
    if described:  # the same lists in a dataset.json
        content = json.loads(file.read_text()) | {"labels": {"background": 0, "organ": 1}}
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        file = tmp_path
    dataset = read_dataset(file)
    assert [fold["val"] for fold in dataset.splits] == folds
    for fold in dataset.splits:
        assert sorted([*fold["train"], *fold["val"]]) == [case.id for case in dataset.cases]
    notes = [note for note in dataset.notes if "fold" in note or "valid" in note]
    assert len(notes) == (said is not None)
    assert not notes or re.search(said, notes[0])  # type: ignore[arg-type]


def test_what_a_list_holds_and_is_not_trained_on_is_told(tmp_path: Path) -> None:
    file = listed(tmp_path, [("a", {}), ("b", {"label": ""})], test=[("c", {})], testing=[("d", {})])
    content = json.loads(file.read_text())
    content["val"] = content["test"]
    absolute = [{**entry, "image": str(tmp_path / entry["image"])} for entry in content["testing"]]
    file.write_text(json.dumps({**content, "testing": absolute}))
    dataset = read_dataset(file)
    assert [case.id for case in dataset.test_cases] == ["c", "d", "b"]
    assert all(path.is_file() for case in dataset.test_cases for path in case.images)
    assert [note.partition(":")[0] for note in dataset.notes] == [
        "the lists val are not read; known are training, validation, test, testing",
        "1 images of the list have no label and are not trained on",
    ]


def test_images_to_validate_on_without_labels_are_test_images(tmp_path: Path) -> None:
    file = listed(tmp_path, [(n, {}) for n in "abc"], validation=[("d", {"label": ""})])
    described = {"labels": {"background": 0, "organ": 1}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(json.loads(file.read_text()) | described))
    for path in (file, tmp_path):
        dataset = read_dataset(path)
        assert [case.id for case in dataset.cases] == ["a", "b", "c"]
        assert [case.id for case in dataset.test_cases] == ["d"]
        assert not dataset.splits
        assert dataset.notes == ("1 images of the list have no label and are not trained on: d",)
    with pytest.raises(UserError, match="several cases called 'a'. One image is listed twice"):
        read_dataset(listed(tmp_path, [("a", {}), ("b", {})], validation=[("a", {})]))


def test_a_column_that_names_no_images_is_no_channel(tmp_path: Path) -> None:
    listed(tmp_path, [])
    rows = [f"scans/{n}.nii.gz,truth/{n}.nii.gz,512,scans/d.nii.gz\n" for n in "ab"]
    lines = ["image,label,Image_Width,image_t2\n", *rows]
    (tmp_path / "list.csv").write_text("".join(lines))
    (tmp_path / "tabs.tsv").write_text("".join(lines).replace(",", "\t"))
    dataset = read_dataset(tmp_path / "list.csv")
    assert dataset.cases == read_dataset(tmp_path / "tabs.tsv").cases
    names = [[path.name for path in case.images] for case in dataset.cases]
    assert names == [["a.nii.gz", "d.nii.gz"], ["b.nii.gz", "d.nii.gz"]]
    assert dataset.notes == ("the columns Image_Width name no images and are not read",)


@pytest.mark.parametrize("pattern", [None, r"^(.)"])
def test_patients_of_test_images_are_known(tmp_path: Path, pattern: str | None) -> None:
    volumes(tmp_path / "images", ["a1", "b1"])
    volumes(tmp_path / "labels", ["a1", "b1"], (1,))
    volumes(tmp_path / "imagesTs", ["a2", "c2"])
    if pattern is None:
        (tmp_path / "cases.csv").write_text("id,patient\na1,a\nb1,b\na2,a\nc2,c\n")
    dataset = read_dataset(tmp_path, id_pattern=pattern)
    assert [case.group for case in dataset.test_cases] == ["a", "c"]
    assert dataset.notes[-1] == "patients who have images to train on and test images: a"


def test_a_table_says_parts_and_folds_however_its_columns_are_spelt(tmp_path: Path) -> None:
    listed(tmp_path, [])
    rows = [f"scans/{n}.nii.gz,truth/{n}.nii.gz" for n in "abcd"]

    def read(heading: str, *cells: str) -> Dataset:
        lines = [f"{row},{cell}\n" for row, cell in zip(rows, cells, strict=True)]
        (tmp_path / "list.csv").write_text("".join([f"{heading}\n", *lines]))
        return read_dataset(tmp_path / "list.csv")

    parted = read("Image,LABEL,Split", "Train", "", "Validation", "test")
    assert [case.id for case in parted.test_cases] == ["d"]
    assert split(parted) == [{"train": ["a", "b"], "val": ["c"]}]
    folds = read("image,label,split,Fold", ",0", ",1", ",0", "test,")
    assert [fold["val"] for fold in split(folds)] == [["a", "c"], ["b"]]
    with pytest.raises(UserError, match="split '1' is none of train, val, test"):
        read("image,label,split", "1", "2", "3", "3")


def test_a_row_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    listed(tmp_path, [])
    row = "scans/a.nii.gz,truth/a.nii.gz"
    (tmp_path / "list.csv").write_text(f"image,label,patient\n{row},Doe, John\n")
    with pytest.raises(UserError, match=r"has 4 cells in line 2, and 3 columns. Put quotes"):
        read_dataset(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text(f'image,label,patient\n{row},"Doe, John",,\n,,\n')
    assert [case.group for case in read_dataset(tmp_path / "list.csv").cases] == ["Doe, John"]
    (tmp_path / "list.csv").write_text(f"image,image,label\nscans/b.nii.gz,{row}\n")
    with pytest.raises(UserError, match="several columns called 'image'"):
        read_dataset(tmp_path / "list.csv")


def test_a_case_of_two_patients_is_refused(blobs: Path, tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["a", "b"])
    volumes(tmp_path / "labels", ["a", "b"], (1,))
    (tmp_path / "cases.csv").write_text("id,patient\na,x\na.nii.gz,y\nb,y\n")
    with pytest.raises(UserError, match="the case 'a' several patients, 'x' and 'y'"):
        read_dataset(tmp_path)
    assert [f.case for f in diagnose(tmp_path).errors if f.kind == "patients"] == ["a"]
    (tmp_path / "cases.csv").write_text("id,patient\na,x\nb,x\na,\na,x\n")
    assert [case.group for case in read_dataset(tmp_path).cases] == ["x", "x"]
    shutil.copytree(blobs, tmp_path / "set")
    described = json.loads((tmp_path / "set" / "dataset.json").read_text())
    described["subjects"] = {"p": ["case_0", "case_1"], "q": ["case_1"]}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="the case 'case_1' several patients, 'p' and 'q'"):
        read_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    "names", [("Pat-007", "pat007"), ("7", "007"), ("Doe John", "doe_john"), ("é", "e\u0301")]
)
def test_names_that_are_nearly_one_patient_are_told_and_not_joined(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    file = listed(tmp_path, [(n, {"patient": p}) for n, p in zip("abcd", [*names, "7_1", "71"], strict=True)])
    dataset = read_dataset(file)
    assert len({case.group for case in dataset.cases}) == 4
    (note,) = dataset.notes
    assert all(f"'{name}'" in note for name in names)
    assert "71" not in note
    assert "patients alike" in {finding.kind for finding in diagnose(file).findings}


def test_a_patient_called_0_is_one_and_may_not_be_in_the_test_without_a_word(tmp_path: Path) -> None:
    file = listed(tmp_path, [("a", {"patient": 0}), ("b", {"patient": 0})], testing=[("c", {"patient": 0})])
    dataset = read_dataset(file)
    assert [case.group for case in dataset.cases] == ["0", "0"]
    assert dataset.notes == ("patients who have images to train on and test images: 0",)
    assert "patients in the test" in {finding.kind for finding in diagnose(file).findings}


def test_columns_of_a_table_of_patients_that_are_not_read_are_named(tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["a", "b"])
    volumes(tmp_path / "labels", ["a", "b"], (1,))
    (tmp_path / "cases.csv").write_text("id,patient,Fold,split\na,x,0,train\nb,y,1,test\n")
    assert any("Fold and split of cases.csv are not read" in note for note in read_dataset(tmp_path).notes)
    assert any("cases.csv is not used" in n for n in read_dataset(tmp_path, id_pattern="(.)").notes)


def test_pictures_with_0_and_255(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        Picture.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Picture.fromarray(np.array([[0, 255]] * 4, np.uint8).repeat(5, 1)[:, :9]).save(
            tmp_path / "masks" / f"{name}_mask.png"
        )
    dataset = read_dataset(tmp_path)
    assert dataset.spatial_dims == 2
    assert dataset.channel_names == ("red", "green", "blue")
    assert dataset.label_values == (0, 255)


@pytest.mark.parametrize(
    ("table", "patients"),
    [
        ("id,patient\na,x\nb,x\nc,y\n", "xxy"),
        ("id;Patient ID\na;x\nb;x\nc;y\n", "xxy"),
        ("file\tsubject_id\na.nii.gz\tx\nb.nii.gz\tx\nc.nii.gz\ty\n", "xxy"),
        ("image,PatientID\na,x\nb,x\n", "xxc"),
        ("id,group,patient\na,,x\nb,,x\nc,,y\n", "xxy"),
        ("id,Group,patient\na,control,x\nb,sick,x\nc,sick,y\n", "xxy"),
        ("id, patient\na,x\nb ,x \nc,y\n", "xxy"),
    ],
)
@pytest.mark.parametrize("layout", ["folders", "nnunet", "msd"])
def test_a_table_of_patients_counts_in_every_layout(
    tmp_path: Path, layout: str, table: str, patients: str
) -> None:
    names = {"folders": ("images", "labels")}.get(layout, ("imagesTr", "labelsTr"))
    volumes(tmp_path / names[0], [f"{n}_0000" if layout == "nnunet" else n for n in "abc"])
    volumes(tmp_path / names[1], list("abc"), (1,))
    described: dict[str, Any] = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "MRI"}}
    if layout == "msd":
        described["training"] = [
            {"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abc"
        ]
    if layout != "folders":
        (tmp_path / "dataset.json").write_text(json.dumps(described))
    (tmp_path / "cases.csv").write_text(table)
    dataset = read_dataset(tmp_path)
    assert [case.group for case in dataset.cases] == list(patients)
    (note,) = (note for note in dataset.notes if "cases.csv" in note)
    assert f"{len(set(patients[: table.count(chr(10)) - 1]))} patients" in note
    assert ("it lacks 1 cases" in note) == (patients == "xxc")


def test_a_table_of_patients_that_fits_no_case_is_refused_and_one_without_them_named(tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["000", "001"])
    volumes(tmp_path / "labels", ["000", "001"], (1,))
    (tmp_path / "cases.csv").write_text("id,patient\n0,x\n1,x\n")
    with pytest.raises(UserError, match=r"names the patient of 0, 1, but the cases are called 000, 001"):
        read_dataset(tmp_path)
    assert "patients" in {finding.kind for finding in diagnose(tmp_path).findings}
    assert [case.group for case in read_dataset(tmp_path, id_pattern="(..)").cases] == ["00", "00"]
    (tmp_path / "cases.csv").write_text("id,scanner\n000,x\n")
    assert any("cases.csv is not used" in note for note in read_dataset(tmp_path).notes)
    assert "patients in part" in {finding.kind for finding in diagnose(tmp_path).findings}


def test_channels_of_a_list_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["image", *(f"image_{n}" for n in range(2, 12))]
    volumes(tmp_path, names)
    volumes(tmp_path / "truth", ["a"], (1,))
    row = ",".join(f"{name}.nii.gz" for name in names)
    (tmp_path / "list.csv").write_text(f"{','.join(names)},label\n{row},truth/a.nii.gz\n")
    (case,) = read_dataset(tmp_path / "list.csv").cases
    assert [path.name.partition(".")[0] for path in case.images] == names


def test_channels_of_a_list_may_have_names(tmp_path: Path) -> None:
    volumes(tmp_path, ["t1", "flair"])
    volumes(tmp_path / "truth", ["a"], (1,))
    (tmp_path / "list.csv").write_text("image,image_FLAIR,label\nt1.nii.gz,flair.nii.gz,truth/a.nii.gz\n")
    (case,) = read_dataset(tmp_path / "list.csv").cases
    assert [path.name for path in case.images] == ["t1.nii.gz", "flair.nii.gz"]


def test_frames_of_videos_are_images_of_their_own(tmp_path: Path) -> None:
    volumes(tmp_path, ["a_0000", "b_0000", "b_0001"])
    assert [case.id for case in find_images(tmp_path, channels=1)] == ["a_0000", "b_0000", "b_0001"]


def test_an_image_that_lacks_a_channel_does_not_stop_the_others(tmp_path: Path) -> None:
    volumes(tmp_path, ["a_0000", "a_0001", "b_0001", "c_0000", "odd", "a"])
    cases = {case.id: [path.name for path in case.images] for case in find_images(tmp_path, channels=2)}
    assert cases == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "a_nii_gz": ["a.nii.gz"],
        "b": ["b_0001.nii.gz"],
        "c": ["c_0000.nii.gz"],
        "odd": ["odd.nii.gz"],
    }


def test_a_region_is_painted_by_a_value_of_its_own() -> None:
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    assert regions_of(regions, [1, 2], "here")["label_values"] == (0, 1, 2)
    with pytest.raises(UserError, match=r"region 'whole' of the values \[1, 2\] cannot be painted as 5"):
        regions_of(regions, [5, 6], "here")


def test_whole_numbers_in_floats_are_labels(tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["a"])
    volumes(tmp_path / "labels", ["a"], (1, 2), np.float32)
    assert read_dataset(tmp_path).label_values == (0, 1, 2)


def test_id_pattern_gives_the_patient(blobs: Path) -> None:
    dataset = read_dataset(blobs, id_pattern=r"case_(\d)")
    assert [case.group for case in dataset.cases] == list("012345")
    for pattern in (r"patient(\d)", r"(\d*)"):  # without a match, and with an empty one
        with pytest.raises(UserError, match="finds no patient in the case"):
            read_dataset(blobs, id_pattern=pattern)


def test_images_to_predict(blobs: Path, tmp_path: Path) -> None:
    assert [case.id for case in find_images(blobs / "imagesTr" / "case_1.nii.gz")] == ["case_1"]
    assert len(find_images(blobs / "imagesTr")) == 6
    volumes(tmp_path, ["a_0000", "a_0001"])
    assert [len(case.images) for case in find_images(tmp_path)] == [2]


def test_dicom_folders_are_found(shared_data: Path) -> None:
    assert [case.id for case in find_images(shared_data / "dicom" / "mr_hippocrop_1")] == ["mr_hippocrop_1"]
    found = [case.id for case in find_images(shared_data / "dicom")]
    assert {"mr_hippocrop_2", "ct_chaos_set3_series"} <= set(found)


def test_numbered_frames_are_no_channels(tmp_path: Path) -> None:
    names = [f"film_{i:04d}" for i in range(3)]
    volumes(tmp_path / "images", names)
    volumes(tmp_path / "labels", names, (1,))
    assert [case.id for case in read_dataset(tmp_path).cases] == names
    assert [case.id for case in find_images(tmp_path / "images", channels=1)] == names
    assert [case.id for case in find_images(tmp_path / "images", channels=3)] == ["film"]


def test_a_missing_channel_is_named(tmp_path: Path) -> None:
    volumes(tmp_path, ["a_0000", "a_0002", "b_0000", "b_0001"])
    with pytest.raises(UserError, match=r"'a' in .* has the channels \[0, 2\]"):
        find_images(tmp_path)


def test_names_that_end_in_numbers_are_cases_of_their_own(tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["a", "a_1"])
    volumes(tmp_path / "labels", ["a", "a_1", "c"], (1,))
    dataset = read_dataset(tmp_path)
    assert [case.label.name for case in dataset.cases if case.label] == ["a.nii.gz", "a_1.nii.gz"]
    assert "1 labels have no image and are not used: c" in dataset.notes


def damaged(blobs: Path, root: Path) -> Path:
    shutil.copytree(blobs, root)
    return root


def test_a_missing_label_is_named(blobs: Path, tmp_path: Path) -> None:
    root = damaged(blobs, tmp_path / "set")
    (root / "labelsTr" / "case_3.nii.gz").unlink()
    with pytest.raises(UserError, match="case_3' .* needs .*labelsTr/case_3.nii.gz, which is not there"):
        read_dataset(root)
    (root / "dataset.json").unlink()
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    with pytest.raises(UserError, match=r"1 of 6 images have no label .* case_3"):
        read_dataset(root)


def test_values_outside_the_declared_set_are_named(blobs: Path, tmp_path: Path) -> None:
    root = damaged(blobs, tmp_path / "set")
    described = json.loads((root / "dataset.json").read_text())
    described["labels"] = {"0": "background", "1": "near"}
    (root / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"has the values \[2\], which dataset.json does not declare"):
        read_dataset(root)


def test_two_masks_for_one_picture_are_refused(shared_data: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for path in (shared_data / "bad_inputs" / "png").glob("benign (54)*"):
        shutil.copy(path, tmp_path / ("masks" if "mask" in path.name else "images"))
    with pytest.raises(UserError, match="has 2 masks .* Merge them"):
        read_dataset(tmp_path)


def test_two_files_of_one_name_are_told_apart_by_nobody(tmp_path: Path) -> None:
    for name in ("folders", "cases"):
        places = {"folders": ("images/a", "labels/a"), "cases": ("a/image", "a/label")}[name]
        for place, values in zip(places, ((), (1,)), strict=True):
            file = tmp_path / name / place
            volumes(file.parent, [file.name], values)
    for file, kind in (("folders/labels/a", "several masks"), ("cases/a/label", "several masks"),
                       ("cases/a/image", "same name")):  # fmt: skip
        other = tmp_path / f"{file}.nii"
        nib.save(nib.load(tmp_path / f"{file}.nii.gz"), other)
        root = tmp_path / file.partition("/")[0]
        with pytest.raises(UserError):
            read_dataset(root)
        assert kind in {finding.kind for finding in diagnose(root).errors}
        other.unlink()
        assert read_dataset(root).cases


def test_empty_masks_alone_teach_nothing(shared_data: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for path in (shared_data / "bad_inputs" / "png").glob("normal*"):
        shutil.copy(path, tmp_path / ("masks" if "mask" in path.name else "images"))
    with pytest.raises(UserError, match="background alone"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("content", [{}, {"a.txt": "x"}])
def test_an_unknown_folder_is_told_what_is_known(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"no layout that kanseg knows. Expected: .*dataset.json"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match="holds no images"):
        find_images(tmp_path)


def test_regions_of_values_that_no_label_has_are_refused(blobs: Path) -> None:
    assert read_dataset(blobs, regions={"both": [1, 2], "far": [2]}).regions[1:] == ((1, 2), (2,))
    with pytest.raises(UserError, match=r"regions name \[9\], values that no label"):
        read_dataset(blobs, regions={"both": [1, 2], "far": [9]})


def test_broken_lists_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no"):
        read_dataset(tmp_path / "nothing")
    (tmp_path / "list.csv").write_text("scan,mask\n1,2\n")
    with pytest.raises(UserError, match="needs the columns image and label"):
        read_dataset(tmp_path / "list.csv")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="dataset.json cannot be read as JSON .* Repair it"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["background", "near"]}, "lacks 'labels'"),
        ({"labels": {}}, "lacks 'labels'"),
        ({"labels": {"background": 0, "near": "one"}}, "'near' has the value 'one'"),
        ({"labels": {"0": "background", "-1": "near"}}, "whole number from 0"),
        ({"labels": {"0": "background", "1": "near", "2": "near"}}, "of its own"),
        ({"labels": {"background": 0, "both": [1, "x"]}}, "list of whole numbers"),
        ({"labels": {"background": 0, "near": 1, "both": [1, 2], "far": 2}}, "'near' would be painted over"),
        (
            {"labels": {"background": 0, "both": [1, 2], "far": 2}, "regions_class_order": [1]},
            "one value of its own for each",
        ),
        ({"modality": "MRI"}, "the channels are 'MRI'"),
        ({"modality": {"1": "MRI"}}, "a name for each number from 0"),
        ({"subjects": ["case_0"]}, "'subjects' must name the cases"),
        ({"training": {"image": "a"}}, "'training' must be a list"),
        ({"training": [{"image": [], "label": "a"}]}, "needs a path"),
        ({"training": [{"image": "a", "label": ["b"]}]}, "needs a path"),
        ({"training": ["imagesTr/case_0.nii.gz"]}, "'case_0' .* has no label"),
        (
            {"training": [{"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}] * 2},
            "several cases",
        ),
    ],
)
def test_a_wrong_description_is_explained(
    blobs: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    root = damaged(blobs, tmp_path / "set")
    described = json.loads((root / "dataset.json").read_text()) | change
    (root / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=message):
        read_dataset(root)


def test_an_image_in_place_of_a_label_is_refused(tmp_path: Path) -> None:
    volumes(tmp_path / "images", ["a"])
    volumes(tmp_path / "labels", ["a"], tuple(range(-60, 60)), np.int16)
    with pytest.raises(UserError, match=r"is no label map: .* from -60 to 58"):
        read_dataset(tmp_path)


def test_jpeg_masks_are_refused(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask = (np.random.default_rng(0).random((32, 32)) > 0.5).astype(np.uint8) * 255
    Picture.fromarray(mask).save(tmp_path / "images" / "a.png")
    Picture.fromarray(mask).save(tmp_path / "masks" / "a.jpg", quality=50)
    with pytest.raises(UserError, match="because JPEG changes numbers"):
        read_dataset(tmp_path)


def masks(root: Path, images: str, labels: str, names: Sequence[str]) -> None:
    """Photographs of noise as JPEG, and masks of 0 and 1."""
    for folder in filter(None, (images, labels)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        noise = np.random.default_rng(len(name)).integers(0, 255, (12, 14, 3), np.uint8)
        Picture.fromarray(noise).save(root / images / f"{name}.jpg")
        if labels:
            label = np.pad(np.ones((4, 4), np.uint8), ((3, 5), (4, 6)))
            Picture.fromarray(label).save(root / labels / f"{name}.png")


def test_pascal_voc_has_labels_for_some_images_and_lists_for_validation(tmp_path: Path) -> None:
    masks(tmp_path, "JPEGImages", "", ["a", "b", "c", "d"])
    masks(tmp_path, "JPEGImages", "SegmentationClass", ["a", "b", "c"])
    masks(tmp_path, "JPEGImages", "SegmentationObject", ["a", "b", "c"])
    assert not is_classes(tmp_path)
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a", "b", "c"]
    assert not dataset.splits
    assert any("1 images have no label in SegmentationClass/" in note for note in dataset.notes)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\nd\n")
    assert read_dataset(tmp_path).splits == ({"train": ["a", "c"], "val": ["b"]},)


@pytest.mark.parametrize("nested", ["{part}/images {part}/masks", "images/{part} annotations/{part}"])
@pytest.mark.parametrize("train", ["train", "Training", "train2017"])
def test_parts_of_folders_are_the_parts_of_the_data(tmp_path: Path, nested: str, train: str) -> None:
    for part, names in ((train, "ab"), ("val", "c"), ("test", "d")):
        images, labels = nested.format(part=part).split()
        masks(tmp_path, images, "" if part == "test" else labels, list(names))
    assert not is_classes(tmp_path)
    dataset = read_dataset(tmp_path)
    assert dataset.splits == ({"train": ["a", "b"], "val": ["c"]},)
    assert [case.id for case in dataset.test_cases] == ["d"]
    images, labels = nested.format(part="val").split()
    masks(tmp_path, images, labels, ["a"])  # as another image is called
    dataset = read_dataset(tmp_path)
    assert dataset.splits == ({"train": ["train_a", "train_b"], "val": ["val_a", "val_c"]},)
    shutil.rmtree(tmp_path / labels)
    with pytest.raises(UserError, match="val.* has no labels beside it"):
        read_dataset(tmp_path)


def test_cityscapes_folders_are_read_with_their_parts(tmp_path: Path) -> None:
    """Of its files of labels those of classes; the numbers of other files are those of instances, or colours."""
    for part, city, names in (
        ("train", "ulm", "ab"),
        ("train", "bonn", "a"),
        ("val", "koeln", "a"),
        ("test", "bern", "a"),
    ):
        images, labels = tmp_path / "leftImg8bit" / part / city, tmp_path / "gtFine" / part / city
        masks(tmp_path, str(images), str(labels), names := [f"{city}_{name}" for name in names])
        for name in names:
            (images / f"{name}.jpg").rename(images / f"{name}_leftImg8bit.jpg")
            (labels / f"{name}.png").rename(labels / f"{name}_gtFine_labelIds.png")
            shutil.copy(images / f"{name}_leftImg8bit.jpg", labels / f"{name}_gtFine_color.jpg")
            (labels / f"{name}_gtFine_polygons.json").write_text("{}")
    assert not is_classes(tmp_path)
    dataset = read_dataset(tmp_path)
    assert dataset.splits == ({"train": ["bonn_a", "ulm_a", "ulm_b"], "val": ["koeln_a"]},)
    assert [case.id for case in dataset.test_cases] == ["bern_a"]
    assert dataset.label_values == (0, 1)
    assert not [note for note in dataset.notes if "not used" in note]


@pytest.mark.parametrize("top", ["", "train/"])
def test_images_and_labels_may_lie_in_the_same_folders(tmp_path: Path, top: str) -> None:
    for folder in ("p1", "p2", "more/p3"):
        masks(tmp_path, f"{top}images/{folder}", f"{top}labels/{folder}", ["a", "b"])
    assert not is_classes(tmp_path)
    dataset = read_dataset(tmp_path)
    ids = ["more_p3_a", "more_p3_b", "p1_a", "p1_b", "p2_a", "p2_b"]
    assert [case.id for case in dataset.cases] == ids
    for case in dataset.cases:
        assert case.label is not None
        assert case.images[0].relative_to(tmp_path / top / "images").with_suffix(
            ".png"
        ) == case.label.relative_to(tmp_path / top / "labels")
    (note,) = (note for note in dataset.notes if "lie in 3 folders, more, p1, p2" in note)
    patients = read_dataset(tmp_path, id_pattern=note.split("'")[1])
    assert [case.group for case in patients.cases] == [name.split("_")[0] for name in ids]
    assert {case.group for case in read_dataset(tmp_path, id_pattern=note.split("'")[1]).cases} == {
        "more",
        "p1",
        "p2",
    }
    (tmp_path / top / "labels" / "p1" / "b.png").unlink()
    assert ("missing label", "p1_b") in [(f.kind, f.case) for f in diagnose(tmp_path).errors]
    pictures = find_images(tmp_path / top / "images")
    assert [case.id for case in pictures] == ids
    (tmp_path / top / "images" / "p1" / "b.jpg").unlink()
    shutil.rmtree(tmp_path / top / "labels" / "p2")
    with pytest.raises(UserError, match="p2 has no labels beside it"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("labels", ["x{}", "{}"])
def test_a_folder_of_masks_is_no_class(tmp_path: Path, labels: str) -> None:
    """Two folders of pictures, one of images and one of their masks, must not become a classifier of those."""
    masks(tmp_path, "pics", "segs", ["a", "b"])
    for file in list((tmp_path / "segs").iterdir()):
        file.rename(file.with_stem(labels.format(file.stem)))
    assert not is_classes(tmp_path)
    with pytest.raises(UserError, match="pics/ looks like images and segs/ like their label maps: call them"):
        read_dataset(tmp_path)
    shutil.rmtree(tmp_path / "segs")
    masks(tmp_path, "dogs", "", ["a", "b"])
    assert is_classes(tmp_path)


def test_columns_of_a_list_may_be_called_filename_and_mask(tmp_path: Path) -> None:
    masks(tmp_path, "pics", "segs", ["a", "b"])
    for heading in ("filename,mask", "image_path,mask_path", "Image,Label"):
        (tmp_path / "list.csv").write_text(f"{heading}\npics/a.jpg,segs/a.png\npics/b.jpg,segs/b.png\n")
        assert not is_classes(tmp_path / "list.csv")
        dataset = read_dataset(tmp_path / "list.csv")
        assert [(len(case.images), case.id) for case in dataset.cases] == [(1, "a"), (1, "b")]
        assert dataset.label_values == (0, 1)


def test_capitals_in_the_names_of_folders_do_not_count(tmp_path: Path) -> None:
    masks(tmp_path, "Images", "Masks", ["a", "b"])
    assert not is_classes(tmp_path)
    assert len(read_dataset(tmp_path).cases) == 2


def test_colours_in_one_file_called_0000_are_the_image_of_that_name(tmp_path: Path) -> None:
    """nnU-Net's way to write natural images, for a model of three channels."""
    masks(tmp_path, "in", "", ["a_0000", "b_0000"])
    assert [case.id for case in find_images(tmp_path / "in", channels=3)] == ["a", "b"]
    masks(tmp_path, "in", "", ["b_0001"])  # frames of a video
    assert [case.id for case in find_images(tmp_path / "in", channels=3)] == ["a_0000", "b_0000", "b_0001"]
