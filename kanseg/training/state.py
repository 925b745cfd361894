"""Where a training stands: counters and clock, part of every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kanseg.config import TrainingConfig


@dataclass
class State:
    """Counters of a training, as they are saved.

    Attributes:
        epoch: the epoch that is running, from 0.
        step: steps of it that are done.
        updates: steps of all epochs.
        seconds: wall-clock time of training and its validations, over all resumes.
        waited: seconds of it spent on waiting for patches.
        epoch_began, epoch_waited: both when the epoch began.
        epoch_loss: sum of the losses of the epoch's steps.
        lr: learning rate of the last step.
        best: highest mean validation score; -1 before the first validation.
        best_epoch: its epoch; -1 before.
        stale: validations since.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    epoch_began: float = 0.0
    epoch_waited: float = 0.0
    epoch_loss: float = 0.0
    lr: float = 0.0
    best: float = -1.0
    best_epoch: int = -1
    stale: int = 0

    def fraction(self, options: TrainingConfig) -> float:
        """Share of the training that is done, by epochs or by time, whichever is further."""
        epochs = self.epoch + self.step / options.steps_per_epoch
        by_epochs = epochs / options.epochs if options.epochs else 0.0
        by_time = self.seconds / (60 * options.max_minutes) if options.max_minutes else 0.0
        return max(by_epochs, by_time)

    def at_end(self, options: TrainingConfig) -> bool:
        """Whether the budget or the patience is spent and the last epoch closed."""
        impatient = options.patience is not None and self.stale >= options.patience
        return self.step == 0 and (impatient or self.fraction(options) >= 1)

    def count_step(self, loss: float) -> None:
        """One more step, with its loss."""
        self.step += 1
        self.updates += 1
        self.epoch_loss += loss

    def next_epoch(self) -> None:
        """Close the epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_began, self.epoch_waited, self.epoch_loss = self.seconds, self.waited, 0.0

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether this validation beats all before it; if so it is noted."""
        mean = mean_score(scores)
        self.stale += 1
        if mean is None or mean <= self.best:
            return False
        self.best, self.best_epoch, self.stale = mean, self.epoch, 0
        return True

    def record(self) -> dict[str, Any]:
        """The epoch in numbers; `data_wait` is the share of its seconds spent on waiting for patches."""
        seconds = self.seconds - self.epoch_began
        return {
            "epoch": self.epoch,
            "loss": self.epoch_loss / max(self.step, 1),
            "lr": self.lr,
            "seconds": round(seconds, 2),
            "total_seconds": round(self.seconds, 2),
            "data_wait": _share(self.waited - self.epoch_waited, seconds),
        }

    def standing(self, metric: str) -> dict[str, Any]:
        """What of it a summary tells."""
        validated = self.best_epoch >= 0
        return {
            "epochs": self.epoch,
            "updates": self.updates,
            "minutes": round(self.seconds / 60, 2),
            "data_wait": _share(self.waited, self.seconds),
            "best_epoch": self.best_epoch if validated else None,
            f"best_epoch_{metric}": self.best if validated else None,
        }


def mean_score(scores: Mapping[str, float] | None) -> float | None:
    """Mean over the classes; None without a validation."""
    return sum(scores.values()) / len(scores) if scores else None


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
