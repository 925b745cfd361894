"""Cross-validation: every fold in turn, and what its cases, each predicted by a network that never saw it, tell.

RUN/cross_validation.json has the pooled scores, cross_validation.csv a row a case and class, postprocessing.json the
rules that raise the Dice of these predictions; `kanseg predict -m RUN` applies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kanseg.config import Config, with_options
from kanseg.data.cases import Case, Dataset, label_path
from kanseg.data.images import label_from, read_image, read_label
from kanseg.data.labels import class_values, painted, unions
from kanseg.data.loaders import Prepared
from kanseg.data.plans import AnyPlan, Plan
from kanseg.data.sizing import CACHE_SHARE
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.class_tables import PREDICTIONS as CLASS_TABLE
from kanseg.evaluation.classification import SCORES, Scored, read_scored
from kanseg.evaluation.metrics import (
    evaluate_case,
    label_dice,
    part_rows,
    summarize_rows,
    summarize_unions,
    write_tables,
)
from kanseg.files import locked, read_json, write_json
from kanseg.inference.postprocess import apply_postprocessing, choose_postprocessing, save_rules
from kanseg.memory import for_data, give_back
from kanseg.progress import is_main, progress, say
from kanseg.training.calibrate import conclude_calibration
from kanseg.training.checkpoint import LAST
from kanseg.training.fit import fit
from kanseg.training.parallel import once
from kanseg.training.run_folder import PREDICTIONS, SUMMARY, Splits, check_weights, run_config, run_splits
from kanseg.training.validate import kept_prediction

RESULT, TABLE = "cross_validation.json", "cross_validation.csv"
Where = Mapping[str, Path]  # label map of each case


def cross_validate(
    config: Config,
    plan: AnyPlan,
    dataset: Dataset,
    run: Path | str,
    *,
    resume: bool = False,
    override: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every fold, pool the predictions of their validation cases, and choose post-processing by them.

    Of a cascade its first stage is cross-validated before.

    A fold that fails is reported, the others go on. Finished folds are left alone when resuming.

    Returns:
        "folds" (summary of each), "failed" (message of each fold that failed), "metrics" (class -> metric -> mean,
        95 % interval by patient), "unions" (the like, see `kanseg.data.labels.unions`), "postprocessing" and the mean
        Dice without it. Of classifiers, in place of the last four, "scores" (score -> mean and standard deviation over
        the folds), "held_out" and "pooled", the scores of all held-out images together (see `pool_classes`).

    Raises:
        UsageError: a fold holds a training and nobody said to resume it.
        UserError: every fold failed, or the run folder is in use.
    """
    run, console = Path(run), console or Console()
    config = for_folds(config)
    splits = run_splits(dataset, config, run)
    trained = [path.parent.name for path in sorted(run.glob(f"fold_*/{LAST}"))]
    if trained and not resume:
        raise UsageError(
            f"{run} holds a training already ({trained[0]}). Go on with --resume, or choose another."
        )
    run.mkdir(parents=True, exist_ok=True)
    failed: dict[int, str] = {}
    folds: dict[int, dict[str, Any]] = {}
    prepared = Prepared(plan) if isinstance(plan, Plan) else None
    with locked(run, is_main()):
        if isinstance(plan, Plan) and plan.previous_stage:
            from kanseg.training.cascade import train_first_stage  # which cross-validates

            again: dict[str, Any] = {"resume": resume, "override": override}
            stored = run_config(config, run, 0, **again)
            train_first_stage(stored, plan, dataset, run, splits, console=console, **again)
        for fold in range(len(splits)):
            console.print(f"Fold {fold} of {len(splits)}", highlight=False)
            try:
                how: dict[str, Any] = {"resume": True, "override": override, "console": console}
                folds[fold] = fit(config, plan, dataset, run, fold=fold, prepared=prepared, **how)
            except UsageError:
                raise
            except Exception as error:  # whatever it was, the other folds go on
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                failed[fold] = f"{kind}{error}"
                say(console, f"Fold {fold} failed: {failed[fold]}")
            give_back()
        prepared = None
        if not folds:
            raise UserError(f"Every fold of {run} failed, the first by: {failed[0]}")
        facts = {"folds": folds, "failed": failed}
        if not isinstance(plan, Plan):
            return once(lambda: _conclude_classes(run, dataset, config.data.seed, **facts))
        unseen = held_out(run, splits, plan, dataset)
        return once(lambda: conclude(run, plan, dataset, unseen, splits, [run], **facts))


def for_folds(config: Config) -> Config:
    """The options that folds of a cross-validation are trained with."""
    return with_options(config, "training", named=True, final_validation=True)


def finished(run: Path, splits: Splits) -> dict[str, Any] | None:
    """The result of a cross-validation whose folds are all trained; None where one is missing, failed or newer.

    Raises:
        UserError: best weights of a fold are damaged.
    """
    folds = [run / f"fold_{fold}" for fold in range(len(splits))]
    done = read_json(run / RESULT) if all((fold / SUMMARY).exists() for fold in folds) else None
    if done is None or done["failed"]:
        return None
    for number, fold in enumerate(folds):
        check_weights(fold)
        if done["folds"].get(str(number)) != read_json(fold / SUMMARY):
            return None  # it was trained anew, and a kill came before the result
    return done


def _conclude_classes(run: Path, dataset: Dataset, seed: int, **facts: Any) -> dict[str, Any]:
    pooled = pool_classes(run, dataset)
    pooled.write(run / TABLE)
    found = {**facts, "scores": spread_of(list(facts["folds"].values())), "pooled": pooled.scores(seed)}
    found["held_out"] = next(iter(facts["folds"].values()))["held_out"]
    write_json(run / RESULT, found)
    return found


