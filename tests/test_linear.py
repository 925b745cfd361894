"""Fully connected KAN layers: the same numbers as 1x1 convolutions, and networks of them."""

from __future__ import annotations

import copy

import literature
import pytest
import torch
from benchmark_of_layers import saved_bytes
from torch.nn import functional as F
from torch.nn.utils import prune

from kanseg.bases import BASES
from kanseg.errors import UsageError
from kanseg.layers import KANConv, WaveletConv
from kanseg.layers.linear import KANLinear, WaveletLinear
from kanseg.layers.mlp import FAMILIES, KANMLP, linear_layer


@pytest.mark.parametrize("basis", [*BASES.names(), None])
def test_is_the_convolution_of_one_voxel(basis: str | None) -> None:
    layer = KANLinear(4, 6, basis=basis).double()
    conv = KANConv(1, 4, 6, 1, basis=basis, base_act="silu").double()
    weights = {k: t.unsqueeze(2) if k.endswith("_weight") else t for k, t in layer.state_dict().items()}
    conv.load_state_dict(weights)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x.unsqueeze(2)).squeeze(2))


def test_wavelets_are_those_of_the_convolution_that_mixes_nothing() -> None:
    layer = WaveletLinear(4, 6).double()
    conv = WaveletConv(1, 4, 6, 1).double()
    for name in ("scale", "translation"):
        getattr(layer, name).data.uniform_(0.5, 1.5)
        getattr(conv, name).data = getattr(layer, name).data
    conv.mix_weight.data = torch.eye(6, dtype=torch.float64).unsqueeze(2)
    conv.base_weight.data = layer.base_weight.data.unsqueeze(2)
    conv.wavelet_weight.data = layer.wavelet_weight.data.unsqueeze(2)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_formula_of_the_literature(family: str) -> None:
    """Base branch, its activation, that of the basis, bias, norm and activation."""
    layer = linear_layer(family)(4, 6).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name.removeprefix("linear."): value for name, value in layer.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), literature.LINEAR[family](x, weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_right_gradients_over_any_leading_axes(family: str) -> None:
    layer = linear_layer(family)(3, 4).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert layer(x).shape == (2, 3, 4)
    torch.testing.assert_close(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
    parameters = tuple(p for p in layer.parameters() if p.requires_grad)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"plain"}))
def test_no_family_keeps_its_expansion(family: str) -> None:
    x = torch.randn(512, 16, requires_grad=True)
    assert saved_bytes(linear_layer(family)(16, 16), x) < 3.2


def test_the_plain_layer_is_torch_s() -> None:
    layer, x = KANLinear(4, 6, basis=None, bias=True), torch.randn(3, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_weight, layer.bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_every_family_learns(family: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(128, 2) * 2 - 1
    y = (x[:, :1] * x[:, 1:]).sin()
    model = torch.nn.Sequential(KANMLP((2, 8, 8), family), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


def test_dropout_stands_between_the_layers_and_acts_in_training_alone() -> None:
    model, x = KANMLP((4, 8, 3), dropout=0.5, first_dropout=False), torch.randn(6, 4)
    assert not torch.equal(model(x), model(x))
    single = KANMLP((4, 3), dropout=0.5, first_dropout=False)
    assert torch.equal(single(x), single(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_impossible_options_are_explained() -> None:
    with pytest.raises(UsageError, match="Unknown norm 'lyer'.*Did you mean 'layer'"):
        linear_layer("kagn", norm="lyer")(3, 4)
    with pytest.raises(UsageError, match="at least an input and an output"):
        KANMLP((3,))
    with pytest.raises(UsageError, match="Unknown basis 'kagm'.*Did you mean 'kagn'"):
        linear_layer("kagm")


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_layers_train_on(family: str) -> None:
    """Pruning makes a weight anew in a hook on each call, of an inner layer as well."""
    torch.manual_seed(0)
    whole = linear_layer(family)(8, 16)
    for name in dict(whole.named_parameters()):
        if name.endswith("scale"):  # by which is divided
            continue
        layer = copy.deepcopy(whole)
        owner, _, own = name.rpartition(".")
        prune.l1_unstructured(layer.get_submodule(owner), own, 0.5)
        for _ in range(2):
            layer(torch.randn(5, 8)).sum().backward()
        part = layer.get_submodule(owner)
        grad, mask = part.get_parameter(f"{own}_orig").grad, part.get_buffer(f"{own}_mask")
        assert grad is None or not grad[mask == 0].any()
