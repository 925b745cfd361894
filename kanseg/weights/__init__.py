"""Trained weights that come with kanseg, by name: `kanseg predict -m hippocampus -i scan.nii.gz -o mask.nii.gz`.

Each is a folder NAME with model.safetensors (weights in half precision, plan, labels, and under "card" the facts of its
model card), model_2.safetensors and so on where several networks predict together, and README.md, the model card
itself. A name stands wherever a run, a model or a checkpoint does: in prediction, as `training.weights` to start from
(the first network), in `Segmenter.load`. A path that holds a checkpoint goes before a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kanseg.errors import UserError
from kanseg.files import make_folder
from kanseg.training.checkpoint import (
    WEIGHTS,
    load_checkpoint,
    member_name,
    members,
    named,
    part,
    read_info,
    save_checkpoint,
    shipped,
)

LARGEST = 8 * 2**20  # bytes of a file that comes with the package
FACTS = ("title", "images", "data", "licence", "dice")  # what every card says


def table_of_weights() -> list[dict[str, Any]]:
    """Name, size, labels and the facts of the card of all that there are."""
    rows = []
    for name, file in shipped().items():
        info, files = read_info(file), members(file)
        facts = {"networks": len(files), "labels": info["labels"], **info["card"]}
        size = sum(member.stat().st_size for member in files)
        rows.append({"name": name, "megabytes": round(size / 1e6, 1), **facts})
    return rows


def pack(
    checkpoint: Path, name: str, card: Mapping[str, Any], folder: Path = WEIGHTS, *, number: int = 1
) -> Path:
    """Write the weights of a checkpoint in half precision to `folder`/NAME.

    What tells of the machine it was trained on (paths, command) is left out.

    Args:
        card: facts for `kanseg models --weights`, at least `FACTS`.
        number: which of the networks of a model it is; the first is the one to start trainings from.

    Raises:
        UserError: facts are missing, or the file would be larger than 8 MiB.
    """
    if missing := [fact for fact in FACTS if fact not in card]:
        raise UserError(f"The card of '{name}' lacks {', '.join(missing)}.")
    tensors, info = load_checkpoint(checkpoint)
    weights = part(tensors, "average") or part(tensors, "model")
    size = sum(tensor.numel() * 2 for tensor in weights.values())
    if size > LARGEST:
        raise UserError(
            f"'{name}' takes {size / 2**20:.1f} MiB in half precision, more than {LARGEST / 2**20:.0f}."
        )
    half = {key: t.half() if t.dtype == torch.float32 else t for key, t in weights.items()}
    kept: dict[str, Any] = {
        key: info[key] for key in ("model", "plan", "config", "labels", "versions") if key in info
    }
    kept["plan"] = {**kept["plan"], "data": name}
    if "config" in kept:  # the weights that a training started from lie on its machine
        kept["config"] = {**kept["config"], "training": {**kept["config"]["training"], "weights": None}}
    count = sum(tensor.numel() for tensor in weights.values())
    kept["card"] = {**json.loads(json.dumps(dict(card))), "parameters": count}
    return save_checkpoint(make_folder(folder / name) / member_name(number), named("model", half), kept)
