"""Prediction by classifiers: the class of each image with the probability of every class, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from kanseg.data.class_loader import ImageBatches
from kanseg.data.class_plan import ClassPlan
from kanseg.data.formats import Case, few, find_images, repeated
from kanseg.data.image_classes import is_classes, read_classes
from kanseg.data.images import read_image
from kanseg.errors import UserError
from kanseg.evaluation.classification import write_predictions
from kanseg.inference.ensemble import find_members
from kanseg.progress import progress
from kanseg.training.checkpoint import load_model, read_info
from kanseg.training.classification import PREDICTIONS
from kanseg.training.files import make_folder

THREADS = 2  # that read images


def is_classifier(path: Path | str) -> bool:
    """Whether a run, fold or checkpoint is one of a classifier; raises `UserError` where there is none."""
    return read_info(find_members(path)[0]).get("plan", {}).get("task") == ClassPlan.task


def predict_classes(
    models: Sequence[Path | str],
    images: Path | str,
    out: Path | str,
    *,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the class and the probabilities of every image to `out` (a .csv, or a folder for predictions.csv).

    Args:
        models: runs, folds or checkpoints; several folds or models predict by their mean probability.
        images: an image, a folder of them, or a data set with classes, whose test images are predicted where it has
            some, else all.
        device: default the GPU where there is one.

    Returns:
        {"predicted": how many, "failed": message by image, "out"}.

    Raises:
        UserError: models of other classes, or no image could be read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    members = [load_model(file, device)[:2] for path in models for file in find_members(path)]
    plans = [plan for _, plan in members]
    names, several = plans[0].label_names, plans[0].multilabel
    if any(
        not isinstance(plan, ClassPlan) or (plan.label_names, plan.multilabel) != (names, several)
        for plan in plans
    ):
        raise UserError(
            f"{', '.join(map(str, models))} do not tell the same classes. Combine models of one task."
        )
    cases, read = _images(Path(images), plans[0])
    each = [(network, ImageBatches(read, plan, THREADS)) for network, plan in members]
    failed: dict[str, str] = {}
    rows: dict[str, np.ndarray] = {}
    size = plans[0].batch_size
    for start in progress(range(0, len(cases), size), "Predicting"):
        batch = cases[start : start + size]
        try:
            rows |= _probabilities(each, batch, device)
        except UserError:  # one of them cannot be read; the others can
            for case in batch:
                try:
                    rows |= _probabilities(each, [case], device)
                except UserError as error:
                    failed[case.id] = str(error)
    if not rows:
        raise UserError(
            f"No image of {images} could be predicted: {next(iter(failed.values()), 'there is none')}"
        )
    path = Path(out) if Path(out).suffix == ".csv" else Path(out) / PREDICTIONS
    make_folder(path.parent)
    write_predictions(path, list(rows), np.stack(list(rows.values())), names, multilabel=several)
    if console is not None:
        console.print(f"{len(rows)} images -> {path}", highlight=False, soft_wrap=True)
    return {"predicted": len(rows), "failed": failed, "out": str(path)}


def _images(path: Path, plan: ClassPlan) -> tuple[Sequence[Case], Any]:
    """Cases, and what reads the image of one."""
    if not is_classes(path):
        cases = find_images(path, channels=plan.in_channels)
        if twice := repeated(case.id for case in cases):
            raise UserError(
                f"{path} has several images called {few(twice, 3)}, and a table has one row each. Rename them."
            )
        return cases, lambda case: read_image(case.images, plan.spatial_dims).array
    dataset = read_classes(path)
    return dataset.test_cases or dataset.cases, dataset.read


@torch.inference_mode()
def _probabilities(
    each: Sequence[tuple[Any, ImageBatches]], cases: Sequence[Case], device: Any
) -> dict[str, Any]:
    """Mean probabilities of the members, by case."""
    chances = [
        prepared.plan.probabilities(network(prepared(cases).to(device))).cpu().numpy()
        for network, prepared in each
    ]
    mean = np.mean(chances, axis=0)
    if not np.isfinite(mean).all():
        raise UserError("The network gives values that are not finite. Train it again.")
    return {case.id: row for case, row in zip(cases, mean, strict=True)}
