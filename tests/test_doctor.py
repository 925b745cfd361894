"""The doctor finds what is wrong, says it, repairs what can be, and never touches the source."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from kanseg.data.doctor import diagnose
from kanseg.data.findings import ERROR, KINDS, LEFT_OUT, rows
from kanseg.data.fingerprint import fingerprint
from kanseg.data.formats import read_dataset
from kanseg.data.image_classes import is_classes
from kanseg.data.images import read_image, read_label
from kanseg.errors import UserError


def tree(root: Path) -> dict[str, str]:
    """Digest of every file."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def image(root: Path, number: int = 1) -> Path:
    return root / "imagesTr" / f"case_{number}.nii.gz"


def label(root: Path, number: int = 1) -> Path:
    return root / "labelsTr" / f"case_{number}.nii.gz"


Change = Callable[[np.ndarray], np.ndarray]


def rewrite(path: Path, change: Change = lambda a: a, affine: np.ndarray | None = None) -> None:
    file = nib.load(path)
    array = change(np.asarray(file.dataobj).copy())
    nib.save(nib.Nifti1Image(array, file.affine if affine is None else affine), path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def with_nan(array: np.ndarray) -> np.ndarray:
    array[3, 3, 3] = np.nan
    return array


def shifted(root: Path, by: float) -> None:
    affine = nib.load(label(root)).affine.copy()
    affine[0, 3] += by
    rewrite(label(root), affine=affine)


def turned(root: Path, by: float) -> None:
    """Image and label of a case with an axis that leans towards another."""
    affine = nib.load(image(root)).affine.copy()
    affine[0, 1] += by
    for path in (image(root), label(root)):
        rewrite(path, affine=affine)


def scaled(root: Path, by: float) -> None:
    for path in (image(root), label(root)):
        rewrite(path, affine=np.diag([by, 1.0, 1.0, 1.0]))


def all_labels(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for number in range(6):
        rewrite(label(root, number), change)
    described = json.loads((root / "dataset.json").read_text())
    described.pop("labels")
    (root / "dataset.json").unlink()
    (root / "cases.csv").write_text("".join(["id,patient\n", *(f"case_{i},p{i // 2}\n" for i in range(6))]))


def copied(root: Path, same_label: bool) -> None:
    rewrite(image(root, 3), lambda a: voxels(image(root, 0)))
    if same_label:
        rewrite(label(root, 3), lambda a: voxels(label(root, 0)))


def renamed(root: Path, old: str, new: str) -> None:
    (root / "dataset.json").unlink()
    for folder in ("imagesTr", "labelsTr"):
        (root / folder / old).rename(root / folder / new)


def numbered(root: Path) -> None:
    """nnU-Net's layout with two channels, one of which a case lacks."""
    described = json.loads((root / "dataset.json").read_text())
    for number in range(6):
        shutil.copy(image(root, number), root / "imagesTr" / f"case_{number}_0001.nii.gz")
        image(root, number).rename(root / "imagesTr" / f"case_{number}_0000.nii.gz")
    (root / "imagesTr" / "case_1_0001.nii.gz").unlink()
    named = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "near": 1, "far": 2}}
    (root / "dataset.json").write_text(json.dumps(named | {"subjects": described["subjects"]}))


def unnumbered(root: Path) -> None:
    """nnU-Net's layout, in which one image has no channel in its name."""
    numbered(root)
    for path in (root / "imagesTr").glob("*_0001.nii.gz"):
        path.unlink()
    described = json.loads((root / "dataset.json").read_text()) | {"channel_names": {"0": "T1"}}
    (root / "dataset.json").write_text(json.dumps(described))
    (root / "imagesTr" / "case_1_0000.nii.gz").rename(image(root))


def two_ways(root: Path) -> None:
    """Masks of 0 and 1 beside masks of 0 and 255."""
    all_labels(root, lambda a: np.uint8(1) * (a > 0))
    rewrite(label(root), lambda a: np.uint8(255) * a)


