"""The layers of the literature, each written once in plain torch: functions by closed formulas, weights of the layer.

Sources: Drokin, arXiv 2407.01092 (kan, fastkan, kaln, kacn, kagn, and the bottleneck), with Liu et al. 2404.19756
(B-splines), Li 2405.06721 (Gaussians), Bozorgasl and Chen 2405.12832 (wavelets), Qiu et al. 2406.02075 (ReLU), Yang and
Wang 2409.10594 (rational functions). Nothing here comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]  # the parameters of a layer by name
Drop = Callable[[Tensor], Tensor]  # what dropout does to the map at its place
DEGREE = 3


def legendre(x: Tensor, w: Weights) -> list[Tensor]:
    """Bonnet: (n + 1) P_{n+1} = (2n + 1) t P_n - n P_{n-1}."""
    t = torch.tanh(x)
    found = [torch.ones_like(t), t]
    for n in range(1, DEGREE):
        found.append(((2 * n + 1) * t * found[n] - n * found[n - 1]) / (n + 1))
    return found


def chebyshev(x: Tensor, w: Weights) -> list[Tensor]:
    return [torch.cos(n * torch.arccos(torch.tanh(x))) for n in range(DEGREE + 1)]


def gram(x: Tensor, w: Weights) -> list[Tensor]:
    """Monic and orthogonal on the four points +-1/4, +-3/4, then SiLU; the two constants are learned."""
    t, (first, second) = torch.tanh(x), w["basis.beta"]
    quadratic = t**2 - first * 5 / 16
    return [F.silu(f) for f in (torch.ones_like(t), t, quadratic, t * quadratic - second * t / 5)]


def jacobi(x: Tensor, w: Weights) -> list[Tensor]:
    """P_n^(1,1)(t) = sum over s of binom(n + 1, n - s) binom(n + 1, s) ((t - 1) / 2)^s ((t + 1) / 2)^(n - s)."""
    down, up = (torch.tanh(x) - 1) / 2, (torch.tanh(x) + 1) / 2

    def term(n: int, s: int) -> Tensor:
        return math.comb(n + 1, n - s) * math.comb(n + 1, s) * down**s * up ** (n - s)

    return [torch.stack([term(n, s) for s in range(n + 1)]).sum(0) for n in range(DEGREE + 1)]


def bernstein(x: Tensor, w: Weights) -> list[Tensor]:
    t = torch.sigmoid(x)
    return [math.comb(DEGREE, k) * t**k * (1 - t) ** (DEGREE - k) for k in range(DEGREE + 1)]


def bspline(x: Tensor, w: Weights) -> list[Tensor]:
    """The eight cubic B-splines on five intervals of [-1, 1]."""
    knots = -1 + 0.4 * np.arange(-3, 9)
    splines = [BSpline.basis_element(knots[k : k + 5], extrapolate=False) for k in range(8)]
    return [torch.from_numpy(np.nan_to_num(spline(x.detach().numpy()))) for spline in splines]


def gaussians(x: Tensor, w: Weights) -> list[Tensor]:
    return [
        torch.exp(-(((x - centre) / (4 / 7)) ** 2))
        for centre in torch.linspace(-2, 2, 8, dtype=torch.float64)
    ]


def a_channel(numbers: Tensor, x: Tensor) -> list[Tensor]:
    """The columns of (channels, numbers), each beside x; groups of the convolution share them."""
    columns = numbers.repeat(x.shape[1] // len(numbers), 1).unbind(1)
    return [column.unflatten(0, (-1, *[1] * (x.dim() - 2))) for column in columns]


def relu_bumps(x: Tensor, w: Weights) -> list[Tensor]:
    """(relu(x - low) relu(high - x) 4 g^2 / (k + 1)^2)^2 with g = 5, k = 3, low and high learned a channel."""
    edges = (a_channel(w[f"basis.phase_{side}"], x) for side in ("low", "high"))
    return [
        (torch.relu(x - low) * torch.relu(high - x) * 4 * 5**2 / 4**2) ** 2
        for low, high in zip(*edges, strict=True)
    ]


def rational(x: Tensor, w: Weights) -> list[Tensor]:
    """P(x) / (1 + |x Q(x)|), polynomials of their own for up to eight channels."""
    top, bottom = (a_channel(w[f"basis.{part}"], x) for part in ("numerator", "denominator"))
    return [
        sum(a * x**n for n, a in enumerate(top))
        / (1 + sum(b * x ** (n + 1) for n, b in enumerate(bottom)).abs())
    ]


def mexican_hat(z: Tensor) -> Tensor:
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - z**2) * torch.exp(-(z**2) / 2)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """The matrix of a fully connected layer, or the convolution that keeps the size, in as many groups as fit."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return F.conv2d(
        x, weight, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[1] // weight.shape[1]
    )


def base(x: Tensor, w: Weights) -> Tensor:
    return times(x, w["base_weight"])


def spread(functions: list[Tensor], w: Weights) -> Tensor:
    """All functions of the first channel, then all of the second, and so on, times their weight."""
    return times(torch.stack(functions, 2).flatten(1, 2), w["basis_weight"])


