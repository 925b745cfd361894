"""Starting from weights that exist: of a kanseg run or model, of a state_dict, or of a MONAI bundle.

Channels and classes may differ in number, names and order: a class or channel of the same name keeps its weights, a
further channel gets the mean of the known ones, a further class starts afresh. Which axes of which tensors are theirs
is seen by a network of many times as many. Bases may differ as well (more degrees, a finer grid): the learned functions
of the basis branch are kept as far as the new ones can (`kanseg.study.refit`), not what else another family changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from kanseg.encoders.transfer import read_weights
from kanseg.errors import UsageError, UserError
from kanseg.study.peft import PLACE
from kanseg.study.refit import refit
from kanseg.study.visualize import kan_layers
from kanseg.training.checkpoint import (
    BEST,
    EXPORTED,
    LAST,
    build_model,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    part,
    read_info,
    restored,
    shipped,
    unstarted,
)

BUNDLE_WEIGHTS = ("models/model.safetensors", "models/model.pt")
BUNDLE_CONFIGS = tuple(
    f"configs/{name}.{kind}"
    for name in ("inference", "train", "evaluate")
    for kind in ("json", "yaml", "yml")
)
TIMES = (53, 2)  # first a prime that no width of a network is a multiple of; some networks refuse so many
PROGRAMS = (".pt2", ".onnx", ".ts")  # of networks, which run but are not trained
Places = Sequence[int | None]  # of each new channel or class among the old ones, None where there is no such


@dataclass
class Ends:
    """What a network takes and gives.

    Attributes:
        channels, classes: names, "" where unknown; empty where not even their number is known.
        sigmoid: whether each class is told by itself (regions, several classes an image), None where unknown.
    """

    channels: Sequence[str] = ()
    classes: Sequence[str] = ()
    sigmoid: bool | None = None

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Ends:
        """Those of a plan's network; the neighbours of a slice are channels with their distance in the name, and what a
        stage before says are channels named by its classes.
        """
        slices = range(plan.get("slices", 1))
        distances = [place - len(slices) // 2 for place in slices]
        channels = [f"{name}{d:+d}" if d else name for d in distances for name in plan["channel_names"]]
        if plan.get("previous_stage"):
            channels += [f"{name} of the stage before" for name in plan["label_names"][1:]]
        return cls(channels, plan["label_names"], bool(plan.get("regions") or plan.get("multilabel")))


@dataclass
class Start:
    """Weights to start from.

    Attributes:
        spec: of the network that they belong to, what `build_model` takes, None where the file does not say it.
    """

    source: Path
    weights: dict[str, Tensor]
    spec: dict[str, Any] | None = None
    ends: Ends = field(default_factory=Ends)


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
    if path.suffix in PROGRAMS:
        raise UserError(_only_a_program(path))
    if path.suffix == ".safetensors" and is_checkpoint(path):
        return _read_checkpoint(path)
    return Start(path, _weights_in(path))


def _read_checkpoint(path: Path) -> Start:
    tensors, info = load_checkpoint(path)
    spec, plan = info.get("model", {}), info.get("plan", {})
    inputs, outputs = ([""] * spec.get(name, 0) for name in ("in_channels", "out_channels"))
    ends = Ends.of(plan) if {"channel_names", "label_names"} <= plan.keys() else Ends(inputs, outputs)
    weights = part(tensors, "average") or part(tensors, "model")
    if any(PLACE in name for name in weights):
        weights = restored(tensors, info, path).state_dict()
    whole = {"name", "spatial_dims", "in_channels", "out_channels", "options"} <= spec.keys()
    return Start(path, weights, spec if whole else None, ends)


def _read_bundle(folder: Path) -> Start:
    """Weights of a bundle and MONAI's network as its config describes it, if it does so without code."""
    file = next((folder / name for name in BUNDLE_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        program = next((path for path in (folder / "models").glob("*") if path.suffix in PROGRAMS), None)
        raise UserError(
            _only_a_program(program)
            if program
            else f"The bundle {folder} has no {' or '.join(BUNDLE_WEIGHTS)}. Download its weights first."
        )
    if is_checkpoint(file):  # exported by kanseg
        return _read_checkpoint(file)
    weights = {f"network.{name}": value for name, value in _weights_in(file).items()}
    definition = _network_definition(folder)
    target = str(definition.pop("_target_")).rpartition(".")[2]
    sizes = {name: definition.pop(name, None) for name in ("spatial_dims", "in_channels", "out_channels")}
    spec = {"name": "monai", **sizes, "options": {"network": target, "arguments": definition}}
    inputs, outputs = (
        _channel_definition(folder, side, int(sizes[name] or 0))
        for side, name in (("inputs", "in_channels"), ("outputs", "out_channels"))
    )
    return Start(folder, weights, spec, Ends(inputs, outputs))


def _only_a_program(path: Path) -> str:
    return (
        f"{path} is an exported program: it runs, but holds no weights by the names of a network. Start from the run "
        "or model that it was exported from, or from a bundle with models/model.pt."
    )


def _channel_definition(folder: Path, side: str, count: int) -> list[str]:
    """Names of the channels or classes of a bundle's network by its metadata, "" where it does not name them all."""
    try:
        described = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
        (data,) = described["network_data_format"][side].values()
        return [str(data["channel_def"][str(number)]) for number in range(count)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [""] * count


def _weights_in(file: Path) -> dict[str, Tensor]:
    """Without what torch's parallel training puts before their names."""
    return {name.removeprefix("module."): value for name, value in read_weights(file).items()}


def _fitting(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: value for n, value in weights.items() if n in own and value.shape == own[n].shape}


def _network_definition(folder: Path) -> dict[str, Any]:
    for name in BUNDLE_CONFIGS:
        try:
            found = ConfigParser.load_config_file(folder / name).get("network_def")
        except Exception:  # no such file, or whatever the reader of the format makes of a broken one
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


def transfer(model: nn.Module, spec: Mapping[str, Any], start: Start, ends: Ends) -> tuple[str, list[str]]:
    """Put the weights that fit into a model; said is which did, and given are the names of parameters that begin
    afresh, wholly or in part.

    Args:
        spec: of the model, what `build_model` takes.
        ends: of the model; classes with the background first.

    Raises:
        UserError: not one weight fits.
    """
    own = model.state_dict()
    weights, partly, told = _at_their_places(model, spec, start, ends)
    fitting = _fitting(weights, own)
    if not fitting:
        raise UserError(
            f"No weight of {start.source} fits the model: it has {', '.join(list(start.weights)[:3])}, the model "
            f"{', '.join(list(own)[:3])}. Choose the network that they belong to (model.name, model.options)."
        )
    model.load_state_dict({**own, **fitting})
    refitted = _refitted(model, start, weights, ends)
    model.load_state_dict(refitted, strict=False)
    bases = tuple(name.removesuffix("_weight") for name in refitted)
    settled = {name for name in {**own, **start.weights} if name.startswith(bases)}
    fresh = [name for name in own if name not in fitting and name not in settled]
    parts = {
        "adapted": [name for name in own if name in fitting and name in partly],
        "moved to other bases": list(refitted),
        "left aside": [name for name in start.weights if name not in fitting and name not in settled],
        "new in the network": fresh,
    }
    shown = (
        f", {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in parts.items()
        if names
    )
    taken = sum(name not in partly and name not in settled for name in fitting)
    counted = f"{taken} of {len(start.weights)} tensors taken{''.join(shown)}"
    parameters = dict(model.named_parameters())
    afresh = [name for name in (*parts["adapted"], *fresh) if name in parameters]
    return " ".join([f"Weights of {start.source}: {counted}.", *told]), afresh


def check_encoder_channels(spec: Mapping[str, Any], ends: Ends) -> None:
    """Raise `UsageError` where encoder_weights, which are taken as they lie, have known channels in another order."""
    if not (given := spec["options"].get("encoder_weights")):
        return
    path = Path(given)
    plan = read_info(path / EXPORTED if path.is_dir() else path).get("plan", {})
    if not {"channel_names", "label_names"} <= plan.keys():
        return
    old = Ends.of(plan)
    moved = any(place not in (None, number) for number, place in enumerate(_channel_places(old, ends)))
    if moved and len(old.channels) == len(ends.channels):
        raise UsageError(
            f"encoder_weights={path} has the channels {', '.join(old.channels)}, the data {', '.join(ends.channels)}, "
            f"and an encoder takes them in their order. Start by training.weights={path}, which goes by name."
        )


def _at_their_places(
    model: nn.Module, spec: Mapping[str, Any], start: Start, ends: Ends
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """The weights with the channels and classes of a model, names of those that are new in part, and what to say."""
    own, weights, partly = model.state_dict(), dict(start.weights), set()
    channels, classes = _channel_places(start.ends, ends), _class_places(start.ends, ends)
    if not _all_in_place(channels, start.ends.channels):
        found = _axes(model, spec, "in_channels")
        channels = channels if found else _unmoved(channels, start.ends.channels)
        for name in found.keys() & weights.keys():
            moved = _with_channels(weights.pop(name), name, found[name], channels, len(start.ends.channels))
            weights |= {} if moved is None else {name: moved}
            partly |= {name} if None in channels else set()
    if not _all_in_place(classes, start.ends.classes):
        found = _axes(model, spec, "out_channels")
        classes = classes if found else _unmoved(classes, start.ends.classes)
        for name in found.keys() & weights.keys():
            moved = _with_classes(weights.pop(name), own[name], found[name], classes, len(start.ends.classes))
            weights |= {} if moved is None else {name: moved}
            partly |= {name} if None in classes else set()
    said = [_said("Channels", start.ends.channels, ends.channels, channels, "as the mean of all")]
    if _other_kind(start.ends, ends) and not any(place is not None for place in classes):
        kinds = "each by itself (sigmoid)", "one of all (softmax)"
        before, now = kinds if start.ends.sigmoid else kinds[::-1]
        said.append(f"Classes begin afresh: the weights tell {before}, the plan asks for {now}.")
    else:
        said.append(_said("Classes", start.ends.classes, ends.classes, classes, "new"))
    return weights, partly, [sentence for sentence in said if sentence]


def _channel_places(old: Ends, new: Ends) -> Places:
    """By name; in their order where there are as many and no name is in both."""
    found = _by_name(old.channels, new.channels)
    same = len(old.channels) == len(new.channels) and not any(place is not None for place in found)
    return range(len(new.channels)) if same else found


def _class_places(old: Ends, new: Ends) -> Places:
    """By name; in their order where there are as many and some have no name of their own."""
    if _other_kind(old, new):
        return [None] * len(new.classes)
    names = [*old.classes, *new.classes]
    known = all(names) and not any(re.fullmatch(r"label \d+", name) for name in names)
    if len(old.classes) == len(new.classes) and not known:
        return range(len(new.classes))
    return _by_name(old.classes, new.classes)


def _other_kind(old: Ends, new: Ends) -> bool:
    return None not in (old.sigmoid, new.sigmoid) and old.sigmoid != new.sigmoid


def _by_name(old: Sequence[str], new: Sequence[str]) -> Places:
    """Those of one name (two channels "MRI") go by their order."""
    places = {name: place for place, name in enumerate(_numbered(old)) if name[0]}
    return [places.get(name) for name in _numbered(new)]


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name without regard to case, and how many of that name come before it."""
    plain = [name.strip().casefold() for name in names]
    return [(name, plain[:place].count(name)) for place, name in enumerate(plain)]


def _all_in_place(places: Places, old: Sequence[str]) -> bool:
    """Whether nothing moves, also because nothing is known of the old ones."""
    return not old or list(places) == list(range(len(old)))


def _unmoved(places: Places, old: Sequence[str]) -> Places:
    """Where it is not known which weights are theirs: those of as many stay in their order, others are new."""
    return range(len(places)) if len(places) == len(old) else [None] * len(places)


def _said(what: str, old: Sequence[str], new: Sequence[str], places: Places, rest: str) -> str:
    if not old or list(old) == list(new):
        return ""
    kept = [name for name, place in zip(new, places, strict=True) if place is not None]
    others = [name for name, place in zip(new, places, strict=True) if place is None]
    if list(places) == list(range(len(old))) and _by_name(old, new) != list(places):
        pairs = (f"{n} as {o}" if o else n for n, o in zip(new, old, strict=True))
        return f"{what} in their order: {', '.join(pairs)}."
    parts = [f"by name: {', '.join(kept)}"] if kept else []
    return f"{what} {'; '.join([*parts, *([f'{rest}: ' + ', '.join(others)] if others else [])])}."


def _axes(model: nn.Module, spec: Mapping[str, Any], key: str) -> dict[str, list[int]]:
    """Axes of the image's channels ("in_channels") or of the classes ("out_channels"), by tensor: those that grow with
    them. Of a grouped convolution none, and nothing of a network that takes no other number.
    """
    times, grown = next(((n, made) for n in TIMES if (made := _grown(spec, key, n))), (1, None))
    if grown is None:
        return {}
    sizes, found = grown.state_dict(), {}
    for name, value in model.state_dict().items():
        if name not in sizes or sizes[name].dim() != value.dim():
            continue
        pairs = zip(value.shape, sizes[name].shape, strict=True)
        axes = [axis for axis, (size, larger) in enumerate(pairs) if size and larger == times * size]
        layer = model.get_submodule(name.rpartition(".")[0])
        if axes:
            found[name] = [] if getattr(layer, "groups", 1) > 1 and max(axes) else axes
    for name in [name for name in found if name.endswith("basis_weight")]:
        inside = f"{name.removesuffix('basis_weight')}basis."
        for part_of, value in model.state_dict().items():  # functions of groups of channels, here of one each
            if part_of.startswith(inside) and value.dim() == 2 and len(value) == spec[key] > 1:
                found[part_of] = [0]
    return found


def _grown(spec: Mapping[str, Any], key: str, times: int) -> nn.Module | None:
    """The network with so many times as many channels or classes; None where it does not take them."""
    more = {**unstarted(spec), key: times * spec[key]}
    try:
        with torch.device("meta"):
            return build_model(more)
    except UserError:
        return None
    except (RuntimeError, NotImplementedError):  # a constructor that computes
        with torch.random.fork_rng():
            return build_model(more)


def _with_channels(given: Tensor, name: str, axes: Sequence[int], places: Places, old: int) -> Tensor | None:
    """A tensor along whose axes the channels are others; None where it is not known how."""
    for axis in axes:
        each, odd = divmod(
            given.shape[axis], old
        )  # numbers a channel: those of a basis lie beside each other
        if odd or (each > 1 and not name.endswith("basis_weight")):
            return None
        parted = given.movedim(axis, 0).unflatten(0, (old, each))
        mean = parted.mean(0)
        if all(place is None for place in places) and axis:
            mean = mean * (old / len(places))  # sums over channels keep their size
        rows = [mean if place is None else parted[place] for place in places]
        given = torch.stack(rows).flatten(0, 1).movedim(0, axis).contiguous()
    return given if axes else None


def _with_classes(given: Tensor, own: Tensor, axes: Sequence[int], places: Places, old: int) -> Tensor | None:
    """A tensor with the rows of known classes of `given` at their places, those of `own` elsewhere; None without any.

    Inputs of several maps of all classes are known by one map after the other.
    """
    kept = [place for place in places if place is not None]
    if given.dim() != own.dim() or not axes or not kept:
        return None
    index, target = [], []
    for axis in range(own.dim()):
        maps = own.shape[axis] // len(places) if axis in axes else 0
        known = (maps * old, maps * len(places)) if maps else (own.shape[axis],) * 2
        if (given.shape[axis], own.shape[axis]) != known or (axis == 0 and maps > 1):
            return None
        if maps:
            new = [number for number, place in enumerate(places) if place is not None]
            index.append(torch.tensor([m * old + place for m in range(maps) for place in kept]))
            target.append(torch.tensor([m * len(places) + number for m in range(maps) for number in new]))
    for axis, chosen in zip(axes, index, strict=True):
        given = given.index_select(axis, chosen)
    return _put(own, given.to(own.dtype), axes, target)


def _put(target: Tensor, block: Tensor, axes: Sequence[int], places: Sequence[Tensor]) -> Tensor:
    """A copy of target with a block at the given places of each of the axes."""
    if len(axes) > 1:
        block = _put(target.index_select(axes[0], places[0]), block, axes[1:], places[1:])
    return target.index_copy(axes[0], places[0], block)


def _refitted(model: nn.Module, start: Start, weights: Mapping[str, Tensor], ends: Ends) -> dict[str, Tensor]:
    """Weights of KAN layers whose bases are others than those of the network that was started from."""
    if start.spec is None or not kan_layers(model):
        return {}
    sizes = {"in_channels": len(ends.channels), "out_channels": len(ends.classes)}
    try:
        old = build_model({**unstarted(start.spec), **sizes})
        own = old.state_dict()
        fitting = _fitting(weights, own)
        old.load_state_dict({**own, **fitting})
        return {name: weight for name, weight in refit(old, model).items() if name in fitting}
    except UserError:  # of another version, say: what fits by name has been taken
        return {}
