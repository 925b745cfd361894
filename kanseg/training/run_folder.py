"""The run folder: config.json, plan.json and splits.json are shared by the folds in fold_0, fold_1 ..."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kanseg.config import Config, read_config, resumed_config, unlike
from kanseg.data.cases import Case, Dataset, few
from kanseg.data.digests import file_digest, signature
from kanseg.data.fingerprint import check_unchanged, load_fingerprint
from kanseg.data.plans import AnyPlan
from kanseg.data.splits import check_leaks, split
from kanseg.errors import UsageError, UserError
from kanseg.files import parse_json, read_json, write_json
from kanseg.training.checkpoint import BEST, LAST, load_description, read_info

CONFIG, PLAN, SPLITS, SUMMARY = "config.json", "plan.json", "splits.json", "summary.json"
PREDICTIONS = "validation"  # label maps of a fold's validation cases, by a network that never saw them
ALL, FINAL = "all", "final"  # every fold in turn; a training on every case
WHOLE = f"fold_{FINAL}"  # folder of the latter
WEIGHTS = "weights"  # in a summary, the digest of the best weights
FINAL_MODEL = "model"  # in the folder of `kanseg run`, what it chose
Splits = list[dict[str, list[str]]]


def require_plan(run: Path, otherwise: str) -> None:
    """Raise where a folder is missing or has no plan, with the trainings in it where it is one of `kanseg run`."""
    if not run.exists():
        raise UserError(f"There is no {run}. Give a folder that `kanseg plan` made.")
    trainings = [str(path.parent) for path in sorted(run.glob(f"*/{PLAN}"))]
    if not (run / PLAN).exists():
        hint = f"Its trainings are {', '.join(trainings)}; give one of them." if trainings else otherwise
        raise UsageError(f"{run} has no {PLAN}. {hint}")


def stages(run: Path) -> list[Path]:
    """A planned run folder, and where it is the second stage of a cascade, that of the first."""
    previous = (read_json(run / PLAN) or {}).get("previous_stage")
    return [run, run / previous] if isinstance(previous, str) else [run]


def run_config(config: Config, run: Path, fold: int | str, resume: bool, override: bool = False) -> Config:
    """The options to train with: the given ones, or the stored ones where a training is resumed.

    Raises:
        UsageError: the fold holds a training and nobody said to resume it, or options differ from before.
    """
    trained = (run / f"fold_{fold}" / LAST).exists()
    if trained and not resume:
        raise UsageError(
            f"{run / f'fold_{fold}'} holds a training already. Go on with --resume, or choose another folder."
        )
    begun = stages(run) if (run / CONFIG).exists() else [run]  # a first stage may have been trained by itself
    folds = [path.parent for stage in begun for path in sorted(stage.glob(f"fold_*/{LAST}"))]
    others = [str(fold.relative_to(run)) for fold in folds]
    if trained or (others and resume):
        return resumed_config(run / CONFIG, config, override)
    if others and not override and (changed := unlike(read_config(run / CONFIG), config)):
        raise UsageError(
            f"{others[0]} in {run} was trained with other options ({', '.join(changed)}; see {run / CONFIG}). "
            "Give the same ones, say --override, or choose another run folder."
        )
    return config


def run_splits(dataset: Dataset, config: Config, run: Path, fold: int | str = 0) -> Splits:
    """The folds of RUN/splits.json where it exists (also one written by hand), else new ones by patient.

    Raises:
        UserError: the data are not those of the plan, or a fold trains on a patient that it validates on.
    """
    check_unchanged(dataset, run)
    same = (load_fingerprint(run) or {"same": []})["same"]
    splits = read_splits(run)
    if splits:
        check_leaks(splits, dataset, same)
    elif fold != FINAL:  # which needs none, and there may be too few patients
        splits = split(dataset, folds=config.data.folds, seed=config.data.seed, same=same)
    return splits


def read_splits(run: Path) -> Splits:
    """The folds of RUN/splits.json, none where there is no such file."""
    path = run / SPLITS
    if not path.exists():
        return []
    splits = parse_json(
        path,
        "a list of folds with 'train' and 'val'",
        "Correct or delete it.",
        lambda read: [{"train": list(fold["train"]), "val": list(fold["val"])} for fold in read],
    )
    if not splits:
        raise UserError(f"{path} holds no fold. Correct or delete it.")
    return splits


def check_fold(fold: int | str, count: int) -> None:
    """Raise `UsageError` unless it is one of so many folds."""
    if not isinstance(fold, int) or not 0 <= fold < count:
        raise UsageError(f"There is no fold {fold}. Folds are 0 ... {count - 1}, '{ALL}' and '{FINAL}'.")


def fold_cases(splits: Splits, dataset: Dataset, fold: int | str) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of a fold; fold "final" trains on every case.

    Raises:
        UsageError: there is no such fold.
        UserError: the split names cases that the data set does not have, or the fold has nothing to train on.
    """
    if fold == FINAL:
        return list(dataset.cases), []
    check_fold(fold, len(splits))
    assert isinstance(fold, int)
    cases = {case.id: case for case in dataset.cases}
    names = [*splits[fold]["train"], *splits[fold]["val"]]
    unknown = [name for name in names if name not in cases]
    if unknown:
        raise UserError(
            f"{SPLITS} of the run names cases that {dataset.root} does not have: {', '.join(unknown[:4])}. "
            "Delete that file to split anew, or choose another run folder."
        )
    if not splits[fold]["train"]:
        raise UserError(
            f"Fold {fold} of {dataset.root} has no training case. Give more cases or fold '{FINAL}'."
        )
    training, validation = ([cases[name] for name in splits[fold][key]] for key in ("train", "val"))
    return training, validation


