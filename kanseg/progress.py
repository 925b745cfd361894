"""Progress on long work: a bar on a terminal, a line a minute elsewhere, and of several processes one that talks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
PAUSE = 60  # seconds between two lines


def progress(items: Iterable[T], text: str) -> Iterator[T]:
    """The items, with a bar on standard error while it is a terminal, else a line from time to time."""
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        return iter(track(items, text, total, console=Console(stderr=True), transient=True))
    return _told(items, text, total) if is_main() else iter(items)


def _told(items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > PAUSE:
            said = now
            rest = f" of {total}, {time_left(done / total, now - start)} left" if total else ""
            print(f"{text}: {done}{rest}", file=sys.stderr, flush=True)
        yield item


def note(text: str) -> None:
    """A line on standard error."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def time_left(fraction: float, seconds: float) -> str:
    """Time to the end when `fraction` of the work took `seconds`.

    >>> time_left(0.25, 60)
    '3 min'
    """
    if fraction <= 0:
        return "?"
    left = seconds * (1 - min(fraction, 1.0)) / fraction
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"


def is_main() -> bool:
    """Whether this is the first process of all, as a launcher numbers them: the one that talks and writes."""
    return int(os.environ.get("RANK", 0)) == 0
