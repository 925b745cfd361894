"""Several networks or predictions as one: folds of a run, models of different plans, folders of label maps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from kanseg.data.beside import find_probabilities, is_beside
from kanseg.data.cases import Case, few
from kanseg.data.class_names import shared_names
from kanseg.data.digests import file_digest
from kanseg.data.images import check_pair, label_from, read_image, write_label
from kanseg.data.listing import segmentations_in
from kanseg.data.plan import Plan
from kanseg.data.plans import AnyPlan
from kanseg.data.suffixes import SEGMENTS
from kanseg.data.unlabelled import find_images, passed_over
from kanseg.errors import UsageError, UserError, counted
from kanseg.files import make_folder
from kanseg.inference.calibration import known_of, quality_of
from kanseg.inference.cascade import Cascade, first_stage_of
from kanseg.inference.logits import bytes_of_window
from kanseg.inference.members import find_members, stored_rules
from kanseg.inference.postprocess import Rule, check_rule
from kanseg.inference.predict import decide, predict_folder
from kanseg.inference.provenance import by_combination, by_networks
from kanseg.memory import taken
from kanseg.progress import progress, say
from kanseg.study.peft import merged
from kanseg.study.prune import given_bases
from kanseg.training.checkpoint import (
    EXPORTED,
    load_model,
    member_name,
    members,
    named,
    save_checkpoint,
)
from kanseg.training.devices import keep_freed_memory
from kanseg.training.run_folder import WHOLE, on_training_images, training_images

TASK = ("channel_names", "label_names", "label_values", "regions", "image_dims")


class Ensemble(nn.Module):
    """Networks of one plan as one network: logits whose probabilities are the mean of the members'.

    forward: (N, C, *S) -> (N, K, *S).
    """

    def __init__(self, members: Sequence[nn.Module], regions: bool) -> None:
        super().__init__()
        self.members, self.regions = nn.ModuleList(members), regions

    def forward(self, x: Tensor) -> Tensor:
        if self.regions:
            mean = reduce(torch.add, (member(x).sigmoid() for member in self.members)) / len(self.members)
            return torch.logit(mean, eps=1e-6)
        logs = (member(x).log_softmax(1) for member in self.members)
        return reduce(torch.logaddexp, logs) - math.log(len(self.members))


class Loaded:
    """Networks to predict with, one a plan, and what is known of them.

    Attributes:
        networks, plans: as `kanseg.inference.predict.predict_folder` takes them.
        files: the checkpoints, and `infos`, their JSON. `digests` of them and of `before`, the checkpoints of the first
            stages of cascades, whose plans are `plans_before`.
        rules: post-processing that was stored with the first model.
        temperatures: of each network, see `kanseg.inference.calibration`; of an `Ensemble` it goes into the logits of
            the mean, so that no label changes. It was fitted on single networks, for nobody has not been seen by all
            but one of a run's folds.
        quality: what `kanseg.inference.quality.judge` needs, as stored with the first model; empty where nothing is.

    Args:
        kind: of their plans, `Plan` (networks that segment) or `ClassPlan` (classifiers).
    """

    def __init__(
        self, paths: Sequence[Path], device: str | torch.device = "cpu", kind: type[AnyPlan] = Plan
    ) -> None:
        found = [find_members(path) for path in paths]
        self.files = [file for files in found for file in files]
        self.digests = [file_digest(file) for file in self.files]
        stored = stored_rules(Path(paths[0]))
        alike: dict[tuple[str, Path | None], list[tuple[nn.Module, Any]]] = {}
        heat: dict[tuple[str, Path | None], list[float]] = {}
        self.quality: dict[str, Any] = {}
        self.infos: list[dict[str, Any]] = []
        for file in self.files:
            network, plan, info = load_model(file, device)
            if not isinstance(plan, kind):
                what = "segments" if isinstance(plan, Plan) else "tells the class of an image"
                raise UserError(f"{file} {what}, and the networks of an ensemble do one of both.")
            known = known_of(info, file)
            if not self.infos:
                self.quality = quality_of(info, file)
            self.infos.append({**info, "calibration": known} if known else info)
            if stored is None and len(self.infos) <= len(found[0]):
                stored = info.get("postprocessing")
            name = getattr(plan, "previous_stage", None)
            kind_of = json.dumps(_sameness(plan)), first_stage_of(file, name) if name else None
            alike.setdefault(kind_of, []).append((network, plan))
            heat.setdefault(kind_of, []).append(known.get("temperature", 1.0))
        self.rules: list[Rule] = stored or []
        self.temperatures = [statistics.geometric_mean(group) for group in heat.values()]
        self.plans = [group[0][1] for group in alike.values()]
        self.networks: list[nn.Module] = [
            group[0][0]
            if len(group) == 1
            else Ensemble([n for n, _ in group], _by_itself(group[0][1])).eval()
            for group in alike.values()
        ]
        self.before: list[Path] = []
        self.plans_before: list[Any] = []
        for number, (_, place) in enumerate(alike):
            if place is not None:
                first_stage = Loaded([place], device)
                of_first = first_stage.networks, first_stage.plans, first_stage.infos
                self.networks[number] = Cascade(self.networks[number], place.name, *of_first).eval()
                self.before += first_stage.files
                self.plans_before += first_stage.plans
                self.digests += first_stage.digests
        for rule in self.rules:
            check_rule(rule)
        _require_one_task(self.files, self.plans)

    @property
    def plan(self) -> Any:
        """The first plan; channels and labels are those of all."""
        return self.plans[0]


def save_members(
    folder: Path, network: nn.Module, infos: Sequence[Mapping[str, Any]], rules: Sequence[Rule]
) -> Path:
    """Write a network, or each of an `Ensemble`, as the saved model `folder`; given is its first file.

    Changes and masks that lie beside weights are written as weights (`kanseg.study.merge`). Of a `Cascade` the
    first stage goes into a folder there.

    Args:
        infos: JSON of the checkpoint of each.
        rules: post-processing, stored with each.
    """
    if isinstance(network, Cascade):
        (first,) = network.first
        save_members(folder / network.name, first, network.infos, [])
        network = network.network
    networks = network.members if isinstance(network, Ensemble) else [network]
    make_folder(folder)
    if len(networks) > 1:  # the first is written last: after a kill there is no model, and not half of one
        (folder / EXPORTED).unlink(missing_ok=True)
    for number, (member, info) in reversed([*enumerate(zip(networks, infos, strict=True), start=1)]):
        kept = {key: value for key, value in info.items() if key not in ("rng", "state")}
        if bases := given_bases(member):
            kept["model"] = {**info["model"], "bases": bases}
        weights = named("model", merged(member, member.state_dict()))
        save_checkpoint(folder / member_name(number), weights, {**kept, "postprocessing": list(rules)})
    for file in members(folder / EXPORTED)[len(networks) :]:  # of a larger model that was there
        file.unlink()
    return folder / EXPORTED


def predict_with(
    models: Sequence[Path],
    images: Path,
    out: Path,
    *,
    console: Console,
    version: str,
    suffix: str | None = None,
    overlap: float = 0.5,
    blending: str = "gaussian",
    tta: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    postprocess: bool = True,
    again: bool = False,
    memory: int | None = None,
) -> dict[str, Any]:
    """Predict images with all networks of the given models, runs or checkpoints; see `predict_folder`.

    Args:
        memory: bytes that this process may take; default what is free.

    Returns:
        {"predicted", "failed": message by case, "out"}; of a model that can tell, also "quality": what
        `kanseg.inference.quality.Verdict` says of each case that was predicted now.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    loaded = Loaded(models, device)
    if len(loaded.files) > 1:
        console.print(f"An ensemble of {len(loaded.files)} networks", highlight=False)
    if loaded.before:
        count = counted(len(loaded.before), "network")
        console.print(f"A cascade: its first stage has {count}", highlight=False)
    for whole in (Path(model) / WHOLE for model in models):
        if whole.is_dir() and not any(whole in file.parents for file in loaded.files):
            say(console, f"Not among them: the training on every case. For it, -m {whole}")
    if tta and not any(plan.mirror_axes for plan in loaded.plans):
        console.print("--tta changes nothing: the plan names no axes to mirror along. Plan with --mirror.")
    window = max(map(bytes_of_window, (*loaded.plans, *loaded.plans_before))) if device == "cpu" else 0
    if memory is not None and memory <= taken() + window:
        raise UsageError(
            f"--memory {memory / 2**20:.0f}M is less than the program, the model and one window of "
            f"{len(loaded.plan.label_names)} classes take, {(taken() + window) / 2**20:.0f}M. Give more."
        )
    cases = find_images(images, channels=len(loaded.plan.channel_names), names=loaded.plan.channel_names)
    if images.is_dir():
        cases = _images_among(cases, images, console)
    if seen := training_images([*loaded.files, *loaded.before], cases):
        say(console, on_training_images(seen, len(cases)))
    how: dict[str, Any] = {"overlap": overlap, "blending": blending, "tta": tta}
    rules = loaded.rules if postprocess else []
    settings = {**how, "models": loaded.digests, "rules": rules}
    if (probabilities or uncertainty) and any(value != 1 for value in loaded.temperatures):
        settings["temperatures"] = loaded.temperatures
    told: dict[str, Any] = {}
    failures = predict_folder(
        loaded.networks,
        loaded.plans,
        cases,
        out,
        suffix=suffix,
        probabilities=probabilities,
        uncertainty=uncertainty,
        rules=rules,
        settings=settings,
        again=again,
        temperatures=loaded.temperatures,
        quality=loaded.quality,
        judged=lambda case, verdict: told.update({case: asdict(verdict)}),
        console=console,
        description=f"kanseg {version} {loaded.plan.model} {loaded.plan.dataset_name}",
        provenance=by_networks(loaded.plan, loaded.digests, rules, **how),
        device=device,
        memory=memory,
        **how,
    )
    result = {"predicted": len(cases) - len(failures), "failed": failures, "out": str(out)}
    return {**result, "quality": told} if told else result


