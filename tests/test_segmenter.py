"""kanseg.Segmenter: fit, predict, evaluate, save and load from Python, in 3D and 2D."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from rich.console import Console
from typer.testing import CliRunner

from kanseg import Segmenter
from kanseg.cli import app
from kanseg.data.sizing import Need
from kanseg.errors import UsageError, UserError
from kanseg.files import make_folder
from kanseg.inference.calibration import CALIBRATION
from kanseg.segmenter import _as_pairs
from kanseg.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = {"basis": "legendre", "features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [3, 3]}
OVERRIDES = [
    "training.max_epochs=2",
    "training.steps_per_epoch=4",
    "training.final_validation=false",
    "data.workers=0",
    "data.folds=2",
]
AFFINE = np.array([[-1.5, 0.2, 0, 7], [0.2, 1.0, 0, -3], [0, 0, 2.0, 11], [0, 0, 0, 1]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """images/ and labels/: four tilted volumes with a bright box of value 3."""
    root = tmp_path_factory.mktemp("volumes")
    generator = np.random.default_rng(0)
    for folder in ("images", "labels", "more"):
        (root / folder).mkdir()
    for number in range(4):
        label = np.zeros((14, 12, 10), np.uint8)
        label[4:10, 3:9, 3:7] = 3
        image = (label + generator.normal(0, 0.5, label.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, AFFINE), root / "images" / f"case{number}.nii.gz")
        nib.save(nib.Nifti1Image(label, AFFINE), root / "labels" / f"case{number}.nii.gz")
    return root


@pytest.fixture(scope="module")
def trained(volumes, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    segmenter = Segmenter("ukanet", spatial_dims=3, **SMALL)
    return segmenter.fit(volumes, run, overrides=OVERRIDES, trial=False, console=Console(quiet=True)), run


def test_a_prediction_lies_on_the_grid_of_its_image_in_the_values_of_the_labels(trained, volumes, tmp_path):
    segmenter, _ = trained
    path = volumes / "images" / "case0.nii.gz"
    labels = segmenter.predict(path, tmp_path / "out.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    assert labels.shape == written.shape == (14, 12, 10)
    assert np.allclose(written.affine, nib.load(path).affine)
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert set(np.unique(labels)) <= {0, 3}


def test_probabilities_are_those_of_the_command_line_with_their_temperature(trained, volumes, tmp_path):
    shutil.copytree(trained[1] / "fold_0", tmp_path / "run" / "fold_0")
    (tmp_path / "run" / CALIBRATION).write_text('{"temperature": 2.0}')
    image = str(volumes / "images" / "case3.nii.gz")
    found = Segmenter.load(tmp_path / "run").probabilities(image)
    args = [
        "predict",
        "-m",
        str(tmp_path / "run"),
        "-i",
        image,
        "-o",
        str(tmp_path / "out.nii.gz"),
        "--probabilities",
    ]
    assert CliRunner().invoke(app, args).exit_code == 0
    maps = [nib.load(file).get_fdata() for file in sorted(tmp_path.glob("out_prob_*.nii.gz"))]
    assert (found.dtype, len(maps)) == (np.float32, 2)
    np.testing.assert_array_equal(found, maps)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    sharp = trained[0].probabilities(image)
    clear = abs(sharp[1] - 0.5) > 0.1
    assert (abs(found[1] - 0.5) < abs(sharp[1] - 0.5))[clear].all()
    assert clear.any()


def test_save_and_load_keep_the_prediction(trained, volumes, tmp_path):
    segmenter, run = trained
    path = volumes / "images" / "case1.nii.gz"
    expected = segmenter.predict(path)
    saved = segmenter.save(tmp_path / "model")
    assert [file.name for file in saved.parent.iterdir()] == ["model.safetensors"]
    for source in (run, run / "fold_0", saved, saved.parent):
        loaded = Segmenter.load(source)
        assert np.array_equal(loaded.predict(path), expected)
        assert (loaded.model, loaded.spatial_dims) == ("ukanet", 3)
        assert loaded.options["basis"] == "legendre"
        assert list(loaded.info["labels"].values()) == [0, 3]


def test_networks_of_several_plans_predict_together_and_are_no_one_model(trained, volumes, tmp_path):
    _, run = trained
    tensors, info = load_checkpoint(run / "fold_0/best.safetensors")
    for number, patch in enumerate([info["plan"]["patch_size"], [8, 8, 8]]):
        fold = make_folder(tmp_path / f"two/fold_{number}")
        save_checkpoint(
            fold / "best.safetensors", tensors, {**info, "plan": {**info["plan"], "patch_size": patch}}
        )
    two, path = Segmenter.load(tmp_path / "two"), volumes / "images" / "case1.nii.gz"
    told = CliRunner().invoke(
        app, ["predict", "-m", str(tmp_path / "two"), "-i", str(path), "-o", str(tmp_path / "mask.nii.gz")]
    )
    assert told.exit_code == 0, told.output
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), two.predict(path))
    with pytest.raises(UsageError, match="several plans"):
        two.save(tmp_path / "model")


def test_networks_of_unlike_bases_are_saved_as_they_are(trained, tmp_path):
    _, run = trained
    for number, basis in enumerate(["legendre", "jacobi"]):
        tensors, info = load_checkpoint(run / "fold_0/best.safetensors")
        info["model"]["options"]["basis"] = basis
        save_checkpoint(make_folder(tmp_path / f"two/fold_{number}") / "best.safetensors", tensors, info)
    two = Segmenter.load(tmp_path / "two")
    two.save(tmp_path / "model")
    again, x = Segmenter.load(tmp_path / "model"), torch.randn(1, 1, 12, 12, 12)
    with torch.no_grad():
        assert torch.equal(again.network(x), two.network(x))


def test_an_array_is_predicted_like_an_image_without_geometry(trained):
    segmenter, _ = trained
    array = np.random.default_rng(1).normal(size=(9, 11, 8)).astype(np.float32)
    labels = segmenter.predict(array)
    assert labels.shape == array.shape
    assert np.array_equal(labels, segmenter.predict(array[None]))
    with pytest.raises(UsageError, match="got shape"):
        segmenter.predict(array[0])


def test_fit_takes_the_plan_that_lies_in_the_run_folder(trained, volumes, tmp_path):
    segmenter, run = trained
    (tmp_path / "plan.json").write_text((run / "plan.json").read_text())
    again = Segmenter(**SMALL).fit(
        volumes, tmp_path, overrides=OVERRIDES, trial=False, console=Console(quiet=True)
    )
    assert again.plan == segmenter.plan
    with pytest.raises(UsageError, match="is 3D"):
        Segmenter(spatial_dims=2).fit(volumes, tmp_path, resume=True)


def test_pictures_are_segmented_in_2d(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        mask = np.zeros((24, 30), np.uint8)
        mask[6:18, 8:20] = 255
        picture = np.clip(generator.normal(80 + mask[..., None] * 0.4, 10, (24, 30, 3)), 0, 255)
        Picture.fromarray(picture.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Picture.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    segmenter = Segmenter(**SMALL)
    segmenter.fit(tmp_path, tmp_path / "run", overrides=OVERRIDES, trial=False, console=Console(quiet=True))
    labels = segmenter.predict(tmp_path / "images" / "0.png", tmp_path / "out.png")
    assert labels.shape == (24, 30)
    assert set(np.unique(labels)) <= {0, 255}
    assert np.array_equal(np.asarray(Picture.open(tmp_path / "out.png")), labels)
    array = np.moveaxis(np.asarray(Picture.open(tmp_path / "images" / "0.png")), -1, 0)
    assert np.array_equal(segmenter.predict(array), labels)
    with pytest.raises(UsageError, match="predict takes an array"):
        segmenter.predict(np.zeros((24, 30)))


def test_a_folder_of_images_is_for_the_command_line(trained, volumes):
    with pytest.raises(UsageError, match="4 images"):
        trained[0].predict(volumes / "images")


def test_evaluate_scores_the_classes_of_the_plan_and_nothing_that_it_ignores(trained, volumes, tmp_path):
    segmenter, _ = trained
    for path in (volumes / "labels").iterdir():
        truth = np.asarray(nib.load(path).dataobj).copy()
        truth[4:6] = np.where(truth[4:6] == 3, 9, 0)
        nib.save(nib.Nifti1Image(truth, AFFINE), make_folder(tmp_path / "references") / path.name)
    name = segmenter.plan.label_names[1]
    scores = segmenter.evaluate(volumes / "labels", tmp_path / "references")
    assert list(scores["labels"]) == [name]
    assert scores["metrics"][name]["dice"]["mean"] == pytest.approx(2 * 4 / (4 + 6))
    told = Segmenter()
    told.plan = replace(segmenter.plan, ignore_value=9)
    scores = told.evaluate(volumes / "labels", tmp_path / "references", tmp_path / "scores")
    assert scores["metrics"][name]["dice"]["mean"] == 1
    assert (tmp_path / "scores" / "cases.csv").exists()
    assert list(Segmenter().evaluate(volumes / "labels", volumes / "labels")["labels"]) == ["label 3"]


@pytest.mark.parametrize("call", [lambda s: s.predict("x.nii.gz"), lambda s: s.save("folder")])
def test_an_untrained_segmenter_says_so(call):
    with pytest.raises(UsageError, match="not trained"):
        call(Segmenter())


def test_wrong_names_are_refused_before_the_data_is_read(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UsageError, match="'ukanet'"):
        Segmenter("ukante").fit(nowhere, tmp_path / "run")
    with pytest.raises(UsageError, match="'basis'"):
        Segmenter(bassis="gram").fit(nowhere, tmp_path / "run")
    with pytest.raises(UsageError, match="spatial_dims"):
        Segmenter(spatial_dims=4)
    with pytest.raises(UserError, match="nowhere"):
        Segmenter().fit(nowhere, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_array_has_the_spacing_that_is_given(trained, volumes):
    """The spacing of half the voxels: the network sees what it sees in the file."""
    segmenter, _ = trained
    image = nib.load(volumes / "images" / "case0.nii.gz")
    fine = np.asarray(image.dataobj).repeat(2, axis=2)
    spacing = [*image.header.get_zooms()[:2], image.header.get_zooms()[2] / 2]
    labels = segmenter.predict(fine, spacing=spacing)
    assert labels.shape == fine.shape
    coarse = segmenter.predict(np.asarray(image.dataobj))
    assert (labels[..., ::2] == coarse).mean() > (segmenter.predict(fine)[..., ::2] == coarse).mean()
    for wrong in ((1.0, 1.0), (1.0, 1.0, -1.0), (1.0, 1.0, float("nan"))):
        with pytest.raises(UsageError, match="spacing takes 3 lengths in mm"):
            segmenter.predict(fine, spacing=wrong)
    with pytest.raises(UsageError, match="has its own"):
        segmenter.predict(volumes / "images" / "case0.nii.gz", spacing=spacing)


def test_an_array_is_predicted_by_a_network_that_sees_slices(volumes, tmp_path):
    segmenter = Segmenter(spatial_dims=2, **SMALL)
    how = {"trial": False, "slices": 3, "size": "small", "mirror": [2], "memory": "2G"}
    segmenter.fit(volumes, tmp_path / "run", overrides=OVERRIDES, console=Console(quiet=True), **how)
    plan = segmenter.plan
    assert (plan.slices, plan.size, plan.mirror_axes, plan.memory_bytes) == (3, "small", [], 2 * 2**30)
    array = np.asarray(nib.load(volumes / "images" / "case0.nii.gz").dataobj)
    assert segmenter.predict(array).shape == array.shape
    assert segmenter.predict(array, spacing=(1.5, 1.0, 2.0)).shape == array.shape
    with pytest.raises(UsageError, match=r"\(1, D, H, W\), got shape"):
        segmenter.predict(array[0])
    with pytest.raises(UsageError, match="would not follow size"):
        segmenter.fit(volumes, tmp_path / "run", overrides=OVERRIDES, size="large")


def test_wrong_options_are_named_in_one_line(trained, volumes, tmp_path):
    with pytest.raises(UsageError, match="Segmenter.predict has no option 'overlp'. Did you mean 'overlap'"):
        trained[0].predict(volumes / "images" / "case0.nii.gz", overlp=0.5)
    with pytest.raises(UsageError, match="Segmenter.fit has no option 'memry'. Did you mean 'memory'"):
        Segmenter().fit(volumes, tmp_path / "run", memry="8G")
    with pytest.raises(UsageError, match="has no unit"):
        Segmenter().fit(volumes, tmp_path / "run", memory="8")
    with pytest.raises(UsageError, match="Did you mean 'ukanet'"):
        Segmenter("ukanett")
    with pytest.raises(UsageError, match="Did you mean 'basis'"):
        Segmenter(bassis="gram")
    assert not (tmp_path / "run").exists()


def test_overrides_may_be_one_string_or_a_dictionary(volumes, tmp_path):
    nowhere = tmp_path / "nowhere"
    for wrong in ("training.lrr=1", {"training.lrr": 1}, {"training": {"lrr": 1}}):
        with pytest.raises(UsageError, match="Did you mean 'lr'"):
            Segmenter().fit(nowhere, tmp_path / "run", overrides=wrong)
    options = {
        "training": {"lr": 0.5, "weights": None, "freeze": ["encoder.*"]},
        "model.options": {"basis": "gram"},
    }
    config = Segmenter()._config("default", _as_pairs(options))
    assert (config.training.lr, config.training.weights, config.training.freeze) == (0.5, None, ["encoder.*"])
    assert config.model.options == {"basis": "gram"}


def test_a_segmenter_says_what_it_is(trained):
    segmenter, run = trained
    assert repr(Segmenter("ukan", spatial_dims=2)) == "Segmenter('ukan', spatial_dims=2)"
    assert repr(segmenter).startswith(
        f"Segmenter('ukanet', spatial_dims=3, source='{run / 'fold_0'}', classes="
    )
    assert segmenter.plan.label_names[1] in repr(segmenter)


def test_a_segmenter_plans_as_the_command_line_does(volumes, tmp_path, monkeypatch):
    """By a measured step, in the memory and with the regions that it is told."""
    measured = []

    def measure(plan):
        measured.append(plan)
        return Need(2**20, 100)

    monkeypatch.setattr("kanseg.training.planning.measure_step", measure)
    monkeypatch.setattr("kanseg.training.fit.fit", lambda *args, **how: sys.exit("planned"))
    asked = {"memory": "64G", "size": "small", "mirror": "0", "regions": "box=3"}
    with pytest.raises(SystemExit, match="planned"):
        Segmenter().fit(volumes, tmp_path / "a", console=Console(quiet=True), **asked)
    options = [word for key, value in asked.items() for word in (f"--{key}", value)]
    told = CliRunner().invoke(app, ["plan", str(volumes), "-o", str(tmp_path / "b"), *options])
    assert told.exit_code == 0, told.output
    assert len(measured) == 2
    assert (tmp_path / "a/plan.json").read_text() == (tmp_path / "b/plan.json").read_text()
