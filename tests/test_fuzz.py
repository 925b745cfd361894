"""Layers with options and shapes drawn at random: every set of kernels gives the numbers of the formula.

A draw is its number: `pytest "tests/test_fuzz.py::test_a_drawn_layer_is_its_formula[avx2-17]"` repeats one.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BUILT
from torch import Tensor, nn

from kanseg.layers import FAMILIES, conv_layer
from kanseg.layers.kernels import native

DRAWS, MANY = 56, 2000
NAMES = sorted(FAMILIES)
TOLERANCE = 1e-4  # of the norm of what is compared: Winograd's gradients of weights in float32
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
# What lies in memory as the layer sees it: a view of what `Draw.leaf` makes.
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(-1, 1),
    "every_other": lambda x: x[:, 1:, ..., ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "repeated": lambda x: x.expand(-1, x.shape[1], *x.shape[2:-1], 5),
}


@dataclass(frozen=True)
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
        """What `LAYOUTS` takes to an input of this shape (where it repeats, of a last axis of 5)."""
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
        groups, channels = 1, (r.choice((16, 32)), r.choice((16, 32, 48)))
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
    samples = r.choice((1, 1, 2, 3, 0)) if not large else r.choice((1, 2))
    layout = r.choice(list(LAYOUTS))
    if layout == "repeated":
        size[-1] = max(5, size[-1]) if large else 5
        layout = "contiguous" if size[-1] != 5 else layout
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


def check(draw: Draw, number: int) -> None:
    """Ours in float32 against the formula in float64, which keeps its expansion."""
    torch.manual_seed(number)
    layer, exact, rounded = draw.layer(), draw.layer(recompute=False).double(), draw.layer(recompute=False)
    for other in (exact, rounded):
        other.load_state_dict({key: value.to(next(other.parameters()).dtype) for key, value in layer.state_dict().items()})
    leaf = draw.leaf()
    with torch.no_grad():
        alone = layer(draw.input(leaf))
    cotangent = torch.randn(alone[: 1 if number % 3 == 0 else None].shape)  # may lie in memory once for all samples
    ours = numbers(layer, draw, leaf, cotangent)
    theirs = numbers(exact, draw, leaf.double(), cotangent)
    float32 = numbers(rounded, draw, leaf, cotangent)
    torch.testing.assert_close(alone, ours["output"], rtol=1e-4, atol=1e-5)
    for name, found in ours.items():
        assert found.shape == theirs[name].shape
        assert found.isfinite().all()
        size, error = theirs[name].norm(), (found - theirs[name]).norm()
        allowed = TOLERANCE * size + LIKE_FLOAT32 * (float32[name] - theirs[name]).norm() + 1e-6
        assert error <= allowed, f"{name}: error {error:.1e} of {size:.1e}, {allowed:.1e} allowed, {draw}"


@pytest.mark.parametrize("number", range(DRAWS))
def test_a_drawn_layer_is_its_formula(backend: str, number: int) -> None:
    check(drawn(number), number)


@pytest.mark.slow
def test_many_drawn_layers_are_their_formula(backend: str) -> None:
    for number in range(DRAWS, DRAWS + MANY):
        check(drawn(number), number)
