"""KAN convolutions against their formula, in every dimension, and what they keep for backward."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from importlib import import_module

import literature
import pytest
import torch
from benchmark_of_layers import saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import kanseg
from kanseg.bases import BASES
from kanseg.errors import UsageError
from kanseg.layers import FAMILIES, ConvLayer, KANConv, conv_layer
from kanseg.layers.families import LAYER_CLASSES
from kanseg.layers.geometry import ConvGeometry
from kanseg.layers.kernels.rows import FORMATS
from kanseg.layers.pointwise import pointwise_conv

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: (9,), 2: (8, 9), 3: (5, 6, 7)}


def by_the_formula(conv: KANConv, x: Tensor) -> Tensor:
    """Group by group: conv(act(x); W_base) + conv(Phi(x); W_basis)."""
    outputs = []
    for g, part in enumerate(x.chunk(conv.groups, dim=1)):
        rows = slice(g * conv.out_channels // conv.groups, (g + 1) * conv.out_channels // conv.groups)
        phi = conv.basis(part).flatten(1, 2)
        y = CONVOLUTIONS[conv.spatial_dims](
            phi, conv.basis_weight[rows], None, conv.stride, conv.padding, conv.dilation
        )
        y = y + CONVOLUTIONS[conv.spatial_dims](
            F.silu(part), conv.base_weight[rows], None, conv.stride, conv.padding, conv.dilation
        )
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("basis", ["gram", "bspline", "relu", "mexican_hat"])
@pytest.mark.parametrize("geometry", [{}, {"groups": 2, "stride": 2}, {"dilation": 2, "padding": 1}])
def test_is_its_formula(spatial_dims: int, basis: str, geometry: dict) -> None:
    conv = KANConv(spatial_dims, 4, 6, basis=basis, **geometry).double()
    x = torch.randn(2, 4, *SIZES[spatial_dims], dtype=torch.float64)
    torch.testing.assert_close(conv(x), by_the_formula(conv, x))


def of_the_literature(family: str, layer: ConvLayer, x: Tensor, drop: literature.Drop) -> Tensor:
    weights = {name.removeprefix("conv."): value for name, value in layer.named_parameters()}
    return literature.CONVOLUTIONS[family](x, weights, drop)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_family_is_the_formula_of_the_literature(family: str, groups: int) -> None:
    """Base branch, its activation, that of the basis, norm and activation."""
    layer = conv_layer(family)(2, 4, 6, groups=groups).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), of_the_literature(family, layer, x, lambda kept: kept))


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if "bottleneck" not in name]
)  # those have noise
def test_dropout_of_every_family_acts_where_the_literature_has_it(family: str) -> None:
    """Where every channel is dropped the place shows: both branches, one of them, its functions, or the output."""
    layer = conv_layer(family, dropout=1.0)(2, 4, 6).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), of_the_literature(family, layer, x, torch.zeros_like))


@pytest.mark.parametrize("basis", BASES.names())
def test_recomputing_changes_no_gradient(basis: str) -> None:
    torch.manual_seed(0)
    kept = KANConv(2, 4, 4, basis=basis, groups=2, recompute=False).double()
    again = KANConv(2, 4, 4, basis=basis, groups=2).double()
    again.load_state_dict(kept.state_dict())
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    gradients = []
    for conv in (kept, again):
        inputs = x.clone().requires_grad_()
        conv(inputs).square().sum().backward()
        gradients.append([inputs.grad, *(p.grad for p in conv.parameters() if p.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("basis", ["gram", "relu", "fourier"])
def test_shared_functions_have_right_gradients_and_the_weights_of_a_plain_convolution(basis: str) -> None:
    conv = KANConv(2, 4, 6, basis=basis, shared_by=2, base=False, groups=2).double()
    assert conv.basis_weight.shape == KANConv(2, 4, 6, basis=None, groups=2).base_weight.shape
    x = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    parameters = tuple(conv.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_family_has_right_gradients(family: str, norm: str) -> None:
    layer = conv_layer(family)(2, 2, 4, norm=norm).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_a_volume_of_depth_one_is_a_picture() -> None:
    flat = KANConv(2, 3, 4, kernel_size=(3, 5), basis="legendre")
    deep = KANConv(3, 3, 4, kernel_size=(1, 3, 5), basis="legendre")
    deep.load_state_dict({key: value.unsqueeze(2) for key, value in flat.state_dict().items()})
    x = torch.randn(1, 3, 7, 8)
    torch.testing.assert_close(deep(x.unsqueeze(2)).squeeze(2), flat(x))


def test_without_a_basis_it_is_the_plain_convolution() -> None:
    conv = KANConv(3, 4, 6, basis=None, stride=2, groups=2)
    plain = nn.Conv3d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    plain.load_state_dict({"weight": conv.base_weight.data})
    x = torch.randn(1, 4, 6, 6, 6)
    assert torch.equal(conv(x), plain(x))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 6])
def test_a_pointwise_convolution_is_torchs(spatial_dims: int, bias: bool, size: int) -> None:
    """The same parameters by name, numbers and gradients; also of a view, which lies in no format's memory."""
    ours = pointwise_conv(spatial_dims, 3, 5, bias=bias)
    theirs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](3, 5, 1, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    whole = torch.randn(2, 4, *[size + 1] * spatial_dims)
    results = []
    for layer in (ours, theirs):
        x = whole.clone().requires_grad_()
        y = layer(x[:, 1:, 1:])
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_degree_zero_works() -> None:
    conv = KANConv(2, 2, 3, basis="gram", degree=0)
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    assert conv.basis_weight.grad.abs().sum() > 0


def test_a_gram_layer_keeps_its_input_and_its_output() -> None:
    x = torch.randn(1, 16, 48, 48, 48, requires_grad=True)
    assert saved_bytes(conv_layer("kagn")(3, 16, 16), x) < 2.01
    assert saved_bytes(KANConv(3, 16, 16), x) < 1.01


def test_no_activation_outlives_the_call() -> None:
    import gc
    import weakref

    layer = conv_layer("kaln")(2, 2, 2)
    x = torch.randn(1, 2, 8, 8)
    seen = weakref.ref(x)
    layer(x)
    del x
    gc.collect()
    assert seen() is None


def test_running_statistics_count_a_batch_once() -> None:
    layer, plain = conv_layer("kagn", norm="batch")(2, 2, 4), nn.BatchNorm2d(4)
    x = torch.randn(3, 2, 6, 6)
    plain(layer.conv(x))
    layer(x).sum().backward()
    assert layer.norm.num_batches_tracked == 1
    torch.testing.assert_close(layer.norm.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.norm.running_var, plain.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "act"),
    [({"momentum": None}, "silu"), ({"affine": False}, "prelu"), ({"momentum": 0.0}, None)],
)
def test_batch_norms_in_training_are_torchs(
    spatial_dims: int, dtype: torch.dtype, options: dict, act: str | None
) -> None:
    """Values, gradients and running statistics after three batches, and then those of an evaluation."""
    layer = ConvLayer(spatial_dims, 3, 8, norm=("batch", options), act=act).to(dtype)
    plain = copy.deepcopy(layer)
    plain.recompute = False  # torch's own steps
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
    for batch in range(4):
        if batch == 3:
            layer.eval(), plain.eval()
        x = torch.randn(2, 3, *SIZES[spatial_dims], dtype=dtype)
        inputs = x.requires_grad_(), x.detach().clone().requires_grad_()
        y, expected = layer(inputs[0]), plain(inputs[1])
        grad = torch.randn_like(expected)
        y.backward(grad), expected.backward(grad)
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance, msg=name)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.randn(4, 4, 9, 9)
    for family in set(FAMILIES) - {"wavkan"}:  # its batch norm is the exception, in training
        layer = conv_layer(family)(2, 4, 4)
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), msg=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_works_under_autocast(family: str) -> None:
    layer = conv_layer(family)(2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(1, 4, 8, 8))
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