def pool_classes(run: Path, dataset: Dataset) -> Scored:
    """The held-out images of all finished folds; those of several (the test images) by their mean probability.

    Raises:
        UserError: no fold is finished, or they do not tell the same classes.
    """
    tables = [
        fold / PREDICTIONS / CLASS_TABLE
        for fold in sorted(run.glob("fold_[0-9]*"))
        if (fold / SUMMARY).exists()
    ]
    found = [read_scored(table) for table in tables if table.exists()]
    if not found:
        raise UserError(
            f"{run} holds no scored images: no fold is trained to its end. Go on: kanseg train {run} -f all --resume."
        )
    if any((one.names, one.multilabel) != (found[0].names, found[0].multilabel) for one in found):
        raise UserError(f"The folds of {run} do not tell the same classes. Train them anew.")
    rows: dict[str, list[np.ndarray]] = {}
    values: dict[str, tuple[int, ...]] = {}
    for one in found:
        for name, row, value in zip(one.ids, one.probabilities, one.values, strict=True):
            rows.setdefault(name, []).append(row)
            values[name] = value
    patients = {case.id: case.group for case in (*dataset.cases, *dataset.test_cases)}
    return Scored(
        list(rows),
        np.stack([np.mean(several, axis=0) for several in rows.values()]),
        found[0].names,
        list(values.values()),
        [patients.get(name, name) for name in rows],
        found[0].multilabel,
    )


def spread_of(folds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the folds of each score of classifiers (see `class_scores`)."""
    names = [name for name in SCORES if all(fold.get(name) is not None for fold in folds)]
    values = {name: np.array([fold[name] for fold in folds], dtype=float) for name in names}
    return {name: {"mean": float(v.mean()), "std": float(v.std())} for name, v in values.items()}


def held_out(run: Path, splits: Splits, plan: Plan, dataset: Dataset) -> dict[str, Path]:
    """Label map of each validation case of the finished folds, by case."""
    cases = {case.id: case for case in dataset.cases}
    return {
        name: kept_prediction(folder / PREDICTIONS, cases[name], plan)
        for fold, names in enumerate(splits)
        if (folder := run / f"fold_{fold}") and (folder / SUMMARY).exists()
        for name in names["val"]
    }


def conclude(
    folder: Path,
    plan: Plan,
    dataset: Dataset,
    predictions: Where,
    splits: Splits,
    runs: Sequence[Path],
    **facts: Any,
) -> dict[str, Any]:
    """What `pool` finds, with further facts, and what calibrates predictions of the runs, written to a folder."""
    found = pool(plan, dataset, predictions)
    conclude_calibration(folder, plan, found["rows"], splits, runs)
    write_tables(folder, TABLE, found.pop("rows"), found.pop("union_rows"))
    save_rules(folder, found["postprocessing"])
    write_json(folder / RESULT, {**facts, **found})
    return {**facts, **found}


def pool(plan: Plan, dataset: Dataset, predictions: Where) -> dict[str, Any]:
    """Post-processing chosen by predictions of unseen cases, and their scores after it."""
    cases = [case for case in dataset.cases if case.id in predictions]
    seen, names = Seen(cases, predictions, plan), class_values(plan)
    wanted: dict[str, tuple[int, ...]] = {**names, **unions(plan)}
    room = for_data(plan.memory_bytes)
    memory = int(CACHE_SHARE * room) if room else None
    pairs = ((ours, theirs, spacing) for _, ours, theirs, spacing in progress(seen, "Reading predictions"))
    rules = choose_postprocessing(pairs, plan.label_values[1:], memory, plan.ignore_value)
    scored: list[dict[str, Any]] = []
    plain = []
    for case, prediction, reference, spacing in progress(seen, "Scoring"):
        plain.append(np.mean(label_dice(prediction, reference, plan)))
        done = apply_postprocessing(prediction, rules, spacing)
        if plan.ignore_value is not None:
            done, reference = (np.where(reference == plan.ignore_value, 0, m) for m in (done, reference))
        scores = evaluate_case(done, reference, spacing, list(wanted.values()))
        scored += [{"case": case.id, "label": name, **scores[values]} for name, values in wanted.items()]
    rows, together = part_rows(scored, names)
    patients = {case.id: case.group for case in cases}
    return {
        "cases": len(cases),
        "metrics": summarize_rows(rows, groups=patients),
        "unions": summarize_unions(together, groups=patients),
        "postprocessing": rules,
        "dice_without_postprocessing": float(np.mean(plain)),
        "rows": rows,
        "union_rows": together,
    }


class Seen:
    """Each case with its prediction, reference and spacing, read anew at each walk: they need not fit into memory.

    Regions are painted in the reference as predictions are; voxels with the ignore label keep it.
    """

    def __init__(self, cases: Sequence[Case], predictions: Where, plan: Plan) -> None:
        self.cases, self.predictions, self.plan = cases, predictions, plan

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[tuple[Case, np.ndarray, np.ndarray, Sequence[float]]]:
        for case in self.cases:
            reference = read_label(label_path(case), self.plan.image_dims)
            image = read_image(self.predictions[case.id], self.plan.image_dims)
            prediction = label_from(image)
            known = reference != self.plan.ignore_value
            yield case, prediction, np.where(known, painted(reference, self.plan), reference), image.spacing
