"""The plugin for napari: where layers lie, that masks are those of `kanseg predict`, and the widget where napari is."""

from __future__ import annotations

import json
import os
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from PIL import Image as Picture
from rich.console import Console
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from kanseg import Segmenter
from kanseg.cli import app
from kanseg.data.class_names import class_colours, names_in
from kanseg.data.images import read_image, read_provenance, write_label
from kanseg.errors import UserError
from kanseg.napari import _matrix, get_reader, read, segment, write
from kanseg.training.fit import fit

ROOT = Path(__file__).resolve().parents[1]
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -15, 170), degrees=True).as_matrix() @ np.diag(
    [0.9, 1.1, 2.4]
)
OBLIQUE[:3, 3] = (12, -30, 7)
GRIDS = {
    "RAS": np.diag([1.5, 1, 2, 1]),
    "LPS": np.diag([-1, -1.5, 2, 1]),
    "sagittal, from above": np.array([[0, 0, 1.2, 5], [-1, 0, 0, 3], [0, -1.5, 0, -8], [0, 0, 0, 1]]),
    "oblique": OBLIQUE,
}
AT = (2, 9, 5)  # a voxel to be found again


@pytest.fixture(scope="module")
def trained(balls, tmp_path_factory) -> Path:
    """A run whose model finds something in the balls."""
    from kanseg.config import load_config

    dataset, plan = balls
    overrides = ["training.steps_per_epoch=12", "training.max_epochs=1", "training.lr=0.01", "data.workers=0"]
    overrides += ["data.folds=3", "training.final_validation=false", "training.ema_decay=null"]
    run = tmp_path_factory.mktemp("napari") / "run"
    fit(load_config(overrides=overrides), plan, dataset, run, console=Console(quiet=True))
    return run


@pytest.fixture
def scan(request, balls, tmp_path) -> Path:
    """A ball on a grid of the table, the oblique one unless another is asked for."""
    dataset, _ = balls
    array = np.asarray(nib.load(dataset.cases[0].images[0]).dataobj)[:, 1:, 2:]
    nib.save(nib.Nifti1Image(array, GRIDS[getattr(request, "param", "oblique")]), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def predicted(run: Path, scan: Path, out: Path) -> Path:
    done = CliRunner().invoke(app, ["predict", "-m", str(run), "-i", str(scan), "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


def world(attributes, index) -> np.ndarray:
    """Up, back and left in mm of a voxel of a layer."""
    return (np.asarray(attributes["affine"]) @ [*index, 1])[-4:-1]


def test_every_command_of_the_manifest_is_there() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["napari.manifest"].split() == ["kanseg", "=", "kanseg:napari.yaml"]
    assert "napari.yaml" in setup["options.package_data"]["kanseg"]
    manifest = yaml.safe_load((ROOT / "kanseg/napari.yaml").read_text())
    assert manifest["name"] == setup["metadata"]["name"]
    given = manifest["contributions"]
    for command in given["commands"]:
        module, _, name = command["python_name"].partition(":")
        assert callable(getattr(import_module(module), name))
    used = [one["command"] for kind in ("readers", "writers", "widgets") for one in given[kind]]
    assert sorted(used) == sorted(command["id"] for command in given["commands"])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_voxel_lies_where_its_file_says_and_axes_run_up_to_the_back_and_to_the_left(
    grid: str, suffix: str, tmp_path: Path
) -> None:
    array = np.zeros((6, 11, 8), np.float32)
    array[AT] = 1
    nib.save(nib.Nifti1Image(array, GRIDS[grid]), tmp_path / "scan.nii.gz")
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "scan.nii.gz")), str(path))
    ((data, attributes, kind),) = get_reader(str(path))(str(path))
    left, back, up = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint(AT)
    (found,) = np.argwhere(data)
    np.testing.assert_allclose(world(attributes, found), (up, back, left), atol=1e-4)
    linear = np.asarray(attributes["affine"])[:3, :3]
    assert (np.argmax(np.abs(linear), axis=0) == range(3)).all()
    assert (linear.diagonal() > 0).all()
    assert (kind, set(attributes["units"])) == ("image", {"mm"})


