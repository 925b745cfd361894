"""Files in and out keep their geometry; damaged ones are refused with a reason, and nothing is half-written."""

from __future__ import annotations

import errno
import gzip
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture

from kanseg.data import images
from kanseg.data.dicom import dicom_files
from kanseg.data.images import Image, check_pair, read_image, read_label, write_array, write_label
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError

OBLIQUE = np.array(
    [[-0.9, 0.1, 0.3, 12], [0.2, 1.1, -0.2, -30], [-0.2, 0.3, 2.4, 7], [0, 0, 0, 1]], dtype=float
)


def save(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).normal(size=(7, 6, 5)).astype(np.float32)
    return save(tmp_path / "scan.nii.gz", array)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_label_map_lies_where_its_image_lies(tmp_path: Path, suffix: str) -> None:
    rotation, _ = np.linalg.qr(OBLIQUE[:3, :3])  # NRRD and MHA know rotations and spacings, no shear
    affine = OBLIQUE.copy()
    affine[:3, :3] = rotation * (0.8, 1.2, 3.0)
    image = read_image(save(tmp_path / "scan.nii.gz", np.zeros((7, 6, 5), np.float32), affine))
    labels = np.random.default_rng(1).integers(0, 4, (7, 6, 5))
    written = write_label(tmp_path / f"mask{suffix}", labels, image)
    back = read_image(written)
    np.testing.assert_array_equal(read_label(written), labels)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    check_pair(image, back)


def test_nifti_keeps_the_header_of_its_image(scan: Path, tmp_path: Path) -> None:
    source = nib.load(scan)
    source.header.set_xyzt_units("mm", "sec")
    source.set_sform(OBLIQUE, 1)
    source.set_qform(np.diag([1.5, 2.0, 2.5, 1.0]), 3)
    nib.save(source, tmp_path / "coded.nii.gz")
    image = read_image(tmp_path / "coded.nii.gz")
    written = nib.load(write_label(tmp_path / "mask.nii.gz", np.zeros((7, 6, 5), int), image, "uint16"))
    wanted = nib.load(tmp_path / "coded.nii.gz").header
    for key in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[key] == wanted[key]
    for key in ("pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        np.testing.assert_allclose(written.header[key], wanted[key], atol=1e-6)
    assert written.get_data_dtype() == np.uint16
    raw = gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    assert struct.unpack("<2f", raw[112:120]) == (1.0, 0.0)  # scl_slope, scl_inter


@pytest.mark.parametrize(
    ("field", "value"),
    [("quatern_b", 2), ("quatern_b", np.nan), ("pixdim", [1, 0.9, np.nan, 2.4, 1, 1, 1, 1])],
)
def test_a_qform_that_cannot_be_is_kept_beside_an_sform_that_holds(
    tmp_path: Path, field: str, value: Any
) -> None:
    """Readers go by the sform, so the image is read, and its label map has the same header."""
    source = nib.load(save(tmp_path / "scan.nii", np.zeros((7, 6, 5), np.float32)))
    source.set_qform(OBLIQUE, 1)
    nib.save(source, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    header = np.frombuffer(content, nib.nifti1.header_dtype, 1)
    header[field] = value
    (tmp_path / "scan.nii").write_bytes(content)
    image = read_image(tmp_path / "scan.nii")
    written = nib.load(write_label(tmp_path / "mask.nii.gz", np.zeros((7, 6, 5), int), image))
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "scan.nii").affine)
    for key in ("qform_code", "quatern_b", "quatern_c", "srow_x", "pixdim"):
        np.testing.assert_array_equal(written.header[key], nib.load(tmp_path / "scan.nii").header[key])


def test_units_that_nifti_does_not_know_are_millimetres(tmp_path: Path) -> None:
    """As ITK has it; nibabel refuses them."""
    content = bytearray(save(tmp_path / "scan.nii", np.zeros((7, 6, 5), np.float32)).read_bytes())
    np.frombuffer(content, nib.nifti1.header_dtype, 1)["xyzt_units"] = 255
    (tmp_path / "scan.nii").write_bytes(content)
    image = read_image(tmp_path / "scan.nii")
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-6)
    write_label(tmp_path / "mask.nii.gz", np.zeros((7, 6, 5), int), image)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_says_more_than_the_file_holds_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    """nibabel would take the memory for all that the header says: here 30 GB."""
    content = bytearray(save(tmp_path / "scan.nii", np.zeros((7, 6, 5), np.float32)).read_bytes())
    np.frombuffer(content, nib.nifti1.header_dtype, 1)["dim"][0, 1:4] = 2000
    path = tmp_path / f"lie{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    with pytest.raises(
        UserError, match=f"lie{suffix} (cannot be read .*expected|does not fit into the memory)"
    ):
        read_image(path)


