"""U-KAN: convolutions at the fine resolutions, KAN layers over the channels of tokens at the two coarsest.

The design of U-KAN (Li et al., arXiv 2406.02918): three convolutional stages with max pooling, two tokenised stages
(patch embedding by a strided convolution, then blocks of fully connected KAN layers with depthwise convolutions
between), and a decoder that adds the skips. A fully connected layer over the channels of tokens is a KAN convolution
of kernel 1, so this network needs no layers of its own. Here in 1D, 2D and 3D.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.encoders import Encoder
from kanseg.encoders.layers import Layer, LayerFactory, network_layer
from kanseg.errors import UsageError
from kanseg.layers import ConvLayer, conv_layer
from kanseg.layers.geometry import of_dims
from kanseg.models.model import MODELS
from kanseg.models.u_shape import DecoderStage, UShape


class TokenKAN(nn.Module):
    """x + f(norm(x)): f is `layers` times a KAN layer over the channels, then a depthwise convolution, norm, ReLU."""

    def __init__(
        self, spatial_dims: int, channels: int, layers: int, token: LayerFactory, plain: LayerFactory
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        steps: list[nn.Module] = []
        for _ in range(layers):
            steps.append(token(spatial_dims, channels, channels, 1))
            steps.append(plain(spatial_dims, channels, channels, 3, groups=channels))
        self.layers = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


class UKANEncoder(Encoder):
    """Convolutional, then tokenised stages, each at half the resolution of the one before."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        tokens: Sequence[nn.Module],
        plain: LayerFactory,
    ) -> None:
        super().__init__(spatial_dims, in_channels, features, (2,) * len(features))
        convolutional = len(features) - len(tokens)
        self.stages = nn.ModuleList()
        for number, (inputs, outputs) in enumerate(pairwise((in_channels, *features))):
            if number < convolutional:
                pool = of_dims("MaxPool", spatial_dims)(2, ceil_mode=True)
                both = [plain(spatial_dims, inputs, outputs, 3), plain(spatial_dims, outputs, outputs, 3)]
                self.stages.append(nn.Sequential(*both, pool))
            else:
                embed = plain(spatial_dims, inputs, outputs, 3, stride=2)
                self.stages.append(nn.Sequential(embed, tokens[number - convolutional]))


@MODELS.register("ukan")
class UKAN(UShape):
    """U-KAN: convolutions at fine resolutions, KAN layers over the channels of tokens at the two coarsest.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32.

    Args:
        features: channels of the stages at 1/2, 1/4, ... of the image's resolution; the last `token_stages` of them are
            tokenised.
        basis: basis of the KAN layers over the channels, in the paper B-splines; None for plain ones.
        token_stages: how many of the coarsest stages are tokenised.
        token_layers: KAN layers of a block.
        norm: MONAI norm spec of the convolutions.
        deep_supervision: logits of all but the two coarsest stages in training.
        layer_options: further options of the KAN layers (degree, grid_size, ...).

    >>> UKAN(2, 1, 3, features=(4, 8, 8, 8)).eval()(torch.zeros(1, 1, 20, 33)).shape
    torch.Size([1, 3, 20, 33])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int] = (16, 32, 128, 160, 256),
        basis: Layer = "bspline",
        token_stages: int = 2,
        token_layers: int = 3,
        norm: str | tuple = "batch",
        deep_supervision: bool = False,
        layer_options: dict[str, Any] | None = None,
    ) -> None:
        count = len(features)
        if not 1 <= token_stages < count or token_layers < 1:
            raise UsageError(
                f"UKAN needs at least one convolutional and one tokenised stage and token_layers >= 1, got "
                f"{count} features, token_stages={token_stages}, token_layers={token_layers}"
            )
        plain = network_layer(None, norm=norm, act="relu")
        bare = {"norm": None, "act": None, **(layer_options or {})}
        token = conv_layer(basis, **bare) if not callable(basis) else basis

        def block(channels: int) -> nn.Module:
            return TokenKAN(spatial_dims, channels, token_layers, token, plain)

        tokens = [block(channels) for channels in features[count - token_stages :]]
        encoder = UKANEncoder(spatial_dims, in_channels, features, tokens, plain)
        widths = (features[0], *features)
        stages = []
        for number in reversed(range(count)):
            inputs, outputs = widths[number + 1], widths[number]
            both = nn.Sequential(
                plain(spatial_dims, inputs, inputs, 3), plain(spatial_dims, inputs, outputs, 3)
            )
            tokenised = number > count - token_stages - 1 and number > 0
            after = block(outputs) if tokenised else nn.Identity()
            stages.append(DecoderStage(after, both, join=torch.add))
        finest = ConvLayer(spatial_dims, in_channels, widths[0], 3, basis=None, norm=norm, act="relu")
        super().__init__(
            encoder, stages, widths, out_channels, finest=finest, deep_supervision=deep_supervision
        )
