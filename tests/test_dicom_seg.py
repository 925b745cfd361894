"""DICOM-SEG: what is written lies where the label map lay, refers to its series, and can be read by others."""

from __future__ import annotations

import locale
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import Brightness

from kanseg.data.dicom import dicom_files
from kanseg.data.formats import read_dataset
from kanseg.data.images import LPS_TO_RAS, read_description, read_image
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.evaluation.report import class_colours
from kanseg.export.dicom_seg import code_of, write_segmentation
from kanseg.inference.ensemble import combine_folders
from kanseg.inference.predict import predict_case, predict_folder

pytest.importorskip("highdicom", reason="the extra kanseg[dicom] is not installed")
import highdicom
import pydicom

STUDY = "1.2.826.0.1.3680043.8.498.1"
SHARED_SERIES = [
    "ct3_with_seg/ct",
    "mr_ge_oblique",
    "mr_hippocrop_1",
    "mr_hitachi_oblique",
    "mr_non_isotropic",
]
SHARED_SERIES += ["mr_hyperfine_multiframe", "mr_philips_enhanced", "mr_jpeg2000", "ct1_with_rtstruct"]


def write_series(folder: Path, source: Path) -> Path:
    """A bare MR series, a file a slice, as an anonymiser may leave it."""
    folder.mkdir(parents=True)
    volume = sitk.ReadImage(str(source))
    volume = sitk.Cast(sitk.RescaleIntensity(volume, 0, 1000), sitk.sitkInt16)
    direction = volume.GetDirection()
    before = locale.setlocale(
        locale.LC_CTYPE
    )  # which GDCM leaves at "C": later tests would read files as ASCII
    for k in range(volume.GetSize()[2]):
        image = volume[:, :, k]
        tags = {
            "0008|0060": "MR",
            "0020|000d": f"{STUDY}.1",
            "0020|000e": f"{STUDY}.2",
            "0008|0018": f"{STUDY}.3.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(map(str, volume.TransformIndexToPhysicalPoint((0, 0, k)))),
            "0020|0037": "\\".join(map(str, [*direction[0::3], *direction[1::3]])),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, before)
    return folder


@pytest.fixture(scope="module")
def series(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series") / "scan", blobs / "imagesTr" / "case_0.nii.gz")


def labels_of(path: Path, like: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The segments of a file as numbers on the grid of an image, placed by the file's own geometry."""
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    points = np.stack(np.meshgrid(*map(range, volume.array.shape), indexing="ij"), -1).reshape(-1, 3)
    to_index = np.linalg.inv(affine) @ LPS_TO_RAS @ volume.affine
    index = points @ to_index[:3, :3].T + to_index[:3, 3]
    assert np.abs(index - np.rint(index)).max() < 0.02
    found = np.zeros(like.shape, int)
    found[tuple(np.rint(index).astype(int).T)] = volume.array.ravel()
    return found


def test_prediction_of_a_series_becomes_a_segmentation_of_it(
    series: Path, blobs: Path, tmp_path: Path
) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), patch_size=[16, 16, 16])
    plan = replace(plan, label_values=[0, 7, 300], label_dtype="uint16", label_names=["-", "liver", "tumour"])
    cases = find_images(series)
    said = predict_folder(Brightness(), plan, cases, tmp_path, suffix=".dcm", settings={}, uncertainty=True)
    assert said == {}
    path = tmp_path / "scan.dcm"
    labels, source = predict_case(Brightness(), cases[0], plan)
    found = labels_of(path, labels, source.affine)
    np.testing.assert_array_equal(np.array([0, 7, 300])[found], labels)
    written = pydicom.dcmread(path)
    assert written.Modality == "SEG"
    assert written.StudyInstanceUID == f"{STUDY}.1"
    segments = [
        (s.SegmentLabel, s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning) for s in written.SegmentSequence
    ]
    assert segments == [("liver", "Liver"), ("tumour", "Neoplasm")]
    for segment, colour in zip(written.SegmentSequence, class_colours(2), strict=True):  # as in the report
        shown = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb()
        np.testing.assert_allclose(shown, 255 * np.array(colour[:3]), atol=1)
    referenced = {
        image.ReferencedSOPInstanceUID
        for frame in written.PerFrameFunctionalGroupsSequence
        for image in frame.DerivationImageSequence[0].SourceImageSequence
    }
    planes = np.flatnonzero(labels.any(axis=(0, 1)))
    assert referenced == {f"{STUDY}.3.{k + 1}" for k in planes}
    assert read_description(path).startswith("kanseg ")
    assert read_image(tmp_path / "scan_uncertainty.nii.gz").array.shape[1:] == labels.shape
    before = path.read_bytes()
    predict_folder(Brightness(), plan, cases, tmp_path, suffix=".dcm", settings={}, uncertainty=True)
    assert path.read_bytes() == before  # done already