def test_real_volumes_come_back_on_their_grid(shared_data: Path, tmp_path: Path) -> None:
    for case in (
        "ixi012_dlmuse/label.nii.gz",
        "pyradiomics_breast1/label.nrrd",
        "msd_spleen2_crop/label.nii.gz",
    ):
        image = read_image(shared_data / "volumes_misc" / case)
        labels = images.label_from(image)
        for suffix in (".nii.gz", ".nrrd", ".mha"):
            back = read_image(write_label(tmp_path / f"mask{suffix}", labels, image, "int32"))
            check_pair(image, back)
            np.testing.assert_array_equal(images.label_from(back), labels)


def test_nrrd_agrees_with_simpleitk(shared_data: Path) -> None:
    path = shared_data / "volumes_misc" / "pyradiomics_brain1" / "image.nrrd"
    image, itk = read_image(path), sitk.ReadImage(str(path))
    index = (3, 5, 7)
    lps = np.array(itk.TransformIndexToPhysicalPoint(index))
    np.testing.assert_allclose((image.affine @ (*index, 1))[:3], lps * (-1, -1, 1), atol=1e-4)
    assert image.array[(0, *index)] == itk[index]
    np.testing.assert_allclose(image.spacing, itk.GetSpacing(), rtol=1e-6)


def test_dicom_spacing_comes_from_the_positions_of_slices(shared_data: Path) -> None:
    folder = next(
        p for p in (shared_data / "dicom" / "ct_chaos_set3").rglob("*") if p.is_dir() and any(p.glob("*.dcm"))
    )
    assert read_image(folder, 3).spacing[2] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "name", ["mr_hitachi_oblique", "mr_jpeg2000", "mr_jpegls", "mr_hippocrop_1", "mr_philips_enhanced"]
)
def test_dicom_series_are_volumes(shared_data: Path, name: str) -> None:
    image = read_image(shared_data / "dicom" / name, 3)
    assert image.array.shape[0] == 1
    assert abs(np.linalg.det(image.affine[:3, :3])) > 0


BAD_DICOM = {
    "ct_gantry_tilt": "tilted gantry",
    "ct_same_position": "several slices at one position",
    "ct_missing_slice": "misses slices: the distances between them are 5.00, 10.00 mm",
    "ct_gantry_tilt_missing_slice": "misses slices",
    "mr_mixed_orientation": "different orientation",
}


@pytest.mark.parametrize("name", BAD_DICOM)
def test_dicom_that_is_no_volume_is_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(UserError, match=BAD_DICOM[name]):
        read_image(shared_data / "bad_inputs" / "dicom" / name)


def _frames(
    source: Path,
    out: Path,
    order: list[int],
    *,
    shift: float = 0,
    uneven: float = 0,
    turned: bool = False,
    scaled: bool = False,
) -> Path:
    """A file of many frames again, with these of its frames: each shifted sideways or scaled anew, every second moved
    towards the next, or one turned.
    """
    import pydicom

    (file,) = source.glob("*.dcm")
    described = pydicom.dcmread(file)
    pixels, frames = described.pixel_array, list(described.PerFrameFunctionalGroupsSequence)
    for number, frame in enumerate(frames):
        frame.PlanePositionSequence[0].ImagePositionPatient[1] += shift * number
        frame.PlanePositionSequence[0].ImagePositionPatient[0] += uneven * (number % 2)
        if scaled:
            scale = frame.PixelValueTransformationSequence[0]
            scale.RescaleSlope, scale.RescaleIntercept = str(0.5 * number + 2), str(-7 * number)
    if turned:
        frames[3].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    described.PerFrameFunctionalGroupsSequence = [frames[number] for number in order]
    described.PixelData, described.NumberOfFrames = pixels[order].tobytes(), len(order)
    described.save_as(out / "frames.dcm")
    return out


@pytest.mark.parametrize(
    ("order", "how", "why"),
    [
        ([0, 1, 2, 4, 5, 6, 7], {}, "misses slices: the distances between them are 1.20, 2.40 mm"),
        ([0, 1, 2, 3, 0, 1, 2, 3], {}, "several slices at one position"),
        ([0, 0, 1, 1, 2, 2, 3, 3], {}, "several slices at one position"),
        (list(range(8)), {"shift": 0.5}, "tilted gantry"),
        (list(range(8)), {"turned": True}, "different orientation"),
    ],
)
def test_frames_that_are_no_volume_are_refused(
    shared_data: Path, tmp_path: Path, order: list[int], how: dict[str, Any], why: str
) -> None:
    """ITK reads them in the order of the file, with a spacing of 1 where it finds none."""
    folder = _frames(shared_data / "dicom" / "mr_philips_enhanced", tmp_path, order, **how)
    for place in (folder, folder / "frames.dcm"):
        with pytest.raises(UserError, match=why):
            read_image(place)


