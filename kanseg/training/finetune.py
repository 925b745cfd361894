"""Starting from weights that exist: of a kanseg run or model, of a state_dict, or of a MONAI bundle.

Channels and classes may differ: a class or channel of the same name keeps its weights, a further channel gets the mean
of the known ones, a further class starts afresh. Bases may differ as well (more degrees, a finer grid): the learned
functions of the basis branch are kept as far as the new ones can (`kanseg.study.refit`), not what else another family
changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.encoders.transfer import read_weights
from kanseg.errors import UserError
from kanseg.models import list_models
from kanseg.study.peft import PLACE
from kanseg.study.refit import refit
from kanseg.study.visualize import kan_layers
from kanseg.training.checkpoint import (
    BEST,
    EXPORTED,
    LAST,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    part,
    restored,
    shipped,
)

BUNDLE_WEIGHTS = ("models/model.safetensors", "models/model.pt")
BUNDLE_CONFIGS = ("configs/inference.json", "configs/train.json", "configs/evaluate.json")


@dataclass
class Start:
    """Weights to start from.

    Attributes:
        model: {"name", "options"} of the network that they belong to, None where the file does not say it.
        classes, channels: their names, where known; else as many as the weights' network has, unnamed.
        build: makes that network with its weights, where it is one of ours.
        spatial_dims: of it, where known.
    """

    source: Path
    weights: dict[str, Tensor]
    model: dict[str, Any] | None = None
    classes: Sequence[str] = field(default_factory=list)
    channels: Sequence[str] = field(default_factory=list)
    build: Callable[[], nn.Module] | None = None
    spatial_dims: int | None = None


def read_start(path: Path | str) -> Start:
    """Read weights; code in files is never run.

    Raises:
        UserError: nothing there that is known, or a file that needs more than tensors to be loaded.
    """
    path = Path(path)
    if (path / "configs" / "metadata.json").is_file():
        return _read_bundle(path)
    if path.is_dir() or path.name in (EXPORTED, BEST, LAST) or (str(path) in shipped() and not path.exists()):
        return _read_checkpoint(find_checkpoint(path))
    if not path.is_file():
        raise UserError(
            f"There are no weights {path}. Give a run, a saved model, a file of weights or a MONAI bundle."
        )
    if path.suffix == ".safetensors" and is_checkpoint(path):
        return _read_checkpoint(path)
    return Start(path, _without("module.", read_weights(path)))


def _read_checkpoint(path: Path) -> Start:
    tensors, info = load_checkpoint(path)
    spec, plan = info.get("model", {}), info.get("plan", {})
    segments = spec.get("name") in list_models()  # else it is a classifier, whose encoder alone may fit
    model = {"name": spec["name"], "options": spec.get("options", {})} if segments else None
    classes = list(info.get("labels", [])) or [""] * spec.get("out_channels", 0)
    channels = plan.get("channel_names") or [""] * spec.get("in_channels", 0)
    whole = {"spatial_dims", "in_channels", "out_channels", "options"} <= spec.keys()
    build = partial(restored, tensors, info, path) if whole else None
    weights = part(tensors, "average") or part(tensors, "model")
    if build and any(PLACE in name for name in weights):
        weights = build().state_dict()
    return Start(path, weights, model, classes, channels, build, spec.get("spatial_dims"))


def _read_bundle(folder: Path) -> Start:
    """Weights of a bundle and MONAI's network as its config describes it, if it does so without code."""
    file = next((folder / name for name in BUNDLE_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"The bundle {folder} has no {' or '.join(BUNDLE_WEIGHTS)}. Download its weights first."
        )
    weights = {f"network.{name}": value for name, value in _without("module.", read_weights(file)).items()}
    definition = _network_definition(folder)
    target = str(definition.pop("_target_")).rpartition(".")[2]
    sizes = {name: definition.pop(name, None) for name in ("spatial_dims", "in_channels", "out_channels")}
    model = {"name": "monai", "options": {"network": target, "arguments": definition}}
    classes, channels = ([""] * int(sizes[name] or 0) for name in ("out_channels", "in_channels"))
    return Start(folder, weights, model, classes, channels)


def _without(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _network_definition(folder: Path) -> dict[str, Any]:
    for name in BUNDLE_CONFIGS:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("network_def")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, dict) and "_target_" in found and not _has_code(found):
            return found
    raise UserError(
        f"No config of the bundle {folder} describes network_def by plain values. Convert its weights to a file and "
        "give model.name=monai with model.options.network and model.options.arguments."
    )


def _has_code(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_has_code(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def transfer(
    model: nn.Module, start: Start, classes: Sequence[str], channels: Sequence[str]
) -> tuple[str, list[str]]:
    """Put the weights that fit into a model; said is which did, and given are the names of those that begin afresh,
    wholly or in part.

    Args:
        classes, channels: the new names, background first.

    Raises:
        UserError: not one weight fits.
    """
    own = model.state_dict()
    taken, adapted, fresh = [], [], []
    for name, value in own.items():
        given = start.weights.get(name)
        if given is not None and given.shape == value.shape and not _renamed(name, given, start, classes):
            taken.append(name)
            own[name] = given
        elif given is not None and (fitted := _fitted(given, value, start, classes, channels)) is not None:
            adapted.append(name)
            own[name] = fitted
        else:
            fresh.append(name)
    if not taken:
        raise UserError(
            f"No weight of {start.source} fits the model: it has {', '.join(list(start.weights)[:3])}, the model "
            f"{', '.join(list(own)[:3])}. Choose the network that they belong to (model.name, model.options)."
        )
    model.load_state_dict(own)
    refitted = _refitted(model, start)
    model.load_state_dict(refitted, strict=False)
    bases = tuple(name.removesuffix("_weight") for name in refitted)
    taken, fresh = ([name for name in names if not name.startswith(bases)] for names in (taken, fresh))
    parts = {"taken": taken, "adapted": adapted, "moved to other bases": list(refitted), "new": fresh}
    shown = (f"{len(names)} {what}{_shown(names, what)}" for what, names in parts.items() if names)
    return f"Weights of {start.source}: {', '.join(shown)}.", [*adapted, *fresh]


def _refitted(model: nn.Module, start: Start) -> dict[str, Tensor]:
    """Weights of KAN layers whose bases are others than those of the network that was started from."""
    if start.build is None or not kan_layers(model):
        return {}
    try:
        return refit(start.build(), model)
    except UserError:  # of another version, say: what fits by name has been taken
        return {}


def _shown(names: list[str], what: str) -> str:
    return "" if what == "taken" else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _renamed(name: str, given: Tensor, start: Start, classes: Sequence[str]) -> bool:
    """Whether a tensor of the head has a row for each of as many classes of other names, or in another order."""
    names = [*start.classes, *classes]
    known = all(names) and not any(re.fullmatch(r"label \d+", name) for name in names)
    head = "head" in name and given.dim() > 0 and len(given) == len(classes) == len(start.classes)
    return head and known and list(start.classes) != list(classes)


def _fitted(
    given: Tensor, own: Tensor, start: Start, classes: Sequence[str], channels: Sequence[str]
) -> Tensor | None:
    """A tensor that differs in its classes (first axis) or its image channels (second, else first axis), or None."""
    if given.dim() != own.dim() or not own.is_floating_point():
        return None
    differing = [axis for axis in range(own.dim()) if given.shape[axis] != own.shape[axis]]
    if differing in ([], [0]) and (len(given), len(own)) == (len(start.classes), len(classes)):
        return _by_name(given, own, start.classes, classes, own)
    old, new = len(start.channels), len(channels)
    if len(differing) != 1 or not old or given.shape[differing[0]] % old:
        return None
    (axis,) = differing
    each = given.shape[axis] // old  # numbers a channel: the plain one and those of a basis
    if own.shape[axis] != each * new or axis > 1:
        return None
    parted = (tensor.movedim(axis, 0).unflatten(0, (-1, each)) for tensor in (given, own))
    before, after = (tensor.contiguous() for tensor in parted)
    mean = before.mean(0, keepdim=True).expand_as(after)
    known = any(name and name in start.channels for name in channels)
    mean = mean if known else mean * (old / new if axis else 1)  # sums over channels keep their size
    return _by_name(before, after, start.channels, channels, mean).flatten(0, 1).movedim(0, axis)


def _by_name(given: Tensor, own: Tensor, old: Sequence[str], new: Sequence[str], rest: Tensor) -> Tensor:
    """Rows of `given` where a new name is an old one too, rows of `rest` elsewhere."""
    places = {name: place for place, name in enumerate(old) if name}
    rows = [given[places[name]].to(own.dtype) if name in places else rest[i] for i, name in enumerate(new)]
    return torch.stack(rows)
