"""Prediction by classifiers: the class of each image with the probability of every class, as a table.

The last column of the table tells what a row was made from (networks, options, image), so that a later call goes on
where one stopped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from kanseg.data.cases import Case, few, repeated
from kanseg.data.class_loader import MIRRORING, ImageBatches
from kanseg.data.class_plan import ClassPlan
from kanseg.data.digests import file_digest, made_from
from kanseg.data.image_classes import is_classes, read_classes
from kanseg.data.images import read_image
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.evaluation.class_tables import DIGEST, PREDICTIONS, read_made, read_predictions, write_predictions
from kanseg.evaluation.classification import entropy
from kanseg.files import make_folder
from kanseg.inference.members import find_members
from kanseg.progress import progress, say
from kanseg.training.checkpoint import load_model, read_info
from kanseg.training.run_folder import on_training_images, training_images

THREADS = 2  # that read images
PAUSE = 30  # seconds after which what is done is written


def is_classifier(path: Path | str) -> bool:
    """Whether a run, fold or checkpoint is one of a classifier; raises `UserError` where there is none."""
    return read_info(find_members(path)[0]).get("plan", {}).get("task") == ClassPlan.task


@dataclass
class Member:
    """A network of those that predict together.

    Attributes:
        mirrored: axes of the image, (C, *S), along which both ends are looked at from.
    """

    network: nn.Module
    prepared: ImageBatches
    mirrored: Sequence[int]

    def probabilities(self, cases: Sequence[Case], device: Any) -> np.ndarray:
        """(N, K), the mean over the images as they are and mirrored."""
        images = self.prepared(cases).to(device)
        turns = [
            axes
            for count in range(len(self.mirrored) + 1)
            for axes in itertools.combinations(self.mirrored, count)
        ]
        chances = [self._of(images.flip([axis + 1 for axis in axes])) for axes in turns]
        return np.mean(chances, axis=0)

    def _of(self, images: Tensor) -> np.ndarray:
        return self.prepared.plan.probabilities(self.network(images)).cpu().numpy()


def predict_classes(
    models: Sequence[Path | str],
    images: Path | str,
    out: Path | str,
    *,
    tta: bool = False,
    uncertainty: bool = False,
    again: bool = False,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the class and the probabilities of every image to `out` (a .csv, or a folder for predictions.csv).

    Args:
        models: runs, folds or checkpoints; several folds or models predict by their mean probability.
        images: an image, a folder of them, or a data set with classes, whose test images are predicted where it has
            some, else all.
        tta: average over the mirrored images that the training drew (classification.changes).
        uncertainty: add the entropy of the probabilities, 0 where one class is certain, 1 where all are alike.
        again: predict also what an earlier call finished with the same networks, options and images, and replace a
            table of other images.
        device: default the GPU where there is one.

    Returns:
        {"predicted": how many, "failed": message by image, "out"}.

    Raises:
        UserError: models of other classes, an `out` that is no such table or one of other images, or no image could be
            read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = console or Console(quiet=True)
    files = [file for path in models for file in find_members(path)]
    loaded = [load_model(file, device) for file in files]
    plans = [plan for _, plan, _ in loaded]
    names, several = plans[0].label_names, plans[0].multilabel
    if any(
        not isinstance(plan, ClassPlan) or (plan.label_names, plan.multilabel) != (names, several)
        for plan in plans
    ):
        raise UserError(
            f"{', '.join(map(str, models))} do not tell the same classes. Combine models of one task."
        )
    if len(files) > 1:
        say(console, f"An ensemble of {len(files)} networks")
    if tta and not any(_mirrored(info, plan) for _, plan, info in loaded):
        say(console, "--tta changes nothing: the training mirrored no images (classification.changes).")
    cases, read, known = _images(Path(images), plans[0])
    seen = training_images(files, cases)
    if known and any(Path(plan.data) == Path(images).resolve() for plan in plans):
        seen = [case.id for case in cases]  # also what has no files of its own
    if seen:
        say(console, on_training_images(seen, len(cases)))
    path = Path(out) if Path(out).suffix == ".csv" else Path(out) / PREDICTIONS
    settings = {"models": [file_digest(file) for file in files], "tta": tta, "uncertainty": uncertainty}
    digests = {case.id: made_from(case.images, settings, case.id) for case in cases}
    rows = _done(path, digests, names, again)
    if rows:
        say(console, f"{len(rows)} images are there already")
    members = [
        Member(network, ImageBatches(read, plan, THREADS), _mirrored(info, plan) if tta else ())
        for network, plan, info in loaded
    ]
    failed: dict[str, str] = {}

    def keep() -> None:
        make_folder(path.parent)
        kept = [case.id for case in cases if case.id in rows]
        chances = np.stack([rows[name] for name in kept])
        more: dict[str, list[Any]] = {}
        if uncertainty:
            more["entropy"] = [f"{value:.5f}" for value in entropy(chances, multilabel=several)]
        more[DIGEST] = [digests[name] for name in kept]
        write_predictions(path, kept, chances, names, multilabel=several, more=more)

    missing = [case for case in cases if case.id not in rows]
    size, kept_at = plans[0].batch_size, time.monotonic()
    try:
        for start in progress(range(0, len(missing), size), "Predicting"):
            batch = missing[start : start + size]
            try:
                rows |= _probabilities(members, batch, device)
            except UserError:  # one of them cannot be read; the others can
                for case in batch:
                    try:
                        rows |= _probabilities(members, [case], device)
                    except UserError as error:
                        failed[case.id] = str(error)
            if rows and time.monotonic() - kept_at > PAUSE:
                keep()
                kept_at = time.monotonic()
    finally:  # what was done before a stop is done
        if rows:
            keep()
    if not rows:
        raise UserError(
            f"No image of {images} could be predicted: {next(iter(failed.values()), 'there is none')}"
        )
    say(console, f"{len(rows)} images -> {path}")
    return {"predicted": len(rows), "failed": failed, "out": str(path)}


def combine_tables(tables: Sequence[Path], out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Combine tables of the same images by their mean probability, as `predict_classes` does with models.

    Returns:
        {"cases", "out"}.

    Raises:
        UserError: less than two, other images or classes, or an output that replaces an input.
    """
    path = out if out.suffix == ".csv" else out / PREDICTIONS
    if len(tables) < 2:
        raise UserError("An ensemble needs at least two tables of predictions.")
    if path.resolve() in [table.resolve() for table in tables]:
        raise UserError(f"{path} is one of the tables to combine. Choose another for the result.")
    _done(path, {}, (), again=True)
    first = read_predictions(tables[0])
    ids, names, several = first.ids, first.names, first.multilabel
    chances = [first.probabilities]
    for table in tables[1:]:
        other = read_predictions(table)
        if other.names != names or other.multilabel != several:
            raise UserError(
                f"{tables[0]} and {table} do not tell the same classes. Combine models of one task."
            )
        if differing := sorted(set(other.ids) ^ set(ids)):
            raise UserError(
                f"{tables[0]} and {table} do not hold the same images: only one has {few(differing, 5)}."
            )
        row_of = dict(zip(other.ids, other.probabilities, strict=True))
        chances.append(np.stack([row_of[name] for name in ids]))
    make_folder(path.parent)
    write_predictions(path, ids, np.mean(chances, axis=0), names, multilabel=several)
    if console is not None:
        say(console, f"{len(ids)} images of {len(tables)} tables -> {path}")
    return {"cases": len(ids), "out": str(path)}


