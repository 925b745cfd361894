"""Being asked to stop: a flag that the training loop looks at between two steps, and an orderly end elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT  # exit codes


@contextmanager
def sigterm_by(handler: Any) -> Iterator[None]:
    """Within it SIGTERM goes to `handler`, after it where it went before. Beside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def orderly_end() -> Iterator[None]:
    """Within it SIGTERM raises `SystemExit`, as Ctrl-C raises `KeyboardInterrupt`: half a result is cleared away."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    with sigterm_by(leave):
        yield


class StopRequest:
    """Context manager: within it the first SIGTERM or SIGINT is only noted; a second one acts as usual.

    Attributes:
        signal: number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the program's own ones stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self.signal != 0

    def leave(self) -> NoReturn:
        """Exit as the signal would have done: 143 for SIGTERM, `KeyboardInterrupt` for Ctrl-C."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