def waves(x: Tensor, w: Weights) -> Tensor:
    """u_o = sum over the channels c of an output o of W_oc psi((x_c - t_oc) / s_oc)."""
    outputs, found = len(w["scale"]), []
    groups = x.shape[1] // w["scale"].shape[1]
    for o in range(outputs):
        part = x.chunk(groups, dim=1)[o * groups // outputs]
        t, s = (w[name][o].unflatten(0, (-1, *[1] * (x.dim() - 2))) for name in ("translation", "scale"))
        found.append(times(mexican_hat((part - t) / s), w["wavelet_weight"][o : o + 1]))
    return torch.cat(found, dim=1)


def standard(x: Tensor, axes: tuple[int, ...], w: Weights, name: str = "norm") -> Tensor:
    """Mean 0 and variance 1 over some axes, then a learned factor and number a channel."""
    scale, shift = (
        w[f"{name}.{part}"].unflatten(0, (-1, *[1] * (x.dim() - 2))) for part in ("weight", "bias")
    )
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def instance(x: Tensor, w: Weights, name: str = "norm") -> Tensor:
    return standard(x, (2, 3), w, name)


def prelu(x: Tensor, w: Weights) -> Tensor:
    """A slope for each group."""
    slopes = w["act.weight"].repeat_interleave(x.shape[1] // len(w["act.weight"]))
    return torch.where(x > 0, x, x * slopes.unflatten(0, (-1, *[1] * (x.dim() - 2))))


def inner(w: Weights) -> Weights:
    return {name.removeprefix("inner."): value for name, value in w.items() if name.startswith("inner.")}


def conv_plain(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(drop(x), w), w))


def conv_kan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return drop(prelu(instance(base(F.gelu(x), w) + spread(bspline(x, w), w), w), w))


def conv_fastkan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return base(F.silu(x), w) + spread(gaussians(instance(drop(x), w, "input_norm"), w), w)


def conv_kaln(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(x, w) + spread(legendre(drop(x), w), w), w))


def conv_kacn(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return drop(instance(spread(chebyshev(x, w), w), w))


def conv_kagn(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(F.silu(x), w) + spread(gram(drop(x), w), w), w))


def conv_kajn(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(x, w) + spread([drop(f) for f in jacobi(x, w)], w), w))


def conv_kabn(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(x, w) + spread(bernstein(drop(x), w), w), w))


def conv_relukan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(base(F.silu(drop(x)), w) + spread(relu_bumps(drop(x), w), w), w))


def conv_grkan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return F.silu(instance(spread(rational(drop(x), w), w), w))


def conv_wavkan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    return standard(times(waves(drop(x), w), w["mix_weight"]) + base(F.silu(x), w), (0, 2, 3), w)


def conv_bottleneck_kagn(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    narrow = spread(gram(times(drop(x), w["down_weight"]), inner(w)), inner(w))
    return F.silu(instance(times(narrow, w["up_weight"]) + base(F.silu(drop(x)), w), w))


def conv_bottleneck_relukan(x: Tensor, w: Weights, drop: Drop) -> Tensor:
    narrow = spread(relu_bumps(times(drop(x), w["down_weight"]), inner(w)), inner(w))
    return F.silu(instance(times(narrow, w["up_weight"]) + base(F.silu(drop(x)), w), w))


CONVOLUTIONS: dict[str, Callable[[Tensor, Weights, Drop], Tensor]] = {
    name.removeprefix("conv_"): function for name, function in globals().items() if name.startswith("conv_")
}
CONVOLUTIONS["kagn_v2"] = conv_kagn


def layer_norm(x: Tensor, w: Weights, name: str = "norm") -> Tensor:
    return standard(x, (1,), w, name)


def linear_plain(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(base(x, w), w))


def linear_kan(x: Tensor, w: Weights) -> Tensor:
    return prelu(layer_norm(base(F.gelu(x), w) + spread(bspline(x, w), w), w), w)


def linear_fastkan(x: Tensor, w: Weights) -> Tensor:
    return base(F.silu(x), w) + w["bias"] + spread(gaussians(layer_norm(x, w, "input_norm"), w), w)


def linear_kaln(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(base(F.silu(x), w) + spread(legendre(x, w), w), w))


def linear_kacn(x: Tensor, w: Weights) -> Tensor:
    return spread(chebyshev(x, w), w)


def linear_kagn(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(base(F.silu(x), w) + spread(gram(x, w), w), w))


def linear_kajn(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(base(F.silu(x), w) + spread(jacobi(x, w), w), w))


def linear_kabn(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(base(F.silu(x), w) + spread(bernstein(x, w), w), w))


def linear_relukan(x: Tensor, w: Weights) -> Tensor:
    return spread(relu_bumps(x, w), w) + w["bias"]


def linear_grkan(x: Tensor, w: Weights) -> Tensor:
    return F.silu(layer_norm(spread(rational(x, w), w), w))


def linear_wavkan(x: Tensor, w: Weights) -> Tensor:
    return standard(waves(x, w) + base(F.silu(x), w), (0,), w)


def linear_bottleneck_kagn(x: Tensor, w: Weights) -> Tensor:
    narrow = spread(gram(times(x, w["down.weight"]) + w["down.bias"], inner(w)), inner(w))
    return F.silu(layer_norm(times(narrow, w["up.weight"]) + w["up.bias"] + base(F.silu(x), w), w))


def linear_bottleneck_relukan(x: Tensor, w: Weights) -> Tensor:
    narrow = spread(relu_bumps(times(x, w["down.weight"]) + w["down.bias"], inner(w)), inner(w))
    return F.silu(layer_norm(times(narrow, w["up.weight"]) + w["up.bias"] + base(F.silu(x), w), w))


LINEAR: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    name.removeprefix("linear_"): function
    for name, function in globals().items()
    if name.startswith("linear_")
}
LINEAR["kagn_v2"] = linear_kagn
