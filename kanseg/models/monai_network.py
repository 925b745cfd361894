"""Networks of MONAI under kanseg's contract: for comparison, and to go on from the weights of MONAI bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError, did_you_mean, refused_options
from kanseg.models.model import MODELS

DIVISIBLE = 32  # what five halvings ask of a size


@MODELS.register("monai")
class MonaiNetwork(nn.Module):
    """A network of MONAI by its class name (SegResNet, DynUNet, UNet, SwinUNETR, ...), any input size.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        network: class in `monai.networks.nets`.
        arguments: further ones of its constructor.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: str = "SegResNet",
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        known = [name for name in dir(nets) if isinstance(getattr(nets, name), type)]
        if network not in known:
            raise UsageError(f"MONAI has no network '{network}'.{did_you_mean(network, known)}")
        given = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
        with refused_options(f"MONAI's {network}"):
            self.network = getattr(nets, network)(**given, **(arguments or {}))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        padding = [n for axis in reversed(size) for n in (0, -axis % DIVISIBLE)]
        output = self.network(F.pad(x, padding) if any(padding) else x)
        maps = output.unbind(1) if isinstance(output, Tensor) and output.dim() > x.dim() else output
        if isinstance(maps, Tensor):
            return _cut(maps, size).float()
        return [_cut(one, size).float() for one in maps] if self.training else _cut(maps[0], size).float()


def _cut(x: Tensor, size: Sequence[int]) -> Tensor:
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, 0, length)
    return x
