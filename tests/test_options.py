"""What is given to a layer or network is used, or refused by name: no option goes without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from safetensors.torch import save_file
from torch import nn

from kanseg import UKANet, create_model
from kanseg.bases import BASES
from kanseg.compat.focal import FocalLoss, FocalTverskyLoss
from kanseg.encoders import RDKANet, create_encoder
from kanseg.encoders.layers import network_layer
from kanseg.errors import UsageError, UserError
from kanseg.layers import KANAttention, KANConv, conv_layer
from kanseg.layers.kan_conv import KANConv as Convolution
from kanseg.layers.linear import KANLinear
from kanseg.layers.mixture import MixtureOfExperts
from kanseg.layers.mlp import linear_layer
from kanseg.models import Classifier, UKAGNet

SMALL = {"features_per_stage": (4, 8)}


def degrees(module: nn.Module) -> set[int]:
    """Functions of the KAN parts of a network."""
    parts = [part for part in module.modules() if isinstance(part, Convolution | KANLinear)]
    return {part.basis.num_functions for part in parts if part.basis is not None}


def test_presets_take_options_beside_their_own() -> None:
    wide = create_model("ukagnet_18", 2, 3, 1, encoder_options={"width": 2})
    narrow = create_model("ukagnet_18", 2, 3, 1)
    blocks = [[len(stage) for stage in net.encoder.stages] for net in (wide, narrow)]
    assert blocks[0] == blocks[1]
    assert wide.encoder.out_channels[-1] == 2 * narrow.encoder.out_channels[-1]
    grouped = create_model("fast_ukanet_18", 2, 3, 1, layer_options={"groups": 1})
    assert degrees(grouped) == degrees(create_model("fast_ukanet_18", 2, 3, 1)) == {5}
    assert degrees(create_model("fast_ukanet_18", 2, 3, 1, layer_options=None)) == {8}
    other = create_model("fast_ukanet_18", 2, 3, 1, basis="gram", layer_options={"degree": 2})
    assert degrees(other) == {3}


@pytest.mark.parametrize(
    "encoder", ["densekanet_tiny", "vggkan11", "plainkanet4", "timm/resnet18", "smp/resnet18"]
)
def test_a_preset_takes_any_encoder(encoder: str) -> None:
    net = create_model("ukagnet_18", 2, 1, 2, encoder=encoder).eval()
    assert net(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize("mixer", ["focal", "self-attention", "conv"])
def test_the_plain_twin_has_no_kan_part_whatever_mixes(mixer: str) -> None:
    options: dict[str, Any] = {"depth": 2, "layers": 1, "width": 0.5, "mixer": mixer}
    assert degrees(UKAGNet(2, 1, 3, basis=None, **options)) == set()
    deep = UKAGNet(2, 1, 3, layer_options={"degree": 5}, norm="batch", **options)
    assert degrees(deep) == {6}
    assert not [m for m in deep.modules() if isinstance(m, nn.InstanceNorm2d)]


@pytest.mark.parametrize("head", ["kan", "hidden_kan", "kantryoshka"])
def test_kan_heads_have_the_functions_of_the_layers(head: str) -> None:
    how: dict[str, Any] = {
        "encoder": "plainkanet4",
        "encoder_options": {"layers": (4, 4, 4, 8)},
        "head": head,
    }
    assert degrees(Classifier(2, 3, 4, basis="kagn", layer_options={"degree": 5}, **how)) == {6}
    grids = {"grid_size": 3, "groups": 1}
    assert degrees(Classifier(2, 3, 4, basis="fastkan", layer_options=grids, **how).head) == {3}


def test_mixtures_of_narrow_layers_in_networks_are_those_of_layers() -> None:
    alone = conv_layer("bottleneck_kagn", num_experts=4)(2, 32, 32)
    inside = network_layer("bottleneck_kagn", num_experts=4)(2, 32, 32)
    assert {k: v.shape for k, v in inside.state_dict().items()} == {
        k: v.shape for k, v in alone.state_dict().items()
    }
    options = {"num_experts": 3, "k": 1, "noisy": False, "balance_weight": 0.5}
    for basis in ("gram", None):
        net = UKANet(2, 1, 2, basis=basis, layer_options=options, **SMALL)
        mixtures = [m for m in net.modules() if isinstance(m, MixtureOfExperts)]
        assert mixtures
        assert all((m.gate.k, m.gate.noise_weight, m.balance_weight) == (1, None, 0.5) for m in mixtures)


def test_a_ready_encoder_starts_from_the_weights_that_are_given(tmp_path: Path) -> None:
    trained = create_encoder("plainkanet4", 2, 1, layers=(4, 4, 4, 8))
    save_file(trained.state_dict(), tmp_path / "encoder.safetensors")
    ready = create_encoder("plainkanet4", 2, 1, layers=(4, 4, 4, 8))
    UKANet(2, 1, 2, encoder=ready, encoder_weights=tmp_path / "encoder.safetensors")
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(ready.state_dict()[name], value)
    with pytest.raises(UserError, match="no file"):
        UKANet(2, 1, 2, encoder=ready, encoder_weights=tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="come too late"):
        UKANet(2, 1, 2, encoder=ready, encoder_options={"layers": (4, 4, 4, 4)})


def test_the_norm_of_a_network_is_that_of_narrow_layers_too() -> None:
    net = UKANet(2, 1, 2, basis="fastkan", bottleneck=True, norm="batch", **SMALL)
    assert not [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: KANConv(2, 4, 4, basis=None, strid=2), "no option 'strid'"),
        (
            lambda: KANConv(2, 4, 4, basis=BASES.create("gram", channels=4), degree=7),
            r"\['degree'\] come too late",
        ),
        (lambda: KANConv(2, 4, 4, shared_by=-2), "shared_by must be"),
        (lambda: conv_layer("wavkan", wavlet="dog")(2, 4, 4), "Did you mean 'wavelet'"),
        (lambda: linear_layer("wavkan", degree=2)(4, 4), "cannot be made with these options"),
        (
            lambda: create_model("ukanet", 2, 1, 2, encoder="smp/resnet18", encoder_options={"depht": 3}),
            "'depth'",
        ),
        (
            lambda: create_model(
                "ukanet", 2, 1, 2, encoder="timm/resnet18", encoder_options={"out_indices": [0]}
            ),
            "no option 'out_indices'",
        ),
        (lambda: create_encoder("reskanet10", 2, 1, stem={"kernal": 5}), "no option 'kernal'"),
        (lambda: create_encoder("vggkan11", 2, 1, attention_options={"gate": "skip"}), "attention is None"),
        (lambda: create_model("ukagnet", 2, 1, 2, mixer_options={"num_heads": 2}), "mixer='conv' is none"),
        (lambda: KANAttention(2, 8, num_heads=0), "num_heads=0"),
        (lambda: KANAttention(4, 8, inner_channels=4), "spatial_dims must be 1, 2 or 3, got 4"),
        (lambda: UKANet(2, 1, 2, norm="group", **SMALL), "norm='group' cannot be made"),
        (lambda: conv_layer("kagn", act="silux")(2, 4, 4), "act='silux' cannot be made"),
        (lambda: KANConv(2, 4, 4, kernel_size=3.0), "kernel_size needs whole numbers"),
        (lambda: RDKANet(2, 1, kernel_size=6), "must be odd"),
        (lambda: create_encoder("plainkanet4", 2, 1, layers=(4, 4, 4)), "layers needs 4 numbers"),
        (lambda: Classifier(2, 1, 2, pool_size=0), "pool_size must be positive"),
        (lambda: KANConv(2, 4, 4)(torch.zeros(1, 4, 5, 5, dtype=torch.double)), r"x\.float\(\)"),
        (lambda: KANConv("2", 4, 4), "got '2'"),
        (lambda: KANConv(2, 4, 4, basis="GRAM"), "Did you mean 'gram'"),
        (lambda: linear_layer()(4, 5)(torch.zeros(2, 3)), r"expected .* \(\*, 4\)"),
        (lambda: create_model("monai", 2, 1, 2)(torch.zeros(1, 3, 32, 32)), r"expects \(N, 1, H, W\)"),
    ],
)
def test_what_nothing_takes_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert KANConv(2, 4, 4, kernel_size=np.int64(3), stride=np.array([1, 2])).stride == (1, 2)


@pytest.mark.parametrize("options", [{"base_act": "prelu"}, {"wavelet": "module"}])
@pytest.mark.parametrize("spatial_dims", [1, 2])
def test_learned_functions_of_wavelet_layers_are_trained(options: dict[str, Any], spatial_dims: int) -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 - (self.width * x) ** 2) * torch.exp(-(x**2) / 2)

    options = {key: Bent() if value == "module" else value for key, value in options.items()}
    torch.manual_seed(0)
    layer = conv_layer("wavkan", dropout=0.0, **options)(spatial_dims, 4, 8).double()
    x = torch.randn(2, 4, *[9] * spatial_dims, dtype=torch.double)
    found = []
    for recompute in (True, False):
        layer.zero_grad()
        layer.recompute = layer.conv.recompute = recompute
        layer(x).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, msg=name)
    assert all(grad.abs().max() > 0 for grad in found[0].values())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_rdkanet_sees_the_far_edge(spatial_dims: int) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(
        "rdkanet_tiny", spatial_dims, 1, features=8, growths=(8, 8), halving=(1,), blocks=1
    )
    x = torch.randn(1, 1, *[13] * spatial_dims)
    maps = encoder.eval()(x)
    assert [m.shape[2:] for m in maps] == [(4,) * spatial_dims, (2,) * spatial_dims]
    other = x.clone()
    other[..., -1] += 1
    assert (encoder(other)[-1] - maps[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("basis", ["kagn", "wavkan", "bottleneck_kagn", "grkan"])
def test_empty_batches_pass_through_fully_connected_layers(basis: str) -> None:
    assert linear_layer(basis)(4, 5).eval()(torch.zeros(0, 4)).shape == (0, 5)


def test_an_empty_batch_passes_through_a_mixture() -> None:
    layer = conv_layer("kagn", num_experts=3)(2, 4, 8)
    y = layer(torch.zeros(0, 4, 6, 6))
    assert y.shape == (0, 8, 6, 6)
    y.sum().backward()


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_deep_supervision_is_a_list_however_few_the_stages(stages: int) -> None:
    net = UKANet(2, 1, 3, features_per_stage=(4, 8, 8, 8)[:stages], deep_supervision=True)
    x = torch.randn(1, 1, 16, 16)
    outputs = net.train()(x)
    assert isinstance(outputs, list)
    assert len(outputs) == max(1, stages - 2)
    assert outputs[0].shape == net.eval()(x).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("basis", ["gram", "bspline", "rbf", "grkan", "bottleneck_kagn", "wavkan"])
def test_fully_connected_layers_work_in_half_precision_as_convolutions_do(basis: str) -> None:
    layer = linear_layer(basis)(4, 5).bfloat16()
    y = layer(torch.randn(3, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_strided_layer_of_kernel_1_says_its_stride() -> None:
    assert "stride=(2, 2) before conv" in repr(conv_layer("kagn")(2, 4, 4, 1, stride=2))


@pytest.mark.parametrize("gamma", [0.25, 0.5, 2.0])
def test_focal_losses_have_finite_gradients_at_certain_answers(gamma: float) -> None:
    logits = torch.tensor([[30.0, -30.0], [-30.0, 30.0]], requires_grad=True)
    FocalLoss(gamma)(logits, torch.tensor([0, 1])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    volume = torch.tensor([[[[60.0, -60.0]], [[-60.0, 60.0]]]], requires_grad=True)
    label = torch.tensor([[[[0.0, 1.0]]]])
    loss = FocalTverskyLoss(gamma, softmax=True, to_onehot_y=True, smooth_nr=0.0, smooth_dr=0.0)
    loss(volume, label).backward()
    assert volume.grad is not None
    assert volume.grad.isfinite().all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("basis", ["gram", "bspline", "fastkan", "wavkan", "grkan", "bottleneck_kagn", None])
def test_the_tensors_of_monais_loaders_train_as_plain_ones(basis: str | None, spatial_dims: int) -> None:
    net = UKANet(spatial_dims, 1, 2, basis=basis, **SMALL)
    x = torch.randn(1, 1, *[8] * spatial_dims)
    gradients = []
    for image in (x, MetaTensor(x)):
        net.zero_grad()
        net(image).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(net.parameters()))
    for plain, meta in zip(*gradients, strict=True):
        torch.testing.assert_close(meta.as_subclass(torch.Tensor), plain, rtol=1e-3, atol=1e-5)