def test_frames_stand_where_they_say_and_have_their_own_scales(shared_data: Path, tmp_path: Path) -> None:
    """ITK reads them in the order of the file, all with the scale of the first."""
    import pydicom

    source = shared_data / "dicom" / "mr_philips_enhanced"
    whole = read_image(source)
    order = [3, 0, 7, 1, 5, 2, 6, 4]
    mixed = read_image(_frames(source, tmp_path, order))
    np.testing.assert_allclose(mixed.affine, whole.affine, atol=1e-3)
    np.testing.assert_array_equal(mixed.array, whole.array)
    (file,) = source.glob("*.dcm")
    pixels = pydicom.dcmread(file).pixel_array.transpose(2, 1, 0)
    scaled = read_image(_frames(source, tmp_path, order, scaled=True))
    expected = pixels * (0.5 * np.arange(8) + 2) - 7 * np.arange(8)
    np.testing.assert_allclose(scaled.array[0], expected, atol=1e-3)


def test_slices_of_a_series_have_their_own_scales(shared_data: Path, tmp_path: Path) -> None:
    """ITK would give all of them the numbers of the first slice's type: those of one without fractions would wrap."""
    import pydicom

    source = shared_data / "dicom" / "mr_jpeg2000"
    whole = read_image(source)
    for number, file in enumerate(map(pydicom.dcmread, dicom_files(source))):
        file.RescaleSlope, file.RescaleIntercept = str(0.5 * number + 1), str(-1000 * number)
        file.save_as(tmp_path / f"{number}.dcm")
    found = read_image(tmp_path)
    np.testing.assert_allclose(
        found.array, whole.array * (0.5 * np.arange(4) + 1) - 1000 * np.arange(4), rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize("step", [1, -1])
def test_frames_in_order_are_the_volume_that_they_state(shared_data: Path, tmp_path: Path, step: int) -> None:
    source = shared_data / "dicom" / "mr_philips_enhanced"
    image = read_image(_frames(source, tmp_path, list(range(8))[::step]))
    whole = read_image(source)
    assert image.spacing == pytest.approx(whole.spacing, rel=1e-5)
    np.testing.assert_array_equal(image.array, whole.array[..., ::step])
    corner = whole.affine @ [0, 0, 0 if step > 0 else 7, 1]
    np.testing.assert_allclose(image.affine[:, 3], corner, atol=1e-3)


def test_frames_of_a_scanner_that_rounds_stand_where_they_say(shared_data: Path, tmp_path: Path) -> None:
    """ITK gives frames whose distances differ by a rounding a spacing of 1 and the origin 0."""
    source = shared_data / "dicom" / "mr_philips_enhanced"
    whole = read_image(source)
    moved = read_image(_frames(source, tmp_path, list(range(8)), uneven=0.02))
    assert np.abs(moved.affine - whole.affine).max() < 0.02


def test_frames_without_places_are_no_volume(shared_data: Path, tmp_path: Path) -> None:
    import pydicom

    (file,) = (shared_data / "dicom" / "mr_philips_enhanced").glob("*.dcm")
    described = pydicom.dcmread(file)
    del described.PerFrameFunctionalGroupsSequence
    described.save_as(tmp_path / "film.dcm")
    with pytest.raises(UserError, match="8 frames that do not tell where they lie"):
        read_image(tmp_path / "film.dcm")


def _spect(path: Path, gap: float, numbers: Sequence[int], **changes: Any) -> np.ndarray:
    """A reconstruction of nuclear medicine, whose detector alone tells where its first slice lies; its pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    pixels = np.random.default_rng(0).integers(0, 9000, (len(numbers), 5, 7)).astype(np.uint16)
    detector, header = Dataset(), Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [-20, 30.5, 7], [1, 0, 0, 0, 0.6, 0.8]
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.20", generate_uid()
    header.Modality, header.ImageType = "NM", ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
    header.SeriesInstanceUID, header.StudyInstanceUID = generate_uid(), generate_uid()
    header.Rows, header.Columns, header.NumberOfFrames = 5, 7, len(numbers)
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation, header.PixelData = 15, 0, pixels.tobytes()
    header.PixelSpacing, header.SpacingBetweenSlices, header.SliceThickness = [4.5, 4.0], gap, abs(gap) + 1
    header.FrameIncrementPointer, header.SliceVector = 0x00540080, list(numbers)
    header.NumberOfSlices, header.DetectorInformationSequence = len(numbers), [detector]
    for keyword, value in changes.items():
        setattr(header, keyword, value)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return pixels


@pytest.mark.parametrize("gap", [3.0, -3.0])
def test_slices_of_nuclear_medicine_lie_behind_the_first_or_before_it(tmp_path: Path, gap: float) -> None:
    """As DICOM PS3.3 C.8.4.15 says: along rows x columns of the first frame, by the sign of the spacing."""
    pixels = _spect(tmp_path / "a.dcm", gap, [1, 2, 3, 4])
    for place in (tmp_path, tmp_path / "a.dcm"):
        image = read_image(place)
        np.testing.assert_array_equal(image.array[0], pixels.transpose(2, 1, 0))
        steps = np.column_stack([[4.0, 0, 0], [0, 0.6 * 4.5, 0.8 * 4.5], gap * np.array([0, -0.8, 0.6])])
        expected = np.diag([-1.0, -1.0, 1.0]) @ np.column_stack([steps, [-20, 30.5, 7]])  # LPS to RAS
        np.testing.assert_allclose(image.affine[:3], expected, atol=1e-9)
    if gap > 0:  # ITK takes every spacing as a positive one
        theirs = sitk.ReadImage(str(tmp_path / "a.dcm"))
        np.testing.assert_allclose(theirs.GetOrigin(), (-20, 30.5, 7))
        np.testing.assert_allclose(theirs.GetSpacing(), (4, 4.5, 3))
        np.testing.assert_allclose(theirs.GetDirection(), (1, 0, 0, 0, 0.6, -0.8, 0, 0.8, 0.6))


def test_slices_of_nuclear_medicine_stand_by_their_numbers(tmp_path: Path) -> None:
    pixels = _spect(tmp_path / "a.dcm", 3.0, [2, 1, 4, 3])
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.dcm").array[0], pixels[[1, 0, 3, 2]].transpose(2, 1, 0)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"SliceVector": [1, 2, 1, 2]},  # of two times
        {"FrameIncrementPointer": [0x00540080, 0x00540060]},  # gated
        {"SpacingBetweenSlices": None},
        {"DetectorInformationSequence": []},
    ],
)
def test_what_is_no_volume_of_nuclear_medicine_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    _spect(tmp_path / "a.dcm", 3.0, [1, 2, 3, 4], **changes)
    with pytest.raises(UserError, match="4 frames that do not tell where they lie"):
        read_image(tmp_path / "a.dcm")


def _lacks(keyword: str) -> Callable[[Any, int], None]:
    def change(header: Any, number: int) -> None:
        if number == 2:
            delattr(header, keyword)

    return change


def _cut_pixels(header: Any, number: int) -> None:
    if number == 2:
        header.PixelData = header.PixelData[:2000]


def _fewer_rows(header: Any, number: int) -> None:
    if number == 2:
        header.Rows, header.PixelData = header.Rows - 2, header.PixelData[: -4 * header.Columns]


def _larger_pixels(header: Any, number: int) -> None:
    if number == 2:
        header.PixelSpacing = [2 * header.PixelSpacing[0], header.PixelSpacing[1]]


def _inverted(header: Any, number: int) -> None:
    header.PhotometricInterpretation = "MONOCHROME1"


def _move(by: Callable[[int], Sequence[float]]) -> Callable[[Any, int], None]:
    def change(header: Any, number: int) -> None:
        header.ImagePositionPatient = [float(x) for x in by(number)]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]

    return change


def _says(keyword: str, text: bytes) -> Callable[[Any, int], None]:
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    def change(header: Any, number: int) -> None:
        tag = Tag(keyword)
        header._dict[tag] = RawDataElement(tag, "DS", len(text), text, 0, False, True)

    return change


def _with_table(header: Any, number: int) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "HU", b"\0\0\1\0"
    header.ModalityLUTSequence = [table]


BAD_SLICES = {
    "table": (_with_table, "what its numbers mean by a table"),
    "comma": (_says("ImagePositionPatient", b"1,5\\1,5\\1,5 "), "has no usable ImagePositionPatient"),
    "two numbers": (_says("ImageOrientationPatient", b"1\\0 "), "has no usable ImageOrientationPatient"),
    "one number": (_says("PixelSpacing", b"1 "), "has no usable PixelSpacing"),
    "infinite": (_says("PixelSpacing", b"inf\\1 "), "has no usable PixelSpacing"),
    "flat pixels": (_says("PixelSpacing", b"0\\0 "), "has no usable PixelSpacing"),
    "scaled by a comma": (_says("RescaleSlope", b"1,5 "), "cannot be read as DICOM .*'1,5'"),
    "no position": (_lacks("ImagePositionPatient"), "lacks ImagePositionPatient"),
    "no orientation": (_lacks("ImageOrientationPatient"), "lacks ImageOrientationPatient"),
    "no pixel size": (_lacks("PixelSpacing"), "lacks PixelSpacing"),
    "cut": (_cut_pixels, "is cut short: it holds 2000 bytes of pixels"),
    "rows": (_fewer_rows, "mixes slices of .* pixels"),
    "pixel size": (_larger_pixels, "mixes slices of .* mm a pixel"),
    "inverted": (_inverted, "is MONOCHROME1"),
    "two times": (_move(lambda n: (0, 0, n % 16)), "several slices at one position"),
    "creeping": (_move(lambda n: (0, 0, n + 0.045 * max(n - 16, 0))), "beside an even row"),
    "leaning": (_move(lambda n: (0, 0.015 * 5 * n, 5 * n)), "tilted gantry"),
}


def _series(source: Path, out: Path, change: Callable[[Any, int], None]) -> Path:
    """A series of single slices again, each header changed."""
    import pydicom

    out.mkdir()
    for number, file in enumerate(map(pydicom.dcmread, dicom_files(source))):
        change(file, number)
        file.save_as(out / f"{number}.dcm")
    return out


def test_bright_is_high_in_a_radiograph_whose_low_numbers_are_bright(
    shared_data: Path, tmp_path: Path
) -> None:
    import pydicom

    header = pydicom.dcmread(dicom_files(shared_data / "dicom" / "mr_hippocrop_1")[0])
    header.Modality, header.PhotometricInterpretation = "DX", "MONOCHROME1"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
    header.RescaleSlope, header.RescaleIntercept = 1, 0
    stored = np.random.default_rng(0).integers(0, 2**12, (header.Rows, header.Columns), dtype=np.uint16)
    header.PixelData = stored.tobytes()
    (tmp_path / "ray").mkdir()
    header.save_as(tmp_path / "ray" / "1.dcm")
    read = read_image(tmp_path / "ray").array.squeeze()
    assert np.array_equal(np.sort(read.ravel()), np.sort((2**12 - 1 - stored).ravel()))


@pytest.mark.parametrize("name", BAD_SLICES)
def test_slices_that_would_be_misread_are_refused(name: str, shared_data: Path, tmp_path: Path) -> None:
    """ITK takes a spacing of 1, the place of the first, or the pixels of the slice before, and says nothing."""
    change, why = BAD_SLICES[name]
    with pytest.raises(UserError, match=why):
        read_image(_series(shared_data / "dicom" / "mr_hippocrop_1", tmp_path / "series", change))


def test_a_slice_alone_is_as_thick_as_it_says(shared_data: Path, tmp_path: Path) -> None:
    """ITK takes 1 mm."""
    import pydicom

    assert read_image(shared_data / "dicom" / "ct1_with_rtstruct").spacing[2] == 3.0
    folder = _frames(shared_data / "dicom" / "mr_philips_enhanced", tmp_path, [3])
    described = pydicom.dcmread(folder / "frames.dcm")
    (measures,) = described.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.SliceThickness = 2.5
    for part in (described, measures):
        part.pop("SpacingBetweenSlices", None)
    described.save_as(folder / "frames.dcm")
    assert read_image(folder).spacing[2] == 2.5


def test_images_that_refer_to_other_objects_are_images(shared_data: Path, tmp_path: Path) -> None:
    """Scanners write which presentation state or raw data belong to an image into its header."""
    import pydicom

    def refer(header: Any, number: int) -> None:
        other = pydicom.Dataset()
        other.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.11.1"
        other.ReferencedSOPInstanceUID = "1.2.3"
        header.ReferencedImageSequence = [other]

    folder = _series(shared_data / "dicom" / "mr_hippocrop_1", tmp_path / "series", refer)
    assert [case.images for case in find_images(folder)] == [(folder,)]
    whole = read_image(shared_data / "dicom" / "mr_hippocrop_1")
    np.testing.assert_array_equal(read_image(folder).array, whole.array)


@pytest.mark.parametrize("suffix", [".dcm", "", ".IMA"])
def test_a_dicom_slice_that_is_cut_short_is_named(suffix: str, shared_data: Path, tmp_path: Path) -> None:
    """The last slice: without it the others still make a regular volume."""
    (tmp_path / "series").mkdir()
    for file in sorted((shared_data / "dicom" / "mr_ge_oblique").iterdir()):
        last = tmp_path / "series" / f"{file.stem}{suffix}"
        last.write_bytes(file.read_bytes())
    last.write_bytes(last.read_bytes()[:-5000])
    with pytest.raises(UserError, match=f"{last.name} cannot be read as DICOM"):
        read_image(tmp_path / "series")


@pytest.mark.parametrize("kind", ["1.2.840.10008.5.1.4.1.1.9.1.1", "1.3.12.2.1107.5.9.1"])
def test_objects_without_images_lie_beside_a_series(kind: str, shared_data: Path, tmp_path: Path) -> None:
    """An electrocardiogram, and a maker's own notes."""
    import pydicom

    source = shared_data / "dicom" / "mr_hippocrop_1"
    shutil.copytree(source, tmp_path / "series")
    other = pydicom.dcmread(dicom_files(source)[0], stop_before_pixels=True)
    other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = kind
    other.SeriesInstanceUID = other.SOPInstanceUID = "1.2.3"
    del other.Rows, other.Columns
    other.save_as(tmp_path / "series" / "other.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "series").array, read_image(source).array)


def test_two_slices_are_a_volume(shared_data: Path) -> None:
    """Their positions give the spacing, and nothing contradicts it."""
    assert read_image(shared_data / "bad_inputs" / "dicom" / "mr_two_slices").array.shape[-1] == 2


def test_several_series_in_one_folder_are_named(shared_data: Path, tmp_path: Path) -> None:
    """Each by what a person knows it by, and by a file of it: whoever must part them finds them."""
    import pydicom

    for name in ("mr_jpeg2000", "mr_hitachi_oblique"):
        for number, file in enumerate(map(pydicom.dcmread, dicom_files(shared_data / "dicom" / name))):
            file.SeriesDescription = f"{name} again"
            file.save_as(tmp_path / f"{name}_{number}.dcm")
            last = str(file.SeriesInstanceUID)[-12:]
    count = len(list(tmp_path.glob(f"{name}_*")))
    expected = rf"has 2 DICOM series; .*{name} again \(MR, {count} files such as {name}_\d+.dcm, series \.\.\.{last}\)"
    with pytest.raises(UserError, match=expected):
        read_image(tmp_path)


def test_a_label_drawn_on_a_dicom_series_lies_on_its_grid(shared_data: Path) -> None:
    folder = shared_data / "dicom" / "ct_chaos_set3"
    check_pair(read_image(folder / "series"), read_image(folder / "liver_label.nii.gz"))


def test_odd_nifti(shared_data: Path) -> None:
    """Every file of bad_inputs/nifti that is odd by itself; pairs stand in the next test."""
    folder = shared_data / "bad_inputs" / "nifti"
    with pytest.raises(UserError, match=r"structured or complex voxels .* RGB"):
        read_image(folder / "rgb_voxels_image.nii.gz")
    assert read_image(folder / "dmri_4d_image.nii.gz").array.shape[0] == 4
    assert set(np.unique(read_label(folder / "hippocampus_003_label_float32.nii.gz"))) == {0, 1, 2}
    brain = read_label(folder / "brats_0001_brainmask_float64.nii.gz")
    assert brain.sum() > 1e6  # truncation would make it empty
    with pytest.raises(UserError, match="channels that differ"):
        read_label(folder / "dmri_4d_image.nii.gz")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("fpg_t2_image", "fpg_t1space_label"),
        ("ct_112slices_image", "ct_30slices_label"),
        ("hippocampus_003_image", "hippocampus_281_label"),
    ],
)
def test_pairs_on_different_grids_are_refused(shared_data: Path, image: str, label: str) -> None:
    folder = shared_data / "bad_inputs" / "nifti"
    with pytest.raises(UserError, match="different grids: shapes"):
        check_pair(read_image(folder / f"{image}.nii.gz"), read_image(folder / f"{label}.nii.gz"))


