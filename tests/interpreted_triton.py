"""The Triton kernels in Triton's interpreter, on a CPU, against float64; `test_triton.py` runs this in a new process.

The interpreter must be chosen before the kernels are imported, and would then take over every layer of the process.
"""

from __future__ import annotations

import math
import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kanseg.bases import Basis
from kanseg.bases.groups import SharedFunction
from kanseg.bases.orthogonal import Gram
from kanseg.bases.rational import GroupRational
from kanseg.bases.relu import ReLUBumps
from kanseg.bases.wavelet import WaveletShifts
from kanseg.layers import FAMILIES, KANConv, conv_layer
from kanseg.layers.kernels import conv_operator, gpu, instance_norm_act, norm_act, slabs, triton_conv
from kanseg.layers.kernels.recipe import read
from kanseg.layers.kernels.rows import channels_last

SIZES = {1: (19,), 2: (5, 6), 3: (3, 4, 5)}
EVERY = sorted(set(FAMILIES) - {"plain", "wavkan", "kagn_v2"})
GEOMETRIES = [
    {},
    {"groups": 2, "stride": 2},
    {"dilation": 2, "padding": 1},
    {"padding": 2},
    {"kernel_size": (1, 3)},
    {"kernel_size": 1},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 1, "stride": 2, "padding": 1},
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; tiny blocks, so that programs take several turns."""
    seen: list[str] = []
    launch, tile = gpu.launch, gpu.tile

    def counted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        seen.append(kernel.fn.__name__)
        with _disable_current_modes():  # the interpreter itself computes with torch
            launch(kernel, grid, *arguments, **constants)

    def small(channels: int, number: int, least: int = 1, most: int = 64) -> tuple[int, int]:
        return 32, tile(channels, number, least, min(most, 4))[1]

    monkeypatch.setattr(gpu, "launch", counted)
    monkeypatch.setattr(gpu, "tile", small)
    return seen


def gradients(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(cotangent.to(y.dtype))
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def assert_like_float64(make: Callable[..., nn.Module], x: Tensor, tolerance: float = 1e-5) -> None:
    """The layer agrees with the one that keeps its expansion, in float64, output and all gradients."""
    torch.manual_seed(1)
    layer, exact = make(), make(recompute=False).double()
    exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    cotangent = torch.randn(exact(x.double()).shape)
    for ours, theirs in zip(
        gradients(layer, x, cotangent), gradients(exact, x.double(), cotangent.double()), strict=True
    ):
        if theirs is not None and theirs.numel():
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
            assert error < tolerance, f"relative error {error:.1e} for shape {tuple(ours.shape)}"


@pytest.mark.parametrize(
    ("family", "spatial_dims"),
    [*((family, 3) for family in (*EVERY, "fourier", "dog")), ("kagn", 1), ("fastkan", 1)],
)
def test_every_family_is_its_formula(family: str, spatial_dims: int, launches: list[str]) -> None:
    x = torch.randn(2, 4, *SIZES[spatial_dims])
    assert_like_float64(lambda **options: conv_layer(family, **options)(spatial_dims, 4, 6), x, 1e-4)
    conv: Any = conv_layer(family)(spatial_dims, 4, 6).conv
    known = triton_conv.described(read(getattr(conv, "inner", conv).recipe)) is not None
    assert ({"prepare", "contract", "unfold"} <= set(launches)) == known


@pytest.mark.parametrize(
    ("basis", "shared_by", "geometry"),
    [
        *(("gram", shared_by, geometry) for shared_by in (0, 2) for geometry in GEOMETRIES),
        *((basis, 0, geometry) for basis in ("relu", "fourier", "rational") for geometry in GEOMETRIES[1::2]),
    ],
)
def test_every_geometry_is_its_formula(
    basis: str, shared_by: int, geometry: dict, launches: list[str]
) -> None:
    x = torch.randn(2, 8, 5, 7)
    assert_like_float64(
        lambda **o: KANConv(2, 8, 4, basis=basis, shared_by=shared_by, **geometry, **o), x, 2e-5
    )
    assert ("pointwise" in launches) == (geometry.get("kernel_size") == 1 and "stride" not in geometry)


@pytest.mark.parametrize(
    "options",
    [
        {"degree": 0},
        {"degree": 1},
        {"degree": 6},
        {"basis_act": None},
        {"basis_act": "relu", "base_act": "gelu"},
        {"base": False},
        {"basis": "jacobi", "a": 0.5, "b": 2.0},
        {"basis": "bernstein", "degree": 0},
        {"basis": "relu", "train_phases": False},
        *({"basis": "bspline", "spline_order": order} for order in (1, 2, 4)),
        *({"basis": "fourier", "degree": degree} for degree in (0, 1, 2, 5)),
        {"basis": "fourier", "basis_act": None},
        {"basis": "rational", "degree": 9, "denominator_degree": 2},
        {"basis": "rational", "degree": 4, "denominator_degree": 6, "basis_act": None, "base": False},
        *({"basis": basis, "grid_size": 5} for basis in ("mexican_hat", "morlet", "dog")),
    ],
)
def test_options_of_the_basis(options: dict, launches: list[str]) -> None:
    x = torch.randn(1, 5, 5, 6)
    assert_like_float64(lambda **o: KANConv(2, 5, 3, **{"basis_act": "silu", **options}, **o), x, 1e-4)
    assert "contract" in launches


@pytest.mark.parametrize("basis", ["gram", "legendre", "fourier", "bernstein", "bspline", "morlet"])
@pytest.mark.parametrize(
    "options", [{"base": False}, {"groups": 2, "basis_act": "silu"}, {"kernel_size": 1, "groups": 2}]
)
def test_shared_functions_are_their_formula(basis: str, options: dict, launches: list[str]) -> None:
    """Sets of neighbouring channels, that begin anew with each group."""
    x = torch.randn(1, 12, 4, 5)
    assert_like_float64(lambda **o: KANConv(2, 12, 4, basis=basis, shared_by=2, **options, **o), x, 2e-5)
    assert "contract" in launches


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_shared_functions_of_few_terms(degree: int) -> None:
    x = torch.randn(1, 4, 4, 5)
    assert_like_float64(lambda **o: KANConv(2, 4, 3, basis="gram", degree=degree, shared_by=2, **o), x)


@pytest.mark.parametrize("basis", [ReLUBumps, GroupRational, lambda: SharedFunction(Gram(), 4, None)])
def test_one_set_is_summed_over_the_channels(basis: Callable[[], Basis]) -> None:
    assert_like_float64(lambda **o: KANConv(2, 6, 4, basis=basis(), **o), torch.randn(1, 6, 5, 5))


@pytest.mark.parametrize("basis", ["fourier", "morlet"])
def test_waves_take_any_number(basis: str) -> None:
    """As far as float32 knows an angle, and what is not finite."""
    x = torch.cat([torch.linspace(-3e4, 3e4, 500), torch.tensor([1e6, -9e8])]).reshape(1, 1, 1, -1)
    layer, exact = (KANConv(2, 1, 5, 1, basis=basis, base=False, recompute=again) for again in (True, False))
    exact.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        assert torch.allclose(layer(x).double(), exact.double()(x.double()), atol=2e-5)
        assert layer(torch.full((1, 1, 1, 1), 1e30)).isfinite().all()
        assert layer(torch.tensor([math.inf, math.nan]).reshape(1, 1, 1, 2)).isnan().all()


@pytest.mark.parametrize("options", [{"basis": "meyer"}, {"basis": "relu", "shared_by": 2}])
def test_what_the_kernels_do_not_make_is_left_to_torch(options: dict, launches: list[str]) -> None:
    assert_like_float64(lambda **o: KANConv(2, 4, 3, **options, **o), torch.randn(1, 4, 4, 5))
    assert not launches


class Doubled(WaveletShifts):
    """Twice the functions of a class that the kernels know."""

    def functions(self, t: Tensor) -> list[Tensor]:
        return [2 * f for f in super().functions(t)]


def test_functions_of_a_subclass_are_its_own(launches: list[str]) -> None:
    assert_like_float64(lambda **o: KANConv(2, 4, 3, basis=Doubled(), **o), torch.randn(1, 4, 4, 5))
    assert not launches


@pytest.mark.parametrize("family", ["kagn", "fastkan", "grkan"])
@pytest.mark.parametrize("geometry", [{}, {"groups": 2, "stride": 2}, {"kernel_size": 1, "stride": 3}])
def test_slabs_change_nothing(family: str, geometry: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 3000)
    x = torch.randn(2, 4, 5, 3, 4)
    assert_like_float64(lambda **o: conv_layer(family, **o)(3, 4, 6, **geometry), x, 1e-4)


@pytest.mark.parametrize("act", ["identity", "silu", "relu", "prelu"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("affine", [False, True])
def test_norm_and_activation(act: str, offset: float, affine: bool, launches: list[str]) -> None:
    y = channels_last(torch.randn(2, 5, 5, 6, 4) * 3 + offset)
    weight, bias, below = torch.randn(3, 5)
    cotangent = torch.randn(y.shape)
    functions: dict[str, Callable[..., Tensor]] = {
        "identity": lambda z, k: z,
        "silu": lambda z, k: F.silu(z),
        "relu": lambda z, k: F.relu(z),
        "prelu": F.prelu,
    }
    given = [y, *((weight, bias) if affine else (None, None)), below if act == "prelu" else None]
    ours = [None if t is None else t.clone().requires_grad_() for t in given]
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    one = instance_norm_act(ours[0], ours[1], ours[2], 1e-5, act, ours[3])
    other = functions[act](F.instance_norm(exact[0], weight=exact[1], bias=exact[2]), exact[3])
    found = torch.autograd.grad(one, [t for t in ours if t is not None], cotangent)
    expected = torch.autograd.grad(other, [t for t in exact if t is not None], cotangent.double())
    for a, b in zip((one, *found), (other, *expected), strict=True):
        assert (a - b).abs().max() < 1e-5 * (1 + offset / 10) * b.abs().max()
    assert launches == ["moments", "normalise", "sums", "lead_back"]


@pytest.mark.parametrize(
    ("family", "kernel_size"),
    [
        *((family, 3) for family in ("kagn", "kan", "relukan", "fourier", "grkan", "morlet")),
        ("kagn", 1),
        ("kan", 1),
    ],
)
def test_bfloat16_operands(family: str, kernel_size: int) -> None:
    """Under autocast the operands of the convolution have 8 bits, nothing else: the result is within 2 %.

    The interpreter cuts what a GPU rounds, so the error is twice that of a GPU.
    """
    layer = conv_layer(family, norm=None, act=None)(2, 6, 4, kernel_size)
    x = torch.randn(1, 6, 6, 7)
    exact = gradients(layer, x, torch.ones(1, 4, 6, 7))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact[0]).abs().max() < 2e-2 * exact[0].abs().max()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    y.backward(torch.ones_like(y))
    assert (leaf.grad - exact[1]).abs().max() < 2e-2 * exact[1].abs().max()


class Launches(TorchDispatchMode):
    """Counts torch's own operations that launch a kernel on a GPU: all but views and uninitialised memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [r.alias_info for r in func._schema.returns]
        view = all(alias is not None and not alias.is_write for alias in aliases)
        if not view and "empty" not in str(func):
            # the backward pass of a convolution is two convolutions
            self.names += [str(func)] * (2 if "convolution_backward" in str(func) else 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kagn_layer_launches_twelve_kernels(
    dtype: torch.dtype, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolution, norm and activation, forward and backward, in one slab; the reference launches 52."""
    monkeypatch.setattr(
        conv_operator, "plain_eager", lambda x: True
    )  # so that the mode sees inside the operators
    monkeypatch.setattr(norm_act, "plain_eager", lambda x: True)
    layer = conv_layer("kagn")(3, 8, 8)
    x = channels_last(torch.randn(2, 8, 4, 4, 4)).requires_grad_()
    cotangent = channels_last(torch.randn(2, 8, 4, 4, 4)).to(dtype)
    layer(x)  # what is worked out once for a layer
    launches.clear()
    with Launches() as others:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        y.backward(cotangent)
    assert all(p.grad is not None for p in layer.parameters())
    assert sorted(others.names) == ["aten.convolution.default", *["aten.convolution_backward.default"] * 2]
    assert len(launches) + len(others.names) <= 12, (launches, others.names)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("family", "dims"), [("kagn", 1), ("kagn", 2), ("kagn", 3), ("fastkan", 2), ("bottleneck_kagn", 2)]
)
def test_inference_takes_any_memory(family: str, kernel_size: int, dims: int, launches: list[str]) -> None:
    """Contiguous, a view, and a batch of one number: the result is that with gradients."""
    layer = conv_layer(family)(dims, 4, 6, kernel_size)
    x = torch.randn(2, 4, *SIZES[dims])
    for given in (x, torch.stack([x, x], -1)[..., 0], x[:1].expand(3, *x.shape[1:])):
        wanted = layer(given).detach()
        launches.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(given), wanted)
        assert "prepare" in launches


def test_an_empty_batch() -> None:
    layer = conv_layer("kagn")(2, 4, 6)
    x = torch.zeros(0, 4, 8, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 6, 8, 8)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