def check_weights(fold: Path) -> None:
    """Raise `UserError` unless the best weights of a finished fold are those that its summary tells of, and whole."""
    file, digest = fold / BEST, (read_json(fold / SUMMARY) or {}).get(WEIGHTS)
    try:
        load_description(file)
        whole = digest in (None, file_digest(file))  # runs that began before tell no digest
    except UserError:
        whole = False
    if not whole:
        raise UserError(
            f"{file} is damaged: it is not the file that the training ended with. Put it back from a copy, or delete "
            f"{fold} and go on as before, to train that fold again."
        )


def prepare_run(config: Config, plan: AnyPlan, splits: Splits, run: Path) -> None:
    """Write what the folds share."""
    write_json(run / CONFIG, config.model_dump())
    if splits:
        write_json(run / SPLITS, splits)
    plan.save(run / PLAN)


def check_data(plan: AnyPlan, dataset: Dataset) -> None:
    """Raise `UserError` if the plan was made for data of another kind."""
    wanted = {
        "spatial_dims": (plan.image_dims, dataset.spatial_dims),
        "channel_names": (plan.channel_names, dataset.channel_names),
        "label_values": (plan.label_values, dataset.label_values),
        "regions": (plan.regions, dataset.regions),
        "ignore_value": (plan.ignore_value, dataset.ignore_value),
    }
    for what, pair in wanted.items():
        planned, found = (json.loads(json.dumps(value)) for value in pair)
        if planned != found:
            raise UserError(
                f"The plan does not fit {dataset.root}: its {what} is {planned}, the data's {found}. "
                "Plan this data set in a run folder of its own."
            )


def training_images(checkpoints: Iterable[Path], cases: Sequence[Case]) -> list[str]:
    """Ids of the cases that some of the networks were trained on, by the digests that their runs keep.

    A model that stands alone keeps none.
    """
    known: dict[int, set[str]] = {}  # by size, so that few files need a digest
    for file in checkpoints:
        own = file.resolve().parents[1]
        for run in (own, *(own.parent.glob("*/") if own.name == FINAL_MODEL else ())):
            for seen in _trained_on(run, read_info(file).get("fold")):
                known.setdefault(seen["bytes"], set()).add(seen["sha256"])

    def is_known(path: Path) -> bool:
        digests = known.get(signature(path)["bytes"], ()) if path.exists() else ()
        return bool(digests) and file_digest(path) in digests

    return [case.id for case in cases if any(map(is_known, case.images))]


def _trained_on(run: Path, fold: int | str | None) -> list[dict[str, Any]]:
    """The files that a fold of a run was trained on: all, where no split says which."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):  # what is damaged tells nothing
        cases = (load_fingerprint(run) or {"cases": {}})["cases"]
        names = list(cases)
        if isinstance(fold, int) and (run / SPLITS).exists():
            names = read_splits(run)[fold]["train"]
        return [file for name in names if name in cases for file in cases[name]["files"].values()]
    return []


def on_training_images(seen: Sequence[str], count: int) -> str:
    """What to say where so many images are predicted and some were trained on."""
    which = "these images" if len(seen) == count else f"{len(seen)} of these images ({few(seen, 3)})"
    return (
        f"note: the networks were trained on {which}, and scores of them are too good. Unseen ones are in "
        "fold_*/validation of the run."
    )
