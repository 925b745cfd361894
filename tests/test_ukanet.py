"""UKANet in MONAI's hands: any size, losses, sliding windows, compilation."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import nn

from kanseg import UKANet, create_model, list_models
from kanseg.bases import BASES
from kanseg.errors import UsageError
from kanseg.layers import FAMILIES

SMALL = {"features_per_stage": (4, 8, 8), "encoder": "reskanet10"}


@pytest.mark.parametrize("basis", [None, *BASES.names(), *FAMILIES])
@pytest.mark.parametrize(("dims", "size"), [(2, (19, 22)), (3, (9, 12, 10))])
def test_every_basis_trains_and_predicts(basis: str | None, dims: int, size: tuple[int, ...]) -> None:
    model = UKANet(dims, 1, 3, basis=basis, **SMALL)
    x = torch.randn(2, 1, *size)
    model(x).square().mean().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    logits = model.eval()(x)
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("size", [(33,), (7, 50), (70, 70), (5, 31, 12), (16, 16, 1), (1, 1), (2, 3, 4)])
def test_takes_any_size_and_aspect(size: tuple[int, ...]) -> None:
    model = UKANet(len(size), 1, 2, **SMALL).eval()
    assert model(torch.randn(1, 1, *size)).shape == (1, 2, *size)


def test_strides_and_kernels_go_by_axis() -> None:
    model = UKANet(3, 1, 2, strides=(1, (1, 2, 2), 2), kernel_sizes=((1, 3, 3), (1, 3, 3), 3), **SMALL)
    maps = model.encoder(torch.randn(1, 1, 6, 16, 16))
    assert [tuple(m.shape[2:]) for m in maps] == [(6, 16, 16), (6, 8, 8), (3, 4, 4)]


def test_deep_supervision_trains_with_monais_loss_and_predicts_one_tensor() -> None:
    model = UKANet(3, 1, 3, features_per_stage=(4, 8, 8, 8), encoder="reskanet10", deep_supervision=True)
    x, label = torch.randn(2, 1, 12, 12, 12), torch.randint(0, 3, (2, 1, 12, 12, 12)).float()
    outputs = model(x)
    assert [tuple(o.shape[2:]) for o in outputs] == [(12, 12, 12), (6, 6, 6)]
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))(outputs, label)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x).shape == (2, 3, 12, 12, 12)


def test_one_batch_is_learned() -> None:
    torch.manual_seed(0)
    model = UKANet(2, 1, 2, **SMALL)
    x = torch.randn(1, 1, 24, 24)
    label = (nn.functional.avg_pool2d(x, 5, 1, 2) > 0).long()
    loss_function, optimizer = (
        DiceCELoss(to_onehot_y=True, softmax=True),
        torch.optim.AdamW(model.parameters(), 1e-2),
    )
    losses = []
    for _ in range(60):
        loss = loss_function(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_goes_into_sliding_window_inference() -> None:
    model = UKANet(3, 1, 2, **SMALL).eval()
    volume = torch.randn(1, 1, 20, 24, 18)
    with torch.inference_mode():
        tiled = sliding_window_inference(volume, (12, 12, 12), 2, model, overlap=0.5, mode="gaussian")
        whole = sliding_window_inference(volume, volume.shape[2:], 1, model)
        torch.testing.assert_close(whole, model(volume))
    assert tiled.shape == (1, 2, 20, 24, 18)
    assert torch.isfinite(tiled).all()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_compiles(bottleneck: bool) -> None:
    model = UKANet(2, 1, 2, bottleneck=bottleneck, features_per_stage=(4, 8), encoder="reskanet10")
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 1, 16, 16)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_plain_twin_differs_in_its_layers_alone() -> None:
    kan, plain = UKANet(2, 1, 2, **SMALL), UKANet(2, 1, 2, basis=None, **SMALL)
    own = {name for name, _ in kan.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert own
    assert all(name.endswith(("basis_weight", "basis.beta")) for name in own)


@pytest.mark.parametrize(
    ("where", "stages", "expected"),
    [
        ("all", 4, {0, 1, 2, 3}),
        ("deep", 4, {1, 2, 3}),
        ("coarse", 4, {2, 3}),
        ("coarse", 2, {1}),
        ([0, 3], 4, {0, 3}),
    ],
)
def test_kan_layers_stand_where_they_are_asked_for(
    where: str | list[int], stages: int, expected: set[int]
) -> None:
    model = UKANet(2, 1, 2, kan_stages=where, features_per_stage=(4, 4, 8, 8)[:stages])
    first = [stage[0].layers[0].conv for stage in model.encoder.stages]
    assert {number for number, conv in enumerate(first) if conv.basis is not None} == expected


def test_state_survives_saving(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model, other = (UKANet(2, 1, 2, **SMALL).eval() for _ in range(2))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(model(x), other(x))


def test_is_made_by_name() -> None:
    assert "ukanet" in list_models()
    model = create_model("ukanet", spatial_dims=3, in_channels=2, out_channels=4, basis="legendre", **SMALL)
    assert isinstance(model, UKANet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "grma"}, "Unknown basis 'grma'. Did you mean 'gram'"),
        ({"encoder": "reskanet"}, "Unknown encoder 'reskanet'"),
        ({"kan_stages": "some"}, "kan_stages must be"),
        ({"kan_stages": [5]}, "kan_stages must lie in"),
        ({"strides": (1, 2)}, "strides needs 3 entries"),
        ({"blocks_per_stage": (1, 1)}, "blocks_per_stage needs 3"),
        ({"bases": "gram"}, "has no option 'bases'. Did you mean 'basis'"),
        ({"basis": "wavkan", "bottleneck": True}, "no bottleneck form"),
        ({"kernel_sizes": (3, 2, 3)}, "kernel_sizes must be odd"),
        ({"layer_options": {"degre": 5}}, "no option 'degre'. Did you mean 'degree'"),
        ({"encoder_options": {"blocks": 3}}, "encoder 'reskanet.*' .* Did you mean 'blocks_per_stage'"),
        ({"norm": "btch"}, "norm='btch'.*did you mean 'BATCH'"),
        ({"dropout": 1.5}, "dropout is a probability"),
        ({"encoder": "vggkan11", "encoder_options": {"attention": "kgan"}}, "Unknown basis 'kgan'"),
    ],
)
def test_mistakes_are_explained(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_model("ukanet", 2, 1, 2, **{**SMALL, **options})


def test_an_input_of_another_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match=r"spatial_dims=2 expects \(N, 1, H, W\), got \(1, 1, 8, 8, 8\)"):
        UKANet(2, 1, 2, **SMALL)(torch.zeros(1, 1, 8, 8, 8))


def test_unknown_models_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="Unknown model 'uknet'. Did you mean 'ukanet'"):
        create_model("uknet", 2, 1, 2)
