"""Training: `fit` is one loop on accelerate, from a config, a plan and a data set to a run folder.

RUN/config.json, plan.json and splits.json say what was done; RUN/fold_0/ holds log.jsonl (a line an epoch),
last.safetensors (all that going on needs), best.safetensors (the weights with the highest validation Dice),
summary.json (Dice of every validation case at the end) and progress.png. A kill at any moment leaves the last
complete checkpoint; `resume=True` goes on from it, on the CPU to the last bit.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from monai.utils import convert_to_tensor
from rich.console import Console
from torch import Tensor, nn

from kanseg.config import Config, check_names
from kanseg.data.formats import Case, Dataset
from kanseg.data.loaders import train_loader, val_loader
from kanseg.data.plan import Plan
from kanseg.errors import UsageError, UserError
from kanseg.models import check_patch
from kanseg.training import checkpoint
from kanseg.training.checkpoint import (
    BEST,
    LAST,
    build_model,
    describe,
    load_weights,
    model_spec,
    named,
    part,
)
from kanseg.training.devices import make_accelerator
from kanseg.training.files import locked, write_json
from kanseg.training.losses import create_loss
from kanseg.training.monitor import Monitor, peak_memory_mb
from kanseg.training.optimizers import OPTIMIZERS, lr_factor, update_average
from kanseg.training.run_folder import SUMMARY, check_data, fold_cases, prepare_run, run_config, run_splits
from kanseg.training.state import State, mean_dice
from kanseg.training.stop import StopRequest
from kanseg.training.validate import spread, summarize, validate_batch, validate_case


def fit(
    config: Config,
    plan: Plan,
    dataset: Dataset,
    run: Path | str,
    *,
    fold: int | str = 0,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one fold and return its summary (also in RUN/fold_0/summary.json).

    Args:
        fold: number of the fold whose cases validate; "all" trains on every case, without validation.
        resume: go on from the last checkpoint with the options in RUN/config.json; only those in
            `kanseg.config.CHANGEABLE` may be set anew. Without a checkpoint it starts from the beginning.
        console: where to report; default standard output.

    Raises:
        UsageError: an unknown name or key, no such fold, a folder that holds a training when not resuming.
        UserError: the folder is in use or cannot be written, or loss or gradient stopped being finite.
        SystemExit: 143 after SIGTERM, with a checkpoint written.
    """
    check_names(config)
    run = Path(run)
    folder = run / f"fold_{fold}"
    config = run_config(config, run, fold, resume)
    check_data(plan, dataset)
    splits = run_splits(dataset, config, run)
    training, validation = fold_cases(splits, dataset, fold)
    accelerator = make_accelerator(config.training)
    set_seed(config.data.seed)
    spec = model_spec(config, plan)
    model = build_model(spec)  # before anything is written: its options may not fit
    check_patch(model, plan.patch_size)
    if accelerator.is_main_process:
        prepare_run(config, plan, splits, run, fold)
    accelerator.wait_for_everyone()
    with locked(folder, accelerator.is_main_process), StopRequest() as stop:
        trainer = Trainer(config, plan, model, accelerator, folder, stop, describe(config, plan, spec, fold))
        trainer.load()
        quiet = not accelerator.is_main_process
        with Monitor(folder, config, console or Console(), trainer.state.epoch, quiet) as trainer.monitor:
            if trainer.at_end() and (folder / SUMMARY).exists():
                trainer.monitor.say(f"{folder} is trained to its end already.")
                return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            trainer.train(training, validation)
            return trainer.finish(validation)


