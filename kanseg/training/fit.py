"""Training: `fit` turns the loop on one fold, from a config, a plan and a data set to a run folder.

RUN/config.json, plan.json and splits.json say what was done; RUN/fold_0/ holds log.jsonl (a line an epoch),
last.safetensors (all that going on needs), best.safetensors (the weights with the highest validation Dice),
validation/ and summary.json (label map and Dice of every validation case at the end), progress.png and manifest.json
(versions, data, hardware, time). A kill at any moment leaves the last complete checkpoint; `resume=True` goes on from
it, on the CPU to the last bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from kanseg.config import Config, check_names
from kanseg.data.cases import Dataset
from kanseg.data.fingerprint import load_fingerprint
from kanseg.data.loaders import Prepared
from kanseg.data.plans import AnyPlan, Plan
from kanseg.errors import UsageError
from kanseg.files import locked, make_folder, read_json
from kanseg.models import check_patch
from kanseg.study.peft import adapt
from kanseg.training.checkpoint import (
    LAST,
    adaptation,
    build_model,
    describe,
    load_checkpoint,
    model_spec,
    unstarted,
)
from kanseg.training.classification import Classification
from kanseg.training.devices import make_accelerator
from kanseg.training.finetune import Ends, check_encoder_channels, read_start, transfer
from kanseg.training.manifest import MANIFEST, Manifest, digests
from kanseg.training.monitor import Monitor, peak_memory_mb
from kanseg.training.parameters import check_trained, shares_of, trained_share
from kanseg.training.regularization import check_penalty
from kanseg.training.run_folder import SUMMARY, check_data, fold_cases, prepare_run, run_config, run_splits
from kanseg.training.segmentation import Segmentation
from kanseg.training.stop import StopRequest
from kanseg.training.task import Task
from kanseg.training.trainer import Trainer


def fit(
    config: Config,
    plan: AnyPlan,
    dataset: Dataset,
    run: Path | str,
    *,
    fold: int | str = 0,
    resume: bool = False,
    override: bool = False,
    console: Console | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Train one fold and return its summary (also in RUN/fold_0/summary.json); of a cascade its first stage before.

    Args:
        fold: number of the fold whose cases validate; "final" trains on every case, without validation. For all
            folds see `kanseg.training.cross_validation`.
        resume: go on from the last checkpoint with the options in RUN/config.json; only those in
            `kanseg.config.CHANGEABLE` may be set anew. Without a checkpoint it starts from the beginning.
        override: take the other options that are given too.
        console: where to report; default standard output.
        watch: called with the record of each epoch; see `Monitor`.
        prepared: cases that other folds use, too.

    Raises:
        UsageError: an unknown name or key, no such fold, a folder that holds a training when not resuming.
        UserError: the folder is in use or cannot be written, or loss or gradient stopped being finite.
        SystemExit: 143 after SIGTERM, with a checkpoint written.
    """
    check_names(config)
    run = Path(run)
    folder = run / f"fold_{fold}"
    config = run_config(config, run, fold, resume, override)
    check_data(plan, dataset)
    staged = getattr(plan, "previous_stage", None) is not None
    splits = run_splits(dataset, config, run, 0 if staged else fold)  # a first stage has folds in any case
    training, validation = fold_cases(splits, dataset, fold)
    if staged and isinstance(plan, Plan):
        from kanseg.training.cascade import seen_before, train_first_stage  # which trains by `fit`

        how: dict[str, Any] = {"resume": resume, "override": override, "console": console}
        train_first_stage(config, plan, dataset, run, splits, **how)
        training, validation = (
            seen_before(cases, plan, run, splits, fold) for cases in (training, validation)
        )
    accelerator = make_accelerator(config.training)
    set_seed(config.seed)
    spec, model, started, fresh = fitting_model(config, plan, folder)  # before anything is written
    main = accelerator.is_main_process
    kind: Callable[..., Task] = Segmentation if isinstance(plan, Plan) else Classification
    own = {"prepared": prepared} if isinstance(plan, Plan) else {"dataset": dataset, "main": main}
    task = kind(config, plan, training, validation, accelerator.device, **own)
    with locked(make_folder(folder) if main else folder, main), StopRequest() as stop:
        if main:  # only now: a folder in use is another training's
            prepare_run(config, plan, splits, run)
        accelerator.wait_for_everyone()
        description = {**describe(config, plan, spec, fold), "fresh": fresh}
        trainer = Trainer(config, task, model, accelerator, folder, stop, description)
        trainer.load()
        quiet = not accelerator.is_main_process
        with Monitor(folder, config, task.metric, console, trainer.state.epoch, quiet) as trainer.monitor:
            trainer.monitor.watch = watch
            if trainer.at_end() and (done := trainer.finished(read_json(folder / SUMMARY))) is not None:
                trainer.monitor.say(f"{folder} is trained to its end already.")
                return done
            if started:
                trainer.monitor.say(started)
            if config.training.adapt.wanted:
                trainer.monitor.say(f"{trained_share(trainer.model)} are trained.")
            manifest = None
            if accelerator.is_main_process:
                facts = {"fold": fold, "seed": config.seed, "config": config.model_dump()}
                data = digests(dataset.sources, load_fingerprint(run))
                manifest = Manifest(folder / MANIFEST, data, accelerator.device, **facts)
            try:
                trainer.train()
                return trainer.finish()
            except (
                RuntimeError
            ):  # a signal to the whole process group ends the loader's workers, at any moment
                time.sleep(0.5)  # the signal to this process may be on its way
                if stop:
                    trainer.monitor.say("Stopped. --resume goes on from the last checkpoint.")
                    stop.leave()
                raise
            finally:
                if manifest:
                    peak = peak_memory_mb(accelerator.device)
                    manifest.write(peak_memory_mb=peak, minutes=round(trainer.state.seconds / 60, 2))


