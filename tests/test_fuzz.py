"""Layers with options and shapes drawn at random: every set of kernels gives the numbers of the formula.

A draw is its number: `pytest "tests/test_fuzz.py::test_a_drawn_layer_is_its_formula[avx2-17]"` repeats one.
"""

from __future__ import annotations

import functools
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BUILT
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from kanseg.layers import FAMILIES, conv_layer
from kanseg.layers.kernels import native

DRAWS, MANY = 56, 500
NAMES = sorted(FAMILIES)
TOLERANCE = 1e-4  # of the norm of what is compared: Winograd's gradients of weights in float32
# With a norm, which multiplies what is left of a zero by up to 1 / sqrt(eps) (a constant map, made by Winograd's
# products, is one but for rounding).
ZERO = {True: 2e-2, False: 1e-6}
LIKE_FLOAT32 = 20  # times the error of the formula in float32, where that is ill-conditioned
DEGREES = {"degree": (0, 1, 2, 3, 6)}
GRIDS = {"grid_size": (1, 3, 5, 8)}
OPTIONS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("kagn", "kagn_v2", "kaln", "kacn", "kajn", "kabn", "bottleneck_kagn"), DEGREES),
    "kan": {"grid_size": (1, 3, 5, 8), "spline_order": (2, 3, 4)},
    "fastkan": {"grid_size": (2, 3, 5, 8)},
    **dict.fromkeys(("relukan", "bottleneck_relukan"), GRIDS),
    "wavkan": {"wavelet": ("mexican_hat", "morlet", "dog")},
}
REPEATS = 5
# What lies in memory as the layer sees it: a view of what `Draw.leaf` makes.
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(-1, 1),
    "every_other": lambda x: x[:, 1:, ..., ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "repeated": lambda x: x.expand(-1, x.shape[1], *x.shape[2:-1], REPEATS),
}


@dataclass(frozen=True, eq=False)
class Draw:
    """A layer and a shape of its input, all from one number."""

    family: str
    spatial_dims: int
    channels: tuple[int, int]
    geometry: dict[str, Any]
    options: dict[str, Any]
    shape: tuple[int, ...]  # of the input, (N, C, *S)
    layout: str

    def layer(self, **options: Any) -> nn.Module:
        made = conv_layer(self.family, **self.options)
        return made(self.spatial_dims, *self.channels, **self.geometry, **options)

    def leaf(self) -> Tensor:
        """What `LAYOUTS` takes to an input of this shape (where it repeats, with a last axis of 1)."""
        samples, channels, *size = self.shape
        shapes = {
            "contiguous": self.shape,
            "channels_last": (samples, *size, channels),
            "every_other": (samples, channels + 1, *size[:-1], 2 * size[-1]),
            "transposed": (channels, samples, *size),
            "repeated": (samples, channels, *size[:-1], 1),
        }
        return torch.randn(shapes[self.layout])

    def input(self, leaf: Tensor) -> Tensor:
        return LAYOUTS[self.layout](leaf)


