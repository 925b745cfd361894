"""Progress on long work: a bar on a terminal, silence elsewhere, and of several processes one that talks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], text: str) -> Iterator[T]:
    """The items, with a bar on standard error while it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    items = list(items)
    return iter(
        track(items, text, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else items
    )


def is_main() -> bool:
    """Whether this is the first process of all, as a launcher numbers them: the one that talks and writes."""
    return int(os.environ.get("RANK", 0)) == 0
