"""Weights of an encoder from one network to another: from a classifier into a segmenter, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kanseg.errors import UserError

# Where the encoder is in a checkpoint of ours (classifier or segmenter), a bare network, or a bare encoder.
PREFIXES = ("average.encoder.", "model.encoder.", "encoder.", "")


def load_encoder(target: nn.Module, source: nn.Module | Path | str) -> nn.Module:
    """Copy encoder weights into an encoder, or into the encoder of a network; returns `target`.

    Args:
        target: an encoder, a `Classifier`, a `UKANet`, ...
        source: the same, or a file: a checkpoint of ours, or weights of timm or smp for their encoders (.safetensors,
            or a state_dict that torch saved).

    Raises:
        UserError: the weights do not fit; the first keys that do not are named, and nothing is changed.
    """
    encoder = _encoder(target)
    weights = _encoder(source).state_dict() if isinstance(source, nn.Module) else read_weights(source)
    own = encoder.state_dict()
    stored = max((_below(weights, prefix) for prefix in PREFIXES), key=lambda part: len(part.keys() & own.keys()))
    missing = [key for key in own if key not in stored and not key.endswith("num_batches_tracked")]
    other = [key for key in own if key in stored and stored[key].shape != own[key].shape]
    if missing or other:
        name = type(source).__name__ if isinstance(source, nn.Module) else source
        first = [f"{key} {list(stored[key].shape)} instead of {list(own[key].shape)}" for key in other]
        raise UserError(
            f"The weights of {name} do not fit this {type(encoder).__name__}: missing {missing[:3] or 'none'}, of another "
            f"shape {first[:3] or 'none'}. Give both the same encoder, basis and options."
        )
    encoder.load_state_dict({key: stored.get(key, value) for key, value in own.items()})
    return target


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file, read without unpickling code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path} with weights. Give a .safetensors file or a state_dict of torch.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as weights ({error}).") from error
    except Exception as error:  # a pickle with code in it: torch has an error class of its own, by version
        raise UserError(f"{path} is no plain state_dict ({str(error).splitlines()[0]}).") from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(f"{path} holds no state_dict (names and tensors).")
    return dict(stored)


def _encoder(module: nn.Module) -> nn.Module:
    encoder = getattr(module, "encoder", module)
    return encoder if isinstance(encoder, nn.Module) else module


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
