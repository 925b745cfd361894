"""VGGKAN: stacks of 3x3 KAN convolutions with max pooling between (VGG, Simonyan and Zisserman, arXiv 1409.1556).

Widths and plans after torch-conv-kan (Drokin, arXiv 2407.01092); "v2" to "v4" have a sixth stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kanseg.encoders.encoder import ENCODERS
from kanseg.encoders.layers import Layer, LayerFactory
from kanseg.encoders.plainkanet import PlainKANet
from kanseg.errors import UsageError, did_you_mean

WIDTHS = (16, 32, 64, 128, 128)
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
LAST_STAGE = {"": (), "v2": (128, 128), "v3": (128, 256), "v4": (256, 256)}
PLANS = {f"vgg{depth}{version}": (depth, version) for depth in DEPTHS for version in LAST_STAGE}


class VGGKAN(PlainKANet):
    """Convolutions and max pooling, (N, in_channels, *S) -> five maps (six for v2 to v4), the first at full resolution.

    Args:
        plan: "vgg11", "vgg13", "vgg16", "vgg19", each also with "v2", "v3" or "v4".
        width: factor of all channels.
        attention: basis or family of attention layers, or their constructor, (spatial_dims, channels) -> module; None
            for none.
        attention_at: "pools" (before the last two poolings), "last" (in place of the last convolution) or "both".
        options: of `PlainKANet`.

    >>> VGGKAN(2, 3, basis="legendre", width=0.25).out_channels
    (4, 8, 16, 32, 32)
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        plan: str = "vgg11",
        basis: Layer | Sequence[Layer] = "gram",
        width: float = 1,
        attention: str | LayerFactory | None = None,
        attention_at: str = "pools",
        **options: Any,
    ) -> None:
        if plan not in PLANS:
            raise UsageError(f"Unknown plan '{plan}'.{did_you_mean(plan, PLANS)}")
        depth, version = PLANS[plan]
        stages: list[list[int | None]] = [
            [int(features * width)] * count for features, count in zip(WIDTHS, DEPTHS[depth], strict=True)
        ]
        if LAST_STAGE[version]:
            stages.append([int(features * width) for features in LAST_STAGE[version]])
        places = {"pools": [_before_pools], "last": [_as_last], "both": [_before_pools, _as_last]}
        if attention is not None:
            if attention_at not in places:
                raise UsageError(
                    f"Unknown attention_at '{attention_at}'.{did_you_mean(attention_at, places)}"
                )
            for put in places[attention_at]:
                put(stages)
        super().__init__(
            spatial_dims,
            in_channels,
            basis=basis,
            stages=stages,
            downsampling="max_pool",
            attention=attention,
            **options,
        )


def _before_pools(stages: list[list[int | None]]) -> None:
    for stage in stages[-3:-1]:
        stage.append(None)


def _as_last(stages: list[list[int | None]]) -> None:
    stages[-1][-1] = None


for _plan, (_depth, _version) in PLANS.items():
    _description = (
        f"VGG of {_depth} layers{f' in the shape {_version}' * bool(_version)}, max pooling between."
    )
    ENCODERS.preset(_plan.replace("vgg", "vggkan"), VGGKAN, _description, plan=_plan)
