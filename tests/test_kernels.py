"""The kernels, eager and compiled, give the numbers of the formula in float64; what they keep and need is bounded."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BUILT
from benchmark_of_layers import inference_peak, saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.layers import FAMILIES, KANConv, conv_layer
from kanseg.layers.kernels import instance_norm_act, native, slab_conv, slabs, wavelet
from kanseg.layers.kernels.recipe import read
from kanseg.layers.kernels.rows import channels_last
from kanseg.layers.wavelet_conv import WaveletConv

SIZES = {1: (33,), 2: (13, 18), 3: (9, 11, 10)}
LARGE = {2: (47, 50), 3: (13, 15, 14)}  # enough for Winograd's products
GEOMETRIES = [
    {},
    {"kernel_size": 1},
    {"groups": 2, "stride": 2},
    {"dilation": 2, "padding": 1},
    {"padding": 0},
    {"padding": 2},
]


def gradients(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    layer.zero_grad()
    y.backward(cotangent.to(y.dtype))
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def assert_like_float64(make: Callable[..., nn.Module], x: Tensor, tolerance: float = 3e-5) -> None:
    """The layer in float32 agrees with the one that keeps its expansion, in float64, output and all gradients."""
    torch.manual_seed(1)
    layer, exact = make(), make(recompute=False).double()
    exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    cotangent = torch.randn(layer(x).shape)
    for ours, theirs in zip(
        gradients(layer, x, cotangent), gradients(exact, x.double(), cotangent.double()), strict=True
    ):
        if theirs is None:  # a parameter without entries
            continue
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"relative error {error:.1e} for shape {tuple(ours.shape)}"


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"plain"}))
def test_every_family_is_its_formula(backend: str, family: str, spatial_dims: int) -> None:
    x = torch.randn(2, 4, *SIZES[spatial_dims])
    assert_like_float64(lambda **options: conv_layer(family, **options)(spatial_dims, 4, 6), x, 1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("basis", ["gram", "bspline", "relu", "bernstein", "fourier", "rational", "morlet"])
def test_every_geometry_is_its_formula(backend: str, basis: str, geometry: dict, spatial_dims: int) -> None:
    x = torch.randn(1, 6, *SIZES[spatial_dims])
    assert_like_float64(lambda **o: KANConv(spatial_dims, 6, 4, basis=basis, **geometry, **o), x)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("basis", ["gram", "bspline", "fourier", "rbf", "relu"])
def test_channels_that_fill_no_vector(backend: str, basis: str, channels: int, kernel_size: int) -> None:
    """On a map whose voxels are no whole number of vectors either."""
    x = torch.randn(2, channels, *SIZES[3])
    assert_like_float64(lambda **options: KANConv(3, channels, 5, kernel_size, basis=basis, **options), x)


@pytest.mark.parametrize("basis", ["fourier", "rational", "mexican_hat", "morlet", "dog"])
@pytest.mark.parametrize("largest", [False, True])
def test_bases_of_every_size_are_their_formulas(backend: str, basis: str, largest: bool) -> None:
    """More or fewer functions than most layers have, which are compiled apart, and grouped convolutions."""
    size = {"fourier": "degree", "rational": "degree"}.get(basis, "grid_size")
    options: dict[str, Any] = {size: {"fourier": (1, 4), "rational": (4, 9)}.get(basis, (3, 12))[largest]}
    x = torch.randn(2, 6, *LARGE[2])
    assert_like_float64(lambda **o: KANConv(2, 6, 32, basis=basis, groups=2, **options, **o), x, 1e-4)


@pytest.mark.parametrize("basis", ["gram", "legendre", "bernstein", "bspline", "rbf", "fourier", "morlet"])
@pytest.mark.parametrize("options", [{}, {"groups": 3, "basis_act": "silu", "base_act": None}])
def test_shared_functions_are_their_formula(backend: str, basis: str, options: dict) -> None:
    """One sum of functions a group of channels, with the gradients of its factors and of what the functions learn."""
    x = torch.randn(2, 12, *LARGE[2])
    assert_like_float64(lambda **o: KANConv(2, 12, 33, basis=basis, shared_by=2, **options, **o), x, 1e-4)


def test_a_shared_function_is_expanded_where_it_is_convolved() -> None:
    layer = KANConv(3, 16, 16, basis="gram", shared_by=4)
    assert layer.recipe is not None
    recipe = read(layer.recipe)
    assert recipe.basis.num_functions == 1
    assert recipe.learned == ("coefficients", "basis.beta")


def test_fourier_series_take_any_number(backend: str) -> None:
    """Beyond what pi can be taken away from in a few steps, and what is not finite."""
    x = torch.cat([torch.linspace(-3e4, 3e4, 500), torch.tensor([1e6, -1e9, 3e20])]).reshape(1, 1, 1, -1)
    layer = KANConv(2, 1, 5, 1, basis="fourier", base_act=None)
    exact = copy.deepcopy(layer).double()
    with torch.inference_mode():
        assert torch.allclose(layer(x).double(), exact(x.double()), atol=2e-5)
        assert layer(torch.tensor([math.inf, math.nan]).reshape(1, 1, 1, 2)).isnan().all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("family", ["plain", "kagn", "kan", "fastkan", "bottleneck_kagn"])
@pytest.mark.parametrize("padding", [0, 1])
def test_winograds_products_are_the_convolution(
    backend: str, family: str, spatial_dims: int, padding: int
) -> None:
    x = torch.randn(2, 32, *LARGE[spatial_dims])
    options = {
        "padding": padding,
        **({"act": "silu"} if family == "kan" else {}),
    }  # PReLU bends: signs may flip
    assert_like_float64(lambda **o: conv_layer(family, **options, **o)(spatial_dims, 32, 16), x, 2e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("family", ["plain", "kagn", "relukan"])
@pytest.mark.parametrize("channels", [(1, 16), (6, 5), (160, 3)])
def test_winograds_products_take_any_number_of_channels(
    backend: str, family: str, spatial_dims: int, channels: tuple[int, int]
) -> None:
    """Fewer than a vector has, several slices of them, and outputs that fill no vector."""
    x = torch.randn(1, channels[0], *LARGE[spatial_dims])
    assert_like_float64(lambda **o: conv_layer(family, act="silu", **o)(spatial_dims, *channels), x, 2e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("family", ["plain", "kagn", "kan", "relukan", "wavkan"])
def test_threads_share_the_work_and_nothing_else(family: str, spatial_dims: int, stride: int) -> None:
    """As many as there are cores here or not: two threads that write one number would give others each time."""
    layer = conv_layer(family, act="silu")(spatial_dims, 32, 16, stride=stride)
    x = torch.randn(2, 32, *LARGE[spatial_dims])
    assert x.numel() > native.FEW
    cotangent = torch.randn(layer(x).shape)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(gradients(layer, x, cotangent))
    torch.set_num_threads(before)
    for alone, shared in zip(*found, strict=True):
        if alone.numel():
            assert (alone - shared).abs().max() <= 1e-4 * alone.abs().max().clamp(min=1e-3)


STRIDED = [
    {"stride": 2},
    {"stride": 2, "padding": 0},
    {"stride": 3, "padding": 2},
    {"kernel_size": 2, "stride": 2},
]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("family", ["kagn", "relukan"])
@pytest.mark.parametrize("channels", [(6, 32), (48, 16)])
@pytest.mark.parametrize("geometry", [*STRIDED, {"stride": (1, 2, 2), "kernel_size": (3, 2, 3)}])
def test_strides_are_their_formula(
    backend: str, family: str, spatial_dims: int, channels: tuple[int, int], geometry: dict[str, Any]
) -> None:
    geometry = {
        key: value if isinstance(value, int) else value[-spatial_dims:] for key, value in geometry.items()
    }
    x = torch.randn(2, channels[0], *{2: (47, 50), 3: (18, 23, 21)}[spatial_dims])
    make = conv_layer(family, act="silu", norm=None)
    assert_like_float64(lambda **o: make(spatial_dims, *channels, **geometry, **o), x, 1e-4)


@pytest.mark.parametrize(("size", "zeros"), [((30, 30, 5), (1, 6)), ((6, 6, 6), (2, 4)), ((3, 3, 3), (1, 4))])
def test_zeros_that_lead_torch_to_onednn_change_nothing(
    backend: str, size: tuple[int, ...], zeros: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of few channels gets channels or a sample more, a tiny one nothing."""
    monkeypatch.setattr(slab_conv, "LEFT_TO_TORCH", 5000)
    x = torch.randn(1, 1, *size)
    wider, weight = slab_conv.for_onednn(torch.zeros(1, 4, *size), torch.zeros(5, 4, 3, 3, 3))
    assert (wider.shape[:2], weight.shape[1]) == (zeros, zeros[1])
    for bare in ({}, {"base": False}):
        assert_like_float64(lambda **options: KANConv(3, 1, 5, **bare, **options), x)  # noqa: B023


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("psi", ["mexican_hat", "morlet", "dog", "meyer"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_wavelet_an_edge_is_its_formula(backend: str, spatial_dims: int, psi: str, padding: int) -> None:
    def make(**options: Any) -> WaveletConv:
        layer = WaveletConv(spatial_dims, 5, 16, wavelet=psi, padding=padding, **options)
        nn.init.uniform_(layer.scale, 0.5, 1.5)
        nn.init.normal_(layer.translation)
        return layer

    assert_like_float64(make, torch.randn(2, 5, *SIZES[spatial_dims]))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_number_does_not_depend_on_how_the_work_is_cut(backend: str, spatial_dims: int) -> None:
    """The top of an image gives to the last bit what it gives within the whole, which is cut in other places."""
    size = (150, 131) if spatial_dims == 2 else (22, 41, 37)
    layer, x = conv_layer("kagn", norm=None)(spatial_dims, 32, 16), torch.randn(2, 32, *size)
    half = size[0] // 8 * 4
    with torch.inference_mode():
        whole, top = layer(x), layer(x[:1, :, : half + 4])
    if backend == "eager":
        torch.testing.assert_close(top[:, :, :half], whole[:1, :, :half], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(top[:, :, :half], whole[:1, :, :half])


@pytest.mark.parametrize(
    "options", [{"degree": 0}, {"degree": 1}, {"degree": 7}, {"basis_act": None}, {"base": False}]
)
def test_options_of_the_basis(backend: str, options: dict) -> None:
    x = torch.randn(1, 5, 9, 9)
    assert_like_float64(lambda **o: KANConv(2, 5, 3, **{"basis_act": "silu", **options}, **o), x)


@pytest.mark.parametrize("family", ["kagn", "kan", "fastkan", "bottleneck_kagn"])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"kernel_size": 1}])
def test_bfloat16_operands_cost_three_digits_and_no_more(backend: str, family: str, geometry: dict) -> None:
    """The expansion and the weight are rounded to 8 bits, the result stays float32; so do gradients.

    Gram's two learned numbers get sums over all voxels that cancel: two digits less.
    """
    layer = conv_layer(family, norm=None, act=None)(2, 8, 8, **geometry)
    rounded = conv_layer(family, norm=None, act=None, operands="bfloat16")(2, 8, 8, **geometry)
    rounded.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 21, 20)
    cotangent = torch.randn(layer(x).shape)
    assert rounded(x).dtype == torch.float32
    assert not torch.equal(rounded(x), layer(x)), "nothing was rounded"
    for ours, theirs in zip(gradients(rounded, x, cotangent), gradients(layer, x, cotangent), strict=True):
        if theirs is not None and theirs.numel():
            assert (ours - theirs).norm() < (5e-3 if theirs.numel() > 2 else 5e-2) * theirs.norm()


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_splines_of_every_order(backend: str, order: int) -> None:
    x = torch.randn(1, 5, 9, 9)
    assert_like_float64(lambda **o: KANConv(2, 5, 3, basis="bspline", spline_order=order, **o), x, 1e-4)


