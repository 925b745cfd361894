"""Classifier: an encoder, pooling and a head. What it learns moves into a segmenter with the same encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kanseg.encoders import Encoder, create_encoder
from kanseg.encoders.layers import Layer
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers.geometry import of_dims, per_axis
from kanseg.layers.heads import MatryoshkaHead
from kanseg.layers.mlp import KANMLP, own_options
from kanseg.models.model import CLASSIFIERS
from kanseg.models.u_shape import at_least_float32, check_input

POOLING = {"average": "AdaptiveAvgPool", "max": "AdaptiveMaxPool"}
HIDDEN, HIDDEN_KAN = 1024, 512  # features inside the heads
MLP = Callable[..., nn.Module]  # of fully connected KAN layers, (features, dropout=) -> module


def _linear(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    return [nn.Dropout(dropout), nn.Linear(features, classes)]


def _normed_linear(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    return [nn.LayerNorm(features), *_linear(features, classes, kan, dropout)]


def _kan(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    return [kan((features, classes), dropout=dropout)]


def _hidden_kan(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    hidden = kan((features, HIDDEN_KAN), dropout=dropout)
    return [hidden, *_linear(HIDDEN_KAN, classes, kan, dropout)]


def _vgg(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    first, second = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    inner = [first, nn.ReLU(), nn.Dropout(dropout), second, nn.ReLU()]
    return [*inner, *_linear(HIDDEN, classes, kan, dropout)]


def _matryoshka(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    nested = MatryoshkaHead([HIDDEN >> level for level in (4, 3, 2, 1, 0)], classes, shared=True)
    return [nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(dropout), nested]


def _kantryoshka(features: int, classes: int, kan: MLP, dropout: float) -> list[nn.Module]:
    nested = MatryoshkaHead([HIDDEN_KAN >> level for level in (4, 3, 2, 1, 0)], classes, shared=True)
    return [kan((features, HIDDEN_KAN), dropout=dropout), nn.Dropout(dropout), nested]


HEADS: dict[str, Callable[..., list[nn.Module]]] = {
    "linear": _linear,
    "normed_linear": _normed_linear,
    "kan": _kan,
    "hidden_kan": _hidden_kan,
    "vgg": _vgg,
    "matryoshka": _matryoshka,
    "kantryoshka": _kantryoshka,
    "none": lambda *args: [],
}


@CLASSIFIERS.register("classifier")
class Classifier(nn.Module):
    """Image classifier, (N, in_channels, *S) -> logits (N, out_channels), float32.

    Nested heads ("matryoshka", "kantryoshka") give in training a list of logits, the last from all features, and
    that one in `eval()`.

    Args:
        out_channels: classes.
        encoder: name in `kanseg.encoders.ENCODERS`, in 2D also "timm/NAME" or "smp/NAME", or an encoder.
        basis: basis or family of the KAN layers, of the encoder and of KAN heads; None for the plain twin.
        head: row of `HEADS`.
        pool: "average" or "max".
        pool_size: positions an axis that pooling leaves for the head.
        head_dropout: before the linear layers of the head.
        kan_stages, bottleneck, norm, dropout, layer_options, encoder_options, encoder_weights: as in `UKANet`; KAN
            heads take those of `layer_options` that are their basis's.

    >>> import torch
    >>> model = Classifier(2, 3, 10, encoder="vggkan11", encoder_options={"width": 0.25}).eval()
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        encoder: str | Encoder = "reskanet18",
        basis: Layer | Sequence[Layer] = "gram",
        head: str = "linear",
        pool: str = "average",
        pool_size: int | Sequence[int] = 1,
        head_dropout: float = 0.25,
        kan_stages: str | Sequence[int] = "all",
        bottleneck: bool = False,
        norm: str | tuple = "batch",
        dropout: float = 0.0,
        layer_options: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        encoder_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        for kind, value, table in (("head", head, HEADS), ("pool", pool, POOLING)):
            if value not in table:
                raise UsageError(f"Unknown {kind} '{value}'.{did_you_mean(value, table)}")
        if out_channels < 1:
            raise UsageError(f"out_channels must be positive, got {out_channels}")
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        options = {"bottleneck": bottleneck, "norm": norm, "dropout": dropout, **(layer_options or {})}
        self.encoder = create_encoder(
            encoder,
            spatial_dims,
            in_channels,
            weights=encoder_weights,
            own=encoder_options,
            basis=basis,
            kan_stages=kan_stages,
            **options,
        )
        size = per_axis(pool_size, spatial_dims, "pool_size")
        if min(size) < 1:
            raise UsageError(f"pool_size must be positive, got {pool_size}")
        self.pool = of_dims(POOLING[pool], spatial_dims)(size)
        features = self.encoder.out_channels[-1] * math.prod(size)
        last: Any = basis[-1] if isinstance(basis, list | tuple) else basis
        kan = partial(KANMLP, basis=last, **own_options(last, layer_options or {}))
        self.head = nn.Sequential(*HEADS[head](features, out_channels, kan, head_dropout))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(self, x)
        outputs = self.outputs(x)
        return outputs if self.training or isinstance(outputs, Tensor) else outputs[-1]

    def outputs(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, of nested heads all of them, float32."""
        logits = self.head(self.pool(self.encoder(x)[-1]).flatten(1))
        if isinstance(logits, Tensor):
            return at_least_float32(logits)
        return [at_least_float32(one) for one in logits]
