"""Names of classes in headers: written for viewers, read from label maps that others wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from kanseg.data.class_names import class_colours, names_in
from kanseg.data.convert import convert
from kanseg.data.doctor import diagnose
from kanseg.data.facts import facts_of_label_map
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.images import Image, read_image, read_label, read_provenance, write_label
from kanseg.data.segmentations import read_segments, with_segments
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.evaluation.folders import evaluate_folders

NAMES = {0: "background", 2: "liver <left> & right", 5: "Tumör"}


@pytest.fixture
def scan() -> Image:
    """A volume of unequal axes, spacing and a turned, shifted grid."""
    affine = np.array([[0, -2.0, 0, 9], [1.5, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    return Image(np.random.default_rng(0).normal(size=(1, 9, 8, 7)).astype(np.float32), affine, Path("x"), 3)


@pytest.fixture
def labels() -> np.ndarray:
    found = np.zeros((9, 8, 7), np.int32)
    found[2:5, 1:4, 3:6], found[6:8, 5:7, 0:2] = 2, 5
    return found


def save(image: Image, path: Path) -> Path:
    """An image as NRRD, by ITK alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, image.array[0], image, "float32")
    return path


def slicer(
    path: Path,
    layers: list[np.ndarray],
    like: Image,
    segments: list[tuple[str, int | str, int]],
    first: int = 0,
) -> Path:
    """As 3D Slicer saves segments (name, layer, value): cut to the part from voxel `first` on along each axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = [layer[first:, first:, first:].transpose().astype(np.uint8) for layer in layers]
    image = (
        sitk.GetImageFromArray(np.stack(cut, -1), isVector=True)
        if len(cut) > 1
        else sitk.GetImageFromArray(cut[0])
    )
    whole = sitk.ReadImage(str(write_label(path.with_name("grid.nrrd"), layers[0], like)))
    path.with_name("grid.nrrd").unlink()
    image.SetSpacing(whole.GetSpacing())
    image.SetDirection(whole.GetDirection())
    image.SetOrigin(whole.TransformIndexToPhysicalPoint([first] * 3))
    for number, (name, layer, value) in enumerate(segments):
        for key, text in (("ID", name), ("Name", name), ("Layer", layer), ("LabelValue", value)):
            image.SetMetaData(f"Segment{number}_{key}", str(text))
    sitk.WriteImage(image, str(path))
    return path


def test_a_nifti_label_map_names_its_values(tmp_path: Path, scan: Image, labels: np.ndarray) -> None:
    path = write_label(tmp_path / "mask.nii.gz", labels, scan, names=NAMES)
    assert names_in(path) == NAMES
    (extension,) = nib.load(path).header.extensions
    table = ElementTree.fromstring(extension.content).find("VolumeInformation/LabelTable")
    assert table is not None
    assert extension.get_code() == 30
    colours = [[float(one.get(key, "")) for key in ("Red", "Green", "Blue", "Alpha")] for one in table]
    np.testing.assert_allclose(colours, [(0, 0, 0, 0), *class_colours(2)], atol=1e-5)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), labels)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(itk.transpose(), labels)
    assert names_in(write_label(tmp_path / "plain.nii.gz", labels, scan)) == {}


def test_a_nrrd_label_map_has_segments_for_3d_slicer(tmp_path: Path, scan: Image, labels: np.ndarray) -> None:
    path = write_label(tmp_path / "mask.seg.nrrd", labels, scan, names=NAMES | {7: "absent"})
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(), labels)
    told = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys() if key.startswith("Segment")}
    assert [told[f"Segment{n}_Name"] for n in range(3)] == ["liver <left> & right", "Tumör", "absent"]
    assert [told[f"Segment{n}_LabelValue"] for n in range(3)] == ["2", "5", "7"]
    assert [told[f"Segment{n}_Extent"] for n in range(3)] == ["2 4 1 3 3 5", "6 7 5 6 0 1", "0 -1 0 -1 0 -1"]
    assert "Segment3_Name" not in told
    first = np.array(told["Segment0_Color"].split(), float)
    np.testing.assert_allclose(first, class_colours(3)[0][:3], atol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_segments_of_slicer_are_found_by_names_wherever_they_are_cut(
    first: int, tmp_path: Path, scan: Image, labels: np.ndarray
) -> None:
    """Each file numbers its segments as it likes, and holds the part of the image that is drawn on."""
    labels[0], labels[:, 0], labels[..., 0] = 0, 0, 0
    for case, (two, five) in {"a": (1, 2), "b": (9, 4)}.items():
        save(scan, tmp_path / "data" / f"{case}.nrrd")
        drawn = np.where(labels == 2, two, np.where(labels == 5, five, 0))
        named = [("Tumour", 0, five), ("liver", 0, two)]
        slicer(tmp_path / "data" / f"{case}.seg.nrrd", [drawn], scan, named, first)
    dataset = with_segments(list_dataset(tmp_path / "data"))
    assert dataset.label_names == ("background", "liver", "Tumour")
    convert(dataset, tmp_path / "out", "msd")
    for case in read_dataset(tmp_path / "out").cases:
        assert case.label is not None
        np.testing.assert_array_equal(
            read_label(case.label), np.select([labels == 2, labels == 5], [1, 2], 0)
        )


def test_segments_that_overlap_lie_in_layers(tmp_path: Path, scan: Image, labels: np.ndarray) -> None:
    other = np.zeros_like(labels)
    other[3:6, 2:5, 4:6] = 1
    path = slicer(
        tmp_path / "x.seg.nrrd", [labels > 0, other], scan, [("liver", 0, 1), ("vessel", 1, 1)], first=0
    )
    with pytest.raises(UserError, match="overlap in 8 voxels"):
        read_segments(path, scan, ["liver", "vessel"])
    found = read_segments(path, scan, ["liver", "vessel"], only=True)
    np.testing.assert_array_equal(found, np.where(other == 1, 2, labels > 0))


def test_old_files_have_a_layer_of_ones_for_each_segment(
    tmp_path: Path, scan: Image, labels: np.ndarray
) -> None:
    """Before Slicer 4.11 neither layers nor values stood in the header."""
    path = slicer(
        tmp_path / "x.seg.nrrd", [labels == 2, labels == 5], scan, [("liver", 0, 1), ("tumour", 1, 1)]
    )
    image = sitk.ReadImage(str(path))
    for number in range(2):
        for key in ("Layer", "LabelValue"):
            image.EraseMetaData(f"Segment{number}_{key}")
    sitk.WriteImage(image, str(path))
    found = read_segments(path, scan, ["liver", "tumour"])
    np.testing.assert_array_equal(found, np.select([labels == 2, labels == 5], [1, 2], 0))


def test_what_is_no_segmentation_of_slicer_is_said(tmp_path: Path, scan: Image, labels: np.ndarray) -> None:
    plain = write_label(tmp_path / "x.seg.nrrd", labels, scan)
    with pytest.raises(UserError, match=r"no segments in its header.*call it x\.nrrd"):
        read_segments(plain, scan, ["liver"])
    with pytest.raises(UserError, match="is a segmentation. kanseg convert"):
        read_image(plain)
    (tmp_path / "y.seg.nrrd").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged or not what its suffix says"):
        read_segments(tmp_path / "y.seg.nrrd", scan, ["liver"])
    coarse = Image(scan.array[:, ::2, ::2, ::2], scan.affine @ np.diag([2, 2, 2, 1]), scan.path, 3)
    other = write_label(tmp_path / "z.seg.nrrd", labels[::2, ::2, ::2], coarse, names=NAMES)
    with pytest.raises(UserError, match="other voxels"):
        read_segments(other, scan, [*NAMES.values()][1:])
    strange = slicer(tmp_path / "s.seg.nrrd", [labels], scan, [("liver", "no number", 2)])
    with pytest.raises(UserError, match="no layer no number for 'liver'"):
        read_segments(strange, scan, ["liver"])
    picture = Image(scan.array[..., 0], np.eye(4), scan.path, 2)
    with pytest.raises(UserError, match="segments of 3D Slicer are volumes"):
        write_label(tmp_path / "p.seg.nrrd", labels[..., 0], picture, names=NAMES)


def test_segmentations_beside_images_are_neither_predicted_nor_taken_for_images(
    tmp_path: Path, scan: Image, labels: np.ndarray
) -> None:
    save(scan, tmp_path / "a.nrrd")
    write_label(tmp_path / "a.seg.nrrd", labels, scan, names=NAMES)
    assert [case.images[0].name for case in find_images(tmp_path)] == ["a.nrrd"]


def test_a_folder_a_case_holds_a_scan_and_what_was_drawn(
    tmp_path: Path, scan: Image, labels: np.ndarray
) -> None:
    for case in ("p1", "p2"):
        save(scan, tmp_path / case / "CT chest.nrrd")
        write_label(tmp_path / case / "Segmentation.seg.nrrd", labels, scan, names=NAMES)
    cases = list_dataset(tmp_path).cases
    assert [(case.id, case.images[0].name) for case in cases] == [
        ("p1", "CT chest.nrrd"),
        ("p2", "CT chest.nrrd"),
    ]
    assert [case.label and case.label.name for case in cases] == ["Segmentation.seg.nrrd"] * 2


def test_predictions_of_slicer_score_as_label_maps_do(
    tmp_path: Path, scan: Image, labels: np.ndarray
) -> None:
    write_label(tmp_path / "references" / "a.nrrd", labels, scan)
    guess = np.where(labels == 5, 2, labels)
    write_label(tmp_path / "maps" / "a.nrrd", guess, scan)
    write_label(tmp_path / "segments" / "a.seg.nrrd", guess, scan, names=NAMES)
    named = {name: value for value, name in NAMES.items() if value}
    scores = [
        evaluate_folders(tmp_path / kind, tmp_path / "references", labels=named)
        for kind in ("maps", "segments")
    ]
    assert scores[0]["metrics"] == scores[1]["metrics"]
    with pytest.raises(UserError, match="references are label maps. kanseg convert"):
        evaluate_folders(tmp_path / "maps", tmp_path / "segments", labels=named)


def test_classes_are_called_as_headers_say(tmp_path: Path, blobs: Path) -> None:
    """Where nothing else names them, and all label maps that name a value agree."""
    shutil.copytree(blobs / "imagesTr", tmp_path / "images")
    for path in sorted((blobs / "labelsTr").glob("*.nii.gz")):
        image = read_image(path)
        names = dict.fromkeys(np.unique(image.array).astype(int).tolist(), "")
        names = {value: f"organ {value}" for value in names}
        write_label(tmp_path / "labels" / path.name, read_label(path), image, names=names)
    dataset = read_dataset(tmp_path)
    assert dataset.label_names[1:] == tuple(f"organ {value}" for value in dataset.label_values[1:])
    repaired = diagnose(tmp_path).dataset  # as `kanseg run` takes it
    assert repaired is not None
    assert repaired.label_names == dataset.label_names
    scores = evaluate_folders(tmp_path / "labels", tmp_path / "labels")
    assert [*scores["labels"]] == [*dataset.label_names[1:]]
    write_label(
        path := tmp_path / "labels" / path.name, read_label(path), read_image(path), names={1: "another"}
    )
    dataset = read_dataset(tmp_path)
    assert dataset.label_names[1] == "label 1"
    assert any("several names to the values 1" in note for note in dataset.notes)
    write_label(path, read_label(path), read_image(path))  # one without names may be of another origin
    assert read_dataset(tmp_path).label_names[1:] == tuple(
        f"label {value}" for value in dataset.label_values[1:]
    )


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".seg.nrrd", ".mha", ".png"])
def test_what_a_label_map_holds_and_how_it_came_to_be_is_told(
    suffix: str, tmp_path: Path, scan: Image
) -> None:
    labels = np.zeros((9, 8, 7), np.int32)
    labels[:2], labels[3, :3] = 2, 5
    made = {"kanseg": "0.1.0", "models": ["ab12"], "trained on": "Möwen"}
    if suffix == ".png":
        labels, scan = labels[..., 0], Image(scan.array[..., 0], np.eye(4), scan.path, 2)
    path = write_label(tmp_path / f"mask{suffix}", labels, scan, names=NAMES, provenance=made)
    facts = facts_of_label_map(path)
    assert facts["made by"] == made
    assert facts["size"] == labels.shape
    voxels = [one["voxels"] for one in facts["classes"].values()]
    assert voxels == [np.count_nonzero(labels == value) for value in (2, 5)]
    if suffix != ".png":  # voxels of 1.5 x 2 x 3 mm
        assert [one["ml"] for one in facts["classes"].values()] == pytest.approx([0.009 * n for n in voxels])
    if suffix in (".nii.gz", ".nrrd", ".seg.nrrd"):
        assert [*facts["classes"]] == ["liver <left> & right", "Tumör"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_long_story_of_how_it_came_to_be_leaves_a_file_that_is_read(
    suffix: str, tmp_path: Path, scan: Image
) -> None:
    """As an ensemble of many predictions by many rules has; MHA cannot hold it."""
    labels = np.arange(9 * 8 * 7).reshape(9, 8, 7) % 3
    for length in (32_000, 40_000):
        made = {"kanseg": "0.1.0", "models": ["a" * length]}
        path = write_label(tmp_path / f"mask{suffix}", labels, scan, provenance=made)
        assert np.array_equal(read_label(path), labels)
        assert read_provenance(path) == ({} if (suffix, length) == (".mha", 40_000) else made)


def test_other_headers_tell_of_no_provenance(tmp_path: Path, scan: Image, labels: np.ndarray) -> None:
    image = nib.Nifti1Image(labels.astype(np.uint8), scan.affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b'"a remark"'))
    nib.save(image, tmp_path / "other.nii.gz")
    facts = facts_of_label_map(tmp_path / "other.nii.gz")
    assert "made by" not in facts
    assert [*facts["classes"]] == ["label 2", "label 5"]


def test_segments_of_one_name_are_told_each_for_itself(tmp_path: Path, scan: Image) -> None:
    """As a user of 3D Slicer leaves them where several lesions are drawn one by one."""
    labels = np.zeros((9, 8, 7), np.int32)
    labels[:2], labels[3, :3], labels[5, 0, 0] = 2, 5, 7
    names = {2: "lesion", 5: "liver", 7: "lesion"}
    path = write_label(tmp_path / "mask.seg.nrrd", labels, scan, names=names)
    voxels = {name: one["voxels"] for name, one in facts_of_label_map(path)["classes"].items()}
    assert voxels == {"lesion (segment 0)": 2 * 8 * 7, "liver": 3 * 7, "lesion (segment 2)": 1}