@pytest.mark.parametrize("act", ["identity", "silu", "relu", "prelu"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_norm_and_activation(backend: str, act: str, offset: float) -> None:
    y = channels_last(torch.randn(2, 5, 9, 8, 7) * 3 + offset)
    weight, bias, below = torch.randn(3, 5)
    cotangent = torch.randn(y.shape)
    functions = {
        "identity": lambda z, k: z,
        "silu": lambda z, k: F.silu(z),
        "relu": lambda z, k: F.relu(z),
        "prelu": F.prelu,
    }
    ours = [t.clone().requires_grad_() for t in (y, weight, bias, below)]
    exact = [t.double().requires_grad_() for t in (y, weight, bias, below)]
    one = instance_norm_act(*ours[:3], 1e-5, act, ours[3] if act == "prelu" else None)
    other = functions[act](F.instance_norm(exact[0], weight=exact[1], bias=exact[2]), exact[3])
    torch.testing.assert_close(one.double(), other, atol=2e-6 + 2e-7 * offset, rtol=1e-5)
    count = 4 if act == "prelu" else 3
    found = torch.autograd.grad(one, ours[:count], cotangent)
    expected = torch.autograd.grad(other, exact[:count], cotangent.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5 + 2e-6 * offset, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(
            instance_norm_act(y.clone(), weight, bias, 1e-5, act, below, over=True), one, atol=0, rtol=0
        )


@pytest.mark.parametrize("act", ["identity", "silu", "relu"])
def test_a_map_of_one_value_gives_the_bias_and_leads_nothing_back(backend: str, act: str) -> None:
    """To the bit: what is left of a zero by rounding would be multiplied by 1 / sqrt(eps)."""
    y = channels_last(torch.randn(3, 34, 1, 1, 1) * 3).requires_grad_()
    weight, bias = torch.randn(2, 34)
    made = instance_norm_act(y, weight, bias, 1e-5, act)
    expected = {"identity": bias, "silu": F.silu(bias), "relu": F.relu(bias)}[act]
    torch.testing.assert_close(made, expected.view(1, -1, 1, 1, 1).expand_as(made), atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(made, y, torch.randn_like(made))
    assert not grad.any()


@pytest.mark.parametrize("family", ["kagn", "kan", "fastkan"])
@pytest.mark.parametrize("channels", [6, 16])
def test_slabs_change_nothing(
    backend: str, family: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of a few planes: the same output, bit by bit where Winograd's tiles meet the slabs, and gradients."""
    x = torch.randn(2, channels, 24, 12, 12)
    layer = conv_layer(family)(3, channels, 16)
    cotangent = torch.randn(layer(x).shape)
    whole = gradients(layer, x, cotangent)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 400_000)
    pieces = gradients(layer, x, cotangent)
    torch.testing.assert_close(pieces[0], whole[0], atol=2e-5, rtol=1e-5)
    for one, other in zip(pieces[1:], whole[1:], strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("family", ["kagn", "kan", "fastkan", "relukan", "wavkan", "bottleneck_kagn"])
@pytest.mark.parametrize(
    "geometry",
    [{}, {"padding": 0}, {"padding": 2}, {"stride": 2}, {"kernel_size": 1}, {"groups": 2}],
    ids=str,
)
@pytest.mark.parametrize("dims", [2, 3])
def test_inference_is_bit_equal_however_the_input_lies_in_memory(
    backend: str, family: str, geometry: dict, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied into channels-last memory, and what waves are made of, goes a few planes at a time."""
    layer = conv_layer(family, norm=None, act=None)(dims, 16, 16, **geometry)
    x = torch.randn(2, 16, 38, *[11, 12][: dims - 1])
    with torch.no_grad():
        whole = layer(channels_last(x))
        monkeypatch.setattr(slabs, "COPY_BYTES", 20_000)
        monkeypatch.setattr(wavelet, "COPY_BYTES", 20_000)
        before = x.clone()
        torch.testing.assert_close(layer(channels_last(x)), whole, atol=0, rtol=0)
        torch.testing.assert_close(layer(x), whole, atol=0, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2},
        {"stride": 2, "padding": 0, "groups": 2},
        {"dilation": 2},
        {"kernel_size": 1},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_slabs_of_wavelets_change_nothing(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample keeps the channels that dropout left it."""
    monkeypatch.setattr("kanseg.layers.kernels.wavelet.serves", lambda *given: False)
    x = torch.randn(2, 6, 24, 9, 8)
    layer = conv_layer("wavkan", norm=None)(3, 6, 8, **geometry)
    cotangent = torch.randn(layer(x).shape)
    assert [slab.whole for slab in layer.conv._slabs(x)] == [True]
    torch.manual_seed(1)
    whole = gradients(layer, x, cotangent)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 300_000)
    assert len(layer.conv._slabs(x)) >= 4
    torch.manual_seed(1)
    for one, other in zip(gradients(layer, x, cotangent), whole, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole[0], atol=2e-5, rtol=1e-5)


def test_dropout_keeps_to_the_formula(backend: str) -> None:
    """Dropped channels are the same in forward and backward: the gradient at a dropped input is 0."""
    layer = conv_layer("kagn", dropout=0.5, norm=None, act=None)(2, 8, 4)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    layer(x).sum().backward()
    dead = (x.grad == 0).all(dim=(0, 2, 3))
    assert not dead.any(), "the base branch still sees every channel"
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("place", ["nowhere", "input", "basis_input", "basis"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_layer_keeps_two_maps(family: str, norm: str, place: str, dims: int) -> None:
    """Its input and the output of its convolution (FastKAN: the normed input), whatever basis, degree and grid."""
    options: dict[str, Any] = {"grid_size": 12} if family in ("kan", "fastkan", "relukan") else {}
    if place != "nowhere":
        options.update(dropout=0.5, dropout_at=place)
    options["input_norm" if "input_norm" in FAMILIES[family] else "norm"] = norm
    x = channels_last(torch.randn(1, 16, *[{1: 9000, 2: 120, 3: 24}[dims]] * dims))
    assert 1 < saved_bytes(conv_layer(family, **options)(dims, 16, 16), x) < 2.05


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("place", ["input", "basis_input", "basis"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"plain"}))
def test_dropout_is_the_same_when_it_is_made_again(backend: str, family: str, place: str, dims: int) -> None:
    """Results, gradients and running statistics are those of a layer that keeps all it makes."""
    x = channels_last(torch.randn(2, 16, *[6] * dims))  # in whose order noise is drawn
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = conv_layer(family, dropout=0.5, dropout_at=place, recompute=recompute)(dims, 16, 16)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, inputs.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for kept, again in zip(*found, strict=True):
        scale = kept.abs().max().clamp(min=1)  # sums of hundreds of terms cancel
        torch.testing.assert_close(again / scale, kept / scale, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "family",
    [
        "kagn",
        pytest.param("kan", marks=pytest.mark.slow),
        "fastkan",
        pytest.param("wavkan", marks=pytest.mark.slow),
        pytest.param("bottleneck_kagn", marks=pytest.mark.slow),
    ],
)
def test_inference_needs_little_memory(family: str) -> None:
    """16 channels x 128^3 in a fresh process: less than 170 MB above input and output; the expansion has 0.6 GB."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read from Linux's counters")
    assert 0 < inference_peak(family) < 170


def test_the_kernels_are_named_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setenv("KANSEG_NATIVE", "0")
    assert native.available() is None
    native.library.cache_clear()
    monkeypatch.delenv("KANSEG_NATIVE")
    assert native.available() in ((None,) if not BUILT else native.INSTRUCTION_SETS)
