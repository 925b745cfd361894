"""The tasks that a training can have, by the plan that it goes by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from kanseg.config import Config
from kanseg.data.cases import Case, Dataset
from kanseg.data.loaders import Prepared
from kanseg.data.plans import AnyPlan
from kanseg.training.classification import Classification
from kanseg.training.segmentation import Segmentation
from kanseg.training.task import Task


def _segmentation(shared: Sequence[Any], dataset: Any, accelerator: Accelerator, prepared: Any) -> Task:
    return Segmentation(*shared, prepared=prepared)


def _classification(shared: Sequence[Any], dataset: Any, accelerator: Accelerator, prepared: Any) -> Task:
    return Classification(*shared, dataset=dataset, main=accelerator.is_main_process)


TASKS: dict[str, Callable[..., Task]] = {"segmentation": _segmentation, "classification": _classification}


def create_task(
    config: Config,
    plan: AnyPlan,
    dataset: Dataset,
    training: Sequence[Case],
    validation: Sequence[Case],
    accelerator: Accelerator,
    prepared: Prepared | None = None,
) -> Task:
    """The task of a plan, over the cases of a fold; volumes and pictures may be `prepared` for several folds."""
    shared = (config, plan, training, validation, accelerator.device)
    return TASKS[plan.task](shared, dataset, accelerator, prepared)