class Trainer:
    """The loop and what it turns: model, optimizer, moving average, clock, checkpoints."""

    monitor: Monitor

    def __init__(
        self,
        config: Config,
        plan: Plan,
        model: nn.Module,
        accelerator: Accelerator,
        folder: Path,
        stop: StopRequest,
        description: dict[str, Any],
    ) -> None:
        options = config.training
        self.config, self.options, self.plan, self.folder = config, options, plan, folder
        self.accelerator, self.stop, self.description = accelerator, stop, description
        self.model, self.state = model, State()
        self.rng: tuple[dict[str, Tensor], dict[str, Any]] | None = (
            None  # to be restored before the next step
        )
        self.averaged = copy.deepcopy(model).to(accelerator.device).eval() if options.ema_decay else model
        self.loss = create_loss(options.loss)
        optimizer = OPTIMIZERS.create(
            options.optimizer, model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        # `network` computes (accelerate may wrap it); `model` holds the same weights under their plain names.
        self.network, self.optimizer = accelerator.prepare(model, optimizer)

    def train(self, training: Sequence[Case], validation: Sequence[Case]) -> None:
        """Run epochs until the budget is spent; validate, log and save after each."""
        if self.at_end():
            return
        loader = self._train_loader(training)
        watched = self._share(spread(validation, self.options.validation_cases))
        validating = val_loader(self.plan, watched) if watched else []
        self._start = time.monotonic() - self.state.seconds
        while not self.at_end():
            self._train_epoch(loader)
            dice = self._validate(validating) if validation and self._validation_is_due() else None
            self._end_epoch(dice)

    def at_end(self) -> bool:
        """Whether the budget is spent and the last epoch closed."""
        return self.state.step == 0 and self.fraction() >= 1

    def fraction(self) -> float:
        """Share of the training that is done."""
        return self.state.fraction(self.options)

    def finish(self, validation: Sequence[Case]) -> dict[str, Any]:
        """Validate the best weights on all cases, on the images' own grids, and write summary.json."""
        if self.state.best_epoch < 0:  # never validated: the last weights are the best known
            self._save_best()
        self.accelerator.wait_for_everyone()
        tensors, _ = checkpoint.load_checkpoint(self.folder / BEST)
        load_weights(self.averaged, part(tensors, "model"), self.folder / BEST)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        summary = {"fold": self.description["fold"], "parameters": parameters, **self.state.standing()}
        if validation and self.options.final_validation:
            self.monitor.say(f"Validating the best weights on {len(validation)} cases, on their own grids.")
            scores = self._final_scores(validation)
            summary |= summarize(validation, scores, self.plan, self.config.data.seed)
        self.monitor.picture()
        if self.accelerator.is_main_process:
            write_json(self.folder / SUMMARY, summary)
        return summary

    def load(self) -> None:
        """Take up the last checkpoint of the folder, if there is one."""
        path = self.folder / LAST
        if not path.exists():
            return
        tensors, info = checkpoint.load_checkpoint(path)
        if info.get("plan") != self.description["plan"]:
            raise UsageError(f"plan.json is not the one of {path}. Put it back, or start a new run folder.")
        load_weights(self.model, part(tensors, "model"), path)
        if self.averaged is not self.model:
            load_weights(self.averaged, part(tensors, "average"), path)
        try:
            checkpoint.restore_optimizer(self.optimizer, part(tensors, "optimizer"))
            self.state = State(**info["state"])
            self.rng = part(tensors, "rng"), info["rng"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be resumed ({error}); it is no whole last checkpoint.") from error

    def _train_epoch(self, loader: Any) -> None:
        state = self.state
        if state.step >= self.options.steps_per_epoch or self.fraction() >= 1:
            return  # resumed after the last step, before or in the validation
        self.network.train()
        loader.set_epoch(state.epoch)
        self._restore_rng()
        batches = iter(loader)
        for _ in range(state.step):  # resumed within an epoch: go on behind the patches it has seen
            next(batches)
        if state.step:
            self._restore_rng()
        self.rng = None
        while state.step < self.options.steps_per_epoch and self.fraction() < 1:
            asked = time.monotonic()
            batch = self._next(batches)
            state.epoch_waited += time.monotonic() - asked
            loss = self._train_step(batch)
            state.step, state.updates, state.epoch_loss = (
                state.step + 1,
                state.updates + 1,
                state.epoch_loss + loss,
            )
            self._tick()
            self._leave_if_asked()
            self.monitor.step(state.epoch, state.epoch_loss / state.step, self.fraction(), state.seconds)

    def _train_step(self, batch: dict[str, Tensor]) -> float:
        device, options = self.accelerator.device, self.options
        self.state.lr = options.lr * lr_factor(self.fraction(), options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.state.lr
        image, label = (
            convert_to_tensor(batch[key], track_meta=False).to(device) for key in ("image", "label")
        )
        loss = self.loss(self.network(image), label.float())
        self._check_finite("loss", loss.item())
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), options.gradient_clip)
        self._check_finite("gradient", float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if options.ema_decay:
            update_average(self.averaged.state_dict(), self.model, options.ema_decay, self.state.updates)
        return loss.item()

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        grads = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        broken = next((name for name, grad in grads if not grad.isfinite().all()), None)
        where = f" (first in {broken})" if broken else ""
        raise UserError(
            f"The {what} became {value}{where} in epoch {self.state.epoch}, step {self.state.step}. "
            f"Lower training.lr (now {self.options.lr}) or training.gradient_clip; "
            f"the last complete checkpoint in {self.folder} is from before."
        )

    def _validation_is_due(self) -> bool:
        return (self.state.epoch + 1) % self.options.validate_every == 0 or self.fraction() >= 1

    def _validate(self, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean Dice a class over the watched cases, each process its share."""
        self.averaged.eval()
        scores = []
        for batch in loader:
            with self.accelerator.autocast():
                scores.append(validate_batch(self.averaged, batch, self.plan, self.accelerator.device))
            if self.accelerator.num_processes == 1:
                self._tick()
                self._leave_if_asked()
        means = torch.tensor(gather_object(scores), dtype=torch.float64).mean(0).tolist()
        self._tick()
        return dict(zip(self.plan.label_names[1:], means, strict=True))

    def _final_scores(self, validation: Sequence[Case]) -> dict[str, list[float]]:
        self.averaged.eval()
        scores = []
        for case in self._share(validation):
            found = validate_case(
                self.averaged, case, self.plan, self.config.inference, self.accelerator.device
            )
            scores.append((case.id, found))
            if self.stop:
                self.monitor.say("Stopped. --resume makes the final validation again.")
                self.stop.leave()
        return dict(gather_object(scores))

    def _end_epoch(self, dice: dict[str, float] | None) -> None:
        state = self.state
        if dice and state.is_best(dice):
            self._save_best()
        self._tick()
        memory = peak_memory_mb(self.accelerator.device)
        record = {**state.record(), "dice": dice, "mean_dice": mean_dice(dice), "peak_memory_mb": memory}
        state.next_epoch()
        self.monitor.epoch(record, self.fraction())
        self._save_last()
        self._leave_if_asked(saved=True)
        if dice:
            self.monitor.picture()

    def _tick(self) -> None:
        """Advance the clock; all processes take the main one's time and signal, to keep one learning rate."""
        self.state.seconds = time.monotonic() - self._start
        if self.accelerator.num_processes > 1:
            told = [self.state.seconds, self.stop.signal]
            own = torch.tensor(told, dtype=torch.float64, device=self.accelerator.device)
            seconds, signal = broadcast(own).tolist()
            self.state.seconds, self.stop.signal = seconds, int(signal)

    def _leave_if_asked(self, saved: bool = False) -> None:
        if self.stop:
            if not saved:
                self._save_last()
            self.monitor.say(
                f"Stopped in epoch {self.state.epoch}; {self.folder / LAST} is saved. Go on with --resume."
            )
            self.stop.leave()

    def _next(self, batches: Any) -> dict[str, Tensor]:
        try:
            return next(batches)
        except RuntimeError:  # a signal to the whole process group ends the loader's workers as well
            self._leave_if_asked()
            raise

    def _train_loader(self, cases: Sequence[Case]) -> Any:
        return train_loader(
            self.plan,
            cases,
            batch_size=self.options.batch_size or self.plan.batch_size,
            steps=self.options.steps_per_epoch,
            seed=self.config.data.seed + 1_000_003 * self.accelerator.process_index,
            workers=self.config.data.workers,
        )

    def _share(self, cases: Sequence[Case]) -> Sequence[Case]:
        return cases[self.accelerator.process_index :: self.accelerator.num_processes]

    def _restore_rng(self) -> None:
        if self.rng is not None:
            checkpoint.restore_rng(*self.rng)

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            info = {**self.description, **self.state.standing()}
            checkpoint.save_checkpoint(self.folder / BEST, named("model", self.averaged.state_dict()), info)

    def _save_last(self) -> None:
        if not self.accelerator.is_main_process:
            return
        rng_tensors, rng = checkpoint.rng_state()
        tensors = {
            **named("model", self.model.state_dict()),
            **(named("average", self.averaged.state_dict()) if self.options.ema_decay else {}),
            **named("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **named("rng", rng_tensors),
        }
        info = {**self.description, "state": asdict(self.state), "rng": rng}
        checkpoint.save_checkpoint(self.folder / LAST, tensors, info)
