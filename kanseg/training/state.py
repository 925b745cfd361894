"""Where a training stands: counters and clock, part of every checkpoint."""

from __future__ import annotations

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
        epoch_began: `seconds` when the epoch began.
        epoch_waited: seconds of the epoch spent on waiting for patches.
        epoch_loss: sum of the losses of the epoch's steps.
        lr: learning rate of the last step.
        best_dice: highest mean validation Dice; -1 before the first validation.
        best_epoch: its epoch; -1 before.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    epoch_began: float = 0.0
    epoch_waited: float = 0.0
    epoch_loss: float = 0.0
    lr: float = 0.0
    best_dice: float = -1.0
    best_epoch: int = -1

    def fraction(self, options: TrainingConfig) -> float:
        """Share of the training that is done, by epochs or by time, whichever is further."""
        epochs = self.epoch + self.step / options.steps_per_epoch
        by_epochs = epochs / options.epochs if options.epochs else 0.0
        by_time = self.seconds / (60 * options.max_minutes) if options.max_minutes else 0.0
        return max(by_epochs, by_time)

    def count_step(self, loss: float) -> None:
        """One more step, with its loss."""
        self.step += 1
        self.updates += 1
        self.epoch_loss += loss

    def next_epoch(self) -> None:
        """Close the epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_began, self.epoch_waited, self.epoch_loss = self.seconds, 0.0, 0.0

    def is_best(self, dice: dict[str, float]) -> bool:
        """Whether this validation beats all before it; if so it is noted."""
        mean = mean_dice(dice)
        if mean is None or mean <= self.best_dice:
            return False
        self.best_dice, self.best_epoch = mean, self.epoch
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
            "data_wait": round(self.epoch_waited / seconds, 4) if seconds else 0.0,
        }

    def standing(self) -> dict[str, Any]:
        """What of it a summary tells."""
        validated = self.best_epoch >= 0
        return {
            "epochs": self.epoch,
            "updates": self.updates,
            "minutes": round(self.seconds / 60, 2),
            "best_epoch": self.best_epoch if validated else None,
            "best_epoch_dice": self.best_dice if validated else None,
        }


def mean_dice(dice: dict[str, float] | None) -> float | None:
    """Mean over the classes; None without a validation."""
    return sum(dice.values()) / len(dice) if dice else None