def test_one_file_carries_a_segmentation(shared_data: Path, tmp_path: Path) -> None:
    """An enhanced MR of many planes, given as the file that it is."""
    (file,) = (shared_data / "dicom" / "mr_philips_enhanced").glob("*.dcm")
    image = read_image(file)
    labels = (image.array[0] > np.percentile(image.array[0], 90)).astype(int)
    path = write_segmentation(tmp_path / "a.dcm", labels, image, values=[0, 1], names=["-", "vessel"])
    np.testing.assert_array_equal(labels_of(path, labels, image.affine), labels)


@pytest.mark.parametrize("name", SHARED_SERIES)
def test_real_series_carry_segmentations(name: str, shared_data: Path, tmp_path: Path) -> None:
    image = read_image(shared_data / "dicom" / name)
    values = image.array[0]
    labels = np.digitize(values, np.percentile(values, [80, 95])) * 2
    path = write_segmentation(
        tmp_path / "a.dcm", labels, image, values=[0, 2, 4], names=["-", "spleen", "node 3"]
    )
    np.testing.assert_array_equal(labels_of(path, labels, image.affine) * 2, labels)
    shared = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if len(np.unique(np.nonzero(labels)[2])) > 1:
        assert float(shared.SpacingBetweenSlices) == pytest.approx(image.spacing[2], rel=1e-4)


