"""Penalties of KAN layers: their formulas, their gradients, and what they do to a training."""

from __future__ import annotations

import pytest
import torch

from kanseg.config import PenaltyConfig, load_config
from kanseg.errors import UsageError
from kanseg.layers import ConvLayer, KANConv
from kanseg.models import create_model
from kanseg.study import adapt
from kanseg.training.checkpoint import load_checkpoint, load_model, part
from kanseg.training.devices import checkpoint_stages
from kanseg.training.regularization import Penalties


def penalties(model, **penalty):
    return Penalties(model, PenaltyConfig(**penalty))


def net(basis="gram", **options):
    torch.manual_seed(0)
    small = {"features_per_stage": (4, 8), "strides": (1, 2), "kernel_sizes": (3, 3), **options}
    return create_model("ukanet", 2, 1, 2, basis=basis, **small)


@pytest.mark.parametrize("basis", ["gram", "relu", "rational"])
def test_l1_of_weights_has_the_sign_as_gradient(basis):
    model = net(basis)
    found = penalties(model, l1=0.5).take()
    found.backward()
    kan = [m for m in model.modules() if isinstance(m, KANConv) and m.basis is not None]
    weights = [w for m in kan for w in (m.base_weight, m.basis_weight) if w is not None]
    others = [p for m in kan for p in m.basis.parameters()]
    assert not any(p.grad is not None for p in others)
    assert found.item() == pytest.approx(0.5 * sum(p.abs().sum().item() for p in weights), rel=1e-5)
    assert all(torch.equal(p.grad, 0.5 * p.sign()) for p in weights)
    assert model.heads[0].weight.grad is None


def test_l1_of_an_adapted_network_is_that_of_its_weights():
    model = net()
    before = penalties(model, l1=1.0).take().item()
    assert penalties(adapt(model, rank=1), l1=1.0).take().item() == pytest.approx(before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_of_the_last_pass_alone(checkpointed):
    model, x = net().train(), torch.randn(2, 1, 16, 16)
    given = []
    for module in model.modules():
        if isinstance(module, ConvLayer) and module.conv.basis is not None:
            module.register_forward_hook(lambda _m, _x, y: given.append(y.detach()))
    if checkpointed:
        checkpoint_stages(model)
    found = penalties(model, activation_l1=2.0, activation_l2=3.0)
    for _ in range(2):
        given.clear()
        y = model(x)
        expected = sum(2 * g.abs().mean() + 3 * g.square().mean() for g in given)
        total = found.take()
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert found.take() == 0
        (y.square().mean() + total).backward()


def test_nothing_is_added_unasked_and_plain_networks_are_refused():
    assert penalties(net(None)).take() == 0.0
    with pytest.raises(UsageError, match="the network has none"):
        penalties(net(None), l1=1.0)
    with pytest.raises(UsageError, match="compile=false"):
        load_config(overrides=["training.penalty.activation_l1=1", "training.compile=true"])
    for wrong in ("inf", "-1"):
        with pytest.raises(UsageError, match=r"penalty\.l1"):
            load_config(overrides=[f"training.penalty.l1={wrong}"])


def test_a_penalty_that_cannot_be_leaves_no_run_and_others_of_its_group_alone(fit_balls, tmp_path):
    with pytest.raises(UsageError, match="the network has none"):
        fit_balls("model.options.basis=null", "training.penalty.l1=1", run=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    run = tmp_path / "run"
    fit_balls("training.max_epochs=1", "training.penalty.l1=0.25", run=run)
    how = {"run": run, "resume": True, "override": True}
    fit_balls("training.max_epochs=2", "training.penalty.activation_l2=0.5", **how)
    assert load_model(run)[2]["config"]["training"]["penalty"] == {
        "l1": 0.25,
        "activation_l1": 0,
        "activation_l2": 0.5,
    }


def test_a_training_with_l1_ends_with_smaller_weights(fit_balls, tmp_path):
    sizes = {}
    for l1 in (0.0, 0.1):
        run = tmp_path / str(l1)
        fit_balls("training.max_epochs=2", "training.lr=0.01", f"training.penalty.l1={l1}", run=run)
        weights = part(load_checkpoint(run / "fold_0/last.safetensors")[0], "model")
        sizes[l1] = sum(w.abs().sum().item() for name, w in weights.items() if name.endswith("basis_weight"))
        assert load_model(run)[2]["config"]["training"]["penalty"]["l1"] == l1
    assert 0 < sizes[0.1] < 0.9 * sizes[0.0]


def test_a_training_with_penalties_of_activations_resumes_to_the_same_weights(fit_balls, tmp_path):
    how = [
        "training.penalty.activation_l1=0.1",
        "training.penalty.activation_l2=0.1",
        "training.schedule=constant",
    ]
    ends = []
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        for last in epochs:
            fit_balls(*how, f"training.max_epochs={last}", run=tmp_path / name, resume=last != epochs[0])
        ends.append(part(load_checkpoint(tmp_path / name / "fold_0/last.safetensors")[0], "model"))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
