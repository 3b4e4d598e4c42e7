"""Stopping a training by a signal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """Within it SIGINT and SIGTERM set ``raised`` and say so; a second SIGINT raises KeyboardInterrupt.

    Signals reach the main thread only; in another one nothing changes.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.raised = False
        self._echo = echo
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a job scheduler may send it repeatedly
        self.raised = True
        # A handler that interrupts a print cannot print; without a terminal it need not.
        with contextlib.suppress(RuntimeError, OSError):
            self._echo("finishing this iteration and saving; Ctrl-C again stops now")