def test_one_shape_in_two_places_is_refused(tmp_path: Path, scan: Path) -> None:
    moved = OBLIQUE.copy()
    moved[0, 3] += 5
    other = save(tmp_path / "moved.nii.gz", np.zeros((7, 6, 5), np.float32), moved)
    with pytest.raises(UserError, match="grids up to 5 mm apart"):
        check_pair(read_image(scan), read_image(other))


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_colours_are_channels_and_opacity_is_none(tmp_path: Path, mode: str, channels: int) -> None:
    picture = Picture.fromarray(np.arange(72, dtype=np.uint8).reshape(8, 9)).convert(mode)
    picture.save(tmp_path / "picture.tif")
    assert read_image(tmp_path / "picture.tif", 2).array.shape == (channels, 8, 9)


def test_colour_masks_are_read_as_one_channel(shared_data: Path) -> None:
    folder = shared_data / "bad_inputs" / "png"
    assert set(np.unique(read_label(folder / "benign (54)_mask_1.png"))) == {0, 255}
    assert set(np.unique(read_label(folder / "benign (54)_mask.png"))) == {0, 255}
    assert not read_label(folder / "normal (2)_mask.png").any()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".png"])
def test_truncated_files_are_refused(tmp_path: Path, share: float, suffix: str) -> None:
    path = tmp_path / f"whole{suffix}"
    if suffix == ".png":
        Picture.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(path)
    else:
        array = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
        image = Image(array[None], np.eye(4), path, 3)
        write_array(path, array, image, np.dtype("float32"))
    cut = tmp_path / f"cut{suffix}"
    content = path.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"cut.* cannot be read .* (damaged|cut short)"):
        read_image(cut)


