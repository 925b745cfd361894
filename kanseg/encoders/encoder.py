"""The contract of an encoder: all that a decoder needs to know is `out_channels` and `strides`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kanseg.encoders.transfer import load_encoder
from kanseg.errors import OptionError, UsageError, did_you_mean, unknown_option
from kanseg.layers.geometry import check_dims, per_axis
from kanseg.registry import Registry

ENCODERS = Registry("encoder")
# Libraries whose encoders are taken by LIBRARY/NAME, filled by `kanseg.encoders.pretrained`.
LIBRARIES = Registry("encoder library")
# What raises `UsageError` for a name that such a library does not have.
LIBRARY_NAMES = Registry("encoder library")
# What the constructors of a library's encoders take beside options of their own.
NOT_OWN = ("name", "spatial_dims", "in_channels", "pretrained", "options")
DOWNLOAD = "download"
SHAPE = ("features_per_stage", "blocks_per_stage", "strides", "kernel_sizes")


class Encoder(nn.Module):
    """forward: (N, in_channels, *S) -> one feature map a stage, from fine to coarse.

    Attributes:
        out_channels: channels of each map.
        strides: stride of each stage against the one before it, one number an axis; the first may be 1.
        stages: the modules that give the maps, one from the other.
    """

    out_channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    stages: nn.ModuleList

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
    ) -> None:
        super().__init__()
        check_dims(spatial_dims)
        if min(in_channels, *out_channels) < 1:
            raise UsageError(
                f"channels must be positive, got in_channels={in_channels} and {tuple(out_channels)} in the stages"
            )
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.out_channels = tuple(out_channels)
        self.strides = tuple(per_axis(stride, spatial_dims, "strides") for stride in strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def create_encoder(
    name: str | Encoder,
    spatial_dims: int,
    in_channels: int,
    *,
    weights: str | Path | None = None,
    own: Mapping[str, Any] | None = None,
    **options: Any,
) -> Encoder:
    """An encoder by its name in `ENCODERS`, or in 2D by "timm/NAME" or "smp/NAME"; a ready one is checked.

    Args:
        weights: file to start from, see `kanseg.encoders.load_encoder`; "download" lets timm or smp fetch theirs.
        own: options meant for this very encoder, each of which it must know.
        options: of the encoder and its layers. Where the encoder brings its own shape, those of `SHAPE` are left aside;
            encoders of other libraries have no layers of ours, and leave the layers' options aside too.

    Raises:
        UsageError: unknown name or option (the nearest is named), or values that do not fit together.
    """
    own = own or {}
    if isinstance(name, str) and "/" in name:
        library, _, theirs = name.partition("/")
        known = [key for key in LIBRARIES.parameters(library) if key not in NOT_OWN]
        for option in own:
            if option not in known:
                raise unknown_option(f"Encoder '{name}'", option, known)
        options |= {**own, "pretrained": weights == DOWNLOAD}
        encoder = LIBRARIES.get(library)(theirs, spatial_dims, in_channels, **options)
        return encoder if weights in (None, DOWNLOAD) else load_encoder(encoder, weights)
    if weights == DOWNLOAD:
        raise UsageError(
            f"There are no weights of encoder '{name if isinstance(name, str) else type(name).__name__}' to download. "
            "Give a file, or a timm or smp encoder."
        )
    if isinstance(name, Encoder):
        encoder = name
        _check_ready(encoder, spatial_dims, in_channels, own)
    else:
        encoder = _made(name, spatial_dims, in_channels, own, options)
    return encoder if weights is None else load_encoder(encoder, weights)


def _made(
    name: str, spatial_dims: int, in_channels: int, own: Mapping[str, Any], options: Mapping[str, Any]
) -> Encoder:
    """One of our encoders."""
    known = ENCODERS.parameters(name)
    kept = {
        key: value
        for key, value in options.items()
        if key not in SHAPE or (key in known and value is not None)
    }
    try:
        return ENCODERS.create(name, spatial_dims, in_channels, **{**kept, **own})
    except OptionError as error:
        theirs = [
            option
            for option in known
            if option not in ("spatial_dims", "in_channels", "layer_options", "options")
        ]
        owner = f"encoder '{name}' with its layers and their basis"
        raise unknown_option(owner, error.option, [*error.known, *theirs]) from error


def check_encoder_name(name: Any, spatial_dims: int | None = None) -> None:
    """Raise `UsageError` where there is no encoder of that name, or not in that many dimensions."""
    if not isinstance(name, str):
        return
    library, slash, theirs = name.partition("/")
    if not slash:
        ENCODERS.get(name)
    else:
        LIBRARY_NAMES.get(library)(theirs)
        if spatial_dims not in (None, 2):
            raise UsageError(
                f"encoder '{name}' is 2D only, but spatial_dims={spatial_dims}. Choose one of ours:"
                f"{did_you_mean('', ENCODERS).removeprefix(' Known:')}"
            )


def _check_ready(encoder: Encoder, spatial_dims: int, in_channels: int, own: Mapping[str, Any]) -> None:
    if own:
        raise UsageError(
            f"The encoder is made already, and encoder_options {sorted(own)} come too late. Make it with them, or give "
            "its name."
        )
    if (encoder.spatial_dims, encoder.in_channels) != (spatial_dims, in_channels):
        raise UsageError(
            f"The encoder has spatial_dims={encoder.spatial_dims} and in_channels={encoder.in_channels}, the network "
            f"spatial_dims={spatial_dims} and in_channels={in_channels}. Give both the same."
        )
