"""Encoders of other libraries, in 2D: "timm/NAME" and "smp/NAME", speaking the contract of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders.encoder import LIBRARIES, LIBRARY_NAMES, Encoder
from kanseg.errors import ShapeError, UsageError, UserError, did_you_mean

# What lets timm's transformers take images of any size; the others do anyway, and know no such option.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
TIMM_THERE = "tu-"  # before timm's names in smp
ODD = (33, 17)  # a size that shows whether a network takes any
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)  # of a size
OF_OPTIONS = (*REFUSALS, AttributeError)  # that a network does not know, or cannot take together


class ForeignEncoder(Encoder):
    """A 2D encoder of another library, (N, in_channels, H, W) -> maps from fine to coarse.

    Attributes:
        body: the other library's network; its own names for its weights are below.
        multiple: the image is filled up with zeros at its far ends to a multiple of it where the network does not take
            any size; what the maps show of that is cut off.
        only: the one size that the network takes, None where there is none such.
    """

    def __init__(
        self,
        in_channels: int,
        body: nn.Module,
        kept: Sequence[int],
        out_channels: Sequence[int],
        reductions: Sequence[int],
        channels_last: bool = False,
        usual: int | None = None,
    ) -> None:
        strides = [now // before for before, now in zip((1, *reductions), reductions, strict=False)]
        super().__init__(2, in_channels, out_channels, strides)
        # In channels-last memory, as our layers work: no map is turned around, depthwise convolutions are faster.
        self.body = body
        for weight in body.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.kept, self.channels_last = tuple(kept), channels_last
        self.reductions = tuple(reductions)
        self.multiple, self.only = 1, None
        if not self._takes(ODD):
            multiples = [reductions[-1], *([usual] if usual else [])]  # the latter for windows of attention
            fitting = next((m for m in multiples if self._takes((2 * m, m))), None)
            self.multiple = fitting or reductions[-1]
            self.only = None if fitting or usual is None else (usual, usual)
            if self.only and self._takes(self.only):
                self.multiple = 1

    @torch.no_grad()
    def _takes(self, size: tuple[int, int]) -> bool:
        """Whether the network takes an image of that size, to maps of the sizes that `Encoder` promises."""
        weight, training = next(self.body.parameters()), self.body.training
        self.body.eval()
        try:
            maps = self.body(torch.zeros(1, self.in_channels, *size, device=weight.device))
        except REFUSALS:
            return False
        finally:
            self.body.train(training)
        found = [maps[i].shape[1:3] if self.channels_last else maps[i].shape[2:] for i in self.kept]
        return found == [tuple(-(-n // step) for n in size) for step in self.reductions]

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.only and tuple(x.shape[2:]) != self.only:
            raise ShapeError(
                f"this encoder takes images of {' x '.join(map(str, self.only))} alone, got "
                f"{' x '.join(map(str, x.shape[2:]))}: plan patches of that size, or choose another encoder"
            )
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = (-size % self.multiple for size in x.shape[2:])
        maps = self.body(F.pad(x, (0, width, 0, height)) if height or width else x)
        maps = [maps[index] for index in self.kept]
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if not (height or width):
            return maps
        sizes = ([-(-size // step) for size in x.shape[2:]] for step in self.reductions)
        return [m[:, :, :rows, :columns] for m, (rows, columns) in zip(maps, sizes, strict=True)]


@LIBRARIES.register("timm")
def timm_encoder(
    name: str, spatial_dims: int, in_channels: int, *, pretrained: bool = False, **options: Any
) -> Encoder:
    """An encoder of timm by its name there.

    Args:
        pretrained: let timm download its weights.
        options: those of our layers are left aside.
    """
    import timm

    _two_dimensions(f"timm/{name}", spatial_dims)
    check_timm_encoder(name)
    options = {"features_only": True, "in_chans": in_channels, "pretrained": pretrained}
    body, failure = None, ""
    for any_size in ANY_SIZE:
        try:
            with fetching(f"timm/{name}", pretrained):
                body = timm.create_model(name, **options, **any_size)
            break
        except TypeError:
            continue  # not an option of this network
        except (RuntimeError, AttributeError, AssertionError) as error:
            failure = str(error)
    if body is None:
        raise UsageError(f"timm/{name} gives no feature maps of several resolutions: {failure}")
    info: Any = body.feature_info
    last = _last_of_each(info.reduction())
    channels, reductions = ([values[i] for i in last] for values in (info.channels(), info.reduction()))
    formats = str(getattr(body, "output_fmt", "NCHW"))
    usual = max(timm.get_pretrained_cfg_value(name, "input_size") or [0]) or None
    return ForeignEncoder(in_channels, body, last, channels, reductions, "NHWC" in formats, usual)


@LIBRARIES.register("smp")
def smp_encoder(
    name: str,
    spatial_dims: int,
    in_channels: int,
    *,
    pretrained: bool = False,
    depth: int = 5,
    **options: Any,
) -> Encoder:
    """An encoder of segmentation-models-pytorch by its name there.

    Args:
        pretrained: let smp download its weights (ImageNet).
        depth: maps; the last has stride 2^depth.
        options: those of our layers are left aside.
    """
    from segmentation_models_pytorch.encoders import get_encoder

    _two_dimensions(f"smp/{name}", spatial_dims)
    check_smp_encoder(name)
    weights = "imagenet" if pretrained else None
    with fetching(f"smp/{name}", pretrained):
        body = get_encoder(name, in_channels=in_channels, depth=depth, weights=weights)
    # The first map is mostly the image itself, and some encoders have empty ones in between.
    with torch.no_grad():
        probe = torch.zeros(1, in_channels, 64, 64)
        maps = body.eval()(probe)
    body.train()
    kept = [i for i, m in enumerate(maps) if m.shape[1] and m is not probe]
    reductions = [64 // maps[i].shape[-1] for i in kept]
    return ForeignEncoder(in_channels, body, kept, [maps[i].shape[1] for i in kept], reductions)


@LIBRARY_NAMES.register("timm")
def check_timm_encoder(name: str) -> None:
    """Raise `UsageError` with the nearest name where timm has no such network, or no such weights of it."""
    import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain) or (  # also by a former name
        tag and name not in timm.list_models(f"{plain}.*", pretrained=True)
    ):
        raise UsageError(
            f"timm has no encoder '{name}'.{did_you_mean(name, _near(plain, timm.list_models()))}"
        )


@LIBRARY_NAMES.register("smp")
def check_smp_encoder(name: str | None) -> None:
    """Raise `UsageError` with the nearest name where smp has no such encoder; None is the default."""
    from segmentation_models_pytorch.encoders import encoders

    from kanseg.encoders.smp_bridge import PREFIX, register_smp

    if name is not None and name.startswith(PREFIX):
        register_smp()
    if name is not None and name.startswith(TIMM_THERE):
        check_timm_encoder(name.removeprefix(TIMM_THERE))
    elif name is not None and name not in encoders:
        raise UsageError(f"smp has no encoder '{name}'.{did_you_mean(name, _near(name, encoders))}")


@contextmanager
def fetching(name: str, pretrained: bool) -> Iterator[None]:
    """Say what to do where weights that are to be downloaded cannot be had."""
    try:
        yield
    except Exception as error:  # of the hub, of what it is reached by, of the library where it has none
        if not pretrained or (isinstance(error, OF_OPTIONS) and not isinstance(error, OSError)):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"The weights of {name} could not be downloaded ({type(error).__name__}: {said}). Give a file with them "
            "(model.options.encoder_weights=FILE), or start without."
        ) from error


def _two_dimensions(name: str, spatial_dims: int) -> None:
    if spatial_dims != 2:
        raise UsageError(
            f"encoder '{name}' is 2D only, but spatial_dims={spatial_dims}. Choose one of `kanseg models`, e.g. "
            "reskanet18, or 2D data."
        )


def _near(name: str, names: Any) -> list[str]:
    """The few nearest of very many names."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=5, cutoff=0.3) or sorted(names)[:5]


def _last_of_each(reductions: Sequence[int]) -> list[int]:
    """Index of the last map at each resolution."""
    return [i for i, r in enumerate(reductions) if i + 1 == len(reductions) or reductions[i + 1] != r]
