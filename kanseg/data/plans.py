"""The kinds of plan, and reading one without knowing its kind; likewise data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kanseg.data.cases import Dataset
from kanseg.data.class_plan import ClassPlan
from kanseg.data.image_classes import ImageClasses, read_classes
from kanseg.data.plan import Plan, planned_dataset
from kanseg.data.stored_plan import named_errors
from kanseg.errors import UserError, did_you_mean

PLANS: dict[str, type[Plan] | type[ClassPlan]] = {plan.task: plan for plan in (Plan, ClassPlan)}
AnyPlan = Plan | ClassPlan


def plan_from_dict(values: Mapping[str, Any]) -> AnyPlan:
    """A plan of the kind that it says it is; without a word it is one of segmentation."""
    task = values.get("task", Plan.task)
    if task not in PLANS:
        raise UserError(f"The plan is for the unknown task '{task}'.{did_you_mean(str(task), PLANS)}")
    return PLANS[task].from_dict(dict(values))


def load_plan(path: Path | str) -> AnyPlan:
    """Read a plan.json of either kind."""
    return named_errors(path, plan_from_dict)


def dataset_of(plan: AnyPlan, run: Path | None = None) -> Dataset:
    """The data set of a plan, read as it was for planning in the folder `run`."""
    if not Path(plan.data).exists():
        raise UserError(
            f"The data of this run, {plan.data}, are gone. Bring them back; if they moved: kanseg train DATA -o "
            f"{run or 'RUN'} --resume."
        )
    if isinstance(plan, ClassPlan):
        return read_classes(plan.data, id_pattern=plan.id_pattern)
    return planned_dataset(plan, run)


__all__ = [
    "PLANS",
    "AnyPlan",
    "ClassPlan",
    "ImageClasses",
    "Plan",
    "dataset_of",
    "load_plan",
    "plan_from_dict",
]
