"""Self-attention and focal modulation of KAN layers against their formulas."""

from __future__ import annotations

import pytest
import torch
from benchmark_of_layers import saved_bytes
from torch.nn import functional as F

from kanseg.errors import UsageError
from kanseg.layers import FocalModulation, KANAttention, conv_layer
from kanseg.layers.rotary import Rotary

SIZES = {1: (9,), 2: (4, 5), 3: (3, 4, 2)}
FAMILIES = ("kagn", "relukan", "bottleneck_kagn", "bottleneck_relukan", "plain")


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inner_channels", [None, 6])
def test_attention_is_the_explicit_softmax(
    spatial_dims: int, family: str, inner_channels: int | None
) -> None:
    layer = KANAttention(
        spatial_dims, 4, conv_layer=conv_layer(family), inner_channels=inner_channels, num_heads=2
    ).double()
    layer.gamma.data.fill_(0.7)
    x = torch.randn(2, 4, *SIZES[spatial_dims], dtype=torch.float64)
    h = layer.narrow(x)
    q, k, v = (part(h).flatten(2).unflatten(1, (2, -1)) for part in (layer.query, layer.key, layer.value))
    weights = (torch.einsum("nhci,nhcj->nhij", q, k) / q.shape[2] ** 0.5).softmax(-1)
    o = torch.einsum("nhij,nhcj->nhci", weights, v).reshape(h.shape)
    torch.testing.assert_close(layer(x), layer.norm(x + 0.7 * layer.widen(o)))


def test_a_new_attention_layer_is_its_norm_alone() -> None:
    layer, x = KANAttention(2, 4), torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(layer(x), layer.norm(x))


@pytest.mark.parametrize("kind", ["axial", "mixed"])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_rotated_products_depend_on_the_difference_of_positions(kind: str, spatial_dims: int) -> None:
    size = (5, 4, 3)[:spatial_dims]
    rotary = Rotary(spatial_dims, 12, 2, kind=kind).double()
    q, k = torch.randn(2, 1, 2, 1, 12).double().expand(2, 1, 2, torch.Size(size).numel(), 12)
    q, k = rotary((q, k), size)
    products = torch.einsum("nhid,nhjd->hij", q, k)
    positions = rotary.positions(size)
    steps = positions[:, None] - positions[None]
    for pair in ((0, 1), (1, 0)):
        same = (steps == steps[pair]).all(-1)
        assert same.sum() > 1
        torch.testing.assert_close(products[:, same].amax(1), products[:, same].amin(1))


def test_rotation_keeps_lengths_and_moves_no_token_at_the_origin() -> None:
    rotary, t = Rotary(2, 8), torch.randn(1, 1, 12, 8)
    (turned,) = rotary((t,), (3, 4))
    torch.testing.assert_close(turned.norm(dim=-1), t.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], t[:, :, 0])
    assert not torch.allclose(turned[:, :, 1:], t[:, :, 1:])


def test_mixed_positions_are_learned_and_axial_ones_are_not() -> None:
    learned = dict(KANAttention(2, 4, rotary="mixed").named_parameters())
    assert "rotary.frequencies" in learned
    assert "rotary.frequencies" not in dict(KANAttention(2, 4, rotary="axial").named_parameters())


@pytest.mark.parametrize("rotary", [None, "axial"])
def test_attention_keeps_no_matrix_of_all_pairs(rotary: str | None) -> None:
    x = torch.randn(1, 8, 48, 48, requires_grad=True)
    assert saved_bytes(KANAttention(2, 8, rotary=rotary), x) < 13  # the matrix alone would be 288


def test_without_positions_attention_does_not_know_the_order_of_pixels() -> None:
    layer, order = KANAttention(1, 4, 1), torch.randperm(7)
    layer.gamma.data.fill_(1.0)
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(layer(x)[..., order], layer(x[..., order]))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"full_kan": False, "use_postln_in_modulation": False}])
def test_focal_modulation_is_its_formula(spatial_dims: int, options: dict) -> None:
    layer = FocalModulation(spatial_dims, 4, focal_level=2, **options).double()
    x = torch.randn(2, 4, *[7] * spatial_dims, dtype=torch.float64)
    query, context, gates = layer.project_in(x).split((4, 4, 3), dim=1)
    first = layer.contexts[0](context)
    second = layer.contexts[1](first)
    everywhere = second.flatten(2).mean(2).view(2, 4, *[1] * spatial_dims)
    gathered = first * gates[:, :1] + second * gates[:, 1:2] + everywhere * gates[:, 2:]
    y = query * layer.modulator(gathered / 3)
    y = y if layer.norm is None else layer.norm(y)
    torch.testing.assert_close(layer(x), layer.project_out(y))
    assert [context.conv.kernel_size[0] for context in layer.contexts] == [3, 5]


def test_the_global_context_reaches_every_pixel() -> None:
    x = torch.randn(1, 4, 40, requires_grad=True)
    norm = conv_layer("kagn", norm=None)  # a norm would reach as far
    layer = FocalModulation(1, 4, conv_layer=norm, context_layer=norm, use_postln_in_modulation=False)
    layer(x)[0, 0, 0].backward()
    assert (x.grad[0].abs().sum(0) > 0).all()


@pytest.mark.parametrize("block", [KANAttention, FocalModulation])
def test_blocks_train_under_autocast_and_in_three_dimensions(block: type) -> None:
    layer = block(3, 8)
    if isinstance(layer, KANAttention):
        layer.gamma.data.fill_(0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 8, 3, 4, 5))
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_volume_of_depth_one_is_a_picture() -> None:
    flat, deep = KANAttention(2, 4), KANAttention(3, 4, (1, 3, 3))
    flat.gamma.data.fill_(0.5)
    weights = flat.state_dict()
    deep.load_state_dict({key: t.unsqueeze(2) if t.dim() == 4 else t for key, t in weights.items()})
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(deep(x.unsqueeze(2)).squeeze(2), flat(x))


def test_impossible_options_are_explained() -> None:
    with pytest.raises(UsageError, match="9 channels cannot be shared by num_heads=2"):
        KANAttention(2, 9, num_heads=2)
    with pytest.raises(UsageError, match="Unknown rotary positions 'axiel'. Did you mean 'axial'"):
        KANAttention(2, 4, rotary="axiel")
    with pytest.raises(UsageError, match="even number of channels a head, got 3"):
        KANAttention(2, 3, rotary="axial")
    with pytest.raises(UsageError, match="odd kernels"):
        FocalModulation(2, 4, focal_window=4)


def test_attention_is_scaled_unless_told_otherwise() -> None:
    layer, x = KANAttention(1, 4, scale=1.0), torch.randn(1, 4, 6)
    layer.gamma.data.fill_(1.0)
    q, k, v = (part(x).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    o = F.softmax(q @ k.transpose(1, 2), dim=-1) @ v
    torch.testing.assert_close(layer(x), layer.norm(x + o.transpose(1, 2)))
    layer.gate, layer.gamma.data[:] = "skip", 0.3
    torch.testing.assert_close(layer(x), layer.norm(0.3 * x + o.transpose(1, 2)))