@pytest.mark.parametrize("data", ["LOCAL", "voxels.zraw"])
@pytest.mark.parametrize("line", ["{} = {}\n", "{}={}\r\n"], ids=["ITK", "others"])
def test_compressed_meta_images_are_read_whole_or_refused(tmp_path: Path, data: str, line: str) -> None:
    """ITK fills damaged ones up with whatever lies in memory, and says nothing."""
    array = np.random.default_rng(0).integers(-99, 99, (5, 6, 7), dtype=np.int16)
    voxels = zlib.compress(array.tobytes())
    image = {"ObjectType": "Image", "NDims": 3, "DimSize": "7 6 5", "ElementType": "MET_SHORT"}
    image |= {"CompressedData": "true", "CompressedDataSize": len(voxels), "ElementDataFile": data}
    header = "".join(line.format(key, value) for key, value in image.items()).encode()
    path = tmp_path / f"scan.{'mha' if data == 'LOCAL' else 'mhd'}"

    def read(stored: bytes) -> np.ndarray:
        path.write_bytes(header + stored * (data == "LOCAL"))
        (tmp_path / "voxels.zraw").write_bytes(stored)
        return read_image(path).array

    np.testing.assert_array_equal(read(voxels)[0], array.T)
    middle = len(voxels) // 2
    damaged = (voxels[:middle], voxels[:middle] + b"\xff\0" + voxels[middle + 2 :], b"")
    for stored in (*damaged, zlib.compress(array[:3].tobytes())):
        with pytest.raises(UserError, match="scan.mh. cannot be read .*damaged"):
            read(stored)


