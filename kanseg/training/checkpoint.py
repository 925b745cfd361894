"""Checkpoints: one safetensors file with all that prediction or going on needs; never half-written.

Tensors are named `model.*` (weights for prediction), and in `last.safetensors` also `average.*` (their moving
average), `optimizer.*` and `rng.*`. The JSON under the metadata key `kanseg` holds plan, model, config, label
table, versions, and where the training stands.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kanseg import __version__
from kanseg.config import Config, model_options
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import write_bytes
from kanseg.models import TABLES, create_model
from kanseg.study.peft import PLACE, adapt, merge
from kanseg.study.prune import set_bases

if TYPE_CHECKING:
    from kanseg.data.plans import AnyPlan

KEY = "kanseg"
PARTS = ("model", "average", "optimizer", "rng")
SIZES = ("features_per_stage", "strides", "kernel_sizes")  # of a network, where a plan decides them
WEIGHTS = Path(__file__).parents[1] / "weights"  # that come with the package, see `kanseg.weights`
BUNDLE_MODELS = "models"  # folder of the weights in a MONAI bundle
# What is read in the JSON of a checkpoint, where it is there: of all, of the model's description, and of its plan.
KINDS: dict[str, type] = {"model": dict, "plan": dict, "labels": dict, "config": dict, "fresh": list}
KINDS |= {"calibration": dict}
SPEC: dict[str, type] = {"name": str, "options": dict, "in_channels": int, "out_channels": int, "bases": dict}
ENDS: dict[str, type] = {"channel_names": list, "label_names": list, "slices": int}
MOST = 2**20  # channels, classes or slices
SHOWN = 40  # signs of what is wrong
LONGEST_HEADER = 100_000_000  # bytes; more than that safetensors itself refuses
BEST, LAST, EXPORTED = "best.safetensors", "last.safetensors", "model.safetensors"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
    """Write tensors and JSON to one file, atomically; see the module for their names.

    Raises:
        UserError: the file cannot be written; an earlier one under that name is unharmed.
    """
    # A copy each: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return write_bytes(Path(path), save(copies, {KEY: json.dumps(info)}))


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU; what is stored in half precision as float32) and JSON of a checkpoint.

    Raises:
        UserError: no such file, cut short, not written by kanseg, or with tensors that kanseg never writes.
    """
    path = Path(path)
    with _complete(path):
        data = path.read_bytes()  # at once: a training may replace the file at any moment
        (metadata, _), made = _header(BytesIO(data)), load(data)
        del data
        # A copy each: it is aligned in memory, as the last bit of MKL's sums asks for.
        tensors = {name: made.pop(name).clone() for name in list(made)}
        tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    return tensors, _described(metadata, tensors, path)


def load_description(path: Path | str) -> dict[str, Any]:
    """The JSON of a checkpoint; its tensors stay on the disk, where the header says that they are.

    Raises:
        UserError: as `load_checkpoint`.
    """
    path = Path(path)
    with _complete(path), path.open("rb") as file:
        metadata, tensors = _header(file)
        end = file.tell() + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if (size := os.fstat(file.fileno()).st_size) != end:
            raise ValueError(f"{size} bytes, not {end}")
    return _described(metadata, tensors, path)


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Say of a file that the body cannot read what is wrong with it."""
    if not path.is_file():
        raise UserError(
            f"There is no checkpoint {path}. Give one that `kanseg train` wrote, or its run folder."
        )
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no complete checkpoint ({error}): cut short, damaged, or no safetensors file. "
            "Copy it again, or use another checkpoint of the run (best or last)."
        ) from error


def _described(metadata: Mapping[str, str], names: Iterable[str], path: Path) -> dict[str, Any]:
    """The JSON in the metadata of a file with tensors of such names; `UserError` where it cannot be kanseg's."""
    try:
        info = json.loads(metadata[KEY])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} was not written by kanseg: its metadata has no '{KEY}'.") from error
    foreign = [name for name in sorted(names) if name.partition(".")[0] not in PARTS]
    if foreign:
        raise UserError(f"{path} does not fit kanseg: it has foreign keys {_few(foreign)}.")
    if wrong := _wrong(info):
        raise UserError(
            f"{path} does not describe its model and plan ({wrong}). Copy it again, or train again."
        )
    return info


def read_info(path: Path | str) -> dict[str, Any]:
    """The JSON of a checkpoint without its tensors; empty for a file that is none."""
    try:
        info = json.loads(_metadata(path)[KEY])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {} if _wrong(info) else info


def is_checkpoint(path: Path) -> bool:
    """Whether a safetensors file is a checkpoint of kanseg; a file that cannot be read is none."""
    return KEY in _metadata(path)


def _metadata(path: Path | str) -> dict[str, str]:
    """That of a safetensors file; empty where there is none, or no such file."""
    try:
        with Path(path).open("rb") as file:
            return _header(file)[0]
    except (OSError, ValueError, RecursionError):
        return {}


