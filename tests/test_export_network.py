"""Exported networks give the numbers of the original without kanseg, and say what is to be done around them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.bundle.properties import InferProperties
from test_ensemble import checkpoint

from kanseg import create_model
from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.errors import UsageError, UserError
from kanseg.export import network as exporting
from kanseg.export.network import (
    FORMATS,
    TOLERANCE,
    compare,
    export_network,
    program_of,
    random_windows,
)
from kanseg.inference.calibration import CALIBRATION
from kanseg.inference.ensemble import Loaded
from kanseg.inference.postprocess import save_rules
from kanseg.inference.predict import predict_case
from kanseg.layers import FAMILIES, conv_layer
from kanseg.training.finetune import read_start

CONTENTS = {
    "classes",
    "input",
    "output",
    "plan",
    "steps",
    "parity",
    "made_by",
    "checkpoints",
    "postprocessing",
}


@pytest.mark.parametrize("to", FORMATS)
def test_folds_become_one_file_with_the_same_label_maps(
    to: str, plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    files = [checkpoint(plan, tmp_path / f"fold_{i}", i) for i in range(2)]
    image = blobs / "imagesTr" / "case_0.nii.gz"
    said = export_network([tmp_path], tmp_path / "out", to, images=image)
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert set(about) >= CONTENTS
    assert len(about["checkpoints"]) == len(files)
    assert about["input"]["shape"] == ["windows", 1, 16, 16, 16]
    assert [c["name"] for c in about["classes"]] == plan.label_names
    assert about["parity"] == said["parity"]
    assert said["parity"]["relative_difference"] < TOLERANCE
    assert said["parity"]["images"]["equal_labels"] > 0.999
    assert (tmp_path / "out" / FORMATS[to].file).is_file()
    assert not list((tmp_path / "out").glob("kanseg-*"))


def test_a_program_of_torch_runs_without_kanseg(plan: Plan, tmp_path: Path) -> None:
    checkpoint(plan, tmp_path / "fold_0", 0)
    program = program_of(Loaded([tmp_path / "fold_0"]).networks[0], (1, 16, 16, 16))
    torch.export.save(program, tmp_path / "model.pt2")
    code = (
        "import sys, torch; sys.modules['kanseg'] = None\n"
        f"network = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
        "print(tuple(network(torch.zeros(3, 1, 16, 16, 16)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 3, 16, 16, 16)"


@pytest.mark.parametrize("basis", [*FAMILIES, "hermite", "fourier"])
def test_every_family_is_written_in_plain_operations(basis: str) -> None:
    network = conv_layer(basis)(3, 2, 4, 3).eval()
    shape = (2, 6, 6, 6)
    program = program_of(network, shape)
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operations if "kanseg" in name]
    run = program.module()
    found = compare(network, lambda window: run(torch.from_numpy(window)).numpy(), random_windows(shape))
    assert found["relative_difference"] < TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ukagnet", {"width": 0.25}),
        ("ukanet", {"features_per_stage": (4, 8), "layer_options": {"num_experts": 3}}),
        pytest.param("ukan", {}, marks=pytest.mark.slow),
        pytest.param("u2kanet_small", {"width": 0.25}, marks=pytest.mark.slow),
    ],
)
def test_other_networks_are_exported_too(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network = create_model(name, 2, 1, 2, **options).eval()
    FORMATS["onnx"].write(program_of(network, (1, 32, 32)), tmp_path / "model.onnx")
    run = FORMATS["onnx"].open(tmp_path / "model.onnx")
    assert compare(network, run, random_windows((1, 32, 32)))["relative_difference"] < TOLERANCE


@pytest.mark.parametrize("basis", ["kagn", "wavkan"])
def test_torch_writes_a_network_alone_as_onnx(basis: str, tmp_path: Path) -> None:
    network = create_model(
        "ukanet", 2, 1, 2, features_per_stage=(4, 8), blocks_per_stage=1, basis=basis
    ).eval()
    file, batch = tmp_path / "model.onnx", {0: torch.export.Dim("batch", min=1)}
    torch.onnx.export(
        network, (torch.zeros(2, 1, 12, 12),), file, dynamo=True, dynamic_shapes=(batch,), verbose=False
    )
    found = compare(network, FORMATS["onnx"].open(file), random_windows((1, 12, 12)))
    assert found["relative_difference"] < TOLERANCE


def test_a_file_that_differs_is_not_kept(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(plan, tmp_path / "fold_0", 0)
    right = FORMATS["torch"]
    wrong = exporting.Format(right.file, (), right.write, lambda path: lambda x: 1.1 * right.open(path)(x))
    monkeypatch.setitem(FORMATS, "torch", wrong)
    with pytest.raises(UserError, match="differs from its original by"):
        export_network([tmp_path / "fold_0"], tmp_path / "out", "torch")
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_exported_is_said(plan: Plan, tmp_path: Path) -> None:
    checkpoint(plan, tmp_path / "a", 0)
    checkpoint(plan, tmp_path / "b", 0, spacing=[2.0, 2.0, 2.0])
    with pytest.raises(UsageError, match="Unknown format 'onx'. Did you mean 'onnx'"):
        export_network([tmp_path / "a"], tmp_path / "out", "onx")
    with pytest.raises(UsageError, match="is to be a folder"):
        export_network([tmp_path / "a"], tmp_path / "model.onnx")
    with pytest.raises(UserError, match="There is no"):
        export_network([tmp_path / "a"], tmp_path / "out", images=tmp_path / "no.nii.gz")
    with pytest.raises(UserError, match="2 different plans"):
        export_network([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_steps_say_how_images_were_normalised(plan: Plan) -> None:
    plan.normalization = [{"scheme": "ct", "lower": -100.0, "upper": 250.0, "mean": 60.0, "std": 40.0}]
    said = " ".join(exporting.describe(plan, "onnx", FORMATS["onnx"])["steps"])
    assert "clip to -100 ... 250, subtract 60, divide by 40" in said
    assert np.prod(plan.patch_size) == 16**3


SCHEMES: list[dict[str, Any]] = [
    {"scheme": "zscore"},
    {"scheme": "zscore_nonzero"},
    {"scheme": "ct", "lower": 0.1, "upper": 0.9, "mean": 0.5, "std": 0.2},
    {"scheme": "fixed", "mean": 0.1, "std": 0.5},
    {"scheme": "minmax"},
]


OF_BUNDLES = [{"normalization": [scheme]} for scheme in SCHEMES] + [{"regions": [[0], [1, 2], [2]]}]


@pytest.mark.parametrize("of_plan", OF_BUNDLES, ids=[*(s["scheme"] for s in SCHEMES), "regions"])
def test_a_bundle_run_by_monai_writes_what_kanseg_predicts(
    of_plan: dict[str, Any], plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    spacing = [1.3 * s for s in plan.spacing]
    changes: dict[str, Any] = {"label_values": [0, 7, 300], "label_dtype": "uint16", "spacing": spacing}
    checkpoint(plan, tmp_path / "fold_0", 0, **changes, **of_plan)
    out = tmp_path / "bundle"
    export_network([tmp_path / "fold_0"], out, "monai")
    parser = ConfigParser()
    parser.read_config(out / "configs" / "inference.json")
    parser["bundle_root"], parser["dataset_dir"] = str(out), str(blobs / "imagesTr")
    parser["output_dir"] = str(tmp_path / "masks")
    parser["datalist"] = parser.get_parsed_content("datalist")[:1]
    parser.get_parsed_content("run")
    (written,) = (tmp_path / "masks").iterdir()
    loaded, case = Loaded([tmp_path / "fold_0"]), read_dataset(blobs).cases[0]
    labels, _ = predict_case(loaded.networks, case, loaded.plans)
    found = nib.load(written)
    assert written.name.startswith(case.id)
    assert (np.asarray(found.dataobj) == labels).mean() > 0.999
    assert len(np.unique(labels)) > 1
    np.testing.assert_allclose(found.affine, nib.load(case.images[0]).affine, atol=1e-5)
    about = json.loads((out / "configs" / "metadata.json").read_text())
    assert about["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == plan.label_names[1]


def test_a_bundle_says_how_it_is_run_and_is_a_model_to_start_from(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(plan, tmp_path / "fold_0", 0)
    rules = [{"labels": [1], "largest": True}]
    save_rules(tmp_path / "fold_0", rules)
    (tmp_path / CALIBRATION).write_text('{"temperature": 1.5}')
    said = export_network([tmp_path / "fold_0"], tmp_path / "bundle", "monai")
    text = (tmp_path / "bundle/docs/README.md").read_text()
    assert 'pip install "monai[fire]"' in text
    assert all(name in text for name in (*plan.label_names, *plan.channel_names, "postprocessing"))
    assert all((tmp_path / "bundle" / part).is_file() for part in text.split() if part.startswith("configs/"))
    about = json.loads((tmp_path / "bundle/model.json").read_text())
    config = json.loads((tmp_path / "bundle/configs/inference.json").read_text())
    assert (
        {"evaluator"}
        < {name for name, asked in InferProperties.items() if asked["required"]}
        <= config.keys()
    )
    assert about["postprocessing"] == said["postprocessing"] == rules
    assert "rules of `postprocessing`" in about["steps"][-1]
    assert "divide the outputs by `temperature`" in about["steps"][-2]
    assert about["temperature"] == Loaded([tmp_path / "bundle"]).temperatures[0] == 1.5
    old, new = read_start(tmp_path / "fold_0"), read_start(tmp_path / "bundle")
    assert (old.spec, old.ends) == (new.spec, new.ends)
    assert old.weights.keys() == new.weights.keys()
    assert all(torch.equal(value, new.weights[name]) for name, value in old.weights.items())
    assert Loaded([tmp_path / "bundle"]).rules == rules
    with pytest.raises(UserError, match=r"model\.pt2 is an exported program.*Start from the run"):
        read_start(tmp_path / "bundle" / FORMATS["monai"].file)
    monkeypatch.chdir(tmp_path / "bundle")
    verify_net_in_out("network", meta_file="configs/metadata.json", config_file="configs/inference.json")


@pytest.mark.parametrize("size", [(40, 61), (20, 45), (32, 32)])
def test_the_steps_of_model_json_give_the_mask_of_a_picture(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/labels").mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        picture = generator.integers(0, 256, (*size, 3), np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / f"data/images/{number}.png")
        label = (picture[..., 0] > 128).astype(np.uint8) * 255
        PIL.Image.fromarray(label).save(tmp_path / f"data/labels/{number}.png")
    dataset = read_dataset(tmp_path / "data")
    flat = replace(make_plan(dataset, memory=2**30), patch_size=[32, 32])
    checkpoint(flat, tmp_path / "fold_0", 0)
    export_network([tmp_path / "fold_0"], tmp_path / "out", "onnx")
    about = json.loads((tmp_path / "out/model.json").read_text())
    run = FORMATS["onnx"].open(tmp_path / "out/model.onnx")

    picture = np.asarray(PIL.Image.open(tmp_path / "data/images/0.png"), np.float32).transpose(2, 0, 1)
    x = np.stack([(channel - channel.mean()) / channel.std() for channel in picture])
    window = about["input"]["shape"][2:]
    missing = [max(w - n, 0) for n, w in zip(size, window, strict=True)]
    x = np.pad(x, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    bells = [np.exp(-((np.arange(w) - (w - 1) / 2) ** 2) / (2 * (w / 8) ** 2)) for w in window]
    weight = np.maximum(np.outer(*bells), 1e-3)
    total = np.zeros((len(about["classes"]), *x.shape[1:]))
    ends = [n - w for n, w in zip(x.shape[1:], window, strict=True)]
    starts = [[*range(0, end, w // 2), end] for end, w in zip(ends, window, strict=True)]
    shares = np.zeros(x.shape[1:])
    for i, j in itertools.product(*starts):
        place = (slice(i, i + window[0]), slice(j, j + window[1]))
        total[(slice(None), *place)] += weight * run(np.float32(x[(slice(None), *place)])[None])[0]
        shares[place] += weight
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True))
    best = (total / shares)[(slice(None), *inside)].argmax(0)
    mask = np.array([entry["value"] for entry in about["classes"]])[best]

    loaded = Loaded([tmp_path / "fold_0"])
    expected, _ = predict_case(loaded.networks, dataset.cases[0], loaded.plans)
    assert set(np.unique(expected)) == {0, 255}
    assert (mask == expected).mean() > 0.999


def test_a_bundle_for_what_it_cannot_express_is_refused(plan: Plan, tmp_path: Path) -> None:
    differently = [{"scheme": "minmax"}, {"scheme": "zscore"}]
    checkpoint(plan, tmp_path / "fold_0", 0, normalization=differently, channel_names=["t1", "t2"])
    with pytest.raises(
        UserError, match="for channels that are normalised differently. Export --to onnx or torch"
    ):
        export_network([tmp_path / "fold_0"], tmp_path / "out", "monai")
    assert not (tmp_path / "out").exists()
