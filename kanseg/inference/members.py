"""Networks that predict together: the checkpoints that a path stands for, and what they tell without being loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kanseg.data.digests import file_digest
from kanseg.inference.calibration import known_of, quality_of
from kanseg.inference.cascade import first_stage_of
from kanseg.inference.postprocess import Rule, load_rules
from kanseg.training.checkpoint import (
    BEST,
    EXPORTED,
    LAST,
    find_checkpoint,
    load_description,
    members,
    plan_in,
)
from kanseg.training.run_folder import FINAL_MODEL


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


def stored_rules(path: Path) -> list[Rule] | None:
    """The rules of a run or a saved model, None where none are stored; what has a name alone has no folder."""
    if not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    found = (load_rules(place) for place in (folder, folder.parent))
    return next((rules for rules in found if rules is not None), None)


def facts_of_model(path: Path | str) -> dict[str, Any]:
    """What a run, a model or a checkpoint takes, gives and was trained on, by words for a table."""
    files = find_members(path)
    infos = [load_description(file) for file in files]
    specs, plans = ([info.get(key, {}) for info in infos] for key in ("model", "plan"))
    for file, info in zip(files, infos, strict=True):
        if info.get("plan"):
            plan_in(info, file)  # or what it says is not to be told
    plan, stored = plans[0], stored_rules(Path(path))
    before = [_stage_before(file, plan) for file, plan in zip(files, plans, strict=True)]
    firsts = {place: _facts_of_stage(place) for place in {*before} if place}
    learned = [known_of(info, file) for info, file in zip(infos, files, strict=True)]
    judged = quality_of(infos[0], files[0])

    def each(values: Iterable[Any]) -> Any:
        """What all networks have in common, else that of each kind of them."""
        found = [value for value, _ in itertools.groupby(values)]
        return found[0] if len(found) == 1 else found

    rules = infos[0].get("postprocessing", []) if stored is None else stored
    known = {
        "networks": len(files),
        "network": each(f"{spec.get('name')} in {spec.get('spatial_dims')}D" for spec in specs),
        "options": each(spec.get("options") for spec in specs),
        "bases of layers": each(spec.get("bases") for spec in specs),
        "channels": plan.get("channel_names"),
        "classes": infos[0].get("labels"),
        "regions": plan.get("regions"),
        "spacing": each(plan.get("spacing") for plan in plans),
        "first stage": each(firsts[place] for place in before if place),
        "patch size": each(plan.get("patch_size") for plan in plans),
        "normalization": [how["scheme"] for how in plan.get("normalization") or [] if "scheme" in how],
        "mirror axes": each(plan.get("mirror_axes") for plan in plans),
        "post-processing": rules,
        "temperature": each(one.get("temperature") for one in learned),
        "expected Dice by": f"{judged['cases']} unseen cases" if judged else None,
        "trained on": plan.get("dataset_name"),
        "folds": [info["fold"] for info in infos if info.get("fold") is not None],
        "versions": infos[0].get("versions"),
        "digests": {str(file): file_digest(file) for file in files},
    }
    return {key: value for key, value in known.items() if value not in (None, [], {})}


def _stage_before(file: Path, plan: Mapping[str, Any]) -> Path | None:
    return first_stage_of(file, name) if (name := plan.get("previous_stage")) else None


def _facts_of_stage(place: Path) -> dict[str, Any]:
    """What `facts_of_model` tells of a stage before networks."""
    facts = facts_of_model(place)
    return {key: facts[key] for key in ("networks", "network", "spacing", "patch size", "digests")}
