"""DICOM in training data and scores: series as images, DICOM-SEG as labels and as predictions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_dicom_seg import write_series

from kanseg.data.cases import Dataset
from kanseg.data.convert import convert
from kanseg.data.doctor import diagnose
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.images import read_image, read_label, write_label
from kanseg.data.planner import make_plan
from kanseg.data.segmentations import read_segments, with_segments
from kanseg.errors import UserError
from kanseg.evaluation.folders import evaluate_folders
from kanseg.export.dicom_seg import write_segmentation

pytest.importorskip("highdicom", reason="the extra kanseg[dicom] is not installed")


@pytest.fixture
def series(blobs: Path, tmp_path: Path) -> list[Path]:
    """images/ with a DICOM series a case."""
    return [
        write_series(tmp_path / "data" / "images" / f"case_{i}", blobs / "imagesTr" / f"case_{i}.nii.gz")
        for i in range(2)
    ]


def segment(path: Path, labels: np.ndarray, series: Path, names: list[str]) -> Path:
    return write_segmentation(
        path, labels, read_image(series), values=range(len(names) + 1), names=["-", *names]
    )


def test_series_are_images_of_training(series: list[Path], blobs: Path) -> None:
    labels = series[0].parents[1] / "labels"
    labels.mkdir()
    for folder in series:
        shutil.copy(blobs / "labelsTr" / f"{folder.name}.nii.gz", labels)
    dataset = read_dataset(labels.parent)
    assert [(case.id, case.images, case.label) for case in dataset.cases] == [
        (folder.name, (folder,), labels / f"{folder.name}.nii.gz") for folder in series
    ]
    plan, usual = make_plan(dataset, memory=2**31), make_plan(read_dataset(blobs), memory=2**31)
    assert plan.label_values == usual.label_values
    np.testing.assert_allclose(plan.spacing, usual.spacing, rtol=1e-4)


@pytest.mark.parametrize("nested", [True, False])
def test_a_case_has_its_series_in_its_folder(
    nested: bool, series: list[Path], blobs: Path, tmp_path: Path
) -> None:
    for folder in series:
        case = tmp_path / "cases" / folder.name
        shutil.copytree(folder, case / "study" / "series" if nested else case)
        shutil.copy(blobs / "labelsTr" / f"{folder.name}.nii.gz", case / "label.nii.gz")
    dataset = read_dataset(tmp_path / "cases")
    assert [case.id for case in dataset.cases] == ["case_0", "case_1"]
    for case, folder in zip(dataset.cases, series, strict=True):
        np.testing.assert_array_equal(read_image(case.images).array, read_image(folder).array)


def test_two_series_of_a_case_are_refused(series: list[Path]) -> None:
    root = series[0].parents[1]
    (root / "labels").mkdir()
    for name in ("a", "b"):
        shutil.copytree(series[1], series[0] / name)
    with pytest.raises(
        UserError, match=r"case_0 has 3 folders with DICOM series \(., a, b\); one is expected"
    ):
        list_dataset(root)
    assert "several series" in {finding.kind for finding in diagnose(root).findings}


def test_two_series_beside_a_label_are_refused(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    case = tmp_path / "cases" / "p"
    for folder, name in zip(series, ("ct", "scout"), strict=True):
        shutil.copytree(folder, case / name)
    shutil.copy(blobs / "labelsTr" / "case_0.nii.gz", case / "label.nii.gz")
    with pytest.raises(UserError, match=r"p has 2 folders with DICOM series \(ct, scout\)"):
        list_dataset(case.parent)


def of_two(series: list[Path], numbers: np.ndarray) -> Dataset:
    """Two cases whose files number their segments differently, the second without one of them."""
    labels = series[0].parents[1] / "labels"
    first = np.where(numbers > 0, 1, 0)
    first[:2] = 2
    segment(labels / "case_0.dcm", first, series[0], ["spleen", "liver"])
    segment(labels / "case_1.dcm", np.where(numbers > 0, 1, 0), series[1], ["liver"])
    return list_dataset(labels.parent)


def test_segments_are_joined_by_their_names(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    numbers = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    dataset = with_segments(of_two(series, numbers))
    assert dataset.label_names == ("background", "liver", "spleen")
    convert(dataset, tmp_path / "out", "msd")
    written = read_dataset(tmp_path / "out")
    assert written.label_names == ("background", "liver", "spleen")
    expected = np.where(numbers > 0, 2, 0)
    expected[:2] = 1
    for case, label in zip(written.cases, (expected, np.where(numbers > 0, 1, 0)), strict=True):
        assert case.label is not None
        np.testing.assert_array_equal(read_label(case.label), label)
        image, original = read_image(case.images), read_image(series[0].parent / case.id)
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
        np.testing.assert_array_equal(image.array, original.array)


def test_verbs_that_need_label_maps_name_the_way(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    of_two(series, read_label(blobs / "labelsTr" / "case_0.nii.gz"))
    with pytest.raises(UserError, match="kanseg convert DATA -o OUT"):
        read_dataset(series[0].parents[1])
    found = diagnose(series[0].parents[1])
    (finding,) = found.findings
    assert finding.severity == "error"
    found.fix(tmp_path / "out")  # as kanseg run does
    repaired = read_dataset(tmp_path / "out")
    assert repaired.label_names == ("background", "liver", "spleen")
    assert [case.values for case in repaired.cases] == [(0, 1, 2), (0, 1)]


def test_a_segmentation_of_another_place_is_refused(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    numbers = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    path = segment(tmp_path / "a.dcm", numbers > 0, series[0], ["liver"])
    image = read_image(series[0])
    aside = image.affine @ np.array([[1, 0, 0, 0.4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    with pytest.raises(UserError, match=r"0.40 voxels beside those of the image"):
        read_segments(path, replace(image, affine=aside), ["liver"])
    far = image.affine.copy()
    far[:3, 3] += 1000 * image.affine[:3, :3].sum(axis=1)
    with pytest.raises(UserError, match="outside the image"):
        read_segments(path, replace(image, affine=far), ["liver"])
    with pytest.raises(UserError, match="has other voxels"):
        read_segments(path, replace(image, affine=image.affine @ np.diag([0.5, 1, 1, 1])), ["liver"])


def test_a_segmentation_of_another_scan_is_refused(shared_data: Path, tmp_path: Path) -> None:
    """Also where its voxels would fit."""
    first, second = (shared_data / "dicom" / name for name in ("mr_hippocrop_1", "mr_hippocrop_2"))
    labels = np.zeros(read_image(first).array.shape[1:], int)
    labels[5:9, 5:9, 5:9] = 1
    path = segment(tmp_path / "a.dcm", labels, first, ["hippocampus"])
    np.testing.assert_array_equal(read_segments(path, read_image(first), ["hippocampus"]), labels)
    with pytest.raises(UserError, match=r"drawn on another scan than .*mr_hippocrop_2"):
        read_segments(path, read_image(second), ["hippocampus"])


def test_names_of_segments_are_read_without_the_voxels(series: list[Path], blobs: Path) -> None:
    dataset = of_two(series, read_label(blobs / "labelsTr" / "case_0.nii.gz"))
    names = with_segments(dataset).label_names
    for case in dataset.cases:
        path = case.label
        assert path is not None
        path.write_bytes(path.read_bytes()[:-100])  # of the voxels, which stand at the end
    assert with_segments(dataset).label_names == names


def test_names_are_one_class_whatever_their_capitals(series: list[Path], blobs: Path) -> None:
    numbers = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    labels = series[0].parents[1] / "labels"
    segment(labels / "case_0.dcm", numbers > 0, series[0], ["Left  Kidney"])
    segment(labels / "case_1.dcm", numbers > 0, series[1], ["left kidney"])
    assert with_segments(list_dataset(labels.parent)).label_names == ("background", "Left Kidney")
    with pytest.raises(UserError, match="has a segment 'Left Kidney', which is none of spleen"):
        read_segments(labels / "case_0.dcm", read_image(series[0]), ["spleen"])


@pytest.mark.parametrize("name", ["background", "Ignore"])
def test_names_of_no_class_are_refused(name: str, series: list[Path], blobs: Path) -> None:
    numbers = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    labels = series[0].parents[1] / "labels"
    for folder in series:
        segment(labels / f"{folder.name}.dcm", numbers > 0, folder, [name])
    with pytest.raises(UserError, match=f"case_0.dcm has a segment called '{name}', which names no class"):
        with_segments(list_dataset(labels.parent))


def test_labels_of_another_grid_are_not_converted(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    """A flipped NIfTI beside a series, with an affine that says so."""
    labels = series[0].parents[1] / "labels"
    for folder in series:
        image = read_image(blobs / "labelsTr" / f"{folder.name}.nii.gz")
        flip = np.diag([1.0, -1, 1, 1])
        flip[1, 3] = image.array.shape[2] - 1
        flipped = replace(image, affine=image.affine @ flip, path=Path("flipped"))
        write_label(labels / f"{folder.name}.nii.gz", image.array[0, :, ::-1].astype(int), flipped)
    with pytest.raises(UserError, match="grid"):
        convert(read_dataset(labels.parent), tmp_path / "out", "msd")
    assert not (tmp_path / "out").exists()


def test_images_of_both_kinds_are_cases(series: list[Path], blobs: Path) -> None:
    labels = series[0].parents[1] / "labels"
    labels.mkdir()
    for number in range(3):
        shutil.copy(blobs / "labelsTr" / f"case_{number}.nii.gz", labels)
    shutil.copy(blobs / "imagesTr" / "case_2.nii.gz", series[0].parent)
    assert sorted(case.id for case in read_dataset(labels.parent).cases) == ["case_0", "case_1", "case_2"]


def test_labels_of_two_kinds_are_refused(series: list[Path], blobs: Path) -> None:
    dataset = of_two(series, read_label(blobs / "labelsTr" / "case_0.nii.gz"))
    mixed = replace(dataset.cases[1], label=blobs / "labelsTr" / "case_1.nii.gz")
    with pytest.raises(UserError, match=r"some are not \(case_1\)"):
        with_segments(replace(dataset, cases=(dataset.cases[0], mixed)))


def test_a_real_segmentation_is_the_label_map_beside_it(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "ct3_with_seg"
    image = read_image(folder / "ct")
    labels = read_segments(folder / "liver.dcm", image, ["Liver"])
    np.testing.assert_array_equal(labels > 0, read_label(folder / "liver_seg.nrrd") > 0)
    assert labels.any()


def test_segments_that_overlap_are_refused(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "ct3_with_seg"
    names = ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    with pytest.raises(UserError, match="'GREEN' and 'ORANGE' overlap in 3017 voxels"):
        read_segments(folder / "partial_overlaps.dcm", read_image(folder / "ct"), names)


def test_a_file_that_is_none_is_refused(series: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 200)
    with pytest.raises(UserError, match="is neither DICOM-SEG nor RTSTRUCT"):
        read_segments(tmp_path / "a.dcm", read_image(series[0]), ["liver"])
    with pytest.raises(UserError, match="There is no file"):
        read_segments(tmp_path / "b.dcm", read_image(series[0]), ["liver"])


def test_segmentations_score_like_the_label_maps_they_hold(
    series: list[Path], blobs: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "masks", tmp_path / "segmentations"
    ours.mkdir()
    truth = blobs / "labelsTr"
    for folder in series:
        image = read_image(truth / f"{folder.name}.nii.gz")
        guess = np.roll(image.array[0], 1, axis=0).astype(np.int32)
        guess[:2] = 2
        write_label(ours / f"{folder.name}.nii.gz", guess, image, "uint8")
        segment(theirs / f"{folder.name}.dcm", np.array([0, 2, 1])[guess], folder, ["lesion", "Organ"])
    labels = {"organ": 1, "lesion": 2}
    references = tmp_path / "references"
    references.mkdir()
    for folder in series:
        shutil.copy(truth / f"{folder.name}.nii.gz", references)
    scores = [evaluate_folders(masks, references, labels=labels) for masks in (ours, theirs)]
    assert scores[0]["failed"] == {}
    assert scores[0]["metrics"]["organ"]["dice"]["mean"] < 1
    assert scores[1] == scores[0]
    with pytest.raises(UserError, match="whose segments have names and no values"):
        evaluate_folders(theirs, references)
    (theirs / "case_1.dcm").unlink()
    assert evaluate_folders(theirs, references, labels=labels)["failed"] == {"case_1": "no prediction"}


def test_a_segment_that_is_no_class_is_a_failed_case(series: list[Path], blobs: Path, tmp_path: Path) -> None:
    numbers = read_label(blobs / "labelsTr" / "case_0.nii.gz")
    path = segment(tmp_path / "case_0.dcm", numbers > 0, series[0], ["kidney"])
    (why,) = evaluate_folders(path, blobs / "labelsTr" / "case_0.nii.gz", labels={"liver": 1})[
        "failed"
    ].values()
    assert "has a segment 'kidney', which is none of liver" in why
