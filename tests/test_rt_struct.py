"""RT structures: contours give the label map back, refer to their series, and are read as others draw them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline
from scipy.ndimage import gaussian_filter
from skimage.draw import polygon2mask
from test_dicom_seg import SHARED_SERIES, write_series
from test_predict import Brightness
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.data.dicom import dicom_files
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.images import read_description, read_image, read_label, write_label
from kanseg.data.planner import make_plan
from kanseg.data.segmentations import read_segments, with_segments
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.evaluation.folders import evaluate_folders
from kanseg.export.rt_struct import outlines, write_structures
from kanseg.inference.predict import predict_case, predict_folder

NAMES = ["-", "one", "two", "three"]


def some_labels(shape: tuple[int, ...]) -> np.ndarray:
    """Parts with holes, parts that touch at corners and the border, single voxels."""
    generator = np.random.default_rng(0)
    smooth = gaussian_filter(generator.normal(size=shape), 1.5)
    labels = np.zeros(shape, int)
    labels[smooth > np.quantile(smooth, 0.7)] = 1
    labels[smooth < np.quantile(smooth, 0.1)] = 2
    labels[generator.random(shape) < 0.02] = 3
    return labels


@pytest.fixture
def series(blobs: Path, tmp_path: Path) -> Path:
    return write_series(tmp_path / "data" / "images" / "case_0", blobs / "imagesTr" / "case_0.nii.gz")


@pytest.fixture
def labels(series: Path) -> np.ndarray:
    return some_labels(read_image(series).array.shape[1:])


def write(path: Path, labels: np.ndarray, series: Path, names: list[str] = NAMES) -> pydicom.Dataset:
    write_structures(path, labels, read_image(series), range(len(names)), names, description="how")
    return pydicom.dcmread(path)


@pytest.mark.parametrize("name", SHARED_SERIES)
def test_contours_of_real_series_give_the_label_map_back(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    source = read_image(shared_data / "dicom" / name)
    labels = np.zeros(source.array.shape[1:], int)
    labels[:60, :60] = some_labels(labels[:60, :60].shape)
    path = tmp_path / "a.rtstruct.dcm"
    write_structures(path, labels, source, range(4), NAMES)
    np.testing.assert_array_equal(read_segments(path, source, NAMES[1:]), labels)


@pytest.mark.parametrize("name", SHARED_SERIES)
def test_contours_lie_in_the_planes_of_their_images(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Also where scanners round positions, so that rows of slices are not quite even."""
    folder = shared_data / "dicom" / name
    source = read_image(folder)
    labels = np.ones(source.array.shape[1:], int)
    write_structures(tmp_path / "a.dcm", labels, source, [0, 1], ["-", "all"])
    made = pydicom.dcmread(tmp_path / "a.dcm")
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for f in dicom_files(folder)]
    by_uid = {header.SOPInstanceUID: header for header in headers}
    contours = made.ROIContourSequence[0].ContourSequence
    assert len(contours) == labels.shape[2]
    for contour in contours:
        (image,) = contour.ContourImageSequence
        header = by_uid[image.ReferencedSOPInstanceUID]
        if number := image.get("ReferencedFrameNumber"):
            frame, shared = (
                header.PerFrameFunctionalGroupsSequence[number - 1],
                header.SharedFunctionalGroupsSequence[0],
            )
            place = frame.PlanePositionSequence[0].ImagePositionPatient
            turned = (frame if "PlaneOrientationSequence" in frame else shared).PlaneOrientationSequence[0]
        else:
            place, turned = header.ImagePositionPatient, header
        axes = np.array(turned.ImageOrientationPatient, float).reshape(2, 3)
        off = (np.array(contour.ContourData, float).reshape(-1, 3) - np.array(place, float)) @ np.cross(*axes)
        assert np.abs(off).max() < 2e-3


@pytest.mark.parametrize("seed", range(5))
def test_every_reader_sees_the_holes(seed: int) -> None:
    """One contour a part: by crossings, by windings, and filled part by part without knowing of holes."""
    mask = gaussian_filter(np.random.default_rng(seed).normal(size=(40, 30)), 1) > 0
    rings = outlines(mask)
    by_parts = np.zeros_like(mask)
    for ring in rings:
        by_parts |= polygon2mask(mask.shape, ring + 1e-5)
    np.testing.assert_array_equal(by_parts, mask)
    centres = np.indices(mask.shape).reshape(2, -1).T + 1e-5
    crossings = sum(Outline(ring).contains_points(centres) for ring in rings)
    np.testing.assert_array_equal(crossings.reshape(mask.shape) == 1, mask)
    windings = sum(np.rint(turns(ring, centres)) for ring in rings)
    np.testing.assert_array_equal(np.abs(windings).reshape(mask.shape), mask)