def test_meta_images_whose_voxels_are_missing_say_which(tmp_path: Path) -> None:
    image = "NDims = 3\nDimSize = 2 2 3\nElementType = MET_UCHAR\nElementDataFile = "
    (tmp_path / "scan.mhd").write_text(f"{image}voxels.raw\n")
    with pytest.raises(UserError, match="scan.mhd lie in voxels.raw"):
        read_image(tmp_path / "scan.mhd")
    for number in range(3):
        (tmp_path / f"{number}.raw").write_bytes(bytes(4))
    (tmp_path / "scan.mhd").write_text(f"{image}LIST\n0.raw\n1.raw\n2.raw\n")
    assert read_image(tmp_path / "scan.mhd").array.shape == (1, 2, 2, 3)
    (tmp_path / "scan.mhd").write_text(f"{image}LIST\n0.raw\n1.raw\n")
    with pytest.raises(UserError, match="lists 2 slices, 3 are expected"):
        read_image(tmp_path / "scan.mhd")


def test_volumes_of_itk_without_voxels_grid_or_real_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(path))
    whole = path.read_bytes()
    for before, after, why in (
        (b"DimSize = 5", b"DimSize = 0", "no voxel"),
        (b"ElementSpacing = 1 ", b"ElementSpacing = 1e-30 ", "no usable geometry"),
    ):
        path.write_bytes(whole.replace(before, after))
        with pytest.raises(UserError, match=f"scan.mha has {why}"):
            read_image(path)
    header = "NRRD0004\ntype: float\ndimension: 4\nsizes: 2 3 3 3\nkinds: complex domain domain domain\n"
    (tmp_path / "c.nrrd").write_bytes(f"{header}endian: little\nencoding: raw\n\n".encode() + bytes(216))
    with pytest.raises(UserError, match="c.nrrd has complex voxels"):
        read_image(tmp_path / "c.nrrd")


