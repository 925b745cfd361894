"""Validation: Dice of whole cases; within training on the preprocessed grid, then on the image's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kanseg.config import InferenceConfig
from kanseg.data.cases import Case, label_path
from kanseg.data.images import read_label
from kanseg.data.plan import Plan
from kanseg.data.transforms import highest
from kanseg.evaluation.metrics import bootstrap_interval, dice, dice_of_values, label_dice
from kanseg.inference.logits import whole_logits
from kanseg.inference.predict import predict, write_prediction
from kanseg.inference.provenance import by_networks
from kanseg.memory import settle
from kanseg.training.calibrate import CASES, observe

OVERLAP, FEWEST = 0.25, 2  # of windows, and cases that are watched at least, while training goes on


@torch.no_grad()
def validate_batch(
    model: nn.Module, batch: Mapping[str, Tensor], plan: Plan, device: torch.device
) -> list[float]:
    """Dice a class of one preprocessed case: image (1, C, *S), label as the loss takes it; windows overlap little."""
    memory = allowed_memory(plan, device)
    settle(memory)
    logits = whole_logits(model, batch["image"], plan, overlap=OVERLAP, device=device, memory=memory)
    label = batch["label"][0].to(logits[0].device)
    known = label[0] >= 0  # voxels that nobody annotated do not count
    if plan.regions:
        return [dice((logits[k] > 0) & known, (label[k] > 0) & known) for k in range(1, len(logits))]
    maps = (highest(logits), label[0].to(torch.int16))
    if not known.all():
        maps = (maps[0][known], maps[1][known])
    prediction, reference = (labels.cpu().numpy() for labels in maps)
    return dice_of_values(prediction, reference, range(1, len(logits)))


def validate_case(
    model: nn.Module,
    case: Case,
    plan: Plan,
    options: InferenceConfig,
    device: torch.device,
    folder: Path,
    digest: str,
) -> list[float]:
    """Dice a class of one case on the image's own grid, predicted as `kanseg predict` does.

    Args:
        folder: where to keep the label map, as <id>.nii.gz (.png in 2D); what calibration needs goes beside it.
        digest: of the file of the model, for the header of the label map.
    """
    settle(allowed_memory(plan, device))
    how = inference_options(options, plan, device)
    predicted = predict(model, case, plan, **how)
    labels, reference = predicted.labels(), read_label(label_path(case), plan.image_dims)
    observe(predicted, labels, reference, case.id, folder.parent / CASES)
    path, made = kept_prediction(folder, case, plan), by_networks(plan, [digest], **how)
    write_prediction(path, labels, predicted.source, plan, provenance=made, case=case)
    return label_dice(labels, reference, plan)


def inference_options(options: InferenceConfig, plan: Plan, device: torch.device) -> dict[str, Any]:
    """As `kanseg.inference.logits.whole_logits` takes them."""
    return {**options.model_dump(), "device": device, "memory": allowed_memory(plan, device)}


def allowed_memory(plan: Plan, device: torch.device) -> int | None:
    """Bytes of main memory that the plan was made for; None where it tells those of a GPU, or nothing."""
    return plan.memory_bytes or None if device.type == "cpu" else None


def kept_prediction(folder: Path, case: Case, plan: Plan) -> Path:
    """Where the label map of a validation case is kept."""
    return folder / f"{case.id}{'.png' if plan.image_dims == 2 else '.nii.gz'}"


def summarize(
    cases: Sequence[Case], scores: Mapping[str, Sequence[float]], plan: Plan, seed: int
) -> dict[str, Any]:
    """Dice by case, its mean a class and over classes, each mean with a 95 % bootstrap interval by patient.

    Args:
        scores: Dice of classes 1 ... K-1 by case id.
    """
    names = list(plan.label_names[1:])
    table = np.array([scores[case.id] for case in cases], dtype=float)
    columns = {**{name: table[:, i] for i, name in enumerate(names)}, "mean": table.mean(axis=1)}
    groups = [case.group for case in cases]
    return {
        "cases": {case.id: dict(zip(names, scores[case.id], strict=True)) for case in cases},
        "dice": {name: float(values.mean()) for name, values in columns.items()},
        "ci95": {name: bootstrap_interval(values, groups, seed) for name, values in columns.items()},
    }


def spread(cases: Sequence[Case], count: int | None) -> Sequence[Case]:
    """At most `count` cases, evenly spread over the list."""
    if count is None or count >= len(cases):
        return cases
    return [cases[index * len(cases) // count] for index in range(count)]


def affordable_cases(plan: Plan, patches: int) -> int | None:
    """How many cases can be validated in about the time that training on so many patches takes; None for all.

    A patch in training costs about three windows; a case has as many windows as cover an image of median size.
    """
    if "size" not in plan.fingerprint:
        return None
    size, spacing = (np.array(plan.fingerprint[key]["median"], dtype=float) for key in ("size", "spacing"))
    images = 1.0
    if plan.slice_axis is not None:
        images = size[plan.slice_axis]
        size, spacing = (np.delete(values, plan.slice_axis) for values in (size, spacing))
    patch = np.array(plan.patch_size)
    steps = np.ceil((size * spacing / plan.spacing - patch) / np.maximum(1, patch * (1 - OVERLAP))) + 1
    windows = images * np.prod(np.maximum(1, steps))
    return max(FEWEST, int(3 * patches / windows))
