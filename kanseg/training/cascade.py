"""The first stage of a cascade before its second: all folds of it, and what they say of cases that they did not see.

RUN/lowres is a run folder of its own, RUN that of the second stage, with the same folds. The second stage trains on and
validates by label maps of the first that are its validation's, so none is by a network that trained on the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kanseg.config import Config, read_config
from kanseg.data.cases import Case, Dataset, few
from kanseg.data.plan import Plan
from kanseg.errors import UserError, each
from kanseg.files import make_folder, write_json
from kanseg.progress import say
from kanseg.training.cross_validation import cross_validate, finished, for_folds
from kanseg.training.fit import fitting_model
from kanseg.training.parallel import once
from kanseg.training.run_folder import CONFIG, PLAN, PREDICTIONS, SPLITS, Splits, prepare_run, read_splits
from kanseg.training.validate import kept_prediction


def train_first_stage(
    config: Config,
    plan: Plan,
    dataset: Dataset,
    run: Path,
    splits: Splits,
    *,
    resume: bool,
    override: bool,
    console: Console | None,
) -> None:
    """Train all folds of the stage before a plan, unless they are trained already.

    Args:
        config: of both stages.
        run: folder of the second stage.
        splits: of the second stage.
        resume, override, console: see `cross_validate`.

    Raises:
        UserError: a case that validates in no fold, other folds in the first stage, a fold that failed, or damaged
            weights of one.
    """
    assert plan.previous_stage is not None
    first = run / plan.previous_stage
    _require_splits(splits, dataset, run, first)
    if once(lambda: finished(first, splits) is None or (override and _other_options(config, first))):
        fitting_model(config, plan, run / "fold_0")  # or a stage would be trained for one that cannot be
        once(lambda: _prepare(config, plan, splits, run, first))
        console = console or Console()
        how: dict[str, Any] = {"resume": resume, "override": override, "console": console}
        say(console, f"First stage of the cascade: {first}")
        done = cross_validate(config, Plan.load(first / PLAN), dataset, first, **how)
        if done["failed"]:
            raise UserError(
                f"Folds of the first stage, {first}, failed ({each(done['failed'], 'fold ')}). The second needs them "
                "all. Go on with --resume."
            )
        say(console, f"Second stage of the cascade: {run}")


def seen_before(cases: Sequence[Case], plan: Plan, run: Path, splits: Splits, fold: int | str) -> list[Case]:
    """Cases with the label maps of the stage before a plan, each by the network of a fold that it validated in.

    Args:
        run: folder of the second stage.
        fold: that is trained: its validation cases are taken from it, others from the first fold that they are in.
    """
    assert plan.previous_stage is not None
    folds = {name: number for number in reversed(range(len(splits))) for name in splits[number]["val"]}
    if isinstance(fold, int):
        folds |= dict.fromkeys(splits[fold]["val"], fold)
    first = run / plan.previous_stage
    kept = {case.id: first / f"fold_{folds[case.id]}" / PREDICTIONS for case in cases}
    return [replace(case, previous=kept_prediction(kept[case.id], case, plan)) for case in cases]


def _other_options(config: Config, first: Path) -> bool:
    """Whether a first stage was cross-validated by others; the folds of the second ask one after the other."""
    return read_config(first / CONFIG).model_dump() != for_folds(config).model_dump()


def _require_splits(splits: Splits, dataset: Dataset, run: Path, first: Path) -> None:
    known = {name for fold in splits for name in fold["val"]}
    if missing := [case.id for case in dataset.cases if case.id not in known]:
        raise UserError(
            f"A cascade needs folds in which every case validates: its second stage learns from what the first says of "
            f"cases that it did not see. In no fold: {few(missing, 5)}. Plan without --cascade, or let kanseg make the "
            "folds."
        )
    if (there := read_splits(first)) and there != splits:
        raise UserError(
            f"{first / SPLITS} and {run / SPLITS} have other folds, and both stages need the same. Copy the one that "
            "was trained by over the other, or give the data.folds and data.seed that it was made with."
        )


def _prepare(config: Config, plan: Plan, splits: Splits, run: Path, first: Path) -> None:
    """Write what a resumed run goes on with, and the folds of both stages."""
    prepare_run(config, plan, splits, run)
    write_json(make_folder(first) / SPLITS, splits)
