"""Search of hyper-parameters on Ray Tune with Optuna's sampler: trials that fall behind are ended early.

RUN/search/ holds Ray's own state, a run folder for each trial in trials/, trials.csv and best.json. A search that was
stopped goes on where it stood, its trials from their last checkpoints. One machine by default; the environment
variable RAY_ADDRESS names a cluster, whose machines must see the same files.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from kanseg.config import changes, load_config
from kanseg.data.fingerprint import FINGERPRINT
from kanseg.data.plans import AnyPlan, dataset_of, load_plan, plan_from_dict
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import locked, make_folder, read_json, write_bytes, write_json, write_text
from kanseg.progress import say
from kanseg.training.fit import fit
from kanseg.training.monitor import LOG, read_log
from kanseg.training.run_folder import SPLITS, require_plan
from kanseg.training.stop import INTERRUPTED, sigterm_by

KINDS = {"uniform": 2, "loguniform": 2, "randint": 2, "choice": None}  # of tune: number of values
EXAMPLE = "training.lr=loguniform(1e-4,1e-2) or model.options.basis=choice(gram,legendre)"


def parse_space(words: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, list[Any]]]]:
    """Part what is fixed from what is searched.

    >>> parse_space(["data.folds=3", "training.lr=loguniform(1e-4,1e-2)"])
    (['data.folds=3'], {'training.lr': ('loguniform', [0.0001, 0.01])})
    """
    fixed, space = [], {}
    for word in words:
        key, _, value = word.partition("=")
        match = re.fullmatch(r"(\w+)\((.*)\)", value)
        if match is None:
            fixed.append(word)
            continue
        kind, values = match[1], [_value(text) for text in match[2].split(",")]
        if kind not in KINDS:
            raise UsageError(f"Unknown search space '{kind}'.{did_you_mean(kind, KINDS)}")
        numbers = all(isinstance(v, int | float) for v in values)
        if KINDS[kind] is not None and (len(values) != KINDS[kind] or not numbers or values[0] >= values[1]):
            raise UsageError(f"'{word}' needs two rising numbers, e.g. {EXAMPLE}.")
        space[key] = (kind, values)
    return fixed, space


def search(
    run: Path | str,
    words: Sequence[str],
    *,
    trials: int = 20,
    concurrent: int = 1,
    fold: int = 0,
    config: str = "default",
    prune: bool = True,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Try options on one fold of a planned run; a higher score of its validations (Dice, accuracy, AUC) is better.

    Args:
        run: a folder with plan.json.
        words: overrides, of which at least one is a space: uniform(a,b), loguniform(a,b), randint(a,b), choice(...).
        concurrent: trials at the same time; each gets its share of the cores, and of the GPUs.
        prune: end trials early whose score is behind that of the others at the same epoch.
        resume: go on with the search that the folder holds.

    Returns:
        {"best": {"overrides", "dice" (or the plan's other metric), "folder"}, "trials": a row each}.

    Raises:
        UsageError: nothing to search, or options that do not fit (found before any trial starts).
        UserError: the extra `ray` is not installed, or no trial came to a validation.
    """
    run, console = Path(run).resolve(), console or Console()
    fixed, space = parse_space(words)
    if not space:
        raise UsageError(f"There is nothing to search. Give e.g. {EXAMPLE}.")
    first = load_config(
        config, [*fixed, *(f"{key}={_text(values[0])}" for key, (_, values) in space.items())]
    )
    require_plan(run, f"Make one: kanseg plan DATA -o {run}.")
    plan = load_plan(run / "plan.json")
    if getattr(plan, "previous_stage", None):
        raise UsageError(
            f"{run} is a cascade, and options are searched for one network. Search in a folder planned without "
            "--cascade, and give what is found to both stages."
        )
    folder = make_folder(run / "search")
    asked = {"words": list(words), "fold": fold, "config": config, "trials": trials, "prune": prune}
    _check_asked(folder, asked, resume)
    with locked(folder):
        write_json(folder / "search.json", asked)
        with _ends_by_ctrl_c() as terminated:
            results = _tune(run, plan, fixed, space, asked, first.training.epochs, concurrent, resume)
        rows = [_row(result, space, folder, fold, plan.metric) for result in results]
    if len(rows) < trials or terminated:  # Ray ends so when it is interrupted
        text = f"{folder} holds {len(rows)} of {trials} trials, the last of them perhaps in part."
        say(console, text)
        raise SystemExit(terminated[0] if terminated else INTERRUPTED)
    score = plan.metric
    rows.sort(key=lambda row: -(row[score] if row[score] is not None else -1.0))
    if not rows or rows[0][score] is None:
        raise UserError(
            f"No trial of {folder} came to a validation: {rows[0]['error'] if rows else 'none ran'}"
        )
    best = {**rows[0], "overrides": [*fixed, *(f"{key}={_text(rows[0][key])}" for key in space)]}
    write_text(folder / "trials.csv", _csv(rows))
    write_json(folder / "best.json", best)
    say(console, f"Best of {len(rows)} trials: {score} {best[score]:.4f} by {' '.join(best['overrides'])}")
    return {"best": best, "trials": rows}


