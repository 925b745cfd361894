"""`kanseg run` for images with classes: plan, every fold, report; RUN is then what `kanseg train RUN -f all` makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kanseg.config import Config, with_options
from kanseg.data.class_doctor import diagnose_classes
from kanseg.data.class_plan import ClassPlan
from kanseg.data.plans import dataset_of
from kanseg.errors import UserError
from kanseg.evaluation.classification import score_lines
from kanseg.files import locked, make_folder, write_json
from kanseg.progress import in_words, is_main, say
from kanseg.training.cross_validation import cross_validate
from kanseg.training.parallel import once
from kanseg.training.planning import plan_data, tell_findings
from kanseg.training.run_folder import PLAN
from kanseg.training.run_report import write_report
from kanseg.training.told import DOCTOR, SETTINGS


def run_classes(
    data: Path,
    run: Path,
    config: Config,
    asked: Mapping[str, Any],
    *,
    minutes: float | None = None,
    id_pattern: str | None = None,
    override: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Look at the data, plan, train every fold, report; called again it goes on where it stood.

    Args:
        asked: what the user asked for, already compared with that of an earlier call; kept in RUN/run.json.
        minutes: of training in all, shared out evenly over the folds.

    Returns:
        {"accuracy", "model", "report", "pooled": scores of all held-out images, "failed": reason of each fold}.

    Raises:
        UserError: the data have errors, or every fold failed.
    """
    planned = (run / PLAN).exists()
    same = None if planned else once(lambda: _examined(data, run, id_pattern, console))
    once(lambda: write_json(run / SETTINGS, dict(asked)))
    if not planned:
        once(lambda: plan_data(data, run, console=console, id_pattern=id_pattern, same=same))
    plan = ClassPlan.load(run / PLAN)
    dataset = dataset_of(plan)
    folds = len(dataset.splits) or config.data.folds
    if minutes is not None:
        told = f"{folds} trainings of {in_words(60 * minutes / folds)}" if folds > 1 else "One training"
        console.print(f"{told}; planning, validation and scores take time beside", highlight=False)
        config = with_options(config, "training", max_minutes=minutes / folds, max_epochs=None)
    found = cross_validate(config, plan, dataset, run, resume=True, override=override, console=console)
    report = once(lambda: write_report(run, dataset))
    said = f"{score_lines(found['pooled'])}. Model: {run}. Report: {report}"
    say(console, said)
    failed = {f"fold {fold}": why for fold, why in found["failed"].items()}
    return {
        "accuracy": found["pooled"]["accuracy"],
        "model": str(run),
        "report": str(report),
        "pooled": found["pooled"],
        "failed": failed,
    }


def _examined(
    data: Path, run: Path, id_pattern: str | None, console: Console
) -> list[tuple[str, str]] | None:
    """Copies among the images, of what the doctor finds; all of it in RUN/doctor.json, and errors stop the run."""
    found = diagnose_classes(data, id_pattern=id_pattern)
    tell_findings(found.findings, console)
    if found.errors:
        more = f" and {len(found.errors) - 1} more" if len(found.errors) > 1 else ""
        first = found.errors[0]
        raise UserError(f"{data} has an error: {first.case} {first.message}{more}. See kanseg doctor {data}.")
    with locked(make_folder(run), is_main()):
        write_json(run / DOCTOR, found.to_dict())
    return found.copies