def _by_itself(plan: AnyPlan) -> bool:
    """Whether each class is told by itself, by a sigmoid."""
    return bool(plan.regions or getattr(plan, "multilabel", False))


def _sameness(plan: AnyPlan) -> dict[str, Any]:
    """What networks must have in common to see the same windows."""
    keys = ("spatial_dims", "spacing", "patch_size", "normalization", "orientation", "slice_axis", "slices")
    others = ("mirror_axes", "previous_stage", "multilabel")
    return {key: getattr(plan, key, None) for key in (*keys, *others, *TASK)}


def _require_one_task(files: Sequence[Path], plans: Sequence[AnyPlan]) -> None:
    for plan in plans[1:]:
        for key in TASK:
            if getattr(plan, key) != getattr(plans[0], key):
                raise UserError(
                    f"{', '.join(map(str, files))} are no ensemble: their {key} differ, {getattr(plans[0], key)} and "
                    f"{getattr(plan, key)}. Combine models of one task."
                )


def _images_among(cases: Sequence[Case], folder: Path, console: Console) -> list[Case]:
    """The images of a folder without the maps that an earlier prediction put there; what is left aside is said."""
    images = [case for case in cases if not is_beside(case.images[0])]
    if not images:
        raise UserError(
            f"{folder} holds no images, but maps of an earlier prediction. Give the folder of the images."
        )
    if len(images) < len(cases):
        console.print(
            f"Passed over: {len(cases) - len(images)} maps of an earlier prediction", highlight=False
        )
    if other := passed_over(folder):
        say(console, f"Not looked at, for there are image files: {few(other, 5)}")
    return images


