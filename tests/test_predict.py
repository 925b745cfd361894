"""Prediction on the image's own grid, and what it refuses."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from rich.console import Console
from torch import Tensor, nn

from kanseg.data.images import read_image
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.inference.logits import whole_logits
from kanseg.inference.predict import predict_case, predict_folder

OBLIQUE = np.array(
    [[-0.9, 0.1, 0.3, 12], [0.2, 1.1, -0.2, -30], [-0.2, 0.3, 2.4, 7], [0, 0, 0, 1]], dtype=float
)


class Brightness(nn.Module):
    """A stand-in whose answer is known: class 1 where the normalised image is high, class 2 where it is highest."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([1.0 - x, x, 2 * x - 2.2], dim=1)


def by_brightness(image: np.ndarray) -> np.ndarray:
    x = (image - image.mean()) / image.std()
    return np.argmax([1.0 - x, x, 2 * x - 2.2], axis=0)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([-1, -1, 1.5, 1]),
        np.diag([1, 1, 1.5, 1]),
        np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]]),
    ],
    ids=["LPS", "RAS", "PIL"],
)
def test_prediction_on_turned_axes_is_exact(plan: Plan, tmp_path: Path, affine: np.ndarray) -> None:
    array = np.random.default_rng(0).normal(size=(18, 17, 19)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine.astype(float)), tmp_path / "scan.nii.gz")
    case = find_images(tmp_path / "scan.nii.gz")[0]
    labels, image = predict_case(Brightness(), case, plan)
    np.testing.assert_array_equal(labels, by_brightness(array))
    np.testing.assert_allclose(image.affine, affine)


def test_prediction_on_an_oblique_grid_keeps_it(plan: Plan, tmp_path: Path) -> None:
    places = np.indices((40, 36, 20))
    array = np.sin(places[0] / 6) + np.cos(places[1] / 5) + np.sin(places[2] / 4)
    nib.save(nib.Nifti1Image(array.astype(np.float32), OBLIQUE), tmp_path / "scan.nii.gz")
    assert not predict_folder(Brightness(), plan, find_images(tmp_path / "scan.nii.gz"), tmp_path / "out")
    mask = nib.load(tmp_path / "out" / "scan.nii.gz")
    np.testing.assert_allclose(mask.affine, OBLIQUE, atol=1e-6)
    assert mask.shape == array.shape
    assert (np.asarray(mask.dataobj) == by_brightness(array)).mean() > 0.9  # normalised on another grid


def test_an_image_smaller_than_the_patch_is_predicted(plan: Plan) -> None:
    logits = whole_logits(Brightness(), torch.randn(1, 1, 5, 20, 3), plan)
    assert [one.shape for one in logits] == [(5, 20, 3)] * 3


def test_mirroring_averages_over_the_plans_axes(plan: Plan) -> None:
    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(x.shape[2], dtype=x.dtype).view(1, 1, -1, 1, 1).expand_as(x).clone()

    image = torch.zeros(1, 1, 16, 16, 16)
    assert whole_logits(Ramp(), image, plan, tta=True)[0].std() > 1  # the plan mirrors nothing
    mirrored = whole_logits(Ramp(), image, replace(plan, mirror_axes=[0]), tta=True)[0]
    torch.testing.assert_close(mirrored, torch.full_like(mirrored, 7.5))


