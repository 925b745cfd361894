"""Fine-tuning of few numbers and moves to other bases: what is frozen stays, what is merged computes the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SHORT
from rich.console import Console

from kanseg.config import load_config
from kanseg.errors import UsageError
from kanseg.layers.families import FAMILIES, conv_layer
from kanseg.models import create_model
from kanseg.study import adapt, merge, refit
from kanseg.study.peft import PLACE, merged
from kanseg.training.checkpoint import load_checkpoint, load_model, part
from kanseg.training.fit import fit

SMALL = {"features_per_stage": (8, 16), "strides": (1, 2), "kernel_sizes": (3, 3)}
WAYS = [{"rank": 2}, {"functions": [2, 3]}, {"rank": 2, "functions": [3]}]


def net(basis="gram", classes=3, **options):
    torch.manual_seed(0)
    return create_model("ukanet", 2, 1, classes, basis=basis, **{**SMALL, **options})


def step(model, x, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_same_function_before_and_a_plain_network_after(how):
    model, x = net(), torch.randn(2, 1, 16, 16)
    plain = copy.deepcopy(model)
    adapt(model, **how)
    assert torch.equal(model(x), plain(x))
    step(model, x)
    found, state = model(x), model.state_dict()
    assert not torch.allclose(found, plain(x), atol=1e-3)
    plain.load_state_dict(merged(model, state))  # the keys of a network that was never adapted
    assert torch.allclose(plain(x), found, atol=1e-6)
    merge(model)
    assert torch.allclose(model(x), found, atol=1e-6)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_low_rank_is_low_and_small():
    model, x = net(features_per_stage=(16, 32)), torch.randn(2, 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, rank=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.2 * sum(p.numel() for p in before.values())
    step(model, x)
    for name, value in merged(model, model.state_dict()).items():
        if value.dim() > 1 and "head" not in name:
            change = (value - before[name]).flatten(1)
            assert torch.linalg.matrix_rank(change, atol=1e-6) <= 2, name


def test_chosen_functions_alone_change():
    model, x = net(), torch.randn(2, 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(adapt(model, functions=[3]), x)
    for name, value in merged(model, model.state_dict()).items():
        change = value - before[name]
        if name.endswith("basis_weight"):
            by_function = change.unflatten(1, (-1, 4))
            assert not by_function[:, :, :3].any()
            assert by_function[:, :, 3].any()
        elif name.endswith("base_weight"):
            assert not change.any()
    assert not torch.equal(model.heads[0].weight, before["heads.0.weight"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_adapted(family):
    torch.manual_seed(0)
    layer, x = conv_layer(family)(2, 4, 8), torch.randn(2, 4, 9, 9)
    before = layer(x).detach()
    adapt(layer, rank=1)
    assert torch.allclose(layer(x), before, atol=1e-6)
    step(layer, x)
    found = layer.eval()(x)
    assert not torch.allclose(found, before, atol=1e-4)
    assert torch.allclose(merge(layer)(x), found, atol=1e-5)


@pytest.mark.parametrize("options", [{"shared_by": 4, "base": False}, {}], ids=str)
def test_functions_that_channels_share_are_no_weights_to_adapt(options):
    model, x = net(layer_options=options), torch.randn(2, 1, 16, 16)
    before = model(x).detach()
    assert torch.equal(adapt(model, rank=1)(x), before)
    step(model, x)
    assert refit(merge(model), net(layer_options=options)) == {}


def test_layers_that_share_a_weight_and_patterns_that_fit_nothing_are_refused():
    model = net()
    with pytest.raises(UsageError, match="No parameter fits the pattern 'hed"):
        adapt(model, rank=1, train=["hed*"])
    first, second = (layer.conv for layer in model.decoder[0].layers)
    second.basis_weight = first.basis_weight
    if second.basis_weight is first.basis_weight:
        with pytest.raises(UsageError, match="share a weight"):
            adapt(model, rank=1)


def test_what_was_frozen_before_stays_frozen_after():
    model = net()
    model.encoder.requires_grad_(False)
    merge(adapt(model, rank=1))
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.heads.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "rank of 1 or more"),
        ({"functions": [4]}, "0 to 3"),
        ({"functions": [1, 1]}, "different numbers"),
    ],
)
def test_what_cannot_be(how, says):
    with pytest.raises(UsageError, match=says):
        adapt(net(), **how)


def test_plain_networks_and_adapted_ones_are_refused():
    with pytest.raises(UsageError, match="has none"):
        adapt(net(None), functions=[1])
    with pytest.raises(UsageError, match="merge them"):
        adapt(adapt(net(), rank=1), rank=1)


@pytest.mark.parametrize(
    ("basis", "options", "more", "close"),
    [
        ("gram", {"degree": 3}, {"degree": 5}, 1e-3),  # its polynomials depend on the degree
        ("legendre", {"degree": 2}, {"degree": 4}, 1e-4),
        ("jacobi", {"degree": 2}, {"degree": 3}, 1e-4),
        ("bernstein", {"degree": 2}, {"degree": 5}, 1e-4),
        # Beyond the grid its outermost functions differ.
        ("bspline", {"grid_size": 4, "grid_range": [-3, 3]}, {"grid_size": 8, "grid_range": [-3, 3]}, 0.05),
    ],
)
def test_more_functions_compute_the_same(basis, options, more, close):
    old, new = net(basis, layer_options=options), net(basis, layer_options=more)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            if name.endswith("beta"):
                parameter.add_(0.1)
    own = {k: v for k, v in old.state_dict().items() if v.shape == new.state_dict()[k].shape}
    new.load_state_dict(own, strict=False)
    fitted = refit(old, new)
    assert set(fitted) == {name for name in new.state_dict() if name.endswith("basis_weight")}
    for name, parameter in old.named_parameters():
        if name.endswith("beta"):  # learned numbers that both have go on from where they were
            assert torch.equal(new.get_parameter(name)[: len(parameter)], parameter)
    new.load_state_dict(fitted, strict=False)
    assert (new(x) - old(x)).norm() / old(x).norm() < close


@pytest.mark.parametrize(
    ("basis", "options"),
    [
        ("bspline", {"grid_size": 8, "grid_range": [-5, 5]}),  # functions that are zero wherever one looks
        ("relu", {"grid_size": 5}),
        ("rational", {}),
        ("fourier", {}),
        ("rbf", {}),
    ],
)
def test_the_same_basis_keeps_its_weights(basis, options):
    old, new = (net(basis, layer_options=options) for _ in range(2))
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.01)
    new.load_state_dict(old.state_dict())
    assert refit(old, new) == {}


def test_a_finer_grid_of_learned_places_is_finer():
    old, new = net("relu", layer_options={"grid_size": 4}), net("relu", layer_options={"grid_size": 8})
    fresh = {name: value.clone() for name, value in new.state_dict().items() if "phase" in name}
    refit(old, new)
    assert fresh
    assert all(torch.equal(new.state_dict()[name], value) for name, value in fresh.items())


def test_another_family_comes_near_and_the_same_one_stays():
    old, new = net("legendre"), net("jacobi")
    assert refit(old, net("legendre")) == {}
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 1, 16, 16)
    far = (new(x) - old(x)).norm() / old(x).norm()
    new.load_state_dict(refit(old, new), strict=False)
    near = (new(x) - old(x)).norm() / old(x).norm()
    assert near < 1e-4 < 0.1 < far  # both span the cubic polynomials


@pytest.mark.parametrize("how", ["rank=2", "functions=[3]"])
def test_a_run_trains_changes_alone_and_its_model_is_plain(fit_balls, tmp_path, how):
    old, new = tmp_path / "old", tmp_path / "new"
    fit_balls("training.max_epochs=1", run=old)
    adapted = [
        "training.lr=0.01",
        f"training.weights={old}",
        f"training.adapt.{how}",
        "training.max_epochs=2",
    ]
    fit_balls(*adapted, run=new)
    before, after = (part(load_checkpoint(run / "fold_0/best.safetensors")[0], "model") for run in (old, new))
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    last = part(load_checkpoint(new / "fold_0/last.safetensors")[0], "model")
    frozen = {name: value for name, value in last.items() if name.endswith(".original")}
    assert frozen
    for name, value in frozen.items():
        assert torch.equal(value, before[name.replace(PLACE, ".").removesuffix(".original")])
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert any(name.endswith("basis_weight") for name in changed)
    (new / "fold_0/best.safetensors").unlink()  # as after a kill before the first validation
    model, _, _ = load_model(new)
    assert set(model.state_dict()) == set(before)


def test_it_resumes_to_the_same_weights(fit_balls, tmp_path):
    old = tmp_path / "old"
    fit_balls("training.max_epochs=1", run=old)
    adapted = [f"training.weights={old}", "training.adapt.rank=2", "training.lr=0.01"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit_balls(*adapted, "training.max_epochs=2", "training.schedule=constant", run=whole)
    fit_balls(*adapted, "training.max_epochs=1", "training.schedule=constant", run=parts)
    fit_balls(*adapted, "training.max_epochs=2", "training.schedule=constant", run=parts, resume=True)
    ends = [load_checkpoint(run / "fold_0/last.safetensors")[0] for run in (whole, parts)]
    for name, value in part(ends[0], "model").items():
        assert torch.equal(value, part(ends[1], "model")[name]), name


def test_what_begins_afresh_is_trained_as_it_is(balls, tmp_path):
    """The last layer of U2KANet, from classes to classes, has no head in its name."""
    dataset, plan = balls
    plan = replace(plan, patch_size=[32, 32, 32])
    deep = ["model.name=u2kanet_small", "training.max_epochs=1", "training.steps_per_epoch=2"]
    more = {"label_names": (*plan.label_names, "more"), "label_values": (*plan.label_values, 9)}
    grown, wider = (
        replace(plan, **{key: list(value) for key, value in more.items()}),
        replace(dataset, **more),
    )
    old = tmp_path / "old"
    fit(load_config(overrides=[*SHORT, *deep]), plan, dataset, old, console=Console(quiet=True))
    ends = []
    for lr in ("1e-12", "0.01"):
        changes = [f"training.weights={old}", "training.adapt.functions=[2]", f"training.lr={lr}"]
        run = tmp_path / lr
        fit(load_config(overrides=[*SHORT, *deep, *changes]), grown, wider, run, console=Console(quiet=True))
        tensors, info = load_checkpoint(run / "fold_0/last.safetensors")
        assert "together.weight" in info["fresh"]
        ends.append(tensors["model.together.weight"])
        assert load_model(run)[0].together.weight.shape == ends[0].shape
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_a_run_cannot_become_an_adapted_one_or_another(fit_balls, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    fit_balls("training.max_epochs=1", run=old)
    fit_balls("training.max_epochs=1", f"training.weights={old}", "training.adapt.rank=2", run=new)
    for run, change in ((new, "rank=3"), (new, "functions=[1]"), (old, "rank=2")):
        before = (run / "config.json").read_text()
        with pytest.raises(UsageError, match="cannot change in a training that has begun"):
            fit_balls(f"training.adapt.{change}", run=run, resume=True, override=True)
        assert (run / "config.json").read_text() == before
        fit_balls("training.max_epochs=1", run=run, resume=True)


@pytest.mark.parametrize("wrong", ["training.adapt.functions=[9]", "training.adapt.train=[hed*]"])
def test_what_cannot_be_adapted_leaves_no_run(fit_balls, tmp_path, wrong):
    old, new = tmp_path / "old", tmp_path / "new"
    fit_balls("training.max_epochs=1", run=old)
    with pytest.raises(UsageError):
        fit_balls(f"training.weights={old}", "training.adapt.rank=1", wrong, run=new)
    assert not new.exists()


def test_it_needs_weights(fit_balls):
    with pytest.raises(UsageError, match="training.weights"):
        fit_balls("training.adapt.rank=2")


def test_a_run_goes_on_with_more_degrees(fit_balls, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    fit_balls("training.max_epochs=1", run=old)
    more = ["training.lr=1e-12", f"training.weights={old}", "model.options.layer_options={degree:5}"]
    fit_balls("training.max_epochs=1", *more, run=new)
    (before, _, _), (after, _, info) = load_model(old), load_model(new)
    assert info["model"]["options"]["layer_options"] == {"degree": 5}
    x = torch.randn(1, 1, 16, 16, 16)
    assert (after(x) - before(x)).norm() < 1e-3 * before(x).norm()