def soft(root: Path) -> None:
    """Masks of 0 and 255, one of which was resized."""
    all_labels(root, lambda a: np.uint8(255) * (a > 0))

    def edges(a: np.ndarray) -> np.ndarray:
        border = np.argwhere(a > 0)[:20]
        a[tuple(border.T)] = np.arange(10, 210, 10)
        return a

    rewrite(label(root), edges)


def one_more(root: Path, **entry: str) -> None:
    described = json.loads((root / "dataset.json").read_text())
    described["training"].append({**described["training"][1], **entry})
    (root / "dataset.json").write_text(json.dumps(described))


def noisy_copy(root: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (20, 24, 18))
    rewrite(image(root, 3), lambda a: (voxels(image(root, 0)) + noise).astype(np.float32))


DEFECTS: dict[str, Callable[[Path], object]] = {
    "patients in part": lambda root: (
        (root / "dataset.json").unlink(),
        (root / "cases.csv").write_text("id,scanner\ncase_0,A\n"),
    ),
    "patients alike": lambda root: (
        (root / "dataset.json").unlink(),
        (root / "cases.csv").write_text("id,patient\ncase_0,Pat-007\ncase_1,pat 7\n"),
    ),
    "same name": lambda root: one_more(root),
    "missing label": lambda root: ((root / "dataset.json").unlink(), label(root).unlink()),
    "missing file": lambda root: label(root).unlink(),
    "missing channel": numbered,
    "no channel in the name": unnumbered,
    "label without image": lambda root: (
        (root / "dataset.json").unlink(),
        shutil.copy(label(root), root / "labelsTr" / "case_9.nii.gz"),
    ),
    "0 and 1, 0 and 255": two_ways,
    "255 beside classes": lambda root: (
        all_labels(root, lambda a: a),
        rewrite(label(root), lambda a: np.uint8(255) * (a > 0)),
    ),
    "soft edges": soft,
    "several masks": lambda root: (
        (root / "dataset.json").unlink(),
        label(root).rename(root / "labelsTr" / "case_1_mask_1.nii.gz"),
        shutil.copy(root / "labelsTr" / "case_1_mask_1.nii.gz", root / "labelsTr" / "case_1_mask_2.nii.gz"),
    ),
    "unreadable": lambda root: image(root).write_bytes(image(root).read_bytes()[:300]),
    "other channels": lambda root: rewrite(image(root), lambda a: np.stack([a, a], -1)),
    "not finite": lambda root: rewrite(image(root), with_nan),
    "4D with one channel": lambda root: rewrite(image(root), lambda a: a[..., None]),
    "crooked axes": lambda root: turned(root, 1e-3),
    "sheared axes": lambda root: turned(root, 0.3),
    "extreme spacing": lambda root: scaled(root, 40.0),
    "constant image": lambda root: rewrite(image(root), np.zeros_like),
    "different grids": lambda root: shifted(root, 5.0),
    "grids differ by rounding": lambda root: shifted(root, 0.1),
    "no label map": lambda root: rewrite(label(root), lambda a: a.astype(np.float32) / 3),
    "float label": lambda root: rewrite(label(root), lambda a: a.astype(np.float32)),
    "undeclared values": lambda root: rewrite(label(root), lambda a: a * 7),
    "empty label": lambda root: rewrite(label(root), np.zeros_like),
    "nothing to learn": lambda root: all_labels(root, np.zeros_like),
    "0 and 255": lambda root: all_labels(root, lambda a: np.uint8(255) * (a > 0)),
    "gaps in labels": lambda root: all_labels(root, lambda a: a * 7),
    "duplicate": lambda root: copied(root, same_label=True),
    "contradicting duplicates": lambda root: copied(root, same_label=False),
    "near duplicate": noisy_copy,
    "copied label": lambda root: rewrite(label(root, 3), lambda a: voxels(label(root, 0))),
    "left and right": lambda root: (
        renamed(root, "case_0.nii.gz", "a_left.nii.gz"),
        [(root / f / "case_1.nii.gz").rename(root / f / "a_right.nii.gz") for f in ("imagesTr", "labelsTr")],
    ),
    "beginnings of names": lambda root: (
        (root / "dataset.json").unlink(),
        [
            (root / f / f"case_{n}.nii.gz").rename(root / f / f"slide{n // 2}_x{n}.nii.gz")
            for f in ("imagesTr", "labelsTr")
            for n in range(6)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFECTS)
def test_each_defect_is_found_and_repaired_in_a_copy(blobs: Path, tmp_path: Path, kind: str) -> None:
    root, out = tmp_path / "set", tmp_path / "fixed"
    shutil.copytree(blobs, root)
    DEFECTS[kind](root)
    before = tree(root)
    found = diagnose(root)
    assert kind in {finding.kind for finding in found.findings}
    json.dumps(found.to_dict())
    assert rows(found.findings, found.source)
    severity, repair = KINDS[kind]
    if severity == ERROR and repair is None:
        with pytest.raises(UserError, match="cannot be repaired"):
            found.fix(out)
        assert not out.exists()
    else:
        made = found.fix(out)
        assert read_dataset(out).cases
        again = diagnose(out)
        assert not again.errors
        assert repair is None or kind not in {finding.kind for finding in again.findings}
        assert made["training"] == 6 - {LEFT_OUT: 1, "both are left out": 2}.get(repair or "", 0)
    assert tree(root) == before


@pytest.mark.parametrize("kind", ["not finite", "unreadable", "other channels"])
def test_a_bad_first_image_does_not_hide_the_others(blobs: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    DEFECTS[kind](root)
    (root / "dataset.json").unlink()
    for folder in ("imagesTr", "labelsTr"):  # sorts before the others
        (root / folder / "case_1.nii.gz").rename(root / folder / "a.nii.gz")
    found = diagnose(root)
    assert [(f.kind, f.case) for f in found.errors] == [(kind, "a")]
    assert found.cases == 6
    assert found.fix(tmp_path / "out")["training"] == (6 if kind == "not finite" else 5)


@pytest.mark.parametrize(
    ("change", "message"), [(two_ways, "two ways to write one mask"), (soft, "resized mask")]
)
def test_masks_that_would_become_classes_stop_a_plan(
    blobs: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(blobs, tmp_path / "set")
    change(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path / "set")


def test_a_list_that_cannot_be_read_is_one_finding(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("img,lab\na.nii.gz,b.nii.gz\n")
    found = diagnose(tmp_path / "bad.csv")
    assert [f.kind for f in found.findings] == ["layout"]
    assert found.cases == 0


def test_folds_of_a_list_that_part_a_patient_are_found(blobs: Path, tmp_path: Path) -> None:
    rows_ = [f"{image(blobs, i)},{label(blobs, i)},p{i // 2},{i % 2}\n" for i in range(6)]
    (tmp_path / "list.csv").write_text("".join(["image,label,patient,fold\n", *rows_]))
    found = diagnose(tmp_path / "list.csv")
    assert {f.kind for f in found.errors} == {"folds share a patient"}
    found.fix(tmp_path / "out")
    assert not read_dataset(tmp_path / "out").splits


def test_links_to_nothing_are_missing_files(blobs: Path, tmp_path: Path) -> None:
    shutil.copytree(blobs, tmp_path / "set")
    (tmp_path / "set" / "dataset.json").unlink()
    image(tmp_path / "set").unlink()
    image(tmp_path / "set").symlink_to(tmp_path / "nowhere.nii.gz")
    assert [(f.kind, f.case) for f in diagnose(tmp_path / "set").errors] == [("missing file", "case_1")]


def test_a_sound_data_set_has_no_finding(blobs: Path, shared_data: Path) -> None:
    for data in (blobs, shared_data / "glas"):
        assert {f.kind for f in diagnose(data).findings} <= {"0 and 255"}


def test_a_repair_keeps_voxels_and_names(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    shifted(root, 0.1)
    rewrite(image(root), with_nan)
    diagnose(root).fix(tmp_path / "fixed")
    first, second = read_dataset(blobs), read_dataset(tmp_path / "fixed")
    assert first.label_names == second.label_names
    assert [c.group for c in first.cases] == [c.group for c in second.cases]
    old, new = read_image(first.cases[1].images), read_image(second.cases[1].images)
    difference = old.array != new.array
    assert difference.sum() == 1
    assert new.array[0, 3, 3, 3] == np.delete(old.array.ravel(), np.flatnonzero(difference)[0]).min()
    np.testing.assert_array_equal(read_label(label(blobs)), read_label(label(tmp_path / "fixed")))


def test_images_of_one_patient_are_joined(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    noisy_copy(root)
    groups = {case.id: case.group for case in diagnose(root).dataset.cases}  # type: ignore[union-attr]
    assert groups["case_0"] == groups["case_3"]


def test_real_bad_files_are_explained(shared_data: Path, tmp_path: Path) -> None:
    files = shared_data / "bad_inputs" / "nifti"
    pairs = {
        "hippocampus_003_image": ("hippocampus_281_label", "different grids"),
        "fpg_t2_image": ("fpg_t1space_label", "different grids"),
        "ct_112slices_image": ("ct_30slices_label", "different grids"),
        "dmri_4d_image": ("hippocampus_003_label_float32", "other channels"),
        "rgb_voxels_image": ("hippocampus_003_label_float32", "unreadable"),
    }
    lines = [f"{files / image}.nii.gz,{files / label}.nii.gz" for image, (label, _) in pairs.items()]
    good = f"{files / 'hippocampus_003_image'}.nii.gz,{files / 'hippocampus_003_label_float32'}.nii.gz,good"
    (tmp_path / "list.csv").write_text("\n".join(["image,label,id", good, *(f"{line}," for line in lines)]))
    found = diagnose(tmp_path / "list.csv")
    kinds = {(finding.case, finding.kind) for finding in found.findings}
    assert {(image, kind) for image, (_, kind) in pairs.items()} <= kinds
    assert ("good", "float label") in kinds
    assert found.fix(tmp_path / "fixed")["training"] == 1


def test_masks_of_real_pictures_are_merged(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "bad_inputs" / "png"
    found = diagnose(source)
    assert {f.kind for f in found.findings} == {"several masks", "empty label", "0 and 255"}
    found.fix(tmp_path / "fixed")
    masks = [np.asarray(Picture.open(p).convert("L")) > 0 for p in sorted(source.glob("benign (54)_mask*"))]
    merged = read_label(tmp_path / "fixed" / "labelsTr" / "benign (54).png")
    np.testing.assert_array_equal(merged, masks[0] | masks[1])


def test_series_that_are_no_volume_are_explained(shared_data: Path) -> None:
    found = diagnose(shared_data / "bad_inputs" / "dicom")
    broken = {finding.case for finding in found.findings if finding.kind == "unreadable"}
    assert {"ct_gantry_tilt", "ct_missing_slice", "ct_same_position", "mr_mixed_orientation"} <= broken


def test_a_mask_saved_as_jpeg_is_split_at_the_middle(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 20:50] = 255
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 99, mask.shape, np.uint8)
    Picture.fromarray(picture).save(tmp_path / "set/images/a.png")
    Picture.fromarray(mask).save(tmp_path / "set/masks/a.jpg", quality=40)
    found = diagnose(tmp_path / "set")
    assert "lossy label" in {f.kind for f in found.findings}
    found.fix(tmp_path / "fixed")
    np.testing.assert_array_equal(read_label(tmp_path / "fixed/labelsTr/a.png"), mask > 0)


def test_series_of_one_patient_are_joined(shared_data: Path, tmp_path: Path) -> None:
    """The same DICOM patient under two names."""
    series = shared_data / "dicom" / "mr_hippocrop_1"
    lines = ["image,label,id"]
    for number in range(2):
        folder = tmp_path / f"scan_{number}"
        shutil.copytree(series, folder)
        scan = read_image(folder)
        mask = np.zeros(scan.array.shape[1:], np.uint8)
        mask[5:9, 5:9, 5 + number : 9] = 1
        nib.save(nib.Nifti1Image(mask, scan.affine), tmp_path / f"{number}.nii.gz")
        lines.append(f"{folder},{tmp_path / f'{number}.nii.gz'},case_{number}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    assert "same patient" in {finding.kind for finding in diagnose(tmp_path / "list.csv").findings}


def test_photographs_that_are_to_be_shown_turned_are_told(tmp_path: Path) -> None:
    """Phones store them on their side; most tools to draw labels turn them, others do not."""
    how = Picture.Exif()
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (10, 14, 3), np.uint8)
        how[274] = 6 if number else 1
        Picture.fromarray(noise).save(tmp_path / "images" / f"{number}.jpg", exif=how)
        label = np.zeros((14, 10) if number == 2 else (10, 14), np.uint8)
        label[3:6, 3 + number : 7] = 1
        Picture.fromarray(label).save(tmp_path / "masks" / f"{number}.png")
    found = diagnose(tmp_path).findings
    assert [f.case for f in found if f.kind == "turned by EXIF"] == ["1", "2"]
    assert [f.case for f in found if f.kind == "different grids"] == ["2"]
    with pytest.raises(UserError, match=r"2.jpg is to be shown turned \(EXIF\): save it so"):
        fingerprint(read_dataset(tmp_path))


@pytest.mark.parametrize("part", ["", "train/"])
def test_a_folder_of_masks_for_each_class_becomes_one_label_map(tmp_path: Path, part: str) -> None:
    """An image that a class has no mask of lacks that class; where two overlap the later one is seen."""
    root, generator = tmp_path / "set", np.random.default_rng(0)
    labels = {"a": {"liver": (2, 9), "tumour": (5, 7)}, "b": {"liver": (1, 8)}, "c": {"tumour": (4, 6)}}
    for name, found in labels.items():
        (root / part / "images").mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 255, (12, 12, 3), np.uint8)
        Picture.fromarray(noise).save(root / part / "images" / f"{name}.png")
        for kind, (start, end) in found.items():
            (root / part / "masks" / kind).mkdir(parents=True, exist_ok=True)
            mask = np.zeros((12, 12), np.uint8)
            mask[start:end, start:end] = 255
            Picture.fromarray(mask).save(root / part / "masks" / kind / f"{name}_mask.png")
    assert not is_classes(root)
    with pytest.raises(
        UserError, match=r"a folder of masks for each class \(liver, tumour\).*doctor DATA --fix"
    ):
        read_dataset(root)
    found = diagnose(root)
    assert {(f.kind, f.case) for f in found.findings if f.kind == "masks overlap"} == {("masks overlap", "a")}
    assert {f.kind for f in found.errors} == {"masks by class"}
    found.fix(tmp_path / "fixed")
    dataset = read_dataset(tmp_path / "fixed")
    assert dataset.label_names == ("background", "liver", "tumour")
    for case in dataset.cases:
        expected = np.zeros((12, 12))
        for kind, (start, end) in labels[case.id].items():
            expected[start:end, start:end] = 1 + (kind == "tumour")
        np.testing.assert_array_equal(read_label(case.label), expected)  # type: ignore[arg-type]
    (root / part / "masks" / "liver" / "b_mask.png").unlink()
    assert ("missing label", "b") in {(f.kind, f.case) for f in diagnose(root).findings}
