"""Our encoders inside segmentation-models-pytorch: `smp.Unet("kanseg-reskanet18-gram", encoder_weights=None)`."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.bases import BASES
from kanseg.encoders.densekanet import AveragePool
from kanseg.encoders.encoder import ENCODERS, create_encoder
from kanseg.encoders.layers import network_layer
from kanseg.errors import UsageError
from kanseg.layers import ConvLayer
from kanseg.layers.families import FAMILIES
from kanseg.layers.geometry import ConvGeometry

# smp wants five maps of strides 2 to 32; encoders that are sized by their options get these.
SIZED = {"features_per_stage": (32, 64, 128, 256, 256), "strides": (2,) * 5}
PREFIX = "kanseg-"  # of our names there
POOLS = (nn.MaxPool2d, AveragePool)


class SMPEncoder(nn.Module):
    """One of our encoders as smp expects it: a map for each stride 1, 2, 4, ... 2^depth, the first the image itself.

    Where ours has no map of a stride, the finer one is pooled; before its first one, a convolution halves the image.

    Args:
        encoder: name in `ENCODERS`; `basis`: of its layers.
        depth: maps beside the image.
        output_stride: 32, or less for dilated stages (DeepLab).
    """

    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(self, *, encoder: str, basis: str | None, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        self.name, self.basis, self.depth, self._stride = encoder, basis, depth, 32
        self.set_in_channels(3)

    def set_in_channels(self, in_channels: int, pretrained: bool = False) -> None:
        """Make the encoder, with new weights, for so many image channels."""
        known = ENCODERS.parameters(self.name)
        sized: dict[str, Any] = {key: value[: self.depth] for key, value in SIZED.items() if key in known}
        self.body = create_encoder(self.name, 2, in_channels, basis=self.basis, **sized)
        reached = accumulate((stride[0] for stride in self.body.strides), lambda a, b: a * b)
        number = {stride: index for index, stride in enumerate(reached)}
        self.levels = [number.get(2**level) for level in range(self.depth + 1)]
        read = max((index for index in self.levels if index is not None), default=-1) + 1
        self.body.stages = self.body.stages[:read]  # no stage that nobody reads
        self.body.strides, self.body.out_channels = self.body.strides[:read], self.body.out_channels[:read]
        self.out_channels = [
            in_channels if self.levels[0] is None else self.body.out_channels[self.levels[0]]
        ]
        self.finest = nn.ModuleList()  # before our first map
        for level, index in enumerate(self.levels[1:], 1):
            if index is not None:
                self.out_channels.append(self.body.out_channels[index])
            elif any(known is not None for known in self.levels[:level]):
                self.out_channels.append(self.out_channels[-1])
            else:
                width = max(8, self.body.out_channels[0] // 2)
                layer = network_layer(None)(2, self.out_channels[-1], width, 3, stride=2)
                self.finest.append(layer)
                self.out_channels.append(width)

    @property
    def output_stride(self) -> int:
        """Stride of the coarsest map."""
        return min(self._stride, 2**self.depth)

    def make_dilated(self, output_stride: int) -> None:
        """Replace strides by dilation where the stride would exceed `output_stride`."""
        late = [(level, index) for level, index in enumerate(self.levels) if 2**level > output_stride]
        modules: dict[int | None, list[nn.Module]] = {
            index: list(self.body.stages[index].modules()) for _, index in late if index is not None
        }
        lacks = [2**level for level, index in late if index is None]
        pooled = any(isinstance(m, POOLS) for stage in modules.values() for m in stage)
        if pooled or lacks:
            why = f"has no map of stride {lacks[0]}" if lacks else "pools"
            raise UsageError(
                f"encoder kanseg-{self.name}-{self.basis or 'plain'} {why} where DeepLab and PAN want dilation to "
                f"stride {output_stride}; choose kanseg-reskanet18-{self.basis or 'plain'}, or another model."
            )
        for level, index in late:
            rate = 2**level // output_stride
            for module in modules.get(index, []):
                if isinstance(module, ConvLayer):
                    module.kept = None
                if isinstance(module, ConvGeometry):
                    module.stride, module.dilation = (1, 1), (rate, rate)
                    module.padding = tuple(rate * (k - 1) // 2 for k in module.kernel_size)
        self._stride = output_stride

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        features = [x if self.levels[0] is None else maps[self.levels[0]]]
        for level, index in enumerate(self.levels[1:], 1):
            if index is not None:
                features.append(maps[index])
            elif level <= len(self.finest):
                features.append(self.finest[level - 1](features[-1]))
            else:
                features.append(F.avg_pool2d(features[-1], 2, ceil_mode=True))
        return features


def register_smp() -> list[str]:
    """Make every encoder with every basis known to segmentation-models-pytorch; returns the names.

    They are "kanseg-ENCODER-BASIS", with a basis or family, or "plain". Weights: `encoder_weights=None`.
    """
    try:
        from segmentation_models_pytorch.encoders import encoders
    except ImportError as error:
        raise UsageError(
            "segmentation-models-pytorch is not installed: pip install segmentation-models-pytorch"
        ) from error
    names = []
    for encoder in ENCODERS:
        for basis in sorted({*BASES, *FAMILIES}):
            name = f"{PREFIX}{encoder}-{basis}"
            params: dict[str, Any] = {"encoder": encoder, "basis": None if basis == "plain" else basis}
            encoders[name] = {"encoder": SMPEncoder, "params": params, "pretrained_settings": {}}
            names.append(name)
    return names