def test_a_folder_goes_on_when_a_case_fails(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(blobs / "imagesTr", scans)
    whole = (scans / "case_1.nii.gz").read_bytes()
    (scans / "case_1.nii.gz").write_bytes(whole[: len(whole) // 2])
    mapped = replace(plan, label_values=[0, 7, 300], label_dtype="uint16")
    failures = predict_folder(Brightness(), mapped, find_images(scans), tmp_path / "out", probabilities=True)
    assert list(failures) == ["case_1"]
    assert not list((tmp_path / "out").glob("case_1*"))
    assert not list((tmp_path / "out").glob(".part*"))
    mask = nib.load(tmp_path / "out" / "case_0.nii.gz")
    assert mask.get_data_dtype() == np.uint16
    assert set(np.unique(mask.dataobj)) <= {0, 7, 300}
    np.testing.assert_allclose(mask.affine, nib.load(scans / "case_0.nii.gz").affine)
    chances = [read_image(p).array for p in sorted((tmp_path / "out").glob("case_0_prob_*"))]
    np.testing.assert_allclose(sum(chances), 1, atol=1e-5)


def test_exchanged_channels_are_told_by_the_numbers_of_the_file(plan: Plan, tmp_path: Path) -> None:
    """Normalised ones, which may stand in their place, lie in the range of no channel."""

    class First(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :1])

    two = replace(plan, channel_names=["T1", "T2"], normalization=[{"scheme": "zscore"}] * 2)
    two.fingerprint = {"channels": [{"middle": [90.0, 110.0]}, {"middle": [10.0, 20.0]}]}
    random = np.random.default_rng(0)
    levels = np.stack([random.normal(mean, 1, (20, 20, 20)) for mean in (100, 15)], axis=-1)
    said = {}
    for name, array in (("right", levels), ("exchanged", levels[..., ::-1])):
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([*plan.spacing, 1.0])), path)
        screen = Console(file=io.StringIO(), width=200)
        assert not predict_folder(
            First(), two, find_images(path, channels=2), tmp_path / "out", console=screen
        )
        said[name] = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "are these channels exchanged?" in said["exchanged"]
    assert "exchanged?" not in said["right"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_finished_case_is_known_again_whatever_the_data_set_is_called(
    plan: Plan, blobs: Path, tmp_path: Path, suffix: str
) -> None:
    """The header of a NIfTI file is ASCII, and others take no name that is no UTF-8."""
    cases = find_images(blobs / "imagesTr")[:1]
    for said in ("->", "is there already"):
        told = Console(file=io.StringIO(), width=200)
        how: dict[str, Any] = {"suffix": suffix, "settings": {}, "description": "kanseg M\u00f6wen \udcfc"}
        assert not predict_folder(Brightness(), plan, cases, tmp_path, console=told, **how)
        assert f"case_0 {said}" in told.file.getvalue()  # type: ignore[attr-defined]


def test_a_finished_case_lacks_none_of_its_maps(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """A call with --again that is killed has removed them before it makes new ones."""
    cases = find_images(blobs / "imagesTr")[:1]
    how: dict[str, Any] = {"settings": {}, "probabilities": True, "console": Console(quiet=True)}
    assert not predict_folder(Brightness(), plan, cases, tmp_path, **how)
    made = sorted(tmp_path.iterdir())
    gone = next(path for path in made if "_prob_" in path.name)
    gone.unlink()
    assert not predict_folder(Brightness(), plan, cases, tmp_path, **how)
    assert sorted(tmp_path.iterdir()) == made


def test_names_are_told_as_they_are(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """A name may look like what makes text bold or ends it."""
    told = Console(file=io.StringIO(), width=200)
    folder = tmp_path / "of [bold" / "][" / "b]"
    folder.mkdir(parents=True)
    for name in ("x[red].nii.gz", "damaged[red].nii.gz"):
        shutil.copy(blobs / "imagesTr" / "case_0.nii.gz", folder / name)
    (folder / "damaged[red].nii.gz").write_bytes(b"")
    predict_folder(Brightness(), plan, find_images(folder), folder / "out", console=told)
    text = told.file.getvalue()  # type: ignore[attr-defined]
    assert f"x[red] -> {folder / 'out' / 'x[red].nii.gz'}" in text
    assert f"damaged[red] failed: {folder / 'damaged[red].nii.gz'} cannot be read" in text


def test_a_folder_that_cannot_be_made_costs_no_prediction(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """The case fails before the network runs on it."""
    (tmp_path / "file").write_text("")
    network, calls = Brightness(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    failures = predict_folder(network, plan, find_images(blobs / "imagesTr"), tmp_path / "file" / "out")
    assert failures
    assert all("Choose another folder" in words for words in failures.values())
    assert not calls


def test_a_case_that_needs_too_much_memory_does_not_stop_the_others(
    plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    class Greedy(Brightness):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("can't allocate memory")
            return super().forward(x)

    cases = find_images(blobs / "imagesTr")[:3]
    assert predict_folder(Greedy(), plan, cases, tmp_path) == {"case_0": "can't allocate memory"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case_1.nii.gz", "case_2.nii.gz"]


def test_an_image_that_is_not_there_does_not_stop_the_others(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    scan = blobs / "imagesTr" / "case_1.nii.gz"
    for name, source in (("a", tmp_path / "gone.nii.gz"), ("b", scan)):
        (tmp_path / f"{name}.nii.gz").symlink_to(source)
    cases, out = find_images(tmp_path), tmp_path / "out"
    assert list(predict_folder(Brightness(), plan, cases, out, settings={"models": []})) == ["a"]
    assert [path.name for path in out.iterdir()] == ["b.nii.gz"]


def test_a_label_map_never_replaces_an_image_or_another(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    scan = Path(shutil.copy(blobs / "imagesTr" / "case_0.nii.gz", scans))
    before = scan.read_bytes()
    for out in (scans, scan):
        with pytest.raises(UserError, match="would replace .*an image to be segmented"):
            predict_folder(Brightness(), plan, find_images(scans), out)
    assert scan.read_bytes() == before
    nib.save(nib.load(scan), scans / "case_0.nii")
    with pytest.raises(UserError, match="would replace .*the label map of"):
        predict_folder(Brightness(), plan, find_images(scans), tmp_path / "out", suffix=".mha")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e3), ("meter", 1e-3)])
def test_units_of_nifti_are_read_and_kept(
    plan: Plan, blobs: Path, tmp_path: Path, unit: str, factor: float
) -> None:
    image = nib.load(blobs / "imagesTr" / "case_0.nii.gz")
    affine = np.diag([factor, factor, factor, 1]) @ image.affine
    other = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    other.header.set_xyzt_units(unit)
    nib.save(other, tmp_path / "case_0.nii.gz")
    np.testing.assert_allclose(
        read_image(tmp_path / "case_0.nii.gz").spacing, image.header.get_zooms(), rtol=1e-5
    )
    for folder in (tmp_path, blobs / "imagesTr"):
        cases = [case for case in find_images(folder) if case.id == "case_0"]
        assert predict_folder(Brightness(), plan, cases, tmp_path / folder.name) == {}
    mask = nib.load(tmp_path / tmp_path.name / "case_0.nii.gz")
    wanted = nib.load(tmp_path / "imagesTr" / "case_0.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(wanted.dataobj))
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.header.get_xyzt_units()[0] == unit


def test_outputs_that_cannot_be_are_refused_before_anything_is_predicted(
    plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    cases = find_images(blobs / "imagesTr")[:1]
    with pytest.raises(UserError, match=r"is no DICOM series"):
        predict_folder(Brightness(), plan, cases, tmp_path / "mask.dcm")
    with pytest.raises(UserError, match=r"Add --format nii\.gz"):
        predict_folder(Brightness(), plan, cases, tmp_path / "out", suffix=".png", probabilities=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "written"), [(".mhd", ".mha"), (".nhdr", ".nrrd")])
def test_images_in_two_files_get_a_label_map_in_one(
    plan: Plan, blobs: Path, tmp_path: Path, given: str, written: str
) -> None:
    sitk.WriteImage(sitk.ReadImage(str(blobs / "imagesTr" / "case_0.nii.gz")), str(tmp_path / f"scan{given}"))
    assert predict_folder(Brightness(), plan, find_images(tmp_path / f"scan{given}"), tmp_path / "out") == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"scan{written}"]


def test_off_a_terminal_long_predictions_say_how_far_they_are(
    plan: Plan,
    blobs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kanseg.progress.PAUSE", 0)
    predict_folder(Brightness(), plan, find_images(blobs / "imagesTr")[:1], tmp_path / "out")
    assert re.search(r"case_0: windows: \d+ of \d+", capsys.readouterr().err)


def test_dicom_is_predicted_to_nifti_on_its_grid(plan: Plan, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "dicom" / "mr_hippocrop_1"
    assert not predict_folder(Brightness(), plan, find_images(folder), tmp_path)
    mask, scan = read_image(tmp_path / "mr_hippocrop_1.nii.gz"), read_image(folder)
    assert mask.array.shape == scan.array.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)


def test_images_that_do_not_fit_the_model_are_refused(plan: Plan, blobs: Path, shared_data: Path) -> None:
    with pytest.raises(UserError, match="is 3D, 2D was expected"):
        predict_case(Brightness(), find_images(blobs / "imagesTr")[0], replace(plan, spatial_dims=2))
    four = find_images(shared_data / "bad_inputs" / "nifti" / "dmri_4d_image.nii.gz")[0]
    with pytest.raises(UserError, match="has 4 channels, the model expects 1"):
        predict_case(Brightness(), four, plan)


def test_a_channel_that_is_missing_is_named(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    scan = blobs / "imagesTr" / "case_0.nii.gz"
    shutil.copy(scan, tmp_path / "b_0001.nii.gz")
    two = replace(
        plan, channel_names=["T1", "FLAIR"], normalization=[*plan.normalization, *plan.normalization]
    )
    cases = find_images(tmp_path / "b_0001.nii.gz")
    with pytest.raises(UserError, match=r"the model expects 2 \(T1, FLAIR\).* what is missing: T1 \(_0000\)"):
        predict_case(Brightness(), cases[0], two)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0, 2), r"has 2 channels \(_0000, _0002\), .* what is missing: FLAIR \(_0001\)"),
        ((0, 1, 2), "has 3 channels, the model expects 2"),
        ((1,), r"what is missing: T1 \(_0000\)"),
        ((), "files of one channel each are called x_0000, x_0001, ... in this order"),
    ],
)
@pytest.mark.parametrize("others", [True, False])
def test_other_channels_than_the_models_are_no_image(
    plan: Plan, blobs: Path, tmp_path: Path, numbers: tuple[int, ...], said: str, others: bool
) -> None:
    """Whether or not an image beside it has the right ones; a later channel never stands in for a missing one."""
    scan = blobs / "imagesTr" / "case_0.nii.gz"
    names = [
        *(["a_0000", "a_0001"] if others else []),
        *([f"b_{number:04d}" for number in numbers] or ["b_T1", "b_FLAIR"]),
    ]
    for name in names:
        shutil.copy(scan, tmp_path / f"{name}.nii.gz")
    two = replace(
        plan, channel_names=["T1", "FLAIR"], normalization=[*plan.normalization, *plan.normalization]
    )
    cases = {case.id: case for case in find_images(tmp_path, channels=2)}
    if others:
        load_case(cases["a"], two, with_label=False)
    wrong = [case for name, case in cases.items() if name.startswith("b")]
    said = (
        said
        if others or numbers in ((1,), ())
        else "not joined with the other channels of its image: _0002 is too many"
    )
    for case in wrong:
        with pytest.raises(UserError, match=said):
            load_case(case, two, with_label=False)


def test_an_image_unlike_the_training_is_named_before_the_work_and_an_empty_answer_after_it(
    plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    class Silent(nn.Module):
        said_before = ""

        def forward(self, x: Tensor) -> Tensor:
            Silent.said_before = Silent.said_before or stream.getvalue()
            return torch.cat([torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)], dim=1)

    image = nib.load(blobs / "imagesTr" / "case_0.nii.gz")
    far = image.affine @ np.diag([9.0, 9.0, 9.0, 1.0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), far), tmp_path / "far.nii.gz")
    stream = io.StringIO()
    console = Console(file=stream)
    small = replace(plan, spacing=[s * 9 for s in plan.spacing])
    assert predict_folder(Silent(), small, find_images(tmp_path), tmp_path / "out", console=console) == {}
    assert "far: note: it measures" in Silent.said_before
    assert "nothing was found in it" in stream.getvalue()
