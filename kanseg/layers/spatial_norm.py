"""Group norm whose scale and shift are maps made of a second image (or of the image itself)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError
from kanseg.layers.pointwise import pointwise_conv


class SpatialNorm(nn.Module):
    """y = norm(x) * a(z) + b(z) with 1x1 convolutions a and b, (N, C, *S) -> (N, C, *S).

    z is brought to the size of x by the nearest voxel. Source: Zheng et al., arXiv 2209.09002, section 3.2.

    Args:
        channels: C.
        condition_channels: channels of z; None for z = x.
        num_groups: of the group norm; divides C.
        affine: the group norm has a weight and a bias of its own.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        condition_channels: int | None = None,
        num_groups: int = 16,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if num_groups < 1 or channels % num_groups:
            raise UsageError(f"channels (={channels}) must be divisible by num_groups (={num_groups})")
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6, affine=affine)
        self.scale = pointwise_conv(spatial_dims, condition_channels or channels, channels)
        self.shift = pointwise_conv(spatial_dims, condition_channels or channels, channels)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        z = x if z is None else z
        z = z if z.shape[2:] == x.shape[2:] else F.interpolate(z, x.shape[2:], mode="nearest")
        return self.norm(x) * self.scale(z) + self.shift(z)