def fitting_model(
    config: Config, plan: AnyPlan, folder: Path
) -> tuple[dict[str, Any], nn.Module, str, list[str]]:
    """Description of the network, the network, what was said of the weights it starts from, and what began afresh.

    Args:
        folder: of the fold; where it holds a training, that goes on.

    Raises:
        UsageError: options or weights that do not fit the plan's network.
    """
    spec, model, started, fresh = _model(config, plan, folder)
    check_penalty(model, config.training.penalty)
    trained = model
    if config.training.adapt.wanted:
        with torch.random.fork_rng([]):
            trained = adapt(copy.deepcopy(model), **adaptation(config.training.adapt.model_dump(), fresh))
    check_trained(trained, config.training.freeze, shares_of(config.training.lr_scale))
    check_patch(model, plan.patch_size, config.training.batch_size or plan.batch_size)
    return spec, model, started, fresh


def check_network(config: Config, plan: AnyPlan) -> None:
    """Raise `UsageError` for options that the network of a plan does not take, whatever its patch.

    Weights to start from are not read; `fitting_model` does.
    """
    if config.training.weights is None:
        with torch.random.fork_rng([]):
            model = build_model(model_spec(config, plan))
        check_penalty(model, config.training.penalty)
        check_trained(model, config.training.freeze, shares_of(config.training.lr_scale))


def _model(config: Config, plan: AnyPlan, folder: Path) -> tuple[dict[str, Any], nn.Module, str, list[str]]:
    weights = config.training.weights
    if weights is None and config.training.adapt.wanted:
        raise UsageError(
            "training.adapt changes weights that exist: give them by training.weights=RUN, a model or a file."
        )
    if (folder / LAST).exists():  # what the training started from has done its part, and may be gone
        info = load_checkpoint(folder / LAST)[1]
        spec = model_spec(config, plan, info.get("model") if weights else None)
        return spec, build_model(unstarted(spec)), "", info.get("fresh", [])
    if weights is None:
        spec = model_spec(config, plan)
        check_encoder_channels(spec, Ends.of(plan.to_dict()))
        return spec, build_model(spec), "", []
    start = read_start(weights)
    dims = (start.spec or {}).get("spatial_dims")
    if dims not in (None, plan.spatial_dims):
        raise UsageError(
            f"{start.source} is a {dims}D network, the plan is {plan.spatial_dims}D. "
            f"Start from weights of a {plan.spatial_dims}D one."
        )
    spec = model_spec(config, plan, start.spec)
    model = build_model(spec)
    return spec, model, *transfer(model, spec, start, Ends.of(plan.to_dict()))