THIN: list[tuple[tuple[int, ...], dict]] = [
    ((2, 8, 7), {}),
    ((3, 8, 7), {"kernel_size": 5}),
    ((1, 8, 7), {}),
    ((5, 1, 1), {"kernel_size": 5, "stride": 2}),
    ((5, 5, 1), {"kernel_size": 5, "stride": 2}),
    ((5, 5, 5), {"kernel_size": 7, "stride": 2}),  # the stem of a DenseNet
    ((5, 1, 1), {"kernel_size": 5, "stride": (3, 2, 1), "padding": (4, 2, 4)}),
]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("family", [None, "kagn", "wavkan"])
@pytest.mark.parametrize(("size", "options"), THIN)
def test_gradients_of_maps_thinner_than_the_kernel(
    family: str | None, size: tuple[int, ...], options: dict, low: bool
) -> None:
    """oneDNN's own gradients of such weights are NaN, or wrong, or end the process; in bfloat16 and float32."""
    make = partial(ConvLayer, basis=None) if family is None else conv_layer(family)
    layer = make(3, 8, 8, norm=None, act=None, **options)
    exact = make(3, 8, 8, norm=None, act=None, recompute=False, **options).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last_3d)
    exact(x.double()).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = layer(x)
    y.float().square().mean().backward()
    for ours, other in zip(layer.parameters(), exact.parameters(), strict=True):
        if ours.dim() > 3:
            assert (ours.grad - other.grad).norm() < (0.05 if low else 1e-3) * other.grad.norm()


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_thin_names_are_layers_of_their_dimension(name: str) -> None:
    dims = int(name[-2])
    layer = getattr(kanseg, name)(2, 4, kernel_size=3, stride=2)
    assert isinstance(layer, ConvLayer)
    assert layer(torch.randn(2, 2, *[9] * dims)).shape == (2, 4, *[5] * dims)


