"""Networks of MONAI and of segmentation-models-pytorch under our contract: to compare with, and to go on from."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.encoders.encoder import DOWNLOAD
from kanseg.encoders.pretrained import check_smp_encoder, fetching
from kanseg.encoders.transfer import load_encoder
from kanseg.errors import UsageError, UserError, did_you_mean, refused_options
from kanseg.layers.geometry import per_axis
from kanseg.models.model import MODELS
from kanseg.models.u_shape import at_least_float32, check_input

DIVISIBLE = 32  # what five halvings ask of a size


class AnySize(nn.Module):
    """A network that only takes sizes divisible by some number: inputs are padded at their far ends, outputs cut.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32; in training a list of logits where the
    network has several outputs.
    """

    def __init__(self, network: nn.Module, in_channels: int, divisible: Sequence[int]) -> None:
        super().__init__()
        self.network, self.divisible = network, tuple(divisible)
        self.spatial_dims, self.in_channels = len(self.divisible), in_channels

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(self, x)
        size = x.shape[2:]
        axes = zip(size[::-1], self.divisible[::-1], strict=True)
        padding = [n for length, unit in axes for n in (0, -length % unit)]
        output = self.network(F.pad(x, padding) if any(padding) else x)
        maps = output.unbind(1) if isinstance(output, Tensor) and output.dim() > x.dim() else output
        if isinstance(maps, Tensor):
            return _cut(maps, size)
        return [_cut(one, size) for one in maps] if self.training else _cut(maps[0], size)

    def check_patch(self, patch_size: Sequence[int], batch_size: int) -> None:
        """Raise `UsageError` where a training step on such patches would fail in the library's words.

        The forward is tried by shapes alone. Only where that fails it is computed, for some networks need numbers.
        """
        if self._refused(patch_size, batch_size, "meta") is None:
            return
        said = self._refused(patch_size, min(batch_size, 2), "cpu")
        if said is None:
            return
        larger = ([size * times for size in patch_size] for times in (2, 4, 8))
        fitting = next((size for size in larger if self._refused(size, batch_size, "meta") is None), None)
        way = f"It takes {fitting}: set patch_size" if fitting else "Set another patch_size"
        raise UsageError(
            f"{type(self.network).__name__} fails on the planned patch {list(patch_size)} ({said}). {way} in "
            "plan.json, change model.options.arguments (fewer levels, say), or choose another model."
        )

    def _refused(self, patch_size: Sequence[int], batch_size: int, device: str) -> str | None:
        """What a forward of a copy in training mode says that fails."""
        # The weights are not copied first: a copy finds there what takes their place.
        memory: dict[int, Any] = {}
        for tensor in (*self.parameters(), *self.buffers()):
            other = tensor.detach().to(device, copy=True)
            memory[id(tensor)] = nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other
        x = torch.zeros(batch_size, self.in_channels, *patch_size, device=device)
        try:
            with torch.random.fork_rng([]), torch.no_grad():
                copy.deepcopy(self, memory).train()(x)
        except Exception as error:  # whatever another library raises
            return " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return None


@MODELS.register("monai")
class MonaiNetwork(AnySize):
    """A network of MONAI by its class name (SegResNet, DynUNet, UNet, SwinUNETR, ...), any input size.

    forward: (N, in_channels, *S) -> logits (N, out_channels, *S), float32.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        network: class in `monai.networks.nets`.
        arguments: further ones of its constructor.
        divisible: what a size must be divisible by, one number or one an axis; default the product of the `strides`
            among the arguments, else 32.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: str = "SegResNet",
        arguments: dict[str, Any] | None = None,
        divisible: int | Sequence[int] | None = None,
    ) -> None:
        from monai.networks import nets

        known = [name for name in dir(nets) if isinstance(getattr(nets, name), type)]
        if network not in known:
            raise UsageError(f"MONAI has no network '{network}'.{did_you_mean(network, known)}")
        given = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels}
        with refused_options(f"MONAI's {network}"), _packages_of(network):
            made = getattr(nets, network)(**given, **(arguments or {}))
            _require_packages(made)
        if divisible is None:
            strides = (arguments or {}).get("strides", [DIVISIBLE])
            steps = [per_axis(step, spatial_dims, "strides") for step in strides]
            divisible = [math.prod(axis) for axis in zip(*steps, strict=True)]
        super().__init__(made, in_channels, per_axis(divisible, spatial_dims, "divisible"))


@MODELS.register("smp")
class SmpNetwork(AnySize):
    """A network of segmentation-models-pytorch by its name (Unet, UnetPlusPlus, FPN, DeepLabV3Plus, ...), in 2D.

    forward: (N, in_channels, H, W) -> logits (N, out_channels, H, W), float32.

    Args:
        spatial_dims: 2.
        in_channels: image channels.
        out_channels: classes, background included.
        network: architecture.
        encoder: name of the encoder there; after `kanseg.encoders.register_smp()` also ours.
        pretrained: let smp download the encoder's weights (ImageNet).
        encoder_weights: file whose encoder weights to start from (see `kanseg.encoders.load_encoder`); "download" is
            `pretrained`.
        arguments: further ones of the architecture.
    """

    check_encoder = staticmethod(check_smp_encoder)  # its names are not those of our encoders

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: str = "Unet",
        encoder: str = "resnet34",
        pretrained: bool = False,
        encoder_weights: str | Path | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        import segmentation_models_pytorch as smp

        known = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
        if network not in known:
            raise UsageError(f"smp has no network '{network}'.{did_you_mean(network, known)}")
        if spatial_dims != 2:
            raise UsageError(
                f"smp's {network} is 2D only, but spatial_dims={spatial_dims}. Choose another network or 2D data."
            )
        check_smp_encoder(encoder)
        if encoder_weights == DOWNLOAD:
            pretrained, encoder_weights = True, None
        if pretrained and encoder_weights is not None:
            raise UsageError(
                f"pretrained=True downloads the encoder's weights, and encoder_weights={encoder_weights} gives others. "
                "Choose one."
            )
        given = {"in_channels": in_channels, "classes": out_channels, **(arguments or {})}
        with refused_options(f"smp's {network}"), fetching(f"smp/{encoder}", pretrained):
            made = known[network](encoder, encoder_weights="imagenet" if pretrained else None, **given)
        super().__init__(made, in_channels, (DIVISIBLE, DIVISIBLE))
        if encoder_weights is not None:
            load_encoder(self, encoder_weights)


@contextmanager
def _packages_of(network: str) -> Iterator[None]:
    """Say which package is not installed that MONAI has only some of its networks ask for."""
    from monai.utils import OptionalImportError

    try:
        yield
    except OptionalImportError as error:
        said = str(error).partition("\n")[0]
        missing = re.match(r"(?:from|import) (\w+)", said)  # "from einops import rearrange (No module ..."
        needed = f"{missing[1]}: pip install {missing[1]}" if missing else f"another package: {said}"
        raise UserError(f"MONAI's {network} needs {needed}") from error


def _require_packages(network: nn.Module) -> None:
    """Raise the error that a forward of the network would: it names functions of a package that is not there."""
    from monai.utils import OptionalImportError

    for kind in {type(part) for part in network.modules()}:
        for called, method in inspect.getmembers(kind, inspect.isfunction):
            for name in method.__code__.co_names if called != "__init__" else ():
                error = getattr(method.__globals__.get(name), "_exception", None)
                if isinstance(error, OptionalImportError):
                    raise error


def _cut(x: Tensor, size: Sequence[int]) -> Tensor:
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, 0, length)
    return at_least_float32(x)
