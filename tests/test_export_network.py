"""Exported networks give the numbers of the original without kanseg, and say what is to be done around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ensemble import checkpoint

from kanseg import create_model
from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan, make_plan
from kanseg.errors import UsageError, UserError
from kanseg.export import network as exporting
from kanseg.export.network import FORMATS, TOLERANCE, compare, export_network, program_of
from kanseg.inference.ensemble import Loaded
from kanseg.layers import FAMILIES, conv_layer

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


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    made = make_plan(read_dataset(blobs), memory=2**31)
    made.patch_size = [16, 16, 16]
    return made


@pytest.mark.parametrize("to", FORMATS)
def test_folds_become_one_file_with_the_same_label_maps(
    to: str, plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    files = [checkpoint(plan, tmp_path / f"fold_{i}", i) for i in range(2)]
    image = blobs / "imagesTr" / "case_0.nii.gz"
    said = export_network([tmp_path], tmp_path / "out", to, image=image)
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert set(about) >= CONTENTS
    assert len(about["checkpoints"]) == len(files)
    assert about["input"]["shape"] == ["windows", 1, 16, 16, 16]
    assert [c["name"] for c in about["classes"]] == plan.label_names
    assert about["parity"] == said["parity"]
    assert said["parity"]["relative_difference"] < TOLERANCE
    assert said["parity"]["image"]["equal_labels"] > 0.999
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([FORMATS[to].file, "model.json"])


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
    found = compare(network, lambda window: run(torch.from_numpy(window)).numpy(), shape)
    assert found["relative_difference"] < TOLERANCE


@pytest.mark.parametrize("name", ["ukagnet", "u2kanet_small", "ukan"])
def test_other_networks_are_exported_too(name: str, tmp_path: Path) -> None:
    network = create_model(name, 2, 1, 2, width=0.25) if name != "ukan" else create_model(name, 2, 1, 2)
    program = program_of(network.eval(), (1, 32, 32))
    FORMATS["onnx"].write(program, tmp_path / "model.onnx")
    run = FORMATS["onnx"].open(tmp_path / "model.onnx")
    assert compare(network, run, (1, 32, 32))["relative_difference"] < TOLERANCE


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
    with pytest.raises(UsageError, match="Unknown format 'onx'. Known: onnx, torch. Did you mean 'onnx'"):
        export_network([tmp_path / "a"], tmp_path / "out", "onx")
    with pytest.raises(UserError, match="2 different plans"):
        export_network([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_steps_say_how_images_were_normalised(plan: Plan) -> None:
    plan.normalization = [{"scheme": "ct", "lower": -100.0, "upper": 250.0, "mean": 60.0, "std": 40.0}]
    said = " ".join(exporting.describe(plan, "onnx", FORMATS["onnx"])["steps"])
    assert "clip to -100 ... 250, subtract 60, divide by 40" in said
    assert np.prod(plan.patch_size) == 16**3
