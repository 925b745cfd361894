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
from kanseg.layers import FAMILIES
from kanseg.models import MODELS
from kanseg.study.peft import adapt
from kanseg.training.checkpoint import (
    adaptation,
    build_model,
    load_checkpoint,
    load_model,
    part,
    save_checkpoint,
    unstarted,
)
from kanseg.training.finetune import Ends, Start, check_encoder_channels, read_start, transfer
from kanseg.training.fit import fit

SMALL = {"features_per_stage": (4, 8), "strides": (1, 2), "kernel_sizes": (3, 3)}


def described(channels=1, classes=2, name="ukanet", **options):
    sizes = {"spatial_dims": 2, "in_channels": channels, "out_channels": classes}
    return {"name": name, **sizes, "options": {**SMALL, **options} if name == "ukanet" else options}


def started(spec, start, classes=(), channels=(), sigmoid=None):
    """A new network of this description after `transfer`, what was said, and what begins afresh."""
    model = build_model(spec).eval()
    return model, *transfer(model, spec, start, Ends(channels, classes, sigmoid))


def known(spec, classes=(), channels=(), sigmoid=None):
    """Weights of a network of this description with names, and the network."""
    model = build_model(spec).eval()
    return Start("weights", model.state_dict(), spec, Ends(channels, classes, sigmoid)), model


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
    start, old = known(described(classes=3), ["background", "a", "b"], ["T1"])
    torch.manual_seed(1)
    untouched = build_model(described(classes=4))
    torch.manual_seed(1)
    new, told, afresh = started(described(classes=4), start, ["background", "b", "c", "a"], ["T1"])
    assert afresh == ["heads.0.weight", "heads.0.bias"]
    assert torch.equal(new.heads[0].weight[[0, 1, 3]], old.heads[0].weight[[0, 2, 1]])
    assert torch.equal(new.heads[0].weight[2], untouched.heads[0].weight[2])
    assert "2 adapted (heads.0.weight" in told
    assert "Classes by name: background, b, a; new: c." in told
    assert "Channels" not in told


def test_classes_in_another_order_take_their_weights_along():
    start, old = known(described(classes=3), ["background", "a", "b"], ["T1"])
    new, _, afresh = started(described(classes=3), start, ["background", "b", "a"], ["T1"])
    assert torch.equal(new.heads[0].weight, old.heads[0].weight[[0, 2, 1]])
    assert afresh == []
    other, _, afresh = started(described(classes=3), start, ["background", "c", "d"], ["T1"])
    assert afresh == ["heads.0.weight", "heads.0.bias"]
    assert not torch.equal(other.heads[0].weight[1:], old.heads[0].weight[1:])
    start.ends.classes = ["background", "label 1", "label 2"]
    named, told, afresh = started(described(classes=3), start, ["background", "a", "b"], ["T1"])
    assert afresh == []
    assert torch.equal(named.heads[0].weight, old.heads[0].weight)
    assert "Classes in their order: background as background, a as label 1, b as label 2." in told


@pytest.mark.parametrize("most", [3, 8], ids=["no more", "few more"])
def test_classes_of_a_network_that_refuses_more_go_by_name_or_it_is_said_that_they_do_not(most, monkeypatch):
    class Few(torch.nn.Conv2d):
        def __init__(self, spatial_dims, in_channels, out_channels):
            if out_channels > most:
                raise UsageError(f"no more than {most} classes")
            super().__init__(in_channels, out_channels, 1)

    monkeypatch.setitem(MODELS._entries, "few", Few)
    spec = described(classes=3, name="few")
    start, old = known(spec, ["background", "a", "b"], ["T1"])
    new, told, _ = started(spec, start, ["background", "b", "a"], ["T1"])
    by_name = most > 3
    assert torch.equal(new.weight, old.weight[[0, 2, 1]] if by_name else old.weight)
    expected = "by name: background, b, a" if by_name else "in their order: background as background, b as a"
    assert f"Classes {expected}" in told


@pytest.mark.parametrize("before", [False, True], ids=["classes to regions", "regions to classes"])
def test_a_head_of_another_kind_begins_afresh_and_the_log_says_so(before):
    names = ["background", "whole", "core"]
    start, old = known(described(classes=3), names, ["T1"], before)
    new, told, afresh = started(described(classes=3), start, names, ["T1"], not before)
    assert set(afresh) == {"heads.0.weight", "heads.0.bias"}
    assert not torch.equal(new.heads[0].weight, old.heads[0].weight)
    assert "Classes begin afresh" in told
    assert told.index("sigmoid") < told.index("softmax") if before else told.index("softmax")
    _, told, afresh = started(described(classes=3), start, names, ["T1"], before)
    assert not afresh
    assert "Classes" not in told