def test_corrupted_and_foreign_content_is_refused(scan: Path, tmp_path: Path) -> None:
    image = read_image(scan)
    write_array(tmp_path / "whole.mha", image.array[0], image, np.dtype("float32"))
    for whole, name in ((scan, "corrupt.nii.gz"), (tmp_path / "whole.mha", "corrupt.mha")):
        content = bytearray(whole.read_bytes())
        content[-len(content) // 4] ^= 0xFF
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text.nii.gz").write_text("no image")
    for name in ("corrupt.nii.gz", "corrupt.mha", "text.nii.gz"):
        with pytest.raises(UserError, match="cannot be read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_counted_and_refused(tmp_path: Path, value: float) -> None:
    array = np.zeros((5, 5, 5), np.float32)
    array[1, 2, 3] = value
    with pytest.raises(UserError, match="has 1 voxels that are NaN or infinite"):
        read_image(save(tmp_path / "holes.nii.gz", array))


def test_what_is_no_label_map_is_refused(scan: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no label map: it holds"):
        read_label(scan)
    with pytest.raises(UserError, match="3 channels that differ"):
        read_label(save(tmp_path / "three.nii.gz", np.arange(375, dtype=np.float32).reshape(5, 5, 5, 3)))


def test_the_wrong_dimension_is_refused(scan: Path, shared_data: Path) -> None:
    with pytest.raises(UserError, match="is 3D, 2D was expected"):
        read_image(scan, 2)
    with pytest.raises(UserError, match="is 2D, 3D was expected"):
        read_image(shared_data / "bad_inputs" / "png" / "normal (2).png", 3)


def test_a_full_disk_leaves_nothing_behind(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = read_image(scan), tmp_path / "out"
    write_label(out / "mask.nii.gz", np.ones((7, 6, 5), int), image)
    before = (out / "mask.nii.gz").read_bytes()

    def full(file: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images.nib, "save", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_label(out / "mask.nii.gz", np.zeros((7, 6, 5), int), image)
    assert [p.name for p in out.iterdir()] == ["mask.nii.gz"]
    assert (out / "mask.nii.gz").read_bytes() == before


def test_an_unwritable_place_is_explained(scan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_label(tmp_path / "file" / "mask.nii.gz", np.zeros((7, 6, 5), int), read_image(scan))


def test_labels_that_do_not_fit_are_refused(scan: Path, tmp_path: Path) -> None:
    image = read_image(scan)
    with pytest.raises(UserError, match="do not fit uint8"):
        write_label(tmp_path / "mask.nii.gz", np.full((7, 6, 5), 300), image)
    with pytest.raises(UserError, match="shape"):
        write_label(tmp_path / "mask.nii.gz", np.zeros((7, 6, 4), int), image)
    for name in ("mask.xyz", "mask.jpg", "mask.mhd"):
        with pytest.raises(UserError, match="unknown format"):
            write_label(tmp_path / name, np.zeros((7, 6, 5), int), image)
    with pytest.raises(UserError, match=r"a picture holds 2D labels .* Write .nii.gz"):
        write_label(tmp_path / "mask.png", np.zeros((7, 6, 5), int), image)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_channels_of_a_tiff_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    """Grey and a second channel that is said to be no opacity."""
    Picture.fromarray(np.zeros((4, 5, 2), np.uint8), "LA").save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").array.shape == (1, 4, 5)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    entry = content.index(struct.pack("<HHI", 338, 3, 1))  # ExtraSamples, one short
    content[entry + 8 : entry + 10] = struct.pack("<H", 0)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=r"without them, or each channel as a file of its own, a_0000.tif"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_them_all(tmp_path: Path, suffix: str, channels: int) -> None:
    colours = np.random.default_rng(0).integers(0, 2**16, (7, 5, channels), np.uint16)
    path = tmp_path / f"deep{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), path)
    image = read_image(path)
    np.testing.assert_array_equal(image.array, np.moveaxis(colours, -1, 0)[:3])
    again = write_array(tmp_path / f"again{suffix}", image.array, image, np.dtype("uint16"))
    np.testing.assert_array_equal(read_image(again).array, image.array)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
def test_numbers_of_a_tiff_have_the_sign_that_it_says(tmp_path: Path, dtype: type) -> None:
    """Pillow takes those of 8 bits for positive ones, and those of 32 bits for others."""
    limits = np.iinfo(dtype)
    array = np.array([[limits.min, 1, 2], [limits.max, 3, 4]], dtype)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "scan.tif"))
    np.testing.assert_array_equal(read_image(tmp_path / "scan.tif").array[0], array.astype(np.float32))


def test_a_picture_that_is_too_large_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Picture.new("L", (50, 50)).save(tmp_path / "slide.png")
    monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="slide.png is too large for a picture .*2500 pixels"):
        read_image(tmp_path / "slide.png")


def test_deep_colours_that_would_lose_bits_are_refused(tmp_path: Path) -> None:
    deep = np.zeros((7, 5, 3), np.uint16)
    path = tmp_path / "planar.tif"
    sitk.WriteImage(sitk.GetImageFromArray(deep, isVector=True), path)
    content = path.read_bytes()
    planar = content.replace(struct.pack("<HHI", 284, 3, 1) + b"\1", struct.pack("<HHI", 284, 3, 1) + b"\2")
    assert planar != content
    path.write_bytes(planar)
    with pytest.raises(UserError, match="16 bits a channel.* Save it as a plain 16-bit RGB PNG"):
        read_image(path)
