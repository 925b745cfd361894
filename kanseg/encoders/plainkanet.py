"""Layers one after the other, without skips: the plain baselines, VGG, and what UKAGNet goes down by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from kanseg.encoders.encoder import ENCODERS, Encoder
from kanseg.encoders.layers import Layer, LayerFactory, check_kernels, stage_layers
from kanseg.errors import UsageError, did_you_mean
from kanseg.layers import KANAttention, conv_layer
from kanseg.layers.geometry import of_dims, per_axis

DOWNSAMPLING = ("stride", "max_pool")


class PlainKANet(Encoder):
    """Stages of conv-norm-act layers, (N, in_channels, *S) -> one map a stage.

    Args:
        basis: basis or family of the layers, None for plain ones; or one a stage.
        stages: channels of the layers of each stage; None stands for an attention layer on the channels before it.
        strides: stride of each stage, a number or one an axis; default 1, 2, 2, ...
        kernel_sizes: kernel of each stage; default 3.
        downsampling: "stride" of the first layer of a stage, or "max_pool" before it.
        attention: basis or family of the attention layers, or their constructor, (spatial_dims, channels) -> module.
        attention_options: of `KANAttention`; in them `layer_options`, those of its convolutions (degree, norm, ...).
        kan_stages, layer_options: see `kanseg.encoders.layers`.

    >>> PlainKANet(2, 1, stages=((4,), (8, 8))).out_channels
    (4, 8)
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        basis: Layer | Sequence[Layer] = "gram",
        stages: Sequence[Sequence[int | None]] = ((32,), (64,), (128, 256)),
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        downsampling: str = "stride",
        attention: str | LayerFactory | None = None,
        attention_options: Mapping[str, Any] | None = None,
        kan_stages: str | Sequence[int] = "all",
        **layer_options: Any,
    ) -> None:
        strides = (1, *[2] * (len(stages) - 1)) if strides is None else tuple(strides)
        kernel_sizes = (3,) * len(stages) if kernel_sizes is None else tuple(kernel_sizes)
        if not len(strides) == len(kernel_sizes) == len(stages):
            raise UsageError(
                f"strides and kernel_sizes need {len(stages)} entries, one a stage, got {strides} and {kernel_sizes}"
            )
        check_kernels(kernel_sizes)
        if downsampling not in DOWNSAMPLING:
            raise UsageError(
                f"Unknown downsampling '{downsampling}'.{did_you_mean(downsampling, DOWNSAMPLING)}"
            )
        widths = [[width for width in stage if width is not None] for stage in stages]
        if not widths or not all(widths) or stages[0][0] is None:
            raise UsageError(
                f"Every stage needs at least one layer and the first starts with one, got {stages}"
            )
        super().__init__(spatial_dims, in_channels, [stage[-1] for stage in widths], strides)
        if attention_options and not isinstance(attention, str):
            raise UsageError(
                f"attention_options {sorted(attention_options)} are of attention layers by name, but attention is "
                f"{'None' if attention is None else 'a constructor'}. Name a basis or family."
            )
        if isinstance(attention, str):
            chosen = dict(attention_options or {})
            layer = conv_layer(attention, **chosen.pop("layer_options", {}))
            attention = partial(KANAttention, conv_layer=layer, **chosen)
        layers = stage_layers(basis, len(stages), kan_stages, **layer_options)
        self.stages = nn.ModuleList()
        channels = in_channels
        for number, plan in enumerate(stages):
            stage = nn.Sequential()
            stride = self.strides[number]
            if downsampling == "max_pool" and set(stride) != {1}:
                stage.add_module("pool", of_dims("MaxPool", spatial_dims)(stride, stride, ceil_mode=True))
                stride = per_axis(1, spatial_dims, "stride")
            for position, width in enumerate(plan):
                if width is None:
                    if attention is None:
                        raise UsageError("stages with attention layers (None) need `attention`")
                    stage.add_module(str(position), attention(spatial_dims, channels))
                    continue
                geometry: dict[str, Any] = {"stride": 1 if position else stride}
                if number == position == 0:
                    geometry["groups"] = 1
                made = layers[number](spatial_dims, channels, width, kernel_sizes[number], **geometry)
                stage.add_module(str(position), made)
                channels = width
            self.stages.append(stage)


def _check_layers(layers: Sequence[int], count: int) -> None:
    if len(layers) != count:
        raise UsageError(f"layers needs {count} numbers of channels, got {list(layers)}")


@ENCODERS.register("plainkanet4")
def plainkanet4(
    spatial_dims: int, in_channels: int, *, layers: Sequence[int] = (32, 64, 128, 256), **options: Any
) -> PlainKANet:
    """Four convolutions (strides 1, 2, 2, 1), the small baseline of torch-conv-kan.

    Args:
        layers: channels of the four.
    """
    _check_layers(layers, 4)
    a, b, c, d = layers
    return PlainKANet(spatial_dims, in_channels, stages=((a,), (b,), (c, d)), **options)


@ENCODERS.register("plainkanet8")
def plainkanet8(
    spatial_dims: int,
    in_channels: int,
    *,
    layers: Sequence[int] = (16, 32, 64, 128, 256, 256, 512, 512),
    **options: Any,
) -> PlainKANet:
    """Eight convolutions (strides 1, 2, 2, 1, 1, 2, 1, 1), the larger baseline of torch-conv-kan.

    Args:
        layers: channels of the eight.
    """
    _check_layers(layers, 8)
    a, b, *rest = layers
    return PlainKANet(spatial_dims, in_channels, stages=((a,), (b,), rest[:3], rest[3:]), **options)