def _wrong(info: Any) -> str:
    """What of the JSON of a checkpoint is of another kind than it is read as; "" where nothing is."""
    if not isinstance(info, dict):
        return "it is no object"
    for part, kinds in ((info, KINDS), (info.get("model", {}), SPEC), (info.get("plan", {}), ENDS)):
        for key, kind in kinds.items():
            if key not in part:
                continue
            value = part[key]
            if not isinstance(value, kind) or (isinstance(value, int) and not 0 < value <= MOST):
                return f"its '{key}' is {str(value)[:SHOWN]!r}"
    return ""


def _header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and table of tensors of a safetensors file: eight bytes of length, then JSON (format of safetensors).

    Raises:
        ValueError: another file.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError("no header of safetensors")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header of safetensors")
    metadata = header.pop("__metadata__", None)
    return metadata if isinstance(metadata, dict) else {}, header


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Put weights into a model, all of them or none.

    Raises:
        UserError: keys that are missing, foreign or of another shape; the first few are named.
    """
    own = model.state_dict()
    problems = {
        "missing keys": [name for name in own if name not in weights],
        "foreign keys": [name for name in weights if name not in own],
        "keys of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    found = "; ".join(f"{kind}: {_few(names)}" for kind, names in problems.items() if names)
    if found:
        raise UserError(f"{source} does not fit the model it names: {found}. Use a checkpoint of this model.")
    model.load_state_dict(weights)


def load_model(path: Path | str, device: str | torch.device = "cpu") -> tuple[nn.Module, Any, dict[str, Any]]:
    """The trained model in `eval()`, its plan, and the rest of the checkpoint's JSON.

    Args:
        path: a run folder (its first fold), a fold folder, a saved model's folder, or a checkpoint. In a fold
            the best weights are taken, or the last ones where no validation has been made yet.
    """
    file = find_checkpoint(path)
    tensors, info = load_checkpoint(file)
    try:
        plan, _ = plan_in(info, file), info["model"]["options"]
    except KeyError as error:
        raise UserError(f"{file} does not describe its model and plan ({error}). Train again.") from error
    return restored(tensors, info, file).to(device).eval(), plan, info


def plan_in(info: Mapping[str, Any], source: Path) -> Any:
    """The plan in the JSON of a checkpoint; `UserError` names its file where that is none."""
    from kanseg.data.plans import plan_from_dict

    try:
        return plan_from_dict(info["plan"])
    except UserError as error:
        raise UserError(f"{source} cannot be used{_by_another(info)}: {error}") from error


def _by_another(info: Mapping[str, Any]) -> str:
    """In words, where another version of kanseg wrote a checkpoint."""
    versions = info.get("versions")
    made = versions.get("kanseg") if isinstance(versions, dict) else None
    return "" if made in (None, __version__) else f" (kanseg {made} wrote it, and this is {__version__})"


def restored(tensors: Mapping[str, Tensor], info: Mapping[str, Any], source: Path) -> nn.Module:
    """The network that tensors and JSON of a checkpoint describe, with its averaged weights if there are any."""
    weights = part(tensors, "average") or part(tensors, "model")
    try:
        model = build_model(unstarted(info["model"]))
    except (UserError, TypeError, RuntimeError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source} describes a network that cannot be made{_by_another(info)}: {said}"
        ) from error
    adapted = any(PLACE in name for name in weights)  # the last weights of a training under way
    if adapted:
        adapt(model, **adaptation(info["config"]["training"]["adapt"], info.get("fresh", [])))
    load_weights(model, weights, source)
    return merge(model) if adapted else model


def adaptation(options: Mapping[str, Any], fresh: Sequence[str]) -> dict[str, Any]:
    """Arguments of `adapt` from those of the config; what began afresh is trained as it is."""
    return {**options, "train": [*options["train"], *fresh]}


def unstarted(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A description of a model without what its training started from: no longer needed, nor perhaps there."""
    return {**spec, "options": _without_start(spec["options"])}


def _without_start(options: Mapping[str, Any]) -> dict[str, Any]:
    nothing = {"encoder_weights": None, "pretrained": False}
    inner = {key: _without_start(value) for key, value in options.items() if isinstance(value, Mapping)}
    return {**options, **inner, **{key: value for key, value in nothing.items() if key in options}}


def build_model(spec: Mapping[str, Any]) -> nn.Module:
    """A model from its description: name, spatial_dims, in_channels, out_channels, options (a dictionary), and by their
    names layers whose `bases` are others than the options say (`kanseg.study.simplify`).
    """
    own = {key: value for key, value in spec.items() if key not in ("options", "bases")}
    return set_bases(create_model(**own, **spec["options"]), spec.get("bases", {}))