def drawn(number: int, **fixed: Any) -> Draw:
    """A third of the draws is large, of the shapes that Winograd's products serve."""
    r = random.Random(number)
    family, dims, large = NAMES[number % len(NAMES)], r.choice((1, 2, 2, 3, 3)), r.random() < 1 / 3
    if large:
        groups, channels = 1, (r.choice((16, 32)), r.choice((16, 16, 32)))
        geometry: dict[str, Any] = {"padding": r.choice((None, 0, 1, 2))}
        size = [r.randint(*{1: (60, 70), 2: (47, 53), 3: (13, 16)}[dims]) for _ in range(dims)]
    else:
        groups = r.choice((1, 1, 1, 2, 3))
        channels = (groups * r.choice((1, 2, 3, 5, 16, 17)), groups * r.choice((1, 2, 3, 8, 16, 17)))
        kernel = [r.choice((1, 2, 3, 3, 3, 4)) for _ in range(dims)]
        same = r.choice((True, True, False))
        geometry = {
            "kernel_size": kernel[0] if same else kernel,
            "stride": r.choice((1, 1, 2, 3)) if same else [r.choice((1, 2)) for _ in range(dims)],
            "dilation": r.choice((1, 1, 2)),
            "padding": r.choice((None, 0, 1, 2)),
            "groups": groups,
        }
        kernel = [kernel[0]] * dims if same else kernel
        reach = [geometry["dilation"] * (k - 1) + 1 for k in kernel]
        free = 2 * geometry["padding"] if geometry["padding"] is not None else 0
        size = [max(1, n - free) + r.choice((0, 0, 1, 2, 5)) for n in reach]
    options: dict[str, Any] = {
        key: r.choice(values) for key, values in OPTIONS.get(family, {}).items() if r.random() < 0.7
    }
    options["act"] = r.choice((None, "silu"))  # no kinks, at which an error of rounding is one of the slope
    if family != "fastkan":
        options["norm"] = r.choice((None, ("instance", {"affine": True})))
    if family not in ("kacn", "grkan", "wavkan", "plain") and r.random() < 0.3:
        options["base_act"] = r.choice(("silu", "gelu", "relu"))
    options.update(fixed.get("options", {}))
    samples = fixed.get("samples", r.choice((1, 2) if large else (1, 1, 2, 3, 0)))
    layout = r.choice(list(LAYOUTS))
    if layout == "repeated" and size[-1] <= REPEATS:
        size[-1] = REPEATS
    elif layout == "repeated":
        layout = "contiguous"
    return Draw(family, dims, channels, geometry, options, (samples, channels[0], *size), layout)


