"""Several networks or predictions as one: folds of a run, models of different plans, folders of label maps."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from kanseg.inference.cascade import Cascade, first_stage_of
from kanseg.inference.postprocess import Rule, check_rule, load_rules
from kanseg.inference.predict import decide, predict_folder
from kanseg.memory import taken
from kanseg.progress import progress, say
from kanseg.training.checkpoint import (
    BEST,
    EXPORTED,
    LAST,
    find_checkpoint,
    load_checkpoint,
    load_model,
    member_name,
    members,
    named,
    plan_in,
    save_checkpoint,
)
from kanseg.training.devices import keep_freed_memory
from kanseg.training.run_folder import FINAL_MODEL, WHOLE, on_training_images, training_images

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
            stages of cascades.
        rules: post-processing that was stored with the first model.

    Args:
        kind: of their plans, `Plan` (networks that segment) or `ClassPlan` (classifiers).
    """

    def __init__(
        self, paths: Sequence[Path], device: str | torch.device = "cpu", kind: type[AnyPlan] = Plan
    ) -> None:
        found = [find_members(path) for path in paths]
        self.files = [file for files in found for file in files]
        self.digests = [file_digest(file) for file in self.files]
        stored = _rules(Path(paths[0]))
        alike: dict[tuple[str, Path | None], list[tuple[nn.Module, Any]]] = {}
        self.infos: list[dict[str, Any]] = []
        for file in self.files:
            network, plan, info = load_model(file, device)
            if not isinstance(plan, kind):
                what = "segments" if isinstance(plan, Plan) else "tells the class of an image"
                raise UserError(f"{file} {what}, and the networks of an ensemble do one of both.")
            self.infos.append(info)
            if stored is None and len(self.infos) <= len(found[0]):
                stored = info.get("postprocessing")
            name = getattr(plan, "previous_stage", None)
            first = first_stage_of(file, name) if name else None
            alike.setdefault((json.dumps(_sameness(plan)), first), []).append((network, plan))
        self.rules: list[Rule] = stored or []
        self.plans = [group[0][1] for group in alike.values()]
        self.networks: list[nn.Module] = [
            group[0][0]
            if len(group) == 1
            else Ensemble([n for n, _ in group], _by_itself(group[0][1])).eval()
            for group in alike.values()
        ]
        self.before: list[Path] = []
        for number, (_, place) in enumerate(alike):
            if place is not None:
                first_stage = Loaded([place], device)
                known = first_stage.networks, first_stage.plans, first_stage.infos
                self.networks[number] = Cascade(self.networks[number], place.name, *known).eval()
                self.before += [*first_stage.files, *first_stage.before]
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

    Of a `Cascade` the first stage goes into a folder there.

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
    for number, (member, info) in enumerate(zip(networks, infos, strict=True), start=1):
        kept = {key: value for key, value in info.items() if key not in ("rng", "state")}
        weights = named("model", member.state_dict())
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
        {"predicted", "failed": message by case, "out"}.
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
    if memory is not None and memory <= taken():
        raise UsageError(
            f"--memory {memory / 2**20:.0f}M is less than the program and the model take before the first image, "
            f"{taken() / 2**20:.0f}M. Give more."
        )
    cases = find_images(images, channels=len(loaded.plan.channel_names), names=loaded.plan.channel_names)
    if images.is_dir():
        cases = _images_among(cases, images, console)
    if seen := training_images([*loaded.files, *loaded.before], cases):
        say(console, on_training_images(seen, len(cases)))
    how: dict[str, Any] = {"overlap": overlap, "blending": blending, "tta": tta}
    rules = loaded.rules if postprocess else []
    failures = predict_folder(
        loaded.networks,
        loaded.plans,
        cases,
        out,
        suffix=suffix,
        probabilities=probabilities,
        uncertainty=uncertainty,
        rules=rules,
        settings={**how, "models": loaded.digests, "rules": rules},
        again=again,
        console=console,
        description=f"kanseg {version} {loaded.plan.model} {loaded.plan.dataset_name}",
        provenance={
            "kanseg": version,
            "network": loaded.plan.model,
            "trained on": loaded.plan.dataset_name,
            "models": loaded.digests,
            **how,
            "post-processing": rules,
        },
        device=device,
        memory=memory,
        **how,
    )
    return {"predicted": len(cases) - len(failures), "failed": failures, "out": str(out)}


def facts_of_model(path: Path | str) -> dict[str, Any]:
    """What a run, a model or a checkpoint takes, gives and was trained on, by words for a table."""
    files = find_members(path)
    infos = [load_checkpoint(file)[1] for file in files]
    specs, plans = ([info.get(key, {}) for info in infos] for key in ("model", "plan"))
    for file, info in zip(files, infos, strict=True):
        if info.get("plan"):
            plan_in(info, file)  # or what it says is not to be told
    plan, stored = plans[0], _rules(Path(path))

    def each(values: Iterable[Any]) -> Any:
        """What all networks have in common, else that of each kind of them."""
        found = [value for value, _ in itertools.groupby(values)]
        return found[0] if len(found) == 1 else found

    rules = infos[0].get("postprocessing", []) if stored is None else stored
    known = {
        "networks": len(files),
        "network": each(f"{spec.get('name')} in {spec.get('spatial_dims')}D" for spec in specs),
        "options": each(spec.get("options") for spec in specs),
        "channels": plan.get("channel_names"),
        "classes": infos[0].get("labels"),
        "regions": plan.get("regions"),
        "spacing": each(plan.get("spacing") for plan in plans),
        "first stage": each(_first_stage(file, plan) for file, plan in zip(files, plans, strict=True)),
        "patch size": each(plan.get("patch_size") for plan in plans),
        "normalization": [how["scheme"] for how in plan.get("normalization") or [] if "scheme" in how],
        "mirror axes": each(plan.get("mirror_axes") for plan in plans),
        "post-processing": rules,
        "trained on": plan.get("dataset_name"),
        "folds": [info["fold"] for info in infos if info.get("fold") is not None],
        "versions": infos[0].get("versions"),
        "digests": {str(file): file_digest(file) for file in files},
    }
    return {key: value for key, value in known.items() if value not in (None, [], {})}


def _first_stage(file: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `facts_of_model` tells of the stage before a network, where there is one."""
    if not (name := plan.get("previous_stage")):
        return None
    facts = facts_of_model(first_stage_of(file, name))
    return {key: facts[key] for key in ("networks", "network", "spacing", "patch size", "digests")}


def find_members(path: Path | str) -> list[Path]:
    """Checkpoints that a file, model, fold, run folder or name stands for: of a run all folds, or its final one."""
    path = Path(path)
    if (path / FINAL_MODEL).is_dir():
        path = path / FINAL_MODEL
    if path.is_file():
        return [path]
    if not path.is_dir() or any((path / name).is_file() for name in (EXPORTED, BEST, LAST)):
        return members(find_checkpoint(path))
    folds = sorted(
        f for f in path.glob("fold_*") if any((f / name).is_file() for name in (EXPORTED, BEST, LAST))
    )
    numbered = [fold for fold in folds if fold.name[5:].isdigit()]
    return [find_checkpoint(fold) for fold in numbered] or members(find_checkpoint(path))


def _rules(path: Path) -> list[Rule] | None:
    """The rules of a run or a saved model, None where none are stored; what has a name alone has no folder."""
    if not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    found = (load_rules(place) for place in (folder, folder.parent))
    return next((rules for rules in found if rules is not None), None)


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
        write_label(out / first.images[0].name, labels, images[0], dtype, "kanseg ensemble", names=names)
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