@contextmanager
def _ends_by_ctrl_c() -> Iterator[list[int]]:
    """Within it SIGTERM is taken as the Ctrl-C by which Ray Tune ends in order; given are the exit codes of those that
    came. Ray's own handler of SIGTERM, set when it starts, would abort.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(128 + number)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as jobs in the background have it
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    try:
        with sigterm_by(interrupt):
            yield came
    except KeyboardInterrupt:  # before Ray Tune listens, or a second one
        if came:
            raise SystemExit(came[0]) from None
        raise


def _check_asked(folder: Path, asked: Mapping[str, Any], resume: bool) -> None:
    before = read_json(folder / "search.json")
    if before is None:
        return
    if not resume:
        raise UsageError(f"{folder} holds a search already. Go on with --resume, or delete it.")
    if told := ", ".join(changes(before, asked).values()):
        raise UsageError(f"A resumed search keeps its options: {folder} has {told}. Give the same ones.")


def _tune(
    run: Path,
    plan: AnyPlan,
    fixed: Sequence[str],
    space: Mapping[str, tuple[str, list[Any]]],
    asked: Mapping[str, Any],
    epochs: int | None,
    concurrent: int,
    resume: bool,
) -> Any:
    """Ray's results, one a trial."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    try:
        import optuna
        import ray
        from optuna.samplers import TPESampler
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise UserError(f"A search needs: pip install 'kanseg[ray]' ({error}).") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings(
        "ignore", "The reported value is ignored"
    )  # epochs that a resumed trial tells again
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it would name ways to go on that are not kanseg's
    started_here = not ray.is_initialized()
    if started_here:
        with sigterm_by(signal.getsignal(signal.SIGTERM)):  # for Ray sets a handler of its own, for good
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        job = {"plan": {**plan.to_dict(), "task": plan.task}, "run": str(run), "fixed": list(fixed)}
        job |= {"fold": asked["fold"], "config": asked["config"]}
        trainable = tune.with_resources(tune.with_parameters(_trial, job=job), _share(concurrent))
        state = run / "search" / "ray"
        if resume and tune.Tuner.can_restore(state):
            tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
            return tuner.fit()
        grace = max(1, (epochs or 20) // 4)
        tuner = tune.Tuner(
            trainable,
            param_space={key: getattr(tune, kind)(*_arguments(kind, v)) for key, (kind, v) in space.items()},
            tune_config=tune.TuneConfig(
                metric=plan.metric,
                mode="max",
                search_alg=OptunaSearch(sampler=TPESampler(seed=0)),
                scheduler=ASHAScheduler(time_attr="epoch", max_t=epochs or 10_000, grace_period=grace)
                if asked["prune"]
                else None,
                num_samples=asked["trials"],
                max_concurrent_trials=concurrent,
                trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
            ),
            run_config=tune.RunConfig(name=state.name, storage_path=str(state.parent), verbose=0),
        )
        return tuner.fit()
    finally:
        if started_here:
            ray.shutdown()


def _share(concurrent: int) -> dict[str, float]:
    """Cores and GPUs of a trial, where so many run at the same time."""
    import ray

    kinds = {"CPU": "cpu", "GPU": "gpu"}
    return {kinds[key]: total / concurrent for key, total in ray.cluster_resources().items() if key in kinds}


def _trial(options: dict[str, Any], job: dict[str, Any]) -> None:
    """One trial, in a process of Ray's: a training in a run folder of its own that tells its score after each epoch."""
    from ray import tune

    overrides = [*job["fixed"], *(f"{key}={_text(value)}" for key, value in options.items())]
    config = load_config(job["config"], [*overrides, "training.final_validation=false"])
    plan = plan_from_dict(job["plan"])
    run = Path(job["run"])
    folder = make_folder(run / "search" / "trials" / tune.get_context().get_trial_id())
    for name in (SPLITS, FINGERPRINT):  # the data need no digests of their own in every trial
        if (run / name).exists():
            write_bytes(folder / name, (run / name).read_bytes())

    def tell(record: Mapping[str, Any]) -> None:
        score = record[f"mean_{plan.metric}"]
        if score is not None:
            tune.report({plan.metric: score, "epoch": record["epoch"], "loss": record["loss"]})

    quiet = Console(file=io.StringIO())
    how: dict[str, Any] = {"fold": job["fold"], "resume": True, "console": quiet, "watch": tell}
    fit(config, plan, dataset_of(plan, run), folder, **how)


def _row(result: Any, space: Mapping[str, Any], folder: Path, fold: int, metric: str) -> dict[str, Any]:
    """A trial in numbers; its score is the best of its log, which holds what it did before a stop as well."""
    trial = Path(result.path).name.removeprefix("trial_")
    records = read_log(folder / "trials" / trial / f"fold_{fold}" / LOG)
    scores = [score for record in records if (score := record[f"mean_{metric}"]) is not None]
    return {
        "trial": trial,
        metric: max(scores, default=None),
        "epochs": len(records),
        **{key: (result.config or {}).get(key) for key in space},
        "folder": str(folder / "trials" / trial),
        "error": _why(str(result.error)) if result.error else "",
    }


def _why(error: str) -> str:
    """The line of an error of Ray's that says what it was."""
    if "running low on memory" in error:  # and much advice on Ray after it
        return "the machine's memory was nearly full, so Ray ended it. Free some, or give a smaller --concurrent."
    return error.splitlines()[-1]


def _arguments(kind: str, values: list[Any]) -> list[Any]:
    return [values] if kind == "choice" else values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
