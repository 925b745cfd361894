"""Weights of an encoder from one network to another: from a classifier into a segmenter, or from a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kanseg.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
# Where the encoder is in a checkpoint of ours (classifier or segmenter), a bare network, or a bare encoder.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "network_weights",
    "network",
)  # around a state_dict in a file
STATISTICS = (".running.mean", ".running.var")  # as `_plain` spells them
PREFIXES = tuple(
    f"{where}{network}encoder." for where in ("average.", "model.", "") for network in ("", "network.")
)


def load_encoder(target: Network, source: nn.Module | Path | str) -> Network:
    """Copy encoder weights into an encoder, or into the encoder of a network; returns `target`.

    Args:
        target: an encoder, a `Classifier`, a `UKANet`, ...
        source: the same, or a file (.safetensors, or a state_dict that torch saved): a checkpoint of ours, the folder
            of a saved model, or weights of timm or smp for their encoders.

    A target of another norm than batch norm, on weights with the statistics of batch norms, is warned about: it takes
    the weights, but is not the function that was trained.

    Raises:
        UserError: the weights do not fit; the first keys that do not are named, and nothing is changed.
    """
    encoder = _encoder(target)
    weights = _encoder(source).state_dict() if isinstance(source, nn.Module) else read_weights(source)
    own = encoder.state_dict()
    places = {_plain(key): key for key in own}
    stored = max(
        (_below(weights, prefix) for prefix in (*PREFIXES, "")),
        key=lambda part: len(part.keys() & places.keys()),
    )
    found = {key: _fitted(stored[name], own[key]) for name, key in places.items() if name in stored}
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    other = [key for key, value in found.items() if value.shape != own[key].shape]
    if missing or other:
        name = type(source).__name__ if isinstance(source, nn.Module) else source
        first = [f"{key} {list(found[key].shape)} instead of {list(own[key].shape)}" for key in other]
        raise UserError(
            f"The weights of {name} do not fit this {type(encoder).__name__}: missing {missing[:3] or 'none'}, of "
            f"another shape {first[:3] or 'none'}. Give both the same encoder, basis and options."
        )
    kept = {name: name.rpartition(".running")[0] for name in stored if name.endswith(STATISTICS)}
    if any(name not in places and f"{norm}.weight" in places for name, norm in kept.items()):
        warnings.warn(
            f"the weights come with the running statistics of batch norms, for which this {type(encoder).__name__} has "
            "no place: it starts from their weights, but computes something else. Make it with norm='batch' "
            "(model.options.norm=batch) to keep what they compute.",
            stacklevel=2,
        )
    encoder.load_state_dict({**own, **found})
    return target


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file, read without unpickling code."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"There is no file {path} with weights. Give a .safetensors file or a state_dict of torch."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as weights ({error}).") from error
    except Exception as error:  # a pickle with code in it: torch has an error class of its own, by version
        raise UserError(f"{path} is no plain state_dict ({str(error).splitlines()[0]}).") from error
    for key in WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(f"{path} holds no state_dict (names and tensors).")
    return dict(stored)


def _encoder(module: nn.Module) -> nn.Module:
    """The part that is an encoder: also of a network of another library under our contract."""
    for inside in (module, getattr(module, "network", None)):
        encoder = getattr(inside, "encoder", None)
        if isinstance(encoder, nn.Module):
            return encoder
    return module


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {_plain(key[len(prefix) :]): value for key, value in weights.items() if key.startswith(prefix)}


def _plain(key: str) -> str:
    """A name as all spell it.

    timm joins the parts of its feature extractors by underscores or keeps all in `model`, ours keep theirs in `body`.
    """
    return key.removeprefix("body.").removeprefix("model.").replace("_", ".")


def _fitted(weight: Tensor, own: Tensor) -> Tensor:
    """A first convolution for colour images on another number of channels, as timm and smp do it.

    One channel takes the sum of the three; more take them in turn, scaled to the same sum.
    """
    channels = own.shape[1] if own.dim() == 4 else 3
    if weight.dim() != 4 or weight.shape[1] != 3 or channels == 3 or weight.shape[0] != own.shape[0]:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [number % 3 for number in range(channels)]] * (3 / channels)