def test_layers_start_with_outputs_of_unit_scale() -> None:
    """The reference divides by the output channels too and starts its basis branch almost at zero."""
    torch.manual_seed(0)
    conv = KANConv(2, 64, 64, basis="legendre", base=False)
    x = torch.randn(2, 64, 24, 24)
    expected = conv.basis(x).square().mean().sqrt()
    assert 0.8 < conv(x)[..., 1:-1, 1:-1].std() / expected < 1.2


def test_dropout_acts_in_training_alone() -> None:
    x = torch.randn(2, 8, 6, 6)
    for family in FAMILIES:
        layer = conv_layer(family, dropout=0.5, **({"norm": None} if family != "fastkan" else {}))(2, 8, 8)
        torch.manual_seed(0)
        assert not torch.equal(layer(x), layer(x)), family
        layer(x).sum().backward()
        layer.eval()
        assert torch.equal(layer(x), layer(x)), family


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"in_channels \(=4\) and out_channels \(=6\) must be divisible by groups \(=3\)"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size needs one number or 2"),
        ({"basis": "grid"}, "Unknown basis 'grid'"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3"),
        ({"in_channels": 0}, "channels must be positive"),
    ],
)
def test_impossible_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KANConv(**{"spatial_dims": 2, "in_channels": 4, "out_channels": 6, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strided_layer_of_kernel_one_is_the_strided_convolution(family: str) -> None:
    layer = conv_layer(family)(2, 4, 6, 1, stride=2)
    x = torch.randn(2, 4, 7, 8)
    kept = layer(x)
    for part in layer.conv.modules():
        if isinstance(part, ConvGeometry):
            part.stride = (2, 2)
    layer.kept = None
    torch.testing.assert_close(kept, layer(x), atol=1e-5, rtol=1e-4)


def test_noise_of_a_strided_narrow_layer_of_kernel_one_spreads_as_all_positions_do() -> None:
    layer = conv_layer("bottleneck_kagn", dropout=1.0, norm=None, act=None)(2, 4, 6, 1, stride=2)
    x = torch.ones(1, 4, 6, 6)
    x[..., ::2, ::2] = 0  # what the stride keeps, which has no spread of its own
    assert layer(x).std(dim=(2, 3)).min() > 0


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 1)])
def test_running_statistics_of_instance_norms_serve_in_eval(size: tuple[int, int, int]) -> None:
    layer = ConvLayer(
        3, 2, 4, 3, norm=("instance", {"affine": True, "track_running_stats": True}), act=None
    ).eval()
    layer.norm.running_mean.uniform_()
    layer.norm.running_var.uniform_(1, 2)
    x = torch.randn(2, 2, *size)
    mean, std = layer.norm.running_mean, (layer.norm.running_var + layer.norm.eps).sqrt()
    expected = (layer.conv(x) - mean.view(1, 4, 1, 1, 1)) / std.view(1, 4, 1, 1, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("act", [None, "silu", "gelu", "prelu"])
def test_a_batch_norm_of_known_statistics_needs_no_second_map(
    dims: int, act: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients it lies over the convolution's output, to the same bits, unless a hook may keep that."""
    layer = conv_layer("kagn", norm="batch", act=act)(dims, 4, 8)
    x = torch.randn(2, 4, *[9, 8, 7][:dims])
    layer(x)  # statistics
    layer.eval()
    kept: list[Tensor] = []
    with torch.no_grad():
        expected = layer(x)
        module = import_module("kanseg.layers.conv_layer")
        normalise, runs = module.normalise, []
        monkeypatch.setattr(module, "BLOCK", 100)
        monkeypatch.setattr(module, "normalise", lambda *given: runs.append(1) or normalise(*given))
        assert torch.equal(layer(x), expected)
        assert len(runs) == (1 if act == "gelu" else 2 * 9)  # planes of both samples
        for watched in (layer.norm, layer.conv):
            watched.register_forward_hook(lambda module, given, y: kept.append(y))
            assert torch.equal(layer(x), expected)
        assert torch.equal(kept[0], layer.norm(layer.conv(x)))
        assert torch.equal(kept[1], layer.conv(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_may_be_replaced_and_watched(family: str) -> None:
    """An activation that is put in place of another acts, and a hook on what acts is called."""
    layer = conv_layer(family)(3, 4, 16)
    for part in list(layer.modules()):
        for name in ("act", "base_act", "basis_act"):
            if hasattr(part, name):
                setattr(part, name, nn.LeakyReLU(0.3))
    kept = copy.deepcopy(layer)
    for part in kept.modules():
        if hasattr(part, "recompute"):
            part.recompute = False
    x = torch.randn(2, 4, 6, 7, 8)
    torch.testing.assert_close(layer(x), kept(x), rtol=1e-4, atol=1e-4)
    called: tuple[list[str], list[str]] = ([], [])
    for one, names in zip((layer, kept), called, strict=True):
        for name, part in one.named_modules():
            part.register_forward_hook(lambda *_, name=name, names=names: names.append(name))
    torch.testing.assert_close(layer(x), kept(x), rtol=1e-4, atol=1e-4)
    assert {*called[1]} - {*called[0]} <= {"conv.noise"}  # which does nothing


@pytest.mark.parametrize("family", ["kagn", "bottleneck_kagn", "wavkan"])  # one of each kind of layer
def test_a_compiler_follows_functions_that_are_replaced(family: str) -> None:
    layer, x = conv_layer(family)(3, 4, 8), torch.randn(2, 4, 6, 7, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for act in (nn.LeakyReLU(0.3), nn.Tanh()):
        for part in layer.modules():
            if hasattr(part, "base_act"):
                part.base_act = act
        torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(("spatial_dims", "kernel_size"), [(2, 3), (3, 3), (3, 1)])
def test_branches_of_a_narrow_layer_meet_without_copies_of_gradients(
    spatial_dims: int, kernel_size: int
) -> None:
    layer = conv_layer("bottleneck_kagn")(spatial_dims, 32, 32, kernel_size)
    waiting, seen = [layer(torch.randn(2, 32, *[8] * spatial_dims)).grad_fn], set()
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            waiting += [before for before, _ in step.next_functions]
    assert len(seen) > 4
    assert not [step.name() for step in seen if "CopySlices" in step.name()]


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": False},
        {"recompute": False, "norm": "batch", "act": None},
        {"norm": ("instance", {"track_running_stats": True})},
    ],
)
def test_gradients_may_lie_in_any_memory(spatial_dims: int, samples: int, options: dict) -> None:
    """torch's own instance and batch norms misread those of a single sample; the layer does not."""
    layer = ConvLayer(spatial_dims, 4, 8, **options).double()
    x = torch.randn(samples, 4, *SIZES[spatial_dims], dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(layer(x))
    last = grad.contiguous(memory_format=FORMATS[grad.dim()])
    of_attention = grad.flatten(2).mT.contiguous().mT.view(grad.shape)
    one, *others = (
        torch.autograd.grad(layer(x), [x, *layer.parameters()], given) for given in (grad, last, of_attention)
    )
    for other in others:
        torch.testing.assert_close(one, other)


def test_autocast_changes_digits_of_a_gradient_alone() -> None:
    """Also of a batch of one, whose instance norms torch computes then."""
    net = nn.Sequential(ConvLayer(3, 2, 16), ConvLayer(3, 16, 16))
    x, gradients = torch.randn(1, 2, 8, 8, 8), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = net(x)
        grads = torch.autograd.grad(y, list(net.parameters()), torch.ones_like(y) * y.detach())
        gradients.append(torch.cat([g.flatten() for g in grads]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_lead_gradients_back_through_norms_of_torch(spatial_dims: int, family: str) -> None:
    """Those of a single sample too: as of a group norm with one group a channel, which is the same function."""
    x = torch.randn(1, 8, *SIZES[spatial_dims])
    layer = conv_layer(family)(spatial_dims, 8, 16)
    instance = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[spatial_dims](8)
    gradients = []
    for norm in (instance, nn.GroupNorm(8, 8, affine=False)):
        inputs = x.clone().requires_grad_()
        y = layer(F.silu(norm(inputs)))
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["kagn", "wavkan", "bottleneck_kagn", "plain"])
def test_padding_has_the_names_that_torch_gives_it(family: str) -> None:
    x = torch.zeros(1, 4, 9, 12)
    make = partial(conv_layer(family), 2, 4, 8, (3, 5), dilation=2)
    for padding in ("same", "valid"):
        wanted = nn.Conv2d(4, 8, (3, 5), dilation=2, padding=padding)(x).shape
        assert make(padding=padding)(x).shape == wanted
    for wrong in ({"padding": "same", "stride": 2}, {"padding": "reflect"}):
        with pytest.raises(UsageError, match="padding"):
            make(**wrong)


@pytest.mark.parametrize("family", ["plain", "kagn", "kan", "fastkan", "wavkan", "bottleneck_kagn"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_same_padding_of_an_even_kernel_is_that_of_an_odd_one_whose_first_weights_are_zero(
    family: str, dims: int
) -> None:
    even, odd = (4, 3, 2)[:dims], (5, 3, 3)[:dims]
    x = torch.randn(2, 4, *(9, 7, 8)[:dims])
    layers = [conv_layer(family)(dims, 4, 8, kernel, padding="same") for kernel in (even, odd)]
    state = {
        name: F.pad(w, [n for k in reversed(even) for n in (1 - k % 2, 0)]) if w.shape[2:] == even else w
        for name, w in layers[0].state_dict().items()
    }
    layers[1].load_state_dict(state)
    results = [layer(x) for layer in layers]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.square().sum(), layer.conv.base_weight)[0]
        for y, layer in zip(results, layers, strict=True)
    ]
    inner = gradients[1][(..., *(slice(1 - k % 2, None) for k in even))]
    torch.testing.assert_close(gradients[0], inner, rtol=1e-3, atol=1e-3)


def test_same_padding_is_torchs_with_any_kernel_and_dilation() -> None:
    for kernel, dilation in itertools.product((1, 2, 3, 4, 5), (1, 2, 3)):
        x = torch.randn(1, 2, 11)
        conv = KANConv(1, 2, 3, kernel, basis=None, dilation=dilation, padding="same")
        wanted = F.conv1d(x, conv.base_weight, padding="same", dilation=dilation)
        torch.testing.assert_close(conv(x), wanted)


@pytest.mark.parametrize("option", ["bias", "padding_mode", "device", "dtype"])
def test_options_of_torchs_convolutions_are_answered(option: str) -> None:
    with pytest.raises(UsageError, match=f"no option '{option}' of torch's convolutions: "):
        KANConv(2, 4, 8, **{option: "zeros"})
