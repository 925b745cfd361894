"""The loop and what it turns: model, optimizer, moving average, clock, checkpoints. It knows no kind of task."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from kanseg.config import Config
from kanseg.data.digests import file_digest
from kanseg.data.plans import plan_from_dict
from kanseg.errors import UsageError, UserError
from kanseg.files import make_folder, write_json
from kanseg.layers.mixture import take_balance_loss
from kanseg.study.peft import adapt, merged
from kanseg.training import checkpoint
from kanseg.training.checkpoint import BEST, LAST, load_weights, named, part
from kanseg.training.devices import checkpoint_stages, may_record, record_passes
from kanseg.training.monitor import PICTURE_SECONDS, Monitor, peak_memory_mb
from kanseg.training.optimizers import create_optimizer, lr_factor, update_average
from kanseg.training.parallel import full, gathered, like, shard, whole_batch
from kanseg.training.parameters import freeze, rest_frozen
from kanseg.training.regularization import Penalties
from kanseg.training.run_folder import PREDICTIONS, SUMMARY, WEIGHTS, check_weights
from kanseg.training.state import State, mean_score
from kanseg.training.stop import StopRequest
from kanseg.training.task import Batch, Task

SMALL = 1_000_000  # numbers of a batch whose passes take less time on a GPU than their launches
# What the state of an optimizer belongs to; where one was changed (--override), the optimizer starts afresh.
OPTIMIZED = ("optimizer", "freeze", "lr_scale", "layer_decay")


class Trainer:
    """One training of a model in a folder. `load` goes on from the folder's last checkpoint."""

    monitor: Monitor

    def __init__(
        self,
        config: Config,
        task: Task,
        model: nn.Module,
        accelerator: Accelerator,
        folder: Path,
        stop: StopRequest,
        description: dict[str, Any],
    ) -> None:
        options = config.training
        self.config, self.options, self.task, self.folder = config, options, task, folder
        self.accelerator, self.stop, self.description = accelerator, stop, description
        self.state = State()
        self.rng: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None  # for before the next step
        model.to(accelerator.device)
        self.evaluated = copy.deepcopy(model).eval()  # whole, plain, best or average
        if options.adapt.wanted:
            adapt(model, **checkpoint.adaptation(options.adapt.model_dump(), description["fresh"]))
        freeze(model, options.freeze)
        self.penalties = Penalties(model, options.penalty)
        if options.gradient_checkpointing:
            checkpoint_stages(model)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if options.compile:
            model.compile()
        # `network` computes (accelerate may wrap it); `model` holds the same weights under their plain names.
        self.model = self.network = model
        if shard(model, accelerator):
            self.optimizer = accelerator.prepare(create_optimizer(model, options))
        else:
            self.network, self.optimizer = accelerator.prepare(model, create_optimizer(model, options))
        weights = self.model.state_dict() if options.ema_decay else {}
        self.average = {name: value.detach().clone() for name, value in weights.items()}
        self._saved = 0.0  # seconds of training at the last checkpoint
        self._first: torch.Size | None = None  # shape of the first batch

    def train(self) -> None:
        """Run epochs until the budget is spent; validate, log and save after each."""
        if self.at_end():
            return
        state, rank = self.state, self.accelerator.process_index
        step = state.step * self.options.accumulate
        with self.stop.heeded_at_once():
            batches = self.task.batches(state.epoch, step, rank, self.accelerator.num_processes)
        self._start = time.monotonic() - state.seconds
        if self.rng is not None:
            checkpoint.restore_rng(*self.rng)
        while not self.at_end():
            self._train_epoch(batches)
            self._end_epoch(self._validate() if self._validation_is_due() else None)
        if self.fraction() < 1:
            self.monitor.say(
                f"Ended early: {state.stale} validations in a row were no better than that of epoch {state.best_epoch} "
                f"(training.patience={self.options.patience})."
            )

    def at_end(self) -> bool:
        """Whether the training is over and its last epoch closed."""
        return self.state.at_end(self.options)

    def fraction(self) -> float:
        """Share of the training that is done."""
        return self.state.fraction(self.options)

    def finish(self) -> dict[str, Any]:
        """Validate the best weights on all that was held out, as a user would predict, and write summary.json."""
        if self.state.best_epoch < 0:  # never validated: the last weights are the best known
            self._take_average()
            self._save_best()
        self.accelerator.wait_for_everyone()
        tensors, _ = checkpoint.load_checkpoint(self.folder / BEST)
        load_weights(self.evaluated, part(tensors, "model"), self.folder / BEST)
        parameters = sum(parameter.numel() for parameter in self.evaluated.parameters())
        digest = file_digest(self.folder / BEST)
        known = {"fold": self.description["fold"], "parameters": parameters, WEIGHTS: digest}
        summary = {**known, **self._standing()}
        if self.task.held_out():
            self.monitor.say("Validating the best weights on all that was held out.")
            summary |= self.task.summarize(self._final_scores(digest))
        self.monitor.picture()
        if self.accelerator.is_main_process:
            write_json(self.folder / SUMMARY, summary)
        return summary

    def finished(self, summary: dict[str, Any] | None) -> dict[str, Any] | None:
        """A summary, unless it is of an earlier end, or lacks the final validation that is wanted now.

        Raises:
            UserError: the weights that it tells of are damaged.
        """
        if summary is None or summary.get("updates") != self.state.updates:
            return None
        plain = {"fold", "parameters", WEIGHTS, *self._standing()}
        if self.task.held_out() and summary.keys() <= plain:
            return None
        check_weights(self.folder)
        return summary

    def load(self) -> None:
        """Take up the last checkpoint of the folder, if there is one."""
        path = self.folder / LAST
        if not path.exists():
            return
        tensors, info = checkpoint.load_checkpoint(path)
        if plan_from_dict(info.get("plan") or {}).to_dict() != self.description["plan"]:
            raise UsageError(f"plan.json is not the one of {path}. Put it back, or start a new run folder.")
        try:
            weights = part(tensors, "model")
            load_weights(self.evaluated, merged(self.model, weights), path)  # checks that they fit
            self._put(self.model.state_dict(), weights)
            self._put(self.average, part(tensors, "average") or weights)
            before, now = info["config"]["training"], self.options.model_dump()
            if not any(before.get(key, now[key]) != now[key] for key in OPTIMIZED):
                self._load_optimizer(part(tensors, "optimizer"), info["optimizer"])
            if self.accelerator.scaler is not None and info["scaler"]:
                self.accelerator.scaler.load_state_dict(info["scaler"])
            self.state = State(**info["state"])
            self._saved = self.state.seconds
            rank = str(self.accelerator.process_index)
            if rank in info["rng"]:  # else it is a further process, with a fresh generator
                self.rng = part(tensors, f"rng.{rank}"), info["rng"][rank]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be resumed ({error}); it is no whole last checkpoint.") from error

    def _train_epoch(self, batches: Iterator[Batch]) -> None:
        state = self.state
        self.network.train()
        rest_frozen(self.model)
        while state.step < self.options.steps_per_epoch and self.fraction() < 1:
            asked = time.monotonic()
            batch = [self._next(batches) for _ in range(self.options.accumulate)]
            state.waited += time.monotonic() - asked
            loss = self._train_step(batch)
            state.count_step(loss)
            self._tick()
            self._leave_if_asked()
            if state.seconds - self._saved >= 60 * self.options.save_minutes:
                self._save_last()
            self.monitor.step(state.epoch, state.epoch_loss / state.step, self.fraction(), state.seconds)

    def _train_step(self, batches: list[Batch]) -> float:
        """One step of the optimizer; its closure computes loss and gradient of the batches as often as it asks."""
        state, options = self.state, self.options
        schedule = lr_factor(self.fraction(), options.warmup, options.schedule, **options.schedule_options)
        state.lr = options.lr * schedule
        for group in self.optimizer.param_groups:
            group["lr"] = state.lr * group["lr_scale"]
        moved = [self.task.augmented(self._on_device(batch)) for batch in batches]
        first: list[float] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._backward(moved)
            first.append(loss.item())
            return loss

        if self.accelerator.scaler is None:
            self.optimizer.step(closure)
        else:  # torch's scaler takes no closure
            closure()
            self.optimizer.step()
        if options.ema_decay:
            update_average(self.average, self.model, options.ema_decay, state.updates)
        return first[0]

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Mean loss of the batches, with its gradient in the parameters."""
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                self._record(batch["image"])
                output = whole_batch(self.network(batch["image"]), self.accelerator)
                targets = {key: value for key, value in batch.items() if key != "image"}
                loss = self.task.loss(output, whole_batch(targets, self.accelerator))
                loss = (loss + take_balance_loss(self.model) + self.penalties.take()) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        found = {"loss": total}
        if not isinstance(
            self.optimizer.optimizer, torch.optim.LBFGS
        ):  # its line search needs true gradients
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
            found["gradient"] = full(norm).to(total)
        for what, value in zip(found, torch.stack(list(found.values())).tolist(), strict=True):  # one wait
            self._check_finite(what, value)
        return total

    def _record(self, image: Tensor) -> None:
        """Record the network's passes at the first batch where that is asked for, or say where it would be worth it."""
        if self._first is None:
            self._first = image.shape
            if self.options.cuda_graph:
                record_passes(self.network, image)
            elif image.numel() <= SMALL and may_record(self.options, self.accelerator):
                self.monitor.say(
                    "Patches are small for a GPU: training.cuda_graph=true may be several times faster."
                )
        if self.options.cuda_graph and image.shape != self._first:
            shapes = f"got {tuple(image.shape)} after {tuple(self._first)}"
            raise UsageError(f"training.cuda_graph=true needs batches of one shape, {shapes}.")

    def _on_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return {
            key: convert_to_tensor(value, track_meta=False).to(device, non_blocking=True)
            for key, value in batch.items()
        }

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value) or (what == "gradient" and self.accelerator.scaler is not None):
            return  # the scaler of fp16 skips such a step and goes on with a smaller scale
        where = ""
        if what == "gradient":
            grads = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            broken = next((name for name, grad in grads if not full(grad).isfinite().all()), None)
            where = f" (first in {broken})" if broken else ""
        raise UserError(
            f"The {what} became {value}{where} in epoch {self.state.epoch}, step {self.state.step}. "
            f"Lower training.lr (now {self.options.lr}) or training.gradient_clip; "
            f"the last complete checkpoint in {self.folder} is from before."
        )

    def _validation_is_due(self) -> bool:
        if not self.task.watched():
            return False
        return (self.state.epoch + 1) % self.options.validate_every == 0 or self.fraction() >= 1

    def _validate(self) -> dict[str, float]:
        """Scores of the watched items together, each process its share."""
        self._take_average()
        scores = []
        items = self.task.watched()
        for index in self._share(items):
            with self.accelerator.autocast():
                scores.append((index, self.task.score(self.evaluated, items[index], self.accelerator.device)))
            if self.accelerator.num_processes == 1:
                self._tick()
                self._leave_if_asked()
        means = self.task.mean(gathered(scores, self.accelerator))
        self._tick()
        return dict(means)

    def _final_scores(self, digest: str) -> list[list[Any]]:
        folder = make_folder(self.folder / PREDICTIONS)
        scores = []
        items = self.task.held_out()
        for index in self.monitor.walk(self._share(items), "validating"):
            device = self.accelerator.device
            found = self.task.final_score(self.evaluated, items[index], device, folder, digest)
            scores.append((index, found))
            self.stop.look()
            if self.stop:
                self.monitor.say("Stopped. --resume makes the final validation again.")
                self.stop.leave()
        return gathered(scores, self.accelerator)

    def _end_epoch(self, scores: dict[str, float] | None) -> None:
        state, metric = self.state, self.task.metric
        if scores and state.is_best(scores):
            self._save_best()
        self._tick()
        memory = peak_memory_mb(self.accelerator.device)
        found = {metric: scores, f"mean_{metric}": mean_score(scores)}
        record = {**state.record(), **found, "peak_memory_mb": memory}
        state.next_epoch()
        self.monitor.epoch(record, self.fraction())
        self._save_last()
        self._leave_if_asked(saved=True)
        if scores:
            self.monitor.picture(PICTURE_SECONDS)

    def _tick(self) -> None:
        """Advance the clock; all processes take the main one's time and signal, to keep one learning rate."""
        self.state.seconds = time.monotonic() - self._start
        self.stop.look()
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

    def _next(self, batches: Iterator[Batch]) -> Batch:
        try:
            return next(batches)
        except RuntimeError:  # a signal to the whole process group ends the loader's workers as well
            self._leave_if_asked()
            raise

    def _share(self, items: Sequence[Any]) -> range:
        """Numbers of this process's items; each item is made when it is asked for."""
        return range(self.accelerator.process_index, len(items), self.accelerator.num_processes)

    def _standing(self) -> dict[str, Any]:
        return self.state.standing(self.task.metric)

    def _take_average(self) -> None:
        """Let `evaluated` have the averaged weights, or the model's where no average is kept."""
        weights = self.average or self.model.state_dict()
        whole = {name: full(value) for name, value in weights.items()}
        self.evaluated.load_state_dict(merged(self.model, whole))

    @staticmethod
    def _put(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(like(tensors[name], value))

    def _load_optimizer(self, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = checkpoint.unpack(tensors, tree)
        for index, entries in state["state"].items():
            entries |= {
                name: like(value, parameters[index])
                for name, value in entries.items()
                if isinstance(value, Tensor)
            }
        self.optimizer.load_state_dict(state)

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            info = {**self.description, **self._standing()}
            checkpoint.save_checkpoint(self.folder / BEST, named("model", self.evaluated.state_dict()), info)

    def _save_last(self) -> None:
        """Write all that going on needs; every process takes part, the main one writes."""
        self._saved = self.state.seconds
        rank = self.accelerator.process_index
        rng = dict(gathered([(rank, (str(rank), checkpoint.rng_state()))], self.accelerator))
        optimizer, optimizer_info = checkpoint.pack(self.optimizer.state_dict())
        tensors = {
            **named("model", self.model.state_dict()),
            **named("average", self.average),
            **named("optimizer", optimizer),
            **{
                f"rng.{key}": value
                for rank, (states, _) in rng.items()
                for key, value in named(rank, states).items()
            },
        }
        tensors = {name: full(value) for name, value in tensors.items()}
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        info = {
            **self.description,
            "state": asdict(self.state),
            "rng": {rank: numbers for rank, (_, numbers) in rng.items()},
            "optimizer": optimizer_info,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        checkpoint.save_checkpoint(self.folder / LAST, tensors, info)
