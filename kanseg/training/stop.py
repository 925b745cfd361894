"""Being asked to stop: SIGTERM and Ctrl-C become a flag that the loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn


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
