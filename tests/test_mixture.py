"""Mixtures of experts: what the gate promises, and that no expert is harmed by being left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kanseg.errors import UsageError
from kanseg.layers import FAMILIES, MixtureOfExperts, conv_layer, take_balance_loss
from kanseg.layers.gates import NoisyTopKGate, kth_of_the_others, squared_variation

SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 6)}


def used_experts(mixture: MixtureOfExperts, *experts: int) -> None:
    """Make the gate prefer these whatever the input, which must have positive means."""
    with torch.no_grad():
        mixture.gate.weight.fill_(-1)
        mixture.gate.weight[:, list(experts)] = 1


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_sample_goes_to_k_experts_whose_weights_sum_to_one(k: int) -> None:
    gate = NoisyTopKGate(5, 4, k)
    chosen, shares, _ = gate(torch.randn(7, 5))
    assert all(len(set(row)) == k for row in chosen.tolist())
    torch.testing.assert_close(shares.sum(1), torch.ones(7))


def test_load_is_the_probability_to_be_chosen_when_the_noise_of_one_expert_is_drawn_again() -> None:
    gate, k, draws = NoisyTopKGate(3, 5, 2).double(), 2, 20000
    clean, spread = torch.randn(1, 5).double(), torch.rand(1, 5).double() + 0.3
    logits = clean + spread * torch.randn(1, 5).double()
    for expert in range(5):
        again = logits.repeat(draws, 1)
        again[:, expert] = clean[:, expert] + spread[:, expert] * torch.randn(draws).double()
        frequency = (again.topk(k).indices == expert).any(1).double().mean()
        estimate = torch.special.ndtr((clean - kth_of_the_others(logits, k)) / spread)[0, expert]
        assert abs(frequency - estimate) < 0.015
    loads = gate.load(clean, logits, spread, logits.topk(k).indices)
    torch.testing.assert_close(loads, torch.special.ndtr((clean - kth_of_the_others(logits, k)) / spread)[0])


def test_expected_load_adds_up_to_k_a_sample() -> None:
    gate, samples = NoisyTopKGate(3, 8, 2), 4000
    clean, spread = torch.randn(1, 8).repeat(samples, 1), torch.full((samples, 8), 0.7)
    logits = clean + spread * torch.randn(samples, 8)
    load = gate.load(clean, logits, spread, logits.topk(2).indices)
    assert abs(load.sum() / samples - 2) < 0.05


def test_kth_of_the_others_is_found_by_removal() -> None:
    values = torch.randn(6, 5)
    for k in (1, 2, 4):
        threshold = kth_of_the_others(values, k)
        for expert in range(5):
            others = torch.cat([values[:, :expert], values[:, expert + 1 :]], dim=1)
            assert torch.equal(threshold[:, expert], others.topk(k).values[:, -1])


def test_the_imbalance_is_the_squared_coefficient_of_variation() -> None:
    assert squared_variation(torch.full((4,), 3.0)) == 0
    assert squared_variation(torch.tensor([5.0])) == 0
    torch.testing.assert_close(squared_variation(torch.tensor([1.0, 3.0])), torch.tensor(2.0 / 4))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_output_is_the_weighted_sum_of_the_chosen_experts(spatial_dims: int) -> None:
    mixture = (
        conv_layer("kagn", num_experts=4, mixture={"k": 3})(spatial_dims, 4, 6, stride=2).double().eval()
    )
    x = torch.randn(5, 4, *SIZES[spatial_dims], dtype=torch.float64)
    chosen, shares, _ = mixture.gate(x.flatten(2).mean(2))
    weights = torch.zeros(5, 4, dtype=torch.float64).scatter(1, chosen, shares)
    answers = torch.stack([expert(x) for expert in mixture.experts], dim=1)
    torch.testing.assert_close(mixture(x), torch.einsum("ne,ne...->n...", weights, answers))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_mixed(family: str) -> None:
    layer = conv_layer(family, num_experts=3)(2, 4, 4)
    x = torch.randn(6, 4, 6, 5, requires_grad=True)
    (layer(x).square().mean() + take_balance_loss(layer)).backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("family", ["kagn", "bottleneck_kagn"])
@pytest.mark.parametrize("norm", ["batch", ("instance", {"affine": True})])
def test_experts_without_samples_are_harmless(family: str, norm: str | tuple) -> None:
    layer = conv_layer(family, num_experts=4, norm=norm, mixture={"noisy": False})(2, 4, 4)
    mixture = next(module for module in layer.modules() if isinstance(module, MixtureOfExperts))
    if mixture is not layer:  # the gate sees the narrow space: let it be positive
        nn.init.constant_(layer.conv.down_weight, 0.1)
    used_experts(mixture, 0, 2)
    x = torch.rand(3, 4, 6, 5) + 0.1
    layer(x).square().mean().backward()
    for number, expert in enumerate(mixture.experts):
        used = number in (0, 2)
        assert all(torch.isfinite(p.grad).all() for p in expert.parameters())
        assert any(p.grad.abs().sum() > 0 for p in expert.parameters()) == used
    before = layer.eval()(x)
    with torch.no_grad():
        for parameter in mixture.experts[1].parameters():
            parameter.add_(1.0)
    assert torch.equal(layer(x), before)


def test_experts_start_different() -> None:
    mixture = conv_layer("kagn", num_experts=2)(2, 3, 3)
    one, other = (expert.conv.basis_weight for expert in mixture.experts)
    assert not torch.equal(one, other)


def test_the_balance_loss_is_there_once_after_training_and_spreads_the_samples() -> None:
    layer = conv_layer("kagn", num_experts=4, mixture={"balance_weight": 1.0})(1, 4, 4)
    with torch.no_grad():
        layer.gate.weight[:, 0] = 1.0  # nearly all samples go to expert 0
    x, optimizer = torch.rand(32, 4, 5) + 0.2, torch.optim.Adam(layer.gate.parameters(), 0.05)
    losses = []
    for _ in range(40):
        layer(x)
        loss = take_balance_loss(layer)
        assert take_balance_loss(layer) == 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    layer.eval()(x)
    assert take_balance_loss(layer) == 0


def test_a_volume_of_depth_one_is_a_picture_and_weights_survive_saving() -> None:
    flat = conv_layer("bottleneck_kagn", num_experts=3)(2, 4, 4).eval()
    deep = conv_layer("bottleneck_kagn", num_experts=3)(3, 4, 4, (1, 3, 3)).eval()
    spatial = {
        key: value.unsqueeze(2) if value.dim() == 4 else value for key, value in flat.state_dict().items()
    }
    deep.load_state_dict(spatial)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(deep(x.unsqueeze(2)).squeeze(2), flat(x))


def test_noise_is_drawn_in_training_alone() -> None:
    layer, x = conv_layer("kagn", num_experts=4)(1, 3, 3), torch.randn(4, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_model_can_be_copied_in_the_middle_of_a_step() -> None:
    layer, x = conv_layer("kagn", num_experts=3)(2, 4, 4), torch.randn(4, 4, 5, 6)
    layer(x)
    copied = copy.deepcopy(layer)
    assert take_balance_loss(copied) == 0
    assert take_balance_loss(layer) > 0
    torch.testing.assert_close(copied.eval()(x), layer.eval()(x))


def test_an_exported_mixture_gives_the_same_numbers() -> None:
    layer, x = conv_layer("bottleneck_kagn", num_experts=3)(2, 4, 4).eval(), torch.randn(4, 4, 5, 6)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(-x), layer(-x))


def test_impossible_numbers_of_experts_are_explained() -> None:
    with pytest.raises(UsageError, match="1 <= k <= num_experts, got k=5, num_experts=4"):
        conv_layer("kagn", num_experts=4, mixture={"k": 5})(2, 3, 3)


@pytest.mark.parametrize("family", ["kagn", "bottleneck_kagn"])
def test_options_of_the_mixture_go_to_it_by_name(family: str) -> None:
    layer = conv_layer(family, num_experts=4, k=3, noisy=False)(2, 4, 8)
    gates = [module for module in layer.modules() if isinstance(module, NoisyTopKGate)]
    assert [(gate.k, gate.noise_weight) for gate in gates] == [(3, None)]