@pytest.mark.parametrize("name", SHARED_SERIES)
def test_each_plane_refers_to_its_own_slice(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Also where a scanner rounds positions, so that its slices lie a little beside an even row."""
    source = shared_data / "dicom" / name
    image = read_image(source)
    labels = np.ones(image.array.shape[1:], int)
    path = write_segmentation(tmp_path / "a.dcm", labels, image, values=[0, 1], names=["-", "spleen"])
    planes = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    assert len(planes) == labels.shape[2]
    headers = {h.SOPInstanceUID: h for h in map(pydicom.dcmread, map(str, dicom_files(source)))}
    for plane in planes:
        (reference,) = plane.DerivationImageSequence[0].SourceImageSequence
        header = headers[reference.ReferencedSOPInstanceUID]
        if "PerFrameFunctionalGroupsSequence" in header:
            frame = header.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            header = frame.PlanePositionSequence[0]
        there, here = header.ImagePositionPatient, plane.PlanePositionSequence[0].ImagePositionPatient
        assert np.linalg.norm(np.subtract(there, here)) < 0.1 * image.spacing[2]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_wrong_gap_in_the_header_of_frames_is_not_repeated(
    backwards: bool, shared_data: Path, tmp_path: Path
) -> None:
    (file,) = (shared_data / "dicom" / "mr_philips_enhanced").glob("*.dcm")
    described = pydicom.dcmread(file)
    frames = list(described.PerFrameFunctionalGroupsSequence)
    described.PerFrameFunctionalGroupsSequence = frames[::-1] if backwards else frames
    for part in (*described.SharedFunctionalGroupsSequence, *frames):
        for measures in part.get("PixelMeasuresSequence", []):
            measures.SpacingBetweenSlices = 3.3
    described.save_as(tmp_path / "frames.dcm")
    image = read_image(tmp_path / "frames.dcm")
    assert image.spacing[2] == pytest.approx(1.2, rel=1e-4)
    labels = (image.array[0] > np.percentile(image.array[0], 90)).astype(int)
    path = write_segmentation(tmp_path / "a.dcm", labels, image, values=[0, 1], names=["-", "vessel"])
    np.testing.assert_array_equal(labels_of(path, labels, image.affine), labels)


def test_same_result_same_identity_other_result_another(series: Path, tmp_path: Path) -> None:
    image = read_image(series)
    labels = (image.array[0] > image.array.mean()).astype(int)
    paths = [tmp_path / f"{n}.dcm" for n in "abc"]
    for path, result in zip(paths, (labels, labels, 1 - labels), strict=True):
        write_segmentation(path, result, image, values=[0, 1], names=["-", "brain"])
    identities = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    assert identities[0] == identities[1] != identities[2]


def test_nothing_found_is_a_segmentation_without_voxels(series: Path, tmp_path: Path) -> None:
    image = read_image(series)
    nothing = np.zeros(image.array.shape[1:], int)
    path = write_segmentation(tmp_path / "a.dcm", nothing, image, values=[0, 1], names=["-", "brain"])
    assert not labels_of(path, nothing, image.affine).any()


def test_a_segmentation_needs_a_series(blobs: Path, tmp_path: Path) -> None:
    plan: Plan = make_plan(read_dataset(blobs), memory=2**31)
    cases = find_images(blobs / "imagesTr")[:1]
    for out in (tmp_path / "mask.dcm", tmp_path / "masks"):
        with pytest.raises(UserError, match=r"case_0.nii.gz is no DICOM series, and DICOM-SEG refers to one"):
            predict_folder(Brightness(), plan, cases, out, suffix=".dcm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("Right_Kidney", "Kidney", "Right"),
        ("Lung_L", "Lung", "Left"),
        ("rib_left_1", "Rib", "Left"),
        ("ventricle, left", "LeftVentricle", ""),
        ("lung left and right", "AnatomicalStructure", ""),
        ("vertebrae_L5", "AnatomicalStructure", ""),
        ("spleen", "Spleen", ""),
        ("label 255", "AnatomicalStructure", ""),
        ("GTV lesion", "Lesion", ""),
    ],
)
def test_names_are_looked_up_in_the_code_dictionary(name: str, kind: str, side: str) -> None:
    assert code_of(name)[1:] == (kind, side)


def test_a_side_in_a_name_is_the_modifier_of_its_segment(series: Path, tmp_path: Path) -> None:
    image = read_image(series)
    labels = (image.array[0] > image.array[0].mean()).astype(int)
    labels[:8] *= 2
    write_segmentation(tmp_path / "a.dcm", labels, image, [0, 1, 2], ["-", "kidney_left", "liver"])
    left, liver = pydicom.dcmread(tmp_path / "a.dcm").SegmentSequence
    (side,) = left.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert (side.CodeValue, side.CodingSchemeDesignator, side.CodeMeaning) == ("7771000", "SCT", "Left")
    assert "SegmentedPropertyTypeModifierCodeSequence" not in liver.SegmentedPropertyTypeCodeSequence[0]
    assert highdicom.seg.segread(tmp_path / "a.dcm").number_of_segments == 2


def test_results_are_neither_put_among_the_images_nor_taken_for_some(
    series: Path, blobs: Path, tmp_path: Path
) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), patch_size=[16, 16, 16])
    cases = find_images(series)
    with pytest.raises(UserError, match="would lie among the images of its series"):
        predict_folder(Brightness(), plan, cases, series / "mask.dcm")
    folder = tmp_path / "all"
    (folder / "one").mkdir(parents=True)
    for file in series.iterdir():
        (folder / "one" / file.name).write_bytes(file.read_bytes())
    predict_folder(Brightness(), plan, find_images(folder), folder, suffix=".dcm")
    assert (folder / "one.dcm").is_file()
    assert [case.id for case in find_images(folder)] == ["one"]
    (folder / "one" / "mask.dcm").write_bytes((folder / "one.dcm").read_bytes())
    assert read_image(folder / "one").array.shape == read_image(series).array.shape
    with pytest.raises(UserError, match="holds DICOM-SEG, RTSTRUCT or .*, which are not combined"):
        combine_folders([folder, tmp_path / "other"], tmp_path / "both")