NETWORKS = [
    *(described(basis=basis) for basis in (*FAMILIES, None)),
    described(basis="gram", layer_options={"shared_by": 8, "base": False}),
    described(encoder="timm/resnet18"),  # its first map is coarser, so a second layer sees the image
    described(name="ukan", features=(8, 8, 8, 8)),
    described(name="u2kanet_small", width=0.25),
    described(name="ukagnet", width=0.25),
    described(
        name="monai", network="UNet", arguments={"channels": (4, 8), "strides": (2,), "num_res_units": 1}
    ),
]


@pytest.mark.parametrize("spec", NETWORKS, ids=lambda spec: f"{spec['name']} {spec['options']}"[:60])
@pytest.mark.parametrize("order", [[1, 0], [2, 0, 1]])
def test_the_same_channels_and_classes_in_another_order_are_the_same_function(spec, order):
    channels, names, classes = ["T1", "T2", "FLAIR"][: len(order)], ["background", "a", "b"], [0, 2, 1]
    spec = {**spec, "in_channels": len(order), "out_channels": 3}
    start, old = known(spec, names, channels)
    names, channels = [names[c] for c in classes], [channels[c] for c in order]
    new, told, afresh = started(spec, start, names, channels)
    x = torch.randn(2, len(order), 32, 32, dtype=torch.float64)
    expected = old.double()(x)[:, classes]
    torch.testing.assert_close(
        new.double()(x[:, order]), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )
    assert not afresh
    assert f"Channels by name: {', '.join(channels)}." in told


@pytest.mark.parametrize("basis", ["gram", None])
def test_further_channels_start_from_the_mean_and_known_ones_keep_their_weights(basis):
    start, _ = known(described(2, basis=basis), ["b", "x"], ["T1", "T2"])
    new, told, afresh = started(described(3, basis=basis), start, ["b", "x"], ["T2", "FLAIR", "T1"])
    differing = [k for k, v in start.weights.items() if v.shape != new.state_dict()[k].shape]
    assert differing
    assert set(differing) == set(afresh)
    for name in differing:
        before, after = start.weights[name], new.state_dict()[name]
        axis = next(a for a in range(before.dim()) if before.shape[a] != after.shape[a])
        before, after = (t.movedim(axis, 0).unflatten(0, (n, -1)) for t, n in ((before, 2), (after, 3)))
        assert torch.equal(after[[2, 0]], before)
        assert torch.allclose(after[1], before.mean(0))
    assert "Channels by name: T2, T1; as the mean of all: FLAIR." in told


def test_channels_without_a_name_in_common_are_taken_in_their_order():
    start, old = known(described(2), ["b", "x"], ["T1", "T2"])
    new, told, afresh = started(described(2), start, ["b", "x"], ["CT", "PET"])
    assert not afresh
    assert all(torch.equal(new.state_dict()[name], value) for name, value in old.state_dict().items())
    assert "Channels in their order: CT as T1, PET as T2." in told
    new, told, afresh = started(described(2), start, ["b", "x"], ["T2", "PET"])
    first = "encoder.stages.0.0.layers.0.conv.base_weight"
    assert first in afresh
    assert torch.equal(new.state_dict()[first][:, 0], old.state_dict()[first][:, 1])
    assert "Channels by name: T2; as the mean of all: PET." in told


def test_an_encoder_with_channels_in_another_order_is_refused(tmp_path, monkeypatch):
    """`load_encoder` takes them as they lie; training.weights goes by name."""
    stored = {"plan": {"channel_names": ["T1", "T2"], "label_names": ["b", "x"]}}
    save_checkpoint(tmp_path / "model.safetensors", {}, stored)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        spec = described(2, encoder_weights=str(source))
        for fine in (["T1", "T2"], ["T1", "CT"], ["CT", "PET"], ["T2", "T1", "CT"]):
            check_encoder_channels(spec, Ends(fine))
        with pytest.raises(UsageError, match=r"channels T1, T2, the data T2, T1.* training.weights="):
            check_encoder_channels(spec, Ends(["T2", "T1"]))
    monkeypatch.chdir(tmp_path)  # a model that lies there is none that was given
    check_encoder_channels(described(2), Ends(["T2", "T1"]))