def combine_folders(folders: Sequence[Path], out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Combine predictions of the same cases: by mean probability where every folder has maps, else by vote.

    Maps are those of `kanseg predict --probabilities`. In a vote a tie goes to the earliest folder's label.

    Returns:
        {"cases", "by": case -> "probability" or "vote", "out"}.

    Raises:
        UserError: a case that a folder lacks, label maps on different grids, or an output that replaces an input.
    """
    if len(folders) < 2:
        raise UserError("An ensemble needs at least two folders of predictions.")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"{out} is one of the folders to combine. Choose another for the result.")
    found = [_predictions(folder) for folder in folders]
    for folder, cases in zip(folders[1:], found[1:], strict=True):
        if differing := sorted(set(cases) ^ set(found[0])):
            raise UserError(
                f"{folders[0]} and {folder} do not hold the same cases: only one has {', '.join(differing[:5])}."
            )
    by = {}
    for name, first in progress(found[0].items(), "Combining"):
        paths = [cases[name].images[0] for cases in found]
        images = [read_image(path) for path in paths]
        for image in images[1:]:
            check_pair(images[0], image)
        maps = [find_probabilities(path) for path in paths]
        known = {(tuple(m[1]), m[2]) for m in maps if m is not None}
        if None in maps or len(known) > 1:
            by[name], labels = "vote", _vote([label_from(image) for image in images])
        else:
            ((values, regions),) = known
            by[name], labels = "probability", decide(_mean_of([m[0] for m in maps if m]), values, regions)
        dtype = np.result_type(np.min_scalar_type(int(labels.max(initial=0))), np.uint8).name
        names, _ = shared_names(paths)
        made: dict[str, Any] = {"names": names, "provenance": by_combination(by[name], paths)}
        write_label(out / first.images[0].name, labels, images[0], dtype, "kanseg ensemble", **made)
    if console is not None:
        say(console, f"{len(by)} cases of {len(folders)} predictions -> {out}")
    return {"cases": len(by), "by": by, "out": str(out)}


def _predictions(folder: Path) -> dict[str, Case]:
    """Label maps of a folder; the maps of probabilities and uncertainty beside them are none."""
    if segmentations_in(folder):
        raise UserError(
            f"{folder} holds {SEGMENTS}, which are not combined. Predict again with --format nii.gz."
        )
    return {case.id: case for case in find_images(folder, channels=1) if not is_beside(case.images[0])}


def _mean_of(maps: Sequence[Sequence[Path]]) -> Iterator[np.ndarray]:
    """Mean probability of each class in turn, from the maps of each prediction."""
    for files in zip(*maps, strict=True):
        yield np.mean([read_image(file).array[0] for file in files], axis=0)


def _vote(labels: Sequence[np.ndarray]) -> np.ndarray:
    """The most frequent label at each voxel."""
    values = np.unique(np.concatenate([np.unique(label) for label in labels]))
    most = np.zeros(labels[0].shape, np.int16)
    result = np.zeros_like(labels[0])
    for label in labels:
        for value in values:
            count = sum((other == value).astype(np.int16) for other in labels)
            place = (label == value) & (count > most)
            result[place], most[place] = value, count[place]
    return result
