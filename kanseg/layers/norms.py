"""Norms and activations by MONAI's names, and which of them the kernels compute in one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from kanseg.errors import UsageError
from kanseg.layers.convolution import lean
from kanseg.layers.geometry import check_dims
from kanseg.layers.kernels import gpu
from kanseg.layers.kernels.operators import plain_eager
from kanseg.layers.kernels.recipe import watched
from kanseg.layers.kernels.rows import of_one_sample, with_contiguous_gradient

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
ActSpec = str | tuple[str, dict[str, Any]] | nn.Module | None


def activation(act: ActSpec) -> nn.Module:
    """An activation by MONAI's name ("silu" is "swish" there), identity for None; one that is given is taken."""
    if act is None:
        return nn.Identity()
    from monai.networks.layers.utils import get_act_layer

    try:
        made = act if isinstance(act, nn.Module) else nn.SiLU() if act == "silu" else get_act_layer(act)
    except (ValueError, TypeError) as error:
        raise UsageError(f"act={act!r} cannot be made: {' '.join(str(error).split())}") from error
    for part in made.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]  # others read its input too
    return made


def norm_layer(norm: str | Sequence, spatial_dims: int, channels: int) -> nn.Module:
    """A norm of MONAI's by its spec; `UsageError` with the nearest name for one that is not known."""
    from monai.networks.layers.utils import get_norm_layer

    check_dims(spatial_dims)
    try:
        return get_norm_layer(norm if isinstance(norm, str) else tuple(norm), spatial_dims, channels)
    except (ValueError, TypeError) as error:
        raise UsageError(f"norm={norm!r} cannot be made: {' '.join(str(error).split())}") from error


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), also where torch refuses an instance norm: a map of one voxel, which becomes its bias, or of none."""
    if isinstance(norm, _InstanceNorm) and not x.numel():
        return x + sum(p.sum() for p in norm.parameters())  # nothing, with a gradient for each
    stored = getattr(norm, "track_running_stats", False) and not norm.training  # statistics, which serve
    if isinstance(norm, _InstanceNorm) and math.prod(x.shape[2:]) == 1 and not stored:
        return torch.instance_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps, False)
    if not isinstance(norm, _NormBase):
        return norm(x)
    if torch.is_grad_enabled() and of_one_sample(x) and (watched(norm) or x.stride(0) != x.numel()):
        x = x.contiguous()  # torch 2.14's norms misread, too, the strides that its hooks on modules leave
    return with_contiguous_gradient(norm(x))


def fused_norm_serves(norm: nn.Module, x: Tensor) -> bool:
    """Whether `instance_norm_act` computes this norm."""
    if not isinstance(norm, _InstanceNorm) or norm.track_running_stats or not 3 <= x.dim() <= 5:
        return False
    if watched(norm):
        return False
    return (x.dtype.itemsize >= 4 or x.device.type == "cuda" or gpu.serves(x)) and lean(x)


def fused_batch_norm_serves(norm: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm_act` computes this norm: in training on a CPU, where a channel has two values or more."""
    if type(norm) not in BATCH_NORMS or not norm.training or watched(norm):
        return False
    known = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu" and 3 <= x.dim() <= 5
    alike = all(t.dtype == x.dtype for t in (norm.weight, norm.running_mean) if t is not None)
    return known and alike and x.numel() > x.shape[1] and plain_eager(x) and lean(x)


def is_affine(norm: nn.Module) -> bool:
    """Whether it is a batch norm that only multiplies and adds now, numbers known before."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
