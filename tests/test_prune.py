"""Learned functions that say little: which they are, that they stay away, and what a network without them computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_ensemble import checkpoint
from torch import Tensor, nn

from kanseg import KANConv, Segmenter
from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.metrics import dice_of_values
from kanseg.inference.ensemble import Loaded
from kanseg.inference.reduce import prune_model
from kanseg.inference.windows import windows_of
from kanseg.layers import FAMILIES, conv_layer, plain_steps
from kanseg.layers.linear import KANLinear
from kanseg.study import learned_functions, merge, prune, pruned_share, simplify, strengths
from kanseg.study.refit import quantiles
from kanseg.study.visualize import kan_layers
from kanseg.training.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint

WITH_BASES = [family for family in FAMILIES if family not in ("plain", "wavkan")]


def network(family: str = "kagn", groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = (conv_layer(family)(2, 4, 4, groups=groups) for _ in range(2))
    return nn.Sequential(*layers).eval()


def windows(count: int = 3, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, *(shape or (4, 9, 9)), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("basis", ["gram", "bspline", "rational", "relu"])
def test_strengths_are_means_of_the_learned_functions(basis: str, groups: int) -> None:
    conv = KANConv(2, 4, 6, basis=basis, base=False, groups=groups)
    functions = learned_functions(conv, quantiles(1)[0].float())
    found = strengths(nn.Sequential(conv))["0"]
    assert found.shape == (6, 4 // groups, 3, 3)
    torch.testing.assert_close(found[:, :, 1, 1], functions.abs().mean(-1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_strengths_go_by_the_values_of_each_channel(groups: int) -> None:
    conv = KANConv(2, 4, 6, basis="jacobi", base=False, groups=groups)
    values = torch.tensor([-1.0, 0.2, 0.5, 2.0])
    found = strengths(nn.Sequential(conv), [values.view(1, 4, 1, 1).expand(-1, -1, 5, 5)])["0"]
    functions = learned_functions(conv, values).abs()  # (outputs, channels of a group, values)
    for output in range(6):
        first = output // (6 // groups) * (4 // groups)
        for channel in range(4 // groups):
            expected = functions[output, channel, first + channel]
            torch.testing.assert_close(found[output, channel, 1, 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", WITH_BASES)
def test_the_share_that_was_asked_is_gone_and_stays_so_in_training(family: str) -> None:
    net, given = network(family), windows()
    prune(net, 0.3, given)
    layers = kan_layers(net)
    for layer in layers.values():
        zero = (layer.basis_weight == 0).unflatten(1, (-1, layer.basis.num_functions)).all(2)
        assert int(zero.sum()) == round(0.3 * zero.numel())
    before = {name: layer.basis_weight.detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for window in given:
        optimizer.zero_grad()
        net.train()(window).square().mean().backward()
        optimizer.step()
    for name, layer in layers.items():
        weight = layer.basis_weight
        assert torch.equal(weight == 0, before[name] == 0)
        assert not torch.equal(weight, before[name])
    found = net.eval()(given[0])
    assert torch.equal(merge(net)(given[0]), found)
    assert not any("parametrizations" in name for name in net.state_dict())


@pytest.mark.parametrize("family", ["kan", "kagn", "bottleneck_kagn"])
def test_gradients_of_a_pruned_network_are_those_of_plain_steps(family: str) -> None:
    net, x = prune(network(family), 0.5), windows(1)[0]
    weights = torch.randn(2, 4, 9, 9)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        (net(x) * weights).sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    fast = gradients()
    with plain_steps():
        plain = gradients()
    assert len(fast) == len(plain) > 2
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_share_of_nothing_changes_nothing_and_the_weakest_go_first() -> None:
    net, given = network(), windows()
    before, state = net(given[0]), copy.deepcopy(net.state_dict())
    prune(net, 0, given)
    assert torch.equal(net(given[0]), before)
    assert list(net.state_dict()) == list(state)
    known = strengths(net, given)["0.conv"]
    prune(net, 0.25, given)
    left = strengths(net, given)["0.conv"]
    gone = left == 0
    assert known[gone].max() <= known[~gone].min()
    prune(net, 0.5, given)  # those that are gone count
    assert pruned_share(net) == 0.5
    assert not strengths(net, given)["0.conv"][gone].any()


def test_experts_that_no_window_reaches_are_pruned_and_never_simplified() -> None:
    torch.manual_seed(0)
    net = conv_layer("kagn", num_experts=4, k=1, noisy=False)(2, 4, 4).eval()
    given = [windows(1)[0][:1]]  # one sample goes to one expert
    assert len(simplify(copy.deepcopy(net), given, 10.0)) == 1
    assert pruned_share(prune(net, 0.25, given)) == 0.25


def test_fully_connected_layers_are_pruned_too() -> None:
    net = nn.Sequential(KANLinear(5, 4), KANLinear(4, 3)).eval()
    rows = [torch.randn(30, 5)]
    found = strengths(net, rows)
    assert [tuple(one.shape) for one in found.values()] == [(4, 5), (3, 4)]
    assert pruned_share(prune(net, 0.5, rows)) == pytest.approx(0.5)
    assert simplify(merge(net), rows, 10.0)
    assert net(rows[0]).shape == (30, 3)


@pytest.mark.parametrize("family", [f for f in WITH_BASES if f != "grkan"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_with_fewer_functions_is_as_near_as_is_told(family: str, groups: int) -> None:
    torch.manual_seed(0)
    conv, given = conv_layer(family)(2, 4, 8, groups=groups).eval().conv, windows(1, 4, 12, 12)
    layer = next(iter(kan_layers(conv).values()))
    net, seen = nn.Sequential(conv), []
    layer.register_forward_hook(lambda _layer, _inputs, y: seen.append(y.detach().clone()))
    net(given[0])
    numbers = sum(p.numel() for p in net.parameters())
    (told,) = simplify(net, given, 10.0)
    assert sum(p.numel() for p in net.parameters()) < numbers
    assert told.after == 1 < told.before
    seen[1:] = []
    net(given[0])
    before, after = seen
    error = (after - before).square().sum() / (before - before.mean((0, 2, 3), keepdim=True)).square().sum()
    assert told.error == pytest.approx(float(error.sqrt()), rel=1e-3)
    assert not simplify(net, given, 1e-9)


def test_functions_that_are_lines_become_lines_and_others_keep_what_they_need() -> None:
    conv = KANConv(2, 4, 6, basis="hermite", squash="identity")
    cubic = copy.deepcopy(conv)
    with torch.no_grad():
        conv.basis_weight.unflatten(1, (-1, 4))[:, :, 2:] = 0
    given = windows(1)
    for one, expected in ((conv, True), (cubic, False)):
        net = nn.Sequential(one)
        before = net(given[0])
        told = simplify(net, given, 1e-3)
        assert bool(told) is expected
        torch.testing.assert_close(net(given[0]), before, atol=1e-4, rtol=1e-3)
    tanh = KANConv(2, 4, 6, basis="bspline")
    errors = [simplify(nn.Sequential(copy.deepcopy(tanh)), given, within) for within in (0.4, 0.2, 0.1)]
    functions = [told[0].after for told in errors if told]
    assert functions == sorted(functions)
    assert all(told[0].error <= within for told, within in zip(errors, (0.4, 0.2, 0.1), strict=True) if told)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda: prune(network(), 1.5), "0 to 1; got 1.5"),
        (lambda: prune(network("plain"), 0.5), "no layers with functions of a basis"),
        (lambda: simplify(network("wavkan"), windows(), 0.1), "no layers with functions of a basis"),
        (lambda: simplify(network(), windows(), -1), "0 or more; got -1"),
        (lambda: simplify(prune(network(), 0.5), windows(), 0.1), "merge it first"),
    ],
)
def test_what_cannot_be(how: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        how()


def test_a_network_is_left_in_its_modes() -> None:
    net = network().train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    strengths(net, windows())
    simplify(net, windows(), 0.0)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())


def test_a_saved_model_without_functions_predicts_the_same(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    for number in range(2):
        checkpoint(plan, tmp_path / f"run/fold_{number}", number)
    dataset = read_dataset(blobs)
    segmenter = Segmenter.load(tmp_path / "run")
    given = windows_of(dataset.cases, plan, 4)
    assert [tuple(window.shape) for window in given] == [(1, 1, 16, 16, 16)] * 4
    for member, within in zip(segmenter.network.members, (5.0, 0.0), strict=True):
        assert bool(simplify(member, given, within)) is bool(within)
        prune(member, 0.4, given)
    image = dataset.cases[0].images[0]
    expected = segmenter.predict(image)
    segmenter.save(tmp_path / "saved")
    again = Segmenter.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict(image), expected)
    assert pruned_share(again.network) == pytest.approx(0.4, abs=0.02)
    one, other = (info["model"].get("bases", {}) for info in again._infos)
    assert one.keys() == kan_layers(again.network.members[0]).keys()
    assert not other
    again.save(tmp_path / "once more")
    np.testing.assert_array_equal(Segmenter.load(tmp_path / "once more").predict(image), expected)


def test_the_verb_writes_a_model_and_says_what_it_costs(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    file = checkpoint(plan, tmp_path / "run/fold_0", 0)
    image, out = blobs / "imagesTr/case_3.nii.gz", tmp_path / "out"
    said = prune_model(tmp_path / "run", image, out, share=0.25, within=10.0)
    made = Loaded([out]).networks[0]
    assert said["parameters"]["after"] == sum(p.numel() for p in made.parameters())
    assert said["parameters"]["after"] < said["parameters"]["before"]
    assert len(said["networks"][0]["simplified"]) == said["layers"] == len(kan_layers(made))
    assert said["networks"][0]["share"] == pytest.approx(0.25, abs=0.02)
    maps = [Segmenter.load(model).predict(image) for model in (file, out)]
    found = said["agreement"]
    assert found["cases"] == ["case_3"]
    assert found["equal_labels"] == pytest.approx((maps[0] == maps[1]).mean())
    assert list(found["dice"].values()) == pytest.approx(dice_of_values(*maps, [1, 2]))
    assert found["lowest_dice"] == min(found["dice"].values())
    for wrong in ({"share": 0.0}, {"share": 0.5, "out": file.parent}, {"share": 0.5, "out": file.parents[1]}):
        with pytest.raises(UsageError, match=r"Say what may go|a folder of its own"):
            prune_model(tmp_path / "run", image, **{"out": tmp_path / "other", **wrong})


def test_an_unknown_layer_in_a_description_is_named(plan: Plan, tmp_path: Path) -> None:
    file = checkpoint(plan, tmp_path / "run/fold_0", 0)
    tensors, info = load_checkpoint(file)
    info["model"]["bases"] = {"encoder.nowhere": {"basis": "legendre"}}
    save_checkpoint(file, tensors, info)
    with pytest.raises(UserError, match=r"no KAN layer 'encoder\.nowhere'"):
        load_model(file)


def test_trainings_start_from_it_with_its_bases_or_with_full_ones(fit_balls: Any, tmp_path: Path) -> None:
    old, small = tmp_path / "old", tmp_path / "small"
    fit_balls("training.max_epochs=1", run=old)
    segmenter = Segmenter.load(old)
    x = torch.randn(1, 1, 16, 16, 16)
    assert simplify(segmenter.network, [x], 10.0)
    segmenter.save(small)
    expected = segmenter.network(x)
    start = ["training.max_epochs=1", "training.lr=1e-12", f"training.weights={small}"]
    for number, more in enumerate(([], ["model.options.layer_options={degree:3}"])):
        fit_balls(*start, *more, run=tmp_path / f"{number}")
        model, _, info = load_model(tmp_path / f"{number}")
        assert bool(info["model"].get("bases")) is not bool(more)
        assert (model(x) - expected).norm() < (0.2 if more else 1e-4) * expected.norm()


def test_a_description_is_made_without_numbers_and_with_other_channels() -> None:
    spec = {"name": "ukanet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    spec["options"] = {"features_per_stage": (4, 8), "kan_stages": [1], "bottleneck": True}
    net = build_model(spec)
    told = simplify(net, windows(1, 1, 16, 16), 10.0)
    bases = {one.layer: one.basis for one in told}
    with torch.device("meta"):
        other = build_model({**spec, "in_channels": 3, "bases": bases})
    own, made = net.state_dict(), other.state_dict()
    assert own.keys() == made.keys()
    assert [name for name in own if own[name].shape != made[name].shape] == [
        "encoder.stages.0.0.layers.0.conv.base_weight",
        "encoder.stages.0.0.skip.conv.base_weight",
    ]