def turns(ring: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How often a ring goes around each place: the sum of the angles between its points."""
    there = ring[None] - places[:, None]
    angles = np.arctan2(there[..., 1], there[..., 0])
    steps = np.diff(angles, axis=1, append=angles[:, :1])
    return ((steps + np.pi) % (2 * np.pi) - np.pi).sum(1) / (2 * np.pi)


def test_a_real_structure_has_the_area_of_its_contours(shared_data: Path, tmp_path: Path) -> None:
    """The one slice that is here of a plan for radiotherapy; its body is 466 cm2 by the formula of polygons."""
    folder = shared_data / "dicom" / "ct1_with_rtstruct"
    image, file = read_image(folder), pydicom.dcmread(folder / "rtss.dcm")
    found = read_segments(folder / "rtss.dcm", image, ["BODY"], only=True)
    (roi,) = (one.ROINumber for one in file.StructureSetROISequence if one.ROIName == "BODY")
    (body,) = (one for one in file.ROIContourSequence if one.ReferencedROINumber == roi)
    height = image.affine[2, 3]
    area = 0.0
    for contour in body.ContourSequence:
        x, y, z = np.array(contour.ContourData, float).reshape(-1, 3).T
        if abs(z[0] - height) < 0.1:
            area += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area > 4e4
    assert found.sum() * image.spacing[0] * image.spacing[1] == pytest.approx(area, rel=0.005)


def test_the_object_says_what_it_is(series: Path, labels: np.ndarray, tmp_path: Path) -> None:
    labels[labels == 2] = 0
    made = write(tmp_path / "a.rtstruct.dcm", labels, series)
    header = pydicom.dcmread(dicom_files(series)[0], stop_before_pixels=True)
    assert (made.Modality, made.SOPClassUID) == ("RTSTRUCT", pydicom.uid.RTStructureSetStorage)
    assert made.StudyInstanceUID == header.StudyInstanceUID
    assert made.SeriesInstanceUID != header.SeriesInstanceUID
    assert [one.ROIName for one in made.StructureSetROISequence] == NAMES[1:]
    assert ["ContourSequence" in one for one in made.ROIContourSequence] == [True, False, True]
    (frame,) = made.ReferencedFrameOfReferenceSequence
    (referenced,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == header.SeriesInstanceUID
    assert len(referenced.ContourImageSequence) == len(dicom_files(series))
    assert read_description(tmp_path / "a.rtstruct.dcm") == "how"
    again, other = write(tmp_path / "b.dcm", labels, series), write(tmp_path / "c.dcm", labels * 0, series)
    assert again.SOPInstanceUID == made.SOPInstanceUID != other.SOPInstanceUID


def test_prediction_of_a_series_becomes_structures(series: Path, blobs: Path, tmp_path: Path) -> None:
    plan = replace(make_plan(read_dataset(blobs), memory=2**31), patch_size=[16, 16, 16])
    cases = find_images(series)
    expected, source = predict_case(Brightness(), cases[0], plan)
    assert expected.any()
    told = predict_folder(
        Brightness(), plan, cases, tmp_path / "out", suffix=".rtstruct.dcm", settings={"a": 1}
    )
    path = tmp_path / "out" / "case_0.rtstruct.dcm"
    assert not told
    found = read_segments(path, source, plan.label_names[1:])
    np.testing.assert_array_equal(np.asarray(plan.label_values)[found], expected)
    before = path.stat().st_mtime_ns
    predict_folder(Brightness(), plan, cases, tmp_path / "out", suffix=".rtstruct.dcm", settings={"a": 1})
    assert path.stat().st_mtime_ns == before  # it was there already
    with pytest.raises(UserError, match=r"case_0.nii.gz is no DICOM series, and RTSTRUCT refers to one"):
        predict_folder(
            Brightness(), plan, find_images(blobs / "imagesTr")[:1], tmp_path / "no", suffix=".rtstruct.dcm"
        )


def test_structures_are_scored(series: Path, labels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "references").mkdir()
    write_label(tmp_path / "references" / "a.nii.gz", labels, read_image(series))
    wrong = np.where(labels == 2, 0, labels)
    (tmp_path / "predictions").mkdir()
    write(tmp_path / "predictions" / "a.rtstruct.dcm", wrong, series)
    classes = {"one": 1, "two": 2, "three": 3}
    scores = evaluate_folders(tmp_path / "predictions", tmp_path / "references", labels=classes)
    assert [scores["metrics"][name]["dice"]["mean"] for name in classes] == [1, 0, 1]


def drawn(series: Path) -> tuple[Path, np.ndarray]:
    """A data set with structures that overlap: a lesion in an organ, and the body around both."""
    path = series.parents[1] / "labels" / "case_0.dcm"
    body = np.zeros(read_image(series).array.shape[1:], int)
    body[2:-2, 2:-2] = 1
    made = write(path, body, series, ["-", "Body"])
    inner = [np.zeros_like(body), np.zeros_like(body)]
    inner[0][4:10, 4:10], inner[1][6:8, 6:8] = 1, 1
    for number, (name, mask) in enumerate(zip(("Organ", "GTV"), inner, strict=True), start=2):
        other = write(path.with_name("other.dcm"), mask, series, ["-", name])
        for sequence in ("StructureSetROISequence", "ROIContourSequence"):
            (one,) = getattr(other, sequence)
            setattr(one, "ROINumber" if "ROINumber" in one else "ReferencedROINumber", number)
            getattr(made, sequence).append(one)
    path.with_name("other.dcm").unlink()
    made.save_as(path)
    return path, inner[0] + inner[1]


def test_structures_that_overlap_are_chosen(series: Path, tmp_path: Path) -> None:
    path, expected = drawn(series)
    dataset = list_dataset(series.parents[1])
    assert with_segments(dataset).label_names == ("background", "Body", "GTV", "Organ")
    with pytest.raises(
        UserError, match=r"'Body' and 'Organ' overlap in .* Choose .* with kanseg convert --only"
    ):
        read_segments(path, read_image(series), ["Body", "GTV", "Organ"])
    runner = CliRunner()
    chosen = ["--only", "organ", "--only", "GTV"]
    done = runner.invoke(app, ["convert", str(series.parents[1]), "-o", str(tmp_path / "out"), *chosen])
    assert done.exit_code == 0, done.output
    (case,) = read_dataset(tmp_path / "out").cases
    np.testing.assert_array_equal(read_label(case.label), expected)
    with pytest.raises(UserError, match=r"No label of .* has a segment 'GTW'. Did you mean 'GTV'\?"):
        with_segments(dataset, ["GTW"])


def test_what_names_no_class_cannot_be_chosen(series: Path, labels: np.ndarray) -> None:
    path = series.parents[1] / "labels" / "case_0.dcm"
    write(path, np.minimum(labels, 2), series, ["-", "Background", "organ"])
    dataset = list_dataset(series.parents[1])
    assert with_segments(dataset, ["organ"]).label_names == ("background", "organ")
    for only in ([], ["background"]):
        with pytest.raises(UserError, match=r"a segment called 'Background', which names no class"):
            with_segments(dataset, only)


def changed(path: Path, change) -> Path:
    file = pydicom.dcmread(path)
    for contour in file.ROIContourSequence[0].ContourSequence:
        change(contour)
    file.save_as(path)
    return path


def move(z: float):
    def change(contour) -> None:
        points = np.array(contour.ContourData, float).reshape(-1, 3) + np.array([0, 0, z])
        contour.ContourData = points.round(3).ravel().tolist()

    return change


def test_what_was_drawn_elsewhere_or_is_broken_is_refused(series: Path, tmp_path: Path) -> None:
    image = read_image(series)
    mask = np.zeros(image.array.shape[1:], int)
    mask[4:8, 4:8, 2:5] = 1

    def fresh() -> Path:
        write(tmp_path / "a.dcm", mask, series, ["-", "organ"])
        return tmp_path / "a.dcm"

    step = image.spacing[2]
    with pytest.raises(UserError, match=r"0.40 slices beside those of the image"):
        read_segments(changed(fresh(), move(0.4 * step)), image, ["organ"])
    with pytest.raises(UserError, match="outside the image"):
        read_segments(changed(fresh(), move(1000 * step)), image, ["organ"])
    with pytest.raises(UserError, match="numbers, not three a point"):
        read_segments(
            changed(fresh(), lambda c: setattr(c, "ContourData", c.ContourData[:-1])), image, ["organ"]
        )
    (tmp_path / "cut.dcm").write_bytes(fresh().read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.dcm"):
        read_segments(tmp_path / "cut.dcm", image, ["organ"])
    points = changed(fresh(), lambda c: setattr(c, "ContourGeometricType", "POINT"))
    assert not read_segments(points, image, ["organ"]).any()  # marks are no structure


def test_a_part_of_the_image_that_was_drawn_on_has_its_part_of_the_structure(
    series: Path, tmp_path: Path
) -> None:
    image = read_image(series)
    mask = np.zeros(image.array.shape[1:], int)
    mask[4:8, 4:8, 2:7] = 1
    write(tmp_path / "a.dcm", mask, series, ["-", "organ"])
    part = replace(image, array=image.array[..., :5])
    np.testing.assert_array_equal(read_segments(tmp_path / "a.dcm", part, ["organ"]), mask[..., :5])
