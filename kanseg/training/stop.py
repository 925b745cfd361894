"""Being asked to stop: a flag that the training loop looks at between two steps, and an orderly end elsewhere."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import psutil

from kanseg.progress import LAUNCHED

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

    orphaned()  # its first call notes the launcher
    with sigterm_by(leave):
        yield


@functools.cache
def _first_parent(own: int) -> int:
    """The parent of the process `own`, this one, when it was first asked for."""
    return os.getppid()


def orphaned() -> bool:
    """Whether this is a worker of torchrun or accelerate launch, which is gone: a SIGKILL tells its workers nothing.

    A process whose parent is gone gets another; on Windows it keeps the number of one that is no more.
    """
    launcher = _first_parent(os.getpid())
    return LAUNCHED in os.environ and (os.getppid() != launcher or not psutil.pid_exists(launcher))


class StopRequest:
    """Context manager: within it the first SIGTERM or SIGINT is only noted; a second one acts as usual.

    Attributes:
        signal: number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        orphaned()
        self._at_once = 0  # the process that such signals end, 0 for none
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

    def look(self) -> None:
        """Take the end of the launcher for a SIGTERM; when it is looked for, all processes can agree on it."""
        if orphaned():
            self.signal = signal.SIGTERM

    @contextmanager
    def heeded_at_once(self) -> Iterator[None]:
        """Within it a signal is not only noted, for there is nothing to save: data are read, which may take long."""
        if self:
            self.leave()
        self._at_once = os.getpid()  # not those that prepare patches
        try:
            yield
        finally:
            self._at_once = 0

    def leave(self) -> NoReturn:
        """Exit as the signal would have done: 143 for SIGTERM, `KeyboardInterrupt` for Ctrl-C."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self._at_once == os.getpid():
            self.leave()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
