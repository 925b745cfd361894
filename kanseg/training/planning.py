"""From data to a plan in a run folder, told as it goes: what `kanseg plan`, `kanseg train` and `Segmenter.fit` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kanseg.config import Config
from kanseg.data.cases import Dataset, few
from kanseg.data.class_plan import plan_classes
from kanseg.data.findings import Finding
from kanseg.data.fingerprint import check_unchanged, fingerprint
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.image_classes import is_classes, read_classes
from kanseg.data.labels import parse_regions
from kanseg.data.mirror import parse_mirror
from kanseg.data.plan import Plan, check_size
from kanseg.data.planner import check_wishes, plan_run
from kanseg.data.plans import AnyPlan, dataset_of, load_plan
from kanseg.data.sizing import Need
from kanseg.errors import UsageError, UserError
from kanseg.memory import size_in_bytes
from kanseg.progress import say
from kanseg.training.run_folder import PLAN, check_fold, stages
from kanseg.training.trial import measure_step

SHOWN = 20  # findings of the doctor; all of them are in doctor.json


def plan_data(
    data: Path,
    run: Path,
    *,
    console: Console,
    dim: int | None = None,
    memory: int | str | None = None,
    size: str = "standard",
    slices: int = 1,
    mirror: Sequence[int] | str | None = None,
    regions: Mapping[str, Sequence[int]] | str | None = None,
    cascade: bool = False,
    id_pattern: str | None = None,
    trial: bool = True,
    same: Sequence[tuple[str, str]] | None = None,
    config: Config | None = None,
) -> AnyPlan:
    """Read, plan, say what was decided and why, and write plan.json and fingerprint.json.

    Args:
        dim, size, slices: see `kanseg.data.planner.make_plan`; mirror, regions and memory (bytes) too, or as words of
            the command line, e.g. "8G". cascade: see `kanseg.data.planner.plan_run`.
        id_pattern: see `kanseg.data.formats.read_dataset`.
        trial: measure the memory of a step.
        same: see `kanseg.data.class_plan.plan_classes`.
        config: of the training that follows, whose options are checked before a step is measured.
    """
    check_size(size)
    memory = size_in_bytes(memory)
    mirror = parse_mirror(mirror) if isinstance(mirror, str) else mirror
    regions = parse_regions(regions) if isinstance(regions, str) else regions
    if is_classes(data):
        if dim or size != "standard" or slices != 1 or mirror is not None or regions or memory or cascade:
            raise UsageError(
                f"{data} has a class for each image; --dim, --slices, --size, --memory, --mirror, --regions and "
                "--cascade are for segmentation. The network is chosen by model.options, the batch by "
                "training.batch_size."
            )
        classes = read_classes(data, id_pattern=id_pattern)
        counts = Counter(number for case in classes.cases for number in case.values)
        shown = few([f"{name} ({counts[number]})" for number, name in enumerate(classes.label_names)], 12)
        _tell(console, classes, f"{len(classes.label_names)} classes (images): {shown}")
        plan: AnyPlan = plan_classes(classes, run, same=same)
    else:
        named = None if regions is None else {name: list(values) for name, values in regions.items()}
        with told_by_doctor(data):
            dataset = read_dataset(data, id_pattern=id_pattern, regions=named)
        patients = len({case.group for case in dataset.cases})
        found = f"{len(dataset.cases)} labelled images of {patients} patients"
        _tell(console, dataset, f"{found}; {few(dataset.label_names)}")
        how: dict[str, Any] = {"dim": dim, "memory": memory, "size": size, "slices": slices, "mirror": mirror}
        how["cascade"] = cascade
        how |= {"regions": named, "measure": measuring(config) if trial else None}
        check_wishes(dataset, **how)
        with told_by_doctor(data):
            seen = fingerprint(dataset)
        plan = plan_run(dataset, run, seen=seen, **how)
    for reason in reasons(plan, run):
        say(console, f"- {reason}")
    return plan


def reasons(plan: AnyPlan, run: Path) -> list[str]:
    """Why a run is planned as it is; of a cascade its first stage before."""
    return [reason for first in stages(run)[1:] for reason in load_plan(first / PLAN).reasons] + plan.reasons


def follow_data(data: Path, run: Path) -> None:
    """Let a run go on with data that have moved to `data`: its plan names them, if they are the files that it knew.

    Raises:
        UserError: they are others.
    """
    plan = load_plan(run / PLAN)
    if data.resolve() == run.resolve() or not data.exists() or Path(plan.data).exists():
        return
    moved = replace(plan, data=str(data.resolve()))
    check_unchanged(dataset_of(moved, run), run)
    for first in stages(run)[1:]:
        follow_data(data, first)
    moved.save(run / PLAN)


@contextmanager
def told_by_doctor(data: Path) -> Iterator[None]:
    """An error in the data, which is the first of perhaps many, names the verb that tells them all."""
    try:
        yield
    except UsageError:
        raise
    except UserError as error:
        if not data.exists() or "kanseg doctor" in str(error):
            raise
        raise UserError(
            f"{error} kanseg doctor {data} tells all that is wrong, and with --fix OUT repairs what it can."
        ) from error


def measuring(config: Config | None) -> Callable[[Plan], Need]:
    """`measure_step`, for plans whose network takes the options of a training."""
    if config is None:
        return measure_step
    from kanseg.training.fit import check_network

    def measure(plan: Plan) -> Need:
        check_network(config, plan)
        return measure_step(plan)

    return measure


def tell_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print what the doctor found, the first of many."""
    for finding in findings[:SHOWN]:
        case = f"{finding.case}: " if finding.case else ""  # else it concerns all
        say(console, f"- {case}{finding.message}")


def require_fold(data: Path, fold: int | str, config: Config) -> None:
    """Raise `UsageError` where a split of the data would not have this fold; no image is read."""
    if isinstance(fold, int) and fold >= config.data.folds and not is_classes(data):
        check_fold(fold, len(list_dataset(data).splits) or config.data.folds)


def _tell(console: Console, dataset: Dataset, found: str) -> None:
    console.print(Text.assemble((dataset.name, "bold"), f": {dataset.layout}"), highlight=False)
    say(console, found)
