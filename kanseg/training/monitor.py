"""What a training shows: a progress bar or plain lines, log.jsonl, progress.png, and trackers by name."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from kanseg.config import Config
from kanseg.evaluation.report import LONGEST, short, told_apart
from kanseg.files import write_bytes, write_text
from kanseg.memory import taken
from kanseg.progress import progress, say, time_left
from kanseg.training.trackers import start_trackers

T = TypeVar("T")
LOG, PICTURE = "log.jsonl", "progress.png"
MOST_SHOWN = 12  # classes by name in lines and legends; of more the lowest, all are in log.jsonl
LOWEST_SHOWN = 3
PICTURE_SECONDS = 10  # between two drawings: one takes longer than the epochs of small trainings
MUCH_WAITING = 0.1  # share of an epoch from which on it is worth a word: more data.workers may help


class Monitor:
    """Shows and records the epochs of one training; a context manager around the loop.

    A record has the keys epoch, loss, lr, METRIC (class -> mean over cases; None without a validation),
    mean_METRIC, seconds (of the epoch), total_seconds, data_wait (share of the epoch), peak_memory_mb.

    Args:
        folder: where log.jsonl and progress.png are.
        config: its `logging` section names further trackers.
        metric: of the validations: "dice".
        console: where to print; `quiet` (on all but the main process) prints and writes nothing.
        first_epoch: records from this epoch on are dropped: the resumed training makes them again.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        metric: str = "dice",
        console: Console | None = None,
        first_epoch: int = 0,
        quiet: bool = False,
    ) -> None:
        self.console = console = console or Console()
        self.folder, self.metric, self.quiet = folder, metric, quiet
        self._drawn = time.monotonic()
        self.watch: Callable[[dict[str, Any]], None] | None = None  # told every record, after all else
        self.records = [] if quiet else _kept_records(folder / LOG, first_epoch)
        self.trackers = {} if quiet else start_trackers(folder, config, self.say)
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
        mean = f"mean_{self.metric}"
        score = next((record[mean] for record in reversed(self.records) if record[self.metric]), None)
        shown = "" if score is None else f"  {written(self.metric)} {score:.3f}"
        state = f"loss {loss:.3f}{shown}  {time_left(fraction, seconds)} left"
        self.bar.update(self.task, completed=fraction, description=f"epoch {epoch}", state=state)

    def walk(self, items: Sequence[T], text: str) -> Iterator[T]:
        """The items, with a bar below that of the training, or now and then a line."""
        if self.bar.disable:
            yield from progress(items, text.capitalize())
            return
        task = self.bar.add_task(text, total=len(items), state="")
        for item in items:
            yield item
            self.bar.advance(task)

    def say(self, text: str) -> None:
        """Print one line (once, whatever the number of processes)."""
        if not self.quiet:
            say(self.console, text)

    def epoch(self, record: dict[str, Any], fraction: float) -> None:
        """Write one epoch's record everywhere."""
        if self.quiet:
            return
        self.records.append(record)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not self.console.is_terminal:
            self.say(f"{_line(record, self.metric)}, {time_left(fraction, record['total_seconds'])} left")
        self._track(record)
        if self.watch is not None:
            self.watch(record)

    def picture(self, every: float = 0.0) -> None:
        """Draw loss and Dice over the epochs, unless that was done (or the training began) less than so many s ago."""
        if not self.quiet and self.records and time.monotonic() - self._drawn >= every:
            write_bytes(self.folder / PICTURE, draw_progress(self.records, self.metric))
            self._drawn = time.monotonic()

    def _track(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        numbers |= {f"{self.metric}/{name}": value for name, value in (record[self.metric] or {}).items()}
        for name, tracker in list(self.trackers.items()):
            try:
                tracker(numbers, record["epoch"])
            except Exception as error:  # whatever goes wrong in a tracker, the training is worth more
                del self.trackers[name]
                self.say(f"Warning: {name} failed and is off from now on: {error}")


def draw_progress(records: list[dict[str, Any]], metric: str = "dice") -> bytes:
    """Loss and score curves of `Monitor`'s records as PNG; the loss alone where nothing is validated."""
    from matplotlib.figure import Figure

    validated = [record for record in records if record[metric]]
    figure = Figure(figsize=(9 if validated else 5, 3.5), layout="constrained")
    left, *more = figure.subplots(1, 1 + bool(validated), squeeze=False)[0]
    marker = "." if len(records) == 1 else ""
    left.plot([record["epoch"] for record in records], [record["loss"] for record in records], f"k{marker}-")
    left.set(xlabel="epoch", ylabel="training loss")
    for right in more:
        told_apart(right)
        epochs = [record["epoch"] for record in validated]
        names = list(validated[-1][metric])
        many = len(names) > MOST_SHOWN
        for name in names:
            how = (
                {"color": "lightgray", "linewidth": 0.5}
                if many
                else {"label": short(name, LONGEST), "marker": "."}
            )
            right.plot(epochs, [record[metric].get(name) for record in validated], **how)
        if many:
            means = [record[f"mean_{metric}"] for record in validated]
            right.plot(epochs, means, color="black", marker=".", label=f"mean of {len(names)} classes")
        right.legend()
        right.set(xlabel="epoch", ylabel=f"{written(metric)} of validation cases", ylim=(0, 1))
    for axes in (left, *more):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if marker:
            axes.set_xlim(records[0]["epoch"] - 0.5, records[0]["epoch"] + 0.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory of this process so far: of the GPU if it computes, else resident."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else taken("VmHWM")
    return round(peak / 2**20, 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl up to the first line that is none: a kill may have cut the last one short."""
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not {"epoch", "loss"} <= record.keys():
            break
        records.append(record)
    return records


def _kept_records(path: Path, first_epoch: int) -> list[dict[str, Any]]:
    records = [record for record in read_log(path) if record["epoch"] < first_epoch]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def written(metric: str) -> str:
    """A score's name in text and pictures."""
    return metric.upper() if metric == "auc" else metric.capitalize()


def _line(record: dict[str, Any], metric: str) -> str:
    scores = record[metric]
    named = list((scores or {}).items())
    few = named if len(named) <= MOST_SHOWN else sorted(named, key=lambda one: one[1])[:LOWEST_SHOWN]
    by_name = ", ".join(f"{name} {value:.3f}" for name, value in few)
    if len(few) < len(named):
        by_name = f"lowest of {len(named)}: {by_name}"
    shown = f", {written(metric)} {record[f'mean_{metric}']:.3f} ({by_name})" if scores else ""
    start = f"epoch {record['epoch']}: loss {record['loss']:.4f}{shown}"
    waits = (
        f", {record['data_wait']:.0%} of it waiting for data" if record["data_wait"] > MUCH_WAITING else ""
    )
    return f"{start}, lr {record['lr']:.1e}, {record['seconds']:.1f} s{waits}"
