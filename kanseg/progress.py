"""Progress on long work: a bar on a terminal, a line a minute elsewhere, and of several processes one that talks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
PAUSE = 60  # seconds between two lines
# Variables that torchrun, accelerate launch or a script of a job gives each of several processes, beside WORLD_SIZE.
RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def progress(items: Iterable[T], text: str) -> Iterator[T]:
    """The items, with a bar on standard error while it is a terminal, else a line from time to time."""
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        return iter(track(items, text, total, console=Console(stderr=True), transient=True))
    return _told(items, text, total) if is_main() else iter(items)


def _told(items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
    tell = telling(text)
    for done, item in enumerate(items):
        tell(done, total)
        yield item


def telling(text: str) -> Callable[[int, int | None], None]:
    """What says now and then how much of some long work is done, when it is told."""
    start = said = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > PAUSE:
            said = now
            rest = f" of {total}, {time_left(done / total, now - start)} left" if total else ""
            note(f"{text}: {done}{rest}")

    return tell


def say(console: Console, text: str) -> None:
    """A line on a console as it is: brackets in names are no markup, and paths are not broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line on standard error."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def time_left(fraction: float, seconds: float) -> str:
    """Time to the end when `fraction` of the work took `seconds`.

    >>> time_left(0.25, 60)
    '3 min'
    """
    return "?" if fraction <= 0 else in_words(seconds * (1 - min(fraction, 1.0)) / fraction)


def in_words(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> in_words(0.25), in_words(30), in_words(600), in_words(36000)
    ('0.25 s', '30 s', '10 min', '10.0 h')
    """
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def in_figures(number: float) -> str:
    """A number by its first three figures, without an exponent.

    >>> in_figures(15432.1), in_figures(0.01234)
    ('15400', '0.0123')
    """
    import numpy as np  # here, for it takes longer than the verbs that need none

    return np.format_float_positional(number, 3, unique=False, fractional=False, trim="-")


def processes() -> int:
    """How many processes train together, where the environment says how they meet."""
    return int(os.environ.get("WORLD_SIZE") or 1) if all(map(os.environ.get, RENDEZVOUS)) else 1


def is_main() -> bool:
    """Whether this is the first process of all, as a launcher numbers them: the one that talks and writes."""
    return processes() == 1 or int(os.environ.get("RANK") or 0) == 0
