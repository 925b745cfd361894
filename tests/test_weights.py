"""Weights that come with kanseg: each loads by name, says what it was trained on, and segments what it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kanseg import Segmenter, weights
from kanseg.cli import app
from kanseg.errors import UserError
from kanseg.evaluation.metrics import dice
from kanseg.inference.members import find_members
from kanseg.training import checkpoint
from kanseg.training.checkpoint import (
    EXPORTED,
    WEIGHTS,
    find_checkpoint,
    load_checkpoint,
    load_model,
    members,
    shipped,
)
from kanseg.training.finetune import read_start
from kanseg.weights import LARGEST, pack, table_of_weights

CARD = {"title": "a ball", "images": "noise", "data": "none", "licence": "MIT", "dice": ".9"}
HIPPOCAMPUS = Path("../shared/data/hippocampus")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_file_is_small_loads_and_has_a_model_card_without_the_paths_of_a_machine(name: str) -> None:
    for file in members(WEIGHTS / name / EXPORTED):
        check_file(file, (WEIGHTS / name / "README.md").read_text(encoding="utf-8"))


def check_file(file: Path, card: str) -> None:
    assert file.stat().st_size <= LARGEST
    network, plan, info = load_model(file)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in network.parameters())
    written = json.dumps(info)
    assert "/home" not in written
    assert "/work" not in written
    assert info["card"]["licence"].partition(" (")[0] in card
    assert info["card"]["dice"].partition(": ")[2] in card
    assert all(label in card.lower() for label in (label.lower() for label in plan.label_names[1:]))


def test_the_table_lists_them(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["models", "--weights", "--json"])
    rows = json.loads(listed.stdout)
    assert [row["name"] for row in rows] == list(shipped()) == [row["name"] for row in table_of_weights()]
    shown = CliRunner().invoke(app, ["models", "--weights"], env={"COLUMNS": "200"}).stdout
    for row in rows:
        assert f"kanseg predict -m {row['name']}" in shown
        assert row["parameters"] == sum(p.numel() for p in load_model(row["name"])[0].parameters())


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="needs ../shared/data/hippocampus")
def test_hippocampus_segments_a_scan_from_the_command_line(tmp_path: Path) -> None:
    # These cases were trained on: this is about the way to the mask, not about accuracy.
    for number in ("001", "003"):
        scan, mask = HIPPOCAMPUS / f"imagesTr/hippocampus_{number}.nii.gz", tmp_path / "mask.nii.gz"
        done = CliRunner().invoke(app, ["predict", "-m", "hippocampus", "-i", str(scan), "-o", str(mask)])
        assert done.exit_code == 0, done.output
        made, image = nib.load(mask), nib.load(scan)
        assert made.shape == image.shape
        assert np.array_equal(made.affine, image.affine)
        label = np.asarray(nib.load(HIPPOCAMPUS / f"labelsTr/hippocampus_{number}.nii.gz").dataobj)
        found = np.asarray(made.dataobj)
        assert min(dice(found == value, label == value) for value in (1, 2)) > 0.8


def test_a_packed_checkpoint_predicts_in_half_the_bytes_what_the_whole_one_does(
    fit_balls, tmp_path, monkeypatch
):
    fit_balls("training.max_epochs=2")
    best = tmp_path / "run/fold_0/best.safetensors"
    file = pack(best, "ball", CARD, tmp_path / "weights")
    assert file.stat().st_size < 0.7 * best.stat().st_size
    assert str(tmp_path) not in json.dumps(load_checkpoint(file)[1])
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        whole, half = (load_model(path)[0](x) for path in (best, "ball"))
    assert (whole - half).abs().max() < 2e-3 * whole.abs().max()
    assert Segmenter.load("ball").plan.label_values == [0, 7]
    assert read_start("ball").spec["name"] == "ukanet"
    (tmp_path / "ball").mkdir()  # a folder of data may have that name
    assert find_checkpoint("ball") == file
    assert table_of_weights()[0]["title"] == "a ball"
    best.rename(tmp_path / "ball/best.safetensors")  # but a model goes before
    assert find_checkpoint("ball") == Path("ball/best.safetensors")


def test_networks_of_one_model_predict_together(fit_balls, balls, tmp_path, monkeypatch):
    for number in (1, 2):
        run = tmp_path / f"run_{number}"
        fit_balls("training.max_epochs=2", f"training.seed={number}", run=run)
        pack(run / "fold_0/best.safetensors", "ball", CARD, tmp_path / "weights", number=number)
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_members("ball")] == ["model.safetensors", "model_2.safetensors"]
    assert table_of_weights()[0]["networks"] == 2
    both, x = Segmenter.load("ball").network, torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        each = [load_model(file)[0](x).softmax(1) for file in find_members("ball")]
        assert torch.allclose(both(x).softmax(1), sum(each) / 2, atol=1e-5)
    saved = Segmenter.load("ball").save(tmp_path / "saved")
    image = balls[0].cases[0].images[0]
    made = [Segmenter.load(path).predict(image) for path in ("ball", tmp_path / "saved", saved)]
    assert np.array_equal(made[0], made[1])
    assert len(find_members(saved)) == 1  # a file is itself alone
    (saved.parent / "model_backup.safetensors").write_bytes(saved.read_bytes())
    assert len(find_members(saved.parent)) == 2
    Segmenter.load(saved).save(saved.parent)  # a smaller model takes the place of a larger one
    assert find_members(saved.parent) == [saved]
    done = CliRunner().invoke(
        app, ["predict", "-m", "ball", "-i", str(image), "-o", str(tmp_path / "mask.nii.gz")]
    )
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), made[0])


def test_what_is_too_large_or_says_too_little_is_not_packed(fit_balls, tmp_path, monkeypatch):
    fit_balls("training.max_epochs=2")
    best = tmp_path / "run/fold_0/best.safetensors"
    with pytest.raises(UserError, match="lacks licence, dice"):
        pack(best, "ball", {key: CARD[key] for key in ("title", "images", "data")}, tmp_path)
    monkeypatch.setattr(weights, "LARGEST", 1000)
    with pytest.raises(UserError, match="more than 0"):
        pack(best, "ball", CARD, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_an_unknown_name_tells_the_known_ones(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"come with kanseg \(" + ", ".join(shipped())):
        find_checkpoint("hipocampus")