def model_spec(config: Config, plan: AnyPlan, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `build_model` needs: the plan's network with the config's options over it, all of it JSON.

    Args:
        known: {"name", "options"} of the network whose weights are started from; it goes before the plan's. Its layers
            keep the bases that they were given, unless the config has options of its own.
    """
    table = TABLES[plan.task]
    if known and known["name"] in table and config.model.name in (None, known["name"]):
        plan = replace(plan, model=known["name"], model_options=known["options"])
    name = config.model.name or plan.model
    if name not in table:
        raise UsageError(f"The model '{name}' is not for {plan.task}.{did_you_mean(name, table)}")
    options = model_options(name)
    planned = {
        **{key: getattr(plan, key) for key in SIZES if hasattr(plan, key)},
        **(plan.model_options if name == plan.model else {}),
    }
    if config.training.deep_supervision is not None:
        planned["deep_supervision"] = config.training.deep_supervision
    chosen = {**{key: value for key, value in planned.items() if key in options}, **config.model.options}
    spec = {
        "name": name,
        "spatial_dims": plan.spatial_dims,
        "in_channels": plan.in_channels,
        "out_channels": len(plan.label_names),
        "options": chosen,
    }
    if known and "bases" in known and not config.model.options and name == known["name"]:
        spec["bases"] = known["bases"]
    return json.loads(json.dumps(spec))


def describe(config: Config, plan: AnyPlan, spec: Mapping[str, Any], fold: int | str) -> dict[str, Any]:
    """The JSON that makes a checkpoint complete in itself: prediction needs no other file."""
    description = {
        "model": spec,
        "plan": plan.to_dict(),
        "config": config.model_dump(),
        "labels": dict(zip(plan.label_names, plan.label_values, strict=True)),
        "fold": fold,
        "versions": {"kanseg": __version__, "torch": torch.__version__, "monai": version("monai")},
    }
    return json.loads(json.dumps(description))


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint that a file, model folder, fold folder, run folder, exported bundle or a name of weights is."""
    path = Path(path)
    if path.is_file():
        return path
    folders = [path, *sorted(path.glob("fold_*")), *sorted(path.glob("model/fold_*")), path / BUNDLE_MODELS]
    files = [folder / name for folder in folders for name in (EXPORTED, BEST, LAST)]
    for file in files:
        if file.is_file():
            return file
    known = shipped()
    if str(path) in known:
        return known[str(path)]
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    names = f", or the name of weights that come with kanseg ({', '.join(known)})" if known else ""
    near = difflib.get_close_matches(str(path), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"{path} {what}.{hint} Give a run folder, a saved model, a .safetensors file{names}.")


def holds_model(path: Path) -> bool:
    """Whether there is a run, a model or a checkpoint."""
    try:
        return is_checkpoint(find_checkpoint(path))
    except UserError:
        return False


def members(file: Path) -> list[Path]:
    """A checkpoint and those that stand beside it as further networks of one model, model_2.safetensors and so on."""
    if file.name != EXPORTED:
        return [file]
    following = (file.with_name(member_name(number)) for number in itertools.count(2))
    return [file, *itertools.takewhile(Path.is_file, following)]


def member_name(number: int) -> str:
    """File of the network `number` of a model, from 1."""
    return EXPORTED if number == 1 else f"model_{number}.safetensors"


def shipped() -> dict[str, Path]:
    """Checkpoints that come with the package, by name."""
    return {file.parent.name: file for file in sorted(WEIGHTS.glob(f"*/{EXPORTED}"))}


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under `name.`, without that prefix."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def named(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `part`: put `name.` before every key."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def pack(tree: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of nested dictionaries and lists: tensors by path, and JSON with paths where they were.

    >>> pack({0: {"exp_avg": torch.zeros(1), "step": 3}})
    ({'0.exp_avg': tensor([0.])}, {'0': {'exp_avg': {'tensor': '0.exp_avg'}, 'step': 3}})
    """
    if isinstance(tree, Tensor):
        return {name: tree}, {"tensor": name}
    if not isinstance(tree, dict | list | tuple):
        return {}, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    packed = {key: pack(value, f"{name}.{key}" if name else str(key)) for key, value in items}
    tensors = {path: tensor for part, _ in packed.values() for path, tensor in part.items()}
    plain = {str(key): rest for key, (_, rest) in packed.items()}
    return tensors, plain if isinstance(tree, dict) else list(plain.values())


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `pack`; numbers that were keys come back as numbers."""
    if isinstance(tree, list):
        return [unpack(tensors, value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"tensor"}:
        return tensors[tree["tensor"]]
    return {int(key) if key.isdigit() else key: unpack(tensors, value) for key, value in tree.items()}


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the random generators of torch (tensors), Python and NumPy (JSON)."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    state["state"] = {**state["state"], "key": state["state"]["key"].tolist()}
    return tensors, {"python": random.getstate(), "numpy": state}


def restore_rng(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = info["python"]
    random.setstate((version, tuple(internal), gauss))
    state = info["numpy"]["state"]
    state = {**state, "key": np.array(state["key"], dtype=np.uint32)}
    np.random.set_state({**info["numpy"], "state": state})


def _few(names: list[str], count: int = 4) -> str:
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
