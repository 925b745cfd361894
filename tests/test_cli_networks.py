"""Networks from the command line: listed, trained, used for prediction, and weights converted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from test_cli import kanseg, refused
from test_compat_models import made_up

QUICK = [
    "--no-trial",
    "training.max_epochs=1",
    "training.steps_per_epoch=1",
    "training.final_validation=false",
    "data.workers=0",
]
QUICK += ["data.folds=2", "training.batch_size=1"]
# Options that make a network small, as one gives them on the command line.
SMALL = {
    "ukagnet": ["width=0.25", "layers=1"],
    "u2kanet_small": ["width=0.25"],
    "ukan": ["features=[4,4,8,8]", "token_layers=1"],
    "ukagnet_18": ["encoder_options={width:0.25,blocks_per_stage:1}"],
    "ukanet": ["encoder=densekanet_tiny", "encoder_options={growth:2,features:4,blocks:[1,1,1]}"],
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures with a bright square, images/ and labels/."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for case in range(4):
        label = np.zeros((48, 40), np.uint8)
        row, column = generator.integers(4, 24, 2)
        label[row : row + 12, column : column + 12] = 1
        image = generator.normal(80, 10, label.shape) + 90 * label
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"case_{case}.png")
        Image.fromarray(label).save(root / "labels" / f"case_{case}.png")
    return root


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_networks_train_and_predict_from_the_command_line(
    name: str, dims: int, pictures: Path, blobs: Path, tmp_path: Path
) -> None:
    data = pictures if dims == 2 else blobs
    own = [f"model.options.{option}" for option in SMALL[name]]
    trained = kanseg("train", data, "-o", tmp_path / "run", "--model", name, *QUICK, *own)
    assert trained.returncode == 0, trained.stderr
    scans = tmp_path / "scans"
    scans.mkdir()
    first = min((data / ("images" if dims == 2 else "imagesTr")).iterdir())
    (scans / first.name).write_bytes(first.read_bytes())
    predicted = kanseg("predict", "-m", tmp_path / "run", "-i", scans, "-o", tmp_path / "masks")
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / "masks").iterdir())) == 1


def test_an_encoder_of_timm_trains_on_pictures_from_a_local_file(
    pictures: Path, blobs: Path, tmp_path: Path
) -> None:
    import timm

    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), weights)
    options = ["model.options.encoder=timm/mobilenetv3_small_050", "model.options.bottleneck=true"]
    start = [f"model.options.encoder_weights={weights}"]
    run = tmp_path / "run"
    trained = kanseg("train", pictures, "-o", run, "--model", "ukanet", *QUICK, *options, *start)
    assert trained.returncode == 0, trained.stderr
    weights.unlink()  # the checkpoint is complete in itself
    assert kanseg("predict", "-m", run, "-i", pictures / "images", "-o", tmp_path / "masks").returncode == 0
    refused(
        kanseg("train", blobs, "-o", tmp_path / "run3", *QUICK, *options),
        2,
        "encoder 'timm/mobilenetv3_small_050' is 2D only, but spatial_dims=3",
    )
    assert not (tmp_path / "run3" / "fold_0").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model", "ukagnett"], ["Unknown model 'ukagnett'. Did you mean 'ukagnet'"]),
        (["--model", "ukan"], ["halves too often for the patch", "larger patch_size in plan.json"]),
        (["--model", "ukagnet", "model.options.depth=9"], ["at most as many stages as strides"]),
        (["--model", "ukanet", "model.options.encoder=vgkan11"], ["Did you mean 'vggkan11'"]),
        (["--model", "ukanet", "model.options.layer_options={groups:3}"], ["divisible by groups (=3)"]),
    ],
)
def test_impossible_networks_are_refused_before_training(
    options: list[str], parts: list[str], blobs: Path, tmp_path: Path
) -> None:
    refused(kanseg("train", blobs, "-o", tmp_path / "run", *QUICK, *options), 2, *parts)
    assert not (tmp_path / "run" / "fold_0").exists()


def test_published_weights_are_converted(tmp_path: Path) -> None:
    args = {"vgg_type": "VGG11v4", "num_classes": 3, "width_scale": 2, "expected_feature_shape": (1, 1)}
    save_file(made_up("vggkagn", args), tmp_path / "vgg.safetensors")
    result = kanseg(
        "convert", "--from", "torch-conv-kan", tmp_path / "vgg.safetensors", "-o", tmp_path / "m", "--json"
    )
    assert json.loads(result.stdout)["model"]["options"]["encoder"] == "vggkan11v4"
    assert (tmp_path / "m" / "model.safetensors").exists()
    refused(
        kanseg("convert", "--from", "torch-kan", "x", "-o", tmp_path / "n"),
        2,
        "Did you mean 'torch-conv-kan'",
    )
    wrong = ["--architecture", "vgg_kagn_bn11_v4"]
    refused(
        kanseg(
            "convert", "--from", "torch-conv-kan", tmp_path / "vgg.safetensors", "-o", tmp_path / "n", *wrong
        ),
        1,
        "missing ['features.0.inner_proj.0.weight'",
    )
    assert not (tmp_path / "n").exists()
