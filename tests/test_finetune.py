"""Starting from weights that exist: what has the same name keeps them, whatever the channels and classes are now."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import SHORT
from monai.networks.nets import SegResNet
from rich.console import Console
from safetensors.torch import save_file

from kanseg.config import load_config
from kanseg.errors import UsageError, UserError
from kanseg.models import create_model
from kanseg.training.checkpoint import load_checkpoint, load_model, part
from kanseg.training.finetune import Start, read_start, transfer
from kanseg.training.fit import fit

SMALL = {"features_per_stage": (4, 8), "strides": (1, 2), "kernel_sizes": (3, 3)}


def net(channels=1, classes=2, **options):
    return create_model("ukanet", 2, channels, classes, **{**SMALL, **options})


def started(old, new, classes=(), channels=(), new_classes=(), new_channels=()):
    start = Start("weights", old.state_dict(), None, classes, channels)
    return transfer(new, start, new_classes, new_channels)


def test_a_run_goes_on_from_another_one_with_its_network(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1", "model.options.features_per_stage=[4,8,16]")
    other = tmp_path / "other"
    fit_balls("training.max_epochs=1", "training.lr=1e-12", f"training.weights={tmp_path / 'run'}", run=other)
    (old, _, before), (new, _, after) = load_model(tmp_path / "run"), load_model(other)
    assert after["model"]["options"] == before["model"]["options"]
    assert all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(old.parameters(), new.parameters(), strict=True)
    )
    for path in (tmp_path / "run").rglob("*.safetensors"):
        path.unlink()
    assert fit_balls("training.max_epochs=2", run=other, resume=True)["epochs"] == 2  # the source may be gone


def test_weights_of_another_dimension_are_refused(fit_balls, balls, tmp_path):
    dataset, plan = balls
    fit_balls("training.max_epochs=1", run=tmp_path / "old")
    flat = replace(plan, spatial_dims=2, patch_size=[16, 16], slice_axis=2)
    config = load_config(overrides=[*SHORT, f"training.weights={tmp_path / 'old'}"])
    with pytest.raises(UsageError, match="a 3D network, the plan is 2D"):
        fit(config, flat, dataset, tmp_path / "new", console=Console(quiet=True))


def test_classes_of_the_same_name_keep_their_weights():
    old, new = net(classes=3), net(classes=4)
    fresh = new.heads[0].weight.clone()
    told, afresh = started(old, new, ["background", "a", "b"], ["T1"], ["background", "b", "c", "a"], ["T1"])
    assert afresh == ["heads.0.weight", "heads.0.bias"]
    rows = new.heads[0].weight
    assert torch.equal(rows[[0, 1, 3]], old.heads[0].weight[[0, 2, 1]])
    assert torch.equal(rows[2], fresh[2])
    assert "2 adapted" in told
    assert "heads.0.weight" in told


def test_classes_in_another_order_take_their_weights_along():
    old, new, other = net(classes=3), net(classes=3), net(classes=3)
    started(old, new, ["background", "a", "b"], ["T1"], ["background", "b", "a"], ["T1"])
    assert torch.equal(new.heads[0].weight, old.heads[0].weight[[0, 2, 1]])
    fresh = other.heads[0].weight.clone()
    _, afresh = started(old, other, ["background", "a", "b"], ["T1"], ["background", "c", "d"], ["T1"])
    assert afresh == ["heads.0.weight", "heads.0.bias"]
    assert torch.equal(other.heads[0].weight[1:], fresh[1:])
    named = net(classes=3)
    _, afresh = started(
        old, named, ["background", "label 1", "label 2"], ["T1"], ["background", "a", "b"], ["T1"]
    )
    assert afresh == []
    assert torch.equal(named.heads[0].weight, old.heads[0].weight)


@pytest.mark.parametrize("basis", ["gram", None])
def test_further_channels_start_from_the_mean_and_known_ones_keep_their_weights(basis):
    old, new = net(channels=2, basis=basis), net(channels=3, basis=basis)
    started(old, new, ["b", "x"], ["T1", "T2"], ["b", "x"], ["T2", "FLAIR", "T1"])
    x = torch.randn(2, 2, 16, 16)
    differing = [k for k, v in old.state_dict().items() if v.shape != new.state_dict()[k].shape]
    assert differing
    for name in differing:
        before, after = old.state_dict()[name], new.state_dict()[name]
        axis = next(a for a in range(before.dim()) if before.shape[a] != after.shape[a])
        before, after = (t.movedim(axis, 0).unflatten(0, (n, -1)) for t, n in ((before, 2), (after, 3)))
        assert torch.equal(after[[2, 0]], before)
        assert torch.allclose(after[1], before.mean(0))
    assert new(torch.cat([x, x[:, :1]], 1)).shape == (2, 2, 16, 16)


def test_repeated_unnamed_channels_give_the_same_output():
    old, new = (
        net(channels=1, basis=None, norm="batch").eval(),
        net(channels=3, basis=None, norm="batch").eval(),
    )
    started(old, new, ["", ""], [""], ["", ""], ["", "", ""])
    x = torch.randn(1, 1, 16, 16)
    assert torch.allclose(old(x), new(x.expand(1, 3, 16, 16)), atol=1e-5)


@pytest.mark.parametrize("wrap", ["", "state_dict"])
def test_a_state_dict_file_is_read_and_one_with_code_is_refused(tmp_path, wrap):
    weights = net().state_dict()
    torch.save({wrap: weights} if wrap else weights, tmp_path / "w.pth")
    found = read_start(tmp_path / "w.pth").weights
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    assert read_start(tmp_path / "w.safetensors").weights.keys() == weights.keys()
    torch.save(net(), tmp_path / "model.pth")
    with pytest.raises(UserError, match="no plain state_dict"):
        read_start(tmp_path / "model.pth")
    with pytest.raises(UserError, match="There are no weights"):
        read_start(tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.pth"):
        read_start(tmp_path / "broken.pth")


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match="No weight of weights fits"):
        started(torch.nn.Linear(2, 2), net())


def bundle(folder, definition):
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "configs/metadata.json").write_text("{}")
    (folder / "configs/inference.json").write_text(json.dumps({"network_def": definition}))
    network = SegResNet(
        spatial_dims=3, in_channels=1, out_channels=3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)
    )
    torch.save(network.state_dict(), folder / "models/model.pt")
    return network


def test_a_training_starts_from_a_monai_bundle_with_other_classes(fit_balls, tmp_path):
    definition = {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "init_filters": 8,
        "blocks_down": [1, 1],
        "blocks_up": [1],
    }
    network = bundle(tmp_path / "bundle", {**definition})
    fit_balls("training.max_epochs=1", "training.lr=1e-12", f"training.weights={tmp_path / 'bundle'}")
    tensors, info = load_checkpoint(tmp_path / "run/fold_0/last.safetensors")
    assert info["model"]["name"] == "monai"
    taken = part(tensors, "model")
    for name, value in network.state_dict().items():
        if not name.startswith("conv_final.2"):  # the classes are two now
            assert torch.allclose(taken[f"network.{name}"], value, atol=1e-6), name


def test_a_bundle_whose_network_needs_code_is_explained(tmp_path):
    bundle(tmp_path, {"_target_": "SegResNet", "init_filters": "$2 ** 3"})
    with pytest.raises(UserError, match=r"model\.name=monai"):
        read_start(tmp_path)


@pytest.mark.parametrize("network", ["SegResNet", "DynUNet"])
def test_networks_of_monai_take_any_size(network):
    arguments = {"SegResNet": {"init_filters": 8}}.get(
        network,
        {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [4, 8, 8],
        },
    )
    model = create_model("monai", 2, 1, 3, network=network, arguments=arguments)
    assert model.eval()(torch.zeros(1, 1, 37, 50)).shape == (1, 3, 37, 50)


def test_a_classifier_lends_its_encoder_to_a_segmenter(tmp_path):
    from kanseg.training.checkpoint import named, save_checkpoint

    segmenter = create_model("ukanet", 2, 1, 3, encoder="reskanet18", features_per_stage=(4, 8))
    classifier = torch.nn.Module()
    classifier.encoder = segmenter.encoder
    info = {"model": {"name": "classifier", "options": {}, "in_channels": 1, "out_channels": 10}}
    path = save_checkpoint(tmp_path / "model.safetensors", named("model", classifier.state_dict()), info)
    start = read_start(path)
    assert start.model is None
    fresh = create_model("ukanet", 2, 1, 3, encoder="reskanet18", features_per_stage=(4, 8))
    told, _ = transfer(fresh, start, ["b", "x", "y"], ["T1"])
    assert "new" in told
    for name, value in fresh.encoder.state_dict().items():
        assert torch.equal(value, segmenter.encoder.state_dict()[name])