def test_channels_of_one_name_go_by_their_order():
    """Two channels "MRI" are usual in dataset.json."""
    start, old = known(described(2), ["b", "x"], ["MRI", "MRI"])
    new, _, afresh = started(described(2), start, ["b", "x"], ["MRI", "mri"])
    assert not afresh
    assert all(torch.equal(new.state_dict()[name], value) for name, value in old.state_dict().items())
    new, _, _ = started(described(3), start, ["b", "x"], ["MRI", "CT", "MRI"])
    first = "encoder.stages.0.0.layers.0.conv.base_weight"
    assert torch.equal(new.state_dict()[first][:, [0, 2]], old.state_dict()[first])


def test_what_begins_afresh_beside_low_ranks_are_parameters_alone():
    """Statistics of new batch norms are none, and no pattern of what is trained."""
    spec = described(basis=None, norm="batch")
    encoder = {n: v for n, v in build_model(spec).state_dict().items() if n.startswith("encoder.")}
    model, _, afresh = started(spec, Start("weights", encoder))
    adapt(model, **adaptation({"rank": 1, "functions": [], "train": []}, afresh))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained >= {
        name for name, _ in model.named_parameters() if name.startswith(("decoder.", "heads."))
    }


def test_rates_are_of_the_names_beside_frozen_weights(fit_balls, tmp_path):
    """As of LoRA+, whose halves learn at different rates; what is checked before is what is trained after."""
    fit_balls("training.max_epochs=1")
    low = [f"training.weights={tmp_path / 'run'}", "training.max_epochs=1", "training.adapt.rank=1"]
    fit_balls(*low, "training.lr_scale=['*.up=16']", run=tmp_path / "next")
    for wrong in ("training.lr_scale=['*.base_weight=0.1']", "training.freeze=['*.base_weight']"):
        with pytest.raises(UsageError, match="No parameter fits the pattern"):
            fit_balls(*low, wrong, run=tmp_path / "none")
    with pytest.raises(UsageError, match="leaves no parameter"):
        fit_balls(
            *low, "training.freeze=['*.up','*.down','*.bias','heads.*','*.norm.*']", run=tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


def test_what_a_training_started_from_is_not_read_again(fit_balls, tmp_path):
    fit_balls("training.max_epochs=1")
    best = (tmp_path / "run/fold_0/last.safetensors").rename(tmp_path / "encoder.safetensors")
    run, start = tmp_path / "next", f"model.options.encoder_weights={best}"
    fit_balls("training.max_epochs=1", start, run=run)
    best.unlink()
    assert fit_balls("training.max_epochs=2", start, run=run, resume=True)["epochs"] == 2
    assert load_checkpoint(run / "fold_0/last.safetensors")[1]["model"]["options"]["encoder_weights"]
    inner = {"network": "FlexibleUNet", "arguments": {"backbone": "resnet18", "pretrained": True}}
    spec = described(name="monai", **inner)
    assert unstarted(spec)["options"]["arguments"] == {"backbone": "resnet18", "pretrained": False}
    assert spec["options"] == inner


def test_more_degrees_of_channels_in_another_order_are_the_same_function():
    start, old = known(described(2, basis="legendre"), ["b", "x"], ["T1", "T2"])
    spec = described(2, basis="legendre", layer_options={"degree": 5})
    new, told, _ = started(spec, start, ["b", "x"], ["T2", "T1"])
    x = torch.randn(2, 2, 16, 16)
    assert torch.allclose(new(x.flip(1)), old(x), atol=1e-4)
    assert "moved to other bases" in told


def test_the_neighbours_of_a_slice_are_channels_of_their_own():
    plan = {"channel_names": ["T1", "T2"], "label_names": ["b", "x"]}
    five, three, one = (Ends.of({**plan, "slices": n}) for n in (5, 3, 1))
    assert three.channels[2:4] == five.channels[4:6] == one.channels
    assert three.channels == five.channels[2:8]
    assert len(set(five.channels)) == 10
    start, old = known(described(6), three.classes, three.channels)
    new, _, _ = started(described(2), start, one.classes, one.channels)
    first = "encoder.stages.0.0.layers.0.conv.base_weight"
    assert torch.equal(new.state_dict()[first], old.state_dict()[first][:, 2:4])


def test_the_plain_twin_of_a_kan_network_says_what_of_it_is_left_aside():
    start, old = known(described(basis="gram"), ["b", "x"], ["T1"])
    twin, told, _ = started(described(basis=None), start, ["b", "x"], ["T1"])
    common = old.state_dict().keys() & twin.state_dict().keys()
    aside = [name for name in old.state_dict() if name not in common]
    assert f"{len(common)} of {len(old.state_dict())} tensors taken" in told
    assert f"{len(aside)} left aside ({aside[0]}" in told


def test_repeated_unnamed_channels_give_the_same_output():
    start, old = known(described(1, basis=None, norm="batch"), ["", ""], [""])
    new, _, _ = started(described(3, basis=None, norm="batch"), start, ["", ""], ["", "", ""])
    x = torch.randn(1, 1, 16, 16)
    assert torch.allclose(old(x), new(x.expand(1, 3, 16, 16)), atol=1e-5)


@pytest.mark.parametrize("wrap", ["", "state_dict"])
def test_a_state_dict_file_is_read_and_one_with_code_is_refused(tmp_path, wrap):
    weights = build_model(described()).state_dict()
    torch.save({wrap: weights} if wrap else weights, tmp_path / "w.pth")
    found = read_start(tmp_path / "w.pth").weights
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    assert read_start(tmp_path / "w.safetensors").weights.keys() == weights.keys()
    torch.save(build_model(described()), tmp_path / "model.pth")
    with pytest.raises(UserError, match="no plain state_dict"):
        read_start(tmp_path / "model.pth")
    with pytest.raises(UserError, match="There are no weights"):
        read_start(tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.pth"):
        read_start(tmp_path / "broken.pth")


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match="No weight of weights fits"):
        started(described(), Start("weights", torch.nn.Linear(2, 2).state_dict()))


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
    network = bundle(tmp_path / "bundle", SEGRESNET)
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


SEGRESNET = {
    "_target_": "monai.networks.nets.SegResNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "init_filters": 8,
    "blocks_down": [1, 1],
    "blocks_up": [1],
}


def test_the_classes_that_a_bundle_names_go_by_name(tmp_path):
    network = bundle(tmp_path, SEGRESNET)
    classes = {"0": "background", "1": "Liver", "2": "tumour"}
    formats = {
        "outputs": {"pred": {"channel_def": classes}},
        "inputs": {"image": {"channel_def": {"0": "CT"}}},
    }
    (tmp_path / "configs/metadata.json").write_text(json.dumps({"network_data_format": formats}))
    (tmp_path / "configs/inference.json").rename(tmp_path / "configs/inference.yaml")  # JSON is YAML, too
    start = read_start(tmp_path)
    new, told, _ = started(start.spec, start, ["background", "tumour", "liver"], ["CT"])
    last = "conv_final.2.conv.weight"
    assert torch.equal(new.network.state_dict()[last], network.state_dict()[last][[0, 2, 1]])
    assert "Classes by name: background, tumour, liver." in told


def test_a_bundle_of_another_dimension_is_refused(balls, tmp_path):
    dataset, plan = balls
    bundle(tmp_path / "bundle", SEGRESNET)
    flat = replace(plan, spatial_dims=2, patch_size=[16, 16], slice_axis=2)
    config = load_config(overrides=[*SHORT, f"training.weights={tmp_path / 'bundle'}"])
    with pytest.raises(UsageError, match="a 3D network, the plan is 2D"):
        fit(config, flat, dataset, tmp_path / "new", console=Console(quiet=True))


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
    model = build_model(described(1, 3, "monai", network=network, arguments=arguments))
    assert model.eval()(torch.zeros(1, 1, 37, 50)).shape == (1, 3, 37, 50)


def test_a_classifier_lends_its_encoder_to_a_segmenter(tmp_path):
    from kanseg.training.checkpoint import named

    spec = described(1, 3, encoder="reskanet18")
    segmenter = build_model(spec)
    classifier = torch.nn.Module()
    classifier.encoder = segmenter.encoder
    info = {"model": {"name": "classifier", "options": {}, "in_channels": 1, "out_channels": 10}}
    path = save_checkpoint(tmp_path / "model.safetensors", named("model", classifier.state_dict()), info)
    start = read_start(path)
    fresh, told, _ = started(spec, start, ["b", "x", "y"], ["T1"])
    assert "new" in told
    for name, value in fresh.encoder.state_dict().items():
        assert torch.equal(value, segmenter.encoder.state_dict()[name])
