"""Networks in int8: a quarter of the size, nearly the label maps of their originals, or none."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization.calibrate import MinMaxCalibrater
from test_ensemble import checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case
from kanseg.errors import UsageError, UserError
from kanseg.export.network import FORMATS, Exported, export_network
from kanseg.inference.agreement import agreement
from kanseg.inference.ensemble import Loaded, save_members
from kanseg.inference.predict import predict_case
from kanseg.study import prune, simplify
from kanseg.study.quantize import PRODUCTS, ends


@pytest.fixture(scope="module")
def learnt(plan: Plan, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen three of the blobs for a few seconds, and lost some of its functions since."""
    folder = tmp_path_factory.mktemp("learnt")
    checkpoint(plan, folder / "run/fold_0", 0)
    loaded = Loaded([folder / "run"])
    network = loaded.networks[0].train()
    items = [load_case(case, plan)[0] for case in read_dataset(blobs).cases[:3]]
    x, y = (
        torch.stack([item[key].as_tensor()[:, 2:18, 4:20, 1:17] for item in items])
        for key in ("image", "label")
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(network(x), y[:, 0].long()).backward()
        optimizer.step()
    network.eval()
    assert simplify(network, [x], 0.3)
    save_members(folder / "model", prune(network, 0.2, [x]), loaded.infos, [])
    return folder / "model"


def test_the_file_is_small_and_gives_nearly_the_same_label_maps(
    learnt: Path, plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    said = export_network([learnt], tmp_path / "out", images=blobs / "imagesTr", int8=True, agree=0.9)
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["parity"] == said["parity"]
    found = said["parity"]["images"]
    assert len(found["cases"]) == 6
    assert min(found["dice"].values()) > 0.9
    # The file by itself, with the preparation that model.json tells, is what was compared.
    file = tmp_path / "out/model.onnx"
    loaded = Loaded([learnt])
    again = agreement(
        loaded.networks[0], Exported(FORMATS["onnx"].open(file)), read_dataset(blobs).cases, plan
    )
    assert again["dice"] == pytest.approx(found["dice"])
    graph = onnx.load(file).graph
    weights = Counter(
        tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 5 and tensor.dims[0] > 3
    )
    assert weights[onnx.TensorProto.INT8] > weights[onnx.TensorProto.FLOAT]
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    exact = said["parity"]["int8"]["float32_products"]
    assert {node.name for node in products if not node.input[0].endswith("DequantizeLinear_Output")} == set(
        exact
    )
    assert set(exact) == set(ends(graph.node))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.onnx"]


def export_until_killed(model: Path, out: Path, images: Path) -> None:
    """Body of a process that is killed while onnxruntime looks at ranges, by files in temporary folders."""
    tempfile.tempdir = str(out.with_name("temporary"))
    MinMaxCalibrater.collect_data = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    export_network([model], out, images=images, int8=True)


def test_what_a_kill_leaves_is_removed_by_the_next_export(
    plan: Plan, blobs: Path, tmp_path: Path, processes: Any
) -> None:
    checkpoint(plan, tmp_path / "fold_0", 0)
    how = (tmp_path / "fold_0", tmp_path / "out", blobs / "imagesTr")
    (temporary := tmp_path / "temporary").mkdir()
    process = processes.Process(target=export_until_killed, args=how)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(temporary.iterdir())
    assert list(how[1].rglob("*.onnx"))
    export_network([how[0]], how[1])
    assert sorted(path.name for path in how[1].iterdir()) == ["model.json", "model.onnx"]


class Steps(nn.Module):
    """A region where an image is brighter than `whole`, and one within it where it is brighter than `part`."""

    def __init__(self, whole: float, part: float) -> None:
        super().__init__()
        self.whole, self.part = whole, part

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x, x - self.whole, x - self.part], 1)


def test_regions_agree_as_wholes(plan: Plan, blobs: Path) -> None:
    """Where the part is larger in one of them, both have the same whole."""
    own, case = replace(plan, regions=[[0], [1, 2], [2]]), read_dataset(blobs).cases[0]
    networks = Steps(1.0, 2.0), Steps(1.0, 3.5)
    maps = [predict_case(network, case, own)[0] for network in networks]
    one, other = (labels == 2 for labels in maps)
    dice = agreement(*networks, [case], own)["dice"]
    assert dice == pytest.approx({"near": 1, "far": 2 * (one & other).sum() / (one.sum() + other.sum())})
    assert 0 < dice["far"] < 0.95


def test_a_file_that_is_not_as_near_as_was_asked_is_not_kept(
    learnt: Path, blobs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"In int8 label maps differ.*\(1\.1 is asked\)"):
        export_network(
            [learnt], tmp_path / "out", images=blobs / "imagesTr/case_0.nii.gz", int8=True, agree=1.1
        )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("how", [{"images": None}, {"to": "torch"}])
def test_int8_needs_images_and_onnx(learnt: Path, blobs: Path, tmp_path: Path, how: dict) -> None:
    with pytest.raises(UsageError, match=r"--int8 is for --to onnx, and needs images"):
        export_network([learnt], tmp_path / "out", int8=True, **{"images": blobs / "imagesTr", **how})
    assert not (tmp_path / "out").exists()


def test_the_first_and_last_products_are_told_by_what_they_read() -> None:
    def node(kind: str, given: str, made: str) -> onnx.NodeProto:
        return onnx.helper.make_node(kind, given.split(), made.split(), name=made)

    graph = [
        node("Mul", "image", "a"),
        node("Conv", "a", "b"),  # first
        node("Conv", "image", "skip"),  # first
        node("Sigmoid", "b", "c"),
        node("Conv", "c", "d"),
        node("Add", "d skip", "e"),
        node("Conv", "e", "f"),  # last, with what follows
        node("Resize", "f", "logits"),
    ]
    assert ends(graph) == ["b", "skip", "f"]