def test_a_series_of_dicom_is_read_and_another_folder_is_not(shared_data: Path, tmp_path: Path) -> None:
    series = shared_data / "dicom/mr_hippocrop_1"
    ((data, attributes, _),) = get_reader(str(series))(str(series))
    image = read_image(series)
    corner = np.linalg.inv(image.affine) @ np.diag([-1, -1, 1, 1]) @ [*world(attributes, (0, 0, 0))[::-1], 1]
    assert data[0, 0, 0] == image.array[0][tuple(np.rint(corner[:3]).astype(int))]
    assert get_reader(str(tmp_path)) is None


@pytest.mark.parametrize("scan", GRIDS, indirect=True)
def test_a_mask_is_voxel_for_voxel_that_of_kanseg_predict_also_when_it_is_saved(
    trained: Path, scan: Path, tmp_path: Path
) -> None:
    (layer,) = read(str(scan))
    labels, attributes, kind = segment([layer], trained)
    assert kind == "labels"
    assert labels.any()
    np.testing.assert_array_equal(attributes["affine"], layer[1]["affine"])
    assert labels.shape == layer[0].shape
    expected = nib.load(predicted(trained, scan, tmp_path / "mask.nii.gz"))
    write(str(tmp_path / "saved.nii.gz"), labels, attributes)
    saved = nib.load(tmp_path / "saved.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(saved.affine, expected.affine)
    ((again, _, kind),) = read(str(tmp_path / "mask.nii.gz"))
    assert kind == "labels"
    np.testing.assert_array_equal(again, labels)


def test_a_layer_without_a_file_lies_by_its_scale_rotation_shift_and_unit(
    trained: Path, balls, tmp_path: Path
) -> None:
    """A file on the same grid, laid out by hand, gets the same mask."""
    data = np.asarray(nib.load(balls[0].cases[0].images[0]).dataobj)[:, 1:, 2:]
    turn = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]])
    shear = np.array([[1, 0.05, 0], [0, 1, 0], [0, 0, 1]])
    where = {"scale": [1200, 900, 1000], "rotate": turn, "shear": [0.05, 0, 0], "translate": [3000, 0, -5000]}
    made, attributes, _ = segment([(data, {**where, "units": ["micrometer"] * 3}, "image")], trained)
    assert {key: attributes[key] for key in where} == where
    affine = np.eye(4)
    affine[:3, :3] = (turn @ shear @ np.diag([1.2, 0.9, 1.0]))[::-1, ::-1]
    affine[:3, 3] = (-5, 0, 3)
    nib.save(nib.Nifti1Image(data.transpose(), np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "file.nii.gz")
    mask = nib.load(predicted(trained, tmp_path / "file.nii.gz", tmp_path / "mask.nii.gz"))
    np.testing.assert_array_equal(made, np.asarray(mask.dataobj).transpose())
    voxel = np.linalg.det(affine[:3, :3]) / 1e3
    row = attributes["features"]["class"].index("label 7")
    assert attributes["features"]["ml"][row] == pytest.approx((made == 7).sum() * voxel, abs=1e-4)


def test_an_array_of_unknown_size_has_the_voxels_of_the_plan(trained: Path, balls) -> None:
    data = np.asarray(nib.load(balls[0].cases[1].images[0]).dataobj)
    labels, attributes, _ = segment([(data, {"name": "x"}, "image")], trained)
    upright = data.transpose()[::-1, ::-1]  # to the right, front and top
    np.testing.assert_array_equal(labels, Segmenter.load(trained).predict(upright)[::-1, ::-1].transpose())
    assert "ml" not in attributes["features"]


def test_layers_that_do_not_fit_are_refused(trained: Path, scan: Path) -> None:
    ((data, where, kind),) = read(str(scan))
    with pytest.raises(UserError, match=r"2 channels, the model takes 1"):
        segment([(data, where, kind)] * 2, trained)
    with pytest.raises(UserError, match="shape"):
        segment([(data[0], {"name": "slice"}, kind)], trained)
    moved = {**where, "translate": [0, 0, 7]}
    with pytest.raises(UserError, match="different grids"):
        segment([(data, where, kind), (data, moved, kind)], trained)
    with pytest.raises(UserError, match="does not exist"):
        segment([(data, where, kind)], "no model")


def test_pictures_in_colours_and_layers_called_as_the_channels_are_the_same_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        label = np.zeros((40, 48), np.uint8)
        label[10:30, 8 : 20 + number] = 1
        colours = np.stack([label * 120, 100 - label * 60, label * 40 + 20], -1)
        noisy = colours + generator.integers(0, 60, colours.shape)
        Picture.fromarray(noisy.astype(np.uint8)).save(tmp_path / f"images/p{number}.png")
        Picture.fromarray(label).save(tmp_path / f"labels/p{number}.png")
    small = {"basis": None, "features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [3, 3]}
    overrides = {"training.max_epochs": 1, "training.steps_per_epoch": 8, "training.lr": 0.01}
    overrides |= {"data.workers": 0, "data.folds": 2, "training.final_validation": False}
    segmenter = Segmenter("ukanet", 2, **small).fit(
        tmp_path, tmp_path / "run", overrides=overrides, trial=False, console=Console(quiet=True)
    )
    path = tmp_path / "images/p1.png"
    array = np.asarray(Picture.open(path))
    expected = segmenter.predict(path)
    names = segmenter.plan.channel_names
    assert len(names) == 3
    placed = {"scale": [0.5, 0.5]}  # of pictures pixels count
    whole = (array, {"name": "p1", "rgb": True, **placed}, "image")
    parts = [(array[..., n], {"name": f"p1_{name}", **placed}, "image") for n, name in enumerate(names)]
    fractions = (array / 255, {"name": "p1", "rgb": True}, "image")
    stacked = (np.moveaxis(array, -1, 0), {"name": "p1", "scale": [1, 0.5, 0.5]}, "image")
    assert expected.any()
    for layers in ([whole], [parts[2], parts[0], parts[1]], [fractions], [stacked]):
        labels, attributes, _ = segment(layers, tmp_path / "run")
        np.testing.assert_array_equal(labels, expected)
        assert "ml" not in attributes["features"]
    assert np.allclose(attributes.get("affine"), np.eye(3)) == (layers[0] is not stacked)


def test_labels_tell_classes_volumes_and_the_colours_of_kanseg(tmp_path: Path) -> None:
    array = np.zeros((6, 7, 8), np.uint8)
    array[1:3, 1:3, 1:3], array[4] = 2, 5
    nib.save(nib.Nifti1Image(array, OBLIQUE), tmp_path / "image.nii.gz")
    scan, names = read_image(tmp_path / "image.nii.gz"), {0: "background", 2: "liver", 5: "spleen"}
    for suffix in (".nii.gz", ".nrrd", ".seg.nrrd"):
        path = write_label(tmp_path / f"mask{suffix}", array, scan, names=names)
        ((_, attributes, kind),) = read(str(path))
        values = [0, 1, 2] if suffix == ".seg.nrrd" else [0, 2, 5]  # Slicer's segments count from 1
        features = attributes["features"]
        assert kind == "labels"
        assert features["index"] == values
        assert features["class"] == ["background", "liver", "spleen"]
        assert features["voxels"] == [336 - 8 - 56, 8, 56]
        assert features["ml"][1] == pytest.approx(8 * np.prod(scan.spacing) / 1e3, abs=1e-4)
        shown = [attributes["colormap"][value] for value in values[1:]]
        assert shown == class_colours(2)
        assert attributes["colormap"][0][3] == 0


@pytest.mark.parametrize("place", ["labelsTr/case.nii.gz", "case/seg.nii.gz"])
def test_label_maps_without_names_are_known_by_how_they_are_called(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(np.arange(27, dtype=np.uint8).reshape(3, 3, 3) % 3, np.eye(4)), path)
    ((_, attributes, kind),) = read(str(path))
    assert (kind, attributes["features"]["class"]) == ("labels", ["background", "label 1", "label 2"])
    nib.save(nib.Nifti1Image(np.full((3, 3, 3), 0.5, np.float32), np.eye(4)), path)
    assert read(str(path))[0][2] == "image"


def test_channels_of_a_file_are_one_layer(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(5, 6, 7, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([-2, -3, 4, 1])), tmp_path / "two.nii.gz")
    ((data, attributes, _),) = read(str(tmp_path / "two.nii.gz"))
    np.testing.assert_array_equal(data, array.transpose())
    np.testing.assert_array_equal(attributes["affine"], np.diag([1, 4, 3, 2, 1]))


def test_a_saved_mask_says_what_made_it_and_that_a_hand_changed_it(
    trained: Path, scan: Path, tmp_path: Path
) -> None:
    labels, attributes, _ = segment(read(str(scan)), trained)
    (path,) = write(str(tmp_path / "mask.nii.gz"), labels, attributes)
    made = read_provenance(Path(path))
    assert made == json.loads(json.dumps(Segmenter.load(trained).provenance()))
    assert names_in(Path(path)) == {0: "background", 7: "label 7"}
    labels = labels.copy()
    labels[0, 0, 0] = 3
    write(path, labels, attributes)
    assert read_provenance(Path(path)) == {**made, "changed by hand": True}


def test_a_mask_does_not_replace_its_scan(trained: Path, scan: Path) -> None:
    before = scan.read_bytes()
    labels, attributes, _ = segment(read(str(scan)), trained)
    with pytest.raises(UserError, match="the scan itself"):
        write(str(scan), labels, attributes)
    assert scan.read_bytes() == before


def test_a_cut_mask_is_saved_where_it_lies(scan: Path, tmp_path: Path) -> None:
    ((data, attributes, _),) = read(str(scan))
    ones = np.zeros(data.shape, np.uint8)
    ones[5, 6, 7] = 1
    moved = np.asarray(attributes["affine"]).copy()
    moved[:3, 3] += moved[:3, :3] @ (2, 1, 0)
    (path,) = write(str(tmp_path / "cut.nii.gz"), ones[2:, 1:], {**attributes, "affine": moved})
    for label, at in ((ones, attributes), read(path)[0][:2]):
        np.testing.assert_allclose(world(at, np.argwhere(label)[0]), world(attributes, (5, 6, 7)), atol=1e-4)
    with pytest.raises(UserError, match=r"Save pictures as \.png"):
        write(str(tmp_path / "flat.nii.gz"), ones[0], {})


def test_transforms_of_layers_are_composed_as_napari_does_it() -> None:
    layers = pytest.importorskip("napari.layers", reason="needs napari: pip install 'kanseg[napari]'")
    generator = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3] += generator.normal(0, 0.2, (3, 4))
    where = {"scale": (2, 3, 0.5), "translate": (5, -1, 7), "rotate": (10, 20, 30), "shear": (0.1, -0.2, 0.3)}
    image = layers.Image(np.zeros((3, 4, 5)), **where, affine=affine, units=("cm", "cm", "cm"))
    data, attributes, _ = image.as_layer_data_tuple()
    for index in generator.normal(0, 5, (3, 3)):
        found = _matrix(data, attributes) @ [*index, 1]
        np.testing.assert_allclose(found[:3], 10 * np.asarray(image.data_to_world(index)), atol=1e-9)


@pytest.fixture
def window(request):
    """A viewer with the plugin and pytest-qt's robot, where napari is installed and there is a screen.

    Without one Qt ends the process, so what starts it is asked for last.
    """
    npe2 = pytest.importorskip("npe2", reason="the widget needs napari: pip install 'kanseg[napari]'")
    pytest.importorskip("pytestqt", reason="windows are tested with pytest-qt")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"} & os.environ.keys():
        pytest.skip("a window needs a screen: xvfb-run python -m pytest tests/test_napari.py")
    manager = request.getfixturevalue("npe2pm")
    manager.register(npe2.PluginManifest.from_file(ROOT / "kanseg/napari.yaml"))
    return request.getfixturevalue("make_napari_viewer")(), request.getfixturevalue("qtbot")


def test_the_widget_adds_the_mask_and_tells_mistakes(window, trained: Path, scan: Path) -> None:
    from napari.utils.notifications import notification_manager

    viewer, qtbot = window
    said = notification_manager.records
    _, widget = viewer.window.add_plugin_dock_widget("kanseg", "Segment with kanseg")
    viewer.add_image(np.zeros((5, 6)))
    (image,) = viewer.open(str(scan), plugin="kanseg")
    widget.folder.value = trained
    widget()
    assert "Choose an image layer" in said[-1].message
    widget.layers.value = [image]
    widget()
    qtbot.waitUntil(lambda: len(viewer.layers) == 3, timeout=60_000)
    labels = viewer.layers[-1]
    np.testing.assert_array_equal(labels.data, segment([image.as_layer_data_tuple()], trained)[0])
    np.testing.assert_allclose(labels.data_to_world((3, 4, 5)), image.data_to_world((3, 4, 5)))
    np.testing.assert_allclose(labels.get_color(7), class_colours(1)[0], atol=1e-6)
    qtbot.waitUntil(lambda: widget.call_button.enabled, timeout=5_000)
    widget.folder.value = trained / "nothing"
    widget()
    qtbot.waitUntil(lambda: any("does not exist" in str(one.message) for one in said), timeout=60_000)
    qtbot.waitUntil(lambda: widget.call_button.enabled, timeout=5_000)
    assert len(viewer.layers) == 3
