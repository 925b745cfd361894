"""What a training shows: a progress bar or plain lines, log.jsonl, progress.png, TensorBoard, wandb."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from kanseg.config import Config
from kanseg.errors import UserError
from kanseg.training.files import write_bytes

Tracker = Callable[[dict[str, float], int], None]
LOG, PICTURE = "log.jsonl", "progress.png"


class Monitor:
    """Shows and records the epochs of one training; a context manager around the loop.

    A record has the keys epoch, loss, lr, dice (class -> mean over cases; None without a validation),
    mean_dice, seconds (of the epoch), total_seconds, data_wait (share of the epoch), peak_memory_mb.

    Args:
        folder: where log.jsonl and progress.png are.
        config: its `logging` section names further trackers.
        console: where to print; `quiet` (on all but the main process) prints and writes nothing.
        first_epoch: records from this epoch on are dropped: the resumed training makes them again.
    """

    def __init__(
        self, folder: Path, config: Config, console: Console, first_epoch: int = 0, quiet: bool = False
    ) -> None:
        self.folder, self.console, self.quiet = folder, console, quiet
        self.records = [] if quiet else _kept_records(folder / LOG, first_epoch)
        self.trackers = [] if quiet else _trackers(folder, config, console)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("training", total=1.0, state="")

    def __enter__(self) -> Monitor:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, loss: float, fraction: float, seconds: float) -> None:
        """Move the bar."""
        dice = next((record["mean_dice"] for record in reversed(self.records) if record["dice"]), None)
        shown = "" if dice is None else f"  Dice {dice:.3f}"
        state = f"loss {loss:.3f}{shown}  {time_left(fraction, seconds)} left"
        self.bar.update(self.task, completed=fraction, description=f"epoch {epoch}", state=state)

    def say(self, text: str) -> None:
        """Print one line (once, whatever the number of processes)."""
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def epoch(self, record: dict[str, Any], fraction: float) -> None:
        """Write one epoch's record everywhere."""
        if self.quiet:
            return
        self.records.append(record)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not self.console.is_terminal:
            self.say(f"{_line(record)}, {time_left(fraction, record['total_seconds'])} left")
        self._track(record)

    def picture(self) -> None:
        """Draw loss and Dice over the epochs."""
        if not self.quiet and self.records:
            write_bytes(self.folder / PICTURE, draw_progress(self.records))

    def _track(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        numbers |= {f"dice/{name}": value for name, value in (record["dice"] or {}).items()}
        for tracker in list(self.trackers):
            try:
                tracker(numbers, record["epoch"])
            except Exception as error:  # whatever goes wrong in a tracker, the training is worth more
                self.trackers.remove(tracker)
                self.say(f"Warning: a tracker failed and is off from now on: {error}")


def draw_progress(records: list[dict[str, Any]]) -> bytes:
    """Loss and Dice curves of `Monitor`'s records as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([record["epoch"] for record in records], [record["loss"] for record in records], color="black")
    left.set(xlabel="epoch", ylabel="training loss")
    validated = [record for record in records if record["dice"]]
    epochs = [record["epoch"] for record in validated]
    for name in validated[-1]["dice"] if validated else ():
        right.plot(epochs, [record["dice"].get(name) for record in validated], label=name, marker=".")
    if validated:
        right.legend()
    right.set(xlabel="epoch", ylabel="Dice of validation cases", ylim=(0, 1))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def time_left(fraction: float, seconds: float) -> str:
    """Time to the end when `fraction` of the work took `seconds`.

    >>> time_left(0.25, 60)
    '3 min'
    """
    if fraction <= 0:
        return "?"
    left = seconds * (1 - min(fraction, 1.0)) / fraction
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory of this process so far: of the GPU if it computes, else resident; 0 where unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    units = 2**20 if sys.platform == "darwin" else 2**10  # the kernel counts bytes there, KiB here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units, 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _kept_records(path: Path, first_epoch: int) -> list[dict[str, Any]]:
    records = [record for record in read_log(path) if record["epoch"] < first_epoch]
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return records


def _line(record: dict[str, Any]) -> str:
    dice = record["dice"]
    by_class = ", ".join(f"{name} {value:.3f}" for name, value in (dice or {}).items())
    shown = f", Dice {record['mean_dice']:.3f} ({by_class})" if dice else ""
    start = f"epoch {record['epoch']}: loss {record['loss']:.4f}{shown}"
    return f"{start}, lr {record['lr']:.1e}, {record['seconds']:.1f} s"


def _trackers(folder: Path, config: Config, console: Console) -> list[Tracker]:
    made = []
    for name in ("tensorboard", "wandb"):
        if not getattr(config.logging, name):
            continue
        if find_spec(name) is None:
            raise UserError(f"logging.{name}=true needs: pip install {name}. Or leave it off.")
        try:
            made.append({"tensorboard": _tensorboard, "wandb": _wandb}[name](folder, config))
        except Exception as error:  # no network, no login: the training goes on without
            console.print(f"Warning: {name} cannot start and stays off: {error}", markup=False)
    return made


def _tensorboard(folder: Path, config: Config) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return track


def _wandb(folder: Path, config: Config) -> Tracker:
    import wandb

    run = wandb.init(
        project=config.logging.project, dir=str(folder), config=config.model_dump(), name=folder.parent.name
    )

    def track(numbers: dict[str, float], epoch: int) -> None:
        run.log(numbers, step=epoch)

    return track