def _mirrored(info: Mapping[str, Any], plan: ClassPlan) -> Sequence[int]:
    """Axes of an image, (C, *S), that the training of a checkpoint turned round."""
    changes = info["config"]["classification"]["changes"]
    return sorted(
        {axis for name in changes if name in MIRRORING for axis in MIRRORING[name](plan.spatial_dims)}
    )


def _done(path: Path, digests: Mapping[str, str], names: Sequence[str], again: bool) -> dict[str, np.ndarray]:
    """Probabilities of the images that an earlier call finished; what it would not be right to replace is refused."""
    if not path.exists():
        return {}
    columns, kept = read_made(path)
    if columns is None:
        raise UserError(f"{path} is there and no table of predictions. Choose another -o.")
    if again:
        return {}
    if others := [name for name in kept if name not in digests]:
        raise UserError(
            f"{path} holds predictions of {len(others)} other images, e.g. {others[0]}. Choose another -o, or replace "
            "it by --again."
        )
    if columns != list(names):
        return {}
    return {name: row for name, (row, digest) in kept.items() if digest == digests[name]}


def _images(path: Path, plan: ClassPlan) -> tuple[Sequence[Case], Any, bool]:
    """Cases, what reads the image of one, and whether a data set has them to train on and validate."""
    if not is_classes(path):
        cases = find_images(path, channels=plan.in_channels)
        if twice := repeated(case.id for case in cases):
            raise UserError(
                f"{path} has several images called {few(twice, 3)}, and a table has one row each. Rename them."
            )
        return cases, lambda case: read_image(case.images, plan.spatial_dims).array, False
    dataset = read_classes(path)
    return dataset.test_cases or dataset.cases, dataset.read, not dataset.test_cases


@torch.inference_mode()
def _probabilities(members: Sequence[Member], cases: Sequence[Case], device: Any) -> dict[str, Any]:
    """Mean probabilities of the members, by case."""
    mean = np.mean([member.probabilities(cases, device) for member in members], axis=0)
    if not np.isfinite(mean).all():
        raise UserError("The network gives values that are not finite. Train it again.")
    return {case.id: row for case, row in zip(cases, mean, strict=True)}