def numbers(layer: nn.Module, draw: Draw, leaf: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Output and all gradients; none is one of zeros."""
    leaf = leaf.clone().requires_grad_()
    layer.zero_grad()
    y = layer(draw.input(leaf))
    y.backward(cotangent.to(y.dtype).expand_as(y))
    learned = {"input": leaf, **dict(layer.named_parameters())}
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in learned.items()}
    return {"output": y.detach(), **grads}


@dataclass(frozen=True)
class Trial:
    """A layer, an input and a cotangent, with what the formula gives in float64, which keeps its expansion."""

    layer: nn.Module
    leaf: Tensor
    cotangent: Tensor
    exact: dict[str, Tensor]
    rounded: dict[str, Tensor]  # in float32


@functools.lru_cache(maxsize=DRAWS)  # for all sets of kernels
def trial(number: int) -> Trial:
    """The same for every set of kernels."""
    draw = drawn(number)
    torch.manual_seed(number)
    layer, exact, rounded = draw.layer(), draw.layer(recompute=False).double(), draw.layer(recompute=False)
    exact.load_state_dict(layer.state_dict())
    rounded.load_state_dict(layer.state_dict())
    leaf = draw.leaf()
    y = rounded(draw.input(leaf)).detach()
    cotangent = torch.randn(
        y[: 1 if number % 3 == 0 else None].shape
    )  # may lie in memory once for all samples
    return Trial(
        layer,
        leaf,
        cotangent,
        numbers(exact, draw, leaf.double(), cotangent),
        numbers(rounded, draw, leaf, cotangent),
    )


def check(number: int) -> None:
    """Ours in float32 against the formula."""
    draw, of = drawn(number), trial(number)
    before = of.leaf.clone()
    ours = numbers(of.layer, draw, of.leaf, of.cotangent)
    with torch.no_grad():
        torch.testing.assert_close(of.layer(draw.input(of.leaf)), ours["output"], rtol=1e-4, atol=1e-5)
    assert torch.equal(of.leaf, before), "the input was written to"
    zero = ZERO[any(isinstance(part, _InstanceNorm) for part in of.layer.modules())]
    for name, found in ours.items():
        assert found.shape == of.exact[name].shape
        assert found.isfinite().all()
        size, error = of.exact[name].norm(), (found - of.exact[name]).norm()
        allowed = TOLERANCE * size + LIKE_FLOAT32 * (of.rounded[name] - of.exact[name]).norm() + zero
        assert error <= allowed, f"{name}: error {error:.1e} of {size:.1e}, {allowed:.1e} allowed, {draw}"


@pytest.mark.parametrize("number", range(DRAWS))
def test_a_drawn_layer_is_its_formula(backend: str, number: int) -> None:
    check(number)


@pytest.mark.slow
def test_many_drawn_layers_are_their_formula(backend: str) -> None:
    for number in range(DRAWS, DRAWS + MANY):
        check(number)


BARE = {"norm": None, "act": None}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("number", range(len(NAMES)))
def test_what_is_not_finite_stays_so(backend: str, number: int, value: float) -> None:
    """Wherever the formula gives no finite number the kernels give none, and they lead back what is not finite."""
    draw = drawn(number, samples=2, options={} if NAMES[number] == "fastkan" else BARE)
    layer, formula, leaf = draw.layer(), draw.layer(recompute=False), draw.leaf()
    formula.load_state_dict(layer.state_dict())
    leaf.view(-1)[leaf.numel() // 2] = value
    with torch.no_grad():
        lost, ours = ~formula(draw.input(leaf)).isfinite(), ~layer(draw.input(leaf)).isfinite()
    found = int((lost & ~ours).sum())
    assert not found, f"{found} numbers of {int(lost.sum())} became finite"
    cotangent = torch.full_like(ours, value, dtype=torch.float32)
    grads = numbers(layer, draw, draw.leaf(), cotangent)
    assert not any(g.isfinite().all() for name, g in grads.items() if name.endswith("weight") and g.any())


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("family", NAMES)
def test_a_map_smaller_than_the_kernel_is_refused(backend: str, family: str, spatial_dims: int) -> None:
    layer = conv_layer(family)(spatial_dims, 16, 16, 3, padding=0)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        layer(torch.zeros(1, 16, *[2] * spatial_dims))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("family", NAMES)
def test_a_second_derivative_is_right_or_refused(backend: str, family: str, power: int) -> None:
    """Where torch's own convolution serves it is that of the formula; elsewhere an error says what to do.

    Also of a sum, whose gradient is a constant.
    """
    options = {} if family == "fastkan" else BARE
    layer = conv_layer(family, **options)(2, 16, 16)
    kept = conv_layer(family, **options, recompute=False)(2, 16, 16)
    kept.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 46, 46, requires_grad=True)

    def second(layer: nn.Module) -> Tensor:
        (first,) = torch.autograd.grad(layer(x).pow(power).sum(), x, create_graph=True)
        (x * 0 + first).square().sum().backward()
        found, x.grad = x.grad, None
        return found

    exact = second(kept)
    assert exact.isfinite().all()
    try:
        found = second(layer)
    except RuntimeError as error:
        assert "recompute=False" in str(error)  # noqa: PT017  # either is right, a silent third is not
    else:
        torch.testing.assert_close(found, exact)


def foreign(path: Path) -> None:
    """For another processor: the number of the machine in the header is that of ARM."""
    content = bytearray(BUILT[0].read_bytes())
    content[18:20] = struct.pack("<H", 183)
    path.write_bytes(content)


def cut(path: Path) -> None:
    """As an interrupted installation leaves it."""
    path.write_bytes(BUILT[0].read_bytes()[:100])


def compiled(path: Path, code: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=code.encode(), check=True
    )


FILES = {
    "text": lambda path: path.write_text("no program"),
    "empty": lambda path: path.touch(),
    "cut": cut,
    "foreign": foreign,
    "without_functions": lambda path: compiled(path, "int kanseg_instruction_set(void) { return 1; }"),
    "unknown_instructions": lambda path: compiled(
        path,
        f"int kanseg_interface(void) {{ return {native.INTERFACE}; }}"
        "int kanseg_instruction_set(void) { return 9; }",
    ),
    "another_version": lambda path: compiled(
        path, "int kanseg_interface(void) { return 0; } int kanseg_instruction_set(void) { return 0; }"
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_extension_leaves_the_eager_steps(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of another version or for another processor: the layer works, without the kernels."""
    if kind in ("cut", "foreign") and not BUILT:
        pytest.skip("the extension is not built here (no compiler at installation)")
    FILES[kind](tmp_path / "_native.so")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.library.cache_clear()
    try:
        assert native.available() is None
        check(0)
    finally:
        native.library.cache_clear()
